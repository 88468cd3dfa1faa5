"""Rules that keep the singular directions of the sum, or most of them, and give it another spectrum."""

import torch
from torch import Tensor

from ...lowrank import LowRank
from ...numerics import RTOL_SINGLE, keep_rank, nonzero_svd
from ...values import AUTO, Density, Energy, Limit, Share
from ..batch import Batch
from ..core import Core, Spectrum
from ..method import merge_method
from .frames import polar


@merge_method("iso_c", source="Marczak et al., arXiv 2502.04959", keeps="one sum", scale=AUTO, batched=True)
def iso_c(core: Core | Batch, rank: Limit = None, energy: Energy = None) -> Spectrum:
    """The sum, cut to `rank`, with its spectrum made flat: U σ̄ Vᵀ, σ̄ the mean of the singular values kept.

    Cut first: of a flat spectrum any directions could be dropped, and rounding would choose.
    """
    u, s, vh = leading(core.total(), core.dtype, rank, energy)
    return Spectrum(u, s.mean(-1, keepdim=True).expand_as(s) if s.numel() else s, vh)


@merge_method("iso_cts", source="Marczak et al., arXiv 2502.04959", scale=AUTO)
def iso_cts(core: Core, common: Share = 0.8, rank: Limit = None, energy: Energy = None) -> Tensor:
    """Iso-C on the leading share `common` of the sum's directions and the leading residual ones of each task.

    With `rank` or `energy` it is that many directions of the sum that the shares are of.
    """
    count, total = len(core.factors), core.total()
    if float(total.norm()) <= RTOL_SINGLE * sum(f.norm() for f in core.factors):  # of what cancels, rounding is left
        return torch.zeros_like(total)
    u, s, vh = leading(total, core.dtype, rank, energy)
    each = min(round((1 - common) * len(s) / count), len(s) // count)
    k = len(s) - each * count
    left, spectrum, right = [u[:, :k]], [s[:k]], [vh[:k].mT]
    for f in core.factors if each else []:
        ut, st, vt = LowRank(f.left - u[:, :k] @ (u[:, :k].mT @ f.left), f.right).svd()
        kept = min(each, int((st > RTOL_SINGLE * f.norm()).sum()))  # of a task the common ones hold, rounding is left
        left.append(ut[:, :kept])
        spectrum.append(st[:kept])
        right.append(vt[:kept].mT)
    mean = torch.cat(spectrum).mean() if len(s) else 0.0
    u, v = (polar(torch.cat(x, 1), core.dtype) for x in (left, right))
    return mean * u @ v.mT


@merge_method("subspace_boosting", source="Skorobogat et al., arXiv 2506.16506", keeps="one sum", scale=AUTO)
def subspace_boosting(core: Core, beta: Share = 0.5, rank: Limit = None, energy: Energy = None) -> Spectrum:
    """The sum, cut to `rank`, with its small singular values raised: to the first by which a share `beta` is reached.

    U diag(max(σᵢ, σ_c)) Vᵀ with c the smallest index at which σ₁ + … + σ_c ≥ β Σ σᵢ. At β = 0 the spectrum is flat, at
    1 it is that of the sum. Cut first, as the raised values are all the same. The paper has β = 0.01 for updates of
    full rank, of which one value is a small share; of low ones the first is that share already, and all would be flat.
    Ours leaves out what is zero but for rounding: a full SVD fills it with directions that are nobody's.
    """
    u, s, vh = leading(core.total(), core.dtype, rank, energy)
    below = int((s.cumsum(0) < beta * s.sum() * (1 - 1e-12)).sum())
    return Spectrum(u, s.clamp_min(s[min(below, len(s) - 1)] if len(s) else 0.0), vh)


@merge_method("svc", source="Li et al., arXiv 2602.05536", scale=AUTO)
def svc(core: Core, alpha: Density = 1.0) -> Spectrum:
    """Singular value calibration: the sum, with the directions of outputs that it counts several times scaled down.

    UΣVᵀ of the sum becomes U diag(γᵢσᵢ) Vᵀ with γᵢ = T / Σₜ max(α, sₜᵢ), and sₜᵢ = ⟨a, aₜ⟩ / ‖aₜ‖² says how often the
    response aₜ = uᵢᵀΔWₜ of a task is in that of the sum, a = σᵢvᵢᵀ. A task with no response, below 1e-6 of its norm,
    has s = 0 (the code of the paper: below 1e-12 of ‖aₜ‖²). The paper calibrates what any rule merged, a mean with
    α = 1/T: the result is that of the sum with α = 1.
    """
    u, s, vh = nonzero_svd(core.total(), core.dtype)
    counted = torch.zeros_like(s)
    for f in core.factors:
        response = u.mT @ f.left @ f.right
        size = response.square().sum(1)
        there = size > (RTOL_SINGLE * f.norm()) ** 2
        counted += torch.where(there, s * (response * vh).sum(1) / size.where(there, 1), 0).clamp_min(alpha)
    s, order = (len(core.factors) / counted * s).sort(descending=True)
    return Spectrum(u[:, order], s, vh[order])


def leading(x: Tensor, dtype: torch.dtype, rank: int | None, energy: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD of x, cut as asked."""
    u, s, vh = nonzero_svd(x, dtype)
    k = keep_rank(s, rank, energy)
    return u[..., :k], s[..., :k], vh[..., :k, :]
