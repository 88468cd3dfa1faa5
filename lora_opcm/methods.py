"""The registry of merge methods, and `merge`, which runs any of them on whole adapters."""

import inspect
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import rules
from .adapters import Adapter, combine, scaled, shapes_of
from .core import Core, reduce, reduce_batch
from .lowrank import LowRank, working_dtype
from .opcm import FactorMerger, stream
from .options import check
from .parallel import Progress, parallel_map

SPACES = {"core": "core space", "factors": "factors", "dense": "dense ΔW"}
BATCH = 2**28  # numbers that are stacked on a device at once


@dataclass(frozen=True)
class Method:
    """A merge rule and what is true of it.

    `space` says what of one module `run` is given: the `Core` of its updates ("core"), the updates ("factors"), or
    their dense float64 matrices ("dense").
    """

    name: str
    run: Callable
    space: str
    source: str
    continual: bool = False  # sees one adapter at a time
    ordered: bool = False  # the order of the adapters matters
    gauge_invariant: bool = True  # factors (left G, G⁻¹ right) give the same result
    data: bool = False  # needs Gram matrices of the layers' inputs

    @property
    def options(self) -> dict[str, object]:
        """Option names and defaults."""
        return {p.name: p.default for p in list(inspect.signature(self.run).parameters.values())[1:]}


@dataclass(frozen=True, eq=False)
class Part:
    """Some modules of a merge before its last step, the one factor OPCM gives to the whole adapter.

    Attributes
    ----------
    adapter : Adapter
        Merged updates in the working dtype, not scaled yet.
    dropped : dict of str to float
        Per module, the share of the squared norm that truncation cut off.
    sizes : dict of str to list of list of float
        What the factor is made of, per module: for every group (OPCM has one) the squared norm of its sum, then those of its
        parts. Empty where nothing is scaled at the end.
    """

    adapter: Adapter
    dropped: dict[str, float]
    sizes: dict[str, list[list[float]]]

    def finish(self) -> Adapter:
        """With the factor mean norm of the parts / norm of their sum, in the dtype of the inputs.

        Sums over modules are exactly rounded: they do not depend on how modules are shared out.
        """
        factor = 1.0
        for group in zip(*self.sizes.values()):
            size, *parts = (math.sqrt(math.fsum(column)) for column in zip(*group))
            factor *= sum(parts) / len(parts) / size if size else 1.0
        return scaled(self.adapter, self.adapter.modules, factor)


def merge(
    adapters: Sequence[Adapter],
    method: str = "opcm",
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    energy: float | None = None,
    dropped: dict[str, float] | None = None,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
    **options,
) -> Adapter:
    """One adapter out of several.

    Parameters
    ----------
    adapters : sequence of Adapter
        Ranks and module sets may differ; a module an adapter lacks counts as zero.
    method : str
        A name of the registry, see `methods()`.
    weights : sequence of float, optional
        One factor per adapter, applied to its update first; may be negative. 1 unless given.
    rank, energy : optional
        Truncate the result to a rank, or to a share of its squared norm. None keeps it exact.
    dropped : dict, optional
        Is given, per module, the share of the squared norm that truncation cut off.
    device : optional
        "cuda", "mps", …: where large matrices are multiplied, modules of equal shape and ranks in one batch; what
        has only the size of the summed rank stays float64 on the CPU. None works there module by module.
    progress : callable, optional
        Wrapped around the modules (on a device, the batches) as they are done, called with an iterable and
        `total`: `tqdm.tqdm` will do.
    **options
        Of the method; `scale` multiplies the merged update. "norm", OPCM's default, gives the whole merged
        adapter the mean norm of its parts.

    Returns
    -------
    Adapter
        On the CPU, in the balanced gauge and the widest dtype of the inputs; computed in float64 cores.

    Raises
    ------
    ValueError
        For an unknown method or option, no adapters, a wrong number of weights, NaN or Inf among them, or
        shapes that differ. `AdapterError`, a ValueError, where base models or full tensors disagree.
    """
    part = merge_part(adapters, method, weights, rank, energy, device, progress, **options)
    if dropped is not None:
        dropped |= part.dropped
    return part.finish()


def merge_part(
    adapters: Sequence[Adapter],
    method: str,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    energy: float | None = None,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
    **options,
) -> Part:
    """All of `merge` but its last step, on adapters that may hold a part of their modules only."""
    adapters = list(adapters)
    entry, weights, merged = checked(adapters, method, weights, rank, energy, **options)
    shapes = shapes_of(adapters)
    by_norm = options.get("scale", entry.options.get("scale")) == "norm"
    if by_norm:
        options = options | {"scale": 1.0}

    def one(item: tuple[str, list[LowRank] | None, Core | None]) -> tuple[LowRank, float, list[list[float]]]:
        """The merged update of a module, the share cut off, and its `Part.sizes`."""
        name, updates, core = item
        updates = updates or _updates(adapters, name, weights)
        local = options | ({"seed": _seed(options, name)} if "seed" in entry.options else {})
        local |= {"grams": [g.get(name) for g in options["grams"]]} if "grams" in options else {}
        sizes = []
        if entry.space == "core":
            core = core or reduce(updates)  # knows what to do with half precision
            found = entry.run(core, **local)
            if isinstance(found, Tensor):
                if by_norm:
                    sizes = [[float(found.square().sum()), *(f.norm() ** 2 for f in core.factors)]]
                return *core.lift(found, rank, energy), sizes
            update = LowRank(core.left @ found[0], found[1].mT.to(core.left.columns.dtype))
        elif entry.space == "dense":
            update = rules.dense(entry.run([u.left.double() @ u.right.double() for u in updates], **local))
        else:
            update, sizes = entry.run([wide(u) for u in updates], **local)
        if by_norm:
            sizes = [[update.norm() ** 2, *(u.norm() ** 2 for u in updates)]]
        update, share = update.truncate(rank, energy)
        return update.to("cpu"), share, sizes

    found, batches, each = {}, [list(shapes)], progress
    if device is not None:
        batches, each = list(_batches(adapters, shapes)), None
        batches = progress(batches, total=len(batches)) if progress else batches
    for names in batches:
        parts = cores = [None] * len(
            names
        )  # without a device, a module's updates are made when its turn comes
        if device is not None:
            parts = [_updates(adapters, name, weights) for name in names]
        if device is not None and entry.space == "core":
            cores = reduce_batch(parts, device)
        elif device is not None and torch.device(device).type != "mps":  # which has no float64
            parts = [[u.to(device) for u in updates] for updates in parts]
        found |= dict(zip(names, parallel_map(one, zip(names, parts, cores), each)))
    found = {name: found[name] for name in shapes}
    return Part(
        merged.with_modules({name: update for name, (update, _, _) in found.items()}),
        {name: share for name, (_, share, _) in found.items()},
        {name: sizes for name, (_, _, sizes) in found.items() if sizes},
    )


def checked(
    adapters: Sequence[Adapter],
    method: str,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    energy: float | None = None,
    **options,
) -> tuple[Method, list[float], Adapter]:
    """What `merge` refuses before it works, see there: the method, the weights, and the metadata of the result."""
    if method not in REGISTRY:
        raise ValueError(f"unknown method {method!r}; the methods are {', '.join(sorted(REGISTRY))}")
    entry = REGISTRY[method]
    unknown = set(options) - set(entry.options)
    if unknown:
        raise ValueError(
            f"{method} has no option {sorted(unknown)}; it takes {sorted(entry.options) or 'none'}"
        )
    check(rank=rank, energy=energy, **options)
    if not adapters:
        raise ValueError("expected at least one adapter, got none")
    weights = [1.0] * len(adapters) if weights is None else [float(w) for w in weights]
    if len(weights) != len(adapters):
        raise ValueError(f"expected {len(adapters)} weights, one per adapter, got {len(weights)}")
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"weights must be finite, got {weights}")
    return entry, weights, combine(adapters, adapters[0].modules)


def _batches(adapters: Sequence[Adapter], names: Iterable[str]) -> Iterator[Sequence[str]]:
    """Names of modules whose updates have equal shapes, ranks and dtypes, `BATCH` numbers at a time."""
    groups: dict[tuple, list[str]] = {}
    for name in names:
        key = tuple((u.shape, u.rank, u.dtype) for u in _updates(adapters, name, [1] * len(adapters)))
        groups.setdefault(key, []).append(name)
    for key, names in groups.items():
        numbers = sum(sum(shape) * rank for shape, rank, _ in key)
        step = max(1, BATCH // max(1, numbers))
        yield from (names[i : i + step] for i in range(0, len(names), step))


def methods():
    """The registry as a pandas table: what each method sees, where it runs, and what it takes."""
    import pandas as pd

    rows = [
        {
            "method": m.name,
            "sees": "one at a time" if m.continual else "all at once",
            "order matters": m.ordered,
            "gauge-invariant": m.gauge_invariant,
            "runs on": SPACES[m.space],
            "needs data": m.data,
            "options": ", ".join(m.options),
            "source": m.source,
        }
        for m in REGISTRY.values()
    ]
    return pd.DataFrame(rows).set_index("method")


def _updates(adapters: Sequence[Adapter], name: str, weights: Sequence[float]) -> list[LowRank]:
    """The weighted updates of a module, zero for who lacks it. Half precision stays as it came at weight 1."""
    like = next(a.modules[name] for a in adapters if name in a.modules)
    zero = LowRank(torch.zeros_like(like.left), torch.zeros_like(like.right))
    found = [a.modules.get(name, zero) for a in adapters]
    return [u if w == 1 else wide(u) * w for u, w in zip(found, weights)]


def wide(update: LowRank) -> LowRank:
    """In float32 or better: half precision is rounded once, at the end."""
    return update.to(working_dtype(update.dtype))


def _seed(options: dict, name: str) -> int:
    """Another random mask for every module, the same one every time."""
    return zlib.crc32(f"{options.get('seed', 0)} {name}".encode())


# -- methods that see the factors ----------------------------------------------------------------------------


def lora_opcm(
    updates: Sequence[LowRank], alpha: float = 0.5, gauge: str = "given"
) -> tuple[LowRank, list[list[float]]]:
    """OPCM on the two factors apart, as the drafts propose; see `opcm.FactorMerger`."""
    sides = FactorMerger.sides(updates, gauge)
    cores = [reduce(side) for side in sides]
    totals = [stream(core, alpha, "paper") for core in cores]
    left, right = (core.lift(total)[0].delta() for core, total in zip(cores, totals))
    sizes = [[float(x.square().sum()), *(f.norm() ** 2 for f in c.factors)] for x, c in zip(totals, cores)]
    return LowRank(left, right), sizes


def regmean(updates: Sequence[LowRank], grams: Sequence[Tensor] = ()) -> tuple[LowRank, list]:
    """(Σ ΔWₜGₜ)(Σ Gₜ)⁻¹ with Gₜ = XᵀX (n, n) of the layer's inputs on task t: least squares on the outputs.

    `merge` takes `grams` as one dict module → XᵀX per adapter.
    """
    n = updates[0].shape[1]
    if len(grams) != len(updates) or any(g is None or g.shape != (n, n) for g in grams):
        got = [None if g is None else tuple(g.shape) for g in grams]
        raise ValueError(f"regmean needs grams: expected a Gram matrix {(n, n)} per adapter, got {got}")
    grams = [g.to(updates[0].left.device, torch.float64) for g in grams]
    total = sum(grams)
    total += 1e-9 * total.diagonal().mean() * torch.eye(n).to(total)  # rank-deficient inputs
    right = [torch.linalg.solve(total, g @ u.right.double().mT).mT for u, g in zip(updates, grams)]
    return LowRank(torch.cat([u.left.double() for u in updates], 1), torch.cat(right, 0)), []


_ENTRIES = [
    Method("mean", rules.mean, "core", "Wortsman et al., arXiv 2203.05482", continual=True),
    Method("task_arithmetic", rules.task_arithmetic, "core", "Ilharco et al., arXiv 2212.04089", continual=True),
    Method("cat", rules.cat, "core", "exact sum; peft's cat", continual=True),
    Method("svd", rules.svd, "core", "Eckart and Young 1936; peft's svd"),
    Method("ties", rules.ties, "dense", "Yadav et al., arXiv 2306.01708"),
    Method("dare", rules.dare, "dense", "Yu et al., arXiv 2311.03099", ordered=True),
    Method("dare_ties", rules.dare_ties, "dense", "Yu et al., arXiv 2311.03099", ordered=True),
    Method("magnitude_prune", rules.magnitude_prune, "dense", "peft's magnitude_prune"),
    Method("knots_ties", rules.knots_ties, "core", "Stoica et al., arXiv 2410.19735"),
    Method("tsv", rules.tsv, "core", "Gargiulo et al., arXiv 2412.00081"),
    Method("iso_c", rules.iso_c, "core", "Marczak et al., arXiv 2502.04959"),
    Method("iso_cts", rules.iso_cts, "core", "Marczak et al., arXiv 2502.04959"),
    Method("core_ties", rules.core_ties, "core", "Core Space, arXiv 2509.17786"),
    Method("core_dare_ties", rules.core_dare_ties, "core", "Core Space, arXiv 2509.17786", ordered=True),
    Method("regmean", regmean, "factors", "Jin et al., arXiv 2212.09849", data=True),
    Method("ctm", rules.ctm, "core", "Compress then Merge, arXiv 2606.03723"),
    Method("chordal_mean", rules.chordal_mean, "core", "design of this book"),
    Method("karcher_mean", rules.karcher_mean, "core", "design of this book"),
    Method("quotient_mean", rules.quotient_mean, "core", "after GeoMerge, arXiv 2604.27155"),
    Method("opcm", rules.opcm, "core", "Tang et al., arXiv 2501.09522", continual=True, ordered=True),
    Method(
        "lora_opcm", lora_opcm, "factors", "the drafts of this book",
        continual=True, ordered=True, gauge_invariant=False,
    ),
    Method("whitened_sum", rules.whitened_sum, "core", "this book; TSV at power 0", continual=True),
    Method("whitening", rules.whitening, "core", "this book", continual=True, ordered=True),
]  # fmt: skip
REGISTRY: dict[str, Method] = {m.name: m for m in _ENTRIES}
