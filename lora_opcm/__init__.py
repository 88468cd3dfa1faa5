"""Geometry-aware merging of LoRA adapters."""

from importlib.metadata import PackageNotFoundError, version

from .adapters import Adapter, AdapterError, load_adapter
from .data import adapter_path, data_dir
from .grassmann import phi, principal_angles
from .lowrank import LowRank
from .methods import merge, methods
from .opcm import ContinualMerger, FactorMerger, MergedState
from .plan import plan
from .similarity import align, similarity
from .sums import SumMerger
from .writing import save_adapter

try:
    __version__ = version("lora-opcm")
except PackageNotFoundError:  # a checkout on the path, not installed
    __version__ = "0+unknown"

__all__ = [
    "Adapter",
    "AdapterError",
    "ContinualMerger",
    "FactorMerger",
    "LowRank",
    "MergedState",
    "SumMerger",
    "adapter_path",
    "align",
    "data_dir",
    "load_adapter",
    "merge",
    "methods",
    "phi",
    "plan",
    "principal_angles",
    "save_adapter",
    "similarity",
]
