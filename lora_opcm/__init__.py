"""Geometry-aware merging of LoRA adapters."""

from importlib.metadata import PackageNotFoundError, version

from .adapters import Adapter, AdapterError, load_adapter, save_adapter
from .data import adapter_path, data_dir
from .lowrank import LowRank
from .methods import merge, methods
from .opcm import ContinualMerger, MergedState

try:
    __version__ = version("lora-opcm")
except PackageNotFoundError:  # a checkout on the path, not installed
    __version__ = "0+unknown"

__all__ = [
    "Adapter",
    "AdapterError",
    "ContinualMerger",
    "LowRank",
    "MergedState",
    "adapter_path",
    "data_dir",
    "load_adapter",
    "merge",
    "methods",
    "save_adapter",
]
