"""Choosing a scale on validation texts, and the same choice in every resample of them.

A scale is given by what it makes of the merged adapter: its norm in units of the mean norm of the adapters that
went in (`ratio`). The grid is geometric and the same for every method: 2^(step/2), from a half to four, and on at
either end until the best is inside.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache

import numpy as np

START = range(-2, 5)  # steps: ratios ½, 1/√2, 1, √2, 2, 2√2, 4
ENDS = (-8, 10)
RESAMPLES = 1000
Candidate = tuple[int, int]  # which options of the row, and the step of the scale


def ratio(step: int) -> float:
    """The norm of the merged adapter in units of the mean norm of its parts."""
    return 2 ** (step / 2)


@cache
def weights(sizes: tuple[int, ...], seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """Weights of texts in a mean over tasks, shape=[1 + resamples, texts]; the first row is no resample.

    Texts are drawn with replacement inside each task. The same sizes and seed give the same draws, so what is
    compared is compared on the same texts.
    """
    rng, parts = np.random.default_rng(seed), []
    for n in sizes:
        drawn = rng.multinomial(n, np.full(n, 1 / n), size=resamples)
        parts.append(np.concatenate([np.ones((1, n), int), drawn]) / n / len(sizes))
    return np.concatenate(parts, 1).astype(np.float32)


def search(score: Callable[[int, int], float], options: int) -> dict[Candidate, float]:
    """The score of every candidate: the grid, and beyond an end of it while the best stands there.

    Every row of options has a grid of its own to extend.
    """
    found = {}
    for i in range(options):
        steps = {k: score(i, k) for k in START}
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
    tied = [c for c, value in scores.items() if value >= top - 1e-9]
    options = max({i for i, _ in tied}, key=lambda i: sum(i == j for j, _ in tied))
    steps = sorted(k for i, k in tied if i == options)
    return options, steps[len(steps) // 2]


def chosen(right: Mapping[Candidate, np.ndarray], sizes: Sequence[int], seed: int = 1) -> list[Candidate]:
    """What validation texts choose: first from all of them, then from every resample.

    Parameters
    ----------
    right : candidate → bool array, shape=[texts], in the order of the tasks
    sizes : texts of each task
    """
    names = list(right)
    scores = weights(tuple(sizes), seed).astype(float) @ np.stack([right[c] for c in names]).T  # (1 + B, C)
    picked = [names[j] for j in scores.round(9).argmax(1)]  # ties by order, not by rounding
    picked[0] = best(dict(zip(names, scores[0].tolist(), strict=True)))
    return picked
