"""`merge`: any method of the table on whole adapters, module by module."""

import math
import os
import warnings
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..files import Adapter, combine, dropping, level, load_adapter, matched, scaled, shapes_of
from ..lowrank import LowRank
from ..parallel import Progress, parallel_map
from ..values import AUTO, Energy, Full, Limit, Scale, expect, factor, norms
from .batch import Batch, batches
from .method import Method, method_of
from .remarks import tell
from .sketch import sketched_sum, worth
from .space import SPACES, Merged, merge_batch, merge_module, side_by_side

Source = Adapter | str | os.PathLike


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
    ragged : bool
        Whether modules may have ranks of their own.
    """

    adapter: Adapter
    sizes: dict[str, list[list[float]]]
    scale: float | str
    ragged: bool = False

    @property
    def factor(self) -> float:
        """What the merged updates are multiplied by.

        Sums over modules are exactly rounded: they do not depend on how modules are shared out.
        """
        if self.scale == AUTO:  # of what a cut left, of the whole adapter
            left = [1 - self.adapter.dropped.get(name, 0.0) for name in self.sizes]
            sizes = [[[size * x, *parts]] for x, [[size, *parts]] in zip(left, self.sizes.values(), strict=True)]
            return math.prod(factor(AUTO, size, parts) for size, *parts in _norms(sizes))
        if (times := norms(self.scale)) is None:
            return float(self.scale)
        return times * math.prod(factor("norm", size, parts) for size, *parts in _norms(self.sizes.values()))

    def finish(self) -> Adapter:
        """Scaled, in the dtype of the inputs, at one rank."""
        by = self.factor
        whole = replace(scaled(self.adapter, self.adapter.modules, by), dropped=self.adapter.dropped, factor=by)
        return whole if self.ragged else level(whole)


def _norms(sizes: Iterable[list[list[float]]]) -> list[list[float]]:
    """Per group, norms over all modules, from their squares module by module."""
    groups = zip(*sizes, strict=True)
    return [[math.sqrt(math.fsum(column)) for column in zip(*group, strict=True)] for group in groups]


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
    disjoint: bool = False,
    any_base: bool = False,
    ragged: bool = False,
    drop: Sequence[str] = (),
    full: str | None = None,
    sketch: bool = True,
    **options,
) -> Adapter:
    """One adapter out of several: `merge(a, b, method="tsv")`, or `merge([a, b], "tsv")`.

    Parameters
    ----------
    inputs : Adapter or path, or one sequence of them
        Ranks and module sets may differ; a module an adapter lacks counts as zero. Known spellings of one layer are
        merged as one, under the name the first adapter gives it, with a warning that says so; formats may differ then.
    method : str
        A name of the table, see `methods()`.
    weights : sequence of float, optional
        One factor per adapter, applied to its update first; may be negative. 1 unless given.
    scale : float or str, optional
        Multiplies the merged adapter. "norm" gives it the mean norm of its parts, "2norm" twice that (before it is
        cut); "auto" min(√T, 2) times that (after it is cut), T counting the adapters that are not zero, nor of weight
        zero: a rule from measurements, not a theorem. The method's own unless given.
    rank, energy : optional
        Truncate the result to a rank, or to a share of its squared norm. None keeps it exact.
    dtype : torch.dtype, optional
        Of the result; the widest of the inputs unless given.
    device : optional
        "cuda", "mps", …: where large matrices are multiplied; what has only the size of the summed rank stays float64
        on the CPU.
    progress : callable, optional
        Wrapped around the modules, or batches of those with equal shapes and ranks, as they are done, called with an
        iterable and `total`: `tqdm.tqdm` will do.
    disjoint : bool
        Whether adapters may have no module in common.
    any_base : bool
        Whether the names of their base models may differ.
    ragged : bool
        Whether modules keep ranks of their own. If not, zeros bring all to the largest, so that readers that know
        one rank and one α scale every module right.
    drop : sequence of str
        Modules and full tensors to leave out: names, or patterns of `fnmatch`.
    full : {"first", "drop", "mean"}, optional
        What becomes of full tensors (`modules_to_save`) where adapters differ in them: that of the first adapter that
        has one, none of them, or the mean over those that have it, at equal weights. Refused unless given.
    sketch : bool
        Whether plain sums that are cut to `rank` may be sketched by random vectors where they have more columns than
        the layer has rows (`sketch.worth`), unless their scale asks for norms. A warning says then how far the result
        can be from the best of its rank.
    **options
        Of the method.

    Returns
    -------
    Adapter
        On the CPU, in the balanced gauge; computed in float64 cores. Plain sums that are not cut (`cat`,
        `task_arithmetic`) are the stored factors side by side. `dropped` has, per module, the share of the squared norm
        that truncation cut off, and `factor` what the scale came to.

    Raises
    ------
    ValueError
        For an unknown method or option, no adapters, a wrong number of weights, NaN or Inf among them, or
        shapes that differ. `AdapterError`, a ValueError, where base models or full tensors disagree, or no module is
        in two adapters.
    """
    adapters, method = _taken(inputs, method)
    options |= {"disjoint": disjoint, "any_base": any_base, "drop": drop, "full": full, "sketch": sketch}
    part = merge_part(adapters, method, weights, scale, rank, energy, dtype, device, progress, ragged, **options)
    return part.finish()


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
    ragged: bool = False,
    sketch: bool = True,
    **options,
) -> Part:
    """All of `merge` but its last step, on adapters that may hold a part of their modules only."""
    entry, weights, adapters, merged = checked(adapters, method, weights, scale, rank, energy, **options)
    for name in ("disjoint", "any_base", "drop", "full"):
        options.pop(name, None)
    scale, shapes = entry.scale if scale is None else scale, shapes_of(adapters)
    if plain := entry.plain and rank is None and energy is None:
        device = None  # there is no product to make

    asked = rank if sketch and entry.share and energy is None and norms(scale) is None else None

    ranks = {name: [a.modules[name].rank for a in adapters if name in a.modules] for name in shapes}

    cut = {"rank": rank, "energy": energy}

    def one(name: str, updates: list[LowRank]) -> Merged:
        if plain and sum(u.rank for u in updates) <= min(shapes[name]):
            return side_by_side(updates, norms(scale) is not None)
        if entry.share and asked and worth(shapes[name], ranks[name], asked):
            update, dropped, bound = sketched_sum(updates, asked, zlib.crc32(f"0 {name}".encode()))
            return Merged(update * entry.share(len(updates)), dropped, [], bound)
        if entry.space != "core" and device is not None and torch.device(device).type != "mps":  # which has no float64
            updates = [u.to(device) for u in updates]
        inside = SPACES[entry.space].enter(updates)
        return merge_module(entry, inside, cut, scale, _local(options, entry, name))

    def together(name: str) -> bool:
        return entry.space == "core" and not plain and 0 < sum(ranks[name]) < min(shapes[name])

    def many(names: list[str]) -> list[Merged]:
        parts = [_updates(adapters, name, weights) for name in names]  # made when their turn comes
        if not together(names[0]):
            return list(map(one, names, parts))
        batch, which, others = Batch.of(parts, device)
        local, how = [_local(options, entry, name) for name in names], (cut, scale)
        done = dict(zip(which, merge_batch(entry, batch, *how, [local[i] for i in which]), strict=True))
        done |= {i: merge_module(entry, core, *how, local[i]) for i, core in others.items()}
        return [done[i] for i in range(len(names))]

    if device is not None and torch.device(device).type != "mps":  # torch loads its linear algebra there once, and not
        torch.linalg.inv(torch.eye(1, device=device))  # in two threads
    items = batches(adapters, shapes, together, device is not None)
    found: dict[str, Merged] = {}
    for names, modules in zip(items, parallel_map(many, items, progress), strict=True):
        found |= zip(names, modules, strict=True)
    if bounds := [m.bound for m in found.values() if m.bound is not None]:
        warnings.warn(
            f"{len(bounds)} of {len(found)} modules were sketched, sums of more columns than their layers have rows:"
            f" they are at most {max(bounds):.2g} σ₁ further off than the best of rank {rank}, as sketch=False has it",
            stacklevel=3,
        )
    tell([m.remarks for m in found.values()], stacklevel=3)
    merged = replace(
        merged.with_modules({name: found[name].update for name in shapes}),
        dropped={name: found[name].dropped for name in shapes},
        dtype=dtype or merged.dtype,
    )
    return Part(merged, {name: found[name].sizes for name in shapes}, scale, ragged)


def checked(
    adapters: Sequence[Adapter],
    method: str,
    weights: Sequence[float] | None = None,
    scale: float | str | None = None,
    rank: int | None = None,
    energy: float | None = None,
    disjoint: bool = False,
    any_base: bool = False,
    drop: Sequence[str] = (),
    full: str | None = None,
    **options,
) -> tuple[Method, list[float], list[Adapter], Adapter]:
    """What `merge` refuses before it works, see there.

    Returns the method, the weights, the adapters under one name for each layer, and the metadata of the result.
    """
    entry = method_of(method)
    entry.check(**options)
    expect(Limit, rank=rank)
    expect(Energy, energy=energy)
    expect(Full, full=full)
    if scale is not None:
        expect(Scale, scale=scale)
    if not adapters:
        raise ValueError("expected at least one adapter, got none")
    weights = [1.0] * len(adapters) if weights is None else [float(w) for w in weights]
    if len(weights) != len(adapters):
        raise ValueError(f"expected {len(adapters)} weights, one per adapter, got {len(weights)}")
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"weights must be finite, got {weights}")
    adapters = matched(dropping(adapters, drop), disjoint, entry.adds(rank, energy, scale))
    return entry, weights, adapters, combine(adapters, adapters[0].modules, any_base, full)


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
    found = [
        LowRank(u.left.detach(), u.right.detach()) if u.left.requires_grad or u.right.requires_grad else u
        for u in found
    ]
    return [u if w == 1 else u.wide() * w for u, w in zip(found, weights, strict=True)]
