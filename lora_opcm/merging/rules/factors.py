"""Rules that see factors: OPCM on the two of them apart, and least squares with the inputs of the layer."""

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from ...gauge import padded
from ...lowrank import LowRank
from ...values import Gauge, Share, Value
from ..core import Core
from ..method import merge_method
from .projection import locked_sum

Grams = Annotated[Sequence, Value("a dict of module → XᵀX for every adapter", lambda x: isinstance(x, Sequence))]


@merge_method(
    "lora_opcm",
    space="updates",
    source="after Tang et al., arXiv 2501.09522",
    keeps="one sum",
    ordered=True,
    gauge_invariant=False,
    scale="norm",
)
def lora_opcm(
    updates: Sequence[LowRank], alpha: Share = 0.5, gauge: Gauge = "given"
) -> tuple[LowRank, list[list[float]]]:
    """OPCM on the two factors apart: it merges numbers that only their product gives a meaning."""
    cores = [Core.of(side) for side in sides(updates, gauge)]
    totals = [locked_sum(core, alpha) for core in cores]
    left, right = (core.lift(total)[0].delta() for core, total in zip(cores, totals, strict=True))
    return LowRank(left, right), [
        [float(total.s.square().sum()), *core.norms()] for core, total in zip(cores, totals, strict=True)
    ]


def sides(updates: Sequence[LowRank], gauge: str) -> tuple[list[LowRank], list[LowRank]]:
    """The factors B (m, r) and A (r, n) of updates of one module as updates of their own, B·I and I·A.

    Raises
    ------
    ValueError
        If two updates that are not of rank 0 differ in rank.
    """
    ranks = {u.rank for u in updates if u.rank}
    if len(ranks) > 1:
        raise ValueError(f"merging factors needs equal ranks, got {sorted(ranks)}")
    r = max(ranks, default=0)
    updates = [padded(u.balanced() if gauge == "balanced" else u, r) for u in updates]
    eyes = [torch.eye(r, dtype=u.dtype, device=u.left.device) for u in updates]
    lefts = [LowRank(u.left, eye) for u, eye in zip(updates, eyes, strict=True)]
    return lefts, [LowRank(eye, u.right) for u, eye in zip(updates, eyes, strict=True)]


@merge_method("regmean", space="updates", source="Jin et al., arXiv 2212.09849", keeps="dense sums", data=True)
def regmean(updates: Sequence[LowRank], grams: Grams = ()) -> LowRank:
    """Least squares on the outputs: (Σ ΔWₜGₜ)(Σ Gₜ)⁻¹ with Gₜ = XᵀX (n, n) of the layer's inputs on task t.

    `merge` takes `grams` as one dict module → XᵀX per adapter.
    """
    n = updates[0].shape[1]
    if len(grams) != len(updates) or any(g is None or g.shape != (n, n) for g in grams):
        got = [None if g is None else tuple(g.shape) for g in grams]
        raise ValueError(f"regmean needs grams: expected a Gram matrix {(n, n)} per adapter, got {got}")
    wide: list[Tensor] = [g.to(updates[0].left.device, torch.float64) for g in grams]
    total = torch.stack(wide).sum(0)
    total += 1e-9 * total.diagonal().mean() * torch.eye(n).to(total)  # rank-deficient inputs
    right = [torch.linalg.solve(total, g @ u.right.double().mT).mT for u, g in zip(updates, wide, strict=True)]
    return LowRank(torch.cat([u.left.double() for u in updates], 1), torch.cat(right, 0))
