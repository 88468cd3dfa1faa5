"""A comparison of methods: entries with a tuned scale, references, averages, and orders of a stream."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import factorial
from types import MappingProxyType

import numpy as np

from ...files import Adapter
from ...merging.merge import merge
from ..evaluation import Evaluator, Remembering, own_correct

GRID = (0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.5)  # scales offered to every method that has one


@dataclass(frozen=True)
class Entry:
    """A row of a comparison: a method with its options, and whether validation texts choose its scale."""

    label: str
    method: str
    options: dict = field(default_factory=dict)
    tuned: bool = True


def bake(
    test: Remembering,
    adapters: Mapping[str, Adapter],
    entries: Sequence[Entry],
    options: Mapping[str, dict] = MappingProxyType({}),
    rank: int | None = None,
) -> dict[str, dict[str, np.ndarray]]:
    """Method → task → how right each example is: the references, then every entry's merge of all adapters.

    `options` replaces those of the entries it names, as `tune` chose them.
    """
    found = references(adapters, test)
    for entry in entries:
        given = options.get(entry.label, entry.options)
        merged = merge(list(adapters.values()), entry.method, rank=rank, **given)
        found[entry.label] = test.correct(merged, progress=entry.label)
    return found


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
        scale: mean_accuracy(validation.correct(merge(adapters, entry.method, rank=rank, scale=scale, **entry.options)))
        for scale in GRID
    }
    return entry.options | {"scale": max(scores, key=scores.get)}, scores


def references(adapters: Mapping[str, Adapter], evaluator: Remembering) -> dict[str, dict[str, np.ndarray]]:
    """The floor and the ceiling: the base model alone, and each task with its own adapter."""
    return {"zero-shot": evaluator.correct(), "own adapter": own_correct(evaluator, dict(adapters))}


def over_seeds(runs: Sequence[dict[str, dict[str, np.ndarray]]]) -> dict[str, dict[str, np.ndarray]]:
    """method → task → array, shape=[seeds, texts], from one such table a seed."""
    return {m: {t: np.stack([run[m][t] for run in runs]) for t in runs[0][m]} for m in runs[0]}


def orders(count: int, length: int = 8, seed: int = 0) -> list[list[int]]:
    """Distinct orders of a stream: as listed, reversed, then random ones; fewer where there are no more."""
    rng = np.random.default_rng(seed)
    found = [list(range(length)), list(range(length))[::-1]]
    while len(found) < min(count, factorial(length)):
        order = rng.permutation(length).tolist()
        if order not in found:
            found.append(order)
    return found[:count]
