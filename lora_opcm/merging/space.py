"""Where a rule runs: in the core of the updates, on their factors, or on dense matrices; and how its result leaves."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..lowrank import LowRank, add
from .core import Core
from .method import Method


class Merged(NamedTuple):
    """One module: its update, the share of its squared norm that was cut off, and what the whole is scaled by.

    `sizes` has, for every group (all methods but one have a single one), the squared norm of the uncut sum, then those
    of its parts.
    """

    update: LowRank
    dropped: float
    sizes: list[list[float]]


class Space(NamedTuple):
    """What a rule is given of the updates of one module (`enter`), and how its result becomes an update (`leave`)."""

    enter: Callable[[Sequence[LowRank]], Any]
    leave: Callable[[Any, Any, int | None, float | None], Merged]


def _leave_core(core: Core, found, rank: int | None, energy: float | None) -> Merged:
    if isinstance(found, Tensor):
        return Merged(*core.lift(found, rank, energy), [[float(found.square().sum()), *core.norms()]])
    # Columns in the core, rows in the coordinates of the layer's inputs: what cannot be lifted by rotation.
    update = LowRank(core.left @ found[0], found[1].mT.to(core.left.columns.dtype))
    return Merged(*update.truncate(rank, energy), [[update.norm() ** 2, *core.norms()]])


def _leave_updates(updates: list[LowRank], found, rank: int | None, energy: float | None) -> Merged:
    update, sizes = found if isinstance(found, tuple) else (found, None)
    sizes = sizes or [[update.norm() ** 2, *(u.norm() ** 2 for u in updates)]]
    return Merged(*update.truncate(rank, energy), sizes)


def _leave_dense(deltas: list[Tensor], found: Tensor, rank: int | None, energy: float | None) -> Merged:
    cut = LowRank.from_dense(found).truncate(rank, energy)
    return Merged(*cut, [[float(x.square().sum()) for x in (found, *deltas)]])


SPACES = {
    "core": Space(Core.of, _leave_core),
    "updates": Space(lambda updates: [u.wide() for u in updates], _leave_updates),
    "dense": Space(lambda updates: [u.left.double() @ u.right.double() for u in updates], _leave_dense),
}


def merge_module(method: Method, inside: Any, rank: int | None, energy: float | None, options: Mapping) -> Merged:
    """The merge of one module, entered into the method's space already."""
    cut = {"rank": rank, "energy": energy}
    early = {name: cut.pop(name) for name in method.cuts}  # by a rule that leaves no spectrum to cut by
    found = method.rule(inside, **options, **early)
    merged = SPACES[method.space].leave(inside, found, cut.get("rank"), cut.get("energy"))
    return merged._replace(update=merged.update.to("cpu"))


def side_by_side(updates: Sequence[LowRank]) -> Merged:
    """A plain sum without any arithmetic; of a single update, that update as it was stored."""
    there = [u for u in updates if u.rank] or list(updates[:1])
    total = there[0] if len(there) == 1 else add(there)
    return Merged(total, 0.0, [[total.norm() ** 2, *(u.norm() ** 2 for u in updates)]])
