"""Whitening: stacked frames made orthonormal again, all at once, one adapter at a time, or from three running sums.

TSV-Merge stacks the singular frames of all tasks and whitens both stacks. The polar factor of a stack U is
(UUᵀ)^{-1/2} U, and UUᵀ is the sum of the tasks' projectors; so what TSV returns is

    L^{-1/2} S R^{-1/2},   S = Σ ΔWₜ,   L = Σ UₜUₜᵀ,   R = Σ VₜVₜᵀ.

Sums need neither all adapters at once nor an order. `power` weights the directions of each task by
(σ/‖σ‖)^power inside L and R: 0 is TSV, 1 flattens the spectrum of a task that is alone. Whitened on one side only,
L^{-1/2} S or S R^{-1/2}, the other of L and R is not needed: two sums are enough.

Source of TSV-Merge: Gargiulo et al., arXiv 2412.00081.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ...numerics import Uneven, alike, nonzero, nonzero_svd
from ...values import AUTO, Limit, Share, Sides
from ..batch import Batch
from ..core import Core
from ..method import merge_method

SVD = tuple[Tensor, Tensor, Tensor]
TINY = 1e-6  # relative; a singular value of a stack below it belongs to directions that depend on each other
ROUNDING = TINY**2  # relative; an eigenvalue of L below it does so, or is what a subtraction left of a direction


def polar(x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """U Vᵀ of the thin SVD of `x`, its nearest matrix with orthonormal columns (or rows); from factors of `dtype`.

    Only nonzero singular directions take part, σ > 1e-6 σ₁ for every dtype. Where columns depend on each other, as with
    an adapter given twice, the rest of a full SVD is an arbitrary basis, and the result would depend on the gauge.
    """
    u, s, vh = nonzero_svd(x, dtype)
    k = nonzero(s, torch.float32)  # those above TINY
    return u[..., :k] @ vh[..., :k, :]


@merge_method("tsv", source="Gargiulo et al., arXiv 2412.00081", keeps="three sums", scale=AUTO, batched=True)
def tsv(core: Core | Batch, directions: Limit = None) -> Tensor:
    """Stack the leading singular frames of all tasks, whiten both stacks, put the spectra back."""
    frames = [(u[..., :directions], s[..., :directions], vh.mT[..., :directions]) for u, s, vh in core.frames()]
    u, s, v = (torch.cat(parts, dim=-1) for parts in zip(*frames, strict=True))
    return (polar(u, core.dtype) * s[..., None, :]) @ polar(v, core.dtype).mT


@merge_method("whitening", source="this package", keeps="all directions", ordered=True, scale=AUTO, batched=True)
def whitening(core: Core | Batch) -> Tensor:
    """One adapter at a time: whiten [U_state U_new] and [V_state V_new], stack the spectra.

    Where directions of one side depended on each other, the state's frames are those of the update that it is; what
    cancelled to rounding is none of it.
    """
    (u, s, vh), *others = core.frames()
    v = vh.mT
    for new_u, new_s, new_vh in others:
        u, apart = _beside(u, new_u, core.dtype)
        v, distinct = _beside(v, new_vh.mT, core.dtype)
        s = torch.cat([s, new_s], -1)
        if not (apart and distinct):
            largest = s.amax(-1, keepdim=True)
            u, s, vh = nonzero_svd((u * s[..., None, :]) @ v.mT, core.dtype)
            k = nonzero(s, core.dtype, largest)
            u, s, v = u[..., :k], s[..., :k], vh[..., :k, :].mT
    return (u * s[..., None, :]) @ v.mT


def _beside(frame: Tensor, new: Tensor, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """`polar` of [frame new], (n, c) and (n, r) with orthonormal columns, in 6ncr operations; whether it has, too.

    With frameᵀ new = A diag(s) Bᵀ the Gram matrix of the stack has the eigenvalues 1 ± s on (aᵢ, ±bᵢ)/√2, and 1
    elsewhere: its inverse root is the identity and a correction of those ranks.
    """
    a, s, bh = torch.linalg.svd(frame.mT @ new, full_matrices=False)
    if bool((s > 1 - 1e-6).any()):
        return polar(torch.cat([frame, new], -1), dtype), False
    more, less = (1 + s).rsqrt() - 1, (1 - s).rsqrt() - 1
    same, across = (more + less)[..., None, :] / 2, (more - less)[..., None, :] / 2
    old, mixed = frame @ a, new @ bh.mT
    both = [frame + (old * same + mixed * across) @ a.mT, new + (old * across + mixed * same) @ bh]
    return torch.cat(both, -1), True


@merge_method("whitened_sum", source="this package; TSV at power 0", keeps="three sums", scale=AUTO, batched=True)
def whitened_sum(core: Core | Batch, power: Share = 0.5, cap: Limit = None, sides: Sides = "both") -> Tensor:
    """The sum, whitened by what its directions share: L^{-1/2} S R^{-1/2} of three running sums; TSV at power 0.

    `sides` says which are whitened: the outputs (left) L^{-1/2} S, the inputs (right) S R^{-1/2}, or both.
    """
    refuse_flat(power, cap, sides)
    if cap is None:
        return Sums.of(core.frames(), power).core(sides)
    if isinstance(core, Batch):
        raise Uneven  # what a cap keeps is for each to say
    sums = Sums.empty(*core.shape)
    for frames in core.frames():
        sums = sums.add(frames, power, cap, sides)
    return sums.left @ sums.core(sides) @ sums.right.mT


def refuse_flat(power: float, cap: int | None, sides: str = "both") -> None:
    """Raise a ValueError if a cap would choose directions by a spectrum that `power` makes flat.

    At power 1 the singular values of independent tasks are their norms, each as often as the task has directions:
    which of them a cap keeps would be decided by rounding. One side alone takes only half of that, and leaves √(σ‖σ‖)
    of a σ.
    """
    if power == 1 and cap is not None and sides == "both":
        raise ValueError(
            f"whitened_sum at power 1 leaves a flat spectrum, of which a cap of {cap} would keep what rounding"
            " decides: expected a power below 1, or no cap"
        )


@merge_method("pico", source="after Tang and Yang, arXiv 2604.16826", keeps="three sums", scale=AUTO)
def pico(core: Core) -> Tensor:
    """The sum, with the output directions that many adapters share scaled down; each module in its mean size.

    U diag(a) Uᵀ Σ ΔWₜ with U and σ of [ΔW₁ … ΔW_T] and aᵢ = 1 / (1 + (T − 1) σᵢ² / ‖σ‖²); then every module gets the
    mean norm of the T updates that are not zero there. Two sums are needed, Σ ΔWₜ and Σ ΔWₜΔWₜᵀ. The paper has
    U and σ of the factors [B₁ … B_T], which depend on the gauge: ours are the same where all A have orthonormal rows.
    It is meant to go before any rule; this is the sum after it.
    """
    sizes = [size**0.5 for size in core.norms() if size]
    weighed = torch.cat([f.left @ (f.right @ f.right.mT) for f in core.factors], 1)
    values, u = torch.linalg.eigh(weighed @ torch.cat([f.left for f in core.factors], 1).mT)  # Σ CₜCₜᵀ
    shares = values.clamp_min(0) / values.clamp_min(0).sum().clamp_min(torch.finfo(values.dtype).tiny)
    found = (u / (1 + (len(sizes) - 1) * shares)) @ (u.mT @ core.total())
    mean, norm = sum(sizes) / max(len(sizes), 1), float(found.norm())
    return found * (mean / norm if norm > ROUNDING * mean else 0.0)  # of updates that cancel, rounding is left


@dataclass(frozen=True, eq=False)
class Sums:
    """The three sums of one module, in frames that hold the directions seen so far.

    left (m, p) and right (n, q) have orthonormal columns; S (p, q), L (p, p), R (q, q) are float64.
    """

    left: Tensor
    right: Tensor
    S: Tensor
    L: Tensor
    R: Tensor

    def __post_init__(self):
        p, q = self.left.shape[-1], self.right.shape[-1]
        if (self.S.shape[-2:], self.L.shape[-2:], self.R.shape[-2:]) != ((p, q), (p, p), (q, q)):
            found = [tuple(x.shape) for x in (self.S, self.L, self.R)]
            raise ValueError(f"expected S {(p, q)}, L {(p, p)} and R {(q, q)}, got {found}")
        for name in (
            "left",
            "right",
            "S",
            "L",
            "R",
        ):  # one layout: products of a state from a file round alike
            object.__setattr__(self, name, getattr(self, name).contiguous())

    @classmethod
    def empty(cls, m: int, n: int) -> "Sums":
        zeros = lambda a, b: torch.zeros(a, b, dtype=torch.float64)  # noqa: E731
        return cls(zeros(m, 0), zeros(n, 0), zeros(0, 0), zeros(0, 0), zeros(0, 0))

    @classmethod
    def of(cls, svds: Sequence[SVD], power: float) -> "Sums":
        """Of all updates at once, each U (m, r), σ (r,), Vᵀ (r, n) with m, n small: in the frames of all directions."""
        taken = [_shares(svd, power) for svd in svds]
        u, s, v, share = (torch.cat(x, -1) for x in zip(*((u, s, vh.mT, w) for u, s, vh, w in taken), strict=True))
        left, right = (torch.eye(x.shape[-2], dtype=torch.float64) for x in (u, v))
        s, share = s[..., None, :], share[..., None, :]
        return cls(left, right, (u * s) @ v.mT, (u * share) @ u.mT, (v * share) @ v.mT)

    def add(self, svd: SVD, power: float, cap: int | None, sides: str = "both") -> "Sums":
        """With one more update, given as U (m, r), σ (r,), Vᵀ (r, n).

        The frames keep at most `cap` directions, the leading ones of `core(sides)`. Without a cap the result does
        not depend on the order of additions, nor what is kept on the sides.
        """
        u, s, vh, share = _shares(svd, power)
        left, b = _extended(self.left, u)
        right, d = _extended(self.right, vh.mT)
        grown = Sums(
            left, right,
            _bordered(self.S, b, d) + (b * s) @ d.mT,
            _bordered(self.L, b, b) + (b * share) @ b.mT,
            _bordered(self.R, d, d) + (d * share) @ d.mT,
        )  # fmt: skip
        if cap is None or max(grown.S.shape) <= cap:
            return grown
        p, _, qh = torch.linalg.svd(grown.core(sides), full_matrices=False)
        p, q = p[:, :cap], qh[:cap].mT
        return Sums(left @ p, right @ q, p.mT @ grown.S @ q, p.mT @ grown.L @ p, q.mT @ grown.R @ q)

    def subtract(self, svd: SVD, power: float) -> "Sums":
        """Without an update that `add` took in before and no cap has cut since; directions only it had go."""
        u, s, vh, share = _shares(svd, power)
        b, d = self.left.mT @ u, self.right.mT @ vh.mT
        L, R = self.L - (b * share) @ b.mT, self.R - (d * share) @ d.mT
        p, q = _range(L, self.L), _range(R, self.R)
        S = p.mT @ (self.S - (b * s) @ d.mT) @ q
        return Sums(self.left @ p, self.right @ q, S, p.mT @ L @ p, q.mT @ R @ q)

    def core(self, sides: str = "both") -> Tensor:
        """L^{-1/2} S R^{-1/2} in the frames, (p, q), or with one of the two factors alone."""
        found = self.S if sides == "right" else inverse_root(self.L) @ self.S
        return found if sides == "left" else found @ inverse_root(self.R)


def inverse_root(x: Tensor) -> Tensor:
    """x^{-1/2} of a positive semidefinite matrix, zero where x is."""
    values, vectors = torch.linalg.eigh(x)
    k = alike((values > ROUNDING * values[..., -1:]).sum(-1))
    vectors = vectors[..., values.shape[-1] - k :]
    return (vectors * values[..., None, values.shape[-1] - k :].rsqrt()) @ vectors.mT


def _shares(svd: SVD, power: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """U, σ and Vᵀ in float64, and the weights (σ/‖σ‖)^power of their directions in L and R."""
    u, s, vh = (x.to("cpu", torch.float64) for x in svd)  # where the sums are
    relative = s / s[..., :1]  # the square of a tiny norm is zero
    return u, s, vh, (relative / relative.norm(dim=-1, keepdim=True)) ** power


def _range(x: Tensor, before: Tensor) -> Tensor:
    """Orthonormal columns that span the range of `x`, for `x` left over from a larger `before`."""
    values, vectors = torch.linalg.eigh(x)
    size = torch.linalg.eigvalsh(before)[-1:]
    return vectors[:, values > ROUNDING * size]


def _extended(frame: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal frame of both spans, and the coordinates of `new` in it."""
    beside, inside, outside = extend(frame, new, TINY)
    return torch.cat([frame, beside], 1), torch.cat([inside, outside])


def _bordered(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """x with zero rows and columns, as many as these coordinates have."""
    return F.pad(x, (0, len(right) - x.shape[1], 0, len(left) - x.shape[0]))


def extend(frame: Tensor, new: Tensor, tiny: float = 1e-10) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal columns beside `frame` (n, c) that hold what of `new` (n, r) is outside it; `new` in both.

    Returns E (n, e), e ≤ r, and the coordinates of `new` in the frame (c, r) and in E (e, r). What of `new` is below
    `tiny` of its columns is left out.
    """
    inside = frame.mT @ new
    rest = new - frame @ inside
    rest = rest - frame @ (frame.mT @ rest)  # twice is enough
    sizes = new.norm(dim=0)
    beside, r = torch.linalg.qr(rest)
    if r.shape[0] < r.shape[1] or bool((r.diagonal().abs() <= 1e-4 * sizes).any()):
        u, s, _ = torch.linalg.svd(rest / sizes.clamp_min(torch.finfo(sizes.dtype).tiny), full_matrices=False)
        beside = u[:, s > tiny]
        beside = beside - frame @ (frame.mT @ beside)  # what rounding left of the frame in a small column
        r = beside.mT @ rest
    return beside, inside, r
