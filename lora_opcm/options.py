"""What options may be, in one table: of merge methods, of streams, of truncation."""

import math
from collections.abc import Callable
from numbers import Integral, Real

VARIANTS = ("paper", "fusionbench")


def _number(x) -> bool:
    return isinstance(x, Real) and not isinstance(x, bool) and math.isfinite(x)


def _count(x) -> bool:
    return isinstance(x, Integral) and not isinstance(x, bool) and x >= 1


def _either(*words: str) -> tuple[str, Callable]:
    return " or ".join(map(repr, words)), lambda x: isinstance(x, str) and x in words


SHARE = "a number in [0, 1]", lambda x: _number(x) and 0 <= x <= 1
POSITIVE_SHARE = "a number in (0, 1]", lambda x: _number(x) and 0 < x <= 1
COUNT = "an integer of at least 1", _count
OPTIONAL_COUNT = "None or an integer of at least 1", lambda x: x is None or _count(x)

# option -> (what is expected, in words; whether a value is that)
EXPECTED: dict[str, tuple[str, Callable]] = {
    "alpha": SHARE, "power": SHARE, "common": SHARE, "density": POSITIVE_SHARE, "steps": COUNT,
    "k": OPTIONAL_COUNT, "l": OPTIONAL_COUNT, "cap": OPTIONAL_COUNT, "directions": OPTIONAL_COUNT, "rank": OPTIONAL_COUNT,
    "energy": ("None or a number in (0, 1]", lambda x: x is None or POSITIVE_SHARE[1](x)),
    "scale": ("a finite number or 'norm'", lambda x: _number(x) or isinstance(x, str) and x == "norm"),
    "seed": ("an integer", lambda x: isinstance(x, Integral) and not isinstance(x, bool)),
    "variant": _either(*VARIANTS), "gauge": _either("given", "balanced"), "rule": _either("sum", "ties"),
}  # fmt: skip


def check(**options) -> None:
    """Raise a ValueError that names the first option whose value is not what `EXPECTED` says."""
    for name, value in options.items():
        expected, fits = EXPECTED.get(name, ("", lambda x: True))
        if not fits(value):
            raise ValueError(f"{name} must be {expected}, got {value!r}")
