"""Tasks, training and evaluation: everything that needs transformers, peft and datasets.

Each part imports only from those before it: `assets`, `embedded`, `tasks`, `bases`, `attach`, `training`, `resampling`,
`evaluation`, `train` (the command), `experiments`, `evidence`, `generation`, `tune`.
"""

from .assets import AssetError, cache_dir

try:
    from .tasks import Task, load_hub_task, load_named, load_task, tasks
except ModuleNotFoundError as error:
    if error.name != "datasets":  # without it there are no tasks, but `generation` works
        raise

__all__ = ["AssetError", "Task", "cache_dir", "load_hub_task", "load_named", "load_task", "tasks"]
