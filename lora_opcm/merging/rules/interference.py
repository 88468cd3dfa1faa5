"""Least squares on what every update does, with no data: an update ΔW = UΣVᵀ says which inputs and outputs it uses.

The inputs that a layer was trained on lie in the rows of ΔW, by what they weigh there: ΔWᵀΔW stands for their Gram
matrix in RegMean. Merged that way, an update that gets the inputs of another task is asked to do as that task would.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...values import AUTO, Share
from ..core import Core
from ..method import merge_method

TINY = 1e-12  # relative; an eigenvalue below it is rounding


@merge_method("wudi", source="Cheng et al., arXiv 2503.08099, in closed form", keeps="three sums", scale=AUTO)
def wudi(core: Core, ridge: Share = 0.01) -> Tensor:
    """The update that interferes least: it does to the inputs of every task what that task does, near the sum.

    Minimises Σₜ ‖(W − ΔWₜ)ΔWₜᵀ‖² / ‖ΔWₜ‖² + λ‖W − S‖² with S = Σ ΔWₜ: W = (Σ ΔWₜGₜ + λS)(Σ Gₜ + λI)⁻¹ for
    Gₜ = ΔWₜᵀΔWₜ / ‖ΔWₜ‖², and λ the share `ridge` of the largest eigenvalue of Σ Gₜ. The code of the paper takes 300
    steps of Adam from S and has no λ: stopping early keeps W near S where little is at stake, as λ does here. (Its
    code for images divides by ‖ΔWₜ‖, that for texts by the square.) At λ = 0, and with rows of all updates that do
    not depend on each other, W does exactly what every task does, whatever its weight.
    """
    weights = [1 / size if size else 0.0 for size in core.norms()]
    return least_interference(core, weights, core.total(), ridge)


@merge_method("actmat", source="Abdel Hameed et al., arXiv 2604.01329", keeps="three sums", scale=AUTO)
def actmat(core: Core, ridge: Share = 0.0) -> Tensor:
    """RegMean with no data: the Gram matrix of the inputs of a task is estimated by ΔWᵀΔW of its update.

    W = (Σ ΔWₜGₜ)(Σ Gₜ)⁺ with Gₜ = ΔWₜᵀΔWₜ, as the code of the paper has it. `ridge` is ours: it adds λ/T to the
    diagonal of every Gₜ and so leads to the mean; λ is that share of the largest eigenvalue of Σ Gₜ. Without
    it, and with rows of all updates that do not depend on each other, this is `wudi` without it. Two sums are
    needed then, and Σ ΔWₜ for a ridge.
    """
    return least_interference(core, [1.0] * len(core.factors), core.total() / len(core.factors), ridge)


def least_interference(core: Core, weights: Sequence[float], near: Tensor, ridge: float) -> Tensor:
    """The W that minimises Σ wₜ‖(W − Cₜ)Cₜᵀ‖² + λ‖W − near‖², of least norm where that leaves a choice; (p, q).

    λ is the share `ridge` of the largest eigenvalue of Σ wₜCₜᵀCₜ.
    """
    a = torch.cat([f.right for f in core.factors])
    grams = [w * f.left.mT @ f.left for w, f in zip(weights, core.factors, strict=True)]  # of the size of a rank
    b = [f.left @ (f.right @ f.right.mT) @ g for f, g in zip(core.factors, grams, strict=True)]
    values, v = torch.linalg.eigh(a.mT @ torch.cat([g @ f.right for f, g in zip(core.factors, grams, strict=True)]))
    shift = ridge * values[-1:].clamp_min(0)
    right = torch.cat(b, 1) @ a + shift * near
    total = values + shift
    keep = total > TINY * total[-1:]
    return (right @ v[:, keep] / total[keep]) @ v[:, keep].mT


@merge_method(
    "dop",
    source="after Dual Projections, NeurIPS 2025 (OpenReview zD5cUX67b9)",
    keeps="one sum",
    ordered=True,
    scale=AUTO,
)
def dop(core: Core, alpha: Share = 0.8) -> Tensor:
    """One adapter at a time: the update that does what the merged one does and what the new one does, on both sides.

    M ← argmin α d(W, M) + (1 − α) d(W, ΔWₜ) with d(W, UΣVᵀ) = ‖ΣUᵀ(W − UΣVᵀ)‖² + ‖(W − UΣVᵀ)VΣ‖², of which the nearest
    to M + ΔWₜ. Its code (FusionBench) takes 200 steps of Adam from the mean of both and moves α at every step by
    MGDA, from 0.8 on; here α stays, as where MGDA is switched off there, and the minimum is the exact one.
    """
    cores = core.cores
    merged = cores[0].clone()
    for t in range(1, len(cores)):
        p, q = core.live(t + 1)
        merged[:p, :q] = _dual(merged[:p, :q], cores[t][:p, :q], alpha)
    return merged


def _dual(merged: Tensor, new: Tensor, alpha: float) -> Tensor:
    """One step of `dop`, (p, q): W = M + Δ − D, LD + DR = α(MMᵀΔ + ΔMᵀM) + (1 − α)(ΔΔᵀM + MΔᵀΔ).

    L = αMMᵀ + (1 − α)ΔΔᵀ and R = αMᵀM + (1 − α)ΔᵀΔ are diagonalised. D, what the two do to each other, is zero where
    they share no direction.
    """
    weighted = ((alpha, merged, new), (1 - alpha, new, merged))
    left, a = torch.linalg.eigh(sum(w * x @ x.mT for w, x, _ in weighted))
    right, b = torch.linalg.eigh(sum(w * x.mT @ x for w, x, _ in weighted))
    shared = sum(w * (x @ (x.mT @ other) + other @ (x.mT @ x)) for w, x, other in weighted)
    both = left[:, None] + right
    keep = both > TINY * (left[-1:].clamp_min(0) + right[-1:].clamp_min(0))
    return merged + new - a @ torch.where(keep, a.mT @ shared @ b / both.where(keep, 1), 0) @ b.mT
