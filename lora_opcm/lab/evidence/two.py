"""Two adapters at the rank of one: what is kept of every pair of tasks, by means of subspaces and by sums."""

import numpy as np
import pandas as pd

from ..resampling import redrawn
from . import tables
from .tables import Evidence, Row, interval

PART = "two into one"
FILE = "two_into_one.xz"
RESAMPLES = 10_000  # of the tasks


def published() -> Evidence:
    """The outcomes that ship with the package."""
    return tables.published(FILE)


def methods(evidence: Evidence) -> dict[str, Row]:
    """Label → a row whose outcomes are the pairs, the same ones in the same order for every method; best first."""
    found = {label: each for (label, rank), each in evidence.select(PART).items() if rank}
    rows = evidence.rows({label: sorted(each, key=lambda o: o.trial.tasks) for label, each in found.items()})
    return dict(sorted(rows.items(), key=lambda item: -item[1].pooled[0]))


def by_pair(rows: dict[str, Row]) -> pd.DataFrame:
    """Recovered gain in per cent, shape=[pairs, methods]."""
    pairs = [" + ".join(o.trial.tasks) for o in next(iter(rows.values())).outcomes]
    return pd.DataFrame({label: row.by_seed for label, row in rows.items()}, index=pd.Index(pairs, name="pair"))


def summary(rows: dict[str, Row], against: str) -> pd.DataFrame:
    """One line a method, a ratio of means over pairs, in per cent, with 95 % intervals over texts.

    Returns
    -------
    DataFrame
        `gain`, `low`, `high`; `worst pair`; `scale`, which validation texts of each pair choose, the geometric mean in
        mean norms; `minus`, `minus low`, `minus high`: how much more is kept than by the method `against`;
        `tasks low`, `tasks high`: the interval of that difference where tasks are drawn again and texts are not, since
        pairs share them; `ahead`: of how many pairs more is kept.
    """
    worst, lines, other = by_pair(rows), {}, rows[against]
    for label, row in rows.items():
        line = dict(zip(("gain", "low", "high"), (row.pooled[0], *interval(row.pooled)), strict=True))
        line |= {"worst pair": worst[label].min(), "scale": float(np.exp(np.log(row.ratios).mean()))}
        more = row.pooled - other.pooled
        line |= dict(zip(("minus", "minus low", "minus high"), (more[0], *interval(more)), strict=True))
        line |= dict(zip(("tasks low", "tasks high"), over_tasks(row, other), strict=True))
        lines[label] = line | {"ahead": int((worst[label] > worst[against]).sum())}
    return pd.DataFrame.from_dict(lines, orient="index").rename_axis("method")


def over_tasks(row: Row, other: Row) -> tuple[float, float]:
    """The 95 % interval of the difference of two rows where tasks are drawn with replacement.

    A pair counts as often as both of its tasks were drawn together; a draw of one task alone has no pair and is left
    out.
    """
    pairs = [o.trial.tasks for o in row.outcomes]
    names = sorted({name for pair in pairs for name in pair})
    drawn = redrawn(len(names), 3, RESAMPLES)[1:]
    one, two = (drawn[:, [names.index(pair[i]) for pair in pairs]] for i in (0, 1))
    weight = one * two
    weight = weight[weight.sum(1) > 0]
    kept, less, whole = (weight @ (x - row.zero)[:, 0].mean(1) for x in (row.accuracy, other.accuracy, row.own))
    low, high = np.quantile(100 * (kept - less) / whole, [0.025, 0.975])
    return float(low), float(high)
