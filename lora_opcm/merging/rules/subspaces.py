"""Means of subspaces, and the sum seen through them."""

import torch
from torch import Tensor

from ...geometry.means import most_common, stationary
from ...numerics import RTOL_SINGLE
from ...values import AUTO, Count, Density, Limit, Rule
from ..core import Core, Spectrum
from ..method import merge_method
from ..remarks import remark
from .entries import canonical, elect, trim
from .frames import polar


def onto(core: Core, left: Tensor, right: Tensor) -> Tensor:
    """UUᵀ (Σ Cₜ) VVᵀ for frames U (p, k), V (q, k). Warns where less than a hundredth of ‖Σ Cₜ‖² is left."""
    total = core.total()
    inside = left.mT @ total @ right
    largest = max(float(c.norm()) for c in core.cores)
    if float(total.norm()) > 1e-3 * largest and float(inside.norm()) < 0.1 * float(total.norm()):
        remark("the mean subspaces keep less than 1 % of the sum of the updates")
    return left @ inside @ right.mT


def leading(core: Core, k: int | None, common: bool) -> tuple[list[Spectrum], int]:
    """The thin SVDs of the cores that are not zero, and k, their largest rank unless given.

    It is cut to what there is: with `common` to the directions that each of them has, else to what all of them span.
    """
    frames = [f for f in core.frames() if len(f[1])]
    ranks = [len(s) for _, s, _ in frames]
    k = k or max(ranks, default=0)
    if common or not frames:
        return frames, min([k, *ranks])
    stacks = [torch.cat(side, 1) for side in zip(*((u, vh.mT) for u, _, vh in frames), strict=True)]
    spanned = [int((s > RTOL_SINGLE * s[0]).sum()) for s in map(torch.linalg.svdvals, stacks)]
    return frames, min(k, *spanned)


@merge_method("chordal_mean", source="this package", keeps="three sums")
def chordal_mean(core: Core, k: Limit = None) -> Tensor:
    """The sum, seen through the chordal means of the output and of the input subspaces."""
    frames, k = leading(core, k, common=False)
    if not frames:
        return torch.zeros_like(core.cores[0])
    share = [1 / min(k, len(s)) for _, s, _ in frames]  # of mixed ranks, so that Σ φ is what is maximised
    means = [most_common(side, share, k) for side in ([x.u for x in frames], [x.vh.mT for x in frames])]
    for said in {tie for _, tie in means if tie}:
        remark(f"chordal_mean: {said}")
    return onto(core, *(mean for mean, _ in means))


@merge_method("karcher_mean", source="this package")
def karcher_mean(core: Core, k: Limit = None, starts: Count = 1) -> Tensor:
    """As `chordal_mean`, with the means of squared geodesic distance; k directions of every task.

    Iterates to a gradient of 1e-6 at most 100 times: subspaces of unrelated adapters are nearly orthogonal, far
    outside the ball where the mean is unique, and the iteration then creeps. With starts > 1 it begins again at as many
    of the subspaces, those of the least squared distances to the others first, and keeps the lowest end.
    """
    frames, k = leading(core, k, common=True)
    if not frames:
        return torch.zeros_like(core.cores[0])
    sides = [u[:, :k] for u, _, _ in frames], [vh[:k].mT for _, _, vh in frames]
    ends = [stationary(side, None, 1e-6, 100, min(starts, 1 + len(side))) for side in sides]
    if any(end.gradient > 1e-6 for end in ends):
        remark("karcher_mean stopped after 100 steps, before it was stationary")
    if any(end.far for end in ends):
        every = len(core.factors) + 1
        hint = f"; --option starts={every} (starts={every}) begins at each" * (starts < every)
        remark(f"the subspaces lie further than π/4 from their karcher_mean, where there may be a lower one{hint}")
    return onto(core, ends[0].frame, ends[1].frame)


@merge_method("quotient_mean", source="after GeoMerge, arXiv 2604.27155")
def quotient_mean(core: Core, k: Limit = None, steps: Count = 50) -> Tensor:
    """Fréchet mean of balanced factors [U√Σ; V√Σ] modulo O(k): align all to the mean, average, repeat."""
    frames, k = leading(core, k, common=True)
    if not frames:
        return torch.zeros_like(core.cores[0])
    p = core.cores[0].shape[0]
    points = [torch.cat([u[:, :k], vh[:k].mT]) * s[:k].sqrt() for u, s, vh in frames]
    # A start that does not depend on the order of the adapters: the balanced factors of their plain mean.
    u, s, vh = torch.linalg.svd(core.total() / len(core.factors), full_matrices=False)
    mean = torch.cat([u[:, :k], vh[:k].mT]) * s[:k].sqrt()
    for _ in range(steps):
        new = torch.stack([x @ polar(x.mT @ mean) for x in points]).sum(0) / len(core.factors)
        moved = float((new - mean).norm() / new.norm())
        mean = new
        if moved < 1e-12:
            break
    return mean[:p] @ mean[p:].mT


@merge_method("ctm", source="Compress then Merge, arXiv 2606.03723", scale=AUTO)
def ctm(core: Core, k: Limit = None, rule: Rule = "sum", density: Density = 0.5) -> Tensor:
    """Compress, then merge: shared k-dimensional subspaces of most energy, then a rule on k×k coordinates."""
    k = k or max([1, *(len(x.s) for x in core.frames())])
    left, parts, right = canonical(core)
    left, parts, right = left[:, :k], [c[:k, :k] for c in parts], right[:, :k]
    merged = torch.stack(parts).sum(0) if rule == "sum" else elect([trim(c, density) for c in parts])
    return left @ merged @ right.mT
