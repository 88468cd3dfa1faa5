"""Whitened sums: what the best joint merges know of all adapters, as three sums that can be kept one at a time.

TSV-Merge stacks the singular frames of all tasks and whitens both stacks. The polar factor of a stack U is
(UUᵀ)^{-1/2} U, and UUᵀ is the sum of the tasks' projectors; so what TSV returns is

    L^{-1/2} S R^{-1/2},   S = Σ ΔWₜ,   L = Σ UₜUₜᵀ,   R = Σ VₜVₜᵀ.

Sums need neither all adapters at once nor an order. `power` weights the directions of each task by
(σ/‖σ‖)^power inside L and R: 0 is TSV, 1 flattens the spectrum of a task that is alone.

Source of TSV-Merge: Gargiulo et al., arXiv 2412.00081. The three sums are this book's; chapter "A better stream".
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .adapters import Adapter, combine
from .lowrank import LowRank, nonzero_svd
from .parallel import parallel_map

SVD = tuple[Tensor, Tensor, Tensor]

TINY = 1e-6  # relative; an eigenvalue of L below it belongs to directions that depend on each other


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

    @classmethod
    def empty(cls, m: int, n: int) -> "Sums":
        zeros = lambda a, b: torch.zeros(a, b, dtype=torch.float64)  # noqa: E731
        return cls(zeros(m, 0), zeros(n, 0), zeros(0, 0), zeros(0, 0), zeros(0, 0))

    def add(self, svd: SVD, power: float = 0.0, cap: int | None = None) -> "Sums":
        """With one more update, given as U (m, r), σ (r,), Vᵀ (r, n).

        The frames keep at most `cap` directions, the leading ones of L^{-1/2} S R^{-1/2}. Without a cap the
        result does not depend on the order of additions.
        """
        u, s, vh = (x.double() for x in svd)
        share = (s / s.norm()) ** power if len(s) else s
        left, a, b = _extend(self.left, u)
        right, c, d = _extend(self.right, vh.mT)
        grown = Sums(
            left, right,
            a @ self.S @ c.mT + (b * s) @ d.mT,
            a @ self.L @ a.mT + (b * share) @ b.mT,
            c @ self.R @ c.mT + (d * share) @ d.mT,
        )  # fmt: skip
        if cap is None or max(grown.S.shape) <= cap:
            return grown
        p, _, qh = torch.linalg.svd(grown.core(), full_matrices=False)
        p, q = p[:, :cap], qh[:cap].mT
        return Sums(left @ p, right @ q, p.mT @ grown.S @ q, p.mT @ grown.L @ p, q.mT @ grown.R @ q)

    def core(self) -> Tensor:
        """L^{-1/2} S R^{-1/2} in the frames, (p, q)."""
        return inverse_root(self.L) @ self.S @ inverse_root(self.R)


def inverse_root(x: Tensor) -> Tensor:
    """x^{-1/2} of a positive semidefinite matrix, zero where x is."""
    values, vectors = torch.linalg.eigh(x)
    keep = values > TINY * values[-1:]
    vectors = vectors[:, keep]
    return (vectors * values[keep].rsqrt()) @ vectors.mT


def _extend(frame: Tensor, new: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """An orthonormal frame of both spans, and the coordinates of `frame` and of `new` in it."""
    rest = new - frame @ (frame.mT @ new)
    rest = rest - frame @ (frame.mT @ rest)  # twice is enough
    u, s, _ = torch.linalg.svd(rest, full_matrices=False)
    both = torch.cat([frame, u[:, s > TINY]], 1)
    return both, both.mT @ frame, both.mT @ new


class SumMerger:
    """Merges adapters one at a time by their whitened sums.

    Parameters
    ----------
    power : float in [0, 1]
        0 is TSV-Merge; see the module.
    cap : int, optional
        Directions a module's state keeps on either side. None keeps all: the state then grows with the rank
        of the stream, up to the size of the layer, and the result does not depend on the order.
    scale : float
        Factor of the merged update.
    """

    def __init__(self, power: float = 0.5, cap: int | None = None, scale: float = 1.0):
        if not 0 <= power <= 1:
            raise ValueError(f"power must lie in [0, 1], got {power}")
        if cap is not None and cap < 1:
            raise ValueError(f"cap must be at least 1, got {cap}")
        self.power, self.cap, self.scale = power, cap, scale
        self.sums: dict[str, Sums] = {}
        self._like: Adapter | None = None

    def add(self, adapter: Adapter) -> "SumMerger":
        """Take in one adapter. A module it lacks counts as zero."""
        for name, update in adapter.modules.items():
            known = self.sums.get(name)
            shape = (len(known.left), len(known.right)) if known else update.shape
            if shape != update.shape:
                raise ValueError(
                    f"{adapter.source}: {name} has shape {update.shape}, in the merged state {shape}"
                )
        like = combine([self._like, adapter], self._like.modules) if self._like else adapter

        def grow(name: str) -> Sums:
            update = adapter.modules[name]
            return self.sums.get(name, Sums.empty(*update.shape)).add(update.svd(), self.power, self.cap)

        self.sums |= dict(zip(adapter.modules, parallel_map(grow, adapter.modules)))
        self._like = like
        return self

    def adapter(self, rank: int | None = None, energy: float | None = None) -> Adapter:
        """scale · L^{-1/2} S R^{-1/2}, truncated if asked."""
        if self._like is None:
            raise ValueError("nothing was added yet: add an adapter first")
        dtype = self._like.dtype

        def export(sums: Sums) -> LowRank:
            u, s, vh = nonzero_svd(sums.core(), dtype)
            update = LowRank(sums.left @ (u * (self.scale * s)), vh @ sums.right.mT)
            return update.truncate(rank, energy)[0].to(dtype)

        return self._like.with_modules(dict(zip(self.sums, parallel_map(export, self.sums.values()))))
