"""The registry of merge methods, and `merge`, which runs any of them on whole adapters."""

import inspect
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import rules
from .adapters import Adapter, _finite, combine
from .lowrank import LowRank, add, reduce, working_dtype
from .opcm import FactorMerger
from .parallel import Progress, parallel_map

SPACES = {
    "sum": "factors side by side",
    "core": "core space",
    "dense": "dense ΔW",
    "adapter": "whole adapters",
}


@dataclass(frozen=True)
class Method:
    """A merge rule and what is true of it.

    `space` says on what `run` works: the updates of one module ("sum"), their `Core` ("core"), their dense
    float64 matrices ("dense"), or a list of adapters ("adapter").
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


def merge(
    adapters: Sequence[Adapter],
    method: str = "opcm",
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    energy: float | None = None,
    dropped: dict[str, float] | None = None,
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
    progress : callable, optional
        Wrapped around the modules as they are done, called with an iterable and `total`: `tqdm.tqdm` will do.
    **options
        Of the method; `scale` multiplies the merged update. "norm", OPCM's default, gives the whole merged
        adapter the mean norm of its parts.

    Returns
    -------
    Adapter
        In the balanced gauge and the widest dtype of the inputs; computed in float64 cores.

    Raises
    ------
    ValueError
        For an unknown method or option, no adapters, a wrong number of weights, NaN or Inf among them, or
        shapes that differ. `AdapterError`, a ValueError, where base models or full tensors disagree.
    """
    if method not in REGISTRY:
        raise ValueError(f"unknown method {method!r}; the methods are {', '.join(sorted(REGISTRY))}")
    entry = REGISTRY[method]
    unknown = set(options) - set(entry.options)
    if unknown:
        raise ValueError(
            f"{method} has no option {sorted(unknown)}; it takes {sorted(entry.options) or 'none'}"
        )
    if not 0 < options.get("density", 1) <= 1:
        raise ValueError(f"density must lie in (0, 1], got {options['density']}")
    adapters, weights = list(adapters), _weights(adapters, weights)
    shapes = _shapes(adapters)
    merged = combine(adapters, adapters[0].modules)
    global_scale = options.get("scale", entry.options.get("scale")) == "norm"
    if global_scale:
        options = options | {"scale": 1.0}

    def one(name: str) -> tuple[LowRank, float, float, Tensor]:
        """The merged update of a module, the share cut off, its squared norm before that, those of its parts."""
        updates = [_update(a, name, shapes[name], w) for a, w in zip(adapters, weights)]
        local = options | ({"seed": _seed(options, name)} if "seed" in entry.options else {})
        if entry.space == "core":
            core = reduce(updates)  # knows what to do with half precision
            found = entry.run(core, **local)
            if isinstance(found, Tensor):
                parts = torch.tensor([f.norm() ** 2 for f in core.factors], dtype=torch.float64)
                return *core.lift(found, rank, energy), float(found.square().sum()), parts
            update = LowRank(core.left @ found[0], found[1].mT.to(core.left.columns.dtype))
        elif entry.space == "dense":
            deltas = [u.left.double() @ u.right.double() for u in updates]
            update = rules.dense(entry.run(deltas, **local))
        else:
            update = entry.run([wide(u) for u in updates], **local)
        return *update.truncate(rank, energy), 0.0, torch.zeros(len(adapters))

    if entry.space == "adapter":
        whole = [
            a.with_modules({n: wide(_update(a, n, shapes[n], w)) for n in a.modules})
            for a, w in zip(adapters, weights)
        ]
        updates = entry.run(whole, **options)
        done = parallel_map(lambda u: u.truncate(rank, energy), updates.values(), progress)
        found = dict(zip(updates, done))
    else:
        found = dict(zip(shapes, parallel_map(one, shapes, progress)))
    modules = {name: result[0] for name, result in found.items()}
    if dropped is not None:
        dropped |= {name: result[1] for name, result in found.items()}
    if global_scale:  # one factor for the whole adapter: mean norm of the parts over norm of the merge
        size = sum(result[2] for result in found.values()) ** 0.5
        mean_norm = float(sum(result[3] for result in found.values()).sqrt().mean())
        root = (mean_norm / size if size else 1.0) ** 0.5
        modules = {name: LowRank(u.left * root, u.right * root) for name, u in modules.items()}
    modules = {name: u.to(merged.dtype) for name, u in modules.items()}
    for name, u in modules.items():
        if not (_finite(u.left) and _finite(u.right)):
            sources = ", ".join(a.source for a in adapters if name in a.modules)
            raise ValueError(
                f"{sources}: {name}: the merge is not finite in {u.dtype}, expected smaller updates"
            )
    return merged.with_modules(modules)


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


def _weights(adapters: list[Adapter], weights: Sequence[float] | None) -> list[float]:
    if not adapters:
        raise ValueError("expected at least one adapter, got none")
    weights = [1.0] * len(adapters) if weights is None else [float(w) for w in weights]
    if len(weights) != len(adapters):
        raise ValueError(f"expected {len(adapters)} weights, one per adapter, got {len(weights)}")
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"weights must be finite, got {weights}")
    return weights


def _shapes(adapters: Sequence[Adapter]) -> dict[str, tuple[int, int]]:
    """Every module any adapter has, with the shape all that have it agree on."""
    shapes: dict[str, tuple[int, int]] = {}
    for adapter in adapters:
        for name, update in adapter.modules.items():
            if shapes.setdefault(name, update.shape) != update.shape:
                raise ValueError(
                    f"{adapter.source}: {name} has shape {update.shape}, in an earlier adapter {shapes[name]}"
                )
    return shapes


def _update(adapter: Adapter, name: str, shape: tuple[int, int], weight: float) -> LowRank:
    """The weighted update of a module. Half precision stays as it came where the weight is 1."""
    if name not in adapter.modules:
        like = next(iter(adapter.modules.values())).left
        update = LowRank(like.new_zeros(shape[0], 1), like.new_zeros(1, shape[1]))
    else:
        update = adapter.modules[name]
    return update if weight == 1 else wide(update) * weight


def wide(update: LowRank) -> LowRank:
    """In float32 or better: half precision is rounded once, at the end."""
    return update.to(working_dtype(update.dtype))


def _seed(options: dict, name: str) -> int:
    """Another random mask for every module, the same one every time."""
    return zlib.crc32(f"{options.get('seed', 0)} {name}".encode())


# -- methods that are not a rule of one core ----------------------------------------------------------------


def mean(updates: Sequence[LowRank]) -> LowRank:
    """(1/T) Σ ΔWₜ."""
    return add(updates, [1 / len(updates)] * len(updates))


def task_arithmetic(updates: Sequence[LowRank], scale: float = 1.0) -> LowRank:
    """scale · Σ ΔWₜ."""
    return add(updates, [scale] * len(updates))


def cat(updates: Sequence[LowRank]) -> LowRank:
    """Σ ΔWₜ, exact."""
    return add(updates)


def svd(updates: Sequence[LowRank], scale: float = 1.0) -> LowRank:
    """scale · Σ ΔWₜ, cut to the largest rank among the adapters."""
    return add(updates, [scale] * len(updates)).truncate(rank=max(u.rank for u in updates))[0]


def lora_opcm(adapters: Sequence[Adapter], alpha: float = 0.5, gauge: str = "given") -> dict[str, LowRank]:
    """OPCM on the two factors apart, as the drafts propose; see `opcm.FactorMerger`."""
    merger = FactorMerger(alpha=alpha, gauge=gauge)
    for adapter in adapters:
        merger.add(adapter)
    return merger.updates()


def regmean(adapters: Sequence[Adapter], grams: Sequence[dict[str, Tensor]] = ()) -> dict[str, LowRank]:
    """(Σ ΔWₜGₜ)(Σ Gₜ)⁻¹ with Gₜ = XᵀX (n, n) of the layer's inputs on task t: least squares on the outputs."""
    if len(grams) != len(adapters):
        raise ValueError(f"regmean needs grams, one dict module → XᵀX per adapter: got {len(grams)}")
    merged = {}
    for name, (_, n) in _shapes(adapters).items():
        found = [g.get(name) for g in grams]
        if any(g is None or g.shape != (n, n) for g in found):
            got = [None if g is None else tuple(g.shape) for g in found]
            raise ValueError(f"{name}: expected a Gram matrix {(n, n)} per adapter, got {got}")
        total = sum(g.double() for g in found)
        total += 1e-9 * total.diagonal().mean() * torch.eye(n, dtype=total.dtype)  # rank-deficient inputs
        updates = [a.modules.get(name) for a in adapters]
        present = [(u, g) for u, g in zip(updates, found) if u is not None]
        right = [torch.linalg.solve(total, g.double() @ u.right.double().mT).mT for u, g in present]
        left = torch.cat([u.left.double() for u, _ in present], 1)
        merged[name] = LowRank(left, torch.cat(right, 0))
    return merged


_ENTRIES = [
    Method("mean", mean, "sum", "Wortsman et al., arXiv 2203.05482", continual=True),
    Method("task_arithmetic", task_arithmetic, "sum", "Ilharco et al., arXiv 2212.04089", continual=True),
    Method("cat", cat, "sum", "exact sum; peft's cat", continual=True),
    Method("svd", svd, "sum", "Eckart and Young 1936; peft's svd"),
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
    Method("regmean", regmean, "adapter", "Jin et al., arXiv 2212.09849", data=True),
    Method("ctm", rules.ctm, "core", "Compress then Merge, arXiv 2606.03723"),
    Method("chordal_mean", rules.chordal_mean, "core", "design of this book"),
    Method("karcher_mean", rules.karcher_mean, "core", "design of this book"),
    Method("quotient_mean", rules.quotient_mean, "core", "after GeoMerge, arXiv 2604.27155"),
    Method("opcm", rules.opcm, "core", "Tang et al., arXiv 2501.09522", continual=True, ordered=True),
    Method(
        "lora_opcm", lora_opcm, "adapter", "the drafts of this book",
        continual=True, ordered=True, gauge_invariant=False,
    ),
    Method("whitened_sum", rules.whitened_sum, "core", "this book; TSV at power 0", continual=True),
    Method("whitening", rules.whitening, "core", "this book", continual=True, ordered=True),
]  # fmt: skip
REGISTRY: dict[str, Method] = {m.name: m for m in _ENTRIES}
