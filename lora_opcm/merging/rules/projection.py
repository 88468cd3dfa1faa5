"""OPCM, orthogonal-projection continual merging.

Source: Tang et al., "Merging Models on the Fly Without Retraining", arXiv 2501.09522, equations 5 to 9, and
the code released with it (FusionBench). The two do not project alike; `variant` says which reading is meant.

The projection does not see the scale of the merged update M, so λ never compounds: M is the plain sum
S = Σ P_t(Δ_t) times one final scale, the mean norm of the adapters over ‖S‖.

With the two-sided cut the k protected directions stay singular directions of S for good: nothing that is let in
touches them. So a step decomposes what lies beyond them only, bordered by the new update: with half of the nuclear
norm protected, about an eighth of the operations of decomposing S anew.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ...numerics import Uneven, nonzero, nonzero_svd
from ...values import Share, Variant, expect
from ..batch import Batch
from ..core import Core, Spectrum
from ..method import merge_method
from .frames import extend

SMALL = 80  # summed rank up to which decomposing all of the sum costs less than keeping account of what is locked
GRAIN = 16  # locked columns are left out of a block so many at a time, that blocks of many modules have one size


@merge_method(
    "opcm",
    source="Tang et al., arXiv 2501.09522",
    keeps="one sum",
    ordered=True,
    scale="norm",
    batched=True,
)
def opcm(core: Core | Batch, alpha: Share = 0.5, variant: Variant = "paper") -> Tensor | Spectrum:
    """One adapter at a time: a sum of updates, each projected off what is there already."""
    if isinstance(core, Batch):
        return sums_side_by_side(core, alpha, variant)
    if variant == "paper" and sum(f.rank for f in core.factors) > SMALL:
        return locked_sum(core, alpha)
    return projected_sum(core, alpha, variant)


def cut(s: Tensor, alpha: float, variant: str = "paper") -> int:
    """How many leading directions of the merged update are protected, from its singular values `s`.

    `paper`: the smallest k whose leading values hold at least α of the nuclear norm (0 for α = 0, all for
    α = 1). `fusionbench`: the count of leading values whose cumulative share does not exceed α; it is one
    less wherever the share is not met exactly. (The released code returns 0 at α = 1, where its search for a
    larger share finds none; we return all.)

    `s` is descending, shape=[r]. Raises ValueError for an α outside [0, 1] or another variant.
    """
    return int(cuts(s, alpha, variant))


def cuts(s: Tensor, alpha: float, variant: str = "paper") -> Tensor:
    """`cut` of every row of `s`, shape=[..., r]."""
    expect(Share, alpha=alpha)
    expect(Variant, variant=variant)
    if alpha == 0 or not s.shape[-1]:
        return torch.zeros(s.shape[:-1], dtype=torch.int64)
    share = s.cumsum(-1) / s.sum(-1, keepdim=True)
    if variant == "fusionbench":
        return (share <= alpha + 1e-12).sum(-1)
    return ((share < alpha - 1e-12).sum(-1) + 1).clamp_max(s.shape[-1])


def project(delta: Tensor, merged: Tensor, alpha: float, variant: str, dtype) -> Tensor:
    """P(Δ): what of `delta` (p, q) a merged update lets in, in any coordinates the two share.

    `merged` may be the leading block outside which it is zero.

    With merged = UΣVᵀ and k = `cut`: `paper` keeps only the part with both indices beyond k,
    (I − U_kU_kᵀ) Δ (I − V_kV_kᵀ); `fusionbench` clears the k×k block U_k(U_kᵀΔV_k)V_kᵀ. Both clear the
    diagonal ⟨Δ, u_i v_iᵀ⟩ too, but only on numerically nonzero σ_i: beyond them a full SVD pads U and V with
    an arbitrary basis, and clearing there would make the result depend on the LAPACK build. `dtype` is that of
    the factors `merged` came from: it says what is zero.

    Raises
    ------
    ValueError
        As `cut`.
    """
    expect(Share, alpha=alpha)
    expect(Variant, variant=variant)
    u, s, vh = nonzero_svd(merged, dtype)
    u = F.pad(u, (0, 0, 0, delta.shape[0] - u.shape[0]))
    vh = F.pad(vh, (0, delta.shape[1] - vh.shape[1]))
    k = cut(s, alpha, variant)
    if variant == "paper":
        delta = delta - u[:, :k] @ (u[:, :k].mT @ delta)
        delta = delta - (delta @ vh[:k].mT) @ vh[:k]
        diagonal = ((u[:, k:].mT @ delta) * vh[k:]).sum(1)  # ⟨Δ, u_i v_iᵀ⟩ for i > k
        return delta - (u[:, k:] * diagonal) @ vh[k:]
    block = u.mT @ delta @ vh.mT
    overlap = block.diagonal().diag()
    overlap[:k, :k] = block[:k, :k]
    return delta - u @ overlap @ vh


def projected_sum(core: Core, alpha: float, variant: str) -> Tensor:
    """S = Σ P_t(Cₜ) of one module, all adapters at hand; (p, q). At step t only the live part is touched."""
    cores = core.cores
    total = cores[0].clone()
    for t in range(1, len(cores)):
        p, q = core.live(t + 1)
        merged = total[: core.live(t)[0], : core.live(t)[1]]
        total[:p, :q] += project(cores[t][:p, :q], merged, alpha, variant, core.dtype)
    return total


def locked_sum(core: Core, alpha: float) -> Spectrum:
    """`projected_sum` of the two-sided cut.

    In the bases [U_k U' E] and [V_k V' F], E and F what the next update adds to them, the sum with it is
    block-diagonal: Σ_k, and a block of Σ' and the update with its diagonal cleared. Only that block is decomposed, and
    only columns of U' and V' are written: `s` is in no order.
    """
    frames = [torch.zeros(n, min(n, sum(f.rank for f in core.factors)), dtype=torch.float64) for n in core.shape]
    s = frames[0].new_zeros(0)
    for t, update in enumerate(core.factors):
        before, after = core.live(t), core.live(t + 1)
        order, news = s.argsort(descending=True), (update.left[: after[0]], update.right[:, : after[1]].mT)
        k = cut(s[order], alpha)
        rest = order[k:]
        parts = [_beside(x[:, : len(s)], new, old) for x, new, old in zip(frames, news, before, strict=True)]
        left, right = (torch.cat([inside[rest], outside]) for _, inside, outside in parts)
        block = left @ right.mT
        block.diagonal()[: len(rest)] = s[rest]
        u, found, vh = nonzero_svd(block, core.dtype)
        more = len(found) - len(rest)
        where = torch.cat([rest, torch.arange(len(s), len(s) + more)]) if more > 0 else rest[: len(found)]
        for frame, new, (beside, _, _), turn in zip(frames, news, parts, (u, vh.mT), strict=True):
            frame[: len(new), where] = torch.cat([frame[: len(new), rest], beside], 1) @ turn
        s = torch.cat([s, found[len(rest) :]]).index_copy(0, where, found)
        if more < 0:  # what the new update cancelled
            keep = torch.cat([order[:k], where])
            s, frames = s[keep], [torch.cat([x[:, keep], torch.zeros_like(x[:, len(keep) :])], 1) for x in frames]
    order = s.argsort(descending=True)
    order = order[: nonzero(s[order], core.dtype)]
    return Spectrum(frames[0][:, order], s[order], frames[1][:, order].mT)


def sums_side_by_side(batch: Batch, alpha: float, variant: str) -> Spectrum:
    """`projected_sum` of many modules, each step one block of each.

    As in `locked_sum` the block leaves out what is locked, but `GRAIN` columns at a time: of modules that lock about as
    many the blocks have one size, and what is locked inside stays by itself, as nothing is let in beside it. Columns
    are independent, so the frames of what is there hold all of it, and a new update adds as many directions as it has
    columns.
    """
    new = torch.stack([batch.left.coords, batch.right.coords])  # of both sides [2, B, R, R]
    frames, s, done = torch.zeros_like(new), new.new_zeros(len(batch), 0), 0
    for rank in filter(None, batch.ranks):
        live = done + rank
        inside = frames[..., :done, :done].mT @ new[..., :done, done:live]
        beyond = new[..., done:live, done:live]
        k = cuts(s, alpha, variant)
        out = k // GRAIN * GRAIN if variant == "paper" else torch.zeros_like(k)
        s, groups = F.pad(s, (0, rank)), out.unique().tolist()
        for skip in groups:
            which = (out == skip).nonzero().flatten() if len(groups) > 1 else slice(None)
            rest = done - skip
            left, right = torch.cat([inside[:, which, skip:], beyond[:, which]], 2)
            block = left @ right.mT
            locked = torch.arange(skip, done) < k[which, None]
            if variant == "paper":
                block[:, :rest].masked_fill_(locked[..., None], 0)
                block[:, :, :rest].masked_fill_(locked[:, None], 0)
            else:
                block[:, :rest, :rest].masked_fill_(locked[..., None] & locked[:, None], 0)
            block.diagonal(dim1=1, dim2=2)[:, :rest] = s[which, skip:done]
            u, found, vh = nonzero_svd(block, batch.dtype)
            if found.shape[1] < block.shape[1]:
                raise Uneven  # something was cancelled
            s[which, skip:], turn = found, torch.stack([u, vh.mT])
            old = frames[:, which, :done, skip:done] @ turn[..., :rest, :]
            frames[:, which, :live, skip:live] = torch.cat([old, turn[..., rest:, :]], 2)
        s, order = s.sort(dim=-1, descending=True, stable=True)
        there = frames[..., :live, :live]
        there[:] = there.gather(3, order[:, None].expand_as(there))
        done = live
    return Spectrum(frames[0], s, frames[1].mT)


def _beside(frame: Tensor, new: Tensor, before: int) -> tuple[Tensor, Tensor, Tensor]:
    """`extend`, where the rows of `new` are those the frame has, `before`, and new ones; often they say all of it."""
    frame = frame[: len(new)]
    if before == frame.shape[1] == len(new) - new.shape[1]:  # the frame holds all there was
        beside = torch.eye(len(new), dtype=new.dtype)[:, before:]
        return beside, frame[:before].mT @ new[:before], new[before:]
    return extend(frame, new)
