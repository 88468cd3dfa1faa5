"""Tables of the published run, as functions of its outcomes.

Everything is computed for the texts as they are and for a thousand resamples of them, the same for every method:
test texts are drawn again inside each task, training seeds too, and validation texts choose again. The first draw of
every array is no resample.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ...files.shipped import data_dir
from ..resampling import RESAMPLES, redrawn
from .choice import DIGITS, Candidate, best, ratio, score, shares
from .outcomes import Outcome, Trial, read

MARGIN = 2.0  # points of recovered gain: a method is no worse than another if it surely loses less
FILE = "outcomes.xz"
HEADLINE = (  # what is shown where all rows of the bake-off are too many
    "mean", "task arithmetic", "TIES", "OPCM as published", "Iso-C", "OPCM", "sequential whitening", "TSV",
    "whitened sum",
)  # fmt: skip


def published(file: str = FILE) -> "Evidence":
    """A run whose outcomes ship with the package, by its file in data/results; the published run unless given."""
    return _published(data_dir() / "results" / file)


@cache
def _published(path: Path) -> "Evidence":
    return Evidence(*read(path))


def over_seeds(values: np.ndarray) -> np.ndarray:
    """The mean over training seeds, which are drawn again in the resamples, shape=[1 + resamples, ...].

    As many as there are, and stretched: of two seeds one alone would reach less far.

    Parameters
    ----------
    values : array, shape=[seeds, 1 + resamples, ...]
    """
    weights = redrawn(len(values), 7, often=len(values))
    return np.einsum("rs,sr...->r...", weights, values)


At = Callable[[Outcome], Candidate] | None  # where an outcome is read; None: where validation texts put it


def accuracy(outcomes: Sequence[Outcome], at: At = None) -> np.ndarray:
    """Test accuracy of every task of outcomes of as many tasks, shape=[outcomes, 1 + resamples, tasks].

    What is of the same texts is counted in one product, so that the resamples, most of its bytes, are read once.
    """
    found = np.empty((len(outcomes), 1 + RESAMPLES, len(outcomes[0].trial.tasks)))
    together = defaultdict(list)
    for i, outcome in enumerate(outcomes):
        together[outcome.trial.tasks, tuple(outcome.sizes["test"])].append(i)
    for (tasks, sizes), members in together.items():
        bits, columns = [], []
        for i in members:
            picked = [at(outcomes[i])] if at else outcomes[i].picked
            names = list(dict.fromkeys(picked))
            columns.append(np.resize([len(bits) + names.index(c) for c in picked], 1 + RESAMPLES))
            bits += [outcomes[i].test[c] for c in names]
        each = shares(np.stack(bits, 1), tasks, sizes, "test")
        for i, column in zip(members, columns, strict=True):
            found[i] = np.take_along_axis(each, column[:, None, None], 2)[..., 0]
    return found


@dataclass(frozen=True, eq=False)
class Row:
    """One row of a table: the same trial over training seeds.

    Attributes
    ----------
    accuracy, zero, own : array, shape=[seeds, 1 + resamples, tasks]
        Of the row, of the base model, and of each task's own adapter.
    """

    outcomes: list[Outcome]
    accuracy: np.ndarray
    zero: np.ndarray
    own: np.ndarray

    @cached_property
    def draws(self) -> np.ndarray:
        """Recovered gain in per cent, a ratio of means over tasks and seeds, shape=[1 + resamples]."""
        return self.of(slice(None))

    def of(self, tasks: slice | Sequence[int]) -> np.ndarray:
        """As `draws`, of some of its tasks."""
        kept, whole = (over_seeds((x - self.zero)[..., tasks].mean(2)) for x in (self.accuracy, self.own))
        return 100 * kept / whole

    @property
    def pooled(self) -> np.ndarray:
        """As `draws`, of outcomes that are not drawn again: sets of tasks of one seed, shape=[1 + resamples]."""
        kept, whole = ((x - self.zero).mean((0, 2)) for x in (self.accuracy, self.own))
        return 100 * kept / whole

    @property
    def value(self) -> float:
        return float(self.draws[0])

    @property
    def by_task(self) -> np.ndarray:
        """What each task gained and what its own adapter gains, over seeds, shape=[2, tasks]."""
        return np.stack([(x - self.zero)[:, 0].mean(0) for x in (self.accuracy, self.own)])

    @property
    def by_seed(self) -> np.ndarray:
        """Recovered gain of every seed, shape=[seeds]."""
        return 100 * (self.accuracy - self.zero)[:, 0].mean(1) / (self.own - self.zero)[:, 0].mean(1)

    @property
    def mean_of_ratios(self) -> float:
        """The gain recovered task by task, averaged: a task with little to gain counts as much as any."""
        kept, whole = self.by_task
        return float(100 * (kept / whole).mean())

    @property
    def ratios(self) -> list[float]:
        """The norm of each seed's merged adapter in mean norms of its parts."""
        return [o.norms[0] / o.mean if o.trial.natural and o.mean else ratio(o.picked[0][1]) for o in self.outcomes]

    @property
    def options(self) -> list[dict]:
        """What validation texts chose for the knob, by seed."""
        return [o.trial.options[o.picked[0][0]] for o in self.outcomes]


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a run found: `about` it, and its outcomes."""

    about: dict
    outcomes: list[Outcome]

    @property
    def commits(self) -> str:
        """What ran, one commit or several, in seven digits each."""
        return ", ".join(c[:7] for c in self.about.get("commits") or [self.about["commit"]])

    @property
    def source(self) -> str:
        """By what protocol, when, by which code and where, as a page says it."""
        where = ", ".join(f"{n} trials on {d or 'a machine not recorded'}" for d, n in self.about["devices"].items())
        return f"protocol {self.about['protocol']}, {self.about['date']}, code `{self.commits}`, {where}"

    @cached_property
    def _bounds(self) -> dict[tuple, tuple[Outcome, int]]:
        """Method, recipe, seed, task → the outcome of a base model or of own adapters, and where in it the task is."""
        found = [(o, o.trial) for o in self.outcomes if o.trial.method in ("", "own")]
        return {(t.method, t.recipe, t.seed, task): (o, j) for o, t in found for j, task in enumerate(t.tasks)}

    @cached_property
    def _counted(self) -> dict[Outcome, np.ndarray]:
        return {}

    def _bound(self, method: str, trial: Trial) -> np.ndarray:
        """Accuracy of the tasks of a trial, of the base model or of own adapters, shape=[1 + resamples, tasks]."""
        places = [self._bounds[method, trial.recipe, trial.seed, task] for task in trial.tasks]
        for outcome, _ in places:
            if outcome not in self._counted:
                self._counted[outcome] = accuracy([outcome])[0]
        return np.stack([self._counted[outcome][:, j] for outcome, j in places], 1)

    def rows(self, found: Mapping[Hashable, list[Outcome]], at: At = None) -> "dict[Any, Row]":
        """A row for outcomes of one trial over seeds, with scales chosen by validation texts or given by `at`."""
        if not found:
            return {}
        each = iter(accuracy([o for outcomes in found.values() for o in outcomes], at))
        return {
            key: Row(
                outcomes,
                np.stack(list(islice(each, len(outcomes)))),
                *(np.stack([self._bound(method, o.trial) for o in outcomes]) for method in ("", "own")),
            )
            for key, outcomes in found.items()
        }

    def row(self, outcomes: list[Outcome], at: At = None) -> Row:
        """One row, see `rows`."""
        return self.rows({"": outcomes}, at)[""]

    def select(self, part: str, seeds: Sequence[int] | None = None, **where) -> dict[tuple, list[Outcome]]:
        """(label, rank) → its outcomes in the order of seeds; `where` says what fields of their trials are."""
        found = defaultdict(list)
        for outcome in self.outcomes:
            t = outcome.trial
            if t.part == part and (seeds is None or t.seed in seeds):
                if all(getattr(t, field) == value for field, value in where.items()):
                    found[t.label, t.rank].append(outcome)
        return {key: sorted(each, key=lambda o: o.trial.seed) for key, each in found.items()}

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        """Training seeds of which the bake-off is whole."""
        counts = defaultdict(set)
        for outcome in self.outcomes:
            if outcome.trial.part == "bake_off" and outcome.trial.seed:
                counts[outcome.trial.seed].add((outcome.trial.label, outcome.trial.rank))
        most = max(map(len, counts.values()))
        return tuple(sorted(seed for seed, found in counts.items() if len(found) >= most - 1))

    @cached_property
    def bake_off(self) -> dict[tuple, Row]:
        """(label, rank) → row, of every method that has all seeds."""
        found = self.select("bake_off", self.seeds)
        return self.rows({key: each for key, each in found.items() if len(each) == len(self.seeds)})


def interval(draws: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of resamples."""
    low, high = np.quantile(draws[1:], [0.025, 0.975])
    return float(low), float(high)


def over_tasks(row: Row, against: Row | None = None) -> tuple[float, float]:
    """The 95 % interval of the gain (or of its difference) where tasks are drawn again, and nothing else is."""
    drawn = redrawn(row.by_task.shape[1], 3, 10_000)
    gain = lambda r: 100 * (drawn @ r.by_task[0]) / (drawn @ r.by_task[1])  # noqa: E731
    return interval(gain(row) - (gain(against) if against else 0))


def summary(rows: dict[str, Row], against: str | None = None) -> pd.DataFrame:
    """One line a row: gain, both intervals, and the difference to the row `against` with both of its own."""
    lines = {}
    for label, row in rows.items():
        low, high = interval(row.draws)
        line = {"gain": row.value, "low": low, "high": high}
        line |= dict(zip(("tasks low", "tasks high"), over_tasks(row), strict=True))
        line |= {"mean of ratios": row.mean_of_ratios, "scale": float(np.median(row.ratios))}
        if against:
            low, high = interval(row.draws - rows[against].draws)
            line |= {"minus": row.value - rows[against].value, "minus low": low, "minus high": high}
            line |= dict(zip(("minus tasks low", "minus tasks high"), over_tasks(row, rows[against]), strict=True))
        lines[label] = line
    return pd.DataFrame.from_dict(lines, orient="index").sort_values("gain", ascending=False)


def headline() -> pd.DataFrame:
    """Recovered gain of eight adapters in one, in per cent, of the methods that most people ask for; best first."""
    rows = published().bake_off
    found = summary({label: rows[label, None] for label in HEADLINE})
    return found[["gain", "low", "high", "tasks low", "tasks high", "scale"]].rename_axis("method")


def favourite(rows: dict[str, Row]) -> str:
    """The row that validation texts like best, averaged over seeds: a reference that no test text has chosen."""

    def liked(row: Row) -> float:
        each = [score(o.validation[o.picked[0]], o.sizes["validation"]) if o.validation else 0.0 for o in row.outcomes]
        return float(np.mean(each))

    tried = {label: row for label, row in rows.items() if row.outcomes[0].trial.method not in ("", "own", "joint")}
    return max(tried, key=lambda label: liked(tried[label]))


def at_step(evidence: Evidence, outcomes: list[Outcome], step: int) -> Row | None:
    """The row with the scale put at a step, the knob as validation texts chose it; None where it was not tried."""
    at = lambda o: (o.picked[0][0], step)  # noqa: E731
    return evidence.row(outcomes, at) if all(at(o) in o.test for o in outcomes) else None


def few_texts(outcomes: Iterable[Outcome], counts: Sequence[int], draws: int = 200) -> pd.DataFrame:
    """Points of accuracy lost where so few texts a task choose scale and knob, against what all of them choose.

    Half of the validation texts at most choose; the others say what that costs, as every candidate was tried on them.
    """
    rng, lines = np.random.default_rng(5), []
    for outcome in outcomes:
        names = list(outcome.validation)
        bits = np.stack([outcome.validation[c] for c in names])
        edges = np.cumsum([0, *outcome.sizes["validation"]])
        all_best = names.index(outcome.picked[0])
        for count in counts:
            lost = []
            for _ in range(draws):
                few, rest = np.zeros(len(names)), np.zeros(len(names))
                for a, b in zip(edges, edges[1:]):
                    order = a + rng.permutation(b - a)
                    n = min(count, (b - a) // 2)
                    few += bits[:, order[:n]].mean(1)
                    rest += bits[:, order[n:]].mean(1)
                picked = names.index(best(dict(zip(names, few.round(DIGITS).tolist(), strict=True))))
                lost.append(100 * (rest[all_best] - rest[picked]) / (len(edges) - 1))
            line = {"label": outcome.trial.label, "rank": outcome.trial.rank, "seed": outcome.trial.seed}
            lines.append(line | {"texts": count, "lost": np.mean(lost), "worst": np.quantile(lost, 0.95)})
    return pd.DataFrame(lines)


def told(options: dict) -> str:
    """The knob in words."""
    words = {"alpha": "α", "power": "p", "directions": "directions", "density": "density", "common": "common"}
    fixed = ("sides", "variant", "gauge", "cap", "scale")
    shown = {k: v for k, v in options.items() if k not in fixed and v is not None}
    return ", ".join(f"{words.get(k, k)} {v:g}" for k, v in shown.items()) or "–"
