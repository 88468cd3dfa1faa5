"""`python -m lora_opcm.lab.experiments.desk`: every weighted sum of two adapters on a grid of weights, all pairs.

What both tasks get right with w₁ΔW₁ + w₂ΔW₂ is the map that *Two LoRAs* shows: every method that only scales its
parts is a point of it. It goes on where it stopped, for every evaluation is kept by content.
"""

from collections.abc import Iterator
from itertools import combinations, product
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from ...files import Adapter
from ..evaluation import Evaluator
from ..tasks import load_task
from .adapters import adapters_of
from .results import save_results

WEIGHTS = (0.0, 0.5, 1.0, 1.5, 2.0)  # the mean, the sum and either adapter alone are points of the grid
TEXTS = 128  # of each task


def weighted(first: Adapter, second: Adapter, weights: tuple[float, float]) -> tuple[Adapter | None, float]:
    """w₁ΔW₁ + w₂ΔW₂ as an adapter and a factor; None is the base model alone."""
    match weights:
        case 0, 0:
            return None, 1.0
        case w, 0:
            return first, w
        case 0, w:
            return second, w
    return weights[0] * first + weights[1] * second, 1.0


def grid(evaluator: Evaluator, adapters: dict[str, Adapter], pair: tuple[str, str]) -> Iterator[dict]:
    """A row for each point: the weights, and how many texts of each task are right."""
    first, second = (adapters[task] for task in pair)
    for weights in product(WEIGHTS, WEIGHTS):
        adapter, scale = weighted(first, second, weights)
        right = evaluator.correct(adapter, pair, scale=scale)
        yield {
            "first": pair[0], "second": pair[1], "weight of first": weights[0], "weight of second": weights[1],
            "first right": int(right[pair[0]].sum()), "second right": int(right[pair[1]].sum()),
            "texts of first": len(right[pair[0]]), "texts of second": len(right[pair[1]]),
            "adapters": f"{first.id[:8]}+{second.id[:8]}",
        }  # fmt: skip


def main(
    texts: Annotated[int, typer.Option(help="of the test texts of each task; 0: all")] = TEXTS,
    to: Annotated[Path, typer.Option(help="a folder")] = Path("data/results"),
):
    """Measure the adapters that ship, and write the table."""
    adapters = adapters_of()
    evaluator = Evaluator([load_task(t) for t in adapters], limit=texts or None, remember=True, fast=True)
    rows = [row for pair in combinations(adapters, 2) for row in grid(evaluator, adapters, pair)]
    save_results(pd.DataFrame(rows), to, "desk", profile="full", precision=evaluator.precision)


if __name__ == "__main__":
    typer.run(main)
