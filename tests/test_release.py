"""What a stranger gets: the package as it is installed, who made it and by what licence, and what builds it."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import cards
import chromium
import pytest
import release
import yaml
from address import PLACEHOLDER, address, forms, move

from lora_opcm.lab import assets

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf8"))
LICENCES = (ROOT / "data" / "README.md").read_text(encoding="utf8").split("## Licences")[1]


def tried(*words, **options):
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, **options)


# -- who, what, where ----------------------------------------------------------------------------------------


def test_citation_and_zenodo_agree():
    zenodo = json.loads((ROOT / ".zenodo.json").read_text(encoding="utf8"))
    assert [one["name"] for one in zenodo["creators"]] == [one["name"] for one in CITATION["authors"]]
    same = {"description": "abstract", "publication_date": "date-released"} | {
        name: name for name in ("title", "version", "license", "keywords")
    }
    for ours, theirs in same.items():
        assert str(zenodo[ours]) == str(CITATION[theirs]), ours
    [related] = zenodo["related_identifiers"]
    assert related["identifier"] == CITATION["repository-code"] == PROJECT["urls"]["Repository"]
    assert zenodo["version"] == PROJECT["version"] and zenodo["keywords"] == PROJECT["keywords"]


def test_the_address_is_the_same_wherever_it_is_written():
    owner, name = address()
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf8"))
    assert config["repository"]["url"] == f"https://github.com/{owner}/{name}"
    site = config["sphinx"]["config"]
    assert site["ogp_site_url"] == f"https://{owner.lower()}.github.io/{name}/"
    assert site["notfound_urls_prefix"] == f"/{name}/"
    for path in ROOT.glob("book/**/*.ipynb"):
        sources = re.findall(r"git\+https://github\.com/([\w-]+/[\w.-]+)", path.read_text(encoding="utf8"))
        assert set(sources) <= {f"{owner}/{name}"}, path


@pytest.fixture
def elsewhere(tmp_path):
    """A repository with the files that hold the address, and one that holds another."""
    for name in ("pyproject.toml", "_config.yml", "CITATION.cff", "CHANGELOG.md", "book/core_space.ipynb"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "other.md").write_text(f"https://{forms(*address())[0]}-extra")
    for words in (["init", "-q"], ["add", "-A"]):
        tried("git", *words, cwd=tmp_path, check=True)
    return tmp_path


def test_the_address_moves_everywhere_and_back(elsewhere):
    before = {p: p.read_bytes() for p in elsewhere.rglob("*") if p.is_file() and ".git" not in p.parts}
    moved = move("https://github.com/Some-One/geometry.of", elsewhere)
    assert {str(p) for p in moved} == {"pyproject.toml", "_config.yml", "CITATION.cff", "book/core_space.ipynb"}
    assert address(elsewhere) == ("Some-One", "geometry.of")
    assert "https://some-one.github.io/geometry.of/" in (elsewhere / "_config.yml").read_text()
    assert not any(form in (elsewhere / p).read_text() for form in forms(*address()) for p in moved)
    move("https://github.com/" + "/".join(address()), elsewhere)
    assert {p: p.read_bytes() for p in before} == before
    for wrong in ("https://example.org/a/b", "https://github.com/one", "git@github.com:a/b", ""):
        with pytest.raises(ValueError, match="expected https://github.com/OWNER/NAME, got"):
            move(wrong, elsewhere)


def test_a_release_with_placeholders_is_refused(elsewhere):
    move("https://github.com/" + "/".join(PLACEHOLDER), elsewhere)
    log = elsewhere / "CHANGELOG.md"
    log.write_text(re.sub(r"(?m)^## .*$", f"## {PROJECT['version']} (unreleased)", log.read_text(), count=1))
    address_line, date_line = release.placeholders(elsewhere)
    assert "make address" in address_line and str(CITATION["date-released"]) in date_line
    move("https://github.com/some-one/geometry", elsewhere)
    log.write_text(log.read_text().replace("(unreleased)", f"({CITATION['date-released']})"))
    assert release.placeholders(elsewhere) == []


# -- cards and licences --------------------------------------------------------------------------------------


def test_cards_are_as_their_files_have_it():
    found = cards.cards()
    assert {path.parent.name for path in found} == {
        p.parent.name for p in ROOT.glob("data/adapters/*/adapter_model.safetensors")
    }
    for path, text in found.items():
        assert path.read_text(encoding="utf8") == text, f"{path}: make cards"


def test_a_card_says_the_accuracies_of_the_manifest():
    for name, entry in json.loads((ROOT / "data/adapters/manifest.json").read_text()).items():
        text = (ROOT / "data/adapters" / name / "README.md").read_text(encoding="utf8")
        said = [float(x) for x in re.findall(r"(\d+\.\d) %", text)]
        assert said == [pytest.approx(100 * entry[key], abs=0.051) for key in ("own", "zero_shot")], name
        assert entry["sha256"] in text and f"rank {entry['protocol']['rank']} " in text


def test_every_asset_has_a_licence():
    """Wheels that are fetched, and packages whose files are copied into the site."""
    wheels = [assets.MODEL, assets.DATA, assets.SMOLLM2, assets.PUZZLES, assets.MPNET[0]]
    assert {id(w) for w in vars(assets).values() if isinstance(w, assets.Wheel)} | {id(assets.MPNET[0])} == {
        id(w) for w in wheels
    }
    assert all(f"`{wheel.name}`" in LICENCES for wheel in wheels)
    extensions = [r for r in PROJECT["optional-dependencies"]["book"] if r.startswith(("sphinx-", "plotly"))]
    copied = {re.split(r"[=><]", r)[0] for r in extensions} - {"sphinx-notfound-page"}  # adds no file to the site
    assert copied and all(f"`{name}`" in LICENCES for name in copied)


STATED = {  # what a licence file or the metadata of the licence calls it
    "MIT": "MIT License|MIT license|Permission is hereby granted, free of charge",
    "BSD-3-Clause": r"Neither the name of|BSD 3-Clause",
    "BSD-2-Clause": "two clause BSD",
    "Apache-2.0": "Apache License",
}


@pytest.mark.parametrize("row", [r for r in LICENCES.splitlines() if re.search(r"\| site[ ,|]", r)])
def test_licences_are_what_the_packages_say(row):
    names = [n for n in re.findall(r"`([\w-]+)`", "|".join(row.split("|")[1:3])) if n != "compare"]
    for name in names:
        package = distribution(name)
        files = [p for p in package.files if re.search(r"dist-info/(licenses/)?LICEN[CS]E", str(p))]
        said = "".join(p.read_text() for p in files) or str(package.metadata)
        assert re.search(STATED[row.split("|")[3].strip()], said), f"{name}: {said[:300]}"


@pytest.mark.slow
def test_licences_are_what_the_models_say():
    """The front matter of a model card, and the table in front of a GGUF file."""
    card = (assets.fetch(assets.MODEL) / "README.md").read_text(encoding="utf8")
    assert yaml.safe_load(card.split("---")[1])["license"] == "apache-2.0"
    [gguf] = assets.fetch(assets.SMOLLM2).glob("*.gguf")
    with open(gguf, "rb") as file:
        assert re.search(rb"general\.license.{12}apache-2\.0", file.read(4096), re.S)
    for name in ("all-MiniLM-L6-v2", "SmolLM2-135M-Instruct"):
        assert re.search(rf"\| {name} \|[^|]*\| Apache-2\.0 \|", LICENCES)


# -- the package as installed --------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_wheel_is_whole_and_works_away_from_here(tmp_path):
    """With this environment's packages; `make release` installs them anew, too."""
    wheel, sdist = release.build(tmp_path / "dist")
    release.check_files(wheel, sdist)
    python = tmp_path / "venv" / "bin" / "python"
    tried(sys.executable, "-m", "venv", tmp_path / "venv", check=True)
    tried(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, check=True)
    [site] = (tmp_path / "venv").glob("lib/*/site-packages")
    (site / "others.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    release.try_out(python, tmp_path)


# -- workflows and the browser -------------------------------------------------------------------------------


def test_workflows_are_safe():
    """Actions pinned by hash, the least permissions, no expression in a shell line."""
    done = tried(BIN / "zizmor", "--offline", "--strict-collection", "--persona", "pedantic", *WORKFLOWS)
    assert done.returncode == 0, done.stdout + done.stderr


def test_workflows_are_well_formed():
    linter = shutil.which("actionlint")
    if linter is None:
        pytest.skip("actionlint is not installed; the workflow of the tests installs it")
    done = tried(linter, "-shellcheck", BIN / "shellcheck", *WORKFLOWS)
    assert done.returncode == 0, done.stdout


def test_shell_lines_are_sound(tmp_path):
    scripts = {".ci/run": (ROOT / ".ci" / "run").read_text()}
    for path in WORKFLOWS:
        for name, job in yaml.safe_load(path.read_text())["jobs"].items():
            for i, step in enumerate(job["steps"]):
                if "run" in step:
                    scripts[f"{path.stem} {name} {i}"] = f"#!/bin/bash -e\n{step['run']}\n"
    assert len(scripts) > 6
    for name, text in scripts.items():
        (tmp_path / "script").write_text(text)
        done = tried(BIN / "shellcheck", tmp_path / "script")
        assert done.returncode == 0, f"{name}: {done.stdout}"


def test_the_matrix_begins_with_the_oldest_python():
    job = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())["jobs"]["test"]
    first, *others = job["strategy"]["matrix"]["python"]
    assert PROJECT["requires-python"] == f">={first}" and others == ["3.12", "3.13"]


@pytest.mark.slow
def test_a_run_without_a_browser_is_not_green(tmp_path):
    (tmp_path / "test_page.py").write_text("def test_page(browser): pass\ndef test_none(): pass\n")
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    bare = {"PATH": str(tmp_path), "PLAYWRIGHT_BROWSERS_PATH": str(tmp_path), "HOME": os.environ["HOME"]}
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = tried(sys.executable, "-m", "pytest", "-n1", cwd=tmp_path, env=bare | paths)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout
    assert f"1 browser tests did not run: {chromium.MISSING}" in done.stdout and "1 passed" in done.stdout
