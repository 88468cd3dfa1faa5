"""The table of merge methods, and `@merge_method`, which puts a rule into it.

    @merge_method("half", source="me", keeps="one sum")
    def half(core: Core, share: Share = 0.5) -> Tensor:
        "A share of the sum."
        return share * sum(core.cores)

`lora_opcm.testing.check_method("half")` tries whether what the table says of it is true.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING

from .. import plugins
from ..values import expect_options, nearest, norms, value_of

if TYPE_CHECKING:
    import pandas

SPACES = {"core": "core space", "updates": "factors", "dense": "dense ΔW"}  # see `merge.Space`
KEEPS = ("one sum", "three sums", "dense sums", "all directions", "all adapters")  # between two adapters
CUTS = {"rank", "energy"}  # parameters of a rule that cuts inside


@dataclass(frozen=True)
class Method:
    """A merge rule and what is true of it.

    Attributes
    ----------
    rule : callable
        What it does to the updates of one module, as its space hands them over, with typed options. A rule with a
        parameter `rank` or `energy` truncates itself, as one must that leaves a flat spectrum.
    space : {"core", "updates", "dense"}
        What the rule is given: the `Core` of the updates, the updates (`LowRank`), or dense float64 matrices. A
        rule belongs into the core if f(P X Qᵀ) = P f(X) Qᵀ for orthonormal P, Q.
    source : str
    keeps : str
        What must be kept between two adapters to go on with a third, one of `KEEPS`.
    ordered : bool
        Whether the order of the adapters matters.
    gauge_invariant : bool
        Whether factors (left G, G⁻¹ right) give the same result.
    scale : float or str
        Of the merged adapter, unless `merge` is given one.
    data : bool
        Whether it needs Gram matrices of the layers' inputs.
    largest : bool
        Whether it is cut to the largest rank of the adapters unless told otherwise.
    plain : bool
        Whether it is the sum of the updates, which factors side by side are, where nothing is cut.
    share : callable, optional
        The share of the sum of T updates that it is, for a method that is nothing else: 1 or 1/T.
    batched : bool
        Whether the rule also takes a `Batch`, the cores of modules of one shape, and returns what it does with B in
        front of every shape. It may raise `numerics.Uneven` where these part ways: each is then given alone.
    """

    name: str
    rule: Callable
    space: str
    source: str
    keeps: str
    ordered: bool = False
    gauge_invariant: bool = True
    scale: float | str = 1.0
    data: bool = False
    largest: bool = False
    plain: bool = False
    share: Callable[[int], float] | None = None
    batched: bool = False

    def __post_init__(self):
        if self.space not in SPACES:
            raise ValueError(f"{self.name}: space is {self.space!r}, expected one of {', '.join(map(repr, SPACES))}")
        if self.keeps not in KEEPS:
            raise ValueError(f"{self.name}: keeps is {self.keeps!r}, expected one of {', '.join(KEEPS)}")
        for name, p in self._parameters.items():
            if name not in CUTS and value_of(p.annotation) is None:
                raise TypeError(
                    f"{self.name}: option {name} has no type that can be checked, expected one of"
                    f" lora_opcm.values, got {p.annotation!r}"
                )
            if p.default is p.empty:
                raise TypeError(f"{self.name}: option {name} has no default")

    @cached_property
    def _parameters(self) -> dict[str, inspect.Parameter]:
        return dict(list(inspect.signature(self.rule, eval_str=True).parameters.items())[1:])

    @cached_property
    def options(self) -> dict[str, object]:
        """Option names and defaults."""
        return {name: p.default for name, p in self._parameters.items() if name not in CUTS}

    @cached_property
    def cuts(self) -> frozenset[str]:
        """Which of rank and energy the rule applies itself."""
        return frozenset(CUTS & self._parameters.keys())

    @property
    def summary(self) -> str:
        """What it does, in one line."""
        return (inspect.getdoc(self.rule) or "").partition("\n")[0]

    def adds(self, rank: int | None = None, energy: float | None = None, scale: float | str | None = None) -> bool:
        """Whether a merge at this cut and scale is a sum times a number: of sums, it is the sum of the merges."""
        cut = self.largest or rank is not None or energy is not None
        return self.share is not None and not cut and norms(self.scale if scale is None else scale) is None

    def check(self, **options: object) -> None:
        """Raise a ValueError for an option that the rule does not have, or a value that is none."""
        if unknown := options.keys() - self.options.keys():
            hint = nearest(min(unknown), self.options)
            known = sorted(self.options) or "none"
            raise ValueError(f"{self.name} has no option {sorted(unknown)}; it takes {known}{hint}")
        expect_options(self.rule, **options)


_table: dict[str, Method] = {}


def merge_method(name: str, *, space: str = "core", source: str, keeps: str = "all adapters", **true) -> Callable:
    """Put a rule into the table of methods; the keywords are fields of `Method`.

    Raises
    ------
    TypeError
        If an option has no type of `lora_opcm.values`, or no default.
    ValueError
        If the name is taken.
    """

    def register(rule: Callable) -> Callable:
        if name in _table and _table[name].rule.__qualname__ != rule.__qualname__:
            raise ValueError(f"there is a method {name!r} already, from {_table[name].rule.__module__}")
        _table[name] = Method(name, rule, space, source, keeps, **true)
        return rule

    return register


def table() -> dict[str, Method]:
    """All methods by name, by what they keep: of this package, and of others (entry points `lora_opcm.methods`)."""
    if not _loaded:
        import_module("lora_opcm.merging.rules")
        _loaded.update(plugins.found("methods") or {"": None})
    return dict(sorted(_table.items(), key=lambda item: (KEEPS.index(item[1].keeps), item[0])))


_loaded: dict[str, object] = {}


def method_of(name: str) -> Method:
    """The method of this name; ValueError with the nearest names if there is none."""
    methods = table()
    if name not in methods:
        hint = nearest(name, methods)
        raise ValueError(f"unknown method {name!r}; the methods are {', '.join(sorted(methods))}{hint}")
    return methods[name]


def methods() -> "pandas.DataFrame":
    """The table of methods: what each does, keeps and takes, where it runs, and its source."""
    import pandas as pd

    rows = [
        {
            "method": m.name,
            "does": m.summary,
            "keeps": m.keeps,
            "order matters": m.ordered,
            "gauge-invariant": m.gauge_invariant,
            "scale": m.scale,
            "runs on": SPACES[m.space],
            "needs data": m.data,
            "options": ", ".join(m.options),
            "source": m.source,
        }
        for m in table().values()
    ]
    return pd.DataFrame(rows).set_index("method")
