"""From two adapters to twenty: what one in their place keeps, and how long validation texts want it.

Sets of small tasks are drawn, and the same sets are merged by every method. The knob of a method is where other tasks
put it; the scale is chosen for every set anew.
"""

import numpy as np
import pandas as pd

from ..resampling import redrawn
from . import tables
from .choice import ratio, rule
from .outcomes import Outcome
from .tables import Evidence, interval

FILE = "growth.xz"


def published() -> Evidence:
    """The outcomes that ship with the package."""
    return tables.published(FILE)


def sets(evidence: Evidence, label: str, rank: int | None = None) -> dict[int, list[Outcome]]:
    """Number of adapters → the outcomes of a method, one for each set of so many."""
    found: dict[int, list[Outcome]] = {}
    for outcome in evidence.select("growth", label=label).get((label, rank), []):
        found.setdefault(len(outcome.trial.tasks), []).append(outcome)
    return dict(sorted(found.items()))


def labels(evidence: Evidence, rank: int | None = None) -> list[str]:
    """The methods whose sets are whole: those with as many as any other."""
    counts = {name: len(each) for (name, r), each in evidence.select("growth").items() if r == rank}
    merged = {name: count for name, count in counts.items() if name not in ("zero-shot", "own adapter")}
    return [name for name, count in merged.items() if count == max(merged.values())]


def curve(evidence: Evidence, label: str, rank: int | None = None) -> pd.DataFrame:
    """A method against the number of adapters, one line a number.

    Returns
    -------
    DataFrame
        `sets`: how many were drawn; `gain`, `low`, `high`: recovered gain in per cent, a ratio of means over tasks and
        sets, with the 95 % interval over validation texts, which choose again, and test texts; `scale`, `shortest`,
        `longest`: the norm that validation texts choose, in mean norms, the geometric mean over sets and its ends;
        `lost`, `lost low`, `lost high`: how much less of the gain the rule without data keeps.
    """
    lines = {}
    for count, outcomes in sets(evidence, label, rank).items():
        step = rule(count)
        tuned, ruled = (evidence.row(outcomes, at).pooled for at in (None, lambda o, k=step: (o.picked[0][0], k)))
        steps = [o.picked[0][1] for o in outcomes]
        line = {"sets": len(outcomes), "gain": tuned[0], **_ends("", tuned), "scale": ratio(np.mean(steps))}
        line |= {"shortest": ratio(min(steps)), "longest": ratio(max(steps))}
        lines[count] = line | {"lost": (tuned - ruled)[0], **_ends("lost ", tuned - ruled)}
    return pd.DataFrame.from_dict(lines, orient="index").rename_axis("adapters")


def _ends(name: str, draws: np.ndarray) -> dict[str, float]:
    return dict(zip((f"{name}low", f"{name}high"), interval(draws), strict=True))


def trend(
    evidence: Evidence, label: str, rank: int | None = None, first: int = 1, last: float = np.inf
) -> tuple[float, float, float]:
    """How much longer validation texts want the merge where adapters are twice as many: the factor, and its 95 %
    interval, over sets of `first` to `last` adapters.

    Least squares of the step of the scale on the logarithm of the number of adapters, over sets. The interval draws
    validation texts again, and sets inside each number of adapters. The only set of its number is in every draw.
    """
    x, many, means = [], [], []
    for count, outcomes in sets(evidence, label, rank).items():
        if first <= count <= last:
            n = len(outcomes)
            weights = redrawn(n, count)
            steps = np.array([[step for _, step in o.picked] for o in outcomes]).T
            means.append(np.average(np.broadcast_to(steps, weights.shape), 1, weights))
            x.append(np.log2(count))
            many.append(n)
    x = many * (x - np.average(x, weights=many))  # one line through all sets: as many as there are of each number
    slopes = np.exp2(x @ np.stack(means) / (x**2 / many).sum() / 2)
    return float(slopes[0]), *interval(slopes)
