"""A click on a point of a figure shows all points as differences to it, under a mouse and under a thumb."""

import numpy as np
import plotly.graph_objects as go
import pytest
from conftest import SITE

from lora_opcm.site import figures

STATIC = SITE.parent.parent / "book" / "_static"
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


@pytest.mark.browser
@pytest.mark.parametrize(
    "device", [{}, {"viewport": {"width": 390, "height": 844}, "has_touch": True}], ids=["mouse", "thumb"]
)
def test_a_click_pins_a_point_and_another_lets_it_go(context, tmp_path, device):
    data = f'<script type="application/json">{ranking().to_json()}</script>'
    box = f'<div class="lo-figure" style="height:420px" data-script="plotly-cartesian.min.js">{data}</div>'
    script = f'<script src="{(STATIC / "figures.js").as_uri()}"></script>'
    tmp_path.joinpath("page.html").write_text(f'<!doctype html><meta charset="utf8">{box}{script}', "utf8")
    page = context(**device).new_page()
    page.goto(tmp_path.joinpath("page.html").as_uri())
    page.wait_for_selector(".lo-figure[data-drawn]")

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
