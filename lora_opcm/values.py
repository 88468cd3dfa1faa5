"""What an option may be: a type in an annotation, and a check that names the option, what came and what was expected.

def iso_cts(core: Core, common: Share = 0.8) -> Tensor: ...
"""

import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Annotated, Any, get_args

AUTO = "auto"
ROUNDING = 1e-6  # relative; what is left of float32 numbers that cancel


@dataclass(frozen=True)
class Value:
    """The part of an option's type that a checker of types cannot see."""

    words: str
    fits: Callable[[Any], bool]


def _number(x: Any) -> bool:
    return isinstance(x, Real) and not isinstance(x, bool) and math.isfinite(x)


def _count(x: Any) -> bool:
    return isinstance(x, Integral) and not isinstance(x, bool) and int(x) >= 1


def _norm(x: object) -> bool:
    return isinstance(x, str) and re.fullmatch(r"auto|(\d+(\.\d*)?|\.\d+)?norm", x) is not None


def one_of(*words: str) -> Value:
    return Value(" or ".join(map(repr, words)), lambda x: isinstance(x, str) and x in words)


Share = Annotated[float, Value("a number in [0, 1]", lambda x: _number(x) and 0 <= x <= 1)]
Density = Annotated[float, Value("a number in (0, 1]", lambda x: _number(x) and 0 < x <= 1)]
Count = Annotated[int, Value("an integer of at least 1", _count)]
Limit = Annotated[int | None, Value("None or an integer of at least 1", lambda x: x is None or _count(x))]
Energy = Annotated[float | None, Value("None or a number in (0, 1]", lambda x: x is None or _number(x) and 0 < x <= 1)]
Seed = Annotated[int, Value("an integer", lambda x: isinstance(x, Integral) and not isinstance(x, bool))]
Scale = Annotated[
    float | str,
    Value("a finite number, 'auto', 'norm' or a multiple of it such as '2norm'", lambda x: _number(x) or _norm(x)),
]
Full = Annotated[
    str | None,
    Value(
        "None, 'first', 'drop' or 'mean'", lambda x: x is None or isinstance(x, str) and x in ("first", "drop", "mean")
    ),
]
Variant = Annotated[str, one_of("paper", "fusionbench")]
Gauge = Annotated[str, one_of("given", "balanced")]
Rule = Annotated[str, one_of("sum", "ties")]
Sides = Annotated[str, one_of("both", "left", "right")]


def value_of(annotation: object) -> Value | None:
    """The `Value` of an annotated type."""
    return next((x for x in get_args(annotation) if isinstance(x, Value)), None)


def expect(annotation: object, **given: object) -> None:
    """Raise a ValueError that names the first of `given` that is no value of this type."""
    value = value_of(annotation)
    for name, x in given.items():
        if value and not value.fits(x):
            raise ValueError(f"{name} must be {value.words}, got {x!r}")


def expect_options(function: Callable, **given: object) -> None:
    """`expect` of every option by the annotation it has among the parameters of `function`."""
    parameters = inspect.signature(function, eval_str=True).parameters
    for name, x in given.items():
        expect(parameters[name].annotation, **{name: x})


def nearest(word: str, known: Iterable[str]) -> str:
    """ ", did you mean …?" for a word that is not among the known ones, or nothing if none is like it."""
    found = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {found[0]!r}?" if found else ""


def norms(scale: float | str, count: int = 1) -> float | None:
    """How many mean norms of its `count` parts a merged adapter gets: 2 for "2norm"; None for a plain factor.

    For "auto" it is min(√count, 2): a rule from measurements, not a theorem.
    """
    if scale == AUTO:
        return min(math.sqrt(count), 2.0)
    return float(scale.removesuffix("norm") or 1) if isinstance(scale, str) else None


def factor(scale: float | str, size: float, parts: Sequence[float]) -> float:
    """What a merged adapter of norm `size` is multiplied by; `parts` are the norms of what went in, each weighted.

    For "auto" a part that is zero, by its weight or by itself, is none. Of parts that cancel rounding is left, which is
    not blown up.
    """
    counted = [p for p in parts if p] if scale == AUTO else parts
    if (times := norms(scale, len(counted))) is None:
        return float(scale)
    rounding = ROUNDING * max(counted, default=0.0)
    return times * sum(counted) / len(counted) / size if size > rounding else 1.0
