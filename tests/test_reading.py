"""A page takes as long to read as it says, and its code can be read and run as it stands, without what is folded."""

import builtins
import re
import symtable
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
CHAPTERS = sorted(p for p in (ROOT / "book").rglob("*.ipynb") if p.parent.name != "experiments")
LINES = 12


def folded(cell):
    return bool(FOLDED & set(cell.metadata.get("tags", [])))


def lines(cell):
    return sum(bool(line.strip()) for line in cell.source.splitlines())


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
            if not folded(cell):
                found["line of code"] += lines(cell)
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


def bound_and_used(source):
    """The names that a cell gives to the next ones, and those that it takes from before (or from Python)."""
    module = symtable.symtable(source, "cell", "exec")
    bound = {name.get_name() for name in module.get_symbols() if name.is_assigned() or name.is_imported()}
    tables, used = [module], set()
    while tables:
        table = tables.pop()
        tables += table.get_children()
        used |= {x.get_name() for x in table.get_symbols() if x.is_referenced() and (table is module or x.is_global())}
    return bound, used


def missing(cells):
    """For each code cell that is seen, what it takes from a fold that is not titled Setup, or from nowhere."""
    known, found = set(dir(builtins)), []
    for cell in cells:
        bound, used = bound_and_used(cell.source)
        if not folded(cell):
            found += [f"{name}: {cell.source.splitlines()[0]}" for name in sorted(used - known - bound)]
        if not folded(cell) or cell.metadata.get("mystnb", {}).get("code_prompt_show") == "Setup":
            known |= bound
    return found


def code_of(page):
    return [cell for cell in nbformat.read(page, 4).cells if cell.cell_type == "code"]


@pytest.mark.parametrize("page", CHAPTERS, ids=lambda p: p.stem)
def test_no_cell_in_sight_is_long(page):
    seen = [cell for cell in code_of(page) if not folded(cell)]
    assert [f"{lines(c)} lines: {c.source.splitlines()[0]}" for c in seen if lines(c) > LINES] == []


@pytest.mark.parametrize("page", CHAPTERS, ids=lambda p: p.stem)
def test_what_is_seen_runs_when_copied_in_order(page):
    assert missing(code_of(page)) == []


def test_what_a_cell_gives_and_takes():
    source = (
        "from math import pi\nimport torch as t\n\ndef f(x):\n    return [x * y * pi for x in z]\n\na, b = t.ones(2)"
    )
    bound, used = bound_and_used(source)
    assert bound == {"pi", "t", "f", "a", "b"} and used == {"t", "y", "z", "pi"}
    new = nbformat.v4.new_code_cell
    seen, fold = new("print(a)"), {"tags": ["hide-input"]}
    assert missing([new("a = 1", metadata=fold), seen]) == ["a: print(a)"]
    assert not missing([new("a = 1", metadata=fold | {"mystnb": {"code_prompt_show": "Setup"}}), seen])
    assert not missing([new("a = 1"), seen]) and missing([seen, new("a = 1")])
