"""What figures.js adds to a figure: points that can be pinned, and names of lines where there is room for them."""

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
        script = f'<script src="{(STATIC / "figures.js").as_uri()}"></script>'
        file = tmp_path / "page.html"
        file.write_text(f'<!doctype html><meta charset="utf8">{box}{script}', "utf8")
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
