"""Modules side by side on the cores."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch


def parallel_map(function: Callable, items: Iterable) -> list:
    """`[function(x) for x in items]`, one thread a core and one LAPACK thread in each.

    A factorisation of a core of a few hundred rows gains nothing from more threads and waits at every barrier
    when other programs use the cores; independent modules gain the number of cores. Products of float32 matrices
    are float32 inside, whatever a training script allowed them to be (TF32 or bfloat16, on any device).
    """
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    try:
        if threads == 1:
            return [function(x) for x in items]
        # OpenMP keeps its number of threads per thread: each worker must be told.
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, items))
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
