"""What one call takes: seconds, memory, calls of torch, page faults; and of several calls, which takes longer."""

import ctypes
import gc
import re
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def cost(function: Callable) -> tuple[object, float, float]:
    """What a call returns, its seconds, and by how many MB the process grew while it ran (NaN off Linux)."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before must not hide what this call takes
    before = _memory("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    except OSError:
        before = float("nan")
    start = time.perf_counter()
    result = function()
    seconds = time.perf_counter() - start
    return result, seconds, _memory("VmHWM") - before


def _memory(what: str) -> float:
    try:
        return int(re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    except OSError:
        return float("nan")


def best(function: Callable, runs: int = 3) -> float:
    """Seconds of the fastest of `runs` calls."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def in_turn(ways: dict[str, Callable], rounds: int = 5) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds of the processor for each way, least of the rounds; and how many times the first one the others
    take, by the clock, median over rounds. A first round, in which memory is got, does not count."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for i in range(rounds + 1):
        for name, way in list(ways.items())[:: 1 if i % 2 else -1]:
            start, before = time.perf_counter(), time.process_time()
            way()
            seconds[name].append((time.process_time() - before, time.perf_counter() - start))
    first, *others = ways
    used = {f"{name}, ms": 1e3 * min(cpu for cpu, _ in times[1:]) for name, times in seconds.items()}
    clock = {name: [wall for _, wall in times[1:]] for name, times in seconds.items()}
    ratio = lambda name: statistics.median(a / b for a, b in zip(clock[name], clock[first], strict=True))  # noqa: E731
    return used, {f"{name} / {first}": ratio(name) for name in others}


class Calls(TorchDispatchMode):
    """How often torch is called while this is entered."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **kwargs or {})


def counted(function: Callable) -> dict[str, float]:
    """Calls of torch, operations in large products (2mnk each), and page faults of one call, after a first.

    On one thread, as calls of others are not seen.
    """
    import resource  # off Windows

    from torch.utils.flop_counter import FlopCounterMode

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        function()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        function()
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        with Calls() as calls:
            function()
        with FlopCounterMode(display=False) as flops:
            function()
    finally:
        torch.set_num_threads(threads)
    return {"torch calls": calls.count, "products, Gflop": flops.get_total_flops() / 1e9, "page faults": faults}
