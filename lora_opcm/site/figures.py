"""Plotly figures and tables that more than one chapter uses."""

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio

from ..command import drawing
from ..command.drawing import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, TEMPLATE, VERMILION, VIOLET, YELLOW
from .colours import METHOD, TASK, colour, known, paint

__all__ = [
    "BLUE", "GREEN", "GREY", "METHOD", "ORANGE", "PURPLE", "SKY", "TEMPLATE", "VERMILION", "VIOLET", "YELLOW",
    "TASK", "colour", "comparison", "finish", "pinned", "slider_lines", "table",
]  # fmt: skip

pio.renderers["colab"].config = drawing.CONFIG  # a page of the book has the same from its figures.js


def finish(figure: go.Figure, alt: str, height: int = 420, **layout) -> go.Figure:
    """The book's template and colours, a height, and the alternative text that screen readers speak."""
    return paint(drawing.finish(figure, alt, height, **layout))


def pinned(figure: go.Figure, draws: Sequence[np.ndarray]) -> go.Figure:
    """A finished figure of points with bars along x; on a page, a click on one shows all as differences to it.

    `draws` has for every point, trace after trace, its value and resamples of it, paired over points. The figure
    carries the 95 % interval of each point minus every later one.
    """
    if len(draws) != (count := sum(len(trace.x) for trace in figure.data)):
        raise ValueError(f"{len(draws)} draws for {count} points, expected one a point")
    ends = [np.quantile(a[1:] - b[1:], [0.025, 0.975]).round(2).tolist() for a, b in combinations(draws, 2)]
    return figure.update_layout(meta={**figure.layout.meta, "pins": ends})


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
            marker={"size": 11, "color": colour(row.method)},
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
    opens: str | None = None,
) -> go.Figure:
    """One line a column, one slider step a frame, on axes that no step moves; works without a kernel.

    `frames` maps a step's label to a table whose index is x and whose columns are the lines. Names stand at the ends
    of their lines, and in a legend where a page is too narrow for that. The first step is shown, or the one named by
    `opens`.
    """
    opens = next(iter(frames)) if opens is None else opens
    figure, ruler = go.Figure(), _ruler([table.values for table in frames.values()], log_y)
    tints = {name: known(name) or colours.get(name, BLUE) for table in frames.values() for name in table.columns}
    for label, table in frames.items():
        for name in table.columns:
            figure.add_scatter(
                x=list(table.index), y=table[name].round(5).tolist(), name=name, visible=label == opens,
                mode="lines+markers", marker={"size": 5}, line={"color": tints[name]},
            )  # fmt: skip
    owners = [label for label, table in frames.items() for _ in table.columns]
    ends = {label: _ends(table, tints, ruler, log_y, height) for label, table in frames.items()}
    steps: Sequence[dict] = [
        {
            "label": label,
            "method": "update",
            "args": [{"visible": [owner == label for owner in owners]}, {"annotations": ends[label]}],
        }
        for label in frames
    ]
    slider = {
        "steps": steps,
        "currentvalue": {"prefix": prefix},
        "pad": {"t": 65},
        "len": 1.0,
        "active": list(frames).index(opens),
    }
    figure.update_yaxes(type="log" if log_y else "linear", title=y, range=ruler)
    if log_y:
        figure.update_yaxes(dtick="D2" if ruler[1] - ruler[0] < 3 else 1)
    if len({tuple(table.index) for table in frames.values()}) > 1:
        figure.update_xaxes(range=_ruler([table.index for table in frames.values()]))
    right = 35 + 7 * max(map(len, tints))
    finish(figure, alt, height, xaxis_title=x, sliders=[slider], annotations=ends[opens])
    return figure.update_layout(showlegend=False, margin={"r": right}, meta={**figure.layout.meta, "ends": True})


def _ends(table: pd.DataFrame, tints: Mapping[str, str], ruler: Sequence[float], log: bool, height: int) -> list[dict]:
    """Names right of the last points of their lines, pushed apart where they would lie on each other."""
    last = {name: table[name].dropna().iloc[-1] for name in table.columns}
    place = {name: float(np.log10(max(value, 1e-300))) if log else float(value) for name, value in last.items()}
    names = sorted(place, key=place.__getitem__)
    whole = ruler[1] - ruler[0]
    apart = whole * 19 / (height - 170)  # a line of text, on what margins and slider leave
    for high, low in zip(names[::-1], names[-2::-1]):
        place[low] = min(place[low], place[high] - apart)
    lowest = ruler[0] + whole / 22  # where the data begin: a page may shorten the axis to what they need
    for name in names:
        place[name] = max(place[name], lowest)
        lowest = place[name] + apart
    where = {"x": 1, "xref": "paper", "xanchor": "left", "xshift": 4, "showarrow": False}
    dot = '<span style="color:{}">●</span> {}'
    return [{**where, "y": round(place[name], 4), "text": dot.format(tints[name], name)} for name in names]


def _ruler(parts: Iterable, log: bool = False) -> list[float]:
    """The ends of an axis that holds all parts; it starts at nought where they reach its lower half."""
    values = np.concatenate([np.ravel(part).astype(float) for part in parts])
    values = np.log10(values[values > 0]) if log else values[np.isfinite(values)]
    low, high = values.min(), values.max()
    low = 0.0 if not log and 0 <= low < high / 2 else low
    pad = 0.05 * (high - low)
    return [round(low - pad, 4), round(high + pad, 4)]
