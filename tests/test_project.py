"""The files that describe the project agree with each other."""

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


def test_import_needs_little():
    code = "import sys, lora_opcm; print({'pandas', 'transformers', 'peft', 'plotly', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_modules_import_only_upwards():
    order = [
        "figures",
        "parallel",
        "options",
        "lowrank",
        "core",
        "grassmann",
        "formats",
        "configs",
        "adapters",
        "writing",
        "state",
        "opcm",
        "sums",
        "rules",
        "methods",
        "shards",
        "plan",
        "similarity",
        "recipe",
        "report",
        "console",
        "streams",
        "cli",
    ]
    for i, module in enumerate(order):
        path = ROOT / "lora_opcm" / f"{module}.py"
        if path.exists():
            used = set(re.findall(r"^\s*from \.(\w+) import", path.read_text(), re.M))
            for names in re.findall(r"^\s*from \. import (.+)", path.read_text(), re.M):
                used |= {name.strip() for name in names.split(",")}
            below = used - set(order[:i])
            assert not below, f"{module} imports {below}"


@pytest.mark.parametrize("target", ["book", "test", "quick", "adapters", "publish", "clean"])
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
        else:
            found = importlib.import_module(f"lora_opcm.{first}")
        for part in rest:
            fields = getattr(found, "__dataclass_fields__", {})
            assert hasattr(found, part) or part in fields, f"{name}: the package has no such name"
            found = getattr(found, part, None)


def test_published_table_is_complete():
    import pandas as pd

    rows = pd.read_csv(ROOT / "data" / "results" / "one_merge.csv")
    assert {"method", "task", "metric", "value", "low", "high", "options", "texts", "profile", "seed", "order",
            "adapters", "version"} <= set(rows.columns)  # fmt: skip
    assert (rows.low <= rows.value).all() and (rows.value <= rows.high).all()
    gain = rows[rows.metric == "recovered gain"].set_index("method").value
    assert set(gain.index) >= {"mean", "task arithmetic", "OPCM, paper", "OPCM, FusionBench"}
    assert gain.drop(["zero-shot", "own adapter"]).between(0, 1, inclusive="neither").all()


def test_references_are_the_works_the_pages_cite():
    """A key without a citation would be missing on the References page, a citation without a key is a dead link."""
    book = ROOT / "book"
    keys = re.findall(r"^@\w+\{([^,\s]+),", (book / "references.bib").read_text(encoding="utf8"), re.M)
    assert keys == sorted(set(keys)), "one entry a work, sorted by key"
    cited = set()
    for path in [*book.rglob("*.ipynb"), *book.rglob("*.md")]:
        groups = re.findall(r"\{cite:\w+\}`([^`]+)`", path.read_text(encoding="utf8"))
        cited |= {key.strip() for group in groups for key in group.split(",")}
    assert set(keys) == cited, f"not cited: {set(keys) - cited}; no entry: {cited - set(keys)}"
