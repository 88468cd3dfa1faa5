"""What the published run compares: methods with at most one knob beside the scale, and of which adapters."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

import numpy as np

from ..experiments.trials import orders
from ..tasks import small_tasks, tasks
from .outcomes import Trial

SEEDS = (1, 2, 3, 4, 5)
RANK = 16  # of one adapter


def _knob(name: str, *values, **fixed) -> tuple[dict, ...]:
    return tuple({name: value} | fixed for value in values)


# label → method, what its knob may be: three values at most
ROWS: dict[str, tuple[str, tuple[dict, ...]]] = {
    "task arithmetic": ("cat", ({},)),
    "TIES": ("ties", _knob("density", 0.1, 0.2, 0.5)),
    "DARE": ("dare", _knob("density", 0.5)),
    "DARE-TIES": ("dare_ties", _knob("density", 0.5)),
    "magnitude prune": ("magnitude_prune", _knob("density", 0.1, 0.3, 0.5)),
    "KnOTS-TIES": ("knots_ties", _knob("density", 0.2, 0.5, 0.8)),
    "core TIES": ("core_ties", _knob("density", 0.2, 0.5, 0.8)),
    "compress then merge": ("ctm", _knob("k", 16, 32, 64)),
    "chordal mean": ("chordal_mean", _knob("k", 16, 32, 64)),
    "quotient mean": ("quotient_mean", ({},)),
    "TSV": ("tsv", _knob("directions", None, 8, 4)),
    "Iso-C": ("iso_c", ({},)),
    "Iso-CTS": ("iso_cts", _knob("common", 0.5, 0.8, 0.95)),
    "OPCM": ("opcm", _knob("alpha", 0.5, 0.75, 0.9)),
    "OPCM, FusionBench": ("opcm", _knob("alpha", 0.5, 0.75, 0.9, variant="fusionbench")),
    "factor-wise OPCM, balanced": ("lora_opcm", _knob("alpha", 0.25, 0.5, 0.75, gauge="balanced")),
    "sequential whitening": ("whitening", ({},)),
    "whitened sum": ("whitened_sum", _knob("power", 0.25, 0.5, 1.0)),
    "output whitening": ("whitened_sum", _knob("power", 0.0, 0.5, 1.0, sides="left")),
    "input whitening": ("whitened_sum", _knob("power", 0.0, 0.5, 1.0, sides="right")),
    "MagMax": ("magmax", ({},)),
    "subspace boosting": ("subspace_boosting", _knob("beta", 0.3, 0.5, 0.7)),
    "SVC": ("svc", _knob("alpha", 0.25, 0.5, 1.0)),
    "Pico": ("pico", ({},)),
    "WUDI": ("wudi", _knob("ridge", 0.001, 0.01, 0.1)),
    "ACTMat": ("actmat", _knob("ridge", 0.0, 0.01, 0.1)),
    "DOP": ("dop", _knob("alpha", 0.5, 0.8, 0.95)),
}
AS_PUBLISHED = {  # scales of their own, nothing chosen
    "mean": ("mean", ({},)),
    "OPCM as published": ("opcm", ({"alpha": 0.5, "scale": "norm"},)),
    "sum, scale 1": ("cat", ({},)),
}
CAPPED = {
    "whitened sum, cap 16": ("whitened_sum", _knob("power", 0.0, 0.25, 0.5, cap=16)),
    "output whitening, cap 16": ("whitened_sum", _knob("power", 0.0, 0.5, 1.0, cap=16, sides="left")),
}
MAIN = ("task arithmetic", "TIES", "TSV", "Iso-C", "OPCM", "whitened sum", "output whitening")


# one at a time, and no more kept between two than one adapter of the cap's rank
STREAMS: dict[str, tuple[str, tuple[dict, ...]]] = {
    "running sum": ("cat", ({},)),
    "OPCM": ("opcm", _knob("alpha", 0.5, 0.75)),
    "output whitening": ("whitened_sum", _knob("power", 0.0, 0.5, 1.0, sides="left")),
    "whitened sum": ("whitened_sum", _knob("power", 0.0, 0.25, 0.5)),
    "sequential whitening": ("whitening", ({},)),
}
CAPS = {16: 20, 32: 5, 64: 5}  # rank → orders tried
ALPHAS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
CUTS = (4, 8, 32, 64, 128)
SUBSETS = {2: 6, 4: 4, 8: 3, 16: 2, 20: 1}  # how many small tasks → how many draws of them
GROWTH_ROWS = ("task arithmetic", "TSV", "Iso-C", "OPCM", "whitened sum", "output whitening")
PAIR_ROWS = ("task arithmetic", "TIES", "TSV", "OPCM", "whitened sum", "output whitening")


def _row(part: str, label: str, rows=None, **rest) -> Trial:
    method, options = (rows or ROWS | CAPPED)[label]
    return Trial(part, label, method, options=options, **rest)


def bounds(part: str, **rest) -> Iterator[Trial]:
    """The base model, and each task with its own adapter: what gains are measured between."""
    yield Trial(part, "zero-shot", "", natural=True, **rest)
    yield Trial(part, "own adapter", "own", natural=True, **rest)


def as_published(part: str, labels=tuple(AS_PUBLISHED), **rest) -> Iterator[Trial]:
    """Rows whose scale is their own."""
    for label in labels:
        method, options = AS_PUBLISHED[label]
        yield Trial(part, label, method, options=options, natural=True, **rest)


def bake_off(seed: int, recipe: str = "published") -> Iterator[Trial]:
    """Every method on the eight tasks, as its rank comes and cut to that of one adapter."""
    rest = {"tasks": tasks(), "seed": seed, "recipe": recipe}
    yield from bounds("bake_off", **rest)
    for rank in (RANK, None):
        yield from (_row("bake_off", label, rank=rank, **rest) for label in ROWS)
    yield from (_row("bake_off", label, **rest) for label in CAPPED)
    yield from as_published("bake_off", **rest)
    if recipe == "published":
        yield Trial("bake_off", "RegMean, with texts", "regmean", natural=True, **rest)
        yield Trial("bake_off", "one LoRA on all tasks", "joint", natural=True, **rest)


def stream(seed: int) -> Iterator[Trial]:
    """Streams of bounded memory in many orders; the first order chooses the scale for all (`steps=()`)."""
    for cap, count in CAPS.items():
        for label in ("TSV", "whitened sum", "output whitening", "sequential whitening") if cap != RANK else ():
            yield _row("joint", label, rank=cap, tasks=tasks(), seed=seed)
        for order in orders(count):
            names = tuple(tasks()[i] for i in order)
            steps = None if names == tasks() else ()
            for label in STREAMS:
                yield _row("stream", label, STREAMS, tasks=names, seed=seed, rank=cap, cap=cap, steps=steps)


def carried(seed: int) -> Iterator[Trial]:
    """Sequential whitening in a few orders at twice the mean norm, which no text of this seed has chosen."""
    for order in orders(6):
        names = tuple(tasks()[i] for i in order)
        rest = {"tasks": names, "seed": seed, "rank": RANK, "cap": RANK}
        yield _row("stream", "sequential whitening", STREAMS, steps=((0, 2),), **rest)


def pairs(seed: int) -> Iterator[Trial]:
    """Two adapters: all 28 pairs."""
    for names in combinations(tasks(), 2):
        rest = {"tasks": names, "seed": seed}
        yield from as_published("pairs", ("mean", "sum, scale 1", "OPCM as published"), **rest)
        yield from (_row("pairs", label, **rest) for label in PAIR_ROWS)


def two_into_one() -> Iterator[Trial]:
    """All pairs of shipped adapters at the rank of one, by means of subspaces and by sums."""
    rest = {"seed": 0, "recipe": "book"}
    yield from bounds("two into one", tasks=tasks(), **rest)
    for names in combinations(tasks(), 2):
        for label in ("chordal mean", "quotient mean", "task arithmetic", "TSV"):
            yield _travelled(_row("two into one", label, tasks=names, rank=RANK, **rest))


def growth(seed: int) -> Iterator[Trial]:
    """From 2 to 20 small tasks: how the best scale moves, at knobs of other tasks; a whole curve before the next."""
    rng = np.random.default_rng(0)
    yield from bounds("growth", tasks=small_tasks(), seed=seed)
    drawn = [
        (i, tuple(small_tasks()[j] for j in sorted(rng.choice(len(small_tasks()), count, replace=False))))
        for count, draws in SUBSETS.items()
        for i in range(draws)
    ]
    for rank in (None, RANK):
        for _, names in sorted(drawn, key=lambda one: one[0]):
            for label in GROWTH_ROWS:
                yield _travelled(_row("growth", label, tasks=names, seed=seed, rank=rank))


def fours(seed: int, recipe: str) -> Iterator[Trial]:
    """Four of the eight tasks, every other one, and two pairs of these: what lies between one adapter and eight."""
    names = tasks()[1::2]
    yield from bounds("growth", tasks=names, seed=seed, recipe=recipe)
    for some in (names, names[:2], names[2:]):
        for label in GROWTH_ROWS:
            yield _travelled(_row("growth", label, tasks=some, seed=seed, recipe=recipe))


def robustness(seed: int) -> Iterator[Trial]:
    """The main rows on adapters trained otherwise."""
    for recipe in ("rank 4", "rank 64", "q and v", "400 steps", "one start", "uneven"):
        rest = {"tasks": tasks(), "seed": seed, "recipe": recipe}
        yield from bounds("robustness", **rest)
        yield from (_row("robustness", label, **rest) for label in MAIN)


def knobs(seed: int) -> Iterator[Trial]:
    """What α and the rank do."""
    rest = {"tasks": tasks(), "seed": seed}
    for alpha in ALPHAS:
        yield Trial("alpha", f"OPCM, α = {alpha:g}", "opcm", options=({"alpha": alpha},), **rest)
    yield from (_row("rank", label, rank=rank, **rest) for rank in CUTS for label in MAIN)


# On other tasks or another base the knob stays where the middle one of seeds 1 to 3 put it on the eight tasks with
# MiniLM, and the scale is chosen anew.
TRAVELLED = {
    "TIES": {"density": 0.5},
    "KnOTS-TIES": {"density": 0.2},
    "core TIES": {"density": 0.2},
    "TSV": {"directions": None},
    "Iso-CTS": {"common": 0.95},
    "OPCM": {"alpha": 0.75},
    "whitened sum": {"power": 0.5},
    "output whitening": {"power": 1.0, "sides": "left"},
    "DOP": {"alpha": 0.95},
}


def _travelled(trial: Trial) -> Trial:
    return replace(trial, options=(TRAVELLED.get(trial.label, trial.options[0]),))


def elsewhere(base: str, seed: int = 1) -> list[Trial]:
    """The main rows on another base, pairs at scales that nothing chose, and two and four adapters at chosen ones."""
    rest = {"tasks": tasks(), "seed": seed, "recipe": base}
    found = [*bounds("bake_off", **rest), *as_published("bake_off", **rest)]
    labels = ("task arithmetic", "Iso-C", "sequential whitening", *TRAVELLED)
    for label in labels:
        found.append(_travelled(_row("bake_off", label, **rest)))
    found += [replace(t, rank=RANK) for t in found if t.label in (*MAIN, "sequential whitening") and not t.natural]
    for names in combinations(tasks(), 2):
        found += as_published("pairs", **rest | {"tasks": names})
    return [*found, *fours(seed, base)]


def published() -> list[Trial]:
    """All trials, what the book's conclusions rest on first."""
    found = [*bake_off(1), *bake_off(2), *bake_off(3), *stream(1), *pairs(1), *bake_off(4), *bake_off(5)]
    found += [*stream(4), *stream(5), *growth(4), *robustness(4), *knobs(4), *knobs(5), *pairs(4), *pairs(5)]
    found += [*bake_off(0, "book"), *two_into_one(), *carried(2), *carried(3)]
    return list(dict.fromkeys(found))
