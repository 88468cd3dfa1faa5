"""Figures and menus, each kind on every page, under a thumb and under a mouse."""

import pytest
from conftest import DESKTOP, SITE, site_pages, swipe, themes

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
CONTROLS = ".slider-container, .updatemenu-container"  # what a finger on a figure is meant for


@pytest.fixture
def opened(context, server):
    """Opens a page of the site on a device, without its formulas, which take seconds and have tests of their own."""

    def opened(name, device):
        page = context(**device).new_page()
        page.route("**/mathjax/**", lambda route: route.fulfill(body="", content_type="text/javascript"))
        page.goto(f"{server}/{name}", wait_until="networkidle")
        return page

    return opened


def _figures(page):
    """The figures of a page, one after the other, each drawn and in the middle of the screen."""
    boxes = page.locator(".lo-figure")
    for i in range(boxes.count()):
        boxes.nth(i).evaluate("box => box.scrollIntoView({block: 'center', behavior: 'instant'})")
        page.wait_for_function("i => document.querySelectorAll('.lo-figure')[i].dataset.drawn", arg=i)
        yield boxes.nth(i)


@pytest.mark.parametrize("name", site_pages('class="lo-figure"'))
def test_a_thumb_on_a_figure_scrolls_the_page(name, opened, tally):
    """And no mode bar, which on a touch screen is always there, lies over the figure."""
    page = opened(name, PHONE)
    stuck, covered = [], []
    shown = """b => JSON.stringify(["xaxis", "yaxis"].map(key => b._fullLayout[key]).map(
        axis => axis?.autorange ? "what the data need" : axis?.range))"""
    for i, box in enumerate(_figures(page)):
        covered += [i] * (box.locator(".modebar-btn").count() > 0)
        before = box.evaluate(shown)
        for across, down in [(0.5, 0.5), [(0.2, 0.35), (0.8, 0.65), (0.02, 0.5)][i % 3]]:
            box.evaluate("box => box.scrollIntoView({block: 'center', behavior: 'instant'})")
            at = box.bounding_box()
            x, y = at["x"] + across * at["width"], at["y"] + down * at["height"]
            if page.evaluate(f"([x, y]) => !document.elementFromPoint(x, y)?.closest('{CONTROLS}')", [x, y]):
                tally["swipes"] += 1
                if swipe(page, x, y) < 80:
                    stuck.append((i, across, down))
        if box.evaluate(shown) != before:
            stuck.append((i, "zoomed"))
    assert stuck == [] and covered == []


@pytest.mark.parametrize("name", site_pages('"type":"scatter3d"', '"type":"mesh3d"'))
def test_a_finger_turns_space_once_asked_to(name, opened):
    page = opened(name, PHONE)
    for box in _figures(page):
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


@pytest.mark.parametrize("name", site_pages('"updatemenus":'))
def test_menus_have_an_opaque_ground(name, opened, tally):
    page = opened(name, DESKTOP)
    for box in (box for _ in themes(page) for box in _figures(page)):
        headers, items = box.locator(".updatemenu-header").all(), box.locator(".updatemenu-item-rect")
        if items.count() == len(headers):  # a header is an item; a menu may stay open from one theme to the next
            for header in headers:
                header.click()
        assert items.count() > len(headers) or not headers
        for item in items.all():
            tally["menu items"] += 1
            ground, ink = item.evaluate("""r => [getComputedStyle(r),
                getComputedStyle(r.parentElement.querySelector("text"))].map(s => s.fill)""")
            assert item.evaluate("r => getComputedStyle(r).fillOpacity") == "1" and _alpha(ground) == 1, ground
            assert _contrast(ground, ink) >= 4.5, (ground, ink)


def _numbers(colour):
    return [float(n) for n in colour[colour.index("(") + 1 : -1].replace("/", ",").split(",")]


def _alpha(colour):
    return (*_numbers(colour), 1.0)[3]


def _contrast(one, other):
    """As WCAG has it."""

    def luminance(colour):
        parts = [c / 255 for c in _numbers(colour)[:3]]
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def test_tables_have_no_row_for_the_name_of_their_index():
    """pandas writes it below the header, in a row of otherwise empty cells."""
    from bs4 import BeautifulSoup

    for name in site_pages("<thead"):
        for head in BeautifulSoup((SITE / name).read_text(encoding="utf8"), "html.parser").find_all("thead"):
            last = [cell.get_text(strip=True) for cell in head.find_all("tr")[-1].find_all("th")]
            assert len(last) == 1 or any(last[len(last) // 2 :]), (name, last)
