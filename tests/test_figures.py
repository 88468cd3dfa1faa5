"""The book's tables."""

import pandas as pd
import pytest
from bs4 import BeautifulSoup
from docutils import nodes
from offline import lead

from lora_opcm.site import figures

FRAME = pd.DataFrame(
    {
        "gain %": [79.84, -2.0], "low": [73.9, -4.0], "high": [85.4, 96.0],
        "scale": [0.3, float("nan")], "keeps": ["one", "<all>"],
    },
    index=pd.Index(["whitened sum", "A & B"], name="method"),
)  # fmt: skip


def _shown(**options):
    return BeautifulSoup(figures.table(FRAME, **options)._repr_html_(), "html.parser").table


def test_an_interval_is_a_bar_on_the_scale_of_its_column():
    table = _shown(bars={"gain %": ("low", "high")})
    assert [h.get_text() for h in table.thead.find_all("th")] == ["method", "gain %", "scale", "keeps"]
    bars = table.find_all("svg")
    assert [bar["aria-label"] for bar in bars] == ["73.9 to 85.4", "−4.0 to 96.0"]
    assert [float(bars[1].line[end]) for end in ("x1", "x2")] == [0, 100]
    assert float(bars[0].circle["cx"]) == pytest.approx(83.8, abs=0.1)
    assert float(bars[0].line["x1"]) == pytest.approx(77.9, abs=0.1)


def test_numbers_are_aligned_and_words_are_not():
    rows = _shown(bars={"gain %": ("low", "high")}).tbody.find_all("tr")
    assert [[cell.get_text() for cell in row.find_all("td")] for row in rows] == [
        ["79.8", "0.3", "one"],
        ["−2.0", "–", "<all>"],
    ]
    assert [["lo-number" in cell.get("class", []) for cell in row.find_all("td")] for row in rows] == [
        [True, True, False]
    ] * 2


def test_a_column_of_whole_numbers_has_no_decimals():
    frame = pd.DataFrame({"rank": [16, None, 128], "gain": [1.0, 2.5, 3.0]})
    cells = BeautifulSoup(figures.table(frame)._repr_html_(), "html.parser").tbody.find_all("td")
    assert [cell.get_text() for cell in cells] == ["16", "1.0", "–", "2.5", "128", "3.0"]


def test_a_table_has_five_columns_at_most():
    with pytest.raises(ValueError, match="6 columns, at most 5"):
        _shown()


@pytest.mark.parametrize(
    "parts, shown",
    [
        (
            ["One says. Two, of ", nodes.literal(text="x"), "."],
            "<strong>One says.</strong> Two, of <literal>x</literal>.",
        ),
        ([nodes.literal(text="x"), " at 0.5 wins?\nMore."], "<strong><literal>x</literal> at 0.5 wins?</strong> More."),
        ([nodes.strong(text="Set off."), " One. Two."], "<strong>Set off.</strong> One. Two."),
        (["One sentence alone."], "One sentence alone."),
    ],
)
def test_a_caption_is_roman_and_its_first_sentence_bold(parts, shown):
    inner = [nodes.Text(part) if isinstance(part, str) else part.deepcopy() for part in parts]
    caption = nodes.paragraph("", "", nodes.emphasis("", "", *inner))
    lead(caption)
    assert str(caption) == f"<paragraph>{shown}</paragraph>"


@pytest.mark.parametrize("log, ends", [(False, (0, 80)), (True, (0.5, 80))])
def test_no_step_of_a_slider_moves_an_axis(log, ends):
    """All values of all steps lie on axes that are set once, the x axis too where steps differ in what they hold."""
    frames = {"a": pd.DataFrame({"B": [0.5, 2.0]}, index=[1, 2]), "b": pd.DataFrame({"B": [40, 80.0]}, index=[1, 60])}
    figure = figures.slider_lines(frames, {}, prefix="", alt="", x="x", y="y", log_y=log)
    low, high = figure.layout.yaxis.range
    low, high = (10**low, 10**high) if log else (low, high)
    assert -5 < low <= ends[0] and ends[1] <= high < 1.5 * ends[1]
    assert figure.layout.xaxis.range[0] <= 1 and figure.layout.xaxis.range[1] >= 60
    assert [trace.line.color for trace in figure.data] == [figures.BLUE] * 2
    same = figures.slider_lines({"a": frames["a"], "b": frames["a"]}, {}, prefix="", alt="", x="x", y="y")
    assert same.layout.xaxis.range is None


def test_a_slider_opens_at_the_step_that_is_named():
    frames = {label: pd.DataFrame({"A": [0, i], "B": [2, i]}, index=[1, 2]) for i, label in enumerate("xyz")}
    for opens, place in ((None, 0), ("y", 1)):
        figure = figures.slider_lines(frames, {}, prefix="", alt="", x="", y="", opens=opens)
        assert [trace.visible for trace in figure.data] == [i // 2 == place for i in range(6)]
        [slider] = figure.layout.sliders
        assert slider.active == place
        shown = [a.to_plotly_json() for a in figure.layout.annotations]
        assert shown == list(slider.steps[place].args[1]["annotations"])


def test_names_stand_at_the_ends_of_their_lines_and_not_on_each_other():
    frames = {"a": pd.DataFrame({"A": [5, 10.0], "B": [1, 9.9], "C": [2, 0.0]}), "b": pd.DataFrame({"A": [0, 3.0]})}
    figure = figures.slider_lines(frames, {"C": "#123456"}, prefix="", alt="", x="x", y="y", height=470)
    first = list(figure.layout.annotations)
    assert [name.text[-1] for name in first] == ["C", "B", "A"] and not figure.layout.showlegend
    c, b, a = (name.y for name in first)
    low, high = figure.layout.yaxis.range
    assert c == 0 and a == 10 and low < b and a - b >= (high - low) * 18 / 300
    assert "#123456" in first[0].text and figures.BLUE in first[1].text and figures.ORANGE in first[2].text
    second = figure.layout.sliders[0].steps[1].args
    assert second[0] == {"visible": [False, False, False, True]}
    assert [(name["y"], name["text"][-1]) for name in second[1]["annotations"]] == [(3, "A")]
    low_ends = pd.DataFrame({name: [10, 0.1] for name in "ABC"})
    names = figures.slider_lines({"a": low_ends}, {}, prefix="", alt="", x="x", y="y").layout.annotations
    assert names[0].y == 0 and names[2].y > names[1].y > names[0].y
