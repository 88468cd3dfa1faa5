"""Tasks, training and evaluation: everything that needs transformers, peft and datasets.

Each part imports only from those before it: `assets`, `tasks`, `bases`, `attach`, `training`, `evaluation`,
`train` (the command), `experiments`.
"""

from .assets import AssetError, cache_dir
from .tasks import Task, load_hub_task, load_named, load_task, tasks

__all__ = ["AssetError", "Task", "cache_dir", "load_hub_task", "load_named", "load_task", "tasks"]
