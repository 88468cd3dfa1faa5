"""What the experiments share: adapters of a seed, entries with a tuned scale, costs, streams in an order."""

import ctypes
import gc
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..adapters import Adapter, AdapterError, load_adapter
from ..data import adapter_path, data_dir
from ..methods import merge
from .evaluation import Evaluator, own_correct
from .tasks import tasks

GRID = (0.3, 0.5, 0.7, 1.0, 1.5)  # scales offered to every method that has one


@dataclass(frozen=True)
class Entry:
    """A row of a comparison: a method with its options, and whether validation texts choose its scale."""

    label: str
    method: str
    options: dict = field(default_factory=dict)
    tuned: bool = True


def adapter_folder(task: str, seed: int = 0, trained: Path | str = "_build/adapters") -> Path:
    """The folder of one adapter: seed 0 ships with the package, others are in `trained`/seed<n>/<task>.

    Raises
    ------
    AdapterError
        If it was not trained yet, with the command that does.
    """
    if seed == 0:
        return adapter_path(task)
    folder = Path(trained, f"seed{seed}", task)
    if not (folder / "adapter_config.json").is_file():
        raise AdapterError(
            f"{folder}: no adapter; `make experiments PROFILE=full` trains it, or"
            f" `python -m lora_opcm.lab.train {folder.parent} --task {task} --seed {seed}`"
        )
    return folder


def adapters_of(seed: int = 0, trained: Path | str = "_build/adapters") -> dict[str, Adapter]:
    """The eight adapters of one training seed, by task."""
    return {task: load_adapter(adapter_folder(task, seed, trained)) for task in tasks()}


def hashes(seeds: Sequence[int], trained: Path | str = "_build/adapters") -> str:
    """The first eight digits of the sha256 of every adapter, in order of seed and task."""
    manifests = {0: data_dir() / "adapters"} | {s: Path(trained, f"seed{s}") for s in seeds if s}
    found = [json.loads((manifests[s] / "manifest.json").read_text()) for s in seeds]
    return "+".join(m[t]["sha256"][:8] for m in found for t in tasks())


def mean_accuracy(correct: Mapping[str, np.ndarray]) -> float:
    """The average over tasks of the share of texts that are right."""
    return float(np.mean([c.mean() for c in correct.values()]))


def tune(
    entry: Entry, adapters: Sequence[Adapter], validation: Evaluator, rank: int | None = None
) -> tuple[dict, dict[float, float]]:
    """Options with the best scale of `GRID` on validation texts, and the accuracy of each scale tried."""
    if not entry.tuned:
        return entry.options, {}
    scores = {
        scale: mean_accuracy(
            validation.correct(merge(adapters, entry.method, rank=rank, scale=scale, **entry.options))
        )
        for scale in GRID
    }
    return entry.options | {"scale": max(scores, key=scores.get)}, scores


def cost(function: Callable) -> tuple[object, float, float]:
    """What a call returns, its seconds, and by how many MB the process grew while it ran (NaN off Linux)."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before must not hide what this call takes
    before = _memory("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    except OSError:
        before = float("nan")
    start = time.perf_counter()
    result = function()
    seconds = time.perf_counter() - start
    return result, seconds, _memory("VmHWM") - before


def _memory(what: str) -> float:
    try:
        return int(re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    except OSError:
        return float("nan")


def references(adapters: Mapping[str, Adapter], evaluator: Evaluator) -> dict[str, dict[str, np.ndarray]]:
    """The floor and the ceiling: the base model alone, and each task with its own adapter."""
    return {"zero-shot": evaluator.correct(), "own adapter": own_correct(evaluator, dict(adapters))}


def over_seeds(runs: Sequence[dict[str, dict[str, np.ndarray]]]) -> dict[str, dict[str, np.ndarray]]:
    """method → task → array, shape=[seeds, texts], from one such table a seed."""
    return {m: {t: np.stack([run[m][t] for run in runs]) for t in runs[0][m]} for m in runs[0]}


def recovered(correct: Mapping[str, np.ndarray], floor: Mapping, ceiling: Mapping) -> float:
    """Recovered gain of one merged adapter: (acc − zero-shot)/(own − zero-shot), of averages over tasks."""
    zero = mean_accuracy(floor)
    return (mean_accuracy(correct) - zero) / (mean_accuracy(ceiling) - zero)


def orders(count: int, length: int = 8, seed: int = 0) -> list[list[int]]:
    """Distinct orders of a stream: as listed, reversed, then random ones."""
    rng = np.random.default_rng(seed)
    found = [list(range(length)), list(range(length))[::-1]]
    while len(found) < count:
        order = [int(i) for i in rng.permutation(length)]
        if order not in found:
            found.append(order)
    return found[:count]
