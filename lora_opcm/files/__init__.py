"""Adapters and their files: PEFT folders, kohya and diffusers files, in and out without loss."""

from .adapter import LINEAR, Adapter, AdapterError, Kind, combine, scaled, shapes_of
from .read import load_adapter, weights_of
from .shipped import adapter_path, data_dir
from .write import renamed, save_adapter

__all__ = [
    "LINEAR", "Adapter", "AdapterError", "Kind", "adapter_path", "combine", "data_dir", "load_adapter", "renamed",
    "save_adapter", "scaled", "shapes_of", "weights_of",
]  # fmt: skip
