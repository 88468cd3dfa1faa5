"""Adapters and their files: PEFT folders, kohya and diffusers files, in and out without loss."""

from .adapter import LINEAR, Adapter, AdapterError, Kind
from .drop import dropping
from .fuse import fuse
from .joint import combine, level, matched, scaled, shapes_of
from .read import load_adapter, outline, weights_of
from .shipped import adapter_path, data_dir
from .write import renamed, save_adapter

__all__ = [
    "LINEAR", "Adapter", "AdapterError", "Kind", "adapter_path", "combine", "data_dir", "dropping", "fuse", "level",
    "load_adapter", "matched", "outline", "renamed", "save_adapter", "scaled", "shapes_of", "weights_of",
]  # fmt: skip
