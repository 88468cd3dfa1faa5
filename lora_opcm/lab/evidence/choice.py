"""Choosing a scale on validation texts, and the same choice in every resample of them.

A scale is given by what it makes of the merged adapter: its norm in units of the mean norm of the adapters that
went in (`ratio`). The grid is geometric and the same for every method: 2^(step/2), from a half to four, and on at
either end until the best is inside.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from ..resampling import draws

START = range(-2, 5)  # steps: ratios ½, 1/√2, 1, √2, 2, 2√2, 4
ENDS = (-8, 10)
RULE = 2  # the step of the rule without data, min(√T, 2) mean norms, for four adapters or more: see `rule`
DIGITS = 9  # of a score: two that differ by less are equal
Candidate = tuple[int, int]  # which options of the row, and the step of the scale


def ratio(step: int) -> float:
    """The norm of the merged adapter in units of the mean norm of its parts."""
    return 2 ** (step / 2)


def rule(count: int) -> int:
    """The step nearest to the rule without data for so many adapters."""
    return min(round(np.log2(count)), RULE)


def shares(bits: np.ndarray, tasks: Sequence[str], sizes: Sequence[int], split: str) -> np.ndarray:
    """The share of right texts of each task, shape=[1 + resamples, tasks, candidates].

    Whole numbers are counted, which single precision does exactly: no machine breaks a tie that another does not.

    Parameters
    ----------
    bits : bool array, shape=[texts, candidates], in the order of the tasks
    sizes : texts of each task
    """
    found, start = [], 0
    for task, count in zip(tasks, sizes, strict=True):
        right = draws(task, count, split) @ bits[start : start + count].astype(np.float32)
        found.append(right.astype(float) / count)
        start += count
    return np.stack(found, 1)


def score(bits: np.ndarray, sizes: Sequence[int]) -> float:
    """The share of right texts, averaged over tasks; rounded, so that equal ones are equal."""
    return round(float(np.mean([part.mean() for part in np.split(bits, np.cumsum(sizes)[:-1])])), DIGITS)


def search(score: Callable[[int, int], float], options: int, start: Iterable[int] = START) -> dict[Candidate, float]:
    """The score of every candidate: the grid, and beyond an end of it while the best stands there.

    Every row of options has a grid of its own to extend.
    """
    found = {}
    for i in range(options):
        steps = {k: score(i, k) for k in start}
        while True:
            best = max(steps.values())
            low, high = min(steps), max(steps)
            if steps[high] == best and high < ENDS[1]:
                steps[high + 1] = score(i, high + 1)
            elif steps[low] == best and low > ENDS[0]:
                steps[low - 1] = score(i, low - 1)
            else:
                break
        found |= {(i, k): value for k, value in steps.items()}
    return found


def best(scores: Mapping[Candidate, float]) -> Candidate:
    """The candidate of the highest score; of several, the middle one of the options that have most of them."""
    top = max(scores.values())
    tied = [c for c, value in scores.items() if value == top]
    options = max(sorted({i for i, _ in tied}), key=lambda i: sum(i == j for j, _ in tied))
    steps = sorted(k for i, k in tied if i == options)
    return options, steps[len(steps) // 2]


def chosen(right: Mapping[Candidate, np.ndarray], tasks: Sequence[str], sizes: Sequence[int]) -> list[Candidate]:
    """What validation texts choose: first from all of them, then from every resample, by the same rule.

    Parameters
    ----------
    right : candidate → bool array, shape=[texts], in the order of the tasks
    sizes : texts of each task
    """
    names = list(right)
    bits = np.stack([right[c] for c in names], 1)
    scores = shares(bits, tasks, sizes, "validation").mean(1).round(DIGITS)  # (1 + B, candidates)
    picked = [names[j] for j in scores.argmax(1)]
    for j in np.flatnonzero((scores == scores.max(1, keepdims=True)).sum(1) > 1):
        picked[j] = best(dict(zip(names, scores[j].tolist(), strict=True)))
    return picked
