"""Precision: which directions are real, what rounding does, and products that no setting of torch can blur."""

import math
import threading
import warnings
from contextlib import contextmanager

import torch
from torch import Tensor

from .values import Energy, Limit, expect

# Singular values below RTOL · σ₁ count as zero. Factors in float32 or less carry relative rounding of 1e-7;
# a direction that small is noise: taken for a direction, it would be an arbitrary one.
RTOL = {torch.float64: 1e-12}
RTOL_SINGLE = 1e-6
TIE = 1e-9  # relative; singular values of float64 cores nearer than that are equal


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays; everything less works in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def half(x: Tensor) -> bool:
    """Whether x is float16 or bfloat16."""
    return x.dtype in (torch.float16, torch.bfloat16)


class Uneven(Exception):
    """Matrices of one batch that part ways: they do not have the same rank, say. Each may go on alone."""


def nonzero_svd(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of x [..., p, q] without the directions that are rounding noise for factors of `dtype`.

    Of several matrices, which must have one rank (`Uneven`), each has the bytes that it has among others.
    """
    if x.shape[-2] > x.shape[-1]:
        u, s, vh = nonzero_svd(x.mT, dtype)
        return vh.mT, s, u.mT
    if dtype != torch.float64 and x.dtype == torch.float64 and x.shape[-2] >= 16:
        # Half the time of an SVD, and as good to 1e-8 where no singular value is below 1e-4 σ₁.
        values, u = torch.linalg.eigh(x @ x.mT)
        if bool((values[..., 0] > 1e-8 * values[..., -1]).all()):
            u, s = u.flip(-1), values.flip(-1).sqrt()
            return u, s, (u / s[..., None, :]).mT @ x
        if x.ndim > 2 and len(x) > 1:
            found = [nonzero_svd(one[None], dtype) for one in x]
            if len({s.shape for _, s, _ in found}) > 1:
                raise Uneven
            u, s, vh = (torch.cat(parts) for parts in zip(*found, strict=True))
            return u, s, vh
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    k = nonzero(s, dtype)
    return u[..., :k], s[..., :k], vh[..., :k, :]


def nonzero(s: Tensor, dtype: torch.dtype, largest: Tensor | None = None) -> int:
    """How many singular values (descending, [..., k]) are more than rounding noise for factors of `dtype`: of the
    first, or of the `largest` [..., 1] of what was added up."""
    return alike((s > RTOL.get(dtype, RTOL_SINGLE) * (s[..., :1] if largest is None else largest)).sum(-1))


def alike(counts: Tensor) -> int:
    """The one number that all of `counts` are; `Uneven` if they differ."""
    first, *others = counts.flatten().tolist()
    if any(x != first for x in others):
        raise Uneven
    return first


def keep_rank(s: Tensor, rank: int | None = None, energy: float | None = None) -> int:
    """How many singular values of `s`, [..., k] descending, to keep: at most `rank`, and no more than `energy` asks.

    Raises
    ------
    ValueError
        If rank is no integer of at least 1, or energy outside (0, 1].
    Uneven
        Of several spectra, if they keep different numbers, or there is something to warn of.
    """
    expect(Limit, rank=rank)
    expect(Energy, energy=energy)
    k = count = s.shape[-1]
    if energy is not None and k:
        share = s.double().square().cumsum(-1)
        k = alike((share < energy * share[..., -1:] * (1 - 1e-12)).sum(-1)) + 1
    k = min(k, count, rank if rank is not None else k)
    if 0 < k < count and bool((s[..., k - 1] - s[..., k] <= TIE * s[..., 0]).any()):
        if s.ndim > 1:
            raise Uneven
        warnings.warn(
            "a cut falls between equal singular values: which directions stay is decided by rounding", stacklevel=2
        )
    return k


def finite(tensor: Tensor) -> bool:
    """Whether a tensor of any dtype holds neither NaN nor Inf."""
    # NaN and Inf survive a minimum and a maximum. One pass, no copy: copies of half precision, freed between
    # small tensors that stay, leave holes in the heap as large as the file.
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(math.isfinite(float(x)) for x in tensor.aminmax())


def gram_matrix(x: Tensor, single: bool = False, width: int = 64) -> Tensor:
    """xᵀx in float64 on the CPU, shape=[..., R, R] for x [..., n, R]; only blocks on and above the diagonal.

    Multiplied where x lies: half precision in float32, where its products are exact, all else in float64; `single`
    says that x was half precision.
    """
    x = x.float() if single or half(x) else x.double()
    gram = torch.zeros(*x.shape[:-2], x.shape[-1], x.shape[-1], dtype=torch.float64)
    for i in range(0, x.shape[-1], width):
        block = (x[..., i : i + width].mT @ x[..., i:]).to("cpu").double()
        gram[..., i : i + width, i:], gram[..., i:, i : i + width] = block, block.mT
    return gram


def rounding(left: Tensor, right: Tensor, dtype: torch.dtype) -> float:
    """The largest ‖δΔW‖ that rounding the factors (m, r), (r, n) of ΔW to `dtype` can cause, to first order.

    Rounding moves an entry x by at most u|x| + t, with u the unit roundoff of the dtype and t half its smallest
    number; so ‖δB‖ ≤ u‖B‖ + t√(mr), and ‖δΔW‖ ≤ ‖δB‖‖A‖₂ + ‖B‖₂‖δA‖. In the balanced gauge that is at
    most 2u·r^¼ of ‖ΔW‖ for rank r: the reason why a cut to a small rank is also stored more exactly.
    """
    info, sides = torch.finfo(dtype), (left.double(), right.double())
    unit, smallest = info.eps / 2, info.smallest_normal * info.eps / 2
    off = [unit * x.norm() + smallest * x.numel() ** 0.5 for x in sides]
    grams = sides[0].mT @ sides[0], sides[1] @ sides[1].mT
    sizes = [torch.linalg.eigvalsh(g)[-1].clamp_min(0).sqrt() if len(g) else 0.0 for g in grams]
    return float(off[0] * sizes[1] + sizes[0] * off[1])


# -- the settings of torch -----------------------------------------------------------------------------------

_lock, _inside, _before = threading.RLock(), 0, ()


@contextmanager
def full_precision():
    """Products of float32 matrices are float32 inside, whatever a training script allowed (TF32, bfloat16).

    The settings are those of the whole process: the first of several threads saves them, the last restores them.
    """
    global _inside, _before
    with _lock:
        if not _inside:
            _before = _highest()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _restore(*_before)


def _backends() -> list:
    """What holds a precision of its own, in torch 2.9 and later."""
    found = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    return [b for b in found if hasattr(b, "fp32_precision")]


def _highest() -> tuple[str, list[str]]:
    """Set full precision; what was set before, for `_restore`.

    torch keeps an old setting and a new one, and refuses to say either where they disagree. The new one goes
    first: with it at "ieee" the old one can be asked for, and both are moved, so that inside nothing disagrees.
    """
    new = [b.fp32_precision for b in _backends()]
    for b in _backends():
        b.fp32_precision = "ieee"
    old = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    return old, new


def _restore(old: str, new: list[str]) -> None:
    torch.set_float32_matmul_precision(old)
    for b, precision in zip(_backends(), new):
        b.fp32_precision = precision
