"""What other packages add: entry points of the groups `lora_opcm.methods`, `.formats`, `.streams` and `.tasks`."""

from functools import cache
from importlib.metadata import entry_points
from typing import Any


@cache
def found(group: str) -> dict[str, Any]:
    """Name → what an entry point of `lora_opcm.<group>` loads.

    Raises
    ------
    ValueError
        If one cannot be loaded; the message names the package that offers it.
    """
    loaded = {}
    for point in entry_points(group=f"lora_opcm.{group}"):
        try:
            loaded[point.name] = point.load()
        except Exception as error:
            owner = point.dist.name if point.dist else point.value
            raise ValueError(f"{owner}: its {group} {point.name!r} cannot be loaded: {error!r}") from error
    return loaded
