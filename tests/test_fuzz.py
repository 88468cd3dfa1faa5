"""Files from the wild, thousands of them, damaged, through the command line: read, or refused in one message."""

import io
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from factories import adapter
from safetensors.torch import save_file

import lora_opcm as lo
from lora_opcm.command.app import main

SHAPES = {"layers.0.q": (12, 8), "layers.0.up": (16, 8)}
VALUES = [
    None, True, -1, 0, 1e309, 2**63, "", "x" * 300, "../../etc/passwd", [], {}, [[]], float("nan"), "1", [1, "a"],
    {"a": -5}, {".*.*.*.*b": 3}, {"(a|a)*b": 1}, {"layers.0.q": 7}, ["layers"], "[/red]",
]  # fmt: skip


def flip(data: bytes, rng: random.Random) -> bytes:
    data = bytearray(data)
    for _ in range(rng.choice([1, 2, 8, 64])):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))] + rng.choice([b"", b"\0" * 16])


def header(data: bytes, rng: random.Random) -> bytes:
    """Another value somewhere in the JSON header, the tensors left alone."""
    size = struct.unpack("<Q", data[:8])[0]
    table = json.loads(data[8 : 8 + size])
    key = rng.choice(sorted(table))
    entry = table[key]
    what = rng.choice(sorted(entry))
    choice = rng.randrange(5)
    if choice == 0:
        entry[what] = rng.choice(VALUES)
    elif choice == 1 and isinstance(entry[what], list):
        entry[what] = [x + rng.choice([-1, 1, 10**6, 2**40]) for x in entry[what]]
    elif choice == 2:
        entry["dtype"] = rng.choice(["F8_E4M3", "I8", "F64", "BOOL", "F16", "NOPE"])
    elif choice == 3:
        table["deep"] = json.loads("[" * 60 + "]" * 60)
    else:
        table[rng.choice(["x", key + ".bias", key.replace("lora_A", "lora_E"), "a." * 1000])] = table.pop(key)
    text = json.dumps(table).encode()
    length = rng.choice([len(text)] * 6 + [0, len(text) + 7, 2**62])
    return struct.pack("<Q", length) + text + data[8 + size :]


def shapes(data: bytes, rng: random.Random) -> bytes:
    """A whole file whose tensors are not what was expected: reshaped, scaled, of another dtype, lost or new."""
    tensors = dict(sorted(load(data).items()))
    key = rng.choice(list(tensors))
    value = tensors.pop(key)
    change = rng.randrange(6)
    if change == 0:
        value = value.reshape(-1, rng.choice([d for d in range(1, value.numel() + 1) if value.numel() % d == 0]))
    elif change == 1:
        value = value.double() * 10.0 ** rng.choice([-300, -30, 4, 30, 150, 300])
    elif change == 2:
        value = value.to(rng.choice([torch.float64, torch.bfloat16, torch.int8, torch.bool, torch.float8_e4m3fn]))
    elif change == 3:
        value = torch.zeros(rng.choice([(0,), (0, 8), (1, 1), (3, 3, 3), ()]))
    elif change == 4:
        value = torch.full_like(value, rng.choice([float("nan"), float("inf"), 0.0]))
    if change < 5:
        tensors[key] = value
    return dump(tensors)


def load(data: bytes) -> dict:
    from safetensors.torch import load

    return load(data)


def dump(tensors: dict) -> bytes:
    from safetensors.torch import save

    return save({k: v.contiguous() for k, v in tensors.items()})


def option(text: str, rng: random.Random) -> str:
    config = json.loads(text)
    new = ["use_dora", "rank_pattern", "alpha_pattern", "use_new_variant", "modules_to_save", "auto_mapping"]
    config[rng.choice([*sorted(config), *new])] = rng.choice(VALUES)
    text = json.dumps(config)
    return text if rng.random() < 0.9 else text[: rng.randrange(len(text))]


def originals(folder: Path) -> dict[str, Path]:
    """Whole adapters of every format, each with a sound partner it merges with."""
    generator = torch.Generator().manual_seed(0)
    for name in ("peft", "peft partner"):
        lo.save_adapter(adapter(SHAPES, 4, generator), folder / name)
    half = adapter(SHAPES, 4, generator, torch.float16)
    for name in ("half", "half partner"):
        lo.save_adapter(half, folder / name)
    for name in ("kohya.safetensors", "kohya partner.safetensors"):
        save_file({
            "lora_unet_mid.lora_up.weight": torch.randn(8, 3).bfloat16(), "lora_unet_mid.alpha": torch.tensor(2.0),
            "lora_unet_mid.lora_down.weight": torch.randn(3, 6).bfloat16(),
            "lora_unet_conv.lora_up.weight": torch.randn(6, 2, 1, 1), "lora_unet_conv.alpha": torch.tensor(1.0),
            "lora_unet_conv.lora_down.weight": torch.randn(2, 2, 3, 3),
        }, folder / name, metadata={"ss_network_dim": "3", "ss_base_model_version": "sd_v1"})  # fmt: skip
    for name in ("products.safetensors", "products partner.safetensors"):
        save_file({
            "lora_unet_a.hada_w1_a": torch.randn(8, 2).half(), "lora_unet_a.hada_w1_b": torch.randn(2, 6).half(),
            "lora_unet_a.hada_w2_a": torch.randn(8, 2).half(), "lora_unet_a.hada_w2_b": torch.randn(2, 6).half(),
            "lora_unet_b.lokr_w1": torch.randn(2, 3), "lora_unet_b.lokr_w2_a": torch.randn(2, 4),
            "lora_unet_b.lokr_w2_b": torch.randn(2, 2), "lora_unet_b.lokr_t2": torch.randn(2, 2, 3, 3),
            "lora_unet_b.alpha": torch.tensor(1.0),
        }, folder / name)  # fmt: skip
    for name in ("diffusers.safetensors", "diffusers partner.safetensors"):
        packed = {"unet.r": 2, "unet.lora_alpha": 6, "unet.alpha_pattern": {"mid.to_q": 3}}
        save_file(
            {"unet.mid.to_q.lora_A.weight": torch.randn(2, 5), "unet.mid.to_q.lora_B.weight": torch.randn(4, 2)},
            folder / name, metadata={"lora_adapter_metadata": json.dumps(packed)},
        )  # fmt: skip
    return {p.name: p for p in folder.iterdir() if "partner" not in p.name}


def command(*words) -> tuple[int, str, str]:
    """The command line in this process: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main([str(word) for word in words])
    except SystemExit as end:
        return int(end.code or 0), out.getvalue(), err.getvalue()
    raise AssertionError("the command did not end by an exit code")


def damage(folder: Path, count: int, seed: int) -> dict[str, int]:
    """Damage adapters `count` times, give each to `inspect` and to `merge`; count what was read and refused."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    (folder / "whole").mkdir()
    whole = originals(folder / "whole")
    work, outcome = folder / "work", {"inspect read": 0, "merge read": 0, "refused": 0}
    hung = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(AssertionError("hangs for a minute")))
    for i in range(count):
        name = rng.choice(sorted(whole))
        folder_like = whole[name].is_dir()
        file = work / name / "adapter_model.safetensors" if folder_like else work / name
        file.parent.mkdir(parents=True)
        data = (whole[name] / file.name if folder_like else whole[name]).read_bytes()
        kind = rng.choice([flip, cut, header, shapes, option] if folder_like else [flip, cut, header, shapes])
        file.write_bytes(data if kind is option else kind(data, rng))
        if folder_like:
            text = (whole[name] / "adapter_config.json").read_text()
            (file.parent / "adapter_config.json").write_text(option(text, rng) if kind is option else text)
        before = sorted(work.rglob("*"))
        partner = whole[name].with_name(name.replace(".", " partner.") if "." in name else f"{name} partner")
        out = work / ("out.safetensors" if "." in name else "out")
        method = rng.choice(["cat", "opcm", "whitened_sum"])
        for words in (
            ["inspect", work / name] + ["--json"] * (i % 4 > 0),
            ["merge", work / name, partner, "-o", out, "--method", method, "--rank", 3],
        ):
            case = f"case {i} of seed {seed}: {kind.__name__} of {name}, {words[0]}"
            signal.alarm(60)
            code, _, err = command(*words)
            signal.alarm(0)
            assert code in (0, 2) and "Traceback" not in err, f"{case}: {code} {err}"
            if code == 2:
                *told, last = err.splitlines()  # what was odd may be said before what is wrong
                assert last.startswith("error: ") and len(err) < 3000, f"{case}: {err}"
                assert all(line.startswith("warning: ") for line in told), f"{case}: {err}"
                assert str(work / name) in last, f"{case}: {err}"
                assert sorted(work.rglob("*")) == before, f"{case}: {sorted(work.rglob('*'))}"
                outcome["refused"] += 1
            else:
                outcome[f"{words[0]} read"] += 1
        if out.exists():
            assert lo.load_adapter(out).norm() >= 0
            left = {p.name for p in work.iterdir()} - {name, out.name, "out.recipe.json"}
            assert not left, f"case {i} of seed {seed}: {left}"
        shutil.rmtree(work)
    signal.signal(signal.SIGALRM, hung)
    return outcome


@pytest.fixture
def unsynced(monkeypatch):
    """Thousands of small files: nobody pulls the plug on them."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.mark.parametrize("count, seed", [(40, 2), *(pytest.param(300, s, marks=pytest.mark.slow) for s in (0, 1))])
def test_damaged_files_are_read_or_refused_by_name(tmp_path, unsynced, count, seed):
    outcome = damage(tmp_path, count, seed)
    assert outcome["refused"] > 2 * count / 3 and outcome["merge read"] > count / 10
    assert sum(outcome.values()) == 2 * count


@pytest.mark.slow
@pytest.mark.parametrize("words", [["inspect"], ["merge", "-o", "out", "sound"], ["add", "state.safetensors"]])
def test_a_real_process_refuses_a_truncated_file_by_name(tmp_path, words):
    generator = torch.Generator().manual_seed(0)
    for name in ("sound", "damaged"):
        lo.save_adapter(adapter(SHAPES, 4, generator), tmp_path / name)
    weights = tmp_path / "damaged" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    before = sorted(p for p in tmp_path.rglob("*"))
    process = [sys.executable, "-c", "from lora_opcm.command.app import main; main()", *words, "damaged"]
    done = subprocess.run(process, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: damaged/adapter_model.safetensors: not a readable safetensors file")
    assert [p for p in sorted(tmp_path.rglob("*")) if not p.name.endswith(".lock")] == before


@pytest.mark.nightly
def test_ten_thousand_damaged_files(tmp_path, unsynced):
    outcome = damage(tmp_path, 10_000, 99)
    assert outcome["refused"] > 8000 and outcome["merge read"] > 1000, outcome
