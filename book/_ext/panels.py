"""The panels of the paper, from data/results: readable in print, and without colour.

A method is told by its place, its symbol or its dash as well as by its colour. Every panel shows an interval, a null or
the spread over orders.
"""

from collections.abc import Mapping, Sequence

import findings
import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from scipy.stats import halfnorm

from lora_opcm.lab.evidence import choice, streams, tables
from lora_opcm.lab.evidence.rows import CAPS, RANK
from lora_opcm.site import figures

WIDTH = 640
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "x", "star", "triangle-down")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "solid")
INK = "#222"


def _grid(titles: Sequence[str], height: int, **options) -> go.Figure:
    """One row of plots with lettered titles, in black on white."""
    lettered = [f"({letter}) {title}" for letter, title in zip("abc", titles)]
    figure = make_subplots(rows=1, cols=len(titles), subplot_titles=lettered, **options)
    figures.finish(figure, "; ".join(titles), height, width=WIDTH, paper_bgcolor="white", plot_bgcolor="white")
    figure.update_layout(
        font={"family": "Arial, Liberation Sans, sans-serif", "size": 11, "color": INK},
        margin={"l": 8, "r": 12, "t": 26, "b": 40},
        legend={"font": {"size": 10.5}, "bgcolor": "white"},
    )
    figure.update_annotations(font={"size": 11.5})
    axis = {"gridcolor": "#ddd", "zeroline": False}
    return figure.update_xaxes(linecolor=INK, **axis).update_yaxes(**axis)


def _titled(figure: go.Figure, **layout) -> go.Figure:
    """With the titles of its axes in the size of its other letters: they are reset with the title itself."""
    axis = {"title_font_size": 11, "title_standoff": 6}
    return figure.update_xaxes(**axis).update_yaxes(**axis).update_layout(**layout)


def _bar(middle, low, high) -> dict:
    """An error bar from `low` to `high`."""
    middle, low, high = (np.atleast_1d(x).astype(float) for x in (middle, low, high))
    return {
        "type": "data", "symmetric": False, "array": (high - middle).tolist(), "arrayminus": (middle - low).tolist(),
        "thickness": 1.2, "width": 0,
    }  # fmt: skip


def _ends(figure: go.Figure, rows: Mapping[str, tuple], names: tuple[str, str], column: int) -> None:
    """Two values a row, each (value, low, high), a line between them: the first is filled, the second hollow."""
    places = np.arange(len(rows))
    for i, (name, symbol, colour) in enumerate(
        zip(names, ("circle", "diamond-open"), (figures.BLUE, figures.VERMILION))
    ):
        value, low, high = zip(*(ends[i] for ends in rows.values()))
        figure.add_scatter(
            x=value, y=places + (0.14, -0.14)[i], mode="markers", name=name, showlegend=column == 1, row=1, col=column,
            marker={"symbol": symbol, "size": 8, "color": colour, "line": {"width": 1.6}},
            error_x=_bar(value, low, high),
        )  # fmt: skip
    figure.update_yaxes(tickvals=places, ticktext=list(rows), range=[-0.6, len(rows) - 0.4], row=1, col=column)


def tasks() -> go.Figure:
    """Two adapters in one, and all of them: of either base the same rows at both numbers."""
    two, all_ = findings.pair_rows(), findings.run().bake_off
    names = {"mean": "mean", "sum, scale 1": "plain sum", "OPCM as published": "OPCM as published"}
    names |= {label: f"{label}*" for label in ("task arithmetic", "TIES", "OPCM", "TSV", "whitened sum")}
    ends = {n: tuple((r.value, *tables.interval(r.draws)) for r in (two[k], all_[k, None])) for k, n in names.items()}
    ends = dict(sorted(ends.items(), key=lambda item: item[1][1][0]))
    count = len(findings.run().outcomes[0].trial.tasks)
    figure = _grid(
        (f"encoder, {count} tasks", f"language model, {len(findings.puzzle_run().tasks)} puzzles"),
        205,
        horizontal_spacing=0.27,
    )
    _ends(figure, ends, ("two adapters", "all adapters"), 1)
    pairs, guess = findings.pairs_at_rule(), findings.guess()
    nine = findings.puzzles(None)
    found = {"a guess": (tuple(pairs["commonest answer"]), guess)}
    for label in ("task arithmetic", "OPCM, α = 0.5", "whitened sum, p = 0.5"):
        found[label] = (tuple(pairs[label]), tuple(100 * nine.loc[label, ["exact", "exact low", "exact high"]]))
    _ends(figure, found, ("two adapters", "all adapters"), 2)
    figure.add_vline(x=guess[0], line={"dash": "dot", "color": INK, "width": 1}, row=1, col=2)
    figure.update_xaxes(title="recovered gain, %", range=[30, 102], row=1, col=1)
    figure.update_xaxes(title="gain in exact match, %", range=[15, 85], row=1, col=2)
    return _titled(figure, legend={"x": 0.5, "xanchor": "center", "y": 1.12}, margin={"t": 48})


def growth() -> go.Figure:
    """What is kept of two to twenty adapters, and how long validation texts want it."""
    figure = _grid(("what is kept", "how long it should be"), 215, horizontal_spacing=0.1)
    curves = findings.growth_curves()
    counts = list(next(iter(curves.values())).index)
    for i, (label, curve) in enumerate(curves.items()):
        for column, names in ((1, ("gain", "low", "high")), (2, ("scale", "shortest", "longest"))):
            figure.add_scatter(
                x=[count * 1.018 ** (i - 2.5) for count in counts], y=curve[names[0]], mode="lines+markers", name=label,
                showlegend=column == 1, row=1, col=column, error_y=_bar(*(curve[name] for name in names)),
                line={"color": figures.colour(label), "dash": DASHES[i], "width": 1.5},
                marker={"symbol": SYMBOLS[i], "size": 6},
            )  # fmt: skip
    grid = np.geomspace(counts[0], counts[-1], 41)
    line = {"color": INK, "dash": "dot", "width": 1.2}
    figure.add_scatter(x=grid, y=np.minimum(grid**0.5, 2), mode="lines", line=line, showlegend=False, row=1, col=2)
    figure.update_xaxes(title="adapters in one", type="log", tickvals=counts, ticktext=counts)
    figure.update_yaxes(title="recovered gain, %", row=1, col=1)
    ticks = {"tickvals": [1, 2, 4, 8], "ticktext": ["1", "2", "4", "8"]}
    figure.update_yaxes(title="norm, in mean norms", type="log", **ticks, row=1, col=2)
    return _titled(figure, legend={"x": 0.5, "xanchor": "center", "y": 1.16, "entrywidth": 105}, margin={"t": 62})


def overlap() -> go.Figure:
    """Subspaces overlap on the output side; the cosine of whole updates against chance."""
    found = findings.overlaps()
    figure = _grid(("overlap of subspaces", "cosine of updates"), 215, horizontal_spacing=0.13)
    for side, name, symbol, colour, shift in (
        ("left", "outputs", "circle", figures.BLUE, -0.12),
        ("right", "inputs", "diamond-open", figures.VERMILION, 0.12),
    ):
        by = found.groupby(["layer", "module"])[f"ratio {side}"].mean().reset_index()
        place = by.groupby("layer").cumcount() % 6 / 40
        figure.add_scatter(
            x=by.layer + shift + place - 0.06, y=by[f"ratio {side}"], mode="markers", name=name, row=1, col=1,
            marker={"symbol": symbol, "size": 6, "color": colour, "line": {"width": 1.2}},
        )  # fmt: skip
    figure.add_hline(y=1, line={"dash": "dot", "color": INK, "width": 1.2}, row=1, col=1)
    figure.update_yaxes(title="φ in units of its null", rangemode="tozero", row=1, col=1)
    figure.update_xaxes(title="layer", dtick=1, row=1, col=1)
    sizes = np.sort(found["ratio cosine"])
    grid = np.linspace(0, 8, 161)
    drawn = (
        ("adapters", np.searchsorted(sizes, grid) / len(sizes), "solid", figures.BLUE),
        ("chance", halfnorm.cdf(grid), "dot", INK),
    )
    for name, share, dash, colour in drawn:
        line = {"dash": dash, "color": colour, "width": 2}
        figure.add_scatter(x=grid, y=share, mode="lines", name=name, line=line, showlegend=False, row=1, col=2)
    at = int(np.searchsorted(grid, 2.5))
    figure.add_annotation(
        x=grid[at], y=drawn[0][1][at], text="adapters", ax=40, ay=24, arrowwidth=1, font={"size": 10.5}, row=1, col=2
    )
    figure.add_annotation(x=1.1, y=halfnorm.cdf(1.1), text="chance", ax=-2, ay=-46, arrowwidth=1, row=1, col=2)
    figure.update_xaxes(title="|cosine| in units of its null", row=1, col=2)
    figure.update_yaxes(title="share of pairs and modules", rangemode="tozero", row=1, col=2)
    return _titled(figure, legend={"x": 0.02, "y": 0.98, "yanchor": "top", "orientation": "v"})


def efficiency() -> go.Figure:
    """What a cut to the rank of one adapter costs, and what a stream of bounded memory keeps."""
    rows = findings.run().bake_off
    ends = {}
    for label in sorted((*findings.MAIN, "DOP", "KnOTS-TIES"), key=lambda k: rows[k, None].value):
        short = {"all adapters": "grows", "all directions": "grows"}
        state = findings.state(rows[label, None])[0]
        two = tuple((r.value, *tables.interval(r.draws)) for r in (rows[label, None], rows[label, RANK]))
        ends[f"{label} ({short.get(state, state)})"] = two
    figure = _grid((f"as it comes, and at rank {RANK}", "streams of bounded memory"), 255, horizontal_spacing=0.12)
    _ends(figure, ends, ("rank as it comes", f"rank {RANK}"), 1)
    figure.update_xaxes(title="recovered gain, %", row=1, col=1)
    caps = list(CAPS)
    for i, label in enumerate(streams.STREAMS):
        lines = [findings.streamed().loc[label, cap] for cap in caps]
        x = [j + (i - 2) * 0.13 for j in range(len(caps))]
        values = [line["mean"] for line in lines]
        figure.add_scatter(
            x=x, y=values, mode="markers", name=label, row=1, col=2, legend="legend2",
            marker={"symbol": SYMBOLS[i], "size": 8, "color": figures.colour(label)},
            error_y=_bar(values, [line["worst"] for line in lines], [line["best"] for line in lines]),
        )  # fmt: skip
    for j, cap in enumerate(caps):
        reference = streams.reference(findings.run(), cap)
        figure.add_shape(
            type="line", x0=j - 0.42, x1=j + 0.42, y0=reference, y1=reference,
            line={"dash": "dot", "color": INK, "width": 1.5}, row=1, col=2,
        )  # fmt: skip
    figure.update_xaxes(title="directions kept", tickvals=list(range(len(caps))), ticktext=caps, row=1, col=2)
    figure.update_yaxes(title="recovered gain, %", range=[44, 81], row=1, col=2)
    return _titled(
        figure,
        legend={"x": 0.22, "xanchor": "center", "y": 1.1},
        legend2={"x": 1, "xanchor": "right", "y": 0.01, "yanchor": "bottom", "bgcolor": "white", "font": {"size": 10}},
        margin={"t": 54},
    )


def ablations() -> go.Figure:
    """The scale, the threshold of OPCM, the power of a whitened sum: accuracy on validation texts."""
    figure = _grid(
        ("scale", "α of OPCM", "power of whitened sums"), 265, horizontal_spacing=0.08, column_widths=[0.44, 0.28, 0.28]
    )
    curves = findings.scale_curves()
    for i, (label, curve) in enumerate(curves.items()):
        figure.add_scatter(
            x=[choice.ratio(k) for k in curve], y=list(curve.values()), mode="lines+markers", name=label, row=1, col=1,
            line={"color": figures.colour(label), "dash": DASHES[i], "width": 1.8},
            marker={"symbol": SYMBOLS[i], "size": 6},
        )  # fmt: skip
    ticks = {"tickvals": [0.5, 1, 2, 4], "ticktext": ["½", "1", "2", "4"]}
    figure.update_xaxes(title="norm, in mean norms", type="log", **ticks, row=1, col=1)
    figure.update_yaxes(title="validation accuracy, %", row=1, col=1)
    for column, knob in ((2, findings.knob("OPCM", "alpha")), (3, findings.powers())):
        for rank, name, symbol, dash, colour in (
            (None, "rank as it comes", "circle", "solid", figures.BLUE),
            (RANK, f"rank {RANK}", "diamond-open", "dash", figures.VERMILION),
        ):
            part = knob[rank]
            figure.add_scatter(
                x=part.columns, y=part.mean(), mode="lines+markers", name=name, row=1, col=column, legend="legend2",
                showlegend=column == 2, line={"color": colour, "dash": dash, "width": 1.8},
                marker={"symbol": symbol, "size": 7, "line": {"width": 1.5}},
                error_y=_bar(part.mean(), part.min(), part.max()),
            )  # fmt: skip
        figure.update_yaxes(range=[79, 90.5], row=1, col=column)
    figure.update_xaxes(title="α", tickvals=[0.5, 0.75, 0.9], range=[0.42, 0.98], row=1, col=2)
    figure.update_xaxes(title="p", tickvals=[0, 0.25, 0.5, 1], range=[-0.1, 1.1], row=1, col=3)
    return _titled(
        figure,
        legend={"x": 0.5, "xanchor": "center", "y": 1.12, "entrywidth": 135},
        legend2={
            "x": 0.5,
            "y": 0.02,
            "yanchor": "bottom",
            "orientation": "v",
            "font": {"size": 10},
            "bgcolor": "white",
        },
        margin={"t": 78},
    )


PANELS = {"tasks": tasks, "growth": growth, "overlap": overlap, "efficiency": efficiency, "ablations": ablations}
