"""A base model with an adapter: its update added to the weights, or attached beside them."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel

from ..files import Adapter, save_adapter, scaled
from ..lowrank import LowRank


def fitted(model: torch.nn.Module, adapter: Adapter) -> Adapter:
    """The adapter with its modules named as in `model`.

    Some published adapters were made on an inner part of the model (KnOTS: on the vision tower alone), so
    their names lack its prefix.

    Raises
    ------
    ValueError
        If no prefix makes every name one of the model's: the wrong base model.
    """
    modules = dict(model.named_modules())
    first = next(iter(adapter.modules), "")
    prefixes = ["", *(m.removesuffix(first) for m in modules if m.endswith(f".{first}"))]
    for prefix in prefixes:
        if all(prefix + name in modules for name in adapter.modules):
            if not prefix:
                return adapter
            named = [
                {prefix + n: x for n, x in part.items()} for part in (adapter.modules, adapter.kinds, adapter.saved)
            ]
            return replace(adapter.with_modules(named[0]), kinds=named[1], saved=named[2])
    unknown = next(name for name in adapter.modules if name not in modules)
    raise ValueError(f"the base model has no module {unknown!r}: adapter of another model?")


@contextmanager
def applied(
    model: torch.nn.Module,
    adapter: Adapter | None,
    exact: Mapping[str, torch.Tensor] | None = None,
    scale: float = 1.0,
) -> Iterator[torch.nn.Module]:
    """The model with W + `scale` ΔW in place of W; the old weights come back, bit for bit, on the way out.

    The sum is taken in float32 and rounded once; `exact` holds W in float32 for a model in less. Weights in 4
    or 8 bits cannot be added to: there the adapter is attached by peft, beside them, as `attached` does.

    Raises
    ------
    ValueError
        If the model lacks a module of the adapter, or a weight has another shape: the wrong base model. If
        the adapter has full tensors or convolutions, which only `attached` knows how to put in.
    """
    if adapter is None:
        yield model
        return
    adapter = fitted(model, adapter)
    weights = {name: model.get_submodule(name).weight for name in adapter.modules}
    if not all(weight.is_floating_point() for weight in weights.values()):
        with attached(model, scaled(adapter, adapter.modules, scale)):
            yield model
        return
    odd = [*adapter.saved, *(name for name, kind in adapter.kinds.items() if kind.name == "conv")]
    if odd:
        raise ValueError(f"{adapter.source}: {odd[0]} is a full tensor or a convolution; use `attached`")
    saved = {}
    try:
        for name, update in adapter.modules.items():
            weight = weights[name]
            if adapter.transposed(name):
                update = LowRank(update.right.mT, update.left.mT)
            if tuple(weight.shape) != update.shape:
                raise ValueError(f"{name}: the weight is {tuple(weight.shape)}, the update {update.shape}")
            saved[name] = weight.detach().clone()
            w = exact[f"{name}.weight"] if exact else weight.detach().float()
            weight.data.copy_(torch.addmm(w, update.left.to(w), update.right.to(w), alpha=scale))
        yield model
    finally:
        for name, weight in saved.items():
            model.get_submodule(name).weight.data.copy_(weight)


@contextmanager
def attached(model: torch.nn.Module, adapter: Adapter) -> Iterator[torch.nn.Module]:
    """The model with the adapter beside its weights, in peft's layers; they are taken out on the way out."""
    adapter = fitted(model, adapter)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(adapter, Path(folder, "adapter"), format="peft")
        wrapped = PeftModel.from_pretrained(model, Path(folder, "adapter"))
    try:
        yield model
    finally:
        wrapped.unload()
