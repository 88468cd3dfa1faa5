"""Rules that look at single entries: of ΔW, of the cores, or of one side.

They do not commute with a change of coordinates. Those in the core look at its entries in a basis that no gauge and
no order can move, which makes them other methods than their namesakes on ΔW.
"""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from ...numerics import nonzero_svd
from ...values import AUTO, Density, Seed
from ..core import Core
from ..method import merge_method


def trim(x: Tensor, density: float) -> Tensor:
    """Keep the share `density` of entries of largest magnitude, ties included."""
    if density >= 1 or not x.numel():
        return x
    keep = max(1, round(density * x.numel()))
    threshold = x.abs().flatten().kthvalue(x.numel() - keep + 1).values
    return torch.where(x.abs() >= threshold, x, 0)


def drop(x: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Keep each entry with probability `density` and rescale by 1/density."""
    keep = torch.rand(x.shape, generator=generator, dtype=torch.float64) < density
    return x * keep.to(x) / density


def elect(parts: Sequence[Tensor]) -> Tensor:
    """Per entry, the mean of the nonzero values that have the sign of the sum."""
    stack = torch.stack(list(parts))
    agree = (stack * stack.sum(0).sign()) > 0
    return (stack * agree).sum(0) / agree.sum(0).clamp_min(1)


@merge_method("ties", space="dense", source="Yadav et al., arXiv 2306.01708", keeps="dense sums", scale=AUTO)
def ties(deltas: list[Tensor], density: Density = 0.2) -> Tensor:
    """Trim small entries (per module, as peft does; the paper trims the whole task vector), elect, average."""
    return elect([trim(d, density) for d in deltas])


@merge_method("dare", space="dense", source="Yu et al., arXiv 2311.03099", keeps="dense sums", ordered=True)
def dare(deltas: list[Tensor], density: Density = 0.5, seed: Seed = 0) -> Tensor:
    """Drop entries at random, rescale the rest, add."""
    generator = torch.Generator().manual_seed(seed)
    return sum((drop(d, density, generator) for d in deltas), torch.zeros_like(deltas[0]))


@merge_method(
    "dare_ties", space="dense", source="Yu et al., arXiv 2311.03099", keeps="dense sums", ordered=True, scale=AUTO
)
def dare_ties(deltas: list[Tensor], density: Density = 0.5, seed: Seed = 0) -> Tensor:
    """DARE, then sign election."""
    generator = torch.Generator().manual_seed(seed)
    return elect([drop(d, density, generator) for d in deltas])


@merge_method("magnitude_prune", space="dense", source="peft's magnitude_prune", keeps="dense sums")
def magnitude_prune(deltas: list[Tensor], density: Density = 0.5) -> Tensor:
    """Trim small entries, add."""
    return sum((trim(d, density) for d in deltas), torch.zeros_like(deltas[0]))


@merge_method("magmax", space="dense", source="Marczak et al., arXiv 2407.06322", keeps="dense sums", scale=AUTO)
def magmax(deltas: list[Tensor]) -> Tensor:
    """Of every entry, the value of largest magnitude among the updates.

    The rule of the paper, which trains its updates one after the other; ours are as they are given. Of two values of
    one magnitude its code takes the later and we the positive one, so that no order matters. One dense matrix is kept.
    """
    largest, smallest = reduce(torch.maximum, deltas), reduce(torch.minimum, deltas)
    return torch.where(largest >= -smallest, largest, smallest)


def canonical(core: Core) -> tuple[Tensor, list[Tensor], Tensor]:
    """The cores between the singular bases of [C₁ … C_T] and [C₁; …; C_T]; unique up to signs."""
    cores = core.cores
    left = nonzero_svd(torch.cat(cores, 1), core.dtype)[0]
    right = nonzero_svd(torch.cat([c.mT for c in cores], 1), core.dtype)[0]
    return left, [left.mT @ c @ right for c in cores], right


@merge_method("core_ties", source="Core Space, arXiv 2509.17786", scale=AUTO)
def core_ties(core: Core, density: Density = 0.5) -> Tensor:
    """TIES on the entries of the cores."""
    left, parts, right = canonical(core)
    return left @ elect([trim(c, density) for c in parts]) @ right.mT


@merge_method("core_dare_ties", source="Core Space, arXiv 2509.17786", ordered=True, scale=AUTO)
def core_dare_ties(core: Core, density: Density = 0.5, seed: Seed = 0) -> Tensor:
    """DARE, then sign election, on the entries of the cores."""
    generator = torch.Generator().manual_seed(seed)
    left, parts, right = canonical(core)
    return left @ elect([drop(c, density, generator) for c in parts]) @ right.mT


@merge_method("knots_ties", source="Stoica et al., arXiv 2410.19735", scale=AUTO)
def knots_ties(core: Core, density: Density = 0.5) -> tuple[Tensor, Tensor]:
    """[ΔW₁ … ΔW_T] = U Σ [V₁ᵀ … V_Tᵀ]; TIES on the entries of the Vₜ, in the coordinates of the layer's inputs.

    Returns UΣ (p, k) in the core and the merged V (n, k) outside it: it cannot be lifted by rotation.
    """
    u, s, _ = nonzero_svd(torch.cat(core.cores, 1), core.dtype)
    # The blocks of Vᵀ from U: of an update that is zero the SVD gives rounding, and every entry of it would vote.
    parts = [core.right @ ((u / s).mT @ c).mT for c in core.cores]
    return u * s, elect([trim(v, density) for v in parts])
