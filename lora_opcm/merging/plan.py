"""What a merge costs before it is run, from shapes alone: ranks, bytes, operations, seconds.

Operations are float64 multiplications and additions, counted for one module (m, n) of summed rank R = Σ rₜ:

- reduce: Gram matrices of both stacks, (m + n) R² (a product is 2nR², half of it by symmetry), then Cholesky and
  the inverse of R×R, 2/3 R³ a side; where R exceeds m or n, QR and SVD of the stack instead;
- core: forming all Cₜ, 2pqR for cores of p×q, then what the method factorises, see `CORES`;
- a sketch instead of all that where `sketch.worth` says so: 4(m + n)R operations a vector and step;
- lift and truncation: one `svd` of the core, then 2(m + n) R k for the k columns that are kept;
- methods that see single entries form ΔWₜ (2mnrₜ), pass over T·m·n entries (`PASSES`) and factorise m×n.

Factorisations of p×q, p ≥ q: `qr` 4pq² (Householder, Q formed), `svd` 2pq² + 11q³ (through the eigenproblem of
the Gram matrix, as `nonzero_svd` where the spectrum allows), `thin_svd` 4pq² + 14q³ (divide and conquer). The
leading terms are those of Golub and Van Loan, Matrix Computations, sections 5.2, 8.3 and 8.6; the cubic constants
and `START`, what a call costs before it computes, were fitted to LAPACK at q = 16 to 128.

Large products run at `Machine.matmul`, factorisations of small matrices at `Machine.factor`, which is several times
slower; what is read, written or passed over runs at `Machine.bytes_per_second`.
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
from .method import method_of
from .sketch import EXTRA, PROBES, STEPS, worth

START = 2e6  # operations
# Bytes that go by for every entry of every adapter: a selection of the largest is about 40, sign election 100, a
# random mask 30, a largest and a smallest value 50.
PASSES = {"ties": 140, "dare": 30, "dare_ties": 130, "magnitude_prune": 40, "magmax": 50, "knots_ties": 140,
          "core_ties": 140, "core_dare_ties": 130}  # fmt: skip


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


def qr(p: float, q: float) -> float:
    return 4 * max(p, q) * min(p, q) ** 2 + START


def svd(p: float, q: float) -> float:
    return 2 * max(p, q) * min(p, q) ** 2 + 11 * min(p, q) ** 3 + START


def thin_svd(p: float, q: float) -> float:
    return 4 * max(p, q) * min(p, q) ** 2 + 14 * min(p, q) ** 3 + START


def frames(p: int, q: int, ranks: Sequence[int]) -> float:
    """`Core.frames`: thin SVDs of all cores through their factors."""
    return sum(qr(p, r) + qr(q, r) + thin_svd(r, r) + 2 * (p + q) * r * r for r in ranks)


def _opcm(p: int, q: int, ranks: Sequence[int]) -> float:
    """Step t decomposes what is not locked, here half of what is there and the new update, and turns those columns."""
    done = [(sum(ranks[:t]), r) for t, r in enumerate(ranks)]
    blocks = [(min(d, p, q) / 2 + r, min(d + r, p), min(d + r, q)) for d, r in done]
    return sum(svd(b, b) + 2 * b * b * (a + c) for b, a, c in blocks)


def _whitening(p: int, q: int, ranks: Sequence[int]) -> float:
    """Every step takes the SVD of what frame and new one have in common, and corrects both by that rank."""
    steps = [(min(sum(ranks[:t]), p, q), ranks[t]) for t in range(1, len(ranks))]
    return frames(p, q, ranks) + sum(2 * thin_svd(d, r) + 6 * (p + q) * d * r for d, r in steps)


def _whitened_sum(p: int, q: int, ranks: Sequence[int]) -> float:
    """Three sums in one product each, two eigenproblems, and products with what they give."""
    return frames(p, q, ranks) + 2 * (p * p + q * q + p * q) * sum(ranks) + 9 * (p**3 + q**3) + 2 * p * q * (p + q)


def _svc(p: int, q: int, ranks: Sequence[int]) -> float:
    """The responses of every task in the directions of the sum."""
    return svd(p, q) + 2 * p * (p + q) * sum(ranks)


def _pico(p: int, q: int, ranks: Sequence[int]) -> float:
    return 2 * p * p * sum(ranks) + 9 * p**3


def _interference(p: int, q: int, ranks: Sequence[int]) -> float:
    """Σ CᵀC and Σ C·CᵀC through the factors, an eigenproblem of the first."""
    return 2 * q * (p + q) * sum(ranks) + 9 * q**3


def _dop(p: int, q: int, ranks: Sequence[int]) -> float:
    """Every step solves a Sylvester equation on the live part: two eigenproblems, and products with cores."""
    steps = [(min(d, p), min(d, q)) for d in (sum(ranks[:t]) for t in range(2, len(ranks) + 1))]
    return sum(9 * (a**3 + b**3) + 16 * a * b * (a + b) for a, b in steps)


def _ctm(p: int, q: int, ranks: Sequence[int]) -> float:
    return svd(p, len(ranks) * q) + svd(q, len(ranks) * p)


def _chordal(p: int, q: int, ranks: Sequence[int]) -> float:
    return frames(p, q, ranks) + thin_svd(p, sum(ranks)) + thin_svd(q, sum(ranks))


def _karcher(p: int, q: int, ranks: Sequence[int]) -> float:
    """100 steps, since subspaces of unrelated adapters do not let it converge."""
    k = min(ranks)
    return _chordal(p, q, ranks) + 100 * (len(ranks) + 1) * (thin_svd(p, k) + thin_svd(q, k))


def _quotient(p: int, q: int, ranks: Sequence[int]) -> float:
    k = min(ranks)
    return frames(p, q, ranks) + thin_svd(p, q) + 50 * len(ranks) * (thin_svd(k, k) + 4 * (p + q) * k * k)


# method → operations in its core, (p, q) its size; the rest forms and adds cores only
CORES: dict[str, Callable[[int, int, Sequence[int]], float]] = {
    "svd": lambda p, q, ranks: svd(p, q),
    "tsv": lambda p, q, ranks: frames(p, q, ranks) + 2 * thin_svd(p, sum(ranks)) + 4 * p * q * sum(ranks),
    "iso_c": lambda p, q, ranks: svd(p, q),
    "iso_cts": lambda p, q, ranks: svd(p, q) + frames(p, q, ranks) + 2 * thin_svd(p, q),
    "core_ties": _ctm, "core_dare_ties": _ctm, "ctm": _ctm, "chordal_mean": _chordal, "karcher_mean": _karcher,
    "quotient_mean": _quotient, "opcm": _opcm, "whitening": _whitening, "whitened_sum": _whitened_sum,
    "knots_ties": lambda p, q, ranks: svd(p, len(ranks) * q), "subspace_boosting": lambda p, q, ranks: svd(p, q),
    "svc": _svc, "pico": _pico, "wudi": _interference, "actmat": _interference, "dop": _dop,
}  # fmt: skip
ONE_RANK = {"ctm", "chordal_mean", "karcher_mean", "quotient_mean", "lora_opcm"}  # of the result


def _module(method: str, m: int, n: int, ranks: Sequence[int]) -> tuple[float, float, float, float, int]:
    """Of one module: operations in products and in factorisations, bytes passed over, bytes held, output rank."""
    space, R, T = method_of(method).space, sum(ranks), len(ranks)
    p, q, small = min(R, m), min(R, n), min(m, n)
    k = min(max(ranks) if method in ONE_RANK else R, small)
    entries = T * (m * n if space == "dense" else p * q) * PASSES.get(method, 0)
    if space == "dense":
        return 2 * m * n * R, thin_svd(m, n), entries, 8.0 * m * n * (T + 6), small
    if method == "regmean":
        work = 2 / 3 * n**3 * T + qr(m, R) + qr(n, R) + thin_svd(R, R)
        return 2 * n * n * R, work, 8 * T * n * n, 8.0 * n * n * (T + 2), k
    products, work = 2 * (m + n) * R * k, 2 * p * q * R + svd(p, q)
    for side in (m, n):
        products += side * R * R if R <= side else 0
        work += 2 / 3 * R**3 + 3 * START if R <= side else qr(side, R) + thin_svd(side, R)
    if method == "lora_opcm":  # a stream for each factor, in cores of R × r and r × R
        r = max(ranks)
        work += 2 * (_opcm(p, r, ranks) + qr(r, R) + thin_svd(r, R)) + qr(m, r) + qr(n, r)
    work += CORES.get(method, lambda *_: 0.0)(p, q, ranks)
    if method == "knots_ties":  # its columns live in the layer: lifted, passed over, and decomposed again
        products += 2 * n * R * p * T
        entries = PASSES[method] * n * p * T
        work += qr(m, p) + qr(n, p) + thin_svd(p, p)
    return products, work, entries, (m + n) * R * 12.0 + (T + 6) * p * q * 8.0, k


def _sketch(m: int, n: int, ranks: Sequence[int], rank: int) -> tuple[float, float, float, float, int]:
    """As `_module`: 2 + 2 · `STEPS` products with S or Sᵀ, as many for the probes, and a QR after each."""
    R, vectors = sum(ranks), rank + EXTRA
    products = 2.0 * (m + n) * R * (2 + 2 * STEPS) * vectors + 2.0 * (m + n) * R * (1 + 2 * STEPS) * PROBES
    work = (1 + STEPS) * qr(m, vectors) + STEPS * qr(n, vectors)
    return products, work + qr(n, vectors) + qr(m, vectors) + thin_svd(vectors, vectors), 0.0, (m + n) * R * 4.0, rank


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
        name: _sketch(*shape, each[name], sketched[name]) if name in sketched else _module(method, *shape, each[name])
        for name, shape in shapes.items()
    }
    products, work, passed = (sum(f[i] for f in found.values()) for i in range(3))
    largest = {name: rank or (max(each[name]) if entry.largest else found[name][4]) for name in found}
    kept = {name: min(f[4], largest[name]) for name, f in found.items()}
    numbers = sum(map(sum, shapes.values())) * max(kept.values())  # all modules are written at one rank
    written, held = numbers * dtype.itemsize, max(f[3] for f in found.values())
    return Plan(
        method, entry.space, len(shapes), len(sketched), max(map(sum, each.values())), max(kept.values()),
        read, written, read + 8 * numbers + machine.threads * held, products, work,
        (read + written + passed) / machine.bytes_per_second + products / machine.matmul + work / machine.factor,
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
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            parallel_map(lambda _: function(), range(repeats * threads))
            seconds.append(time.perf_counter() - start)
        return amount * repeats * threads / min(seconds)

    return Machine(
        rate(lambda: numbers * 2, 16 * len(numbers), 4),  # read and written
        rate(lambda: stack.mT @ stack, 2 * stack.numel() * 128, 8),
        rate(lambda: nonzero_svd(core, torch.float32), svd(96, 96), 12),
    )
