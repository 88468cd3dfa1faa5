"""What an interval draws again: texts inside their task, and units of which there are few, such as training seeds."""

import zlib
from functools import cache

import numpy as np

RESAMPLES = 1000


@cache
def draws(task: str, count: int, split: str) -> np.ndarray:
    """How often each text of a task counts, shape=[1 + resamples, texts]; the first row is no resample.

    Texts are drawn with replacement inside the task, and the same ones wherever it occurs: what is compared is compared
    on the same texts, whatever other tasks stand beside them and in whatever order.
    """
    rng = np.random.default_rng(zlib.crc32(task.encode()) + (split == "validation"))
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    return np.concatenate([np.ones((1, count)), drawn]).astype(np.float32)


@cache
def redrawn(count: int, seed: int, size: int = RESAMPLES, often: int | None = None) -> np.ndarray:
    """Weights of a few units, such as training seeds or tasks, drawn with replacement, shape=[1 + size, units].

    The mean of n units that are drawn from n varies by (n − 1)/n of what the mean of n other units does, by half of it
    where there are two. So n − 1 of n are drawn; or `often`, and what that moves is stretched by √(often/(n − 1)), so
    that weights may fall below zero (Rao and Wu, Resampling inference with complex survey data, 1988). Rows sum to
    one; the first is no resample.
    """
    others, even = max(count - 1, 1), np.full((1, count), 1 / count)
    often = often or others
    drawn = np.random.default_rng(seed).multinomial(often, even[0], size=size) / often
    return np.concatenate([even, even + (often / others) ** 0.5 * (drawn - even)])
