"""Continual merges: one adapter at a time, in a state that can be saved."""

from .factors import FactorMerger
from .opcm import ContinualMerger
from .store import load_stream, streams
from .stream import Member, State, Stream
from .whitened_sum import SumMerger
from .whitening import WhiteningMerger

__all__ = [
    "ContinualMerger", "FactorMerger", "Member", "State", "Stream", "SumMerger", "WhiteningMerger",
    "load_stream", "streams",
]  # fmt: skip
