"""Operations and bytes of merging one module, from its shape and ranks alone.

Operations are float64 multiplications and additions, counted for one module (m, n) of summed rank R = Σ rₜ:

- reduce: Gram matrices of both stacks, (m + n) R² (a product is 2nR², half of it by symmetry), then Cholesky and
  the inverse of R×R, 2/3 R³ a side; where R exceeds m or n, QR and SVD of the stack instead;
- core: forming all Cₜ, 2pqR for cores of p×q, then what the method factorises, see `CORES`;
- a sketch instead of all that where `sketch.worth` says so: 4(m + n)R operations a vector and step;
- lift and truncation: one `svd` of the core, where the rule has none (`SPECTRA`), then 2(m + n) R k for the k columns
  that are kept; nothing of all that for a plain sum that is not cut;
- methods that see single entries form ΔWₜ (2mnrₜ), pass over T·m·n entries (`PASSES`) and factorise m×n.

Factorisations of p×q, p ≥ q: `qr` 4pq² (Householder, Q formed), `svd` 2pq² + 11q³ (through the eigenproblem of
the Gram matrix, as `nonzero_svd` where the spectrum allows), `thin_svd` 4pq² + 14q³ (divide and conquer). The
leading terms are those of Golub and Van Loan, Matrix Computations, sections 5.2, 8.3 and 8.6; the cubic constants
and `START`, what a call costs before it computes, were fitted to LAPACK at q = 16 to 128; `MODULE`, `STACK` and the
calls of `opcm` to merges of six models on two cores.
"""

from collections.abc import Callable, Sequence

from .method import method_of
from .sketch import EXTRA, PROBES, STEPS

START = 2e6  # operations
MODULE = 8 * START  # that every module takes beside, in calls of Python
STACK = 30  # bytes that go by for every number of a factor until it stands in a stack and was read from there
# Bytes that go by for every entry of every adapter: a selection of the largest is about 40, sign election 100, a
# random mask 30, a largest and a smallest value 50.
PASSES = {"ties": 140, "dare": 30, "dare_ties": 130, "magnitude_prune": 40, "magmax": 50, "knots_ties": 140,
          "core_ties": 140, "core_dare_ties": 130}  # fmt: skip


def qr(p: float, q: float) -> float:
    return 4 * max(p, q) * min(p, q) ** 2 + START


def svd(p: float, q: float) -> float:
    return 2 * max(p, q) * min(p, q) ** 2 + 11 * min(p, q) ** 3 + START


def thin_svd(p: float, q: float) -> float:
    return 4 * max(p, q) * min(p, q) ** 2 + 14 * min(p, q) ** 3 + START


def polar(p: float, q: float) -> float:
    return svd(p, q) + 2 * p * q * min(p, q)


def frames(p: int, q: int, ranks: Sequence[int]) -> float:
    """`Core.frames`: thin SVDs of all cores through their factors."""
    return sum(qr(p, r) + qr(q, r) + thin_svd(r, r) + 2 * (p + q) * r * r for r in ranks)


def _opcm(p: int, q: int, ranks: Sequence[int]) -> float:
    """Step t decomposes what is not locked, here half of what is there and the new update, turns those columns, and
    makes as many calls beside as four factorisations are."""
    done = [(sum(ranks[:t]), r) for t, r in enumerate(ranks)]
    blocks = [(min(d, p, q) / 2 + r, min(d + r, p), min(d + r, q)) for d, r in done]
    return sum(svd(b, b) + 2 * b * b * (a + c) + 4 * START for b, a, c in blocks)


def _tsv(p: int, q: int, ranks: Sequence[int]) -> float:
    return frames(p, q, ranks) + polar(p, sum(ranks)) + polar(q, sum(ranks)) + 2 * p * q * sum(ranks)


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
    "tsv": _tsv, "iso_c": lambda p, q, ranks: svd(p, q),
    "iso_cts": lambda p, q, ranks: svd(p, q) + frames(p, q, ranks) + polar(p, q) + polar(q, p),
    "core_ties": _ctm, "core_dare_ties": _ctm, "ctm": _ctm, "chordal_mean": _chordal, "karcher_mean": _karcher,
    "quotient_mean": _quotient, "opcm": _opcm, "whitening": _whitening, "whitened_sum": _whitened_sum,
    "knots_ties": lambda p, q, ranks: svd(p, len(ranks) * q), "subspace_boosting": lambda p, q, ranks: svd(p, q),
    "svc": _svc, "pico": _pico, "wudi": _interference, "actmat": _interference, "dop": _dop,
}  # fmt: skip
SPECTRA = {"opcm", "iso_c", "subspace_boosting", "svc"}  # whose result is a singular value decomposition already
ONE_RANK = {
    "ctm": max,
    "chordal_mean": max,
    "lora_opcm": max,
    "karcher_mean": min,
    "quotient_mean": min,
}  # the result's


def of_module(
    method: str, m: int, n: int, ranks: Sequence[int], rank: int | None
) -> tuple[float, float, float, float, int]:
    """Of one module: operations in products and in factorisations, bytes passed over, bytes held, output rank."""
    entry, R, T = method_of(method), sum(ranks), len(ranks)
    space, p, q, small = entry.space, min(R, m), min(R, n), min(m, n)
    k = min(ONE_RANK.get(method, sum)(ranks), small)
    if entry.plain and rank is None and R <= small:
        return 0.0, 0.0, 0.0, 0.0, R  # factors side by side
    entries = T * (m * n if space == "dense" else p * q) * PASSES.get(method, 0) + (m + n) * R * STACK
    if space == "dense":
        return 2 * m * n * R, thin_svd(m, n), entries, 8.0 * m * n * (T + 6), small
    if method == "regmean":
        work = 2 / 3 * n**3 * T + qr(m, R) + qr(n, R) + thin_svd(R, R)
        return 2 * n * n * R, work, 8 * T * n * n, 8.0 * n * n * (T + 2), k
    products, work = 2 * (m + n) * R * min(k, rank or k), 2 * p * q * R + (0 if method in SPECTRA else svd(p, q))
    for side in (m, n):
        products += side * R * R if R <= side else 0
        work += 2 / 3 * R**3 + 3 * START if R <= side else qr(side, R) + thin_svd(side, R)
    if method == "lora_opcm":  # a stream for each factor, in cores of R × r and r × R
        r = max(ranks)
        work += 2 * (_opcm(p, r, ranks) + qr(r, R) + thin_svd(r, R)) + qr(m, r) + qr(n, r)
    work += CORES.get(method, lambda *_: 0.0)(p, q, ranks)
    if method == "knots_ties":  # its columns live in the layer: lifted, passed over, and decomposed again
        products += 2 * n * R * p * T
        entries += (n - q) * p * T * PASSES[method]
        work += qr(m, p) + qr(n, p) + thin_svd(p, p)
    return products, work, entries, (m + n) * R * 12.0 + (T + 6) * p * q * 8.0, k


def of_sketch(m: int, n: int, ranks: Sequence[int], rank: int) -> tuple[float, float, float, float, int]:
    """As `of_module`: 2 + 2 · `STEPS` products with S or Sᵀ, as many for the probes, and a QR after each."""
    R, vectors = sum(ranks), rank + EXTRA
    products = 2.0 * (m + n) * R * (2 + 2 * STEPS) * vectors + 2.0 * (m + n) * R * (1 + 2 * STEPS) * PROBES
    work = (1 + STEPS) * qr(m, vectors) + STEPS * qr(n, vectors)
    return products, work + qr(n, vectors) + qr(m, vectors) + thin_svd(vectors, vectors), 0.0, (m + n) * R * 4.0, rank
