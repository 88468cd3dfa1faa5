"""One name, one colour: in the palette, in what a figure is given, and over all pages of the built site."""

import json
import re
from collections import defaultdict
from itertools import combinations

import plotly.graph_objects as go
import pytest
from bs4 import BeautifulSoup
from conftest import SITE, site_pages

from lora_opcm.lab.evidence.tables import published
from lora_opcm.site import explore, figures
from lora_opcm.site.colours import KNOWN, METHOD, TASK, colour, known, paint

PARTS = ("lora1", "lora2", "lora3")


def bare(label):
    """The task, method or part of a merge that a label names, without what varies: rank, cap, scale, whose it is."""
    for name in (label, f"ng-{label}", f"reuters-{label}", re.split(r", | = | at ", label)[0]):
        if name in (*TASK, *METHOD, *PARTS):
            return name
    return None


def drawn(figure):
    """Every (label, colour) of a figure: names of traces, names beside points, names on an axis of coloured points."""
    for trace in figure["data"]:
        marker = trace.get("marker", {}).get("color")
        mode, name = trace.get("mode", "markers"), trace.get("name")
        tint = trace.get("line", {}).get("color", marker) if "lines" in mode else marker
        if name and isinstance(tint, str):
            yield name, tint
        for labels, named in (
            (trace.get("text"), "text" in mode),
            (trace.get("y"), not name or isinstance(marker, list)),
        ):
            if named and isinstance(labels, list) and marker:
                each = marker if isinstance(marker, list) else [marker] * len(labels)
                yield from ((label, tint) for label, tint in zip(labels, each) if isinstance(label, str))


def views(figure):
    """Which traces are seen: at first, and after every step of a slider and every button."""
    seen = [trace.get("visible", True) is True for trace in figure["data"]]
    yield seen
    layout = figure.get("layout", {})
    for control in (*layout.get("sliders", ()), *layout.get("updatemenus", ())):
        for step in control.get("steps", control.get("buttons", ())):
            first = step["args"][0]
            mask = step["args"][1] if first == "visible" else first.get("visible") if isinstance(first, dict) else None
            if isinstance(mask, list) and len(mask) == len(seen):
                yield mask


def shared(figure):
    """Pairs of a legend that a reader cannot tell apart: of tasks or methods, by their colour alone."""
    for mask in views(figure):
        seen = {}
        for trace, visible in zip(figure["data"], mask):
            name, tints = trace.get("name"), dict(drawn({"data": [trace]}))
            if visible and name in tints and trace.get("showlegend") is not False:
                shape = trace.get("mode"), trace.get("line", {}).get("dash"), str(trace.get("marker", {}).get("symbol"))
                seen[bare(name) or name] = tints[name], None if bare(name) else shape
        yield from ((a, b) for a, b in combinations(seen, 2) if seen[a] == seen[b])


def contrast(one, other):
    def light(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05

    high, low = sorted((light(one), light(other)), reverse=True)
    return high / low


def test_every_task_and_every_published_method_has_a_colour():
    found = [o.trial for o in published().outcomes if o.trial.part in ("bake_off", "pairs", "stream", "joint")]
    assert {task for trial in found for task in trial.tasks} == set(TASK)
    assert {trial.label for trial in found} <= set(METHOD)


def test_tasks_have_eight_colours_and_all_are_seen_on_either_page():
    assert len(set(TASK.values())) == len(TASK)
    assert min(contrast(tint, page) for tint in KNOWN.values() for page in ("#ffffff", "#14181e")) >= 2


@pytest.mark.parametrize(
    "label, name",
    [
        ("sci", "ng-sci"), ("rare", "reuters-rare"), ("tweets", "tweets"), ("TSV, scale 0.5", "TSV"),
        ("TSV at √2", "TSV"), ("OPCM, paper", "OPCM, paper"), ("whitened sum, tuned", "whitened sum"),
        ("lora3, k = 8", "lora3"),
    ],
)  # fmt: skip
def test_a_shortened_or_varied_name_has_the_colour_of_the_whole(label, name):
    assert colour(label) == KNOWN[name]


def test_a_name_without_a_colour_is_grey_and_a_null_is_no_method():
    assert colour("nobody") == colour("paper, null") == figures.GREY


def test_a_figure_is_painted_by_the_names_in_it():
    figure = go.Figure()
    figure.add_scatter(x=[0, 1], y=[0, 1], mode="lines", name="tweets", line={"color": "#000000"})
    figure.add_scatter(x=[0, 1], y=["sci", "rare"], mode="markers", name="aligned", marker={"color": "#000000"})
    figure.add_scatter(x=[0, 1], y=[1, 2], mode="markers+text", text=["sci", "rare"], name="families")
    figure.add_scatter(x=[0, 1], y=["TSV", "OPCM"], mode="markers")
    figure.add_scatter(x=[0], y=[0], mode="markers", name="paper, null", marker={"color": "#000000"})
    figure.add_heatmap(z=[[0]], x=["sci"], y=["sci"])
    figures.finish(figure, "five traces")
    line, aligned, families, methods, null = figure.data[:5]
    assert line.line.color == line.marker.color == TASK["tweets"]
    assert aligned.marker.color == null.marker.color == "#000000"
    assert families.marker.color == (TASK["ng-sci"], TASK["reuters-rare"])
    assert methods.marker.color == (METHOD["TSV"], METHOD["OPCM"])


def test_the_figures_one_takes_hold_of_have_the_colours_of_the_others():
    folder = SITE.parent.parent / explore.FOLDER
    assert explore.read("bench", folder)["colours"] == TASK | METHOD
    style = folder.joinpath("explore.css").read_text("utf8")
    for word, part in zip(("one", "two", "three"), PARTS):
        assert re.search(rf"--{word}: (#\w+);", style)[1].upper() == KNOWN[part]


@pytest.fixture(scope="module")
def built():
    """(page, figure) of the whole site."""
    found = []
    for name in site_pages('class="lo-figure"'):
        page = BeautifulSoup(SITE.joinpath(name).read_text("utf8"), "html.parser")
        found += [(name, json.loads(script.string)) for script in page.select(".lo-figure > script")]
    assert len(found) > 40
    return found


@pytest.mark.browser
def test_one_name_has_one_colour_over_all_pages(built):
    found = defaultdict(lambda: defaultdict(set))
    for page, figure in built:
        for label, tint in drawn(figure):
            if name := bare(label) or (label if known(label) else None):
                found[name][tint].add(page)
    assert len(found) > 30 and set(TASK) <= set(found)
    assert {name: dict(tints) for name, tints in found.items() if set(tints) != {colour(name)}} == {}


@pytest.mark.browser
def test_two_names_in_one_legend_have_two_colours(built):
    assert {page: pairs for page, figure in built if (pairs := set(shared(figure)))} == {}


def test_the_counters_see_a_name_in_two_colours_and_two_names_in_one():
    figure = paint(go.Figure([go.Scatter(y=[0], name=name, mode="lines") for name in ("TSV", "Iso-C", "Iso-CTS")]))
    assert dict(drawn(figure.to_dict())) == {name: METHOD[name] for name in ("TSV", "Iso-C", "Iso-CTS")}
    assert list(shared(figure.to_dict())) == [("Iso-C", "Iso-CTS")]
    figure.data[0].line.color = METHOD["Iso-C"]
    assert dict(drawn(figure.to_dict()))["TSV"] == METHOD["Iso-C"]
    steps = [{"args": ["visible", [i == j for j in range(3)]]} for i in range(3)]
    figure.update_traces(visible=False).update_layout(sliders=[{"steps": steps}])
    assert list(shared(figure.to_dict())) == []
