"""The built site in a real browser: nothing missing, nothing foreign, nothing broken."""

from urllib.parse import unquote, urlsplit

import looks
import pytest
from axe_playwright_python.sync_playwright import Axe
from conftest import SITE, swipe, themes
from conftest import site_pages as _pages

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]
PAGE_BYTES = 1_000_000  # of one page, beside the scripts that all pages share


@pytest.fixture
def page(context):
    page = context(viewport={"width": 1280, "height": 900}).new_page()
    page.requests, page.troubles = [], []
    page.on("request", lambda r: page.requests.append(r.url))
    page.on("console", lambda m: page.troubles.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: page.troubles.append(str(e)))
    return page


def _scroll_through(page):
    """Past everything that waits for its turn, a screen and two frames at a time; a browser may lose a frame."""
    page.evaluate("""async () => {
        const frame = () => new Promise(done => { requestAnimationFrame(done); setTimeout(done, 1000); });
        for (let y = 0; y < document.body.scrollHeight; y += innerHeight) {
            scrollTo({top: y, behavior: "instant"}); await frame(); await frame();
        }
    }""")


@pytest.mark.parametrize("name", _pages())
def test_page(name, page, server, tally):
    page.goto(f"{server}/{name}", wait_until="load")
    _scroll_through(page)
    figures = page.locator(".lo-figure")
    assert page.locator(".lo-caption").count() == figures.count(), "every figure has a numbered caption"
    assert (SITE / name).stat().st_size < PAGE_BYTES
    for figure in looks.figures(page):
        drawn = ".trace path, .points path, .heatmaplayer image, .gl-container canvas, .gl-container div"
        assert figure.locator(drawn).count() > 0, "a figure without marks"
        assert len(figure.get_attribute("aria-label") or "") > 20, "a figure without alternative text"
        assert figure.locator(".modebar-btn").count() == 0, "a mode bar lies over legends and menus"
    _formulas_and_tables(page, tally)
    assert looks.menus(page, tally) == []
    assert looks.faint(page) == []
    foreign = [u for u in page.requests if not u.startswith((server, "data:", "blob:"))]
    tally.update(pages=1, figures=figures.count())
    tally.update({"foreign requests": len(foreign), "console errors": len(page.troubles)})
    assert foreign == [] and page.troubles == []


@pytest.mark.parametrize("name", _pages())
def test_page_on_a_phone(name, context, server, tally):
    page = context(viewport={"width": 375, "height": 812}, has_touch=True, is_mobile=True).new_page()
    page.goto(f"{server}/{name}", wait_until="load")
    _scroll_through(page)
    _formulas_and_tables(page, tally)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    assert looks.thumbed(page, tally) == []
    assert looks.cut_words(page) == []


def _formulas_and_tables(page, tally):
    """Formulas are set, and nothing of them is cut; a table that is wider than its column shows that it is."""
    assert looks.typeset(page) == []
    assert looks.unset_formulas(page) == []
    assert looks.cut_formulas(page) == []
    tables = looks.tables(page)
    tally.update(formulas=page.locator(".math").count(), tables=len(tables))
    assert [t for t in tables if t not in ("fits", "shown")] == []


@pytest.mark.parametrize("name", _pages('"type":"scatter3d"', '"type":"mesh3d"'))
def test_a_finger_turns_space_once_asked_to(name, context, server):
    page = context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True).new_page()
    page.goto(f"{server}/{name}", wait_until="load")
    for box in looks.figures(page):
        if not box.locator(".gl-container canvas").count():
            continue
        camera = "b => JSON.stringify(b._fullLayout.scene._scene.getCamera().eye)"
        before = box.evaluate(camera)
        box.locator("+ .lo-turn").tap()
        at = box.locator(".gl-container canvas").bounding_box()
        middle = (at["x"] + at["width"] / 2, at["y"] + at["height"] / 2)
        assert abs(swipe(page, *middle)) < 5
        page.wait_for_timeout(300)
        assert box.evaluate(camera) != before
        box.locator("+ .lo-turn").tap()
        assert swipe(page, *middle) >= 80


@pytest.mark.parametrize("name", _pages('"type":"scatter3d"', '"type":"mesh3d"'))
def test_arrow_keys_turn_space(name, page, server):
    turned = []
    page.goto(f"{server}/{name}", wait_until="load")
    for box in looks.figures(page):
        for space in box.locator(".lo-key [role=application]").all():
            eyes = [box.evaluate("b => Object.values(b._fullLayout.scene._scene.getCamera().eye)")]
            space.focus()
            for key in ("ArrowRight", "ArrowUp"):
                page.keyboard.press(key)
                page.wait_for_timeout(300)
                eyes.append(box.evaluate("b => Object.values(b._fullLayout.scene._scene.getCamera().eye)"))
            assert eyes[1][0] != eyes[0][0] and eyes[1][2] == pytest.approx(eyes[0][2]) and eyes[2][2] > eyes[1][2]
            turned.append(name)
    assert turned


def test_tables_have_no_row_for_the_name_of_their_index():
    """pandas writes it below the header, in a row of otherwise empty cells."""
    from bs4 import BeautifulSoup

    for name in _pages("<thead"):
        for head in BeautifulSoup((SITE / name).read_text(encoding="utf8"), "html.parser").find_all("thead"):
            last = [cell.get_text(strip=True) for cell in head.find_all("tr")[-1].find_all("th")]
            assert len(last) == 1 or any(last[len(last) // 2 :]), (name, last)


def test_experiment_shows_its_figure_and_its_table(page, server):
    page.goto(f"{server}/book/experiments/bake_off.html", wait_until="networkidle")
    assert page.locator(".lo-figure").count() >= 1
    assert page.locator("table", has_text="task arithmetic").count() >= 2


def test_slider_moves_the_figure(page, server):
    page.goto(f"{server}/book/low_rank_updates.html", wait_until="networkidle")
    page.locator(".lo-figure").first.scroll_into_view_if_needed()
    page.wait_for_function("() => document.querySelector('.lo-figure').dataset.drawn")
    before = page.locator(".lo-figure .slider-label").first.text_content()
    page.locator(".lo-figure .slider-rail-touch-rect").first.click(position={"x": 300, "y": 5})
    page.wait_for_function("b => document.querySelector('.lo-figure .slider-label').textContent !== b", arg=before)


def test_figures_follow_the_dark_theme(page, server):
    page.goto(f"{server}/book/low_rank_updates.html", wait_until="networkidle")
    page.locator(".lo-figure").first.scroll_into_view_if_needed()
    page.wait_for_function("() => document.querySelector('.lo-figure').dataset.drawn")
    ink = "() => getComputedStyle(document.querySelector('.lo-figure .xtick text')).fill"
    colours = []
    for _ in themes(page):
        colours.append(page.evaluate(ink))
    assert colours[0] != colours[1]


def test_internal_links_and_anchors_resolve(tally):
    """Every href of every page that stays in the site: the file exists, and the anchor in it."""
    from bs4 import BeautifulSoup

    soups = {name: BeautifulSoup((SITE / name).read_text(encoding="utf8"), "html.parser") for name in _pages()}
    ids = {name: {e["id"] for e in soup.find_all(id=True)} for name, soup in soups.items()}
    broken, count = [], 0
    for name, soup in soups.items():
        for link in soup.find_all("a", href=True):
            target, _, anchor = unquote(link["href"]).partition("#")
            if "://" in target or target.startswith(("mailto:", "javascript:", "/")):  # /: the 404 page
                continue
            count += 1
            path = ((SITE / name).parent / target).resolve() if target else SITE / name
            there = str(path.relative_to(SITE.resolve())) if path.is_relative_to(SITE.resolve()) else name
            if not path.exists():
                broken.append((name, link["href"]))
            elif anchor and there in ids and anchor not in ids[there]:
                broken.append((name, link["href"]))
    tally["links"] = count
    assert broken == [] and count > 500


@pytest.mark.parametrize(
    "words, page_name",
    [("OPCM", "book/opcm.html"), ("φ", "book/similarity.html"), ("Grassmannian", "book/grassmannian.html")],
)
def test_search_finds(words, page_name, page, server):
    page.goto(f"{server}/search.html?q={words}", wait_until="networkidle")
    page.wait_for_selector("#search-results li a")
    links = page.eval_on_selector_all("#search-results li a", "all => all.map(a => a.href)")
    assert any(page_name in link for link in links), links[:5]


def test_missing_page_leads_back_into_the_book():
    text = (SITE / "404.html").read_text(encoding="utf8")
    assert 'href="/lora-opcm/book/intro.html"' in text  # absolute: it is served for addresses of any depth


@pytest.mark.parametrize("prefix", ["/lora-opcm/", "/", "/copies/of/it/"])
def test_missing_page_finds_its_site_under_any_prefix(prefix, page):
    def serve(route):
        path = SITE / urlsplit(route.request.url).path.removeprefix(prefix)
        there = urlsplit(route.request.url).path.startswith(prefix) and path.is_file()
        route.fulfill(path=path if there else SITE / "404.html", status=200 if there else 404)

    page.route("http://book.test/**", serve)
    page.goto(f"http://book.test{prefix}book/no/such.html", wait_until="networkidle")
    page.wait_for_function("() => getComputedStyle(document.querySelector('.bd-sidebar-primary')).display !== 'block'")
    link = page.locator("a[href$='book/intro.html']").first.get_attribute("href")
    assert link == f"{prefix}book/intro.html"


def test_play_button_moves_the_figure(page, server):
    page.goto(f"{server}/book/straight_lines.html", wait_until="networkidle")
    boxes = page.locator(".lo-figure")
    for i in range(boxes.count()):
        boxes.nth(i).scroll_into_view_if_needed()
        page.wait_for_function("i => document.querySelectorAll('.lo-figure')[i].dataset.drawn", arg=i)
        button = boxes.nth(i).locator(".updatemenu-button", has_text="play").first
        if button.count():
            before = boxes.nth(i).evaluate("b => JSON.stringify(b.data.map(t => [t.x, t.y, t.z]))")
            button.click()
            page.wait_for_function(
                "([i, b]) => JSON.stringify("
                "document.querySelectorAll('.lo-figure')[i].data.map(t => [t.x, t.y, t.z])) !== b",
                arg=[i, before],
            )
            return
    raise AssertionError("no figure with a play button")


@pytest.mark.parametrize(
    "name",
    [
        "book/intro.html",
        "book/low_rank_updates.html",
        "book/opcm.html",
        "book/experiments/bake_off.html",
        "book/references.html",
    ],
)
def test_axe_has_no_serious_finding(name, page, server):
    page.goto(f"{server}/{name}", wait_until="networkidle")
    _scroll_through(page)
    for theme in themes(page):
        options = None if theme == "light" else {"runOnly": ["color-contrast"]}  # all that a theme changes
        found = Axe().run(page, {"exclude": ["mjx-container"]}, options).response["violations"]  # what MathJax wrote
        findings = [v for v in found if v["impact"] in ("serious", "critical")]
        assert findings == [], [(theme, v["id"], v["help"], [n["target"] for n in v["nodes"][:3]]) for v in findings]
