"""A named part of the published run, computed again here and compared text by text."""

import numpy as np
import pandas as pd

from . import recipes
from .outcomes import Outcome
from .run import BOUNDS, Bench, merge_trial
from .tables import Evidence


def recompute(evidence: Evidence, part: str, labels: list[str], texts: int) -> pd.DataFrame:
    """Rows of shipped adapters, on the first `texts` test texts of every task, at the scale that was published."""
    found = [o for o in evidence.outcomes if o.trial.part == part and o.trial.recipe == recipes.BOOK]
    found = [o for o in found if o.trial.label in labels]
    bench = Bench(dict.fromkeys(task for o in found for task in o.trial.tasks), texts)
    lines = []
    for outcome in found:
        trial = outcome.trial
        if trial.method in BOUNDS:
            here = bench.bounds(trial, "")
        else:
            like = recipes.adapter("", trial.recipe, trial.seed, trial.tasks[0])
            here = bench.outcome(trial, merge_trial(trial, ""), like, (outcome.picked[0],))
        at = outcome.picked[0]
        now, then = here.test[at], first(outcome, texts)
        line = {"method": trial.label, "rank": trial.rank or "as it comes", "texts": len(now)}
        line |= {"published, %": 100 * then.mean(), "here, %": 100 * now.mean()}
        lines.append(line | {"the same, %": 100 * (now == then).mean()})
    return pd.DataFrame(lines).set_index("method")


def first(outcome: Outcome, texts: int) -> np.ndarray:
    """The published outcomes of the first `texts` test texts of every task, at the scale that was chosen."""
    edges = np.cumsum([0, *outcome.sizes["test"]])
    bits = outcome.test[outcome.picked[0]]
    return np.concatenate([bits[a : min(b, a + texts)] for a, b in zip(edges, edges[1:])])
