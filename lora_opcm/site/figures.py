"""Plotly figures and tables that more than one chapter uses, and the colours of what they show.

Colour means the task or the method (or the kind of module) through the whole book: one name, one colour. Methods
that do nearly the same share one. Every colour has a contrast of at least 2 with white and with the dark page.
"""

import html
import re
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
    "TASK", "colour", "comparison", "finish", "slider_lines", "table",
]  # fmt: skip

pio.renderers["colab"].config = CONFIG  # a page of the book has the same from its figures.js

TASK = {  # newsgroups in blues, newswire in oranges
    "ng-comp": "#3366CC",
    "ng-rec": "#2A8FD0",
    "ng-sci": BLUE,
    "ng-politics": "#6C87D9",
    "ng-religion": "#4C9BC9",
    "reuters-r8": ORANGE,
    "reuters-rare": "#B36B00",
    "tweets": VERMILION,
}

BROWN, TEAL, ROSE, INDIGO = "#A8623A", "#1B8A8F", "#B8477F", "#5C6BE0"
METHOD = {
    "zero-shot": GREY,
    "own adapter": GREY,
    "mean": SKY,
    "task arithmetic": GREEN,
    "sum, scale 1": GREEN,
    "running sum": GREEN,
    "OPCM": PURPLE,
    "OPCM as published": VERMILION,
    "OPCM, paper": VERMILION,
    "OPCM, FusionBench": ORANGE,
    "OPCM, scale tuned": PURPLE,
    "TSV": BLUE,
    "sequential whitening": YELLOW,
    "whitened sum": VIOLET,
    "output whitening": TEAL,
    "input whitening": TEAL,
    "output whitening, cap 16": TEAL,
    "whitened sum, p = 0.5": VIOLET,
    "whitened sum, p = 1": VIOLET,
    "whitened sum, cap 16": VIOLET,
    "TSV, 2 directions a task": BLUE,
    "Iso-C": INDIGO,
    "Iso-CTS": INDIGO,
    "chordal mean": TEAL,
    "quotient mean": TEAL,
    "compress then merge": TEAL,
    "factor-wise OPCM": ROSE,
    "factor-wise OPCM, balanced": ROSE,
    "magnitude prune": BROWN,
    "TIES": BROWN,
    "DARE-TIES": BROWN,
    "KnOTS-TIES": BROWN,
    "core TIES": BROWN,
    "core DARE-TIES": BROWN,
    "DARE": BROWN,
    "MagMax": BROWN,
    "DOP": ORANGE,
    "Pico": GREEN,
    "SVC": GREEN,
    "subspace boosting": GREEN,
    "WUDI": ROSE,
    "ACTMat": ROSE,
    "RegMean, with texts": GREY,
    "one LoRA on all tasks": GREY,
}


def colour(name: str) -> str:
    """Of a task or a method, whether in full or as a label shortens it ("sci", "TSV, scale 0.5")."""
    for known in (name, f"ng-{name}", f"reuters-{name}", name.split(", ")[0]):
        if known in TASK or known in METHOD:
            return (TASK | METHOD)[known]
    return GREY


class Table:
    """What a notebook shows: HTML, and plain text where there is none."""

    def __init__(self, markup: str, frame: pd.DataFrame):
        self.markup, self.frame = markup, frame

    def _repr_html_(self) -> str:
        return self.markup

    def __repr__(self) -> str:
        return self.frame.to_string()


NUMBER = re.compile(r"[−+-]?\d[\d,.]*\s?%?|–|nan|")


def table(frame: pd.DataFrame, bars: Mapping[str, tuple[str, str]] | None = None, digits: int = 1) -> Table:
    """At most five columns, the index included; numbers to the right; an interval as a bar beside its number.

    `bars` maps a column to those of its lower and upper end; they are drawn on one scale and not written.
    """
    bars = dict(bars or {})
    ends = {end for pair in bars.values() for end in pair}
    names = [name for name in frame.columns if name not in ends]
    if len(names) + frame.index.nlevels > 5:
        raise ValueError(f"{len(names) + frame.index.nlevels} columns, at most 5: {', '.join(map(str, names))}")

    def said(value, digits=digits) -> str:
        if isinstance(value, float):
            return "–" if pd.isna(value) else f"{value:.{digits}f}".replace("-", "−")
        return str(value)

    def written(column) -> list[str]:
        whole = all(isinstance(v, float) and (pd.isna(v) or v == round(v)) for v in column)  # counts, with a gap
        return [said(value, 0 if whole else digits) for value in column]

    def bar(name, row) -> str:
        low, high = bars[name]
        first, last = frame[low].min(), frame[high].max()
        at = [100 * (row[key] - first) / ((last - first) or 1) for key in (low, name, high)]
        label = f"{said(float(row[low]))} to {said(float(row[high]))}"
        return (
            f'<svg role="img" aria-label="{label}" width="106" height="10" viewBox="-3 0 106 10" '
            'style="margin-left:0.6em" stroke="currentColor" fill="currentColor">'
            f'<line x1="{at[0]:.1f}" x2="{at[2]:.1f}" y1="5" y2="5" stroke-width="2" opacity="0.55"/>'
            f'<circle cx="{at[1]:.1f}" cy="5" r="2.5"/></svg>'
        )

    cells = {name: written(frame[name]) for name in names}
    aligned = {name for name in names if all(NUMBER.fullmatch(cell) for cell in cells[name])}
    right = ' class="lo-number" style="text-align:right"'
    head = [html.escape(str(name or "")) for name in frame.index.names]
    lines = [
        "<th>" + "</th><th>".join(head) + "</th>"
        + "".join(f"<th{right if n in aligned else ''}>{html.escape(str(n))}</th>" for n in names)
    ]  # fmt: skip
    for i, (key, row) in enumerate(frame.iterrows()):
        keys = key if isinstance(key, tuple) else (key,)
        line = "".join(f"<th>{html.escape(str(k))}</th>" for k in keys)
        for name in names:
            drawn = bar(name, row) if name in bars and not pd.isna(row[name]) else ""
            line += f"<td{right if name in aligned else ''}>{html.escape(cells[name][i])}{drawn}</td>"
        lines.append(line)
    body = "".join(f"<tr>{line}</tr>" for line in lines[1:])
    markup = f'<table class="dataframe"><thead><tr>{lines[0]}</tr></thead><tbody>{body}</tbody></table>'
    return Table(markup, frame)


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
