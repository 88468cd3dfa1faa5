"""What figures.js adds to a figure: keys, points that can be pinned, names and titles where there is room for them."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from conftest import SITE

from lora_opcm.site import figures

STATIC = SITE.parent.parent / "book" / "_static"
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True}
NAMES = ["mean", "OPCM", "TSV"]
# Value and resamples of three methods as they come, and of the last two at a rank.
DRAWS = np.random.default_rng(0).normal([40, 60, 80, 55, 70], 3, (201, 5)).T


def ranking():
    figure = go.Figure()
    for kind, draws, names in (("as it comes", DRAWS[:3], NAMES), ("rank 16", DRAWS[3:], NAMES[1:])):
        low, high = np.quantile(draws[:, 1:], [0.025, 0.975], axis=1)
        figure.add_scatter(
            x=draws[:, 0].tolist(), y=names, name=kind, mode="markers", showlegend=False,
            error_x={"symmetric": False, "array": high - draws[:, 0], "arrayminus": draws[:, 0] - low},
        )  # fmt: skip
    figures.finish(figure, "a ranking", xaxis_title="gain")
    return figures.pinned(figure, list(DRAWS))


def test_a_figure_carries_the_interval_of_every_difference():
    ends = ranking().layout.meta["pins"]
    assert len(ends) == 10 and ranking().layout.meta["alt"] == "a ranking"
    last = np.sort(DRAWS[3][1:] - DRAWS[4][1:])
    assert last[4] <= ends[-1][0] <= last[6] and last[-7] <= ends[-1][1] <= last[-5]


def test_draws_must_be_one_a_point():
    with pytest.raises(ValueError, match="4 draws for 5 points, expected one a point"):
        figures.pinned(ranking(), list(DRAWS[:4]))


@pytest.fixture
def drawn(context, tmp_path):
    """Opens a page with one figure."""

    def drawn(figure, device):
        data = f'<script type="application/json">{figure.to_json()}</script>'
        box = f'<div class="lo-figure" style="height:420px" data-script="plotly-cartesian.min.js">{data}</div>'
        script = "".join(f'<script src="{(STATIC / name).as_uri()}"></script>' for name in ("keys.js", "figures.js"))
        style = f'<link rel="stylesheet" href="{(STATIC / "book.css").as_uri()}">'
        outputs = f'<div class="output text_html">{box}</div><pre style="overflow-x: auto">{"word " * 80}</pre>'
        page = f'<!doctype html><meta charset="utf8">{style}<div class="bd-article cell_output">{outputs}</div>{script}'
        file = tmp_path / "page.html"
        file.write_text(page, "utf8")
        page = context(**device).new_page()
        page.goto(file.as_uri())
        page.wait_for_selector(".lo-figure[data-drawn]")
        return page

    return drawn


@pytest.mark.browser
@pytest.mark.parametrize("device", [{}, PHONE], ids=["mouse", "thumb"])
def test_a_click_pins_a_point_and_another_lets_it_go(drawn, device):
    page = drawn(ranking(), device)

    def press(curve, point):
        at = page.evaluate(
            """([curve, point]) => {
                const box = document.querySelector(".lo-figure"), { xaxis, yaxis, _size } = box._fullLayout;
                const { x, y } = box.data[curve], { left, top } = box.getBoundingClientRect();
                return [left + xaxis._offset + xaxis.d2p(x[point]), top + yaxis._offset + yaxis.d2p(y[point])];
            }""",
            [curve, point],
        )
        page.wait_for_timeout(400)  # two clicks in one place are a double click
        (page.touchscreen.tap if device else page.mouse.click)(*at)

    def shown():
        """Place and bars of every point, and the title of the axis."""
        traces, title = page.evaluate(
            """() => {
                const box = document.querySelector(".lo-figure");
                const lists = ({ x, error_x: e }) => [x, e.array, e.arrayminus].map((list) => Array.from(list));
                return [box._fullData.map(lists), box.layout.xaxis.title.text];
            }"""
        )
        return np.concatenate(traces, axis=1), title

    before, title = shown()
    assert title == "gain"
    press(1, 0)
    page.wait_for_function("() => document.querySelector('.lo-figure').layout.xaxis.title.text != 'gain'")
    (x, array, minus), title = shown()
    assert title == "points more or less than OPCM, rank 16"
    assert x == pytest.approx(DRAWS[:, 0] - DRAWS[3, 0])
    ends = np.quantile(DRAWS[:, 1:] - DRAWS[3, 1:], [0.025, 0.975], axis=1)
    assert [x - minus, x + array] == [pytest.approx(end, abs=0.006) for end in ends]
    press(1, 0)
    page.wait_for_function("() => document.querySelector('.lo-figure').layout.xaxis.title.text == 'gain'")
    assert shown()[0] == pytest.approx(before)


@pytest.mark.browser
@pytest.mark.parametrize("device, legend", [({}, False), (PHONE, True)], ids=["wide", "narrow"])
def test_names_stand_at_the_ends_of_lines_or_in_a_legend_where_a_page_is_narrow(drawn, device, legend):
    frames = {step: pd.DataFrame({name: [1, 2] for name in NAMES}) for step in ("first", "second")}
    page = drawn(figures.slider_lines(frames, {}, prefix="", alt="lines", x="x", y="y"), device)
    for step in (0, 1):
        page.evaluate(
            """step => {
                const box = document.querySelector(".lo-figure");
                return Plotly.update(box, ...box.layout.sliders[0].steps[step].args);
            }""",
            step,
        )
        beside = page.locator(".annotation").all_text_contents()
        listed = page.locator(".legendtext").all_text_contents()
        assert listed == (NAMES if legend else [])
        assert sorted(text[2:] for text in beside) == ([] if legend else sorted(NAMES))


WIDE = """() => ["pre", ".text_html"].map((name) => {
    const box = document.querySelector(name);
    return [box.scrollWidth > box.clientWidth, getComputedStyle(box).maskImage !== "none"];
})"""


@pytest.mark.browser
def test_an_output_fades_while_it_goes_on_and_a_figure_on_a_page_that_shrank_does_not(drawn):
    page = drawn(ranking(), {"viewport": {"width": 844, "height": 390}})
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_function("() => document.querySelector('.lo-figure')._fullLayout.width < 390")
    page.wait_for_timeout(500)
    assert page.evaluate(WIDE) == [[True, True], [False, False]]
    page.evaluate("() => (document.querySelector('pre').scrollLeft = 1e5)")
    page.wait_for_function("() => getComputedStyle(document.querySelector('pre')).maskImage === 'none'")


@pytest.mark.browser
def test_a_title_too_long_for_one_line_gets_more(drawn):
    page = drawn(ranking(), PHONE)
    for words in (3, 12, 24, 3):
        title = " ".join(["norms"] * words)
        page.evaluate(
            """title => Plotly.update(document.querySelector(".lo-figure"), {}, {"xaxis.title.text": title})""", title
        )
        page.wait_for_timeout(500)
        shown = page.locator(".xtitle").bounding_box()
        lines = page.locator(".xtitle tspan.line").all_text_contents() or [page.locator(".xtitle").text_content()]
        assert " ".join(lines) == title and (len(lines) > 1) == (words > 3)
        box = page.locator(".lo-figure").bounding_box()
        assert box["x"] <= shown["x"] and shown["x"] + shown["width"] <= box["x"] + box["width"]
        assert shown["y"] + shown["height"] <= box["y"] + box["height"]


def controlled():
    """A menu, two buttons and a slider, which write into the layout."""

    def choices(key, words):
        return [{"label": word, "method": "relayout", "args": [{f"meta.{key}": word}]} for word in words]

    menus = [{"buttons": choices("menu", "abc"), "y": 1.2}, {"buttons": choices("button", "de"), "type": "buttons"}]
    sliders = [{"steps": choices("slider", "fgh"), "currentvalue": {"prefix": "k = "}}]
    return figures.finish(go.Figure(go.Scatter(y=[0, 1])), "a line", updatemenus=menus, sliders=sliders)


@pytest.mark.browser
def test_every_control_can_be_reached_and_moved_by_keys(drawn):
    page = drawn(controlled(), {})
    held = """() => {
        const at = document.activeElement, { outlineStyle } = getComputedStyle(at.parentElement);
        return [at.tagName, at.ariaLabel, at.getAttribute("aria-valuetext") ?? at.value ?? "", outlineStyle];
    }"""
    state = """() => {
        const { sliders, updatemenus, meta } = document.querySelector(".lo-figure")._fullLayout;
        const active = [...updatemenus, ...sliders].map((control) => control.active).join("");
        const said = document.querySelector(".slider-label").textContent;
        return [active, meta.menu, meta.button, meta.slider, said].join(" ");
    }"""
    for tag, name, value, moves in (
        ("SELECT", "shown", "a", {"ArrowDown": "100 b   k = f"}),
        ("BUTTON", "d", "", {"Enter": "100 b d  k = f"}),
        ("BUTTON", "e", "", {" ": "110 b e  k = f"}),
        (
            "INPUT",
            "k",
            "f",
            {"ArrowRight": "111 b e g k = g", "End": "112 b e h k = h", "ArrowLeft": "111 b e g k = g"},
        ),
    ):
        page.keyboard.press("Tab")
        assert page.evaluate(held) == [tag, name, value, "solid"]
        for key, found in moves.items():
            page.keyboard.press(key)
            page.wait_for_timeout(400)
            assert page.evaluate(state) == found
    assert page.evaluate(held)[2] == "g"
    assert page.locator(".lo-key button").evaluate_all("all => all.map((b) => b.ariaPressed)") == ["false", "true"]


@pytest.mark.browser
def test_buttons_say_what_is_shown_whatever_was_pressed_before(drawn):
    figure = ranking()
    views = {"gain": [list(trace.x) for trace in figure.data], "minus": [[-1.0, -2, -3], [-4, -5]]}
    buttons = [
        {"label": name, "method": "update", "args": [{"x": x}, {"xaxis.title.text": name}]} for name, x in views.items()
    ]
    page = drawn(figure.update_layout(updatemenus=[{"buttons": buttons, "type": "buttons"}]), {})
    state = """() => {
        const { data, layout, _fullLayout } = document.querySelector(".lo-figure");
        const title = layout.xaxis.title.text.replaceAll("<br>", " ");
        return [title, _fullLayout.updatemenus[0].active, data.flatMap(({ x }) => Array.from(x))];
    }"""
    order, row, pin, view = [0, 1, 3, 2, 4], 4, None, "gain"  # of the points, from below
    for step in "Enter Enter minus Enter Enter Enter Down Enter gain Enter minus Down Enter Enter gain".split():
        if step in views:
            page.locator(".updatemenu-button", has_text=step).click()
            pin, view = None, step
        else:
            page.locator(".lo-key input").focus()
            if step == "Down":
                row = max(row - 1, 0)
                page.keyboard.press("ArrowDown")
            else:
                pin = None if pin == order[row] else order[row]
                page.keyboard.press("Enter")
        page.wait_for_timeout(300)
        title, active, x = page.evaluate(state)
        if pin is None:
            assert [title, active] == [view, list(views).index(view)]
            assert x == pytest.approx(sum(views[view], []))
        else:
            label = [*NAMES, *NAMES[1:]][pin]
            assert [title, active] == [
                f"points more or less than {label}, {'rank 16' if pin > 2 else 'as it comes'}",
                -1,
            ]
            assert x == pytest.approx(DRAWS[:, 0] - DRAWS[pin, 0])
        told = page.locator(".lo-key input").get_attribute("aria-valuetext")
        assert told.endswith(", pinned") == (pin == order[row])
