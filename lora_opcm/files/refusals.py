"""What is refused by name: keys and options that make ΔW other than s·B·A on the named base model."""

import re
from collections.abc import Iterable, Mapping

from .adapter import AdapterError

PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
REFUSED_KEYS = [
    (r"lora_magnitude_vector|\.dora_scale$", "DoRA magnitudes"),
    (r"\.lora_diag(\.|$)", "a KaSA diagonal"),
    (r"\.lora_(B|up)\.bias$", "a lora_bias"),
    (r"\.b?oft_", "OFT rotations"),
    (r"\.(lora_E|ranknum)(\.|$)", "AdaLoRA singular values"),
    (r"\.vera_lambda_", "VeRA scales"),
    (r"\.lora_velora", "VeLoRA buffers"),
    (r"\.diff(_b)?$", "full weight differences"),
    (r"_custom_diffusion\.", "attention-processor weights in full (Custom Diffusion)"),
    (r"_lora[12]\.(down|up)\.weight$", "attention-processor keys of XLabs (convert them with diffusers first)"),
    (r"token_adapter|trainable_tokens", "trainable_token_indices"),
    (r"^bundle_emb\.|^emb_params$|string_to_param", "textual-inversion embeddings"),
    (r"prompt_embeddings$", "prompt tuning"),
    (r"\.(absmax|quant_map|quant_state|nested_absmax|SCB)(\.|$)", "quantised weights"),
    (r"\.bias$", "a trained bias (bias='all' or 'lora_only')"),
]

REFUSED_OPTIONS = {
    "use_dora": "DoRA",
    "kasa_config": "KaSA",
    "lora_bias": "a bias on lora_B",
    "use_qalora": "QALoRA, whose input is pooled",
    "alora_invocation_tokens": "aLoRA, active on some tokens only",
    "trainable_token_indices": "trained token embeddings",
    "layer_replication": "a base model with repeated layers",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing",
    "monteclora_config": "sampled updates",
    "velora_config": "VeLoRA",
}
# These steer training only. Any other `use_…` or `…_config` that is switched on is refused: that is how peft
# names its variants, and the next one would be read wrongly without a word.
HARMLESS = {"use_rslora", "megatron_config", "runtime_config", "loftq_config", "eva_config", "corda_config",
            "lora_ga_config"}  # fmt: skip
# These initialisations replace W by W − s·B₀A₀, so the saved B·A is an update of another base model.
BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")


def refuse(keys: Iterable[str], where: str) -> None:
    """Raise for keys that are no plain LoRA, by the name of what they are."""
    keys = list(keys)
    for pattern, what in REFUSED_KEYS:
        found = [k for k in keys if re.search(pattern, k)]
        if found:
            raise AdapterError(f"{where}: {found[0]}{and_more(found)}: {what}; expected plain LoRA factors only")
    if keys:
        raise AdapterError(f"{where}: {keys[0]}{and_more(keys)}: not a key of a PEFT, kohya or diffusers LoRA")


def check_config(config: Mapping, where: str) -> None:
    """Raise AdapterError, by name, for everything that makes ΔW other than s·B·A on the named base model."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"{where}: peft_type is {kind!r}, expected 'LORA'")
    for option, value in config.items():
        variant = option.startswith("use_") or option.endswith("_config")
        if option in REFUSED_OPTIONS:
            variant, what = True, f"{REFUSED_OPTIONS[option]} is not supported"
        else:
            variant, what = variant and option not in HARMLESS, "a variant of LoRA that is not known here"
        if variant and value not in (None, False, []):
            raise AdapterError(f"{where}: {option} is set: {what}; expected plain LoRA")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING):
        raise AdapterError(
            f"{where}: init_lora_weights is {init!r}, which changed the base weights: B·A is no update of the"
            " model named; expected an adapter that left the base as it was (save this one again with"
            " path_initial_model_for_weight_conversion)"
        )
    for option, most in (("modules_to_save", 256), ("target_parameters", 65536)):
        names = config.get(option)
        if names is not None and not (isinstance(names, list) and all(isinstance(m, str) for m in names)):
            raise AdapterError(f"{where}: {option} is {names!r:.80}, expected a list of names")
        if names is not None and len(names) > most:
            raise AdapterError(f"{where}: {option} lists {len(names)} names, expected at most {most}")


def and_more(found: list) -> str:
    return f" and {len(found) - 1} more" if len(found) > 1 else ""
