"""Geometry-aware merging of LoRA adapters.

Public names are in `lora_opcm.api`; they are imported when first used, so that the command line answers at once.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import *  # noqa: F403
    from .api import __all__ as __all__

try:
    __version__ = version("lora-opcm")
except PackageNotFoundError:  # a checkout on the path, not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name.startswith("__") and name != "__all__":
        raise AttributeError(name)
    if find_spec(f"{__name__}.{name}"):
        return import_module(f".{name}", __name__)
    api = import_module(".api", __name__)
    if hasattr(api, name):
        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*import_module(".api", __name__).__all__, "__version__"]
