"""Where a rule runs: in the core of the updates, on their factors, or on dense matrices; and how its result leaves."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..lowrank import LowRank, add, leading
from ..numerics import Uneven, nonzero_svd
from ..values import AUTO, norms
from .batch import Batch
from .core import Core, Spectrum
from .method import Method
from .remarks import hearing


class Merged(NamedTuple):
    """One module: its update, the share of its squared norm that was cut off, and what the whole is scaled by.

    `sizes` has, for every group (the factors of `lora_opcm` are two), the squared norm of the uncut sum, then those of
    its parts; it is empty where the scale asks for no norms. `bound` is that of a sketch, `remarks` are the rule's.
    """

    update: LowRank
    dropped: float
    sizes: list[list[float]]
    bound: float | None = None
    remarks: Sequence[str] = ()


class Space(NamedTuple):
    """What a rule is given of one module, how its result becomes an update, how large that and its parts are, and of
    what ranks these."""

    enter: Callable[[Sequence[LowRank]], Any]
    leave: Callable[[Any, Any, int | None, float | None], tuple[LowRank, float]]
    sizes: Callable[[Any, Any], list[list[float]]]
    ranks: Callable[[Any], list[int]]


def _leave_core(core: Core, found, rank: int | None, energy: float | None) -> tuple[LowRank, float]:
    inside = isinstance(found, Tensor | Spectrum)
    return core.lift(found, rank, energy) if inside else _outside(core, *found).truncate(rank, energy)


def _outside(core: Core, left: Tensor, right: Tensor) -> LowRank:
    """Columns in the core, rows in the coordinates of the layer's inputs: what cannot be lifted by rotation."""
    return LowRank(core.left @ left, right.mT.to(core.left.columns.dtype))


def _sizes_in_core(core: Core, found) -> list[list[float]]:
    if isinstance(found, Tensor | Spectrum):
        numbers = found.s if isinstance(found, Spectrum) else found
        size = float(numbers.square().sum())
    else:
        size = _outside(core, *found).norm() ** 2
    return [[size, *core.norms()]]


def _sizes_of_updates(updates: list[LowRank], found) -> list[list[float]]:
    return [[u.norm() ** 2 for u in (found, *updates)]]


SPACES = {
    "core": Space(Core.of, _leave_core, _sizes_in_core, lambda core: [x.s.shape[-1] for x in core.frames()]),
    "updates": Space(
        lambda updates: [u.wide() for u in updates],
        lambda updates, found, *cut: found.truncate(*cut),
        _sizes_of_updates,
        lambda updates: [len(u.svd()[1]) for u in updates],
    ),
    "dense": Space(
        lambda updates: [u.left.double() @ u.right.double() for u in updates],
        lambda deltas, found, *cut: leading(*nonzero_svd(found, found.dtype), *cut),
        lambda deltas, found: [[float(x.square().sum()) for x in (found, *deltas)]],
        lambda deltas: [len(nonzero_svd(x, torch.float32)[1]) for x in deltas],
    ),
}


def merge_module(method: Method, inside: Any, cut: Mapping[str, Any], scale: float | str, options: Mapping) -> Merged:
    """The merge of one module, entered into the method's space already; `cut` has its rank and energy."""
    space, late = SPACES[method.space], _cut(method, inside, cut)
    early = {name: late.pop(name) for name in method.cuts}  # by a rule that leaves no spectrum to cut by
    with hearing() as remarks:
        found, groups = method.rule(inside, **options, **early), None
    if method.space == "updates" and isinstance(found, tuple):
        found, groups = found  # sizes of its own, of what is no update
    update, dropped = space.leave(inside, found, late.get("rank"), late.get("energy"))
    if norms(scale) is None:
        return Merged(update.to("cpu"), dropped, [], remarks=remarks)
    sizes = space.sizes(inside, found) if groups is None or scale == AUTO else groups
    return Merged(update.to("cpu"), dropped, sizes, remarks=remarks)


def _cut(method: Method, inside: Any, cut: Mapping[str, Any]) -> dict[str, Any]:
    """`cut`, or where there is none the largest rank of an update, for a method that is cut to it; not that of its
    factors, which a gauge can change."""
    if not method.largest or cut["rank"] or cut["energy"]:
        return dict(cut)
    return dict(cut) | {"rank": max([1, *SPACES[method.space].ranks(inside)])}


def merge_batch(
    method: Method, batch: Batch, cut: Mapping[str, Any], scale: float | str, options: Sequence[Mapping]
) -> list[Merged]:
    """`merge_module` of every module of a batch, each with its options: in one go, where the rule can."""
    if options and method.batched and cut.get("energy") is None:
        try:
            late = _cut(method, batch, cut)
            early = {name: late.pop(name) for name in method.cuts}
            found = method.rule(batch, **options[0], **early)
            spectrum = found if isinstance(found, Spectrum) else Spectrum(*nonzero_svd(found, batch.dtype))
            lifted = batch.lift(spectrum, late.get("rank"))
        except Uneven:
            if len(batch) > 1:
                alone = [batch.of_these(slice(i, i + 1)) for i in range(len(batch))]
                return [m for b, o in zip(alone, options, strict=True) for m in merge_batch(method, b, cut, scale, [o])]
        else:
            sizes: list[list[list[float]]] = [[]] * len(batch)
            if norms(scale) is not None:
                whole = spectrum.s.square().sum(-1).tolist()
                sizes = [[[size, *parts]] for size, parts in zip(whole, batch.norms(), strict=True)]
            return [Merged(*each, size) for each, size in zip(lifted, sizes, strict=True)]
    return [merge_module(method, batch[i], cut, scale, o) for i, o in enumerate(options)]


def side_by_side(updates: Sequence[LowRank], sized: bool) -> Merged:
    """A plain sum without any arithmetic; of a single update, that update as it was stored."""
    there = [u for u in updates if u.rank] or list(updates[:1])
    total = there[0] if len(there) == 1 else add(there)
    return Merged(total, 0.0, [[u.norm() ** 2 for u in (total, *updates)]] if sized else [])
