"""What two adapters are asked together, with their modules under one name for each layer."""

from typing import TYPE_CHECKING, TypeVar

from .. import gauge, geometry
from ..lowrank import Updates
from ..parallel import Progress
from .adapter import Adapter
from .joint import matched

if TYPE_CHECKING:
    import pandas

U = TypeVar("U", bound=Updates)


def similarity(a: Updates, b: Updates, k: int = 8, l: int = 8, progress: Progress | None = None) -> "pandas.DataFrame":
    """One row for each layer that both adapters change, under its name in `a`: `geometry.similarity`.

    Known spellings of one layer are matched as in `merge`, with the same warnings.

    Parameters
    ----------
    k, l : int
        Leading directions of `a` and of `b`; cut to the rank where a module has fewer.
    progress : callable, optional
        Wrapped around the modules as they are done, as in `merge`.

    Returns
    -------
    pandas.DataFrame
        See `geometry.similarity` for its columns, and `geometry.pooled` for the line for the whole adapter.

    Raises
    ------
    ValueError
        If no layer is shared, shapes differ, or k or l is no integer of at least 1.
    """
    return geometry.similarity(*_matched(a, b), k, l, progress)


def align(adapter: U, to: Updates) -> U:
    """The representative of `adapter` whose balanced factors lie nearest to those of `to`: the same update.

    Known spellings of one layer are matched as in `merge`, with the same warnings; the result has the names of
    `adapter`. The rest is `gauge.align`.

    Raises
    ------
    ValueError
        If no layer is shared, or a module has another shape in `to`.
    """
    return gauge.align(*_matched(adapter, to))


def _matched(a: U, b: Updates) -> tuple[U, Updates]:
    """Both as they are where they have no names of files: updates of another kind, such as a model's."""
    if isinstance(a, Adapter) and isinstance(b, Adapter):
        return tuple(matched([a, b]))  # type: ignore[return-value]
    return a, b
