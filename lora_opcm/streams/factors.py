"""OPCM on the two factors apart, one adapter at a time: what merging the numbers in a file amounts to."""

from collections.abc import Mapping

from torch import Tensor

from ..lowrank import LowRank
from ..merging.core import Core
from ..merging.rules.factors import sides
from ..merging.rules.projection import project
from ..numerics import working_dtype
from ..values import AUTO, Gauge, Scale, Share
from ..values import norms as norms_of
from .stream import State, Stream

SIDES = ("left", "right")
Pair = tuple[LowRank, LowRank]  # sums of the factors B (m, r) and A (r, n), each an update of its own


class FactorMerger(Stream[Pair]):
    """One OPCM stream for the up-projections, another for the down-projections.

    Depends on the gauge: it merges numbers that only their product gives a meaning. With gauge "balanced"
    every adapter is brought to U√Σ, √ΣVᵀ with fixed signs first, so that the result depends on the updates
    alone; it still is another method than OPCM. All ranks of one module must be equal: ValueError.
    """

    kind = "lora_opcm"

    def __init__(self, alpha: Share = 0.5, gauge: Gauge = "given", scale: Scale = "norm"):
        super().__init__(alpha=alpha, gauge=gauge, scale=scale)

    def grow(self, kept: Pair | None, update: LowRank) -> tuple[Pair, dict[str, float]]:
        update = update.to("cpu", working_dtype(update.dtype))  # the state is never half precision
        (left,), (right,) = sides([update], self.gauge)
        let_in = left.norm() ** 2, right.norm() ** 2
        norms = dict(zip(SIDES, let_in, strict=True))
        if kept is None:
            grown = left, right
        else:
            rank = kept[0].shape[1]
            if left.shape[1] != rank:
                raise ValueError(
                    f"an update of rank {left.shape[1]}, an earlier adapter has {rank}: merging factors needs equal"
                    " ranks"
                )
            grown, let_in = zip(*(self._project(*pair) for pair in zip(kept, (left, right), strict=True)), strict=True)
        grown = self.unpack(self.pack(grown))  # as it would be read back: going on from a file gives the same bytes
        return grown, norms | {f"let in {side}": x for side, x in zip(SIDES, let_in, strict=True)}

    def _project(self, kept: LowRank, new: LowRank) -> tuple[LowRank, float]:
        core = Core.of([kept, new])
        let_in = project(core.cores[1], core.cores[0], self.alpha, "paper", core.dtype)
        return core.lift(core.cores[0] + let_in)[0], float(let_in.square().sum())

    def record(self, numbers: Mapping[str, float], state: State[Pair], norm: float) -> dict[str, float]:
        """Of either side: the norm of the new factors, the share the projection cleared, and λ."""
        said: dict[str, float] = {}
        for i, side in enumerate(SIDES):
            size = numbers.get(side, 0.0)
            said[f"norm {side}"] = size**0.5
            said[f"cleared {side}"] = 1 - numbers[f"let in {side}"] / size if size else 0.0
            norms = [m.record[f"norm {side}"] for m in state.members if m.record] + [size**0.5]
            whole = sum(pair[i].norm() ** 2 for pair in state.modules.values()) ** 0.5
            said[f"lambda {side}"] = whole / (sum(norms) / len(norms)) if whole else 1.0
        return said

    def _factor(self, updates: Mapping[str, LowRank]) -> float:
        """Each factor has a λ of its own."""
        times = None if self.scale == AUTO else norms_of(self.scale)
        if times is None:
            return super()._factor(updates)
        last = self.state.members[-1].record
        return times / (last["lambda left"] * last["lambda right"])

    def export(self, kept: Pair) -> LowRank:
        return LowRank(kept[0].delta(), kept[1].delta())

    def shape(self, kept: Pair) -> tuple[int, int]:
        return kept[0].shape[0], kept[1].shape[1]

    def pack(self, kept: Pair) -> dict[str, Tensor]:
        return {"left": kept[0].delta(), "right": kept[1].delta()}

    def unpack(self, tensors: Mapping[str, Tensor]) -> Pair:
        (left,), (right,) = sides([LowRank(tensors["left"], tensors["right"])], "given")
        return left, right
