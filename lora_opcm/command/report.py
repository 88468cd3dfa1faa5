"""An interactive report of how adapters overlap: one HTML file that needs no network and runs no kernel."""

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio

from ..files.disk import write_text
from . import drawing

Tables = Mapping[tuple[int, int], pd.DataFrame]  # (i, j) with i < j -> `similarity` of adapters i and j

PAGE = Template("""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Overlap of $count LoRA adapters</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
body { color: #222; background: #fff }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem } li { margin: .4rem 0 }
figcaption, .note { color: #555; font-size: .9rem }
</style>
<main><h1>Overlap of $names</h1>
<p class=note>$k leading directions of the first and $l of the second update of a pair; outputs are the left, inputs the
right singular vectors.</p>
<h2>In words</h2><ul>$advice</ul>$figures</main></html>
""")
FIGURE = Template("<h2>$title</h2><figure>$figure<figcaption>$note</figcaption></figure>")


def write_report(path: Path, names: Sequence[str], tables: Tables, k: int, l: int) -> Path:
    """Write the report of all pairs of adapters `names`, whole or not at all.

    Raises
    ------
    ValueError
        If a pair has nothing to draw.
    """
    for (i, j), t in tables.items():
        if t.phi_left.isna().all():
            raise ValueError(f"{names[i]} and {names[j]}: no module is nonzero in both, there is nothing to report")
    parts = [
        (
            "By layer and kind of module",
            heat_map(names, tables),
            "φ divided by what chance gives (1: unrelated). Choose the pair and the side in the menu.",
        )
    ]
    if len(names) > 2:
        parts.append(
            (
                "A map of the adapters",
                adapter_map(names, tables),
                "Adapters whose leading subspaces overlap lie near each other; distances are approximate, axes have no"
                " meaning.",
            )
        )
    drawn = [
        pio.to_html(figure, drawing.CONFIG, include_plotlyjs=i == 0, full_html=False)
        for i, (_, figure, _) in enumerate(parts)
    ]
    text = PAGE.substitute(
        count=len(names),
        names=html.escape(", ".join(names)),
        k=k,
        l=l,
        advice="".join(f"<li>{html.escape(line)}</li>" for line in advice(names, tables)),
        figures="".join(
            FIGURE.substitute(title=title, figure=figure, note=note)
            for (title, _, note), figure in zip(parts, drawn, strict=True)
        ),
    )
    write_text(path, text)
    return path


def advice(names: Sequence[str], tables: Tables) -> list[str]:
    """What overlaps, which merge that suggests, and how sure one can be."""
    lines = []
    for (i, j), t in tables.items():
        left, right = (t.phi_left / t.null_left).mean(), (t.phi_right / t.null_right).mean()
        where = t.index[(t.phi_left / t.null_left).argmax()]
        lines.append(
            f"{names[i]} and {names[j]}: outputs overlap {left:.1f} times chance (most in {where}), inputs"
            f" {right:.1f} times; mean cosine {t.cosine.mean():.3f}."
        )
    cosines = [float(t.cosine.mean()) for t in tables.values()]
    inputs = max((t.phi_right / t.null_right).mean() for t in tables.values())
    if max(cosines) > 0.3:
        lines.append(
            "Some updates point the same way: a plain sum counts what they share twice. Prefer a mean, or a method that"
            " whitens (tsv, whitened_sum)."
        )
    if min(cosines) < -0.3:
        lines.append(
            "Some updates point opposite ways: a sum cancels what they disagree on, and no method keeps both. Weights"
            " say which one to keep."
        )
    if max(map(abs, cosines)) <= 0.3 and inputs > 3:
        lines.append(
            "Inputs are shared far beyond chance. Adapters that were trained from one random start do that whatever"
            " their tasks; if these were, do not read it as kinship."
        )
    elif max(map(abs, cosines)) <= 0.3:
        lines.append(
            "The updates are nearly orthogonal and read different inputs: a sum keeps each of them, and its scale"
            " matters more than the method. Choose the scale on validation data if you have any."
        )
    lines.append(
        "How sure: on the eight tasks of the book, overlap did not rank the losses of pairs reliably (chapter 'Does"
        " overlap predict interference?'). Measure the merged adapter on your tasks."
    )
    return lines


def _layer(name: str) -> tuple[int, str]:
    """The layer a module is of (the number after "layers" or "blocks", or the first), and its name without it."""
    found = re.search(r"(?<=layers[._])\d+|(?<=layer[._])\d+|(?<=blocks[._])\d+", name) or re.search(r"\d+", name)
    if not found:
        return 0, name
    return int(found[0]), f"{name[: found.start()]}·{name[found.end() :]}"


def heat_map(names: Sequence[str], tables: Tables) -> go.Figure:
    """φ over its null by layer (columns) and kind of module (rows), one frame a pair and side."""
    figure = go.Figure()
    labels: list[str] = []
    for (i, j), t in tables.items():
        layer, kind = zip(*map(_layer, t.index), strict=True)
        for side, word in (("left", "outputs"), ("right", "inputs")):
            grid = pd.DataFrame(
                {"layer": layer, "kind": kind, "ratio": (t[f"phi_{side}"] / t[f"null_{side}"]).to_numpy()}
            )
            grid = grid.pivot_table(index="kind", columns="layer", values="ratio").round(2)
            figure.add_heatmap(
                z=grid.to_numpy(),
                x=list(grid.columns),
                y=[k[-40:] for k in grid.index],
                colorscale="Viridis",
                visible=not labels,
                colorbar={"title": "× chance"},
            )
            labels.append(f"{names[i]} + {names[j]}, {word}")
    buttons = [
        {"label": s, "method": "update", "args": [{"visible": [a == b for b in range(len(labels))]}]}
        for a, s in enumerate(labels)
    ]
    menu = {"type": "dropdown", "buttons": buttons, "x": 0, "y": 1.15, "xanchor": "left", "yanchor": "top"}
    return drawing.finish(
        figure,
        "Overlap by layer and kind of module, in multiples of chance",
        480,
        xaxis_title="layer",
        margin={"t": 80},
        updatemenus=[menu],
    )


def adapter_map(names: Sequence[str], tables: Tables) -> go.Figure:
    """Classical scaling of the chordal distances √(1 − φ), averaged over modules and sides."""
    d2 = np.zeros((len(names), len(names)))
    for (i, j), t in tables.items():
        d2[i, j] = d2[j, i] = 1 - (t.phi_left.mean() + t.phi_right.mean()) / 2
    centre = np.eye(len(names)) - 1 / len(names)
    values, vectors = np.linalg.eigh(-centre @ d2 @ centre / 2)
    points = vectors[:, -2:] * np.sqrt(values[-2:].clip(min=0))
    figure = go.Figure(
        go.Scatter(
            x=points[:, 1],
            y=points[:, 0],
            mode="markers+text",
            text=list(names),
            textposition="top center",
            marker={"size": 12},
        )
    )
    return drawing.finish(
        figure,
        "Map of the adapters by the overlap of their subspaces",
        460,
        xaxis={"visible": False},
        yaxis={"visible": False, "scaleanchor": "x"},
    )
