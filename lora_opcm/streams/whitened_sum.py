"""Whitened sums one adapter at a time: three sums a module, which can also be subtracted from again."""

from collections.abc import Mapping

from torch import Tensor

from ..lowrank import LowRank
from ..merging.rules.frames import Sums, refuse_flat
from ..numerics import nonzero_svd, working_dtype
from ..values import AUTO, Limit, Scale, Share, Sides
from .stream import State, Stream

PARTS = ("left", "right", "S", "L", "R")


class SumMerger(Stream[Sums]):
    """Merges adapters one at a time by their whitened sums, L^{-1/2} S R^{-1/2}; see `merging.rules.frames`.

    Parameters
    ----------
    power : float in [0, 1]
        0 is TSV-Merge.
    cap : int, optional
        Directions a module's state keeps on either side. None keeps all: the state then grows with the rank
        of the stream, up to the size of the layer, and the result does not depend on the order.
    scale : float, "auto" or "norm"
        Factor of the merged update, as in `merge`.
    sides : {"both", "left", "right"}
        Which are whitened: outputs (left), inputs (right), or both. The state holds all three sums in any case.
    """

    kind = "whitened_sum"

    def __init__(self, power: Share = 0.5, cap: Limit = None, scale: Scale = AUTO, sides: Sides = "both"):
        super().__init__(power=power, cap=cap, scale=scale, sides=sides)
        refuse_flat(power, cap, sides)

    def grow(self, kept: Sums | None, update: LowRank) -> tuple[Sums, dict[str, float]]:
        sums = Sums.empty(*update.shape) if kept is None else kept
        return sums.add(update.svd(), self.power, self.cap, self.sides), {}

    def shrink(self, kept: Sums, update: LowRank) -> Sums | None:
        left = kept.subtract(update.svd(), self.power)
        return left if any(left.S.shape) else None

    def record(self, numbers: Mapping[str, float], state: State[Sums], norm: float) -> dict[str, float]:
        return {"rank": max((max(s.S.shape) for s in state.modules.values()), default=0)}

    def refuse_removal(self, adapter) -> None:
        if self.cap is not None:
            raise ValueError(
                f"cannot remove {adapter.source}: a cap of {self.cap} cut directions of the sums, and what one"
                " adapter brought cannot be told from what was cut. Add the others to a new state"
            )

    def export(self, kept: Sums) -> LowRank:
        dtype = working_dtype(kept.S.dtype if self.like is None else self.like.dtype)
        u, s, vh = nonzero_svd(kept.core(self.sides), dtype)
        return LowRank(kept.left @ (u * s), vh @ kept.right.mT)

    def shape(self, kept: Sums) -> tuple[int, int]:
        return kept.left.shape[0], kept.right.shape[0]

    def pack(self, kept: Sums) -> dict[str, Tensor]:
        return {part: getattr(kept, part) for part in PARTS}

    def unpack(self, tensors: Mapping[str, Tensor]) -> Sums:
        return Sums(*(tensors[part].double() for part in PARTS))
