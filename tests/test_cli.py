"""The command line: what people type, on files as they come."""

import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace

import pytest
import torch
from factories import adapter

import lora_opcm as lo
import lora_opcm.recipe
from lora_opcm.cli import main
from lora_opcm.recipe import distance

SHAPES = {
    f"layers.{i}.{name}": shape for i in range(2) for name, shape in (("q", (24, 16)), ("up", (32, 16)))
}


@pytest.fixture
def folder(tmp_path):
    """Three adapters in PEFT folders a, b, c."""
    generator = torch.Generator().manual_seed(0)
    for name in "abc":
        lo.save_adapter(adapter(SHAPES, 4, generator), tmp_path / name)
    return tmp_path


def gap(a, b):
    return distance(a, b)[0]


def run(folder, *words, code=0):
    """The command in this process, as `main` ends it."""
    out, err, before = io.StringIO(), io.StringIO(), os.getcwd()
    os.chdir(folder)
    try:
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as end:
            main([str(word) for word in words])
    finally:
        os.chdir(before)
    assert (end.value.code or 0) == code, out.getvalue() + err.getvalue()
    return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())


def test_inspect_says_what_is_there(folder):
    found = json.loads(run(folder, "inspect", "a", "--json").stdout)
    assert found["modules"] == 4 and found["format"] == "peft" and found["odd"] == []
    assert {row["rank"] for row in found["table"]} == {4}
    assert "layers.1.up" in run(folder, "inspect", "a").stdout


def test_inspect_names_what_is_odd(folder):
    a = lo.load_adapter(folder / "a")
    modules = dict(a.modules)
    name = next(iter(modules))
    modules[name] = lo.LowRank(modules[name].left * 0, modules[name].right)
    lo.save_adapter(a.with_modules(modules), folder / "odd")
    assert f"{name} is zero" in run(folder, "inspect", "odd").stdout


def test_compare_and_its_report(folder):
    rows = json.loads(
        run(folder, "compare", "a", "b", "c", "--k", 2, "--json", "--html", "report.html").stdout
    )
    assert [row["pair"] for row in rows] == ["a + b", "a + c", "b + c"]
    page = (folder / "report.html").read_text()
    assert page.count("Plotly.newPlot") == 2 and "In words" in page
    assert 'src="http' not in page and "cdn.plot" not in page.split("</script>")[-1]


@pytest.mark.parametrize("method", ["opcm", "cat", "ties", "whitened_sum"])
def test_merge_is_the_library_and_can_be_verified(folder, method):
    run(folder, "merge", "a", "b", "-o", "m", "--method", method, "--rank", 6)
    expected = lo.merge([lo.load_adapter(folder / n) for n in "ab"], method, rank=6)
    assert gap(lo.load_adapter(folder / "m"), expected) < 1e-6
    recipe = json.loads((folder / "m" / "merge_recipe.json").read_text())
    assert [i["name"] for i in recipe["inputs"]] == ["a", "b"] and recipe["merge"]["rank"] == 6
    assert (folder / "m" / "README.md").read_text().startswith("---\nlibrary_name: peft")
    run(folder, "verify", "b", "a", "--against", "m")
    assert (
        "no file given has the hash of b" in run(folder, "verify", "a", "c", "--against", "m", code=2).stderr
    )
    lo.save_adapter(lo.load_adapter(folder / "a"), folder / "m", overwrite=True)
    run(folder, "verify", "a", "b", "--against", "m", code=1)


def test_weights_and_options_reach_the_method(folder):
    run(folder, "merge", "a", "b", "-o", "m", "--method", "cat", "--weights", "0.7,-0.4")
    a, b = (lo.load_adapter(folder / n) for n in "ab")
    assert gap(lo.load_adapter(folder / "m"), lo.merge([a, b], "cat", weights=[0.7, -0.4])) < 1e-6
    run(folder, "merge", "a", "b", "-o", "w", "--method", "whitened_sum", "--option", "power=1")
    assert gap(lo.load_adapter(folder / "w"), lo.merge([a, b], "whitened_sum", power=1)) < 1e-6


@pytest.mark.parametrize(
    "words, message",
    [
        (["merge", "a", "missing", "-o", "m"], "missing"),
        (["merge", "a", "b", "-o", "m", "--method", "cat", "--weights", "1"], "expected 2 weights"),
        (["merge", "a", "b", "-o", "m", "--weights", "x,y"], "expected numbers"),
        (["merge", "a", "b", "-o", "m", "--option", "power"], "expected name=value"),
        (["merge", "a", "b", "-o", "m", "--method", "tsv", "--alpha", "0.5"], "tsv has no option"),
        (["merge", "a", "b", "-o", "c"], "exists already"),
        (["compare", "a"], "expected two adapters"),
        (["verify", "a", "--against", "b"], "expected a merge recipe"),
        (["export", "a/adapter_model.safetensors", "-o", "x"], "expected a state"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(folder, words, message):
    before = sorted(p.name for p in folder.iterdir())
    done = run(folder, *words, code=2)
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert sorted(p.name for p in folder.iterdir()) == before


def test_dry_run_writes_nothing(folder):
    assert "would merge 2 adapters" in run(folder, "merge", "a", "b", "-o", "m", "--dry-run").stdout
    assert not (folder / "m").exists()
    run(folder, "merge", "a", "b", "-o", "c", "--dry-run", code=1)


def test_a_merge_across_days_is_the_merge_of_all(folder):
    run(folder, "add", "s.safetensors", "a", "b", "--alpha", 0.3)
    run(folder, "add", "s.safetensors", "c")
    run(folder, "export", "s.safetensors", "-o", "m")
    expected = lo.merge([lo.load_adapter(folder / n) for n in "abc"], "opcm", alpha=0.3)
    assert gap(lo.load_adapter(folder / "m"), expected) < 1e-5
    assert "cannot remove a" in run(folder, "remove", "s.safetensors", "a", code=2).stderr


def test_two_processes_that_add_lose_nothing(folder):
    command = [sys.executable, "-c", "from lora_opcm.cli import main; main()", "add", "s.safetensors"]
    running = [subprocess.Popen([*command, name], cwd=folder, stdout=subprocess.DEVNULL) for name in "abc"]
    assert [p.wait() for p in running] == [0, 0, 0]
    assert sorted(lo.ContinualMerger.load(folder / "s.safetensors").state.names) == ["a", "b", "c"]


def start(folder, *words, limit=None):
    """The command in a child of this process, which has imported everything: its process id."""
    child = os.fork()
    if not child:
        try:
            os.chdir(folder)
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            torch.set_num_threads(1)
            if limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            main([str(word) for word in words])
        except SystemExit as end:
            os._exit(int(end.code or 0))
        finally:
            os._exit(99)
    return child


def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["merge", "merge kohya", "add", "add sums"])
def test_killed_at_any_moment_the_last_output_and_state_stay_whole(folder, name, tmp_path):
    """50 kills each, at random moments of a command that replaces what is there: the old or the new, never less."""
    rng = random.Random(name)
    torch.manual_seed(0)
    shapes = {f"layers.{i}.q": (256, 128) for i in range(12)}
    generator = torch.Generator().manual_seed(0)
    for path in "ab":
        lo.save_adapter(adapter(shapes, 8, generator), folder / "large" / path)
    ab = ["large/a", "large/b"]
    for i, path in enumerate(ab):
        one = lo.load_adapter(folder / path)
        modules = {f"lora_unet_{n.replace('.', '_')}": u for n, u in one.modules.items()}
        lo.save_adapter(lo.Adapter(modules, format="kohya"), folder / f"{'ab'[i]}.safetensors")
    words = {
        "merge": ["merge", *ab, "-o", "m", "--overwrite"],
        "merge kohya": ["merge", "a.safetensors", "b.safetensors", "-o", "m.safetensors", "--overwrite"],
        "add": ["add", "s.safetensors", "large/b", "--cap", 16],
        "add sums": ["add", "s.safetensors", "large/b", "--cap", 16, "--method", "whitened_sum"],
    }[name]
    kind = lo.SumMerger if name == "add sums" else lo.ContinualMerger
    target = words[words.index("-o") + 1] if "-o" in words else words[1]

    def members():
        merger = kind.load(folder / target)
        assert torch.isfinite(torch.tensor(merger.adapter().norm()))
        return len(merger.members if kind is lo.SumMerger else merger.state.names)

    first = run(folder, *words) and (members() if "add" in name else lo.load_adapter(folder / target).norm())
    began = time.monotonic()
    assert ended(start(folder, *words)) == 0
    whole = time.monotonic() - began
    first += "add" in name
    killed, done = 0, 0
    for _ in range(50):
        child = start(folder, *words)
        time.sleep(rng.random() * 1.1 * whole)
        os.kill(child, signal.SIGKILL)
        status = ended(child)
        killed, done = killed + (status == -signal.SIGKILL), done + (status == 0)
        if "add" in name:
            now = members()
            assert now - first in ((0, 1) if status else (1,))
            first = now
        else:
            assert lo.load_adapter(folder / target).norm() == pytest.approx(first, rel=1e-5)
    assert killed > 20 and killed + done == 50
    run(folder, *words)  # and no lock or leftover stops the next one


@pytest.mark.parametrize("stop, code", [(signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_interrupted_it_cleans_up(folder, stop, code, monkeypatch):
    """A signal in the middle of the work: the temporary files go, the old output stays, the exit code says so."""
    run(folder, "merge", "a", "b", "-o", "m")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    write = lo.recipe.write_text

    def interrupted(path, text):
        write(path, text)
        signal.raise_signal(stop)

    monkeypatch.setattr("lora_opcm.recipe.write_text", interrupted)
    for output in ("m", "new"):
        done = run(folder, "merge", "a", "c", "-o", output, "--overwrite", code=code)
        assert "unchanged" in done.stderr
        assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("limit", [100, 3000])
def test_a_full_disk_leaves_what_was_there(folder, limit):
    run(folder, "merge", "a", "b", "-o", "m")
    run(folder, "add", "s.safetensors", "a")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    for words in (
        ["merge", "a", "b", "-o", "m", "--overwrite"], ["merge", "a", "b", "-o", "new"], ["add", "s.safetensors", "b"],
        ["compare", "a", "b", "--html", "report.html"],
    ):  # fmt: skip
        assert ended(start(folder, *words, limit=limit)) == 2
        assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_align_changes_factors_and_not_the_update(folder):
    run(folder, "align", "a", "--to", "b", "-o", "aligned")
    a, aligned, b = (lo.load_adapter(folder / n) for n in ("a", "aligned", "b"))
    assert gap(aligned, a) < 1e-6
    far = lambda x: sum(float((x.modules[n].left - b.modules[n].balanced().left).norm()) for n in SHAPES)  # noqa: E731
    assert far(aligned) < far(a)
