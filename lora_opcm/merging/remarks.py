"""What rules remark on single modules, told once for a merge."""

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_heard: ContextVar[list[str] | None] = ContextVar("heard", default=None)  # modules are merged in several threads


def remark(text: str) -> None:
    """Say something of the module that a rule is at, in words that are the same for every module.

    A merge warns of it once, with the number of modules; a rule that is called by itself warns at once.
    """
    heard = _heard.get()
    if heard is None:
        warnings.warn(text, stacklevel=3)
    else:
        heard.append(text)


@contextmanager
def hearing() -> Iterator[list[str]]:
    """The remarks that are made meanwhile in this thread."""
    heard: list[str] = []
    token = _heard.set(heard)
    try:
        yield heard
    finally:
        _heard.reset(token)


def tell(modules: Collection[Collection[str]], stacklevel: int = 2) -> None:
    """A warning for every remark, from those of each module."""
    for text in dict.fromkeys(text for heard in modules for text in heard):
        count = sum(text in heard for heard in modules)
        warnings.warn(f"{count} of {len(modules)} modules: {text}", stacklevel=stacklevel + 1)
