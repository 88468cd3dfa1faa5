"""PEFT folders: the keys of their weights, and what adapter_config.json says of ranks and scales."""

import json
import math
import re
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from .adapter import LINEAR, Adapter, AdapterError
from .format import Contents, Format, Part, factors_of, no_names

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
EMBEDDINGS = {"embed_tokens", "lm_head", "wte", "wpe", "word_embeddings", "shared", "embed_in", "embed_out"}
# What a LoHa or LoKr config says of training, or of what the shapes of the factors say, too.
EXPANDED = {"alpha", "decompose_both", "decompose_factor", "init_weights", "module_dropout", "rank_dropout",
            "rank_dropout_scale", "use_effective_conv2d"}  # fmt: skip
REPEATS = re.compile(r"[*+?{]")
MATCH_STEPS, MATCH_SECONDS = 1e10, 10  # a second or so for one match, for all of a file

SUFFIXES = {
    ".lora_A.weight": Part("down"),
    ".lora_B.weight": Part("up"),
    ".lora_embedding_A": Part("down", embedding=True),
    ".lora_embedding_B": Part("up", embedding=True),
}


def carried(key: str, modules_to_save: Iterable[str], factors: Mapping[str, Any]) -> str | None:
    """The name under which a full tensor of a PEFT file is carried; None if the file must be refused for it.

    Carried is what `modules_to_save` lists, and the embedding matrices peft writes unasked (of a resized
    vocabulary, or under a LoRA on an embedding).
    """
    name = key.removeprefix(PREFIX)
    module, _, parameter = name.rpartition(".")
    if any(f"{m}." in name for m in modules_to_save if m):  # peft's own rule: a parent module ends in m
        return name
    layer = module.removesuffix(".base_layer")
    full = layer in factors or layer.rpartition(".")[2] in EMBEDDINGS
    return name if full and parameter == "weight" else None


def read_config(path: Path) -> dict:
    """adapter_config.json as a dict, or AdapterError."""
    try:
        if path.stat().st_size > 2**26:
            raise AdapterError(f"{path}: larger than 64 MB, no adapter config is")
        return parse_config(path.read_bytes(), str(path))
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read: {error.strerror or error}") from error


def as_lora(config: dict) -> dict:
    """The config of a LoHa or LoKr as that of the LoRA it is read as; any other as it is."""
    if config.get("peft_type") not in ("LOHA", "LOKR"):
        return config
    kept = {key: value for key, value in config.items() if key not in EXPANDED}
    return kept | {"peft_type": "LORA", "r": config.get("r", 8), "lora_alpha": config.get("alpha", 8)}


def parse_config(text: str | bytes, where: str) -> dict:
    """The JSON object in `text`, or AdapterError."""
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{where}: not JSON: {str(error)[:200]}") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{where}: expected a JSON object, got {type(config).__name__}")
    return config


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
                raise AdapterError(f"{where}: {len(patterns)} rank or alpha patterns are too expensive to match safely")
            self.literals.append(literals if known else {})
            self.expressions.append([] if known else [(self._compile(p), v) for p, v in patterns.items()])

    def rank(self, name: str) -> int:
        """What the config says; AdapterError if that is no rank."""
        if (found := self._look_up(0, name)) != int(found) or found < 1:
            raise AdapterError(f"{self.where}: {name}: rank is {found:g}, expected an integer of at least 1")
        return int(found)

    def __call__(self, name: str, rank: int | None) -> float:
        expected = self._look_up(0, name)
        if rank is None:  # the factors do not say
            rank = int(expected)
        if expected != rank or rank < 1:
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


def config_for(
    sizes: Mapping[str, tuple[int, float]],
    config: Mapping,
    base_model: str | None,
    parameters: Collection[str] = (),
) -> dict:
    """A config under which peft gives every module its rank and scale; `sizes`: module -> (rank, scale).

    Some names in `sizes` may be those of `parameters` (`target_parameters`).

    What the adapter's own config says is kept where it is right. Where it is not, r and lora_alpha take the
    commonest values and the patterns list the rest, each as `^full\\.name`: a bare name would match every
    module that ends in it. α is scale · r, without rsLoRA. Where the old targets no longer hold
    (`target_modules` is None), full names are listed.
    """
    holds, modules = _holds(config, sizes), sorted(sizes.keys() - set(parameters))
    # peft would fill a tied head from the embedding, and take weights of linear layers from one list only
    tied = bool(config.get("ensure_weight_tying"))
    listed = bool(config.get("target_modules") or not modules) and not tied
    listed = listed and bool(config.get("target_parameters")) == bool(parameters)
    if holds and listed:
        return dict(config)
    new: dict[str, Any] = {
        "peft_type": "LORA", "base_model_name_or_path": base_model, "task_type": None, "bias": "none",
        "inference_mode": True, "lora_dropout": 0.0, "fan_in_fan_out": False} | dict(config)  # fmt: skip
    if not holds:
        alphas = {name: _alpha(rank, scale) for name, (rank, scale) in sizes.items()}
        r = Counter(rank for rank, _ in sizes.values()).most_common(1)[0][0]
        alpha = Counter(alphas.values()).most_common(1)[0][0]
        new |= {"r": r, "lora_alpha": alpha, "use_rslora": False, "init_lora_weights": True}
        new["rank_pattern"] = {_anchored(n): rank for n, (rank, _) in sizes.items() if rank != r}
        new["alpha_pattern"] = {_anchored(n): a for n, a in alphas.items() if a != alpha}
    if not listed:
        # What narrowed the old targets could hide some of the new ones.
        new |= {"target_modules": modules, "exclude_modules": None}
        new |= {"layers_to_transform": None, "layers_pattern": None}
        new |= {"target_parameters": sorted(parameters) or None} if parameters or "target_parameters" in config else {}
        new |= {"ensure_weight_tying": False} if tied else {}
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


def contents(adapter: Adapter, names: Mapping[str, str], dtype: torch.dtype | None) -> Contents:
    """What a PEFT weight file holds: tensors and metadata."""
    tensors = {}
    for name in adapter.modules:
        up, down = factors_of(adapter, name, dtype)
        ends = ".lora_B.weight", ".lora_A.weight"
        if adapter.kinds.get(name, LINEAR).name == "embedding":
            ends = ".lora_embedding_B", ".lora_embedding_A"
        tensors[PREFIX + names[name] + ends[0]] = up
        tensors[PREFIX + names[name] + ends[1]] = down
    for name, tensor in adapter.saved.items():
        tensors[PREFIX + name] = tensor, tensor.dtype
    return tensors, {"format": "pt"} | adapter.metadata


def _names(adapter: Adapter) -> dict[str, str]:
    raise no_names("peft", adapter)


FORMAT = Format("peft", SUFFIXES, _names, contents, lambda metadata, modules, where: None)
