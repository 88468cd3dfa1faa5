"""Modules side by side on the cores."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

# (iterable, total=length) -> the same items, one by one as they are taken: how `tqdm.tqdm` is called
Progress = Callable[..., Iterable]


_lock, _inside, _before = threading.RLock(), 0, ()


@contextmanager
def full_precision():
    """Products of float32 matrices are float32 inside, whatever a training script allowed (TF32, bfloat16).

    The settings are those of the whole process: the first of several threads saves them, the last restores them.
    """
    global _inside, _before
    with _lock:
        if not _inside:
            _before = _highest()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _restore(*_before)


def _backends() -> list:
    """What holds a precision of its own, in torch 2.9 and later."""
    found = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    return [b for b in found if hasattr(b, "fp32_precision")]


def _highest() -> tuple[str, list[str]]:
    """Set full precision; what was set before, for `_restore`.

    torch keeps an old setting and a new one, and refuses to say either where they disagree. The new one goes
    first: with it at "ieee" the old one can be asked for, and both are moved, so that inside nothing disagrees.
    """
    new = [b.fp32_precision for b in _backends()]
    for b in _backends():
        b.fp32_precision = "ieee"
    old = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    return old, new


def _restore(old: str, new: list[str]) -> None:
    torch.set_float32_matmul_precision(old)
    for b, precision in zip(_backends(), new):
        b.fp32_precision = precision


@full_precision()
def parallel_map(function: Callable, items: Iterable, progress: Progress | None = None) -> list:
    """`[function(x) for x in items]`, one thread a core and one LAPACK thread in each.

    A factorisation of a core of a few hundred rows gains nothing from more threads and waits at every barrier
    when other programs use the cores; independent modules gain the number of cores. `progress` is wrapped
    around the results as they come.
    """
    items = list(items)
    watch = (lambda results: progress(results, total=len(items))) if progress else iter
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if threads == 1:
            return list(watch(map(function, items)))
        # OpenMP keeps its number of threads per thread: each worker must be told.
        pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
        try:
            return list(watch(pool.map(function, items)))
        finally:
            pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C, not all that is left
    finally:
        torch.set_num_threads(threads)
