"""`check_method`: whether what the table says of a merge method is true, for somebody's own method as for ours.

from lora_opcm.testing import check_method

def test_mine():
    check_method("mine")
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from .files import Adapter
from .lowrank import LowRank, add
from .merging.merge import merge
from .merging.method import method_of

SHAPES = {"wide": (24, 40), "tall": (36, 20), "square": (28, 28)}
RANK, COUNT = 4, 4
CUTS: tuple[dict[str, Any], ...] = ({}, {"rank": 3}, {"energy": 0.6})  # every claim holds with each of them


def check_method(name: str, seed: int = 0, **options: Any) -> None:
    """Try a method of the table, with `options`, on random adapters, at full rank, at a rank and at an energy.

    - a merge has the shapes and the dtype of its inputs, no more rank than asked for, and finite numbers;
    - the same inputs give the same bytes; half precision agrees with double to its rounding;
    - a module is, to the byte, what it is beside others of its shape;
    - the order of the adapters changes the result if the table says so, and only then; so does the gauge;
    - a module that an adapter lacks counts as zero, and one that is zero everywhere stays zero;
    - a share of the sum, by `share` or `plain`, is one by its rule, and where factors stay as they are;
    - a number for `scale` multiplies, "2norm" gives twice the mean norm of the inputs, before a cut;
    - "auto" gives min(√T, 2) times that of T inputs, after a cut.

    Raises
    ------
    AssertionError
        If one is not so; it says which, and by how much.
    ValueError
        If there is no such method, or it does not take the options.
    """
    for cut in CUTS:
        where = f"{name} with {options | cut}"
        for claim, seen in _claims(name, seed, options | cut):
            assert seen is True, f"{where}: {claim}: {seen}"


Claim = tuple[str, Any]  # what should be so, and True or what was seen instead


def _claims(name: str, seed: int, options: Mapping[str, Any]) -> Iterator[Claim]:
    method, adapters = method_of(name), _adapters(seed)

    def run(inputs: Sequence[Adapter], order: Sequence[int] | None = None, **more: Any) -> Adapter:
        if method.data:
            grams = _grams(len(inputs), seed)
            more["grams"] = [grams[i] for i in order or range(len(inputs))]
        return merge(inputs, name, **dict(options) | more)

    whole = run(adapters)
    yield "shapes", _is({n: u.shape for n, u in whole.items()}, dict(SHAPES))
    limit = options.get("rank", max(max(shape) for shape in SHAPES.values()))
    yield "at most the rank", all(u.rank <= limit for u in whole.values()) or [u.rank for u in whole.values()]
    again = run(_adapters(seed))
    yield "same bytes", all(_equal(whole[n], again[n]) for n in SHAPES)
    yield from _precision(run, seed, whole)
    if not method.data:
        # So many that one shares its batch: the first in front of all, larger than they are and nothing like them.
        first, *others = (f"another {i}" for i in range(torch.get_num_threads()))
        strangers = [{n: a["square"] * -3.0 for n in (first, *others)} for a in _adapters(seed + 1)]
        more = [
            a.with_modules({first: b[first]} | dict(a.items()) | b) for a, b in zip(adapters, strangers, strict=True)
        ]
        alone, beside = run(adapters, scale=1.0, ragged=True), run(more, scale=1.0, ragged=True)
        yield "a module beside others", all(_equal(alone[n], beside[n]) for n in SHAPES)

    order = [2, 0, 3, 1]
    moved = distance(run([adapters[i] for i in order], order), whole)
    yield "order", _moves(moved, method.ordered)
    moved = distance(run([a.regauge(i) for i, a in enumerate(adapters)]), whole)
    yield "gauge", _moves(moved, not method.gauge_invariant)

    lacking = [adapters[0].with_modules({n: adapters[0][n] for n in ("wide", "square")}), *adapters[1:]]
    zero = [_without(a, "tall") for a in adapters]
    yield "a missing module is zero", _near(distance(run(lacking), run([zero[0], *adapters[1:]])))
    yield "zero stays zero", _near(run(zero)["tall"].norm())

    share = 1.0 if method.plain else method.share(COUNT) if method.share else None
    for energy in (1.0, None) if method.plain else (1.0,):  # through its rule, and what is side by side
        if share is not None:
            total = Adapter({n: share * add([a[n] for a in adapters]) for n in SHAPES})
            yield "a share of the sum", _near(distance(run(adapters, scale=1.0, rank=None, energy=energy), total))

    one, two = run(adapters, scale=1.0), run(adapters, scale=-0.5)
    yield "scale", _near(distance(two * -2.0, one))
    for count in (1, 2, COUNT):
        some = adapters[:count]
        mean = sum(a.norm() for a in some) / count
        yield f"auto, of {count}", _near(run(some, scale="auto").norm() / mean / count**0.5 - 1)
    exact = run(adapters, scale="2norm", rank=None, energy=None)
    yield (
        "2norm",
        _near(exact.norm() / (2 * sum(a.norm() for a in adapters) / COUNT) - 1)
        if (method.gauge_invariant and not method.cuts and not method.largest)
        else True,
    )


def _precision(run: Callable[..., Adapter], seed: int, whole: Adapter) -> Iterator[Claim]:
    for dtype, rounding in ((torch.float32, 1e-4), (torch.float16, 5e-2), (torch.bfloat16, 3e-1)):
        rounded = [a.with_modules({n: u.to(dtype) for n, u in a.items()}) for a in _adapters(seed)]
        found = run([Adapter(a.modules) for a in rounded])
        yield f"{dtype} stays", {u.dtype for u in found.values()} == {dtype} or found
        finite = all(bool(u.left.isfinite().all() and u.right.isfinite().all()) for u in found.values())
        yield f"{dtype} is finite", finite
        # What rounding the inputs changes is no fault of the merge: the same rounded inputs in double are the measure.
        exact = run([Adapter({n: u.to(torch.float64) for n, u in a.items()}) for a in rounded])
        yield f"{dtype} agrees with float64", _near(distance(found, exact), rounding)


def distance(a: Adapter, b: Adapter) -> float:
    """The largest relative distance ‖ΔW_a − ΔW_b‖ / ‖ΔW_b‖ of a module."""
    return max(_gap(a[n], b[n]) for n in b)


def _gap(x: LowRank, y: LowRank) -> float:
    difference = (x.to(torch.float64) + -1.0 * y.to(torch.float64)).norm()
    return difference / y.norm() if y.norm() else difference


def _without(adapter: Adapter, name: str) -> Adapter:
    """With factors of zeros in one module."""
    zero = LowRank(torch.zeros_like(adapter[name].left), torch.zeros_like(adapter[name].right))
    return adapter.with_modules(dict(adapter.items()) | {name: zero})


def _adapters(seed: int) -> list[Adapter]:
    generator = torch.Generator().manual_seed(seed)

    def update(m: int, n: int) -> LowRank:
        left, right = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((m, RANK), (RANK, n)))
        return LowRank(left, right)

    return [Adapter({name: update(m, n) for name, (m, n) in SHAPES.items()}) for _ in range(COUNT)]


def _grams(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed + 1)
    inputs = [
        {name: torch.randn(99, n, generator=generator, dtype=torch.float64) for name, (_, n) in SHAPES.items()}
        for _ in range(count)
    ]
    return [{name: x.mT @ x for name, x in each.items()} for each in inputs]


def _is(seen: object, expected: object) -> Any:
    return True if seen == expected else f"got {seen}, expected {expected}"


def _equal(x: LowRank, y: LowRank) -> bool:
    return torch.equal(x.left, y.left) and torch.equal(x.right, y.right)


def _near(gap: float, limit: float = 1e-6) -> Any:
    return True if abs(gap) <= limit else f"off by {gap:.1e}, at most {limit:.0e} is rounding"


def _moves(gap: float, should: bool) -> Any:
    if should:
        return True if gap > 1e-3 else f"it moves the result by {gap:.1e} only, and the table says it matters"
    return True if gap < 1e-6 else f"it moves the result by {gap:.1e}, and the table says it does not matter"
