"""Tasks, training and evaluation: everything that needs transformers, peft and datasets."""

from .assets import AssetError, cache_dir
from .tasks import Task, load_hub_task, load_named, load_task, tasks

__all__ = ["AssetError", "Task", "cache_dir", "load_hub_task", "load_named", "load_task", "tasks"]
