"""Sums of very many adapters, cut to a low rank, without reducing them exactly.

A sum S = Σ ΔWₜ of more columns than the layer has rows has a core no smaller than the layer. Where only k of its
directions are asked for, S is multiplied with k + `EXTRA` random vectors instead, Y = Σ Bₜ(AₜΩ), and Q = orth(Y), after
`STEPS` more products with S and Sᵀ each, holds nearly all of its leading directions: 2(m + n)R operations a vector and
product for the summed rank R, and nothing of R².

Source: Halko, Martinsson and Tropp, SIAM Review 53 (2011): the power scheme with its expected error, corollary 10.10
(`expected`), and what Q misses, measured with random vectors, lemma 4.1, here of a power of what is missed.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..lowrank import LowRank, add

EXTRA, STEPS, PROBES = 16, 2, 10


class Sketch(NamedTuple):
    """A sum cut to a rank, the share of its squared norm that was cut off, estimated, and how far it can be off.

    With a probability of at least 1 − 10⁻¹⁰, Q misses no more than ‖S − QQᵀS‖₂ ≤ `bound` · σ₁; the result then is no
    further from S, in the spectral norm, than the best of its rank by more than that.
    """

    update: LowRank
    dropped: float
    bound: float


def worth(shape: tuple[int, int], ranks: Sequence[int], rank: int | None) -> bool:
    """Whether a sum of these ranks, cut to `rank`, is sketched: where its core would be no smaller than the layer, and
    the sketch an eighth of it at most."""
    return rank is not None and sum(ranks) > min(shape) and 8 * (rank + EXTRA) <= min(shape)


def sketched_sum(updates: Sequence[LowRank], rank: int, seed: int) -> Sketch:
    """The sum of updates (m, n), of at most `rank`, in the balanced gauge; the same for the same seed."""
    total = add([u.wide() for u in updates])
    generator = torch.Generator().manual_seed(seed)
    probes = torch.randn(total.shape[1], rank + EXTRA + PROBES, generator=generator, dtype=torch.float64)
    omega, probes = probes.to(total.dtype).split([rank + EXTRA, PROBES], 1)
    q = _orthonormal(total.left @ (total.right @ omega))
    for _ in range(STEPS):
        q = _orthonormal(total.right.mT @ (total.left.mT @ q))
        q = _orthonormal(total.left @ (total.right @ q))
    inside = LowRank(q, (q.mT @ total.left) @ total.right)
    update, beyond = inside.truncate(rank)
    held, norm, log = inside.norm() ** 2, 1.0, 0.0
    x = beside(q, total.left @ (total.right @ probes.to(total.dtype)))
    lost = float(x.double().square().sum()) / PROBES
    for _ in range(STEPS):  # (RRᵀ)^STEPS R on the probes, R = S − QQᵀS, kept from overflow
        norm = float(x.double().norm()) or 1.0  # squares of single precision overflow at 1e19
        log, x = log + math.log(norm), x / norm
        x = beside(q, total.left @ (total.right @ (total.right.mT @ (total.left.mT @ beside(q, x)))))
    furthest = 10 * (2 / math.pi) ** 0.5 * float(x.double().norm(dim=0).max())
    missed = math.exp((log + math.log(furthest)) / (2 * STEPS + 1)) if furthest else 0.0
    largest = float(torch.linalg.matrix_norm(update.left.double(), 2)) ** 2  # √σ₁ on either side
    dropped = (beyond * held + lost) / (held + lost) if held + lost else 0.0
    return Sketch(update, dropped, missed / largest if largest else 0.0)


def expected(shape: tuple[int, int], rank: int) -> float:
    """The mean of ‖S − QQᵀS‖₂ is at most this many times σ of the first direction beyond `rank`; S of this shape."""
    many = math.e * math.sqrt((rank + EXTRA) * (min(shape) - rank)) / EXTRA
    return (1 + math.sqrt(rank / (EXTRA - 1)) + many) ** (1 / (2 * STEPS + 1))


def beside(q: Tensor, x: Tensor) -> Tensor:
    """What of x is outside the span of q."""
    return x - q @ (q.mT @ x)


def _orthonormal(x: Tensor) -> Tensor:
    return torch.linalg.qr(x)[0]
