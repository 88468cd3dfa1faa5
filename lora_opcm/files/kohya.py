"""Kohya files (sd-scripts): names with underscores for dots, α beside the factors."""

from collections import Counter
from collections.abc import Iterable, Mapping

import torch

from .adapter import Adapter, AdapterError
from .format import INPUTS, Contents, Format, Part, Stored, factors_of, no_names, size_of

SUFFIXES = {".lora_down.weight": Part("down"), ".lora_up.weight": Part("up"), ".lora_mid.weight": Part("mid")}
# class of the base model in a PEFT config -> prefix of kohya, component of diffusers
CLASSES = {"UNet2DConditionModel": ("lora_unet", "unet"), "CLIPTextModel": ("lora_te", "text_encoder")}


def names(adapter: Adapter) -> dict[str, str]:
    """Module name → kohya name, where kohya has one: UNet and CLIP text encoders under diffusers' names.

    The other way does not exist: `lora_unet_to_q_proj` may be to.q_proj or to_q.proj.

    Raises
    ------
    AdapterError
        For a component kohya has no name for, or two modules whose kohya names are the same.
    """
    modules, where = list(adapter.modules), adapter.source
    if adapter.format == "peft":
        prefix = class_names(adapter.config, where)[0]
        names = {m: f"{prefix}_{m.replace('.', '_')}" for m in modules}
    elif adapter.format == "diffusers":
        second = any(m.startswith("text_encoder_2.") for m in modules)
        prefixes = {"unet": "lora_unet", "text_encoder": "lora_te1" if second else "lora_te",
                    "text_encoder_2": "lora_te2"}  # fmt: skip
        names = {}
        for m in modules:
            component, _, rest = m.partition(".")
            if component not in prefixes or not rest:
                raise AdapterError(f"{where}: {m}: kohya has names for {list(prefixes)}, got {component!r}")
            names[m] = f"{prefixes[component]}_{rest.replace('.', '_')}"
    else:
        raise no_names("kohya", adapter)
    for name, count in Counter(names.values()).items():
        if count > 1:
            twins = [m for m in modules if names[m] == name]
            raise AdapterError(f"{where}: {' and '.join(twins)} would both be {name} in a kohya file")
    return names


def class_names(config: Mapping, where: str) -> tuple[str, str]:
    """The prefix of kohya and the component of diffusers, of the base model's class in a PEFT config."""
    mapping = config.get("auto_mapping")
    base = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    if not isinstance(base, str) or base not in CLASSES:
        raise AdapterError(
            f"{where}: kohya and diffusers have names for {' and '.join(CLASSES)} only, got {base!r:.80} (from"
            " base_model_class in auto_mapping of the config)"
        )
    return CLASSES[base]


def header(metadata: Mapping[str, str], ranks: Iterable[int]) -> dict[str, str]:
    """A kohya file's metadata for new updates of these ranks: dimension and α as they are, no old hashes."""
    new = {k: v for k, v in metadata.items() if not k.startswith("sshs_") and k != "modelspec.hash_sha256"}
    known = {str(r) for r in ranks}
    size = known.pop() if len(known) == 1 else "Dynamic"
    return new | {k: size for k in ("ss_network_dim", "ss_network_alpha") if k in new}


def contents(adapter: Adapter, names: Mapping[str, str], dtype: torch.dtype | None) -> Contents:
    """Tensors and metadata of a kohya file."""
    tensors, metadata = {}, adapter.metadata
    if adapter.format != "kohya":
        metadata = {key: value for key, value in metadata.items() if key == INPUTS}
    for name, update in adapter.modules.items():
        new = names[name]
        tensors[f"{new}.lora_up.weight"], tensors[f"{new}.lora_down.weight"] = factors_of(adapter, name, dtype)
        rank, scale = size_of(update)
        if isinstance(update, Stored) and update.alpha is not None:
            tensors[f"{new}.alpha"] = update.alpha, update.alpha.dtype
        elif not (isinstance(update, Stored) and adapter.format == "kohya"):
            # Always float32: bfloat16 cannot hold a rank of 257.
            tensors[f"{new}.alpha"] = torch.tensor(float(scale * rank)), torch.float32
    if not all(isinstance(u, Stored) for u in adapter.modules.values()):
        metadata = header(metadata, [size_of(u)[0] for u in adapter.modules.values()])
    return tensors, metadata


def titled(metadata: Mapping[str, str], name: str) -> dict[str, str]:
    """The metadata of a merge with the name of its own file; that of anything else as it is."""
    return {**metadata, "ss_output_name": name, "modelspec.title": name} if INPUTS in metadata else dict(metadata)


FORMAT = Format("kohya", SUFFIXES, names, contents, lambda metadata, modules, where: None)
