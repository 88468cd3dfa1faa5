"""What a merge costs before it is run: ranks, bytes, operations, seconds.

Large products run at `Machine.matmul`, factorisations of small matrices at `Machine.factor`, which is several times
slower; what is read, written or passed over runs at `Machine.bytes_per_second`. How much of each there is
stands in `counts`.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch

from ..files import Adapter, matched, shapes_of
from ..files.adapter import widest
from ..numerics import nonzero_svd
from ..parallel import parallel_map
from ..values import Limit, expect, norms
from .counts import MODULE, of_module, of_sketch, svd
from .method import method_of
from .sketch import worth


@dataclass(frozen=True)
class Machine:
    """Bytes read or written a second, operations a second in large products, and in small factorisations; and how many
    modules are merged side by side, as many as torch has threads unless it is said."""

    bytes_per_second: float
    matmul: float
    factor: float
    threads: int = field(default_factory=torch.get_num_threads)


@dataclass(frozen=True)
class Plan:
    """What a merge takes. Bytes are of tensors: the interpreter and torch add some 300 MB of their own.

    Attributes
    ----------
    modules, sketched, summed_rank, rank : int
        Number of modules, of them those that random vectors stand for, largest Σ rₜ, largest rank of the result.
    read, written, peak : float
        Bytes of the inputs, of the result, and at most in memory.
    products, factorisations : float
        Operations in large products, and in factorisations.
    seconds : float
    """

    method: str
    space: str
    modules: int
    sketched: int
    summed_rank: int
    rank: int
    read: float
    written: float
    peak: float
    products: float
    factorisations: float
    seconds: float


def plan(
    what: Mapping[str, tuple[int, int]] | Sequence[Adapter],
    method: str = "opcm",
    *,
    count: int = 8,
    ranks: int | Sequence[int] = 16,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    machine: Machine | None = None,
) -> Plan:
    """What `merge` would cost.

    Parameters
    ----------
    what : dict of str to (int, int), or sequence of Adapter
        Module → (m, n), for instance of a model on the meta device (`lab.bases.shapes.linear_shapes`), with `count`
        adapters of `ranks`; or the adapters themselves, which know all that.
    ranks : int or sequence of int
        Of every adapter, or one number for each.
    rank : int, optional
        The result is cut to, as in `merge`.
    dtype : torch.dtype, optional
        Of the result; of shapes also of the adapters. Unless given, the widest of adapters, and float16 for shapes.
    machine : Machine, optional
        Measured here by `calibrate` unless given.

    Raises
    ------
    ValueError
        For an unknown method, nothing to merge, a wrong rank, shapes that differ, or numbers of ranks and adapters
        that do.
    """
    entry = method_of(method)
    if not len(what):
        raise ValueError("expected modules, or at least one adapter, got none")
    expect(Limit, rank=rank)
    if isinstance(what, Mapping):
        ranks = [ranks] * count if isinstance(ranks, int) else list(ranks)
        if len(ranks) != count:
            raise ValueError(f"expected {count} ranks, one per adapter, got {len(ranks)}")
        shapes, each = dict(what), dict.fromkeys(what, ranks)
        dtype = dtype or torch.float16
        read = sum((m + n) * sum(ranks) for m, n in shapes.values()) * dtype.itemsize
    else:
        what = matched(what, disjoint=True)
        shapes, dtype = shapes_of(what), dtype or widest(a.dtype for a in what)
        each = {name: [a[name].rank for a in what if name in a] for name in shapes}
        read = sum((u.shape[0] + u.shape[1]) * u.rank * a.dtype.itemsize for a in what for u in a.values())
    machine = machine or calibrate()
    asked = rank if entry.share and norms(entry.scale) is None else None
    sketched = {name: asked for name, shape in shapes.items() if asked and worth(shape, each[name], asked)}
    found = {
        name: of_sketch(*shape, each[name], sketched[name]) if name in sketched
        else of_module(method, *shape, each[name], rank)
        for name, shape in shapes.items()
    }  # fmt: skip
    products, work, passed = (sum(f[i] for f in found.values()) for i in range(3))
    largest = {name: rank or (max(each[name]) if entry.largest else found[name][4]) for name in found}
    kept = {name: min(f[4], largest[name]) for name, f in found.items()}
    numbers = sum(map(sum, shapes.values())) * max(kept.values())  # all modules are written at one rank
    written, held = numbers * dtype.itemsize, max(f[3] for f in found.values())
    return Plan(
        method, entry.space, len(shapes), len(sketched), max(map(sum, each.values())), max(kept.values()),
        read, written, read + 8 * numbers + machine.threads * held, products, work,
        (read + written + passed) / machine.bytes_per_second + products / machine.matmul
        + (work + len(shapes) * MODULE) / machine.factor,
    )  # fmt: skip


@cache
def calibrate() -> Machine:
    """The constants of this machine, on all its threads as a merge uses them; about a second."""
    generator = torch.Generator().manual_seed(0)
    threads = torch.get_num_threads()
    numbers = torch.randn(2**20, generator=generator, dtype=torch.float64)
    stack = torch.randn(1024, 128, generator=generator)
    core = torch.randn(96, 96, generator=generator, dtype=torch.float64)

    def rate(function: Callable, amount: float, repeats: int) -> float:
        """Of `amount` a call, best of three rounds."""

        def often(_):
            for _ in range(repeats):
                function()

        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            parallel_map(often, range(threads), worth=0)
            seconds.append(time.perf_counter() - start)
        return amount * repeats * threads / min(seconds)

    return Machine(
        rate(lambda: numbers * 2, 16 * len(numbers), 8),  # read and written
        rate(lambda: stack.mT @ stack, 2 * stack.numel() * 128, 40),
        rate(lambda: nonzero_svd(core, torch.float32), svd(96, 96), 20),
    )
