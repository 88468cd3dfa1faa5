"""The registry of merge methods, and `merge`, which runs any of them on whole adapters."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .adapters import Adapter, combine
from .lowrank import LowRank, add, working_dtype
from .opcm import merge_stream
from .parallel import parallel_map


@dataclass(frozen=True)
class Method:
    """A merge rule and what is true of it."""

    name: str
    run: Callable
    source: str
    continual: bool  # sees one adapter at a time
    gauge_invariant: bool  # (left G, G⁻¹ right) gives the same result
    per_module: bool  # runs on the updates of one module; otherwise on whole adapters

    @property
    def options(self) -> dict[str, object]:
        """Option names and defaults."""
        parameters = list(inspect.signature(self.run).parameters.values())[1:]
        return {p.name: p.default for p in parameters}


REGISTRY: dict[str, Method] = {}


def register(source: str, *, continual: bool = False, gauge_invariant: bool = True, per_module: bool = True):
    """Put a function into the registry under its own name."""

    def wrap(run: Callable) -> Callable:
        REGISTRY[run.__name__] = Method(run.__name__, run, source, continual, gauge_invariant, per_module)
        return run

    return wrap


def merge(
    adapters: Sequence[Adapter],
    method: str = "opcm",
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    energy: float | None = None,
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
        One factor per adapter, applied to its update first; may be negative.
    rank, energy : optional
        Truncate the result to a rank, or to a share of its squared norm. None keeps it exact.
    **options
        Of the method.

    Raises
    ------
    ValueError
        For an unknown method or option, no adapters, a wrong number of weights, or shapes that differ.
    """
    if method not in REGISTRY:
        raise ValueError(f"unknown method {method!r}; the methods are {', '.join(sorted(REGISTRY))}")
    entry = REGISTRY[method]
    unknown = set(options) - set(entry.options)
    if unknown:
        raise ValueError(
            f"{method} has no option {sorted(unknown)}; it takes {sorted(entry.options) or 'none'}"
        )
    adapters = _weighted(adapters, weights)
    if entry.per_module:
        shapes = _shapes(adapters)
        run = lambda item: entry.run([_update(a, *item) for a in adapters], **options)  # noqa: E731
        modules = dict(zip(shapes, parallel_map(run, shapes.items())))
    else:
        _shapes(adapters)
        modules = entry.run(adapters, **options)
    merged = combine(adapters, modules)
    cut = parallel_map(lambda u: u.truncate(rank, energy)[0].to(merged.dtype), modules.values())
    return merged.with_modules(dict(zip(modules, cut)))


def methods():
    """The registry as a pandas table: source, properties and options of each method."""
    import pandas as pd

    rows = [
        {
            "method": m.name,
            "sees": "one at a time" if m.continual else "all at once",
            "gauge-invariant": m.gauge_invariant,
            "options": ", ".join(f"{k}={v!r}" for k, v in m.options.items()),
            "source": m.source,
        }
        for m in REGISTRY.values()
    ]
    return pd.DataFrame(rows).set_index("method")


def _weighted(adapters: Sequence[Adapter], weights: Sequence[float] | None) -> list[Adapter]:
    adapters = list(adapters)
    if not adapters:
        raise ValueError("expected at least one adapter, got none")
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    if len(weights) != len(adapters):
        raise ValueError(f"expected {len(adapters)} weights, one per adapter, got {len(weights)}")

    def prepared(update: LowRank, weight: float) -> LowRank:
        update = update.to(working_dtype(update.dtype))  # half precision is rounded once, at the end
        return update if weight == 1 else update * weight

    return [
        a.with_modules({name: prepared(u, w) for name, u in a.modules.items()})
        for a, w in zip(adapters, weights)
    ]


def _shapes(adapters: Sequence[Adapter]) -> dict[str, tuple[int, int]]:
    """Every module any adapter has, with the shape all that have it agree on."""
    shapes: dict[str, tuple[int, int]] = {}
    for i, adapter in enumerate(adapters):
        for name, update in adapter.modules.items():
            if shapes.setdefault(name, update.shape) != update.shape:
                raise ValueError(
                    f"{name}: adapter {i} has shape {update.shape}, an earlier one {shapes[name]}"
                )
    return shapes


def _update(adapter: Adapter, name: str, shape: tuple[int, int]) -> LowRank:
    if name in adapter.modules:
        return adapter.modules[name]
    like = next(iter(adapter.modules.values())).left
    return LowRank(like.new_zeros(shape[0], 1), like.new_zeros(1, shape[1]))


# -- the methods --------------------------------------------------------------------------------------------


@register("Wortsman et al. 2022, arXiv 2203.05482", continual=True)
def mean(updates: Sequence[LowRank]) -> LowRank:
    """(1/T) Σ ΔWₜ."""
    return add(updates, [1 / len(updates)] * len(updates))


@register("Ilharco et al. 2023, arXiv 2212.04089", continual=True)
def task_arithmetic(updates: Sequence[LowRank], scale: float = 0.5) -> LowRank:
    """scale · Σ ΔWₜ."""
    return add(updates, [scale] * len(updates))


@register("Tang et al. 2025, arXiv 2501.09522", continual=True, per_module=False)
def opcm(
    adapters: Sequence[Adapter], alpha: float = 0.5, variant: str = "paper", scale: str | float = "norm"
) -> dict[str, LowRank]:
    """Σ P_t(ΔWₜ) times one scale; see `lora_opcm.opcm`."""
    return merge_stream(adapters, alpha=alpha, variant=variant, scale=scale).modules
