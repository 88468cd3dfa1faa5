"""Plotly figures that more than one chapter uses.

Colour means the method (or the kind of module) through the whole book.
"""

from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio

from ..command.drawing import (
    BLUE,
    CONFIG,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    TEMPLATE,
    VERMILION,
    VIOLET,
    YELLOW,
    finish,
)

__all__ = [
    "BLUE", "GREEN", "GREY", "METHOD", "ORANGE", "PURPLE", "SKY", "TEMPLATE", "VERMILION", "VIOLET", "YELLOW",
    "comparison", "finish", "slider_lines",
]  # fmt: skip

pio.renderers["colab"].config = CONFIG  # a page of the book has the same from its figures.js

METHOD = {
    "zero-shot": GREY,
    "own adapter": GREY,
    "mean": SKY,
    "task arithmetic": GREEN,
    "OPCM, paper": VERMILION,
    "OPCM, FusionBench": ORANGE,
    "OPCM, scale tuned": PURPLE,
    "TSV": BLUE,
    "sequential whitening": YELLOW,
    "whitened sum, p = 0.5": VIOLET,
    "whitened sum, p = 1": VIOLET,
    "whitened sum, cap 16": VIOLET,
}


def comparison(rows: pd.DataFrame, metric: str = "recovered gain", alt: str = "") -> go.Figure:
    """Methods as points with their 95 % intervals, best on top.

    `rows` is a results table (columns method, task, metric, value, low, high); task "mean" is drawn.
    """
    part = rows[(rows.task == "mean") & (rows.metric == metric)].sort_values("value")
    figure = go.Figure()
    for row in part.itertuples():
        figure.add_scatter(
            x=[100 * row.value],
            y=[row.method],
            error_x={
                "type": "data", "symmetric": False, "thickness": 2, "width": 0,
                "array": [100 * (row.high - row.value)], "arrayminus": [100 * (row.value - row.low)],
            },
            marker={"size": 11, "color": METHOD.get(row.method, GREY)},
            mode="markers+text",
            text=[f"{100 * row.value:.0f}"],
            textposition="top center",
            showlegend=False,
            hovertemplate=f"{row.method}: %{{x:.1f}} %  [{100 * row.low:.1f}, {100 * row.high:.1f}]<extra></extra>",
        )  # fmt: skip
    figure.update_yaxes(range=[-0.5, len(part) - 0.3])  # room for the label of the topmost point
    alt = alt or "; ".join(f"{r.method} {100 * r.value:.0f} %" for r in part.iloc[::-1].itertuples())
    return finish(figure, f"{metric} by method: {alt}", 90 + 42 * len(part), xaxis_title=f"{metric}, %")


def slider_lines(
    frames: Mapping[str, pd.DataFrame],
    colours: Mapping[str, str],
    *,
    prefix: str,
    alt: str,
    x: str,
    y: str,
    log_y: bool = False,
    height: int = 460,
) -> go.Figure:
    """One line a column, one slider step a frame; works without a kernel.

    `frames` maps a step's label to a table whose index is x and whose columns are the lines.
    """
    figure = go.Figure()
    for step, (_, table) in enumerate(frames.items()):
        for name in table.columns:
            figure.add_scatter(
                x=list(table.index), y=table[name].round(5).tolist(), name=name, visible=step == 0,
                mode="lines+markers", marker={"size": 5}, line={"color": colours.get(name, BLUE)},
            )  # fmt: skip
    widths = [len(t.columns) for t in frames.values()]
    starts = [sum(widths[:i]) for i in range(len(widths))]
    steps: Sequence[dict] = [
        {
            "label": label,
            "method": "restyle",
            "args": ["visible", [a <= i < a + w for i in range(sum(widths))]],
        }
        for label, a, w in zip(frames, starts, widths)
    ]
    slider = {"steps": steps, "currentvalue": {"prefix": prefix}, "pad": {"t": 65}, "len": 1.0}
    figure.update_yaxes(type="log" if log_y else "linear", title=y)
    return finish(figure, alt, height, xaxis_title=x, sliders=[slider])
