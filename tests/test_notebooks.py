"""Every chapter runs alone, offline, from an empty folder, and still says what its stored outputs say."""

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "book").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
EXPERIMENTS = [p for p in NOTEBOOKS if p.parent.name == "experiments"]
CHAPTERS = [p for p in NOTEBOOKS if p not in EXPERIMENTS]


def _ids(paths):
    return [str(p.relative_to(ROOT / "book")) for p in paths]


@pytest.mark.slow
@pytest.mark.parametrize("chapter", CHAPTERS, ids=_ids(CHAPTERS))
def test_chapter_runs_and_agrees_with_its_outputs(chapter, tmp_path):
    shutil.copy(chapter, tmp_path)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--nbval-lax",
        "--nbval-cell-timeout=300",
        "-q",
        "-p",
        "no:randomly",
    ]
    command += ["-p", "no:cacheprovider", "--rootdir", str(tmp_path), chapter.name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.parametrize("chapter", CHAPTERS, ids=_ids(CHAPTERS))
def test_chapter_has_outputs_and_checked_cells(chapter):
    cells = [c for c in nbformat.read(chapter, 4).cells if c.cell_type == "code"]
    counts = [c.execution_count for c in cells]
    assert counts == list(range(1, len(cells) + 1)), "run the chapter top to bottom before committing it"
    assert not [o for c in cells for o in c.outputs if o.output_type == "error"]
    checked = [c for c in cells if "nbval-check-output" in c.metadata.get("tags", [])]
    assert len(checked) >= 3 and all(c.outputs for c in checked), "a chapter with no checked cell is not tested"


@pytest.mark.slow
def test_straight_lines_run_without_geomstats(monkeypatch):
    """Every cell that calls it says in one line that it cannot, and all else is printed as stored."""
    monkeypatch.setenv("GEOMSTATS_BACKEND", "numpy")
    for name in ["geomstats", *(m for m in sys.modules if m.startswith("geomstats."))]:
        monkeypatch.setitem(sys.modules, name, None)
    cells = [c for c in nbformat.read(ROOT / "book" / "straight_lines.ipynb", 4).cells if c.cell_type == "code"]
    names, absent = {}, "geomstats cannot be imported here: its check is left out"
    calling = [c for c in cells if re.search(r"\b(gs|space)\.", c.source)]
    assert len(calling) == 4
    for cell in cells[1:]:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(cell.source, names)
        lines = printed.getvalue().splitlines()
        assert lines.count(absent) == (cell in calling)
        if "nbval-check-output" in cell.metadata.get("tags", []):
            stored = "".join(o.text for o in cell.outputs if o.output_type == "stream").splitlines()
            assert [x for x in stored if "geomstats" not in x] == [x for x in lines if x != absent]


@pytest.mark.parametrize("notebook", EXPERIMENTS, ids=_ids(EXPERIMENTS))
def test_experiments_are_committed_without_outputs_and_have_parameters(notebook):
    cells = [c for c in nbformat.read(notebook, 4).cells if c.cell_type == "code"]
    assert not any(c.outputs or c.execution_count for c in cells)
    assert sum("parameters" in c.metadata.get("tags", []) for c in cells) == 1


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=_ids(NOTEBOOKS))
def test_notebook_is_clean(notebook):
    nb = nbformat.read(notebook, 4)
    nbformat.validate(nb)
    assert set(nb.metadata) == {"kernelspec", "language_info"}
    title = nb.cells[1].source
    assert title.startswith("# ") and "\n> " in title, "setup cell, title, then the thesis as a quote"
    text = notebook.read_text(encoding="utf8")
    assert str(ROOT) not in text and str(Path.home()) not in text and "../data" not in text


def test_every_notebook_begins_with_the_same_setup_cell():
    """It installs the package on Colab; the address of the repository stands in _config.yml alone."""
    url = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"]
    firsts = {nbformat.read(path, 4).cells[0].source for path in NOTEBOOKS}
    assert len(firsts) == 1 and f'"git+{url}"' in firsts.pop()
    assert all(nbformat.read(path, 4).cells[0].metadata.tags == ["remove-cell"] for path in NOTEBOOKS)


def test_every_notebook_is_in_the_table_of_contents():
    toc = (ROOT / "_toc.yml").read_text()
    listed = {line.split("file:")[1].strip() for line in toc.splitlines() if "file:" in line}
    listed |= {yaml.safe_load(toc)["root"]}
    assert {str(p.relative_to(ROOT).with_suffix("")) for p in NOTEBOOKS} <= listed
