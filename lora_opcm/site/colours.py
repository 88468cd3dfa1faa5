"""What a colour means through the whole book: one name, one colour.

Of a task (newsgroups in blues, newswire in oranges), of a method, of the two adapters of a merge and what they become,
of the two sides of an update. There are more methods than colours that can be told apart, so kin share one; a figure
that sets kin side by side writes their names beside them. Every colour has a contrast of at least 2 with white and
with the dark page.
"""

import plotly.graph_objects as go

from ..command.drawing import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, VIOLET, YELLOW

TASK = {
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
SHORT = {  # what chapters call a method
    "sum": "sum, scale 1",
    "plain sum": "sum, scale 1",
    "paper": "OPCM, paper",
    "released code": "OPCM, FusionBench",
    "whitening": "sequential whitening",
    "CTM": "compress then merge",
    "KnOTS": "KnOTS-TIES",
    "factor-wise": "factor-wise OPCM",
}

PART = {  # of a merge of two adapters, and of an update: B spans what it writes, A what it reads
    "lora1": BLUE,
    "lora2": ORANGE,
    "lora3": GREEN,
    "B": BLUE,
    "A": ORANGE,
    "ΔW": GREEN,
    "output side": BLUE,
    "input side": ORANGE,
    "left φ": BLUE,
    "right φ": ORANGE,
    "cosine of ΔW": GREEN,
}

KNOWN = TASK | METHOD | {short: METHOD[name] for short, name in SHORT.items()} | PART


def known(name: object) -> str | None:
    """The colour of a name, in full or as a label shortens or varies it: "sci", "TSV, scale 0.5", "lora3, k = 8"."""
    name = str(name)
    if name.endswith(", null"):  # what chance would give in its place
        return None
    varied = [name.split(mark)[0] for mark in (", ", " = ", " at ")]
    return next((KNOWN[form] for form in (name, f"ng-{name}", f"reuters-{name}", *varied) if form in KNOWN), None)


def colour(name: str) -> str:
    """Of a task, a method or a part of a merge; grey where the book has given the name no colour."""
    return known(name) or GREY


def paint(figure: go.Figure) -> go.Figure:
    """A trace whose name has a colour gets it, whatever the cell gave, and so do points that stand beside their names.

    Names on an axis say what is coloured only where the trace has none: of "aligned", say, the colour means aligned.
    """
    for trace in figure.data:
        if "marker" not in trace:
            continue
        beside = trace.text if "text" in _mode(trace) else None
        axes = [] if trace.name else [trace[axis] for axis in ("y", "x") if axis in trace]
        found = known(trace.name) or next(filter(None, map(_each, (beside, *axes))), None)
        if found:
            trace.marker.color = found
            if "lines" in _mode(trace):
                trace.line.color = found
    return figure


def _mode(trace) -> str:
    return str(trace.mode) if "mode" in trace else ""


def _each(labels) -> str | list[str] | None:
    """The colours of names, one if it is the same for all; None if they are not all known."""
    found = [] if labels is None else [known(label) if isinstance(label, str) else None for label in labels]
    return (found if len(set(found)) > 1 else found[0]) if found and all(found) else None
