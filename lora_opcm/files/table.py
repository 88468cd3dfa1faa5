"""The formats by name."""

from functools import cache

from .. import plugins
from ..values import nearest
from . import diffusers, kohya, peft
from .adapter import Adapter, AdapterError
from .format import Format


@cache
def formats() -> dict[str, Format]:
    """PEFT, kohya, diffusers, and those of other packages (entry points `lora_opcm.formats`)."""
    return {f.name: f for f in (peft.FORMAT, kohya.FORMAT, diffusers.FORMAT)} | plugins.found("formats")


def expect_format(format: str, where: str) -> None:
    """Raise AdapterError, with the nearest name, if there is no such format."""
    if format not in formats():
        hint = nearest(str(format), formats())
        raise AdapterError(f"{where}: format is {format!r}, expected one of {', '.join(formats())}{hint}")


def names_in(format: str, adapter: Adapter) -> dict[str, str]:
    """Module name of an adapter → its name in a file of a format; AdapterError where there is none."""
    expect_format(format, adapter.source)
    if format == adapter.format:
        return {name: name for name in adapter.modules}
    return formats()[format].names(adapter)
