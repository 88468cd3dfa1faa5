"""Files from the wild, thousands of them, damaged: each is read or refused in one clear message."""

import json
import random
import struct

import pytest
import torch
from factories import adapter

import lora_opcm as lo

SHAPES = {"layers.0.q": (12, 8), "layers.0.up": (16, 8)}
VALUES = [
    None,
    True,
    -1,
    0,
    1e309,
    2**63,
    "",
    "x" * 300,
    "../../etc/passwd",
    [],
    {},
    [[]],
    float("nan"),
    "1",
    [1, "a"],
    {"a": -5},
]


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
    choice = rng.randrange(4)
    if choice == 0:
        entry[what] = rng.choice(VALUES)
    elif choice == 1 and what != "dtype" and isinstance(entry[what], list):
        entry[what] = [x + rng.choice([-1, 1, 10**6, 2**40]) for x in entry[what]]
    elif choice == 2:
        entry["dtype"] = rng.choice(["F8_E4M3", "I8", "F64", "BOOL", "F16", "NOPE"])
    else:
        table[rng.choice(["x", key + ".bias", key.replace("lora_A", "lora_E"), "a" * 1000])] = table.pop(key)
    text = json.dumps(table).encode()
    length = rng.choice([len(text)] * 6 + [0, len(text) + 7, 2**62])
    return struct.pack("<Q", length) + text + data[8 + size :]


def option(config: dict, rng: random.Random) -> str:
    config = json.loads(json.dumps(config))
    config[rng.choice([*sorted(config), "use_dora", "rank_pattern", "alpha_pattern", "use_new_variant"])] = (
        rng.choice(VALUES)
    )
    text = json.dumps(config)
    return text if rng.random() < 0.9 else text[: rng.randrange(len(text))]


def damage(folder, count, seed):
    """Damage one adapter `count` times; count what was read and what was refused."""
    rng = random.Random(seed)
    good = lo.load_adapter(
        lo.save_adapter(adapter(SHAPES, 4, torch.Generator().manual_seed(0)), folder / "good")
    )
    target = folder / "damaged"
    target.mkdir()
    data = (folder / "good" / "adapter_model.safetensors").read_bytes()
    config = json.loads((folder / "good" / "adapter_config.json").read_text())
    outcome = {"read": 0, "refused": 0}
    for i in range(count):
        kind = rng.choice([flip, cut, header, option])
        (target / "adapter_model.safetensors").write_bytes(data if kind is option else kind(data, rng))
        (target / "adapter_config.json").write_text(
            option(config, rng) if kind is option else json.dumps(config)
        )
        try:
            lo.merge([lo.load_adapter(target), good], "cat", rank=4)
            outcome["read"] += 1
        except ValueError as error:  # AdapterError is one
            assert str(target) in str(error) and len(str(error)) < 2000, f"case {i} of seed {seed}: {error!r}"
            outcome["refused"] += 1
    return outcome


@pytest.mark.parametrize("seed", range(2))
def test_damaged_files_are_read_or_refused_by_name(tmp_path, seed):
    outcome = damage(tmp_path, 500, seed)
    assert outcome["refused"] > 200 and sum(outcome.values()) == 500


@pytest.mark.slow
def test_ten_thousand_damaged_files(tmp_path):
    outcome = damage(tmp_path, 10_000, 99)
    assert outcome["refused"] > 4000, outcome
