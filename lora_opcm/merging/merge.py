"""`merge`: any method of the table on whole adapters, module by module."""

import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..files import Adapter, combine, load_adapter, scaled, shapes_of
from ..lowrank import LowRank
from ..parallel import Progress, parallel_map
from ..values import Energy, Limit, Scale, expect, norms
from .core import Core
from .method import Method, method_of

BATCH = 2**28  # numbers that are stacked on a device at once
Source = Adapter | str | os.PathLike
Item = tuple[str, list[LowRank] | None, Core | None]  # name of a module; on a device, its updates and their core


class Merged(NamedTuple):
    """One module: its update, the share of its squared norm that was cut off, and what the whole is scaled by.

    `sizes` has, for every group (`lora_opcm` has two), the squared norm of the uncut sum, then those of its parts; it
    is empty where the scale asks for no norms.
    """

    update: LowRank
    dropped: float
    sizes: list[list[float]]


# -- where rules run ------------------------------------------------------------------------------------------


class Space(NamedTuple):
    """What a rule is given of one module, how its result becomes an update, and how large that and its parts are."""

    enter: Callable[[Sequence[LowRank]], Any]
    leave: Callable[[Any, Any, int | None, float | None], tuple[LowRank, float]]
    sizes: Callable[[Any, Any], list[list[float]]]


def _leave_core(core: Core, found, rank: int | None, energy: float | None) -> tuple[LowRank, float]:
    return (
        core.lift(found, rank, energy) if isinstance(found, Tensor) else _outside(core, *found).truncate(rank, energy)
    )


def _outside(core: Core, left: Tensor, right: Tensor) -> LowRank:
    """Columns in the core, rows in the coordinates of the layer's inputs: what cannot be lifted by rotation."""
    return LowRank(core.left @ left, right.mT.to(core.left.columns.dtype))


def _sizes_in_core(core: Core, found) -> list[list[float]]:
    size = float(found.square().sum()) if isinstance(found, Tensor) else _outside(core, *found).norm() ** 2
    return [[size, *core.norms()]]


def _sizes_of_updates(updates: list[LowRank], found) -> list[list[float]]:
    return found[1] if isinstance(found, tuple) else [[u.norm() ** 2 for u in (found, *updates)]]


SPACES = {
    "core": Space(Core.of, _leave_core, _sizes_in_core),
    "updates": Space(
        lambda updates: [u.wide() for u in updates],
        lambda updates, found, *cut: (found[0] if isinstance(found, tuple) else found).truncate(*cut),
        _sizes_of_updates,
    ),
    "dense": Space(
        lambda updates: [u.left.double() @ u.right.double() for u in updates],
        lambda deltas, found, *cut: LowRank.from_dense(found).truncate(*cut),
        lambda deltas, found: [[float(x.square().sum()) for x in (found, *deltas)]],
    ),
}


def merge_module(method: Method, inside: Any, cut: Mapping[str, Any], sized: bool, options: Mapping) -> Merged:
    """The merge of one module, entered into the method's space already; `cut` has its rank and energy."""
    space, late = SPACES[method.space], dict(cut)
    early = {name: late.pop(name) for name in method.cuts}  # by a rule that leaves no spectrum to cut by
    found = method.rule(inside, **options, **early)
    update, dropped = space.leave(inside, found, late.get("rank"), late.get("energy"))
    return Merged(update.to("cpu"), dropped, space.sizes(inside, found) if sized else [])


# -- whole adapters --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Part:
    """Some modules of a merge before its last step, the one factor of the whole adapter.

    Attributes
    ----------
    adapter : Adapter
        Merged updates in the working dtype, not scaled yet.
    sizes : dict of str to list of list of float
        Per module, see `Merged`.
    scale : float or str
    """

    adapter: Adapter
    sizes: dict[str, list[list[float]]]
    scale: float | str

    @property
    def factor(self) -> float:
        """What the merged updates are multiplied by.

        Sums over modules are exactly rounded: they do not depend on how modules are shared out.
        """
        if (times := norms(self.scale)) is None:
            return float(self.scale)
        factor = times
        for group in zip(*self.sizes.values(), strict=True):
            size, *parts = (math.sqrt(math.fsum(column)) for column in zip(*group, strict=True))
            factor *= sum(parts) / len(parts) / size if size else 1.0
        return factor

    def finish(self) -> Adapter:
        """Scaled, in the dtype of the inputs."""
        return replace(scaled(self.adapter, self.adapter.modules, self.factor), dropped=self.adapter.dropped)


def merge(
    *inputs: Source | Iterable[Source] | str,
    method: str = "opcm",
    weights: Sequence[float] | None = None,
    scale: float | str | None = None,
    rank: int | None = None,
    energy: float | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
    **options,
) -> Adapter:
    """One adapter out of several: `merge(a, b, method="tsv")`, or `merge([a, b], "tsv")`.

    Parameters
    ----------
    inputs : Adapter or path, or one sequence of them
        Ranks and module sets may differ; a module an adapter lacks counts as zero.
    method : str
        A name of the table, see `methods()`.
    weights : sequence of float, optional
        One factor per adapter, applied to its update first; may be negative. 1 unless given.
    scale : float or str, optional
        Multiplies the merged adapter. "norm" gives it the mean norm of its parts, "2norm" twice that (before it is
        cut). The method's own unless given.
    rank, energy : optional
        Truncate the result to a rank, or to a share of its squared norm. None keeps it exact.
    dtype : torch.dtype, optional
        Of the result; the widest of the inputs unless given.
    device : optional
        "cuda", "mps", …: where large matrices are multiplied, modules of equal shape and ranks in one batch; what
        has only the size of the summed rank stays float64 on the CPU. None works there module by module.
    progress : callable, optional
        Wrapped around the modules (on a device, the batches) as they are done, called with an iterable and
        `total`: `tqdm.tqdm` will do.
    **options
        Of the method.

    Returns
    -------
    Adapter
        On the CPU, in the balanced gauge; computed in float64 cores. `dropped` has, per module, the share of the
        squared norm that truncation cut off.

    Raises
    ------
    ValueError
        For an unknown method or option, no adapters, a wrong number of weights, NaN or Inf among them, or
        shapes that differ. `AdapterError`, a ValueError, where base models or full tensors disagree.
    """
    adapters, method = _taken(inputs, method)
    return merge_part(adapters, method, weights, scale, rank, energy, dtype, device, progress, **options).finish()


def _taken(inputs: tuple, method: str) -> tuple[list[Adapter], str]:
    """Adapters, loaded, and the method, from the two ways `merge` is called in."""
    if inputs and not isinstance(inputs[0], Adapter | str | os.PathLike):
        sources, *rest = inputs
        if len(rest) > 1 or any(not isinstance(x, str) for x in rest):
            raise TypeError(f"expected merge(a, b, …) or merge([a, b, …], method), got {len(inputs)} arguments")
        inputs, method = tuple(sources), (rest or [method])[0]
    return [a if isinstance(a, Adapter) else load_adapter(a) for a in inputs], method


def merge_part(
    adapters: Sequence[Adapter],
    method: str,
    weights: Sequence[float] | None = None,
    scale: float | str | None = None,
    rank: int | None = None,
    energy: float | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
    **options,
) -> Part:
    """All of `merge` but its last step, on adapters that may hold a part of their modules only."""
    entry, weights, merged = checked(adapters, method, weights, scale, rank, energy, **options)
    scale, shapes = entry.scale if scale is None else scale, shapes_of(adapters)

    def one(item: Item) -> Merged:
        name, updates, core = item  # without a device, updates are made when a module's turn comes
        inside = core or SPACES[entry.space].enter(updates or _updates(adapters, name, weights))
        cut = {"rank": rank, "energy": energy}
        if entry.largest and rank is None and energy is None:
            cut["rank"] = max(1, *(a.modules[name].rank for a in adapters if name in a.modules))
        return merge_module(entry, inside, cut, norms(scale) is not None, _local(options, entry, name))

    found: dict[str, Merged] = {}
    if device is None:
        items: list[Item] = [(name, None, None) for name in shapes]
        found |= dict(zip(shapes, parallel_map(one, items, progress), strict=True))
    else:
        batches = list(_batches(adapters, shapes))
        for names in progress(batches, total=len(batches)) if progress else batches:
            parts = [_updates(adapters, name, weights) for name in names]
            cores: Sequence[Core | None] = [None] * len(names)
            if entry.space == "core":
                cores = Core.batch(parts, device)
            elif torch.device(device).type != "mps":  # which has no float64
                parts = [[u.to(device) for u in updates] for updates in parts]
            batch = list(zip(names, parts, cores, strict=True))
            found |= dict(zip(names, parallel_map(one, batch), strict=True))
    modules = {name: found[name].update for name in shapes}
    merged = replace(
        merged.with_modules(modules),
        dropped={name: found[name].dropped for name in shapes},
        dtype=dtype or merged.dtype,
    )
    return Part(merged, {name: found[name].sizes for name in shapes}, scale)


def checked(
    adapters: Sequence[Adapter],
    method: str,
    weights: Sequence[float] | None = None,
    scale: float | str | None = None,
    rank: int | None = None,
    energy: float | None = None,
    **options,
) -> tuple[Method, list[float], Adapter]:
    """What `merge` refuses before it works, see there: the method, the weights, and the metadata of the result."""
    entry = method_of(method)
    entry.check(**options)
    expect(Limit, rank=rank)
    expect(Energy, energy=energy)
    if scale is not None:
        expect(Scale, scale=scale)
    if not adapters:
        raise ValueError("expected at least one adapter, got none")
    weights = [1.0] * len(adapters) if weights is None else [float(w) for w in weights]
    if len(weights) != len(adapters):
        raise ValueError(f"expected {len(adapters)} weights, one per adapter, got {len(weights)}")
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"weights must be finite, got {weights}")
    return entry, weights, combine(adapters, adapters[0].modules)


def _local(options: Mapping, method: Method, name: str) -> dict:
    """The options for one module: another random mask for every module, the same one every time; its own Grams."""
    local = dict(options)
    if "seed" in method.options:
        local["seed"] = zlib.crc32(f"{options.get('seed', 0)} {name}".encode())
    if "grams" in options:
        local["grams"] = [grams.get(name) for grams in options["grams"]]
    return local


def _updates(adapters: Sequence[Adapter], name: str, weights: Sequence[float]) -> list[LowRank]:
    """The weighted updates of a module, of rank 0 for who lacks it. Half precision stays as it came at weight 1."""
    like = next(a.modules[name] for a in adapters if name in a.modules)
    found = [a.modules.get(name) or like.zero() for a in adapters]
    return [u if w == 1 else u.wide() * w for u, w in zip(found, weights, strict=True)]


def _batches(adapters: Sequence[Adapter], names: Iterable[str]) -> Iterator[Sequence[str]]:
    """Names of modules whose updates have equal shapes, ranks and dtypes, `BATCH` numbers at a time."""
    groups: dict[tuple, list[str]] = {}
    for name in names:
        key = tuple((u.shape, u.rank, u.dtype) for u in _updates(adapters, name, [1.0] * len(adapters)))
        groups.setdefault(key, []).append(name)
    for key, group in groups.items():
        numbers = sum(sum(shape) * rank for shape, rank, _ in key)
        step = max(1, BATCH // max(1, numbers))
        yield from (group[i : i + step] for i in range(0, len(group), step))
