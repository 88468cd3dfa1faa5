"""What the paper rests on, as functions of data/results: rows, streams, pairs, overlaps, curves.

Gains are in per cent, intervals hold 95 % of the resamples.
"""

from functools import cache

import numpy as np
import pandas as pd

import lora_opcm as lo
from lora_opcm.files.shipped import results
from lora_opcm.lab import travel
from lora_opcm.lab.bases.shapes import build, linear_shapes
from lora_opcm.lab.evidence import choice, growth, rows, streams, tables
from lora_opcm.lab.evidence import predictors as measures
from lora_opcm.lab.evidence.state import state_size
from lora_opcm.lab.generation import tables as generation

MAIN = ("task arithmetic", "TIES", "Iso-C", "OPCM", "TSV", "sequential whitening", "whitened sum")
STEPS = {0: "1", 1: "√2", 2: "2", 3: "2√2"}  # scales that need no data, in mean norms
RANKS = (None, rows.RANK)


@cache
def run() -> tables.Evidence:
    return tables.published()


@cache
def puzzle_run() -> generation.Run:
    return generation.Run()


@cache
def second() -> tables.Evidence:
    """The outcomes on the second encoder."""
    return travel.elsewhere()


@cache
def growth_curves() -> dict[str, pd.DataFrame]:
    """Each method against the number of adapters, ranks as they come; best of all adapters first."""
    found = {label: growth.curve(growth.published(), label) for label in growth.labels(growth.published())}
    return dict(sorted(found.items(), key=lambda item: -item[1].gain.iloc[-1]))


@cache
def bases() -> dict[str, travel.Base]:
    """The methods that were run on all bases, ranks as they come."""
    return travel.bases()


@cache
def puzzles(rank: int | None) -> pd.DataFrame:
    """Shares of the gain on the puzzles, one row a method."""
    return generation.gains(puzzle_run(), rank)


def guess(metric: str = "right") -> tuple[float, float, float]:
    """Gain of the commonest answers and its interval, in per cent."""
    run = puzzle_run()
    found = generation.interval(run.gain(run.weights["test"] @ run.commonest["test"][metric]), "x")
    return tuple(100 * x for x in found.values())


@cache
def pairs_at_rule(without: tuple[str, ...] = ()) -> dict[str, list[float]]:
    """Gain and interval of pairs of puzzles at the scale nearest to √2 mean norms, by method, in per cent."""
    found = generation.pair_gains(puzzle_run(), without)
    found["away"] = (found.scale / 2**0.5).apply(np.log).abs().fillna(0)
    nearest = found.sort_values("away").groupby("method").first()
    return {m: (100 * r[["exact", "exact low", "exact high"]].astype(float)).tolist() for m, r in nearest.iterrows()}


@cache
def pair_rows() -> dict[str, tables.Row]:
    """All pairs of the eight tasks together, by label; training seed 1."""
    return {label: run().row(each) for (label, _), each in run().select("pairs", seeds=(1,)).items()}


@cache
def ranked(rank: int | None) -> dict[str, tables.Row]:
    """Rows that make one adapter; those capped by their state stand at either rank."""
    rows_ = {label: row for (label, r), row in run().bake_off.items() if r == rank}
    rows_ |= {label: run().bake_off[label, None] for label in rows.CAPPED}
    return {label: row for label, row in rows_.items() if label not in ("zero-shot", "own adapter")}


def streamed() -> pd.DataFrame:
    """Every stream and cap over its orders, see `streams.table`."""
    return streams.table(run())


@cache
def at_rule(step: int, label: str, rank: int | None) -> tables.Row | None:
    return tables.at_step(run(), run().select("bake_off", run().seeds)[label, rank], step)


@cache
def overlaps() -> pd.DataFrame:
    """Cosines and φ of every pair and module over their nulls; `layer` is a number."""
    found = results("overlap")
    found["layer"] = found.module.str.extract(r"layer\.(\d)")[0].astype(int)
    for side in ("left", "right"):
        found[f"ratio {side}"] = found[f"phi_{side}"] / found[f"null_{side}"]
    return found.assign(**{"ratio cosine": found.cosine.abs() / found["cosine null"]})


@cache
def shapes() -> list[tuple[int, int]]:
    return [u.shape for u in lo.load_adapter(lo.adapter_path("tweets")).modules.values()]


def state(row: tables.Row, model: str = "") -> tuple[str, float]:
    """What is kept between two adapters, in words and in bytes."""
    sizes = linear_shapes(build(model)).values() if model else shapes()
    return state_size(row.outcomes[0].trial, sizes)


def _validated(outcome, option: int) -> dict[int, float]:
    """Validation accuracy of one option by the step of its scale, in per cent."""
    sizes = outcome.sizes["validation"]
    return {k: 100 * choice.score(bits, sizes) for (i, k), bits in sorted(outcome.validation.items()) if i == option}


def scale_curves() -> dict[str, dict[int, float]]:
    """Validation accuracy by the step of the scale, mean over seeds; the knob is the one that is chosen."""
    found = {}
    for label in MAIN:
        each = [_validated(o, o.picked[0][0]) for o in run().bake_off[label, None].outcomes]
        shared = sorted(set.intersection(*map(set, each)) & set(range(-2, 5)))
        found[label] = {k: float(np.mean([curve[k] for curve in each])) for k in shared}
    return found


def knob(label: str, name: str) -> dict[int | None, pd.DataFrame]:
    """Validation accuracy at the best scale of each value of a knob, one row a seed; by rank."""
    return {
        rank: pd.DataFrame(
            [
                {options[name]: max(_validated(o, i).values()) for i, options in enumerate(o.trial.options)}
                for o in run().bake_off[label, rank].outcomes
            ]
        )
        for rank in RANKS
    }


def powers() -> dict[int | None, pd.DataFrame]:
    """As `knob`, for the power of the whitened sum; at power 0 it is TSV with all directions."""
    found = knob("whitened sum", "power")
    for rank, frame in found.items():
        frame.insert(0, 0.0, [max(_validated(o, 0).values()) for o in run().bake_off["TSV", rank].outcomes])
    return found


@cache
def predictors() -> dict[str, tuple[float, float, float]]:
    """Spearman's ρ of each measure of overlap with what a pair loses when added, and its interval over tasks."""
    lost = measures.losses("sum, scale 1")
    return {name: measures.correlation(measure, lost) for name, measure in measures.published().items()}


def control() -> dict[str, float]:
    """φ of outputs over its null, the mean of pairs of adapters, by whether their labels were "true" or "shuffled"."""
    return {name: times["φ outputs"].mean() for name, times in measures.controlled().items()}


@cache
def few_texts(count: int = 20) -> pd.Series:
    """Points of accuracy lost where so few validation texts a task choose, over the main rows of the first seed: the
    mean, and the 95th percentile of draws."""
    outcomes = [run().bake_off[label, rank].outcomes[0] for label in MAIN for rank in RANKS]
    return tables.few_texts(outcomes, (count,))[["texts", "lost", "worst"]].mean().round(9)
