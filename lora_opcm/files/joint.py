"""Several adapters as one: their modules under one name each, and what must agree before they are combined."""

import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..gauge import padded
from ..lowrank import LowRank, rounded
from ..numerics import finite
from .adapter import LINEAR, Adapter, AdapterError, widest
from .experts import refuse_others
from .format import INPUTS, Stored, folded
from .full import config_of, full_tensors
from .names import alike, base_of, doubled, respelled
from .peft import WEIGHTS

# What a kohya header says of one training and its author, and what of that is about the base model and the network.
TRAINING = re.compile(r"ss_|sshs_|modelspec\.|trigger")
LASTING = ("ss_base_model_version", "ss_network_", "ss_v2", "modelspec.sai_model_spec", "modelspec.architecture",
           "modelspec.implementation", "modelspec.prediction_type", "modelspec.resolution")  # fmt: skip


def matched(adapters: Sequence[Adapter], disjoint: bool = False, twice: bool = True) -> list[Adapter]:
    """The adapters with their modules under the names, and in the format, of the first that has each layer.

    Known spellings of one layer (`names.canonical`) become one. Warnings say what was matched, and what may be one
    layer and was not.

    Parameters
    ----------
    disjoint : bool
        Whether adapters may have no module in common.
    twice : bool
        Whether one adapter may have a layer under two names, which then are two modules: right where their sum counts.

    Raises
    ------
    AdapterError
        If no module is in two of several adapters, unless `disjoint`; an adapter has a layer twice, unless `twice`; or
        a name cannot be written in the format of the first.
    """
    new = spellings(adapters, disjoint, twice)
    return [respell(adapter, names, adapters[0].format) for adapter, names in zip(adapters, new, strict=True)]


def spellings(adapters: Sequence[Adapter], disjoint: bool = False, twice: bool = True) -> list[dict[str, str]]:
    """For each adapter, its names of modules and full tensors → those that `matched` gives; it warns and raises too."""
    known: dict[str, str] = {}  # name -> source of the adapter it came from
    full: list[str] = []
    found, doubts, shared = [], [], sum(map(bool, adapters)) < 2
    for adapter in adapters:
        layers = (name for name in adapter if adapter.kinds.get(name, LINEAR).name != "expert")
        if not twice and (said := doubled(layers)):
            raise AdapterError(
                f"{adapter.source}: {said}; expected one name for each layer, or a plain sum (cat, mean or"
                " task_arithmetic, without a cut); --drop, of `convert` too, leaves names out"
            )
        new = respelled(known, adapter.modules) if known else {name: name for name in adapter.modules}
        if known and adapter.format != adapters[0].format:
            _refuse_foreign(adapter, new, known, adapters[0])
        _tell(adapter, new, known)
        doubts += _doubts(adapter, new, known)
        shared = shared or any(name in known for name in new.values())
        known |= {name: adapter.source for name in new.values() if name not in known}
        saved = respelled(full, adapter.saved)
        full += [name for name in saved.values() if name not in full]
        found.append(new | saved)
    if not shared and not disjoint:
        some = " and ".join(f"{a.source} ({next(iter(a), 'nothing')}, …)" for a in adapters[:2])
        raise AdapterError(
            f"{some}: no module is in two of the {len(adapters)} adapters, expected adapters of one model; if they"
            f" belong side by side, --disjoint (disjoint=True) says so{''.join(f'. {d}' for d in doubts)}"
        )
    for doubt in doubts:
        warnings.warn(doubt, stacklevel=2)
    return found


def respell(adapter: Adapter, names: Mapping[str, str], format: str) -> Adapter:
    """An adapter with other names and another format; its updates have their scales folded in if that differs."""
    if format != adapter.format:
        adapter = replace(folded(adapter), format=format, config={}, metadata={})
    if all(name == new for name, new in names.items()):
        return adapter
    new = adapter.with_modules({names[name]: update for name, update in adapter.items()})
    kinds = {names.get(name, name): kind for name, kind in adapter.kinds.items()}
    return replace(new, kinds=kinds, saved={names.get(name, name): t for name, t in adapter.saved.items()})


def spelled_in(adapter: Adapter, format: str, others: Sequence[Adapter]) -> Adapter:
    """An adapter in a format that one of `others` is in, under its names; as it is if none is.

    For formats that have no names of their own for it: dots cannot be told from underscores.
    """
    like = next((other for other in others if other.format == format != adapter.format), None)
    if like is None:
        return adapter
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which names are which was said when the adapters were read
        _, new = matched([like, adapter])
    return replace(
        new,
        base_model=like.base_model or adapter.base_model,
        config=like.with_modules(new.modules).config,
        metadata={key: text for key, text in adapter.metadata.items() if key == INPUTS},
        dropped=adapter.dropped,
        factor=adapter.factor,
    )


def _tell(adapter: Adapter, new: Mapping[str, str], known: Mapping[str, str]) -> None:
    moved = [(old, name) for old, name in new.items() if old != name]
    if moved:
        old, name = next((pair for pair in moved if pair[1] in known), moved[0])
        warnings.warn(
            f"{adapter.source}: {_count(len(moved))} under the names of {known.get(name, 'others')}: {old} is {name}",
            stacklevel=3,
        )


def _refuse_foreign(adapter: Adapter, new: Mapping[str, str], known: Mapping[str, str], first: Adapter) -> None:
    """Raise for names that the format of the first is not known to have."""
    foreign = [old for old, name in new.items() if old == name and name not in known]
    if foreign:
        raise AdapterError(
            f"{first.source} and {adapter.source}: expected one format, got {first.format} and {adapter.format};"
            f" {_count(len(foreign))} of the second without a name in the first's, such as {foreign[0]}: convert one"
            f" of them, or put the one with more modules first{''.join(f'. {d}' for d in _doubts(adapter, new, known))}"
        )


def _doubts(adapter: Adapter, new: Mapping[str, str], known: Mapping[str, str]) -> list[str]:
    """What may be one layer, and is taken for different ones."""
    pairs = alike(known, new.values()) if known else []
    return [
        f"{known[ours]} and {adapter.source}: {_count(len(pairs))} that end alike under names that differ, taken for"
        f" different ones: {ours} there, {theirs} here"
        for ours, theirs in pairs[:1]
    ]


def _count(number: int) -> str:
    return f"{number} module{'s' * (number != 1)}"


def combine(
    adapters: Sequence[Adapter], modules: Mapping[str, LowRank], any_base: bool = False, full: str | None = None
) -> Adapter:
    """One adapter with updates `modules`, and metadata that all of `adapters` agree on.

    Kinds are united, the dtype is the widest, the rest is the first adapter's; of its header what holds for the sum,
    and a note of the inputs. A frozen weight that peft saved unasked (`base_layer.weight`) comes from whoever has it.

    Parameters
    ----------
    any_base : bool
        Whether base models may differ. Their names are compared by `names.base_of`.
    full : {"first", "drop", "mean"}, optional
        What becomes of full tensors that differ, see `full_tensors`.

    Raises
    ------
    AdapterError
        If formats or base models differ, a module has another shape or is another kind of layer in one of them, or
        full tensors (`saved`) are not equal and `full` is not given.
    """
    refuse_others(adapters)
    shapes_of(adapters)
    first = adapters[0]
    kinds = first.kinds | {name: first.kinds.get(name, LINEAR) for name in first.modules}
    for other in adapters[1:]:
        both = f"{first.source} and {other.source}"
        if other.format != first.format:
            raise AdapterError(f"{both}: expected one format, got {first.format} and {other.format}")
        bases = [a.base_model or "" for a in (first, other)]
        if all(bases) and len({base_of(base) for base in bases}) > 1 and not any_base:
            raise AdapterError(
                f"{both}: expected one base model, got {bases[0]} and {bases[1]}; if they are one, --any-base"
                " (any_base=True) says so"
            )
        for name in other.modules:
            kind = other.kinds.get(name, LINEAR)
            if kinds.setdefault(name, kind) != kind:
                raise AdapterError(f"{both}: {name}: expected one kind of layer, got {kinds[name]} and {kind}")
    _tell_revisions(adapters)
    merged = first.with_modules(modules)
    return replace(
        merged,
        config=config_of(merged.config, adapters, full),
        kinds={name: kind for name, kind in kinds.items() if kind != LINEAR},
        dtype=widest(a.dtype for a in adapters),
        saved=full_tensors(adapters, full),
        metadata=lasting(first.metadata, [called(a) for a in adapters]),
    )


def _tell_revisions(adapters: Sequence[Adapter]) -> None:
    revisions = {a.config.get("revision") or "main": a.source for a in adapters if a.config}
    if len(revisions) > 1:
        said = ", ".join(f"{revision} ({source})" for revision, source in revisions.items())
        warnings.warn(f"adapters of different revisions of their base model: {said}", stacklevel=3)


def lasting(metadata: Mapping[str, str], inputs: Sequence[str]) -> dict[str, str]:
    """What a header says that holds for a merge, and the names of what was merged."""
    kept = {k: v for k, v in metadata.items() if not TRAINING.match(k) or k.startswith(LASTING)}
    return kept | {INPUTS: json.dumps({"inputs": list(inputs)}, ensure_ascii=False)}


def called(adapter: Adapter) -> str:
    """The name of the folder of a PEFT adapter, or of the file."""
    path = Path(adapter.source)
    return path.parent.name if path.name == WEIGHTS else path.name


def shapes_of(adapters: Sequence[Adapter]) -> dict[str, tuple[int, int]]:
    """Every module any adapter has, with the shape (m, n) all that have it agree on; AdapterError if they do not."""
    shapes: dict[str, tuple[int, int]] = {}
    first: dict[str, Adapter] = {}
    for adapter in adapters:
        for name, update in adapter.modules.items():
            if shapes.setdefault(name, update.shape) != update.shape:
                raise AdapterError(
                    f"{adapter.source}: {name} has shape {update.shape}, in an earlier adapter {shapes[name]}"
                    f" ({first[name].source})"
                )
            first.setdefault(name, adapter)
    return shapes


def scaled(like: Adapter, updates: Mapping[str, LowRank], factor: float = 1.0) -> Adapter:
    """`updates` times `factor` with the metadata of `like`, in its dtype.

    Each side takes the root of the factor, in float32 or better, and is rounded once. If all of them are as they were
    stored, in that dtype, and the factor is 1, they stay so.

    Raises
    ------
    AdapterError
        If a factor is not finite in that dtype.
    """
    if factor == 1 and all(
        isinstance(u, Stored) and {u.up.dtype, u.down.dtype} == {like.dtype} for u in updates.values()
    ):
        return like.with_modules(updates)
    root, modules = math.sqrt(abs(factor)), {}
    for name, u in updates.items():
        u = u if factor == 1 else u.wide()
        modules[name] = u = rounded(LowRank(u.left * math.copysign(root, factor), u.right * root), like.dtype)
        if not (finite(u.left) and finite(u.right)):
            raise AdapterError(
                f"{like.source}: {name}: the merge is not finite in {like.dtype}, expected smaller updates"
            )
    return like.with_modules(modules)


def level(adapter: Adapter) -> Adapter:
    """All modules at the largest rank of one, by columns of zeros: who reads one rank and one α scales them right.

    Updates as they were stored stay so.
    """
    if all(isinstance(u, Stored) for u in adapter.values()):
        return adapter
    rank = max((u.rank for u in adapter.values()), default=0)
    modules = {name: padded(u, rank) if u.rank < rank else u for name, u in adapter.items()}
    return replace(adapter.with_modules(modules), dropped=adapter.dropped, factor=adapter.factor)
