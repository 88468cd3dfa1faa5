"""What follows from a run on puzzles: shares of the gain with intervals, choices of scale, pairs.

Everything is a function of the published file. A recovered gain is (merged − base)/(own adapters − base) of means over
tasks. Scales are in mean norms: 1 gives a merged adapter the mean norm of its parts. Intervals are the middle 95 % of
resamples of the questions inside each task; validation questions are resampled too and choose the scale again. Test
questions were marked at three scales only, so a resample that chooses another one gets the nearest of the three.
All resamples share their questions, so what is compared is compared on the same ones. There is one training seed: no
interval here holds what another training would have changed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from ...files.shipped import data_dir
from ..resampling import draws, redrawn
from .outcomes import read

FILE = "puzzles.jsonl.xz"
SPLITS = ("validation", "test")
NAMES = {
    "cat": "task arithmetic", "tsv": "TSV", "iso_c": "Iso-C", "iso_cts": "Iso-CTS", "ties": "TIES", "opcm": "OPCM",
    "whitening": "sequential whitening", "knots_ties": "KnOTS-TIES", "core_ties": "core TIES",
    "whitened_sum": "whitened sum",
}  # fmt: skip
Marks = Mapping[str, np.ndarray]  # "right" and "likelihood", shape=[questions], task after task
Resampled = np.ndarray  # shape=[1 + resamples]; the first is no resample


@dataclass(frozen=True, eq=False)
class Merge:
    """One merge: marks by split and scale, and of a row the scale that validation questions chose."""

    label: str
    rank: int | None
    tasks: tuple[str, ...]
    marks: dict[str, dict[float, Marks]]
    scale: float | None

    @classmethod
    def of_line(cls, line: Mapping) -> "Merge":
        options = line["options"]
        named = [f"{sign}{options[key]:g}" for key, sign in (("power", "p = "), ("alpha", "α = ")) if key in options]
        named = [f"cap {options['cap']}"] if "cap" in options else named
        of = {s: {_norms(line, e["scale"]): _flat(e, line["tasks"]) for e in line[s]} for s in SPLITS if s in line}
        scale = _norms(line, line["scale"]) if "scale" in line else None
        label = ", ".join([NAMES[line["method"]], *named])
        return cls(label, options.get("cap", line["rank"]), tuple(line["tasks"]), of, scale)

    def same(self, other: "Merge") -> bool:
        """Whether all test questions got the same marks at the same scales."""
        one, two = self.marks["test"], other.marks["test"]
        if self.rank != other.rank or one.keys() != two.keys():
            return False
        return all(np.array_equal(one[scale][kind], two[scale][kind]) for scale in one for kind in one[scale])


class Run:
    """A run's file, read: base, own adapters, the commonest answers, rows (all tasks) and pairs."""

    def __init__(self, path: Path | None = None):
        self.header, lines = read(path or data_dir() / "results" / FILE)
        self.tasks = tuple(self.header["tasks"])
        self.sizes = {split: tuple(self.header["sizes"][split][t] for t in self.tasks) for split in SPLITS}
        of = {k: [line for line in lines if line["kind"] == k] for k in ("base", "own", "commonest", "row", "pair")}
        own = {line["tasks"][0]: line for line in of["own"]}
        parts = {s: [_flat(own[t][s][0], (t,)) for t in self.tasks] for s in SPLITS}
        self.own = {s: {k: np.concatenate([p[k] for p in parts[s]]) for k in parts[s][0]} for s in SPLITS}
        self.base = {s: _flat(of["base"][0][s][0], self.tasks) for s in SPLITS}
        self.commonest = {s: _flat(of["commonest"][0][s][0], self.tasks) for s in SPLITS}
        self.rows, self.twins = [], []  # of rows that are one and the same the first is kept
        for row in map(Merge.of_line, of["row"]):
            twin = next((known for known in self.rows if row.same(known)), None)
            self.rows += [] if twin else [row]
            self.twins += [(twin, row)] if twin else []
        self.pairs = [Merge.of_line(line) for line in of["pair"]]

    @cached_property
    def weights(self) -> dict[str, np.ndarray]:
        """By split, shape=[1 + resamples, questions]: each row makes a mean over tasks."""
        found = {}
        for split in SPLITS:
            parts = zip(self.tasks, self.sizes[split], strict=True)
            found[split] = np.concatenate([draws(t, n, split).astype(float) / n for t, n in parts], 1) / len(self.tasks)
        return found

    def gain(self, means: Resampled, metric: str = "right", split: str = "test") -> Resampled:
        """The recovered gain of means over tasks."""
        base, own = (self.weights[split] @ of[split][metric] for of in (self.base, self.own))
        return (means - base) / (own - base)

    def by_task(self, marks: np.ndarray, split: str = "test") -> np.ndarray:
        """The mean of each task."""
        return np.array([part.mean() for part in np.split(marks, np.cumsum(self.sizes[split])[:-1])])


def _flat(entry: Mapping, tasks: Sequence[str]) -> Marks:
    kinds = [kind for kind in ("right", "likelihood") if kind in entry]
    return {kind: np.concatenate([entry[kind][t] for t in tasks]).astype(float) for kind in kinds}


def _norms(line: Mapping, scale: float) -> float:
    return round(scale / line["unit"], 3)


def interval(values: Resampled, name: str) -> dict[str, float]:
    """The value itself, and the middle 95 % of its resamples, as columns."""
    low, high = np.quantile(values[1:], (0.025, 0.975))
    return {name: float(values[0]), f"{name} low": float(low), f"{name} high": float(high)}


def picks(run: Run, row: Merge, by: str = "likelihood") -> np.ndarray:
    """The scale that validation questions choose, in every resample."""
    tried = row.marks["validation"]
    scores = run.weights["validation"] @ np.stack([marks[by] for marks in tried.values()], 1)
    return np.array(list(tried))[scores.argmax(1)]


def tested(run: Run, row: Merge, metric: str = "right") -> tuple[Resampled, float]:
    """A row's mean over tasks on test questions, and the share of resamples that chose a scale that was not tested."""
    chosen, there = picks(run, row), np.array(list(row.marks["test"]))
    nearest = np.abs(np.log(chosen[:, None] / there)).argmin(1)
    means = run.weights["test"] @ np.stack([marks[metric] for marks in row.marks["test"].values()], 1)
    return means[np.arange(len(means)), nearest], float((~np.isin(chosen[1:], there)).mean())


def gains(run: Run, rank: int | None) -> pd.DataFrame:
    """One row a method, best first.

    With low and high: the gains `exact` and `likelihood`; `over the commonest`, the share of questions right beyond
    that of the commonest answers; `behind`, how far `exact` is behind the best row. Then an interval of `exact` over
    tasks, the scale, and the share of resamples whose scale was not tested.
    """
    exact = {row: tested(run, row) for row in run.rows if row.rank == rank}
    best = max(exact, key=lambda row: exact[row][0][0])
    guess, found = run.weights["test"] @ run.commonest["test"]["right"], []
    for row, (means, untested) in exact.items():
        line = {"method": row.label, "scale": row.scale, "untested": untested}
        line |= interval(run.gain(means), "exact")
        line |= interval(run.gain(tested(run, row, "likelihood")[0], "likelihood"), "likelihood")
        line |= interval(means - guess, "over the commonest")
        line |= interval(run.gain(exact[best][0]) - run.gain(means), "behind")
        found.append(line | over_tasks(run, row.marks["test"][row.scale]["right"]))
    return pd.DataFrame(found).set_index("method").sort_values("exact", ascending=False)


def over_tasks(run: Run, right: np.ndarray) -> dict[str, float]:
    """The recovered gain when tasks are resampled, and their questions stay."""
    merged, base, own = map(run.by_task, (right, run.base["test"]["right"], run.own["test"]["right"]))
    share = redrawn(len(base), 3)
    return interval(share @ (merged - base) / (share @ (own - base)), "over tasks")


def fixed(run: Run, row: Merge, scale: float, metric: str = "right", split: str = "validation") -> Resampled | None:
    """The gain at a scale that no question chose; None where it was not tried."""
    marks = row.marks[split].get(round(scale, 3))
    return None if marks is None else run.gain(run.weights[split] @ marks[metric], metric, split)


def crossed(run: Run, row: Merge, by: str) -> Resampled:
    """The gain in exact marks on validation questions, at the scale that the other half of them chooses."""
    tried, w = list(row.marks["validation"].values()), run.weights["validation"]
    scores, right = (np.stack([marks[kind] for marks in tried], 1) for kind in (by, "right"))
    half = np.concatenate([np.arange(n) % 2 for n in run.sizes["validation"]])
    chosen = [(w[:, half != h] @ scores[half != h]).argmax(1) for h in (0, 1)]
    means = [(w[:, half == h] @ right[half == h])[np.arange(len(w)), chosen[h]] for h in (0, 1)]
    return run.gain(means[0] + means[1], split="validation")


def pair_gains(run: Run, without: Sequence[str] = ()) -> pd.DataFrame:
    """Gains in exact marks of the pairs that all methods merged, by method and scale (of the plain sum a mean), and of
    the commonest answers: sums over pairs in place of means over tasks. Pairs with a task of `without` are left out."""
    labels = {pair.label for pair in run.pairs}
    whole = [p for p in run.pairs if {q.label for q in run.pairs if q.tasks == p.tasks} == labels]
    whole = [pair for pair in whole if not set(pair.tasks) & set(without)]
    names = list(dict.fromkeys(pair.tasks for pair in whole))
    ends = np.cumsum(run.sizes["test"])[:-1]
    weight = dict(zip(run.tasks, np.split(len(run.tasks) * run.weights["test"], ends, 1)))
    weight = {pair: np.concatenate([weight[t] for t in pair], 1) for pair in names}

    def total(marks: Sequence[np.ndarray]) -> Resampled:
        return sum(weight[pair] @ right for pair, right in zip(names, marks))

    def known(of: Mapping[str, Marks]) -> Resampled:
        by = dict(zip(run.tasks, np.split(of["test"]["right"], ends)))
        return total([np.concatenate([by[t] for t in pair]) for pair in names])

    base, own = known(run.base), known(run.own)
    found = [{"method": "commonest answer"} | interval((known(run.commonest) - base) / (own - base), "exact")]
    for label in dict.fromkeys(pair.label for pair in whole):
        tried = {pair.tasks: pair.marks["test"].items() for pair in whole if pair.label == label}
        for at in zip(*(tried[pair] for pair in names)):  # one of the scales, of every pair
            merged = total([marks["right"] for _, marks in at])
            line = {"method": label, "scale": float(np.mean([scale for scale, _ in at])), "pairs": len(names)}
            found.append(line | interval((merged - base) / (own - base), "exact"))
    return pd.DataFrame(found)
