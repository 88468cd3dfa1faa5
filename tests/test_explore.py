"""The figures a reader takes hold of: their numbers are the package's, and every control answers every hand."""

import base64
import re

import numpy as np
import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from conftest import DESKTOP, SITE, swipe
from scipy.interpolate import RegularGridInterpolator

import lora_opcm as lo
from lora_opcm import geometry
from lora_opcm.files.shipped import results
from lora_opcm.lab.evidence import tables
from lora_opcm.site import explore
from lora_opcm.site.figures import TASK

FOLDER = SITE.parent.parent / explore.FOLDER
DIAL, BENCH, DESK = "book/similarity.html", "book/practice/which_method.html", "book/practice/two_loras.html"
LIVE = "book/experiments/eight_adapters.html"
PAGES = pytest.mark.parametrize("name", [DIAL, BENCH, DESK, LIVE], ids=["dial", "bench", "desk", "live"])
FACES = {  # of each figure: what is pressed to see it
    DIAL: [["in four dimensions"], ["two real adapters", "O(n)"]], BENCH: [["16"], ["two of them"]],
    DESK: [["the worse-off task"], ["ng-religion"]], LIVE: [["tweets"], ["reuters-rare"]],
}  # fmt: skip
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


def in_browser(test):
    return pytest.mark.browser(pytest.mark.timeout(300)(test))


# The data


def test_numbers_of_the_dial_are_those_of_the_shipped_adapters():
    """Read back as the page reads them, they give φ of any k and the cosine of the updates."""
    data = explore.read("dial", FOLDER)
    r, names = data["rank"], explore.modules()
    assert data["sizes"] == [list(lo.load_adapter(lo.adapter_path("tweets")).modules[name].shape) for name in names]
    for pair in data["pairs"]:
        a, b = (lo.load_adapter(lo.adapter_path(name)) for name in pair["names"])
        packed = np.frombuffer(base64.b64decode(pair["numbers"]), "<i2").reshape(len(names), 2 * r * r + 2 * r) / 32767
        table = lo.similarity(a, b, k=8, l=8)
        for name, numbers in zip(names, packed, strict=True):
            left, right = numbers[: r * r].reshape(r, r), numbers[r * r : 2 * r * r].reshape(r, r)
            s, t = numbers[-2 * r : -r], numbers[-r:]
            row = table.loc[name]
            assert np.square(left[:8, :8]).sum() / 8 == pytest.approx(row.phi_left, abs=1e-4)
            assert np.square(right[:8, :8]).sum() / 8 == pytest.approx(row.phi_right, abs=1e-4)
            assert s @ (left * right) @ t == pytest.approx(row.cosine, abs=1e-4)


def test_usual_angles_lie_where_their_mean_square_says():
    """The needles of random subspaces add up to the φ of chance."""
    for key, angles in explore.read("dial", FOLDER)["chance"].items():
        n, k = map(int, key.split(","))
        null = geometry.phi_null(n, k, k)
        assert len(angles) == k and angles == sorted(angles)
        error = 4 * null.std / 300**0.5  # of a mean over that many draws
        assert np.mean(np.cos(np.deg2rad(angles)) ** 2) == pytest.approx(null.mean, abs=error)


@pytest.mark.slow
def test_accuracies_of_the_bench_are_counted_texts():
    """Counted once more from the outcomes, with nothing of the tables but the choice of the scale."""
    data, run, rows = explore.read("bench", FOLDER), tables.published(), 0
    for chosen in data["sets"]:
        tasks = tuple(chosen["tasks"])
        part = {8: "bake_off", 2: "pairs"}[len(tasks)]
        found = run.select(part, run.seeds, recipe="published", tasks=tasks)
        for row in chosen["rows"]:
            outcomes = found[row["label"], row["rank"]]
            assert len(outcomes) == chosen["seeds"]
            for key, entry in row["at"].items():
                each = []
                for o in outcomes:
                    at = o.picked[0] if key == "chosen" else (o.picked[0][0], int(key))
                    ends = np.cumsum(o.sizes["test"])[:-1]
                    each.append([bits.mean() for bits in np.split(o.test[at], ends)])
                now = 100 * np.mean(each, 0)
                assert entry["accuracy"][0] == pytest.approx(now, abs=0.006)
                base, own = np.array(chosen["base"]), np.array(chosen["own"])
                assert entry["gain"][0] == pytest.approx(100 * (now - base).sum() / (own - base).sum(), abs=0.1)
                for low, value, high in zip(*(entry["accuracy"][i] for i in (1, 0, 2)), strict=True):
                    assert low <= value <= high
                rows += 1
    assert rows > 500


def test_the_desk_holds_what_was_counted():
    data, table = explore.read("desk", FOLDER), results("desk")
    assert len(data["pairs"]) == 28
    for pair in data["pairs"]:
        rows = table[(table["first"] == pair["tasks"][0]) & (table["second"] == pair["tasks"][1])]
        for which, right, texts in zip(("first", "second"), pair["right"], pair["texts"], strict=True):
            grid = rows.pivot(index="weight of first", columns="weight of second", values=f"{which} right")
            assert grid.index.tolist() == grid.columns.tolist() == data["weights"]
            assert np.reshape(right, grid.shape).tolist() == grid.to_numpy().tolist()
            assert set(rows[f"texts of {which}"]) == {texts}


@pytest.mark.slow
def test_data_of_the_bench_are_up_to_date():
    fresh, stored = explore.bench(), explore.read("bench", FOLDER)
    assert stored["opens"] == fresh["opens"] and stored["colours"] == fresh["colours"]
    assert len(stored["sets"]) == len(fresh["sets"]) == 1 + 28
    for old, new in zip(stored["sets"], fresh["sets"], strict=True):
        for one, other in zip(old["rows"], new["rows"], strict=True):
            assert (one["label"], one["rank"], list(one["at"])) == (other["label"], other["rank"], list(other["at"]))
            for key, entry in one["at"].items():
                assert entry["gain"] == pytest.approx(other["at"][key]["gain"], abs=0.02)


def test_pictures_show_what_the_figures_open_with():
    words = {name: re.findall(r">([^<>]+)</text>", (FOLDER / f"{name}.svg").read_text("utf8")) for name in explore.MADE}
    assert {"θ₂ = 60°", f"{lo.phi(torch.eye(3)[:, :2], _tilted(60)):.3f}", "chance 0.667"} <= set(words["dial"])
    data = explore.read("bench", FOLDER)
    row = next(r for r in data["sets"][0]["rows"] if (r["label"], r["rank"]) == (data["opens"], None))
    now = [row["at"]["chosen"]["gain"][0], *row["at"]["chosen"]["accuracy"][0]]
    shown = [w for w in words["bench"] if w.endswith(" %")]
    assert data["opens"] in words["bench"] and shown[: 2 * len(now) : 2] == [f"{v:.0f} %" for v in now]


def _tilted(degrees):
    """The floor of space, turned about its first axis."""
    t = torch.tensor(degrees).deg2rad()
    return torch.tensor([[1, 0], [0, t.cos()], [0, t.sin()]])


# The pages


def _numbers(page, part):
    return page.locator(part).evaluate("b => b.numbers")


def _press(page, words):
    page.locator(".lo-explore :is(label:not(.lo-pick), button):visible").get_by_text(words, exact=True).click()


def _said(page, part):
    """The numbers that stand in the page, by their names."""
    terms = page.locator(f"{part} .lo-numbers div")
    return {t.locator("dt").text_content(): t.locator("dd").text_content() for t in terms.all()}


def _agrees(found, U, V):
    """What a page computed, against frames of the package."""
    k, mean = U.shape[1], geometry.chordal_mean([U, V])
    assert found["phi"] == pytest.approx(lo.phi(U, V).item(), abs=1e-3)
    assert found["chance"] == pytest.approx(geometry.phi_null(U.shape[0], k, k).mean, abs=1e-6)
    assert found["chordal"] == pytest.approx(geometry.chordal_distance(U, V).item(), abs=1e-3)
    assert np.cos(np.deg2rad(found["angles"])) == pytest.approx(lo.principal_angles(U, V).cos().numpy(), abs=1e-3)
    assert found["third"] == pytest.approx(lo.phi(mean, U).item(), abs=1e-3)
    assert found["third"] == pytest.approx(lo.phi(mean, V).item(), abs=1e-3)


@in_browser
def test_planes_have_the_numbers_of_the_package(opened):
    page = opened(DIAL)
    for n, moves in ((3, ["ArrowDown"] * 17), (3, ["PageDown"]), (4, ["ArrowUp"] * 9), (4, ["End"]), (4, ["Home"])):
        _press(page, {3: "planes in space", 4: "in four dimensions"}[n])
        handle = page.locator(".lo-explore [role=slider]:visible").last
        handle.focus()
        for key in moves:
            page.keyboard.press(key)
        found = _numbers(page, ".lo-planes")
        angles = torch.tensor(found["angles"], dtype=torch.float64).deg2rad()
        assert float(handle.get_attribute("aria-valuenow")) in found["angles"]
        axes = torch.eye(n, dtype=torch.float64)
        up = torch.stack([axes[:, 3 if n == 4 else 2], axes[:, 2]], 1)  # θ₁ = 0 where there is no fourth
        V = angles.cos() * axes[:, :2] + angles.sin() * up
        if found["angles"][1] < 90:  # the mean of a right angle is not unique
            _agrees(found, axes[:, :2], V)
        said = _said(page, ".lo-planes")
        assert said["φ of lora1 and lora2"] == f"{lo.phi(axes[:, :2], V):.3f}"
        assert said["times chance"].endswith(f"× {2 / n:.3f}")
        spoken = page.locator(".lo-planes svg[role=img]").get_attribute("aria-label")
        assert spoken.endswith(f"φ {lo.phi(axes[:, :2], V):.3f}, by chance {2 / n:.3f}")


@in_browser
@pytest.mark.parametrize("pair, k, side", [(0, 8, 0), (0, 16, 1), (1, 16, 1), (2, 1, 0), (2, 4, 1)])
def test_board_has_the_numbers_of_the_package(pair, k, side, opened):
    page = opened(DIAL)
    _press(page, "two real adapters")
    page.locator(".lo-board select").select_option(index=pair)
    _press(page, ("outputs", "inputs")[side])
    _press(page, str(k))
    cells = page.locator(".lo-cell")
    cells.nth(20).click()
    found = _numbers(page, ".lo-board")
    a, b = (lo.load_adapter(lo.adapter_path(name)) for name in list(explore.PAIRS.values())[pair])
    names, where = explore.modules(), ("left", "right")[side]
    table = lo.similarity(a, b, k=k, l=k).loc[names]
    assert found["all"] == pytest.approx(table[f"phi_{where}"].tolist(), abs=1e-3)
    pooled = geometry.pooled(table).loc[where]
    assert found["means"] == pytest.approx([pooled.phi, pooled.null], abs=1e-3)
    assert found["cosine"] == pytest.approx(table.cosine.iloc[20], abs=1e-3)
    x, y = (u.modules[names[20]].svd()[2 * side].double() for u in (a, b))
    _agrees(found, *((f.mT if side else f)[:, :k] for f in (x, y)))
    times = table[f"phi_{where}"] / table[f"null_{where}"]
    shown = [float(cells.nth(m).text_content()) for m in range(36)]
    assert shown == pytest.approx(times.tolist(), abs=0.06, rel=0.06)
    assert _said(page, ".lo-board")["φ of lora1 and lora2"] == f"{found['phi']:.3f}"
    assert page.locator(".lo-board .lo-two:visible").count() == k


@in_browser
def test_groups_move_what_they_should(opened):
    page = opened(DIAL)
    _press(page, "two real adapters")
    still = {"signs": "phi half factor", "O(k)": "phi factor", "GL(r)": "phi half cosine", "O(n)": ""}
    for group, names in still.items():
        for _ in range(2):  # another element
            _press(page, group)
            now = _numbers(page, ".lo-board")
            kept = {key for key in ("phi", "half", "factor", "cosine") if abs(now[key] - now["before"][key]) < 1e-6}
            assert kept == set(names.split()), group
            words = page.locator(".lo-moved tr td:last-child").all_text_contents()
            assert [w == "stands still" for w in words] == [key in kept for key in ("phi", "half", "factor", "cosine")]
    null = geometry.phi_null(384, 8, 8)
    inner = now["all"][:24]  # of n = 384, as all outputs but those of the feed-forward up
    assert abs(np.mean(inner) - null.mean) < 4 * null.std / len(inner) ** 0.5
    _press(page, "as trained")
    assert _numbers(page, ".lo-board")["phi"] == now["before"]["phi"]


@in_browser
def test_bench_shows_what_was_measured_and_offers_nothing_else(opened):
    page = opened(BENCH)
    run = tables.published()
    rows = run.bake_off
    whole = {label: row for (label, rank), row in rows.items() if rank is None}
    assert _numbers(page, ".lo-explore")["label"] == tables.favourite(whole)
    offered = page.get_by_role("combobox", name="method").locator("option").evaluate_all("all => all.map(o => o.value)")
    assert set(offered) == set(whole) - {"zero-shot", "own adapter"}
    signed = lambda x: ("+" if x >= 0 else "−") + f"{abs(x):.1f}"  # noqa: E731
    before = whole["task arithmetic"]
    page.get_by_role("combobox", name="method").select_option("task arithmetic")
    for label in ("TSV", "mean", "OPCM", "DOP", "OPCM"):
        page.get_by_role("combobox", name="method").select_option(label)
        found, row = _numbers(page, ".lo-explore"), whole[label]
        low, high = tables.interval(row.draws)
        assert found["gain"] == pytest.approx([row.value, low, high], abs=0.01)
        assert found["accuracy"][0] == pytest.approx((100 * row.accuracy[:, 0].mean(0)).tolist(), abs=0.01)
        said = f"{row.value:.0f} % [{low:.0f}, {high:.0f}] of what eight adapters gain is kept"
        assert said in page.locator(".lo-say").text_content()
        low, high = tables.interval(row.draws - before.draws)
        words = f"Difference in points {signed(row.value - before.value)} [{signed(low)}, {signed(high)}]"
        words += ", so the two are not told apart." if low <= 0 <= high else "."
        assert words in page.locator(".lo-say").text_content()
        before = row
        assert page.get_by_role("radio", name="16", exact=True).count() == ((label, 16) in rows)
    _press(page, "16")
    _press(page, "√2")
    found, row = _numbers(page, ".lo-explore"), tables.at_step(run, rows["OPCM", 16].outcomes, 1)
    assert found["gain"][0] == pytest.approx(row.value, abs=0.01)
    steps = [k for k in explore.STEPS if tables.at_step(run, rows["OPCM", 16].outcomes, k)]
    lengths = page.get_by_role("group", name="length").get_by_role("radio")
    assert lengths.evaluate_all("all => all.map(r => r.value)") == ["chosen", *map(str, steps)]


@in_browser
def test_bench_merges_two_and_remembers_the_one_before(opened):
    page = opened(BENCH, reduced_motion="reduce")
    _press(page, "two of them")
    assert page.get_by_role("radio", name="16", exact=True).count() == 0  # pairs were not cut
    page.get_by_role("combobox", name="merge").select_option("ng-comp")
    page.get_by_role("combobox", name="and").select_option("ng-religion")
    run = tables.published()
    found = run.select("pairs", tasks=("ng-comp", "ng-religion"))
    at = ".lo-bench circle.{} >> nth=0"
    before = None
    for label in ("TIES", "TSV"):
        page.get_by_role("combobox", name="method").select_option(label)
        row = run.row(found[label, None])
        now = _numbers(page, ".lo-explore")
        assert now["tasks"] == ["ng-comp", "ng-religion"]
        assert now["gain"][0] == pytest.approx(row.value, abs=0.01)
        assert page.locator(".lo-bench circle.lo-dot:visible").count() == 3  # the gain and two tasks
        ring = page.locator(at.format("lo-was")).evaluate("c => getComputedStyle(c).cx")
        assert before is None or ring == before
        before = page.locator(at.format("lo-dot")).evaluate("c => getComputedStyle(c).cx")


@in_browser
def test_a_task_has_its_colour(opened):
    page = opened(BENCH, reduced_motion="reduce")
    fills = page.locator(".lo-bench circle.lo-dot").evaluate_all("all => all.map(c => getComputedStyle(c).fill)")
    colours = [f"rgb({', '.join(str(int(c[i : i + 2], 16)) for i in (1, 3, 5))})" for c in TASK.values()]
    assert fills[1:] == colours


def _counted(task, other):
    """The share of right texts of a task at its weight and that of the other, straight between what was counted."""
    table = results("desk")
    mine, its = (
        ("first", "second") if ((table["first"] == task) & (table["second"] == other)).any() else ("second", "first")
    )
    rows = table[(table[mine] == task) & (table[its] == other)]
    grid = rows.pivot(index=f"weight of {mine}", columns=f"weight of {its}", values=f"{mine} right")
    share = RegularGridInterpolator((grid.index, grid.columns), grid.to_numpy() / rows[f"texts of {mine}"].iloc[0])
    return lambda at: float(share([at])[0])


@in_browser
@pytest.mark.parametrize(
    "first, second, at",
    [("ng-sci", "tweets", (0.7, 1.15)), ("tweets", "ng-comp", (2, 0.35)), ("reuters-r8", "ng-comp", (0, 0))],
)
def test_the_desk_shows_what_was_counted_and_lines_between(first, second, at, opened):
    page = opened(DESK)
    page.get_by_role("combobox", name="mix").select_option(first)
    page.get_by_role("combobox", name="with").select_option(second)
    for weight, slider in zip(at, page.locator(".lo-weight input").all(), strict=True):
        slider.fill(str(weight))
    found, (one, other) = _numbers(page, ".lo-explore"), (_counted(first, second), _counted(second, first))
    accuracy = [one(at), other(at[::-1])]
    lost = [100 * (share((1, 0)) - now) for share, now in zip((one, other), accuracy, strict=True)]
    assert found["tasks"] == [first, second] and found["at"] == pytest.approx(at)
    assert found["accuracy"] == pytest.approx(accuracy, abs=1e-4) and found["lost"] == pytest.approx(lost, abs=1e-2)
    points = f"{lost[0]:.1f}".replace("-", "−")
    assert f"{first} loses {points} points" in page.locator(".lo-say").text_content()
    shares = page.locator(".lo-mixed .lo-strong").all_text_contents()[1::2]
    assert shares == [f"{100 * now:.0f} % right" for now in accuracy]


@in_browser
@pytest.mark.parametrize("device", [DESKTOP, PHONE], ids=["mouse", "finger"])
def test_a_hand_on_the_puck_mixes(device, opened):
    page = opened(DESK, device)
    puck = page.locator(".lo-puck circle").last
    puck.evaluate("c => c.scrollIntoView({block: 'center', behavior: 'instant'})")
    at = puck.bounding_box()
    x, y = at["x"] + at["width"] / 2, at["y"] + at["height"] / 2
    before = _numbers(page, ".lo-explore")
    if device is PHONE:
        assert abs(swipe(page, x, y, 60)) < 5
    else:
        page.mouse.move(x, y)
        page.mouse.down()
        page.mouse.move(x + 1, y - 60, steps=5)
        page.mouse.up()
    after = _numbers(page, ".lo-explore")
    assert after["at"][0] == pytest.approx(before["at"][0], abs=0.05) and after["at"][1] > before["at"][1] + 0.2
    assert after["accuracy"] != before["accuracy"]


@in_browser
@PAGES
def test_a_finger_on_it_scrolls_the_page(name, opened, tally):
    page = opened(name, PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for parts in FACES[name]:
        for part in parts:
            _press(page, part)
        for box in page.locator(".lo-explore svg:visible, .lo-grid:visible").all():
            for across, down in ((0.5, 0.5), (0.1, 0.4), (0.85, 0.55), (0.3, 0.8)):
                box.evaluate("box => box.scrollIntoView({block: 'center', behavior: 'instant'})")
                at = box.bounding_box()
                x, y = at["x"] + across * at["width"], at["y"] + down * at["height"]
                if page.evaluate("([x, y]) => !document.elementFromPoint(x, y)?.closest('.lo-handle')", [x, y]):
                    tally["swipes"] += 1
                    assert swipe(page, x, y) > 80, (parts, across, down)


@in_browser
@pytest.mark.parametrize("which", ["scene", "dial"])
@pytest.mark.parametrize("device", [DESKTOP, PHONE], ids=["mouse", "finger"])
def test_a_hand_on_the_handle_tilts_the_plane(device, which, opened):
    page = opened(DIAL, device)
    handle = page.locator(".lo-planes svg").nth(int(which == "dial")).locator(".lo-handle:visible").last
    handle.evaluate("h => h.scrollIntoView({block: 'center', behavior: 'instant'})")
    at = handle.locator("circle").last.bounding_box()
    x, y = at["x"] + at["width"] / 2, at["y"] + at["height"] / 2
    assert _numbers(page, ".lo-planes")["angles"] == [0, 60]
    if device is PHONE:
        assert abs(swipe(page, x, y, -70)) < 5
    else:
        page.mouse.move(x, y)
        page.mouse.down()
        page.mouse.move(x + 10, y + 70, steps=5)
        page.mouse.up()
    assert 20 < _numbers(page, ".lo-planes")["angles"][1] < 55


@in_browser
def test_keys_reach_every_control(opened):
    page = opened(DIAL)
    page.get_by_role("radio", name="planes in space").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector(".lo-cell")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "SELECT"
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    assert page.get_by_role("radio", name="inputs").is_checked()
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowLeft")
    assert page.locator(".lo-board .lo-two:visible").count() == 4
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.ariaPressed") == "true"
    assert page.locator(".lo-cell[aria-pressed=true]").get_attribute("aria-label").startswith("key, layer 4")
    for _ in range(5):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.locator(".lo-turns button[aria-pressed=true]").text_content() == "O(n)"

    page = opened(BENCH)
    page.get_by_role("radio", name="as it comes").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    found = _numbers(page, ".lo-explore")
    assert (found["rank"], found["at"]) == (16, "0")


@in_browser
@PAGES
def test_a_picture_stays_without_scripts_and_on_paper(name, context, server, opened):
    page = context(java_script_enabled=False).new_page()
    page.goto(f"{server}/{name}")
    still = page.locator("img[src*='_images/']").first
    still.scroll_into_view_if_needed()
    assert still.bounding_box()["height"] > 200 and len(still.get_attribute("alt")) > 60
    page = opened(name)
    still = page.locator("img[src*='_images/']").first
    assert not still.is_visible() and page.locator(".lo-explore").is_visible()
    page.emulate_media(media="print")
    assert still.is_visible() and not page.locator(".lo-explore").is_visible()


@in_browser
@PAGES
def test_it_works_from_a_disk(name, opened):
    page = opened(name, base=SITE.resolve().as_uri(), console=False)  # there the theme misses its fonts
    page.wait_for_function("() => document.querySelector('.lo-explore svg').getBoundingClientRect().height > 200")


@in_browser
@pytest.mark.parametrize("theme", ["light", "dark"])
@PAGES
def test_axe_has_no_finding(name, theme, opened):
    page = opened(name, color_scheme=theme, reduced_motion="reduce", console=False)  # axe asks for style sheets
    for parts in FACES[name]:
        for part in parts:
            _press(page, part)
        found = Axe().run(page, context=".lo-explore").response["violations"]
        assert found == [], [(v["id"], v["help"], [n["html"][:120] for n in v["nodes"][:3]]) for v in found]


@in_browser
def test_who_wants_no_motion_sees_none(opened):
    moving = "b => [...b.querySelectorAll('*')].some(e => getComputedStyle(e).transitionDuration !== '0s')"
    for name in (DIAL, BENCH):
        for motion in ("no-preference", "reduce"):
            page = opened(name, reduced_motion=motion)
            if name == DIAL:
                _press(page, "two real adapters")
            drawings = page.locator(".lo-explore svg:visible").last
            assert drawings.evaluate(moving) == (motion == "no-preference")
