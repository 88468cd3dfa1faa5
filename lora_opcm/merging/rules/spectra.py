"""Rules that make the spectrum of the sum flat."""

import torch
from torch import Tensor

from ...numerics import RTOL_SINGLE, keep_rank, nonzero_svd
from ...values import Energy, Limit, Share
from ..core import Core
from ..method import merge_method
from .frames import polar


@merge_method("iso_c", source="Marczak et al., arXiv 2502.04959", keeps="one sum")
def iso_c(core: Core, rank: Limit = None, energy: Energy = None) -> Tensor:
    """The sum, cut to `rank`, with its spectrum made flat: U σ̄ Vᵀ, σ̄ the mean of the singular values kept.

    Cut first: of a flat spectrum any directions could be dropped, and rounding would choose.
    """
    u, s, vh = leading(core.total(), core.dtype, rank, energy)
    return (s.mean() if len(s) else 0.0) * u @ vh


@merge_method("iso_cts", source="Marczak et al., arXiv 2502.04959")
def iso_cts(core: Core, common: Share = 0.8, rank: Limit = None, energy: Energy = None) -> Tensor:
    """Iso-C on the leading share `common` of the sum's directions and the leading residual ones of each task.

    With `rank` or `energy` it is that many directions of the sum that the shares are of.
    """
    cores = core.cores
    u, s, vh = leading(core.total(), core.dtype, rank, energy)
    each = min(round((1 - common) * len(s) / len(cores)), len(s) // len(cores))
    k = len(s) - each * len(cores)
    left, spectrum, right = [u[:, :k]], [s[:k]], [vh[:k].mT]
    for c in cores if each else []:
        ut, st, vt = nonzero_svd(c - u[:, :k] @ (u[:, :k].mT @ c), core.dtype)
        kept = min(each, int((st > RTOL_SINGLE * c.norm()).sum()))  # of a task the common ones hold, rounding is left
        left.append(ut[:, :kept])
        spectrum.append(st[:kept])
        right.append(vt[:kept].mT)
    mean = torch.cat(spectrum).mean() if len(s) else 0.0
    return mean * polar(torch.cat(left, 1)) @ polar(torch.cat(right, 1)).mT


def leading(x: Tensor, dtype: torch.dtype, rank: int | None, energy: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD of x, cut as asked."""
    u, s, vh = nonzero_svd(x, dtype)
    k = keep_rank(s, rank, energy)
    return u[:, :k], s[:k], vh[:k]
