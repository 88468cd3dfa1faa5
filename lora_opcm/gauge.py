"""The gauge of an adapter: which of the factors of an update stand for it. Nothing here moves an update."""

from typing import TypeVar

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from .lowrank import LowRank, Updates
from .parallel import parallel_map

A = TypeVar("A", bound=Updates)


def random_gauge(rank: int, generator: Generator) -> Tensor:
    """G ∈ GL(r), shape=[r, r], float64: Q diag(d) with Q ∈ O(r) and d between 1/2 and 2, of condition at most 4."""
    q, _ = torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64))
    d = 4 ** (torch.rand(rank, generator=generator, dtype=torch.float64) - 0.5)
    return q * d


def regauge(adapter: A, seed: int = 0) -> A:
    """The updates with factors (left G, G⁻¹ right), for a `random_gauge` of each module: the same to rounding."""
    generator = torch.Generator().manual_seed(seed)
    return adapter.with_modules(
        {name: u.regauge(random_gauge(u.rank, generator)) for name, u in adapter.modules.items()}
    )


def align(adapter: A, to: Updates) -> A:
    """The representative of `adapter` whose balanced factors lie nearest to those of `to`: the same update.

    Per module, the orthogonal Procrustes solution on stacked balanced factors [left; rightᵀ], Q ∈ O(k). The
    update ΔW does not change, nor does any φ. Of two ranks k the larger one counts: the other factors get columns
    of zeros, and the result is stored at the larger rank. Modules that `to` lacks are balanced.

    Raises
    ------
    ValueError
        If a module has another shape in `to`.
    """

    def one(name: str) -> LowRank:
        update = adapter.modules[name]
        x = update.to(torch.float64).balanced()  # rounded once, at the end
        if name not in to.modules:
            return x.to(update.dtype)
        y = to.modules[name].to(torch.float64).balanced()
        if y.shape != x.shape:
            raise ValueError(f"{name}: expected updates of one shape, got {x.shape} and {y.shape}")
        k = max(x.rank, y.rank)
        x, y = padded(x, k), padded(y, k)
        # Σ σ is weighed equally on both sides in the balanced gauge, so both sides have a say in Q.
        u, _, vh = torch.linalg.svd(x.left.mT @ y.left + x.right @ y.right.mT)
        q = u @ vh
        return LowRank(x.left @ q, q.mT @ x.right).to(update.dtype)

    return adapter.with_modules(dict(zip(adapter.modules, parallel_map(one, adapter.modules), strict=True)))


def padded(update: LowRank, rank: int) -> LowRank:
    """The same update with columns of zeros up to `rank`."""
    extra = rank - update.rank
    return LowRank(F.pad(update.left, (0, extra)), F.pad(update.right, (0, 0, 0, extra)))
