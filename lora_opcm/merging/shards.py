"""Merging by shards of modules, in processes or on machines that share nothing, to the bytes of one process.

    merge_shard(["a", "b"], "part0.safetensors", (0, 3), "opcm", rank=16)     three times, anywhere
    adapter, call, inputs = join(["part0.safetensors", "part1.safetensors", "part2.safetensors"])

A merge treats its modules one by one, with random masks seeded by their names; all that ties them together is one
factor of the whole adapter (`Part.finish`). So a process reads the tensors of its own modules only, and writes
what it merged before that factor, with the squared norms the factor is made of; `join` adds those up exactly
rounded. The same bytes need the same numerics: one version of torch, one kind of CPU.
"""

import os
import tempfile
import warnings
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from ..files import Adapter, AdapterError, dropping, load_adapter, outline
from ..files.bundle import damaged, load_bundle, save_bundle
from ..files.joint import respell, spellings
from ..lowrank import LowRank
from ..parallel import Progress
from .merge import Part, merge_part
from .method import method_of


class Shard(msgspec.Struct):
    """What a file of `merge_shard` says beside its tensors."""

    shard: tuple[int, int]
    call: dict[str, Any]
    inputs: list[tuple[str, str]]
    modules: list[str]
    dropped: dict[str, float]
    sizes: dict[str, list[list[float]]]
    scale: float | str


def belongs(name: str, shard: tuple[int, int]) -> bool:
    """Whether a module is of shard (index, count): by a hash of its name, so nobody needs a list of all."""
    return zlib.crc32(name.encode()) % shard[1] == shard[0]


def merge_shard(
    adapters: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    shard: tuple[int, int],
    method: str = "opcm",
    *,
    inputs: Sequence[tuple[str, str]] = (),
    **call,
) -> Path:
    """Merge the modules of shard (index, count), 0 ≤ index < count; `call` is as for `merge`.

    `inputs` are names and ids of the adapters, which `join` hands on for a recipe.

    Writes a state file: merged factors in float32 (64), full tensors of `modules_to_save` whose names fall into
    the shard, and what else `join` needs in its header. Only tensors of the shard are read.

    Raises
    ------
    ValueError
        As `merge` and `load_adapter` do, and for a shard that is none.
    """
    index, count = shard
    if not 0 <= index < count:
        raise ValueError(f"expected a shard (index, count) with 0 ≤ index < count, got {shard}")
    part = merge_part(_own(adapters, shard, method, call), method, **call | {"disjoint": True, "drop": ()})
    said = {"method": method} | {k: v for k, v in call.items() if k not in ("device", "grams", "progress")}
    said["scale"] = part.scale
    content = Shard(
        shard=shard,
        call={k: str(v).removeprefix("torch.") if k == "dtype" else v for k, v in said.items()},
        inputs=list(inputs),
        modules=list(part.adapter),
        dropped=part.adapter.dropped,
        sizes=part.sizes,
        scale=part.scale,
    )
    tensors = {f"left/{name}": u.left for name, u in part.adapter.items()}
    tensors |= {f"right/{name}": u.right for name, u in part.adapter.items()}
    return save_bundle(output, "shard", part.adapter, content, tensors)


def _own(
    paths: Sequence[str | os.PathLike], shard: tuple[int, int], method: str, call: Mapping[str, Any]
) -> list[Adapter]:
    """What a shard merges of the adapters: their names, which the whole of them decides, and no other tensor."""
    whole = dropping([outline(path) for path in paths], call.get("drop", ()))
    own = []
    twice = method_of(method).adds(*(call.get(x) for x in ("rank", "energy", "scale")))
    for path, names in zip(paths, spellings(whole, call.get("disjoint", False), twice), strict=True):
        mine = {name for name in names if belongs(names[name], shard)}
        own.append(respell(load_adapter(path, only=mine.__contains__), names, whole[0].format))
    return own


def join(paths: Iterable[str | os.PathLike]) -> tuple[Adapter, dict, list[tuple[str, str]]]:
    """All shards of a merge, in any order, as one adapter: the bytes `merge` would have given.

    Returns
    -------
    adapter : Adapter
    call : dict
        The arguments of the merge, for a recipe.
    inputs : list of (name, id)
        As given to `merge_shard`.

    Raises
    ------
    AdapterError
        If a file is no shard, shards are missing or come twice, or they are of different merges.
    """
    found: dict[int, Part] = {}
    expected = None
    for path in paths:
        said, tensors, like = load_bundle(path, "shard", Shard)
        (index, count), call = said.shard, (said.shard[1], said.call, said.inputs)
        expected = expected or call
        if expected != call:
            raise AdapterError(
                f"{path}: expected one of {expected[0]} shards of {expected[1]}, got one of {count} of"
                f" {said.call}" + " with other inputs" * (expected[2] != said.inputs)
            )
        if index in found:
            raise AdapterError(f"{path}: shard {index} of {count} is given twice")
        found[index] = _part(path, said, tensors, like)
    if expected is None:
        raise AdapterError("expected the shards of a merge, got none")
    if missing := sorted(set(range(expected[0])) - set(found)):
        raise AdapterError(f"expected {expected[0]} shards, got {len(found)}; missing: {missing}")
    parts = [found[index] for index in sorted(found)]
    # The list of target modules is gone from the config of a shard where it no longer holds.
    like = next((p.adapter for p in parts if p.adapter.config.get("target_modules") is None), parts[0].adapter)
    fields: dict[str, Any] = {
        field: _united(getattr(p.adapter, field) for p in parts) for field in ("modules", "kinds", "saved", "dropped")
    }
    ragged = expected[1].get("ragged", False)
    whole = Part(replace(like, **fields), _united(p.sizes for p in parts), parts[0].scale, ragged)
    return whole.finish(), expected[1], expected[2]


def merge_apart(
    adapters: Sequence[str | os.PathLike],
    method: str = "opcm",
    *,
    processes: int,
    progress: Progress | None = None,
    **call,
) -> Adapter:
    """What `merge` makes of adapters on a disk, by processes that share the cores: the same bytes.

    Threads of one process wait for one lock between two calls, so on many cores small layers take as long as there are
    calls; processes do not. Each imports torch first, and merged factors go through a temporary folder.

    Parameters
    ----------
    processes : int
    progress : callable, optional
        As for `merge`, around the processes that are done. Warnings that count modules count those of a process.
    **call
        As for `merge`, without a device.

    Raises
    ------
    ValueError
        As `merge` and `load_adapter` do, and for fewer processes than one.
    OSError
        If a process is ended from outside.
    """
    if processes < 1:
        raise ValueError(f"expected one process or more, got {processes}")
    threads = max(1, torch.get_num_threads() // processes)
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (threads,)) as pool,
    ):
        parts = [Path(folder, str(i)) for i in range(processes)]
        jobs = [pool.submit(_heard, adapters, part, (i, processes), method, call) for i, part in enumerate(parts)]
        done = as_completed(jobs)
        heard: dict[str, None] = {}  # once what several say, as of inputs that all of them read
        for job in progress(done, total=processes) if progress else done:
            try:
                heard |= dict.fromkeys(job.result())
            except BrokenProcessPool:
                raise OSError("a process that merged was ended from outside, for want of memory perhaps") from None
        for remark in heard:
            warnings.warn(remark, stacklevel=2)
        return join(parts)[0]


def _heard(adapters, part: Path, shard: tuple[int, int], method: str, call: dict) -> list[str]:
    """Merge a shard, and hand on what was warned of: a process that ends takes its warnings with it."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always", UserWarning)
        merge_shard(adapters, part, shard, method, **call)
    return [str(w.message) for w in heard if issubclass(w.category, UserWarning)]


def _united(dicts: Iterable[dict]) -> dict:
    return {name: value for each in dicts for name, value in each.items()}


def _part(path: str | os.PathLike, said: Shard, tensors: dict[str, Tensor], like: Adapter) -> Part:
    try:
        modules = {name: LowRank(tensors[f"left/{name}"], tensors[f"right/{name}"]) for name in said.modules}
    except (LookupError, ValueError) as error:
        raise damaged(path, error) from None
    return Part(replace(like, modules=modules, dropped=said.dropped), said.sizes, said.scale)
