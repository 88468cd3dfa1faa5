"""Streams of bounded memory in many orders, beside the best method that has all adapters at hand."""

from collections import defaultdict
from functools import cache

import numpy as np
import pandas as pd

from . import rows, tables
from .rows import RANK
from .tables import Evidence, Row, interval

STREAMS = tuple(rows.STREAMS)


@cache
def orders(evidence: Evidence) -> dict[tuple[str, int, int], list[Row]]:
    """Stream, directions that are kept, training seed → a row for every order; of seeds that have them all."""
    found = defaultdict(list)
    for (label, cap), each in evidence.select("stream").items():
        for outcome in each:
            found[cap, outcome.trial.seed, label].append(outcome)
    whole = {}
    for cap, seed, label in sorted(found):
        counts = {len(found[cap, seed, name]) for name in STREAMS}
        if counts == {max(len(each) for (c, *_), each in found.items() if c == cap)}:
            whole[label, cap, seed] = [evidence.row([o]) for o in found[cap, seed, label]]
    return whole


def caps(evidence: Evidence) -> list[int]:
    """How many directions a stream may keep."""
    return sorted({cap for _, cap, _ in orders(evidence)})


def seeds(evidence: Evidence, cap: int) -> list[int]:
    """Training seeds of which all orders were run."""
    return sorted({seed for _, c, seed in orders(evidence) if c == cap})


@cache
def at_hand(evidence: Evidence, cap: int, seed: int) -> tuple[str, Row]:
    """With all adapters at hand, cut to the rank: the method that the test texts themselves like best."""
    found = {**evidence.select("bake_off", [seed]), **evidence.select("joint", [seed])}
    cut = {label: evidence.row(each) for (label, rank), each in found.items() if rank == cap}
    return max(cut.items(), key=lambda item: item[1].value)


def reference(evidence: Evidence, cap: int) -> float:
    """What the best method with all adapters at hand keeps, the mean over seeds."""
    return float(np.mean([at_hand(evidence, cap, seed)[1].value for seed in seeds(evidence, cap)]))


@cache
def minus(evidence: Evidence, label: str, cap: int) -> np.ndarray:
    """The mean over orders less `at_hand` of the seed, shape=[seeds, 1 + resamples]."""
    each = [
        np.mean([row.draws for row in orders(evidence)[label, cap, seed]], 0) - at_hand(evidence, cap, seed)[1].draws
        for seed in seeds(evidence, cap)
    ]
    return np.stack(each)


@cache
def table(evidence: Evidence) -> pd.DataFrame:
    """One line a stream and cap, in per cent of the gain.

    Returns
    -------
    DataFrame
        `seeds`, `orders` of each; `mean`, `worst`, `best` over orders of all seeds; `minus`, `low`, `high`: the mean
        over orders less `at_hand` of the seed, the mean over seeds, with a 95 % interval over texts and seeds;
        `within`: of how many orders, all seeds together, no more than the margin is lost to it.
    """
    lines = []
    for cap in caps(evidence):
        for label in STREAMS[::-1]:
            kept = {seed: orders(evidence)[label, cap, seed] for seed in seeds(evidence, cap)}
            values = np.array([[row.value for row in each] for each in kept.values()])
            best = [at_hand(evidence, cap, seed)[1] for seed in kept]
            less = tables.over_seeds(minus(evidence, label, cap))
            within = values > np.array([r.value for r in best])[:, None] - tables.MARGIN
            line = {"method": label, "directions": cap, "seeds": len(values), "orders": values.shape[1]}
            line |= {"mean": values.mean(), "worst": values.min(), "best": values.max(), "within": int(within.sum())}
            lines.append(line | dict(zip(("minus", "low", "high"), (less[0], *interval(less)), strict=True)))
    return pd.DataFrame(lines).set_index(["method", "directions"])


def spread(evidence: Evidence, label: str, cap: int) -> tuple[float, float]:
    """Standard deviation of the gain over orders, as it is, and with the noise of the test texts taken out: the root of
    the mean variance inside a training seed."""
    observed, real = [], []
    for seed in seeds(evidence, cap):
        draws = np.stack([row.draws for row in orders(evidence)[label, cap, seed]])
        inner = draws - draws.mean(0)
        observed.append(inner[:, 0].var(ddof=1))
        real.append(observed[-1] - (inner[:, 1:] - inner[:, :1]).var(1).mean())
    return float(np.mean(observed)) ** 0.5, max(0.0, float(np.mean(real))) ** 0.5


def carried(evidence: Evidence) -> dict[int, tuple[list[float], str, float]]:
    """Sequential whitening at twice the mean norm, which no text of these seeds chose: seed → the gains of its orders;
    and the best method at that rank with all adapters at hand, with its gain at the scale that it chose."""
    found = evidence.select("stream", label="sequential whitening", rank=RANK, steps=((0, 2),))
    kept = defaultdict(list)
    for each in found.values():
        for outcome in each:
            kept[outcome.trial.seed].append(evidence.row([outcome]).value)
    best = {seed: at_hand(evidence, RANK, seed) for seed in sorted(kept)}
    return {seed: (kept[seed], label, row.value) for seed, (label, row) in best.items()}
