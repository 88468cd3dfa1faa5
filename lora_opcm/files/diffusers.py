"""Diffusers files: a component before each name ("unet.", "transformer."), scales in the header."""

import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch

from ..lowrank import LowRank
from .adapter import Adapter, AdapterError
from .format import Contents, Format, Part, factors_of, no_names, size_of
from .kohya import class_names
from .peft import Scales, config_for, parse_config
from .refusals import and_more, check_config

CONFIGS = "lora_adapter_metadata"  # where diffusers keeps a PEFT config, in the header
PIPELINE = {"unet", "text_encoder", "text_encoder_2", "text_encoder_3", "transformer"}  # parts that configs can be of
COMPONENTS = PIPELINE | {"diffusion_model"}

SUFFIXES = {
    ".lora.down.weight": Part("down"),
    ".lora.up.weight": Part("up"),
    ".lora_linear_layer.down.weight": Part("down"),
    ".lora_linear_layer.up.weight": Part("up"),
}


def scales(metadata: Mapping[str, str], names: Iterable[str], where: str) -> Callable[[str, int], float] | None:
    """(name, rank) → s for a diffusers file: the PEFT configs in its header, or None, which means s = 1.

    A warning says so of names without a component ("unet.", …), which are diffusers' own in part only.
    """
    if CONFIGS not in metadata:
        bare = [f"{where}: {name}" for name in names if not _component(name)[0]]
        if bare:
            warnings.warn(f"{bare[0]}{and_more(bare)}: no component, config or alpha; read with scale 1", stacklevel=2)
        return None
    where = f"{where} ({CONFIGS})"
    packed = parse_config(metadata[CONFIGS], where)
    known = {}
    for component in {_component(name)[0] for name in names}:
        config = _unpack(packed, component)
        if not config:
            raise AdapterError(f"{where}: expected a config for {component!r}, got {sorted(packed)[:5]}")
        check_config({"peft_type": "LORA"} | config, where)
        known[component] = Scales(config, where)

    def scale(name: str, rank: int) -> float:
        component, rest = _component(name)
        return known[component](rest, rank)

    return scale


def header(
    sizes: Mapping[str, tuple[int, float]],
    metadata: Mapping[str, str],
    config: Mapping,
    base_model: str | None,
    where: str,
) -> dict[str, str]:
    """The PEFT configs of a diffusers file, packed for its header; `sizes`: component.module → (rank, scale)."""
    old = parse_config(metadata[CONFIGS], where) if CONFIGS in metadata else {}
    packed: dict[str, object] = {}
    for component in {_component(name)[0]: None for name in sizes}:
        own = {_component(name)[1]: size for name, size in sizes.items() if _component(name)[0] == component}
        # The modules of a merge may be others than the old targets say.
        known = (dict(config) or _unpack(old, component)) | {"target_modules": None}
        found = config_for(own, known, base_model)
        packed |= {f"{component}.{key}" if component else key: value for key, value in found.items()}
    return {CONFIGS: json.dumps(packed, sort_keys=True)}


def _component(name: str) -> tuple[str, str]:
    component, _, rest = name.partition(".")
    return (component, rest) if component in COMPONENTS else ("", name)


def _unpack(packed: Mapping, component: str) -> dict:
    if not component:
        return dict(packed)
    return {k.removeprefix(component + "."): v for k, v in packed.items() if k.startswith(component + ".")}


def contents(adapter: Adapter, names: Mapping[str, str], dtype: torch.dtype | None) -> Contents:
    """Tensors and metadata of a diffusers file.

    Names that diffusers translates (`diffusion_model.`, or bare ones) come without configs, which it would not find
    under the new names: scales are in the factors then.
    """
    bare = {"": CONFIGS in adapter.metadata}  # as it came, with a config of its own
    found = all(c in PIPELINE or bare.get(c) for c in {_component(new)[0] for new in names.values()})
    if not found:
        unscaled = {n: u if size_of(u)[1] == 1 else LowRank(u.left, u.right) for n, u in adapter.items()}
        adapter = replace(adapter, modules=unscaled)
    tensors, sizes = {}, {}
    for name, update in adapter.modules.items():
        up, down = factors_of(adapter, name, dtype)
        tensors[f"{names[name]}.lora_B.weight"], tensors[f"{names[name]}.lora_A.weight"] = up, down
        sizes[names[name]] = size_of(update)
    metadata = {"format": "pt"} | {key: value for key, value in adapter.metadata.items() if key != CONFIGS}
    if found:
        config = adapter.config if adapter.format == "peft" else {}
        metadata |= header(sizes, adapter.metadata, config, adapter.base_model, adapter.source)
    return tensors, metadata


def names(adapter: Adapter) -> dict[str, str]:
    """Module name → component and name, from the base model's class in a PEFT config."""
    if adapter.format != "peft":
        raise no_names("diffusers", adapter)
    component = class_names(adapter.config, adapter.source)[1]
    return {name: f"{component}.{name}" for name in adapter.modules}


FORMAT = Format("diffusers", SUFFIXES, names, contents, scales)
