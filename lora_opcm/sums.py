"""Whitened sums: what the best joint merges know of all adapters, as three sums that can be kept one at a time.

TSV-Merge stacks the singular frames of all tasks and whitens both stacks. The polar factor of a stack U is
(UUᵀ)^{-1/2} U, and UUᵀ is the sum of the tasks' projectors; so what TSV returns is

    L^{-1/2} S R^{-1/2},   S = Σ ΔWₜ,   L = Σ UₜUₜᵀ,   R = Σ VₜVₜᵀ.

Sums need neither all adapters at once nor an order. `power` weights the directions of each task by
(σ/‖σ‖)^power inside L and R: 0 is TSV, 1 flattens the spectrum of a task that is alone.

Source of TSV-Merge: Gargiulo et al., arXiv 2412.00081. The three sums are this book's; chapter "A better stream".
"""

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .adapters import Adapter, combine, scaled
from .lowrank import LowRank, nonzero_svd
from .options import check
from .parallel import Progress, parallel_map
from .state import load_state, save_state

SVD = tuple[Tensor, Tensor, Tensor]

TINY = 1e-6  # relative; an eigenvalue of L below it belongs to directions that depend on each other
ROUNDING = 1e-12  # relative; an eigenvalue of L below it is what a subtraction left of a direction


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

    def __post_init__(self):
        p, q = self.left.shape[1], self.right.shape[1]
        if (self.S.shape, self.L.shape, self.R.shape) != ((p, q), (p, p), (q, q)):
            found = [tuple(x.shape) for x in (self.S, self.L, self.R)]
            raise ValueError(f"expected S {(p, q)}, L {(p, p)} and R {(q, q)}, got {found}")
        for name in (
            "left",
            "right",
            "S",
            "L",
            "R",
        ):  # one layout: products of a state from a file round alike
            object.__setattr__(self, name, getattr(self, name).contiguous())

    @classmethod
    def empty(cls, m: int, n: int) -> "Sums":
        zeros = lambda a, b: torch.zeros(a, b, dtype=torch.float64)  # noqa: E731
        return cls(zeros(m, 0), zeros(n, 0), zeros(0, 0), zeros(0, 0), zeros(0, 0))

    def add(self, svd: SVD, power: float = 0.0, cap: int | None = None) -> "Sums":
        """With one more update, given as U (m, r), σ (r,), Vᵀ (r, n).

        The frames keep at most `cap` directions, the leading ones of L^{-1/2} S R^{-1/2}. Without a cap the
        result does not depend on the order of additions.
        """
        u, s, vh, share = _shares(svd, power)
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

    def subtract(self, svd: SVD, power: float = 0.0) -> "Sums":
        """Without an update that `add` took in before and no cap has cut since; directions only it had go."""
        u, s, vh, share = _shares(svd, power)
        b, d = self.left.mT @ u, self.right.mT @ vh.mT
        L, R = self.L - (b * share) @ b.mT, self.R - (d * share) @ d.mT
        p, q = _range(L, self.L), _range(R, self.R)
        S = p.mT @ (self.S - (b * s) @ d.mT) @ q
        return Sums(self.left @ p, self.right @ q, S, p.mT @ L @ p, q.mT @ R @ q)

    def core(self) -> Tensor:
        """L^{-1/2} S R^{-1/2} in the frames, (p, q)."""
        return inverse_root(self.L) @ self.S @ inverse_root(self.R)


def inverse_root(x: Tensor) -> Tensor:
    """x^{-1/2} of a positive semidefinite matrix, zero where x is."""
    values, vectors = torch.linalg.eigh(x)
    keep = values > TINY * values[-1:]
    vectors = vectors[:, keep]
    return (vectors * values[keep].rsqrt()) @ vectors.mT


def _shares(svd: SVD, power: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """U, σ and Vᵀ in float64, and the weights (σ/‖σ‖)^power of their directions in L and R."""
    u, s, vh = (x.to("cpu", torch.float64) for x in svd)  # where the sums are
    relative = s / s[:1]  # the square of a tiny norm is zero
    return u, s, vh, (relative / relative.norm()) ** power


def _range(x: Tensor, before: Tensor) -> Tensor:
    """Orthonormal columns that span the range of `x`, for `x` left over from a larger `before`."""
    values, vectors = torch.linalg.eigh(x)
    size = torch.linalg.eigvalsh(before)[-1:]
    return vectors[:, values > ROUNDING * size]


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
        check(power=power, cap=cap, scale=scale)
        if scale == "norm":
            raise ValueError("scale must be a number, got 'norm'")
        self.power, self.cap, self.scale = power, cap, scale
        self.sums: dict[str, Sums] = {}
        self.members: list[dict] = []  # name, norm and fingerprint of what is in the sums
        self._like: Adapter | None = None

    def add(self, adapter: Adapter, name: str | None = None, progress: Progress | None = None) -> "SumMerger":
        """Take in one adapter. A module it lacks counts as zero. `progress` as in `merge`.

        Raises
        ------
        AdapterError
            As `combine`, if it does not go with what was added before: the state is then as it was.
        """
        like = combine([self._like, adapter], self._like.modules) if self._like else adapter

        def grow(module: str) -> Sums:
            update = adapter.modules[module]
            return self.sums.get(module, Sums.empty(*update.shape)).add(update.svd(), self.power, self.cap)

        self.sums |= dict(zip(adapter.modules, parallel_map(grow, adapter.modules, progress)))
        name = name or f"adapter {len(self.members) + 1}"
        self.members.append({"name": name, "norm": adapter.norm(), "sha256": fingerprint(adapter)})
        self._like = like.with_modules(_shapes(self.sums))
        return self

    def remove(self, adapter: Adapter, progress: Progress | None = None) -> "SumMerger":
        """Subtract what `add` added for this adapter: the state is then as if it had never come, to rounding.

        A module whose directions all go is dropped. Metadata stays: the dtype is still the widest of all that
        came, and what the first adapter said of its base model and configuration holds.

        Raises
        ------
        ValueError
            If the state is capped (what the cap cut cannot be told apart any more), or no adapter with these
            very factors was added, or it is the only one.
        """
        if self.cap is not None:
            raise ValueError(
                f"cannot remove {adapter.source}: a cap of {self.cap} cut directions of the sums, and what one"
                " adapter brought cannot be told from what was cut. Add the others to a new state"
            )
        mark = fingerprint(adapter)
        found = next((m for m in self.members if m["sha256"] == mark), None)
        if found is None:
            names = ", ".join(m["name"] for m in self.members)
            raise ValueError(
                f"cannot remove {adapter.source}: its factors are not those of an adapter in the state ({names})"
            )
        if len(self.members) == 1:
            raise ValueError(f"cannot remove {adapter.source}: it is the only adapter of the state")

        def shrink(module: str) -> Sums:
            return self.sums[module].subtract(adapter.modules[module].svd(), self.power)

        held = [module for module in adapter.modules if module in self.sums]  # one that is zero may be gone
        left = self.sums | dict(zip(held, parallel_map(shrink, held, progress)))
        self.sums = {module: sums for module, sums in left.items() if any(sums.S.shape)}
        self.members.remove(found)
        self._like = self._like.with_modules(_shapes(self.sums))
        return self

    def adapter(self, rank: int | None = None, energy: float | None = None) -> Adapter:
        """scale · L^{-1/2} S R^{-1/2}, truncated if asked.

        Raises
        ------
        ValueError
            If nothing was added yet, for a wrong rank or energy, or as `scaled`.
        """
        if self._like is None:
            raise ValueError("nothing was added yet: add an adapter first")
        dtype = self._like.dtype

        def export(sums: Sums) -> LowRank:
            u, s, vh = nonzero_svd(sums.core(), dtype)
            update = LowRank(sums.left @ (u * (self.scale * s)), vh @ sums.right.mT)
            return update.truncate(rank, energy)[0]

        return scaled(self._like, dict(zip(self.sums, parallel_map(export, self.sums.values()))))

    def save(self, path: str | os.PathLike) -> Path:
        """Write the state to one .safetensors file; what was there stays whole until the new one is."""
        parts = ("left", "right", "S", "L", "R")
        tensors = {f"{part}/{n}": getattr(s, part) for n, s in self.sums.items() for part in parts}
        header = {
            "merger": {"power": self.power, "cap": self.cap, "scale": self.scale},
            "members": self.members,
            "modules": list(self.sums),
        }
        return save_state(path, "whitened_sum", self._like, header, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "SumMerger":
        """The merger that `save` wrote; going on from it gives the same bytes as never having stopped.

        Raises
        ------
        AdapterError
            If the file is not a state of this kind, or is damaged.
        """

        def build(header: dict, tensors: dict[str, Tensor], like: Adapter) -> "SumMerger":
            merger, members = cls(**header["merger"]), header["members"]
            if not (header["modules"] and members and all(map(_is_member, members))):
                raise ValueError("expected modules, and name, norm and sha256 of every adapter")
            for n in header["modules"]:
                merger.sums[n] = Sums(
                    *(tensors[f"{part}/{n}"].double() for part in ("left", "right", "S", "L", "R"))
                )
            merger.members = members
            merger._like = replace(like, modules=_shapes(merger.sums))
            return merger

        return load_state(path, "whitened_sum", build)


def fingerprint(adapter: Adapter) -> str:
    """sha256 of names, shapes, dtypes and bytes of all factors, scales folded in: the same for any copy of a file."""
    found = hashlib.sha256()
    for name in sorted(adapter.modules):
        for x in (adapter.modules[name].left, adapter.modules[name].right):
            found.update(f"{name} {tuple(x.shape)} {x.dtype};".encode())
            found.update(x.detach().cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


def _is_member(found: dict) -> bool:
    """Whether a saved record is one that `SumMerger.add` makes."""
    words = isinstance(found["name"], str) and isinstance(found["sha256"], str)
    return words and isinstance(found["norm"], float)


def _shapes(sums: dict[str, Sums]) -> dict[str, LowRank]:
    """Updates of rank zero with the names and shapes of the sums: what metadata needs to know of modules."""
    return {name: LowRank(s.left[:, :0], s.right[:, :0].mT) for name, s in sums.items()}
