"""The public names of the package, which `lora_opcm` hands on when they are asked for."""

from .files import Adapter, AdapterError, adapter_path, data_dir, load_adapter, save_adapter
from .files.fuse import fuse
from .files.live import attach, from_peft
from .files.paired import align, similarity
from .geometry import phi, principal_angles
from .lowrank import LowRank
from .merging.merge import merge
from .merging.method import merge_method, methods
from .merging.plan import plan
from .streams import ContinualMerger, FactorMerger, SumMerger, WhiteningMerger

__all__ = [
    "Adapter",
    "AdapterError",
    "ContinualMerger",
    "FactorMerger",
    "LowRank",
    "SumMerger",
    "WhiteningMerger",
    "adapter_path",
    "align",
    "attach",
    "data_dir",
    "from_peft",
    "fuse",
    "load_adapter",
    "merge",
    "merge_method",
    "methods",
    "phi",
    "plan",
    "principal_angles",
    "save_adapter",
    "similarity",
]
