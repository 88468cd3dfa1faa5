"""What one call takes: seconds and memory."""

import ctypes
import gc
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


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
