"""The files that describe the project agree with each other."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent


def _name(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement.strip())[0].lower().replace("_", "-")


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {_name(line): line.split("==")[1] for line in lines if line and not line.startswith("#")}


def test_every_requirement_is_pinned_within_its_range():
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    pins = _pins()
    for line in project["dependencies"] + [r for extra in extras.values() for r in extra]:
        requirement = Requirement(line)
        if requirement.name == "lora-opcm":
            continue
        pin = pins[_name(requirement.name)]
        assert requirement.specifier.contains(pin), f"{line} excludes the pinned {pin}"


def test_conda_environment_uses_the_same_files():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert pip == ["--constraint constraints.txt", "--editable .[test]"]
    python = next(d for d in environment["dependencies"] if str(d).startswith("python"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    from packaging.specifiers import SpecifierSet

    assert SpecifierSet(project["requires-python"]).contains(python.split("=")[-1])


@pytest.mark.xdist_group("together")
def test_tests_of_a_group_go_to_one_process(request):
    """Where `make test` spreads tests over processes: what a group shares is made once (pytest 9.2 broke that)."""
    if getattr(request.config.option, "loadgroup", False):
        assert request.node.nodeid.endswith("@together")


@pytest.mark.slow
def test_import_needs_little():
    other = {"pandas", "transformers", "peft", "plotly", "datasets", "scipy"}
    code = f"import sys, lora_opcm.api; print({other} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# Rooms from left to right; each imports only from those before it. A room may be a file or a folder.
ROOMS = "values plugins numerics parallel lowrank geometry gauge files merging streams testing api lab command site"
INSIDE = {
    "geometry": "frames angles geodesics overlap means",
    "files": "names adapter drop format peft experts full joint paired refusals parts kohya diffusers table disk"
    " expanded updates read write live placed fuse bundle shipped",
    "merging": "core batch method remarks rules space sketch counts merge plan shards",
    "streams": "stream update opcm whitened_sum whitening factors store",
    "command": "console card recipe tables drawing report states merges fuse tune app",
    "lab": "assets gguf embedded tasks bases attach protocol resampling evaluation training train experiments evidence"
    " generation travel tune",
}


def imported(path: Path) -> set[tuple[str, ...]]:
    """Modules of the package that a file imports, as parts of their names, where it stands in a function too."""
    found, here = set(), path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (
                (*here[: len(here) - node.level], *(node.module or "").split("."))
                if node.module
                else here[: len(here) - node.level]
            )
            names = [()] if node.module else [(alias.name,) for alias in node.names]
            found |= {(*base, *name)[1:] for name in names}
    return found


def test_rooms_import_one_way():
    """As CONTRIBUTING lists them; a function that imports when it is called is held to it too."""
    order = ROOMS.split()
    package = ROOT / "lora_opcm"
    there = {p.stem for p in package.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert there - {"__init__", "__main__"} == set(order)
    assert "`" + "`, `".join(order) + "`" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf8")
    # Methods that stand for functions of later files.
    late = {("files", "adapter", "files", "write"), ("files", "adapter", "files", "joint")}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        if parts[0] in ("__init__", "__main__"):
            continue
        for other in imported(path):
            if not other or other[0] not in order:  # `from .. import __version__`
                continue
            if other[0] != parts[0]:
                assert order.index(other[0]) < order.index(parts[0]), f"{path} imports {'.'.join(other)}"
            elif parts[0] in INSIDE and len(parts) > 1 and len(other) > 1 and parts[1] != "__init__":
                inside = INSIDE[parts[0]].split()
                if parts[1] != other[1] and (*parts[:2], *other[:2]) not in late:
                    assert inside.index(other[1]) < inside.index(parts[1]), f"{path} imports {'.'.join(other)}"


@pytest.mark.slow
def test_types_are_complete_outside_the_lab():
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert (ROOT / "lora_opcm" / "py.typed").exists()


@pytest.mark.parametrize("target", ["book", "test", "quick", "adapters", "publish", "pdf", "cards", "release", "clean"])
def test_make_targets_exist(target):
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_version_stands_the_same_everywhere():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_functions_named_on_the_notation_page_exist():
    import importlib

    import lora_opcm as lo

    names = set(re.findall(r"`((?:\w+\.)+\w+)`", (ROOT / "book" / "notation.md").read_text()))
    assert len(names) > 20
    for name in names:
        first, *rest = name.split(".")
        if first == "lo":
            found = lo
        elif hasattr(lo, first) and first[0].isupper():
            found = getattr(lo, first)
        elif first == "lab":
            found, rest = importlib.import_module(f"lora_opcm.lab.{rest[0]}"), rest[1:]
        elif first == "rules":
            found = importlib.import_module("lora_opcm.merging.rules")
        else:
            merging = importlib.import_module("lora_opcm.merging")
            found = getattr(lo, first, None) or getattr(merging, first, None)
            found = found or importlib.import_module(f"lora_opcm.{first}")
        for part in rest:
            fields = getattr(found, "__dataclass_fields__", {})
            assert hasattr(found, part) or part in fields, f"{name}: the package has no such name"
            found = getattr(found, part, None)


@pytest.mark.slow
def test_published_table_is_complete():
    from lora_opcm.lab.evidence.tables import HEADLINE, headline, published

    table = headline()
    assert set(table.index) == set(HEADLINE) and table.gain.is_monotonic_decreasing
    assert table.gain.between(0, 100, inclusive="neither").all()
    assert (table.low <= table.gain).all() and (table.gain <= table.high).all()
    said = (ROOT / "README.md").read_text()
    gain, (low, high) = table.gain, table.loc["TSV", ["low", "high"]]
    assert f"{gain['TSV']:.0f} % of what the eight had gained [{low:.0f}, {high:.0f}]" in said
    assert f"{gain['OPCM']:.0f} % by OPCM" in said and f"{gain['mean']:.0f} % as a plain mean" in said
    run = published()
    pairs = {label: outcomes for (label, _), outcomes in run.select("pairs", (1,)).items()}
    tsv, mean = run.row(pairs["TSV"], lambda outcome: (0, 1)).value, run.row(pairs["mean"]).value
    assert f"TSV at its own length keeps {tsv:.0f} %, the mean {mean:.0f} %" in said


def test_references_are_the_works_the_pages_cite():
    """A key that neither a page nor the paper cites is on no list, a citation without a key is a dead link."""
    book = ROOT / "book"
    keys = re.findall(r"^@\w+\{([^,\s]+),", (book / "references.bib").read_text(encoding="utf8"), re.M)
    assert keys == sorted(set(keys)), "one entry a work, sorted by key"
    cited = set()
    for path in [*book.rglob("*.ipynb"), *book.rglob("*.md")]:
        groups = re.findall(r"\{cite:\w+\}`([^`]+)`", path.read_text(encoding="utf8"))
        cited |= {key.strip() for group in groups for key in group.split(",")}
    for path in (book / "paper" / "main.tex", book / "_ext" / "exhibits.py"):  # the second has the citations of a table
        cited |= {key for key in keys if re.search(rf"\b{key}\b", path.read_text(encoding="utf8"))}
    assert set(keys) == cited, f"not cited: {set(keys) - cited}; no entry: {cited - set(keys)}"
