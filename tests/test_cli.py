"""The command line: what people type, on files as they come."""

import io
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from factories import adapter
from filelock import FileLock
from rich.console import Console
from safetensors.torch import load_file, save_file
from test_fuzz import VALUES, cut, flip, header

import lora_opcm as lo
from lora_opcm.command import recipe
from lora_opcm.command.app import main
from lora_opcm.command.console import Steps
from lora_opcm.command.recipe import distance

SHAPES = {f"layers.{i}.{name}": shape for i in range(2) for name, shape in (("q", (24, 16)), ("up", (32, 16)))}


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


def test_parts_join_to_the_bytes_of_one_merge(folder):
    options = ("--method", "opcm", "--rank", 3)
    run(folder, "merge", "a", "b", "c", "-o", "whole", *options)
    for i in range(2):
        run(folder, "merge", "a", "b", "c", "-o", f"part{i}", "--shard", f"{i}/2", *options)
    assert "missing: [1]" in run(folder, "join", "part0", "-o", "joined", code=2).stderr
    assert not (folder / "joined").exists()
    run(folder, "join", "part1", "part0", "-o", "joined")
    name = "adapter_model.safetensors"
    assert (folder / "joined" / name).read_bytes() == (folder / "whole" / name).read_bytes()
    run(folder, "verify", "a", "b", "c", "--against", "joined")
    before = (folder / "part0").read_bytes()
    for again in (("--dry-run",), ("--dtype", "float16", "--overwrite"), ()):
        code = 1 if again == ("--dry-run",) else 2
        run(folder, "merge", "a", "b", "-o", "part0", "--shard", "0/2", *again, code=code)
        assert (folder / "part0").read_bytes() == before
    for wrong in ("2/2", "1", "-1/2", "a/b"):
        assert wrong in run(folder, "merge", "a", "b", "-o", "x", "--shard", wrong, code=2).stderr


@pytest.mark.slow
def test_processes_write_what_one_writes(folder):
    options = ("--method", "tsv", "--rank", 3, "--dtype", "float16")
    run(folder, "merge", "a", "b", "c", "-o", "one", *options)
    run(folder, "merge", "a", "b", "c", "-o", "two", "--processes", 2, *options)
    for one in (folder / "one").iterdir():
        assert one.read_bytes() == (folder / "two" / one.name).read_bytes(), one.name
    base = lo.load_adapter(folder / "a")
    for name in ("one", "two"):  # two spellings of one layer are told of once, whoever reads them
        spelled = {f"{ {'one': 'model.', 'two': 'model.language_model.'}[name] }{k}": u for k, u in base.items()}
        lo.save_adapter(replace(base, modules=spelled, kinds={}), folder / f"spelled-{name}")
    said = run(folder, "merge", "spelled-one", "spelled-two", "-o", "y", "--processes", 2).stderr
    assert said.count("under the names of") == 1
    for other in (("--shard", "0/2"), ("--device", "cpu")):
        said = run(folder, "merge", "a", "b", "-o", "x", "--processes", 2, *other, code=2).stderr
        assert "leave out --shard and --device" in said
    assert run(folder, "merge", "a", "b", "-o", "x", "--processes", 0, code=2)


def test_dry_run_says_what_it_would_take(folder):
    said = run(folder, "merge", "a", "b", "-o", "new", "--rank", 3, "--dry-run").stdout
    assert "summed rank up to 8, cut to 3" in said and re.search(
        r"would read \S+ MB, hold \S+ MB of tensors, write \S+ MB", said
    )
    assert not (folder / "new").exists()


def test_inspect_names_what_is_odd(folder):
    a = lo.load_adapter(folder / "a")
    modules = dict(a.modules)
    name = next(iter(modules))
    modules[name] = lo.LowRank(modules[name].left * 0, modules[name].right)
    lo.save_adapter(a.with_modules(modules), folder / "odd")
    assert f"{name} is zero" in run(folder, "inspect", "odd").stdout


def test_compare_by_module_and_with_two_numbers_of_directions(folder):
    rows = json.loads(run(folder, "compare", "a", "b", "--k", 2, "--l", 3, "--modules", "--json").stdout)
    table = lo.similarity(lo.load_adapter(folder / "a"), lo.load_adapter(folder / "b"), k=2, l=3)
    assert [row["module"] for row in rows] == list(table.index)
    assert [row["φ outputs"] for row in rows] == pytest.approx(list(table.phi_left))
    assert (
        "2 directions of the first and 3 of the second" in run(folder, "compare", "a", "b", "--k", 2, "--l", 3).stdout
    )


def test_compare_of_fresh_adapters_has_no_directions_to_compare(folder):
    for name in ("y", "z"):
        a = lo.load_adapter(folder / "a")
        lo.save_adapter(a.with_modules({n: 0.0 * u for n, u in a.modules.items()}), folder / name)
    (row,) = json.loads(run(folder, "compare", "y", "z", "--json").stdout)
    assert row["φ outputs"] is None and row["modules"] == len(SHAPES)
    assert "y and z: no module" in run(folder, "compare", "y", "z", "--html", "r.html", code=2).stderr
    assert not (folder / "r.html").exists()


def test_compare_and_its_report(folder):
    rows = json.loads(run(folder, "compare", "a", "b", "c", "--k", 2, "--json", "--html", "report.html").stdout)
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
    assert "no adapter given has the id of b" in run(folder, "verify", "a", "c", "--against", "m", code=2).stderr
    lo.save_adapter(lo.load_adapter(folder / "a"), folder / "m", overwrite=True)
    run(folder, "verify", "a", "b", "--against", "m", code=1)


@pytest.fixture
def clip(folder):
    """Two PEFT adapters p, q of a text encoder that kohya has names for."""
    names = {f"text_model.encoder.layers.{i}.mlp.fc1": (24, 16) for i in range(2)}
    generator = torch.Generator().manual_seed(1)
    config = {"auto_mapping": {"base_model_class": "CLIPTextModel"}, "peft_type": "LORA"}
    for name in "pq":
        lo.save_adapter(replace(adapter(names, 4, generator), config=config), folder / name)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("output", ["m", "k.safetensors", "d.safetensors"])
def test_every_output_is_verified_by_its_recipe(clip, output, dtype):
    format = {"m": "peft", "k": "kohya", "d": "diffusers"}[output[0]]
    run(clip, "merge", "p", "q", "-o", output, "--format", format, "--dtype", dtype, "--rank", 3)
    found = json.loads(run(clip, "verify", "q", "p", "--against", output, "--json").stdout)
    assert found["same"] and found["unchanged"] and found["distance"] <= found["tolerance"]
    assert found["output_sha256"] == recipe.bytes_hash(clip / output)
    # Rounded on its own it is still within the tolerance; an update that differs by ten times that is not.
    stored = lo.load_adapter(clip / output)
    for factor, code in ((1 + found["tolerance"] / 2, 3), (1 + 10 * found["tolerance"], 1)):
        modules = {n: u.to(torch.float32) * factor for n, u in stored.modules.items()}
        changed = replace(stored, dtype=torch.float32).with_modules(modules)
        lo.save_adapter(changed, clip / ("changed" + output[1:]), overwrite=True, dtype=torch.float32)
        beside = recipe.recipe_of(clip / output)
        words = [
            "verify",
            "p",
            "q",
            "--against",
            "changed" + output[1:],
            "--recipe",
            beside,
            "--tolerance",
            found["tolerance"],
        ]
        assert "unchanged since the merge: False" in run(clip, *words, code=code).stdout


def test_a_recipe_is_found_from_the_weight_file_too(folder):
    run(folder, "merge", "a", "b", "-o", "m")
    assert "True" in run(folder, "verify", "a", "b", "--against", "m/adapter_model.safetensors").stdout
    run(folder, "verify", "a", "b", "--against", "m", "--recipe", "m/merge_recipe.json")
    run(folder, "verify", "a", "b", "--against", "m", "--recipe", "m")
    (folder / "m" / "merge_recipe.json").write_text('{"recipe": 1, "inputs": 3}')
    assert "expected a merge recipe" in run(folder, "verify", "a", "--against", "m", code=2).stderr


def test_a_wider_output_is_not_rounded_to_the_inputs(folder):
    half = lo.load_adapter(folder / "a")
    lo.save_adapter(half, folder / "half", dtype=torch.float16)
    run(
        folder,
        "merge",
        "half",
        "half",
        "-o",
        "m",
        "--method",
        "cat",
        "--dtype",
        "float32",
        "--weights",
        "0.3,0.7",
    )
    assert gap(lo.load_adapter(folder / "m"), lo.load_adapter(folder / "half")) < 1e-6


def test_there_and_back_through_every_format(clip):
    run(clip, "convert", "p", "-o", "k.safetensors", "--to", "kohya")
    run(clip, "convert", "p", "-o", "d.safetensors", "--to", "diffusers")
    run(clip, "convert", "k.safetensors", "-o", "back", "--to", "peft", "--like", "q")
    run(
        clip,
        "convert",
        "k.safetensors",
        "-o",
        "k d.safetensors",
        "--to",
        "diffusers",
        "--like",
        "d.safetensors",
    )
    assert gap(lo.load_adapter(clip / "back"), lo.load_adapter(clip / "p")) == 0
    assert gap(lo.load_adapter(clip / "k d.safetensors"), lo.load_adapter(clip / "d.safetensors")) == 0
    assert "convert --like" in run(clip, "convert", "k.safetensors", "-o", "no", "--to", "peft", code=2).stderr
    whole = lo.load_adapter(clip / "p")
    lo.save_adapter(whole.with_modules(dict(list(whole.modules.items())[:1])), clip / "part")
    words = ["convert", "k.safetensors", "-o", "no", "--to", "peft", "--like", "part"]
    assert "has no such module" in run(clip, *words, code=2).stderr
    assert "names for" in run(clip, "convert", "a", "-o", "no.safetensors", "--to", "kohya", code=2).stderr


def test_nothing_that_is_there_is_replaced_unasked(folder):
    (folder / "mine").mkdir()
    (folder / "mine" / "README.md").write_text("my notes")
    (folder / "m.recipe.json").write_text("my notes")
    (folder / "file").write_text("my notes")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    for words in (
        ["merge", "a", "b", "-o", "mine"], ["merge", "a", "b", "-o", "m.safetensors"],
        ["merge", "a", "b", "-o", "file"],
        ["export", "s.safetensors", "-o", "a"], ["convert", "a", "-o", "b", "--to", "peft"],
        ["align", "a", "--to", "b", "-o", "c"],
        ["compare", "a", "b", "--html", "file"],
    ):  # fmt: skip
        assert "exists already" in run(folder, *words, code=2).stderr
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


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
        (
            ["merge", "a", "b", "-o", "m", "--option", "method=ties"],
            "opcm has no option 'method'; it takes alpha, variant",
        ),
        (["merge", "a", "b", "-o", "m", "--option", "progress=1"], "no option 'progress'"),
        (["merge", "a", "b", "-o", "m", "--option", "dropped=1"], "no option 'dropped'"),
        (["merge", "a", "b", "-o", "m", "--dry-run", "--option", "nonsense=1"], "no option 'nonsense'"),
        (["merge", "a", "b", "-o", "m", "--dry-run", "--weights", "1,2,3"], "expected 2 weights"),
        (["merge", "a", "b", "-o", "m", "--dry-run", "--option", "scale=x"], "scale must be"),
        (["merge", "a", "b", "-o", "k", "--format", "kohya"], "k: a kohya adapter is one file"),
        (["merge", "a", "b", "-o", "a/adapter_config.json", "--overwrite"], "a PEFT adapter is a folder"),
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


def test_a_whitened_sum_whitens_the_side_it_is_told(folder):
    run(folder, "add", "s.safetensors", "a", "b", "--method", "whitened_sum", "--sides", "left")
    run(folder, "export", "s.safetensors", "-o", "m")
    expected = lo.merge([lo.load_adapter(folder / n) for n in "ab"], "whitened_sum", sides="left")
    assert gap(lo.load_adapter(folder / "m"), expected) < 1e-6
    refused = run(folder, "add", "s.safetensors", "c", "--sides", "both", code=2).stderr
    assert "sides" in refused and "left" in refused


def test_what_a_removed_adapter_was_in_is_not_told_of_any_more(folder):
    names = ("a", "b", "c", "d")
    shutil.copytree(folder / "a", folder / "d")
    file = folder / "d" / "adapter_model.safetensors"
    save_file({k: x * 2 + 1 for k, x in load_file(file).items()}, file)
    first, *told = json.loads(run(folder, "add", "s", *names, "--method", "whitened_sum", "--json").stdout)
    rows = json.loads(run(folder, "remove", "s", "b", "--json").stdout)
    assert rows[0] == first and "rank" not in rows[1]
    assert 0 < rows[2]["rank"] < told[-1]["rank"]
    assert "rank" in run(folder, "remove", "s", "d").stdout


def test_a_method_that_needs_data_says_where_it_takes_it(folder):
    for command in ("merge", "tune"):
        told = run(folder, command, "a", "b", "-o", "m", "--method", "regmean", code=2).stderr
        assert "regmean needs Gram matrices" in told and "lora_opcm.merge takes them" in told
        assert not (folder / "m").exists()


def test_a_whitened_sum_forgets_exactly(folder):
    run(folder, "add", "s.safetensors", "a", "b", "--method", "whitened_sum", "--power", 0)
    run(folder, "add", "s.safetensors", "c")
    shutil.copytree(folder / "b", folder / "copy of b")
    rows = json.loads(run(folder, "remove", "s.safetensors", "copy of b", "--json").stdout)
    assert [row["name"] for row in rows] == ["a", "c"]
    never = json.loads(run(folder, "add", "n", "a", "c", "--method", "whitened_sum", "--power", 0, "--json").stdout)
    assert [row["rank"] for row in rows] == [row["rank"] for row in never] and rows[-1]["rank"] > rows[0]["rank"]
    run(folder, "export", "s.safetensors", "-o", "m", "--dtype", "float64")
    expected = lo.merge([lo.load_adapter(folder / n) for n in "ac"], "whitened_sum", power=0)
    assert gap(lo.load_adapter(folder / "m"), expected) < 1e-6
    assert "not those of an adapter in the state (a, c)" in run(folder, "remove", "s.safetensors", "b", code=2).stderr
    run(folder, "add", "capped.safetensors", "a", "b", "--method", "whitened_sum", "--cap", 3)
    assert "cap of 3" in run(folder, "remove", "capped.safetensors", "a", code=2).stderr


def test_a_state_keeps_what_it_was_made_with(folder):
    run(folder, "add", "s.safetensors", "a", "--alpha", 0.3, "--cap", 6)
    run(folder, "add", "s.safetensors", "b", "--alpha", 0.3, "--cap", 6, "--method", "opcm")
    whole = (folder / "s.safetensors").read_bytes()
    for words, message in (
        (["--alpha", 0.4], "--alpha 0.4: the state was made with 0.3"),
        (["--cap", 7], "--cap 7: the state was made with 6"),
        (["--method", "whitened_sum"], "--method whitened_sum: the state was made with opcm"),
        (["--power", 0.5], "--power 0.5: the state was made with no such option"),
    ):
        assert message in run(folder, "add", "s.safetensors", "c", *words, code=2).stderr
    assert (folder / "s.safetensors").read_bytes() == whole
    assert (
        "--alpha is no option" in run(folder, "add", "t", "a", "--method", "whitened_sum", "--alpha", 1, code=2).stderr
    )
    assert "no folder" in run(folder, "add", "nowhere/s.safetensors", "a", code=2).stderr


@pytest.mark.parametrize(
    "kind, count", [("opcm", 40), *(pytest.param(k, 300, marks=pytest.mark.slow) for k in ("opcm", "whitened_sum"))]
)
def test_damaged_states_are_refused_by_name(folder, kind, count):
    run(folder, "add", "s.safetensors", "a", "b", "--method", kind)
    data, rng = (folder / "s.safetensors").read_bytes(), random.Random(0)
    damaged, refused = folder / "damaged.safetensors", 0
    for i in range(count):
        damaged.write_bytes(rng.choice([flip, cut, header, state_header])(data, rng))
        out = f"out{i}"
        try:
            done = run(folder, "export", "damaged.safetensors", "-o", out)
            assert lo.load_adapter(folder / out).norm() >= 0 and "Traceback" not in done.stderr
        except AssertionError:
            done = run(folder, "export", "damaged.safetensors", "-o", out, code=2)
            assert "damaged.safetensors" in done.stderr and done.stderr.count("\n") == 1
            assert not [p for p in folder.iterdir() if p.name.startswith((out, ".out"))]
            refused += 1
    assert refused > count / 3


def state_header(data, rng):
    """Another value somewhere in the JSON that a state keeps in its header."""
    size = struct.unpack("<Q", data[:8])[0]
    table = json.loads(data[8 : 8 + size])
    kept = json.loads(table["__metadata__"]["lora_opcm_state"])
    part = rng.choice(sorted(kept))
    if isinstance(kept[part], dict) and rng.random() < 0.8:
        kept[part][rng.choice(sorted(kept[part]))] = rng.choice(VALUES)
    else:
        kept[part] = rng.choice(VALUES)
    table["__metadata__"]["lora_opcm_state"] = json.dumps(kept)
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


@pytest.mark.slow
def test_progress_is_for_terminals_and_for_what_takes_long(folder, monkeypatch):
    assert run(folder, "inspect", "a").stderr == ""
    shown = io.StringIO()
    monkeypatch.setattr("lora_opcm.command.console.err", Console(file=shown, force_terminal=True, width=100))
    with Steps() as steps:
        assert list(steps("short", range(3))) == [0, 1, 2]
    assert shown.getvalue() == ""
    with Steps() as steps:
        for _ in steps.of("reading")(iter(range(3)), total=3):
            time.sleep(0.6)
    assert "reading" in shown.getvalue() and "2/3" in shown.getvalue()


@pytest.mark.slow
def test_who_waits_for_a_state_is_told(folder):
    run(folder, "add", "s.safetensors", "a")
    with FileLock(folder / ".s.safetensors.lock", thread_local=False) as lock:
        threading.Timer(2, lock.release).start()
        assert "in use by another process" in run(folder, "add", "s.safetensors", "b").stderr
    assert lo.ContinualMerger.load(folder / "s.safetensors").state.names == ["a", "b"]


@pytest.mark.slow
def test_two_processes_that_add_lose_nothing(folder):
    command = [sys.executable, "-c", "from lora_opcm.command.app import main; main()", "add", "s.safetensors"]
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
        return len(merger.state.names)

    first = run(folder, *words) and (members() if "add" in name else lo.load_adapter(folder / target).norm())
    began = time.monotonic()
    assert ended(start(folder, *words)) == 0
    whole = time.monotonic() - began  # about as long as the command takes; what is found on the way corrects it
    first += "add" in name
    killed = 0
    for _ in range(200):
        child = start(folder, *words)
        time.sleep(rng.random() * whole)
        os.kill(child, signal.SIGKILL)
        status = ended(child)
        assert status in (0, -signal.SIGKILL)
        whole *= 1.02 if status else 0.9
        killed += status != 0
        if "add" in name:
            now = members()
            assert now - first in ((0, 1) if status else (1,))
            first = now
        else:
            assert lo.load_adapter(folder / target).norm() == pytest.approx(first, rel=1e-5)
        if killed == 50:
            break
    assert killed == 50
    run(folder, *words)  # and no lock or leftover stops the next one


@pytest.mark.parametrize("stop, code", [(signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_interrupted_it_cleans_up(folder, stop, code, monkeypatch):
    """A signal in the middle of the work: the temporary files go, the old output stays, the exit code says so."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs behind it deaf to it
    run(folder, "merge", "a", "b", "-o", "m")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    write = recipe.write_text

    def interrupted(path, text):
        write(path, text)
        signal.raise_signal(stop)

    monkeypatch.setattr("lora_opcm.command.recipe.write_text", interrupted)
    for output in ("m", "new"):
        done = run(folder, "merge", "a", "c", "-o", output, "--overwrite", code=code)
        assert "nothing is half written" in done.stderr
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


@pytest.mark.parametrize("output", [".", "./", "../here"])
def test_a_merge_is_written_into_the_folder_one_is_in(folder, output):
    here = folder / "here"
    here.mkdir()
    run(here, "merge", "../a", "../b", "-o", output, "--method", "cat")
    run(here, "merge", "../a", "../b", "-o", output, "--method", "tsv", "--overwrite")
    assert {p.name for p in here.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "merge_recipe.json"
    }  # fmt: skip
    assert gap(lo.load_adapter(here), lo.merge(*(lo.load_adapter(folder / n) for n in "ab"), method="tsv")) < 1e-6
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


def test_what_a_state_took_in_before_an_error_is_said(folder):
    (folder / "bad").mkdir()
    said = run(folder, "add", "s", "a", "b", "bad", "c", code=2).stderr
    assert "in s already, not to be added again: a, b" in said
    assert [row["name"] for row in json.loads(run(folder, "add", "s", "c", "--json").stdout)] == ["a", "b", "c"]
    assert "already" not in run(folder, "add", "t", "bad", "a", code=2).stderr


def test_an_option_said_twice_is_refused(folder):
    refused = run(folder, "merge", "a", "b", "-o", "m", "--option", "scale=3", "--scale", 1, code=2).stderr
    assert "--option scale=… and --scale: expected one of them" in refused and not (folder / "m").exists()


def test_what_has_no_cosine_is_null_in_json(folder):
    zero = lo.load_adapter(folder / "a")
    lo.save_adapter(0.0 * zero, folder / "zero")
    text = run(folder, "compare", "a", "zero", "--json").stdout
    assert "null" in text

    def refuse(word):
        raise AssertionError(word)

    json.loads(text, parse_constant=refuse)


def test_a_merge_that_is_zero_is_another_one(folder):
    run(folder, "merge", "a", "a", "-o", "m", "--method", "cat", "--weights", "0,0")
    stored = lo.load_adapter(folder / "m")
    shutil.copytree(folder / "m", folder / "n")
    like = lo.load_adapter(folder / "a")
    lo.save_adapter(replace(stored, modules=dict(like.items())), folder / "n", overwrite=True)
    assert "another" in run(folder, "verify", "a", "a", "--against", "n", code=1).stdout
