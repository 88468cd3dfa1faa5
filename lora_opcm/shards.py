"""Merging by shards of modules, in processes or on machines that share nothing, to the bytes of one process.

    merge_shard(["a", "b"], "part0.safetensors", (0, 3), "opcm", rank=16)     three times, anywhere
    adapter, call, dropped = join(["part0.safetensors", "part1.safetensors", "part2.safetensors"])

A merge treats its modules one by one, with random masks seeded by their names; all that ties them together is one
factor of the whole adapter (`Part.finish`). So a process reads the tensors of its own modules only, and writes
what it merged before that factor, with the squared norms the factor is made of; `join` adds those up exactly
rounded. The same bytes need the same numerics: one version of torch, one kind of CPU.
"""

import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .adapters import Adapter, AdapterError, Kind, load_adapter
from .lowrank import LowRank
from .methods import Part, merge_part
from .writing import replace_file, write_safetensors

KEY = "lora_opcm_shard"
METADATA = ("base_model", "format", "config", "metadata", "source")  # of an Adapter, as they are


def belongs(name: str, shard: tuple[int, int]) -> bool:
    """Whether a module is of shard (index, count): by a hash of its name, which needs nobody else's list."""
    return zlib.crc32(name.encode()) % shard[1] == shard[0]


def merge_shard(
    inputs: Sequence[str | Path], output: str | Path, shard: tuple[int, int], method: str = "opcm", **call
) -> Path:
    """Merge the modules of one shard, (index, count) with 0 ≤ index < count; `call` is as for `merge`.

    Writes one .safetensors file, under a temporary name first: merged factors in float32 (or 64), full tensors of
    `modules_to_save` that fall into the shard, and a JSON header.

    Raises
    ------
    ValueError
        As `merge` does, and for a shard that is none.
    """
    index, count = shard
    if not 0 <= index < count:
        raise ValueError(f"expected a shard (index, count) with 0 ≤ index < count, got {shard}")
    adapters = [load_adapter(path, only=lambda name: belongs(name, shard)) for path in inputs]
    part = merge_part(adapters, method, **call)
    tensors = {f"saved/{name}": t for name, t in part.adapter.saved.items()}
    for name, u in part.adapter.modules.items():
        tensors |= {f"left/{name}": u.left, f"right/{name}": u.right}
    header = {
        "shard": list(shard),
        "call": {"method": method}
        | {k: v for k, v in call.items() if k not in ("device", "grams")},  # where, and tensors
        "modules": list(part.adapter.modules),
        "dropped": part.dropped,
        "sizes": part.sizes,
        "adapter": {key: getattr(part.adapter, key) for key in METADATA},
        "kinds": {name: asdict(kind) for name, kind in part.adapter.kinds.items()},
        "dtype": str(part.adapter.dtype).removeprefix("torch."),
    }
    contents = {key: (t, t.dtype) for key, t in tensors.items()}
    output = Path(output)
    replace_file(output, lambda path: write_safetensors(path, contents, {KEY: json.dumps(header)}))
    return output


def join(paths: Sequence[str | Path]) -> tuple[Adapter, dict, dict[str, float]]:
    """All shards of a merge, in any order, as one adapter: the bytes `merge` would have given.

    Returns
    -------
    adapter : Adapter
    call : dict
        The arguments of the merge, for a recipe.
    dropped : dict of str to float
        As of `merge`.

    Raises
    ------
    AdapterError
        If a file is no shard, shards are missing or come twice, or they are of different merges.
    """
    found = {}
    for path in paths:
        header, part = _read(Path(path))
        index, count = header["shard"]
        first = next(iter(found.values()), None)
        if first and (count, header["call"]) != (first[0]["shard"][1], first[0]["call"]):
            raise AdapterError(
                f"{path}: a shard of another merge: expected one of {first[0]['shard'][1]} of"
                f" {first[0]['call']}, got one of {count} of {header['call']}"
            )
        if index in found:
            raise AdapterError(f"{path}: shard {index} of {count} is given twice")
        found[index] = header, part
    if not found or (missing := sorted(set(range(count)) - set(found))):
        raise AdapterError(
            f"expected all shards of a merge, got {len(found)}; missing: {missing if found else 'all'}"
        )
    headers, parts = zip(*(found[index] for index in sorted(found)))
    # Where a shard changed the set of modules, no list of the first input's modules describes the result.
    adapter = next(
        (p.adapter for p in parts if p.adapter.config.get("target_modules") is None), parts[0].adapter
    )
    whole = Part(
        replace(
            adapter,
            **{key: _united(getattr(p.adapter, key) for p in parts) for key in ("modules", "kinds", "saved")},
        ),
        _united(p.dropped for p in parts),
        _united(p.sizes for p in parts),
    )
    return whole.finish(), headers[0]["call"], whole.dropped


def _united(dicts) -> dict:
    return {name: value for d in dicts for name, value in d.items()}


def _read(path: Path) -> tuple[dict, Part]:
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[KEY])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise AdapterError(f"{path}: expected a shard written by merge_shard: {error}") from None
    adapter = Adapter(
        {n: LowRank(tensors[f"left/{n}"], tensors[f"right/{n}"]) for n in header["modules"]},
        kinds={n: Kind(k["name"], tuple(k["kernel"])) for n, k in header["kinds"].items()},
        saved={n.removeprefix("saved/"): t for n, t in tensors.items() if n.startswith("saved/")},
        dtype=getattr(torch, header["dtype"]),
        **header["adapter"],
    )
    return header, Part(adapter, header["dropped"], header["sizes"])
