"""OPCM, orthogonal-projection continual merging, in the core space.

Source: Tang et al., "Merging Models on the Fly Without Retraining", arXiv 2501.09522, equations 5 to 9, and
the code released with it (FusionBench). The two do not project alike; `variant` says which reading is meant.

The projection does not see the scale of the merged update M, so λ never compounds: the state is the plain
sum S = Σ P_t(Δ_t), and M is S times one final scale.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from .adapters import Adapter, combine, scaled
from .core import Core, reduce
from .lowrank import LowRank, nonzero_svd, working_dtype
from .options import check
from .parallel import Progress, parallel_map
from .state import factors, load_state, save_state


def cut(s: Tensor, alpha: float, variant: str = "paper") -> int:
    """How many leading directions of the merged update are protected, from its singular values `s`.

    `paper`: the smallest k whose leading values hold at least α of the nuclear norm (0 for α = 0, all for
    α = 1). `fusionbench`: the count of leading values whose cumulative share does not exceed α; it is one
    less wherever the share is not met exactly. (The released code returns 0 at α = 1, where its search for a
    larger share finds none; we return all.)

    `s` is descending, shape=[r]. Raises ValueError for an α outside [0, 1] or another variant.
    """
    check(alpha=alpha, variant=variant)
    if alpha == 0 or not len(s):
        return 0
    share = s.cumsum(0) / s.sum()
    if variant == "fusionbench":
        return int((share <= alpha + 1e-12).sum())
    return min(int((share < alpha - 1e-12).sum()) + 1, len(s))


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
    check(alpha=alpha, variant=variant)
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


def stream(core: Core, alpha: float, variant: str) -> Tensor:
    """S = Σ P_t(Cₜ) of one module, all adapters at hand; (p, q). At step t only the live part is touched."""
    cores = core.cores
    total = cores[0].clone()
    for t in range(1, len(cores)):
        p, q = core.live(t + 1)
        merged = total[: core.live(t)[0], : core.live(t)[1]]
        total[:p, :q] += project(cores[t][:p, :q], merged, alpha, variant, core.dtype)
    return total


@dataclass
class MergedState:
    """What a stream needs to go on: thin factors, and a norm, a name and a row of history for every adapter.

    `updates` holds S = Σ P_t(Δ_t) per module, not yet scaled, of a rank that a cap bounds; `norms` the ‖Δ_t‖_F of
    each whole adapter.
    """

    updates: dict[str, LowRank] = field(default_factory=dict)
    norms: list[float] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    history: list[dict] = field(default_factory=list)

    def norm(self) -> float:
        """‖S‖_F over all modules."""
        return sum(u.norm() ** 2 for u in self.updates.values()) ** 0.5

    @property
    def scale(self) -> float:
        """The published 1/λ: it gives M the mean norm of the adapters seen so far."""
        size = self.norm()
        return sum(self.norms) / len(self.norms) / size if size else 1.0


class ContinualMerger:
    """Merges adapters one at a time.

    Parameters
    ----------
    alpha : float in [0, 1]
        Share of the merged update's nuclear norm that is protected from new adapters.
    variant : {"paper", "fusionbench"}
        Two-sided cut, or the released code's block cut.
    scale : "norm" or float
        "norm" is the published rule, ‖M‖ = mean ‖Δ_t‖; a number is used instead, a different method.
    rank : int, optional
        Cap on the state's rank per module; what it cuts off is reported in `state.history`.
    """

    def __init__(self, alpha: float = 0.5, variant: str = "paper", scale: str | float = "norm", rank=None):
        check(alpha=alpha, variant=variant, scale=scale, rank=rank)
        self.alpha, self.variant, self.scale, self.rank = alpha, variant, scale, rank
        self.state = MergedState()
        self._like: Adapter | None = None  # metadata and shapes of what was added, for the export

    def add(
        self, adapter: Adapter, name: str | None = None, progress: Progress | None = None
    ) -> "ContinualMerger":
        """Take in one adapter. A module it lacks counts as zero; a module's first update is taken whole.

        `progress` is wrapped around the modules as they are done, as in `merge`.

        Raises
        ------
        AdapterError
            As `combine`, if it does not go with what was added before: the state is then as it was.
        """
        state = self.state
        like = combine([self._like, adapter], self._like.modules) if self._like else adapter
        taken = dict(zip(adapter.modules, parallel_map(self._take, adapter.modules.items(), progress)))
        kept, dropped = (sum(t[i] for t in taken.values()) for i in (1, 2))
        norm = adapter.norm()
        name = name or f"adapter {len(state.norms) + 1}"
        updates = state.updates | {module: update for module, (update, _, _) in taken.items()}
        new = MergedState(updates, [*state.norms, norm], [*state.names, name])
        size = new.norm()
        row = {
            "name": name,
            "norm": norm,
            "lambda": 1 / new.scale,
            "cleared": 1 - kept / norm**2 if norm else 0.0,  # share of ‖Δ‖² the projection removed
            "dropped": dropped / (size**2 + dropped) if size else 0.0,  # share the rank cap cut off
            "rank": max((u.rank for u in updates.values()), default=0),
        }
        self.state = replace(new, history=[*state.history, row])
        self._like = like.with_modules({name: u.zero() for name, u in updates.items()})
        return self

    def _take(self, item: tuple[str, LowRank]) -> tuple[LowRank, float, float]:
        """One module: its new S, the squared norm let in, and the squared norm the rank cap cut off."""
        module, update = item
        update = update.to("cpu", working_dtype(update.dtype))  # the state is never half precision
        merged = self.state.updates.get(module)
        if merged is None:
            size = update.norm() ** 2
            update, cut_off = update.truncate(rank=self.rank)
            return update, size, cut_off * size
        core = reduce([merged, update])
        let_in = project(core.cores[1], core.cores[0], self.alpha, self.variant, core.dtype)
        total = core.cores[0] + let_in
        update, cut_off = core.lift(total, rank=self.rank)
        return update, float(let_in.square().sum()), cut_off * float(total.square().sum())

    def adapter(self, rank: int | None = None, energy: float | None = None) -> Adapter:
        """The merged adapter, M = scale · S, truncated if asked.

        Raises
        ------
        ValueError
            If nothing was added yet, for a wrong rank or energy, or as `scaled`.
        """
        if self._like is None:
            raise ValueError("nothing was added yet: add an adapter first")
        scale = self.state.scale if self.scale == "norm" else float(self.scale)
        updates = self.state.updates
        cut_off = parallel_map(lambda u: u.truncate(rank, energy)[0], updates.values())
        return scaled(self._like, dict(zip(updates, cut_off)), scale)

    def save(self, path: str | os.PathLike) -> Path:
        """Write the state to one .safetensors file; what was there stays whole until the new one is."""
        tensors = {}
        for name, u in self.state.updates.items():
            tensors |= {f"left/{name}": u.left, f"right/{name}": u.right}
        header = {
            "merger": {"alpha": self.alpha, "variant": self.variant, "scale": self.scale, "rank": self.rank},
            "state": {"norms": self.state.norms, "names": self.state.names, "history": self.state.history},
            "modules": list(self.state.updates),
        }
        return save_state(path, "opcm", self._like, header, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "ContinualMerger":
        """The merger that `save` wrote; going on from it gives the same bytes as never having stopped.

        Raises
        ------
        AdapterError
            If the file is not a state of this kind, or is damaged.
        """

        def build(header: dict, tensors: dict[str, Tensor], like: Adapter) -> "ContinualMerger":
            merger, kept = cls(**header["merger"]), header["state"]
            updates = {name: factors(tensors, name) for name in header["modules"]}
            if not updates or not len(kept["names"]) == len(kept["norms"]) > 0:
                raise ValueError("expected modules, and a name and a norm for every adapter")
            kept["norms"] = [float(x) for x in kept["norms"]]
            merger.state = MergedState(updates, **kept)
            merger._like = replace(like, modules={name: u.zero() for name, u in updates.items()})
            return merger

        return load_state(path, "opcm", build)


class FactorMerger:
    """The drafts' LoRA-OPCM: one OPCM stream for the up-projections, another for the down-projections.

    Depends on the gauge: it merges numbers that only their product gives a meaning. With gauge "balanced"
    every adapter is brought to U√Σ, √ΣVᵀ with fixed signs first, so that the result depends on the updates
    alone; it still is another method than OPCM. All ranks of one module must be equal.

    Raises
    ------
    ValueError
        For an alpha, a gauge or a scale that is none.
    """

    def __init__(self, alpha: float = 0.5, gauge: str = "given", scale: str | float = "norm"):
        check(gauge=gauge)
        self.gauge = gauge
        self.left, self.right = (ContinualMerger(alpha=alpha, scale=scale) for _ in range(2))

    def add(self, adapter: Adapter) -> "FactorMerger":
        """Take in one adapter.

        Raises
        ------
        ValueError
            If the rank of a module is not that of earlier adapters; and as `ContinualMerger.add`.
        """
        lefts, rights = {}, {}
        for name, u in adapter.modules.items():
            known = self.left.state.updates.get(name)
            if known is not None and known.shape[1] != u.rank:
                raise ValueError(
                    f"{adapter.source}: {name} has rank {u.rank}, an earlier adapter {known.shape[1]};"
                    " merging factors needs equal ranks"
                )
            (lefts[name],), (rights[name],) = self.sides([u], self.gauge)
        self.left.add(adapter.with_modules(lefts))
        self.right.add(adapter.with_modules(rights))
        return self

    @staticmethod
    def sides(updates: Sequence[LowRank], gauge: str) -> tuple[list[LowRank], list[LowRank]]:
        """The factors B (m, r) and A (r, n) of updates of one module as updates of their own, B·I and I·A."""
        check(gauge=gauge)
        ranks = {u.rank for u in updates}
        if len(ranks) > 1:
            raise ValueError(f"merging factors needs equal ranks, got {sorted(ranks)}")
        if gauge == "balanced":
            r = max(ranks, default=0)
            updates = [u.balanced() for u in updates]
            updates = [
                LowRank(F.pad(u.left, (0, r - u.rank)), F.pad(u.right, (0, 0, 0, r - u.rank)))
                for u in updates
            ]
        eyes = [torch.eye(u.rank, dtype=u.dtype, device=u.left.device) for u in updates]
        left = [LowRank(u.left, eye) for u, eye in zip(updates, eyes)]
        return left, [LowRank(eye, u.right) for u, eye in zip(updates, eyes)]

    def updates(self) -> dict[str, LowRank]:
        """The product of the merged factors, per module."""
        left, right = self.left.adapter().modules, self.right.adapter().modules
        return {name: LowRank(left[name].delta(), right[name].delta()) for name in left}
