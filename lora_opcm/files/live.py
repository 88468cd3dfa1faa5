"""Adapters of models in memory, through peft's own files: what a file is refused for, a model is, too."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..lowrank import LowRank
from .adapter import LINEAR, Adapter
from .experts import home
from .joint import respell
from .names import respelled
from .read import load_adapter
from .write import save_adapter

if TYPE_CHECKING:
    from peft import PeftModel
    from torch.nn import Module


def from_peft(model: "PeftModel", name: str | None = None) -> Adapter:
    """The adapter of a `peft.PeftModel`, a copy of its numbers.

    Parameters
    ----------
    name : str, optional
        Which of the model's adapters; the active one unless given.

    Raises
    ------
    AdapterError
        For what is no plain LoRA, as `load_adapter`.
    ValueError
        If the model has no adapter of that name.
    """
    name = name or model.active_adapter
    if name not in model.peft_config:
        raise ValueError(f"the model has no adapter {name!r}; it has {', '.join(model.peft_config)}")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, selected_adapters=[name])
        found = load_adapter(Path(folder) if name == "default" else Path(folder, name))
        copies = {n: LowRank(u.left.clone(), u.right.clone()) for n, u in found.items()}
        saved = {n: t.clone() for n, t in found.saved.items()}
    return replace(found.with_modules(copies), saved=saved, source=f"adapter {name!r} of a {type(model).__name__}")


def attach(model: "Module", adapter: Adapter, name: str = "merged") -> "PeftModel":
    """The model with the adapter beside its weights, active, in peft's layers.

    A `PeftModel` gets it beside the adapters it has; any other model is wrapped, and its layers are replaced. Known
    spellings of a layer are one, as in `merge`.

    Raises
    ------
    ValueError
        If the model has an adapter of that name, or lacks a module of this one.
    """
    from peft import PeftModel

    modules = dict((model.get_base_model() if isinstance(model, PeftModel) else model).named_modules())
    needed = {n: home(n) if adapter.kinds.get(n, LINEAR).name == "expert" else n for n in adapter}
    plain = {n: module.replace(".base_layer", "") for n, module in needed.items()}  # as in a model that is not wrapped
    missing = [n for n in needed if needed[n] not in modules and plain[n] not in modules]
    spelled = respelled(modules, missing)  # as another version of transformers has it, say
    if all(name in modules for name in spelled.values()):
        adapter, missing = respell(adapter, {name: spelled.get(name, name) for name in adapter}, adapter.format), []
    if missing:
        raise ValueError(f"the model has no module {missing[0]!r} ({len(missing)} of {len(adapter)} are missing)")
    if isinstance(model, PeftModel) and name in model.peft_config:
        raise ValueError(f"the model has an adapter {name!r} already, expected another name")
    with tempfile.TemporaryDirectory() as folder:
        path = save_adapter(replace(adapter, format="peft"), Path(folder, "adapter"))
        if not isinstance(model, PeftModel):
            return PeftModel.from_pretrained(model, path, adapter_name=name)
        model.load_adapter(path, adapter_name=name)
    model.set_adapter(name)
    return model
