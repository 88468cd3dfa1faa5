"""What every drawing shares, of the report and of the book: palette, template, alternative text.

The palette is Okabe and Ito's, safe for colour-blind readers. Backgrounds are transparent so that pages can be
light or dark. Labels are plain Unicode: `$…$` stays literal in plotly.
"""

import plotly.graph_objects as go
import plotly.io as pio

BLUE, ORANGE, GREEN, YELLOW, SKY, VERMILION, PURPLE, VIOLET, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#B8A500", "#56B4E9", "#D55E00", "#CC79A7", "#7B68EE", "#8A8A8A",
)  # fmt: skip

pio.templates["book"] = go.layout.Template(
    layout={
        "colorway": [BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, YELLOW, GREY],
        "font": {"family": "system-ui, sans-serif", "size": 13},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 60, "r": 20, "t": 30, "b": 50},
        "dragmode": False,  # a finger that lands on a figure scrolls the page
        "hoverlabel": {"font": {"family": "system-ui, sans-serif"}},
        "xaxis": {"showline": True, "ticks": "outside", "automargin": True, "gridcolor": "#ccc", "fixedrange": True},
        "yaxis": {"showline": False, "automargin": True, "gridcolor": "#ccc", "fixedrange": True},
        "scene": {"dragmode": "turntable"},
        "updatemenudefaults": {"bgcolor": "white", "bordercolor": "#ccc"},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"},
    }
)
TEMPLATE = pio.templates["book"]
CONFIG = {"displayModeBar": False, "doubleClick": "reset", "scrollZoom": False}  # for who shows a figure


def finish(figure: go.Figure, alt: str, height: int = 420, **layout) -> go.Figure:
    """The book's template, a height, and the alternative text that screen readers speak."""
    return figure.update_layout(template=TEMPLATE, height=height, meta={"alt": alt}, **layout)
