"""Modules side by side on the cores."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

from .numerics import full_precision

# (iterable, total=length) -> the same items, one by one as they are taken: how `tqdm.tqdm` is called
Progress = Callable[..., Iterable]


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
