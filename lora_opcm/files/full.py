"""Full tensors of several adapters as those of one: trained heads and embeddings (`modules_to_save`)."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from .adapter import Adapter, AdapterError, widest


def full_tensors(adapters: Sequence[Adapter], how: str | None = None) -> dict[str, Tensor]:
    """The full tensors of a merge.

    Parameters
    ----------
    how : {"first", "drop", "mean"}, optional
        What to do where they differ, or some adapters lack one: take that of the first adapter that has it, leave out
        all full tensors, or take the mean over the adapters that have it. Refused unless given.

    Raises
    ------
    AdapterError
        If they differ and `how` is not given; for a mean of other shapes, or of tensors that are no floats; if a layer
        is full in one adapter and has an update in another.
    """
    if how == "drop":
        return {}
    for name in sorted({name for a in adapters for name in a.saved}):
        if low := [a for a in adapters if name.removesuffix(".weight") in a.modules]:
            full = next(a for a in adapters if name in a.saved)
            raise AdapterError(
                f"{full.source} and {low[0].source}: {name} in full in one and an update in the other, which peft would"
                " not add: --full drop (full=) leaves the full tensors out, --drop (drop=) modules by name"
            )
    saved = dict(adapters[0].saved)
    for other in adapters[1:]:
        both = f"{adapters[0].source} and {other.source}"
        for name in sorted(saved.keys() | other.saved.keys()):
            saved[name] = _one_tensor(name, saved.get(name), other.saved.get(name), both, how)
    if how == "mean":
        saved = {name: _mean(name, [a for a in adapters if name in a.saved]) for name in saved}
    return saved


def config_of(config: dict, adapters: Sequence[Adapter], how: str | None) -> dict:
    """A config with the `modules_to_save` of all adapters; with none if their tensors are dropped."""
    if how is None or not any(a.config.get("modules_to_save") for a in adapters):
        return config
    lists = [a.config.get("modules_to_save") or [] for a in adapters]
    return config | {"modules_to_save": None if how == "drop" else list(dict.fromkeys(sum(lists, [])))}


def _one_tensor(name: str, ours: Tensor | None, theirs: Tensor | None, both: str, how: str | None) -> Tensor:
    only = ours if theirs is None else theirs
    if (ours is None or theirs is None) and only is not None and name.endswith(".base_layer.weight"):
        warnings.warn(
            f"{both}: {name} is in one of them only, a weight of the base that peft saved unasked; kept", stacklevel=4
        )
        return only
    if how is not None:
        return ours if ours is not None else theirs  # type: ignore[return-value]
    if ours is None or theirs is None or ours.dtype != theirs.dtype or not torch.equal(ours, theirs):
        raise AdapterError(
            f"{both}: {name}: expected one full tensor (modules_to_save) in both, got different ones;"
            " a merge of low-rank updates has no rule for them: --full (full=) takes the first, drops them or takes"
            " their mean, `merge --drop` (drop=) leaves modules out by name"
        )
    return ours


def _mean(name: str, adapters: Sequence[Adapter]) -> Tensor:
    tensors, where = [a.saved[name] for a in adapters], " and ".join(a.source for a in adapters)
    if all(t.dtype == tensors[0].dtype and torch.equal(t, tensors[0]) for t in tensors[1:]):
        return tensors[0]
    if len({tuple(t.shape) for t in tensors}) > 1 or not all(t.is_floating_point() for t in tensors):
        said = ", ".join(f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in tensors)
        raise AdapterError(f"{where}: {name}: a mean needs floats of one shape, got {said}")
    return (sum(t.double() for t in tensors) / len(tensors)).to(widest(t.dtype for t in tensors))  # type: ignore
