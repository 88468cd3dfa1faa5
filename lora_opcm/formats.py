"""The keys of adapter files: which tensor is what, in PEFT, kohya and diffusers, and what is refused by name.

Nothing here opens a weight file; `adapters.py` does.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


class AdapterError(ValueError):
    """An adapter that cannot be read, written or combined. The message names file, module and shapes."""


@dataclass(frozen=True)
class Kind:
    """What layer a module is, hence how its factors lie in a file.

    linear: up (m, r), down (r, n). conv: up (out, r, 1, …), down (r, in, *kernel), n = in·∏kernel.
    embedding: up (dim, r), down (r, vocabulary).
    """

    name: str = "linear"
    kernel: tuple[int, ...] = ()


LINEAR = Kind()
PEFT_PREFIX = "base_model.model."
DIFFUSERS_METADATA = "lora_adapter_metadata"  # where diffusers keeps a PEFT config, in the header

# suffix of a key -> dialect, role, whether it belongs to an embedding
SUFFIXES = {
    ".lora_A.weight": ("peft", "down", False),
    ".lora_B.weight": ("peft", "up", False),
    ".lora_embedding_A": ("peft", "down", True),
    ".lora_embedding_B": ("peft", "up", True),
    ".lora_down.weight": ("kohya", "down", False),
    ".lora_up.weight": ("kohya", "up", False),
    ".lora.down.weight": ("diffusers", "down", False),
    ".lora.up.weight": ("diffusers", "up", False),
    ".lora_linear_layer.down.weight": ("diffusers", "down", False),
    ".lora_linear_layer.up.weight": ("diffusers", "up", False),
}
COMPONENTS = {"unet", "text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "diffusion_model"}
# class of the base model in a PEFT config -> prefix of kohya, component of diffusers
CLASSES = {"UNet2DConditionModel": ("lora_unet", "unet"), "CLIPTextModel": ("lora_te", "text_encoder")}
EMBEDDINGS = {"embed_tokens", "lm_head", "wte", "wpe", "word_embeddings", "shared", "embed_in", "embed_out"}

REFUSED_KEYS = [
    (r"lora_magnitude_vector|\.dora_scale$", "DoRA magnitudes"),
    (r"\.lora_diag(\.|$)", "a KaSA diagonal"),
    (r"\.lora_(B|up)\.bias$", "a lora_bias"),
    (r"\.lora_mid\.weight$", "a LoCon mid factor (Tucker core)"),
    (r"\.hada_[wt]", "LoHa factors"),
    (r"\.lokr_", "LoKr factors"),
    (r"\.b?oft_", "OFT rotations"),
    (r"\.(lora_E|ranknum)(\.|$)", "AdaLoRA singular values"),
    (r"\.vera_lambda_", "VeRA scales"),
    (r"\.lora_velora", "VeLoRA buffers"),
    (r"\.diff(_b)?$", "full weight differences"),
    (r"_lora\.(down|up)\.weight$", "attention-processor keys of an old diffusers (convert them there first)"),
    (r"\.lora_[AB]\.[^.]+\.weight$", "a key with an adapter name inside (save with save_pretrained)"),
    (r"token_adapter|trainable_tokens", "trainable_token_indices"),
    (r"^bundle_emb\.|^emb_params$|string_to_param", "textual-inversion embeddings"),
    (r"prompt_embeddings$", "prompt tuning"),
    (r"\.(absmax|quant_map|quant_state|nested_absmax|SCB)(\.|$)", "quantised weights"),
    (r"\.bias$", "a trained bias (bias='all' or 'lora_only')"),
]


def group(keys: Iterable[str], where: str) -> tuple[set[str], dict[str, dict[str, str]], list[str]]:
    """Sort the keys of a file.

    Returns
    -------
    dialects : set of {"peft", "kohya", "diffusers"}
    factors : module -> {"up": key, "down": key, "alpha": key, "embedding": key of an embedding factor}
    rest : keys that belong to no LoRA factor

    Raises
    ------
    AdapterError
        If a module is spelled in two ways.
    """
    dialects, factors, rest = set(), {}, []
    for key in sorted(keys):
        for suffix, (dialect, role, embedding) in SUFFIXES.items():
            if key.endswith(suffix) and len(key) > len(suffix):
                dialects.add(dialect)
                parts = factors.setdefault(key.removesuffix(suffix).removeprefix(PEFT_PREFIX), {})
                if role in parts or (parts and embedding != ("embedding" in parts)):
                    raise AdapterError(f"{where}: {key} and {min(parts.values())} name one module twice")
                parts[role] = key
                if embedding:
                    parts["embedding"] = key
                break
        else:
            rest.append(key)
    alphas = {k for k in rest if k.endswith(".alpha") and k.removesuffix(".alpha") in factors}
    for key in alphas:
        factors[key.removesuffix(".alpha")]["alpha"] = key
    return dialects, factors, [k for k in rest if k not in alphas]


def refuse(keys: Iterable[str], where: str) -> None:
    """Raise for keys that are no plain LoRA, by the name of what they are."""
    keys = list(keys)
    for pattern, what in REFUSED_KEYS:
        found = [k for k in keys if re.search(pattern, k)]
        if found:
            raise AdapterError(f"{where}: {found[0]}{_more(found)}: {what}; expected plain LoRA factors only")
    if keys:
        raise AdapterError(f"{where}: {keys[0]}{_more(keys)}: not a key of a PEFT, kohya or diffusers LoRA")


def carried(key: str, modules_to_save: Iterable[str], factors: Mapping[str, Any]) -> str | None:
    """The name under which a full tensor of a PEFT file is carried; None if the file must be refused for it.

    Carried is what `modules_to_save` lists, and the embedding matrices peft writes unasked (of a resized
    vocabulary, or under a LoRA on an embedding).
    """
    name = key.removeprefix(PEFT_PREFIX)
    module, _, parameter = name.rpartition(".")
    if any(f"{m}." in name for m in modules_to_save if m):  # peft's own rule: a parent module ends in m
        return name
    full = module.removesuffix(".base_layer") in factors or module.rpartition(".")[2] in EMBEDDINGS
    return name if full and parameter == "weight" else None


def kohya_names(modules: Iterable[str], format: str, config: Mapping, where: str) -> dict[str, str]:
    """Module name -> kohya name, where kohya has one: UNet and CLIP text encoders under diffusers' names.

    The other way does not exist: `lora_unet_to_q_proj` may be to.q_proj or to_q.proj.

    Raises
    ------
    AdapterError
        For a component kohya has no name for, or two modules whose kohya names are the same.
    """
    modules = list(modules)
    if format == "kohya":
        return {m: m for m in modules}
    if format == "peft":
        prefix = _names_of_class(config, where)[0]
        names = {m: f"{prefix}_{m.replace('.', '_')}" for m in modules}
    else:
        second = any(m.startswith("text_encoder_2.") for m in modules)
        prefixes = {"unet": "lora_unet", "text_encoder": "lora_te1" if second else "lora_te",
                    "text_encoder_2": "lora_te2"}  # fmt: skip
        names = {}
        for m in modules:
            component, _, rest = m.partition(".")
            if component not in prefixes or not rest:
                raise AdapterError(f"{where}: {m}: kohya has names for {list(prefixes)}, got {component!r}")
            names[m] = f"{prefixes[component]}_{rest.replace('.', '_')}"
    for name, count in Counter(names.values()).items():
        if count > 1:
            twins = [m for m in modules if names[m] == name]
            raise AdapterError(f"{where}: {' and '.join(twins)} would both be {name} in a kohya file")
    return names


def names_in(format: str, adapter) -> dict[str, str]:
    """Module name of an adapter -> its name in a file of another format; AdapterError where there is none."""
    if format == adapter.format:
        return {name: name for name in adapter.modules}
    if format == "kohya":
        return kohya_names(adapter.modules, adapter.format, adapter.config, adapter.source)
    if format == "diffusers" and adapter.format == "peft":
        component = _names_of_class(adapter.config, adapter.source)[1]
        return {name: f"{component}.{name}" for name in adapter.modules}
    raise AdapterError(
        f"{adapter.source} has {adapter.format} names, which do not say those of {format!r}; expected the same"
        " format, PEFT or diffusers names for kohya, PEFT names for diffusers, or kohya names that an adapter of the"
        " same model translates (`renamed`, `lora-opcm convert --like`)"
    )


def _names_of_class(config: Mapping, where: str) -> tuple[str, str]:
    mapping = config.get("auto_mapping")
    base = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    if not isinstance(base, str) or base not in CLASSES:
        raise AdapterError(
            f"{where}: kohya and diffusers have names for {' and '.join(CLASSES)} only, got {base!r:.80} (from"
            " base_model_class in auto_mapping of the config)"
        )
    return CLASSES[base]


def _more(found: list) -> str:
    return f" and {len(found) - 1} more" if len(found) > 1 else ""
