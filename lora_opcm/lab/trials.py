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
from types import MappingProxyType

import joblib
import numpy as np
from huggingface_hub import snapshot_download

from ..adapters import Adapter, AdapterError, load_adapter
from ..data import adapter_path, data_dir
from ..methods import merge
from .bases import slug
from .evaluation import Evaluator, Remembering, content, own_correct
from .tasks import tasks

GRID = (0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.5)  # scales offered to every method that has one


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


def grown(base: str, names: Sequence[str], seed: int, trained: Path | str) -> dict[str, Adapter]:
    """The adapters of another base, by task, from `trained`/<base>/seed<n>/<task>, where `lab.train` puts them.

    Raises
    ------
    AdapterError
        If one was not trained yet, with the command that does.
    """
    folder = Path(trained, slug(base), f"seed{seed}")
    for task in names:
        if not (folder / task / "adapter_config.json").is_file():
            raise AdapterError(
                f"{folder / task}: no adapter; `make experiments PROFILE=gpu` trains it, or"
                f" `python -m lora_opcm.lab.train {folder} --task {task} --seed {seed} --base {base}`"
            )
    return {task: load_adapter(folder / task) for task in names}


def collected(collection: str | Mapping[str, str], names: Sequence[str]) -> dict[str, Adapter]:
    """Other people's adapters, by task.

    Parameters
    ----------
    collection : str or mapping
        A hub repository or a folder for each task: a template with `{task}`, or a mapping from task to place.
    names : sequence of str
        The tasks wanted.

    Raises
    ------
    AdapterError
        If the collection names no place for a task, or what lies there is no adapter we read.
    """
    found = {}
    for task in names:
        place = collection.format(task=task) if isinstance(collection, str) else collection.get(task)
        if not place:
            raise AdapterError(f"the collection has no adapter for {task!r}; it has {', '.join(collection)}")
        if not Path(place).is_dir():
            place = snapshot_download(place, allow_patterns=["adapter_config.json", "adapter_model.*"])
        found[task] = load_adapter(place)
    return found


def contents(adapters: Sequence[Adapter]) -> str:
    """Eight digits of a hash of every adapter's numbers, in order: what a results file names adapters by."""
    return "+".join(joblib.hash(content(adapter))[:8] for adapter in adapters)


def bake(
    test: Remembering,
    adapters: Mapping[str, Adapter],
    entries: Sequence[Entry],
    options: Mapping[str, dict] = MappingProxyType({}),
    rank: int | None = None,
) -> dict[str, dict[str, np.ndarray]]:
    """Method → task → how right each example is: the two references, then every entry's merge of all adapters.

    `options` replaces those of the entries it names, as `tune` chose them.
    """
    found = references(adapters, test)
    for entry in entries:
        given = options.get(entry.label, entry.options)
        merged = merge(list(adapters.values()), entry.method, rank=rank, **given)
        found[entry.label] = test.correct(merged, progress=entry.label)
    return found


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


def references(adapters: Mapping[str, Adapter], evaluator: Remembering) -> dict[str, dict[str, np.ndarray]]:
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
