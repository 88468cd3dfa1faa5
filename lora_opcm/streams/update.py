"""Streams that keep one low-rank update of every module."""

from collections.abc import Mapping

from torch import Tensor

from ..lowrank import LowRank
from .stream import Stream


class UpdateStream(Stream[LowRank]):
    """What is kept of a module is its merged update, not yet scaled; subclasses say how it grows."""

    def export(self, kept: LowRank) -> LowRank:
        return kept

    def shape(self, kept: LowRank) -> tuple[int, int]:
        return kept.shape

    def pack(self, kept: LowRank) -> dict[str, Tensor]:
        return {"left": kept.left, "right": kept.right}

    def unpack(self, tensors: Mapping[str, Tensor]) -> LowRank:
        return LowRank(tensors["left"], tensors["right"])
