"""What adapters are tuned on: classification of texts and images, and generation from prompts."""

from pathlib import Path

from ... import plugins
from .hub import GLUE, load_hub_task
from .prompts import Prompts, load_prompts
from .task import Task
from .texts import joint_task, load_task, small_tasks, tasks
from .vision import VISION, load_vision_task

__all__ = [
    "Prompts",
    "Task",
    "joint_task",
    "load_hub_task",
    "load_named",
    "load_prompts",
    "load_task",
    "load_vision_task",
    "small_tasks",
    "tasks",
]


def load_named(name: str, sources: str = "") -> Task:
    """A classification task the lab knows by name, or one of another package (entry points `lora_opcm.tasks`).

    `sources/<name>` stands in place of the hub where it is given.

    Raises
    ------
    ValueError
        For a name that no table has, with the names that exist.
    """
    if name in (others := plugins.found("tasks")):
        return others[name]()
    if name in GLUE:
        columns, sentences = GLUE[name]
        source = {"path": str(Path(sources, name))} if sources else {"path": "nyu-mll/glue", "config": name}
        return load_hub_task(**source, text=columns, sentences=sentences, name=name)
    if name in VISION:
        return load_vision_task(name, sources)
    if name in tasks():
        return load_task(name)
    raise ValueError(f"unknown task {name!r}; the tasks are {', '.join([*tasks(), *GLUE, *VISION, *others])}")
