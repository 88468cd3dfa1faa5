"""Sphinx extension: plotly figures and formulas that need no network.

myst-nb knows no renderer for plotly's MIME type and would drop every figure. Here each figure becomes a
`<div>` with its JSON beside it; `_static/figures.js` draws it with one shared copy of plotly.js when it comes
into view. plotly.js and MathJax are copied from the installed Python packages, so no page asks another host for
them. `_static/plotly-cartesian.min.js`, the same plotly.js without space and maps at a third of the size, is in no
Python package and therefore in the repository: npm's plotly.js-cartesian-dist-min of the version Python's plotly has.
"""

import base64
import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from docutils import nodes

PLOTLY_MIME = "application/vnd.plotly.v1+json"
CARTESIAN = {  # the kinds of traces it knows
    *("bar", "box", "contour", "heatmap", "histogram", "histogram2d", "histogram2dcontour", "image", "pie", "scatter"),
    *("scatterternary", "violin"),
}
MATHJAX = [
    "tex-chtml.js",
    "input/tex/extensions",
    "output/chtml/fonts/woff-v2",
]  # of 24 MB, what a page can ask for


def rounded(value):
    """Plotly's JSON with five significant digits, more than a screen shows; base64 doubles become such numbers."""
    if isinstance(value, float) and not value.is_integer():  # a count keeps its digits
        return float(f"{value:.5g}")
    if isinstance(value, list):
        return [rounded(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.get("dtype") in ("f4", "f8"):
        numbers = np.frombuffer(base64.b64decode(value["bdata"]), value["dtype"])
        shape = [int(n) for n in str(value.get("shape", len(numbers))).split(",")]
        return rounded(np.where(np.isfinite(numbers), numbers, None).reshape(shape).tolist())
    return {key: rounded(item) for key, item in value.items()}


def alternative(figure: dict) -> str:
    """What a figure says to who cannot see it."""
    layout = figure.get("layout", {})
    return str(layout.get("meta", {}).get("alt") or layout.get("title", {}).get("text") or "Figure")


def script(figure: dict) -> str:
    """The smallest plotly.js that draws a figure."""
    flat = {trace.get("type", "scatter") for trace in figure["data"]} <= CARTESIAN
    return "plotly-cartesian.min.js" if flat else "plotly.min.js"


def chapter(env, page: str) -> str:
    """Before the number of a figure: "3." in a numbered chapter, nothing elsewhere."""
    numbers = env.toc_secnumbers.get(page, {}).values()
    return f"{min(numbers)[0]}." if numbers else ""


class PlotlyFigure:
    """A myst-nb MIME renderer."""

    mime_priority_overrides = [("html", PLOTLY_MIME, 5)]  # before text/html and images

    @staticmethod
    def handle_mime(renderer, data, inline):
        if data.mime_type != PLOTLY_MIME or inline:
            return None
        figure = rounded(data.content if isinstance(data.content, dict) else json.loads(data.content))
        height = figure.get("layout", {}).get("height", 420)
        text = json.dumps(figure, separators=(",", ":")).replace("</", "<\\/")
        alt = alternative(figure).replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
        html = (
            f'<div class="lo-figure" role="figure" aria-label="{alt}" style="height:{height}px" '
            f'data-script="{script(figure)}"><script type="application/json">{text}</script></div>'
        )
        return [nodes.raw(text=html, format="html", classes=["output", "text_html"])]


def copy_scripts(app, error):
    """Put plotly.js and MathJax into the finished site's `_static`."""
    if error or app.builder.format != "html":
        return
    static = Path(app.outdir, "_static")
    plotly = Path(find_spec("plotly").origin).parent / "package_data" / "plotly.min.js"
    shutil.copy2(plotly, static / "plotly.min.js")
    mathjax = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax"
    for name in MATHJAX:
        source, target = mathjax / name, static / "mathjax" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target, dirs_exist_ok=True) if source.is_dir() else shutil.copy2(source, target)


def drop_thebe(app, page, template, context, doctree):
    """No page runs code through thebe, yet jupyter-book adds its scripts, twice: a console error on each page."""
    scripts = context.get("script_files", [])
    context["script_files"] = [s for s in scripts if "thebe" not in f"{s.filename}{s.attributes}".lower()]


def list_references(app, page, template, context, doctree):
    """docutils puts entries of the deprecated role doc-biblioentry into a list, which may hold list items only."""
    context["body"] = context.get("body", "").replace('role="doc-biblioentry"', 'role="listitem"')


def lead(caption: nodes.paragraph) -> None:
    """Roman, and bold up to the end of its first sentence, if there are more and the notebook made nothing bold."""
    parts = caption[0].children + caption.children[1:]
    for i, part in enumerate(parts):
        halves = re.split(r"(?<=[.?!])\s+", part.astext(), maxsplit=1) if isinstance(part, nodes.Text) else []
        if len(halves) == 2:
            parts[: i + 1] = [nodes.strong("", "", *parts[:i], nodes.Text(halves[0])), nodes.Text(f" {halves[1]}")]
        if len(halves) == 2 or isinstance(part, nodes.strong):
            break
    caption.clear()
    caption.extend(parts)


def number_figures(app, doctree, page):
    """Caption: the emphasised paragraph after a figure. "Figure 3.2" in a numbered chapter, "Figure 2" elsewhere."""
    count = 0
    for raw in doctree.findall(nodes.raw):
        cell = raw
        while cell is not None and "cell" not in cell.get("classes", []):
            cell = cell.parent
        if 'class="lo-figure"' not in raw.astext() or cell is None:
            continue
        caption = cell.next_node(descend=False, siblings=True)
        if isinstance(caption, nodes.paragraph) and isinstance(caption[0], nodes.emphasis):
            count += 1
            lead(caption)
            caption["classes"].append("lo-caption")
            caption.insert(0, [nodes.strong(text=f"Figure {chapter(app.env, page)}{count}."), nodes.Text(" ")])


def setup(app):
    from myst_nb.core.render import load_mime_renders

    if PlotlyFigure not in load_mime_renders():  # the list is cached for the process
        load_mime_renders().append(PlotlyFigure)
    app.config.mathjax_path = "mathjax/tex-chtml.js"
    app.connect("doctree-resolved", number_figures)
    app.connect("html-page-context", drop_thebe, priority=900)
    app.connect("html-page-context", list_references)
    app.connect("build-finished", copy_scripts)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
