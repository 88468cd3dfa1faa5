"""What adapter files say about scales and ranks: PEFT configs and safetensors headers."""

import json
import math
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .formats import COMPONENTS, DIFFUSERS_METADATA, AdapterError

REFUSED_OPTIONS = {
    "use_dora": "DoRA",
    "kasa_config": "KaSA",
    "lora_bias": "a bias on lora_B",
    "use_qalora": "QALoRA, whose input is pooled",
    "alora_invocation_tokens": "aLoRA, active on some tokens only",
    "trainable_token_indices": "trained token embeddings",
    "layer_replication": "a base model with repeated layers",
    "target_parameters": "LoRA on bare parameters (mixture of experts)",
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

REPEATS = re.compile(r"[*+?{]")
MATCH_STEPS, MATCH_SECONDS = 1e10, 10  # a second or so for one match, for all of a file


def read_config(path: Path) -> dict:
    """adapter_config.json as a dict, or AdapterError."""
    try:
        if path.stat().st_size > 2**26:
            raise AdapterError(f"{path}: larger than 64 MB, no adapter config is")
        return parse_config(path.read_bytes(), str(path))
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read: {error.strerror or error}") from error


def parse_config(text: str | bytes, where: str) -> dict:
    """The JSON object in `text`, or AdapterError."""
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{where}: not JSON: {str(error)[:200]}") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{where}: expected a JSON object, got {type(config).__name__}")
    return config


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
    saved = config.get("modules_to_save")
    if saved is not None and not (isinstance(saved, list) and all(isinstance(m, str) for m in saved)):
        raise AdapterError(f"{where}: modules_to_save is {saved!r:.80}, expected a list of names")
    if saved is not None and len(saved) > 256:
        raise AdapterError(f"{where}: modules_to_save lists {len(saved)} names, expected at most 256")


class Scales:
    """(rank, s) per module as a PEFT config says: s = α/r, or α/√r with rsLoRA.

    `rank_pattern` and `alpha_pattern` are matched as peft does (get_pattern_key): a pattern is a regular
    expression for the end of the name, the first that fits wins, and a name that none fits is looked up as it
    is. A pattern that could take for ever (quantified groups, many wildcards on a long name) is refused, not
    tried: with w wildcards a match of n characters costs up to n^(w+1) steps.

    Raises
    ------
    AdapterError
        For patterns that are none and, on a call, if the config's rank is not that of the factors.
    """

    def __init__(self, config: Mapping, where: str):
        self.where, self.rslora = where, bool(config.get("use_rslora"))
        self.seconds = 0.0  # spent on matching so far
        self.default = config.get("r", 8), config.get("lora_alpha", 8)
        self.patterns = [config.get(f) or {} for f in ("rank_pattern", "alpha_pattern")]
        self.expressions: list[list[tuple[re.Pattern, Any]]] = []
        self.literals: list[dict[str, Any]] = []
        for patterns in self.patterns:
            if not isinstance(patterns, dict):
                raise AdapterError(f"{where}: rank or alpha pattern is {patterns!r:.80}, expected an object")
            # What `config_for` writes is looked up: a thousand of them would be a million matches.
            literals = {re.sub(r"\\(.)", r"\1", p[1:]): v for p, v in patterns.items()}
            known = [_anchored(name) for name in literals] == list(patterns)
            if not known and len(patterns) > 4096:
                raise AdapterError(
                    f"{where}: {len(patterns)} rank or alpha patterns are too expensive to match safely"
                )
            self.literals.append(literals if known else {})
            self.expressions.append([] if known else [(self._compile(p), v) for p, v in patterns.items()])

    def __call__(self, name: str, rank: int) -> float:
        expected = self._look_up(0, name)
        if expected != rank:
            raise AdapterError(
                f"{self.where}: {name}: the factors have rank {rank}, adapter_config.json says {expected}"
            )
        alpha = self._look_up(1, name)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def _look_up(self, which: int, name: str) -> float:
        value = self.literals[which].get(name, self.patterns[which].get(name, self.default[which]))
        for expression, value_of_it in self.expressions[which]:
            steps = len(name) ** (len(REPEATS.findall(expression.pattern)) + 0.0)  # one of them is our own
            start = time.perf_counter()
            if steps > MATCH_STEPS or self.seconds > MATCH_SECONDS:
                what = expression.pattern.removeprefix(r"(.*\.)?(").removesuffix(")$")
                raise AdapterError(f"{self.where}: pattern {what!r:.80} is too expensive to match safely")
            found = expression.match(name)
            self.seconds += time.perf_counter() - start
            if found:
                value = value_of_it
                break
        if type(value) not in (int, float) or not -1e30 < value < 1e30:
            what = ("rank", "alpha")[which]
            raise AdapterError(f"{self.where}: {name}: {what} is {str(value):.50}, expected a number")
        return value

    def _compile(self, pattern: str) -> re.Pattern:
        groups, repeats = pattern.count("("), len(REPEATS.findall(pattern))
        if groups > 4 or repeats > 4 or re.search(r"\)[*+{]", pattern):
            raise AdapterError(f"{self.where}: pattern {pattern!r:.80} is too expensive to match safely")
        try:
            return re.compile(rf"(.*\.)?({pattern})$")
        except (re.error, RecursionError, OverflowError) as error:
            raise AdapterError(f"{self.where}: {pattern!r:.80} is no regular expression: {error}") from error


def config_for(sizes: Mapping[str, tuple[int, float]], config: Mapping, base_model: str | None) -> dict:
    """A config under which peft gives every module its rank and scale; `sizes`: module -> (rank, scale).

    What the adapter's own config says is kept where it is right. Where it is not, r and lora_alpha take the
    commonest values and the patterns list the rest, each as `^full\\.name`: a bare name would match every
    module that ends in it. α is scale · r, without rsLoRA. Where the old targets no longer hold
    (`target_modules` is None), full names are listed.
    """
    holds = _holds(config, sizes)
    if holds and config.get("target_modules"):
        return dict(config)
    new = {"peft_type": "LORA", "base_model_name_or_path": base_model, "task_type": None, "bias": "none",
           "inference_mode": True, "lora_dropout": 0.0, "fan_in_fan_out": False} | config  # fmt: skip
    if not holds:
        alphas = {name: _alpha(rank, scale) for name, (rank, scale) in sizes.items()}
        r = Counter(rank for rank, _ in sizes.values()).most_common(1)[0][0]
        alpha = Counter(alphas.values()).most_common(1)[0][0]
        new |= {"r": r, "lora_alpha": alpha, "use_rslora": False, "init_lora_weights": True}
        new["rank_pattern"] = {_anchored(n): rank for n, (rank, _) in sizes.items() if rank != r}
        new["alpha_pattern"] = {_anchored(n): a for n, a in alphas.items() if a != alpha}
    if not new.get("target_modules"):
        # What narrowed the old targets could hide some of the new ones.
        new |= {"target_modules": sorted(sizes), "exclude_modules": None}
        new |= {"layers_to_transform": None, "layers_pattern": None}
    return new


def _holds(config: Mapping, sizes: Mapping[str, tuple[int, float]]) -> bool:
    if not {"r", "lora_alpha"} <= config.keys():  # peft has defaults; other readers may not
        return False
    try:
        scales = Scales(config, "")
        return all(scales(name, rank) == scale for name, (rank, scale) in sizes.items())
    except AdapterError:
        return False


def _alpha(rank: int, scale: float) -> int | float:
    """α with α/rank = scale; an int where it is one, as peft writes it."""
    alpha = scale * rank
    near = round(alpha), alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf)
    return next((a for a in near if a / rank == scale), alpha)


def _anchored(name: str) -> str:
    return "^" + re.escape(name)


# -- headers -------------------------------------------------------------------------------------------------


def header_scales(metadata: Mapping[str, str], names: Iterable[str], where: str):
    """(name, rank) -> s for a diffusers file: the PEFT configs in its header, or None, which means s = 1.

    Raises
    ------
    AdapterError
        If there is neither a config nor a component ("unet.", …) that shows the file to be of diffusers: the
        scale of PEFT factors without adapter_config.json is unknown.
    """
    if DIFFUSERS_METADATA not in metadata:
        for name in names:
            if not _component(name)[0]:
                raise AdapterError(f"{where}: {name}: expected adapter_config.json beside it, for the scale")
        return None
    where = f"{where} ({DIFFUSERS_METADATA})"
    packed = parse_config(metadata[DIFFUSERS_METADATA], where)
    scales = {}
    for component in {_component(name)[0] for name in names}:
        config = _unpack(packed, component)
        if not config:
            raise AdapterError(f"{where}: expected a config for {component!r}, got {sorted(packed)[:5]}")
        check_config({"peft_type": "LORA"} | config, where)
        scales[component] = Scales(config, where)

    def scale(name: str, rank: int) -> float:
        component, rest = _component(name)
        return scales[component](rest, rank)

    return scale


def diffusers_header(
    sizes: Mapping[str, tuple[int, float]],
    metadata: Mapping[str, str],
    config: Mapping,
    base_model: str | None,
    where: str,
) -> dict[str, str]:
    """The PEFT configs of a diffusers file, packed for its header; `sizes`: component.module -> (rank, scale)."""
    old = parse_config(metadata[DIFFUSERS_METADATA], where) if DIFFUSERS_METADATA in metadata else {}
    packed = {}
    for component in {_component(name)[0]: None for name in sizes}:
        own = {_component(name)[1]: size for name, size in sizes.items() if _component(name)[0] == component}
        # The modules of a merge may be others than the old targets say.
        known = (dict(config) or _unpack(old, component)) | {"target_modules": None}
        found = config_for(own, known, base_model)
        packed |= {f"{component}.{key}" if component else key: value for key, value in found.items()}
    return {DIFFUSERS_METADATA: json.dumps(packed, sort_keys=True)}


def kohya_header(metadata: Mapping[str, str], ranks: Iterable[int]) -> dict[str, str]:
    """A kohya file's metadata for new updates of these ranks: dimension and α as they are, no old hashes."""
    new = {k: v for k, v in metadata.items() if not k.startswith("sshs_") and k != "modelspec.hash_sha256"}
    ranks = {str(r) for r in ranks}
    size = ranks.pop() if len(ranks) == 1 else "Dynamic"
    return new | {k: size for k in ("ss_network_dim", "ss_network_alpha") if k in new}


def _component(name: str) -> tuple[str, str]:
    component, _, rest = name.partition(".")
    return (component, rest) if component in COMPONENTS else ("", name)


def _unpack(packed: Mapping, component: str) -> dict:
    if not component:
        return dict(packed)
    return {k.removeprefix(component + "."): v for k, v in packed.items() if k.startswith(component + ".")}
