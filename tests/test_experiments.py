"""The engine of Part IV: what would run, what is refused, and that no number in its prose was typed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "book" / "experiments"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PROFILES = yaml.safe_load((FOLDER / "profiles.yaml").read_text())


def snakemake(folder, *arguments):
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--dry-run", *arguments]
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


@pytest.fixture
def checkout(tmp_path):
    """What the Snakefile looks at, in a folder of its own."""
    (tmp_path / "book").mkdir()
    for name in ("Snakefile", "lora_opcm", "profiles", "book/experiments", "data/adapters/manifest.json"):
        source, target = ROOT / name, tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(
            source, target, ignore=shutil.ignore_patterns("__pycache__")
        ) if source.is_dir() else shutil.copy(source, target)
    return tmp_path


def jobs(done):
    """Rule -> count, from the table a dry run prints."""
    assert done.returncode == 0, done.stderr[-2000:]
    return {
        name: int(count)
        for name, count in re.findall(r"^(tiny|adapter|notebook|all) +(\d+)$", done.stdout + done.stderr, re.M)
    }


@pytest.mark.slow
def test_full_profile_lists_every_adapter_and_every_notebook(checkout):
    assert jobs(snakemake(checkout, "--config", "profile=full")) == {
        "adapter": 16,
        "notebook": len(PROFILES["full"]["notebooks"]),
        "all": 1,
    }


@pytest.mark.slow
def test_one_adapter_missing_means_one_training_and_what_needs_it(checkout):
    for seed in (1, 2):
        for task in (
            "ng-comp",
            "ng-rec",
            "ng-sci",
            "ng-politics",
            "ng-religion",
            "reuters-r8",
            "reuters-rare",
            "tweets",
        ):
            folder = checkout / "_build" / "adapters" / f"seed{seed}" / task
            folder.mkdir(parents=True)
            for file in ("adapter_model.safetensors", "adapter_config.json", "training.json"):
                (folder / file).touch()
    for name in PROFILES["full"]["notebooks"]:
        for out in (f"executed/{name}.ipynb", f"results/{name}.csv"):
            path = checkout / "_build" / "full" / out
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    assert "Nothing to be done" in (lambda d: d.stdout + d.stderr)(
        snakemake(checkout, "--config", "profile=full", "--rerun-triggers", "mtime")
    )
    (checkout / "_build" / "adapters" / "seed2" / "tweets" / "adapter_model.safetensors").unlink()
    every = PROFILES["full"]["every"]
    need = sum(2 in ((every | (run or {})).get("seeds") or []) for run in PROFILES["full"]["notebooks"].values())
    assert jobs(snakemake(checkout, "--config", "profile=full", "--rerun-triggers", "mtime")) == {
        "adapter": 1,
        "notebook": need,
        "all": 1,
    }


@pytest.mark.slow
def test_slurm_profile_plans_the_same_jobs(checkout):
    done = snakemake(checkout, "--profile", "profiles/slurm", "--config", "profile=full")
    assert jobs(done)["adapter"] == 16


def grown(profile):
    """How many adapters the notebooks of a profile train: one a base, task and seed."""
    every, count = PROFILES[profile]["every"], 0
    for name, own in PROFILES[profile]["notebooks"].items():
        cell = next(
            c for c in nbformat.read(FOLDER / f"{name}.ipynb", 4).cells if "parameters" in c.metadata.get("tags", [])
        )
        given = {}
        exec(cell.source, given)
        given |= every | own
        count += len(given["bases"]) * len(given["tasks"]) * len(given["seeds"])
    return count


@pytest.mark.slow
def test_gpu_profile_lists_every_adapter_and_every_notebook(checkout):
    done = snakemake(checkout, "--config", "profile=gpu")
    assert jobs(done) == {"adapter": grown("gpu"), "notebook": 3, "all": 1}
    told = done.stdout + done.stderr
    for base in ("clip-vit-base-patch32", "clip-vit-base-patch16", "clip-vit-large-patch14"):
        assert f"_build/gpu/adapters/{base}/seed2/sun397/adapter_model.safetensors" in told
    assert "_build/gpu/adapters/Llama-2-7b-hf/seed0/humaneval/adapter_model.safetensors" in told


@pytest.mark.slow
def test_rehearsal_is_the_gpu_profile_on_tiny_checkpoints(checkout):
    assert set(PROFILES["rehearsal"]["notebooks"]) == set(PROFILES["gpu"]["notebooks"])
    expected = {"tiny": 1, "adapter": grown("rehearsal"), "notebook": 3, "all": 1}
    assert jobs(snakemake(checkout, "--config", "profile=rehearsal")) == expected


@pytest.mark.slow
@pytest.mark.parametrize("cluster", ["slurm", "kubernetes"])
def test_clusters_plan_the_gpu_profile_through_accelerate(checkout, cluster, monkeypatch):
    pytest.importorskip(f"snakemake_executor_plugin_{cluster}")
    monkeypatch.setenv("LORA_OPCM_CACHE", "/shared/cache")
    done = snakemake(checkout, "-p", "--profile", f"profiles/{cluster}", "--config", "profile=gpu",
                     "accelerate=profiles/accelerate/one.yaml")  # fmt: skip
    assert jobs(done)["adapter"] == grown("gpu")
    assert (
        "accelerate.commands.launch --config_file profiles/accelerate/one.yaml -m lora_opcm.lab.train"
        in done.stdout + done.stderr
    )


@pytest.mark.parametrize("profile", ["quick", "rehearsal"])
def test_only_real_runs_are_published(profile):
    done = subprocess.run(["make", "publish", f"PROFILE={profile}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and f"the {profile} profile is no published run" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "old, new, words",
    [
        ("count: 5", "cuont: 5", "has no parameter cuont"),
        pytest.param("full:", "fulll:", "expected one of quick, fulll", marks=pytest.mark.slow),
    ],
)
def test_misspelt_parameters_and_profiles_are_refused(checkout, old, new, words):
    path = checkout / "book" / "experiments" / "profiles.yaml"
    path.write_text(path.read_text().replace(old, new))
    done = snakemake(checkout, "--config", "profile=full")
    assert done.returncode != 0 and words in done.stdout + done.stderr


def test_every_notebook_belongs_to_a_profile():
    named = {name for profile in PROFILES.values() for name in profile["notebooks"]}
    assert named == {path.stem for path in NOTEBOOKS}


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_no_number_in_the_prose_was_typed(notebook):
    """Results stand in computed cells; Markdown may name settings (α = 0.5, 95 % intervals), not findings."""
    for cell in nbformat.read(notebook, 4).cells:
        if cell.cell_type == "markdown":
            text = re.sub(r"95 %|[=≈] ?0\.\d+|10[01] %|arXiv \S+", "", cell.source)
            assert not re.findall(r"\d+\.\d+|\d+ ?%|\d+(?:\.\d+)? points|\d+ times", text), cell.source[:200]


@pytest.mark.parametrize("table", sorted((ROOT / "data" / "results").glob("*.csv")), ids=lambda p: p.stem)
def test_published_tables_come_from_a_full_run_and_can_be_traced(table):
    rows = pd.read_csv(table)
    assert set(rows.profile) in ({"full"}, {"gpu"}) and rows.version.notna().all()
    if table.stem not in ("card", "cost"):
        assert rows.adapters.notna().all()


@pytest.fixture
def status(monkeypatch, tmp_path):
    """The module that writes the status page and the log, on two runs of one notebook made up here."""
    monkeypatch.syspath_prepend(str(ROOT / "book" / "_ext"))
    import status

    for name, started, profile in (
        ("cost", "2026-01-02T03:04:05+00:00", "full"),
        ("order", "2026-01-03T03:04", "full"),
    ):
        nb = nbformat.v4.new_notebook()
        nb.metadata["papermill"] = {
            "parameters": {"profile": profile, "counts": [2, 8], "results": "_build"},
            "start_time": started, "duration": 41.6,
        }  # fmt: skip
        nbformat.write(nb, tmp_path / f"{name}.ipynb")
    return status


def test_runs_are_recorded_once_and_told_by_date(status, tmp_path):
    records = tmp_path / "runs.csv"
    status.record(tmp_path, records)
    first = records.read_bytes()
    status.record(tmp_path, records)
    assert records.read_bytes() == first
    rows = pd.read_csv(records)
    assert list(rows.experiment) == ["cost", "order"] and list(rows.seconds) == [42, 42]
    assert list(rows.parameters) == ["counts = [2, 8]"] * 2 and rows.machine.str.contains("×").all()
    told = status.log(status.recorded(records))
    assert told.index("### 2026-01-03") < told.index("### 2026-01-02") < told.index("### Before records were kept")
    assert "profile `full`" in told and "42 s on" in told


def test_every_cell_says_where_it_ran_or_that_it_did_not(status, tmp_path):
    status.record(tmp_path, tmp_path / "runs.csv")
    table = status.cells(status.recorded(tmp_path / "runs.csv")).set_index("experiment")
    assert list(table.columns) == list(PROFILES)
    assert {name for name in table.index} == {status.link(path.stem) for path in NOTEBOOKS}
    assert table.full[status.link("cost")].startswith("2026-01-02 03:04 UTC, ")
    assert table.gpu[status.link("classic")] == "not run" and table.full[status.link("classic")] == "–"
    assert table.full[status.link("overlap")] == "date not recorded, machine not recorded"
