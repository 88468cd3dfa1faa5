"""What the weights of two adapters say of their overlap, and whether that foretells what a merge of the two loses.

`python -m lora_opcm.lab.evidence.predictors FOLDER` writes the table that stands in data/results beside the outcomes of
the same adapters, which are too large to ship; with `--control` that of adapters whose labels were shuffled, beside
those of the same tasks, starts and texts with labels that are right.
"""

from itertools import combinations
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer
from scipy.stats import spearmanr

from ...files import Adapter, load_adapter
from ...files.paired import similarity
from ...files.shipped import adapter_path, results
from ...lowrank import LowRank
from ..experiments.adapters import contents
from ..experiments.results import save_results
from ..resampling import redrawn
from ..tasks import tasks
from . import recipes, tables
from .choice import Candidate

COLUMNS = ("|cosine|", "φ outputs", "φ inputs", "φ product", "weighted inputs", "weighted outputs")
K = 8  # leading directions that φ compares
CONTROL = "shuffled labels"


def weighted(x: LowRank, y: LowRank) -> tuple[float, float]:
    """‖X Yᵀ‖ and ‖Xᵀ Y‖ over ‖X‖‖Y‖: shared inputs and shared outputs, each direction with its size."""
    (ux, sx, vx), (uy, sy, vy) = x.svd(), y.svd()
    inputs, outputs = (float((sx[:, None] * inner * sy).norm()) for inner in (vx @ vy.mT, ux.mT @ uy))
    size = float(sx.norm() * sy.norm())
    return inputs / size, outputs / size


def predictors(a: Adapter, b: Adapter) -> dict[str, float]:
    """Six measures of overlap, in the order of `COLUMNS`, each the mean over modules."""
    table = similarity(a, b, k=K, l=K)
    inputs, outputs = np.mean([weighted(a.modules[name], b.modules[name]) for name in table.index], 0)
    product = table.phi_left * table.phi_right
    means = table.cosine.abs().mean(), table.phi_left.mean(), table.phi_right.mean(), product.mean(), inputs, outputs
    return dict(zip(COLUMNS, map(float, means), strict=True))


def losses(label: str, at: Candidate | None = None) -> np.ndarray:
    """Points of accuracy a task loses against its own adapter in a merge of two, shape=[pairs, 1 + resamples].

    The mean of both tasks, for the pairs of `published`, with the scale that validation texts choose or `at` one.
    """
    run = tables.published()
    [outcomes] = run.select("pairs", (1,), label=label).values()
    if [o.trial.tasks for o in outcomes] != list(published().index):
        raise ValueError(f"{label}: its pairs are not those of data/results/predictors.csv")
    row = run.row(outcomes, (lambda outcome: at) if at else None)
    return 100 * (row.own - row.accuracy).mean(2)


def correlation(measure: pd.Series, lost: np.ndarray, count: int = 2000) -> tuple[float, float, float]:
    """Spearman's ρ of a measure, indexed by the two tasks of each pair, with `losses`; its 95 % interval.

    Pairs share tasks, so the interval draws tasks with replacement: a pair counts as often as both of its tasks were
    drawn, and loses what it does in one resample of the texts.
    """
    x, draws = measure.to_numpy(), []
    names = sorted({task for pair in measure.index for task in pair})
    ends = np.array([[names.index(task) for task in pair] for pair in measure.index])
    for i, weights in enumerate(redrawn(len(names), 0, count)[1:]):
        r = 1 + i % (lost.shape[1] - 1)
        often = (weights * (len(names) - 1)).round().astype(int)[ends].prod(1)
        sample = np.repeat(np.arange(len(ends)), often)
        if len(np.unique(x[sample])) > 2:
            draws.append(spearmanr(x[sample], lost[sample, r])[0])
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return float(spearmanr(x, lost[:, 0])[0]), float(low), float(high)


def main(
    folder: Annotated[Path, typer.Argument(help="of a run, with its adapters")],
    seed: Annotated[int, typer.Option(help="of training")] = 1,
    control: Annotated[bool, typer.Option(help="of the tasks that were learned with shuffled labels, too")] = False,
    to: Annotated[Path, typer.Option(help="a folder")] = Path("data/results"),
):
    """Write the table of all pairs of the eight tasks, or of the control."""
    kinds = ("published", CONTROL) if control else ("published",)
    names = [task for task in tasks() if all(recipes.there(folder, kind, seed, task) for kind in kinds)]
    rows = []
    for kind in kinds:
        adapters = {task: recipes.adapter(str(folder), kind, seed, task) for task in names}
        rows += [
            {"first": a, "second": b, "seed": seed, "adapters": contents([adapters[a], adapters[b]])}
            | predictors(adapters[a], adapters[b])
            | ({"recipe": kind} if control else {})
            for a, b in combinations(names, 2)
        ]
    save_results(pd.DataFrame(rows), to, "control" if control else "predictors", profile="gpu")


def published() -> pd.DataFrame:
    """The table that ships with the package, shape=[pairs, 6], indexed by the two tasks."""
    return results("predictors").set_index(["first", "second"])[list(COLUMNS)]


def chance() -> pd.Series:
    """What unrelated updates of the shapes of the shipped adapters would show, of the first three measures.

    Of the cosine that is a little too much: its square has the mean of a normal number's, but longer tails.
    """
    m, n = np.array([u.shape for u in load_adapter(adapter_path(tasks()[0])).values()]).T
    cosine = np.sqrt(2 / np.pi / (m * n))  # the mean size of a normal number of variance 1 / mn
    return pd.Series(dict(zip(COLUMNS, (cosine.mean(), (K / m).mean(), (K / n).mean()), strict=False)))


def controlled() -> dict[str, pd.DataFrame]:
    """The first three measures of the pairs of the control, in multiples of `chance`, shape=[pairs, 3].

    With the labels of the texts, "true", and with "shuffled" ones.
    """
    table, null = results("control").set_index(["first", "second"]), chance()
    kinds = {"true": "published", "shuffled": CONTROL}
    return {name: table.loc[table.recipe == kind, null.index] / null for name, kind in kinds.items()}


if __name__ == "__main__":
    typer.run(main)
