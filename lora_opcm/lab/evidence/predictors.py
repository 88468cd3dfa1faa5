"""`python -m lora_opcm.lab.evidence.predictors FOLDER`: what the weights of two adapters say of their overlap.

The table stands in data/results beside the outcomes of the same adapters, which are too large to ship.
"""

from itertools import combinations
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer

from ...files import Adapter
from ...files.paired import similarity
from ...files.shipped import results
from ...lowrank import LowRank
from ..experiments.results import save_results
from ..tasks import tasks
from . import recipes

COLUMNS = ("|cosine|", "φ outputs", "φ inputs", "φ product", "weighted inputs", "weighted outputs")
K = 8  # leading directions that φ compares


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


def main(
    folder: Annotated[Path, typer.Argument(help="of a run, with its adapters")],
    seed: Annotated[int, typer.Option(help="of training")] = 1,
    to: Annotated[Path, typer.Option(help="a folder")] = Path("data/results"),
):
    """Write the table of all pairs of the eight tasks."""
    adapters = {task: recipes.adapter(str(folder), "published", seed, task) for task in tasks()}
    rows = [
        {"first": a, "second": b, "seed": seed, "adapters": f"{adapters[a].id[:8]}+{adapters[b].id[:8]}"}
        | predictors(adapters[a], adapters[b])
        for a, b in combinations(tasks(), 2)
    ]
    save_results(pd.DataFrame(rows), to, "predictors", profile="gpu")


def published() -> pd.DataFrame:
    """The table that ships with the package, shape=[pairs, 6], indexed by the two tasks."""
    return results("predictors").set_index(["first", "second"])[list(COLUMNS)]


if __name__ == "__main__":
    typer.run(main)
