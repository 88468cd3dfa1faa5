"""Modules side by side on the cores."""

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice

import torch

from .numerics import full_precision

# (iterable, total=length) -> the same items, one by one as they are taken: how `tqdm.tqdm` is called
Progress = Callable[..., Iterable]

# Seconds of work that keep one thread more at work. Python's lock goes from hand to hand between two calls into torch,
# and threads of less work than this wait for it longer than they work: sixteen of them took a module of 18 ms to 53.
WORTH = 8e-3


@full_precision()
def parallel_map(
    function: Callable, items: Iterable, progress: Progress | None = None, worth: float | None = None
) -> list:
    """`[function(x) for x in items]`, on as many cores as the items are worth, one LAPACK thread in each.

    A factorisation of a core of a few hundred rows gains nothing from more threads and waits at every barrier
    when other programs use the cores; independent modules gain the number of cores, if each is long enough (`worth`
    seconds, `WORTH` unless given; at 0 all cores are at work at once).
    `progress` is wrapped around the results as they come.
    """
    items, worth = list(items), WORTH if worth is None else worth
    watch = (lambda results: progress(results, total=len(items))) if progress else iter
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if threads == 1:
            return list(watch(map(function, items)))
        # OpenMP keeps its number of threads per thread: each worker must be told.
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(watch(_results(pool, function, items, threads, worth)))
    finally:
        torch.set_num_threads(threads)


def _results(pool: ThreadPoolExecutor, function: Callable, items: list, threads: int, worth: float) -> Iterator:
    """The results in order. As many items are at work as the last that was done says by its time, one more whenever
    none is done in the time that is worth a thread, and none in a thread of its own where they are worth one."""

    def timed(at: int) -> tuple:
        start = time.thread_time()
        return at, function(items[at]), time.thread_time() - start

    done: dict = {}
    running: set[Future] = set()
    left, side_by_side, known = iter(range(len(items))), 1, False
    for i in range(len(items)):
        while i not in done:
            begun = list(islice(left, max(0, side_by_side - len(running))))
            if known and side_by_side == 1 and not running:
                found: Iterator[tuple] = map(timed, begun)
            else:
                running |= {pool.submit(timed, at) for at in begun}
                ready, running = wait(running, None if side_by_side == threads else worth, FIRST_COMPLETED)
                found = (job.result() for job in ready)
                if not ready:
                    side_by_side = min(side_by_side + 1, threads)
            for at, result, seconds in found:
                done[at], known = result, True
                side_by_side = max(1, min(round(seconds / worth), threads)) if worth else threads
        yield done.pop(i)
