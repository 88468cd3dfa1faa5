"""State files of any kind of stream."""

import os

from .. import plugins
from ..files import AdapterError
from ..files.bundle import kind_of
from .stream import Stream


def streams() -> dict[str, type[Stream]]:
    """The kinds of stream: those of this package, and those of others (entry points `lora_opcm.streams`)."""
    plugins.found("streams")
    return dict(Stream.kinds)


def load_stream(path: str | os.PathLike) -> Stream:
    """The stream in a state file, whatever its kind.

    Raises
    ------
    AdapterError
        If the file is no state, or one of a kind that is not known here.
    """
    kind = kind_of(path)
    if kind not in streams():
        raise AdapterError(f"{path}: a state of kind {kind!r:.40}, expected one of {', '.join(streams())}")
    return streams()[kind].load(path)
