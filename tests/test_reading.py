"""The reading time a page states is that of its words, formulas and code."""

import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
STATED = re.compile(r"\*\*Reading time\*\*: (\d+) minutes?\.")
PAGES = sorted(p for p in (ROOT / "book").rglob("*.ipynb") if STATED.search(p.read_text(encoding="utf8")))
DISPLAYED, INLINE = re.compile(r"\$\$.+?\$\$", re.DOTALL), re.compile(r"\$[^$]+\$")
LINK = re.compile(r"\]\([^)]*\)|\{[\w:]+\}`[^`]*`")
SECONDS = {"word": 0.24, "formula": 2.5, "displayed formula": 12, "line of code": 3, "figure": 20}
FOLDED = {"remove-cell", "hide-input", "hide-cell", "remove-input"}


def counted(notebook):
    """How many of each there are in what a reader sees; an open figure counts by the call that finishes it."""
    found = dict.fromkeys(SECONDS, 0)
    for cell in notebook.cells:
        text = cell.source
        if cell.cell_type == "markdown":
            found["displayed formula"] += len(DISPLAYED.findall(text))
            text = DISPLAYED.sub(" ", text)
            found["formula"] += len(INLINE.findall(text))
            found["word"] += len(re.findall(r"\w[\w’'-]*", LINK.sub(" ", INLINE.sub(" x ", text))))
        else:
            found["figure"] += len(re.findall(r"figures\.(?:finish|slider_lines|table)\(", text))
            if not FOLDED & set(cell.metadata.get("tags", [])):
                found["line of code"] += sum(bool(line.strip()) for line in text.splitlines())
    return found


def minutes(notebook):
    return sum(SECONDS[what] * count for what, count in counted(notebook).items()) / 60


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_a_page_states_how_long_it_takes_to_read(page):
    notebook = nbformat.read(page, 4)
    [stated] = [int(m) for cell in notebook.cells for m in STATED.findall(cell.source)]
    assert stated == max(1, round(minutes(notebook))), counted(notebook)


def test_what_is_counted():
    new = nbformat.v4
    cells = [
        new.new_markdown_cell("Three [short words](a/long/link.md) and $x$.\n\n$$ y\n = z $$"),
        new.new_code_cell("a = 1\n\nfigures.finish(figure)"),
        new.new_code_cell("hidden = 1", metadata={"tags": ["hide-input"]}),
    ]
    found = counted(new.new_notebook(cells=cells))
    assert list(found.values()) == [5, 1, 1, 2, 1]
