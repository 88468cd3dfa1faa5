"""A base model with an adapter: its update added to the weights, or attached beside them."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..files import Adapter, save_adapter, scaled
from ..lowrank import LowRank

TURNED = (Conv1D, torch.nn.Embedding)  # their weights lie (in, out); peft goes by the layer, not by its config, too


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
    _refuse_odd(adapter)
    saved = {}
    try:
        for name, update in adapter.modules.items():
            weight = weights[name]
            if isinstance(model.get_submodule(name), TURNED):
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


def _refuse_odd(adapter: Adapter) -> None:
    if odd := [*adapter.saved, *(name for name, kind in adapter.kinds.items() if kind.name == "conv")]:
        raise ValueError(f"{adapter.source}: {odd[0]} is a full tensor or a convolution; use `attached`")


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


@contextmanager
def beside(model: torch.nn.Module, adapter: Adapter | None, scale: float = 1.0) -> Iterator[torch.nn.Module]:
    """The model with `scale` ΔW beside each W, as two thin products: weights of any kind are left as they are.

    What `attached` does without a file and without a layer put in: the way to try many updates, one after another.

    Raises
    ------
    ValueError
        If the model lacks a module of the adapter, or it has another shape: the wrong base model. If the adapter has
        full tensors or convolutions.
    """
    factors, handles = {} if adapter is None else _factors(model, adapter), []
    try:
        for name, update in factors.items():
            handles.append(model.get_submodule(name).register_forward_hook(_adding(update, scale)))
        yield model
    finally:
        for handle in handles:
            handle.remove()


def _factors(model: torch.nn.Module, adapter: Adapter) -> dict[str, LowRank]:
    """The updates of an adapter where the model's weights are, in its dtype."""
    adapter, found = fitted(model, adapter), {}
    _refuse_odd(adapter)
    for name, update in adapter.modules.items():
        module = model.get_submodule(name)
        weight = tuple(module.weight.shape)
        if hasattr(module, "in_features"):  # those of a quantised layer are packed
            weight = module.out_features, module.in_features
        elif isinstance(module, TURNED):
            weight = weight[::-1]
        if weight != update.shape:
            raise ValueError(f"{adapter.source}: {name}: the weight is {weight}, the update {update.shape}")
        found[name] = update.to(module.weight.device, model.dtype)
    return found


def _adding(update: LowRank, scale: float) -> Callable:
    def add(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        looked_up = isinstance(module, torch.nn.Embedding)
        low = F.embedding(inputs[0], update.right.mT) if looked_up else inputs[0].to(update.dtype) @ update.right.mT
        return output + (scale * low @ update.left.mT).to(output.dtype)

    return add
