"""Three families of base models with one interface: sentence encoders, CLIP towers, causal language models.

`load` tells the family from the checkpoint's config. Every base has

* `name`, `family`, `model` (evaluation mode), `targets` (the linear layers a LoRA goes on, a regular
  expression for the full name) and peft's `task_type`;
* `encode(task, split, limit)`: one feature an example, in order; `collate(features)`: a batch of them.

Encoders and CLIP classify against a frozen head made of words, with logits = `scale` · embedding @ headᵀ:

* `embed(model, batch)`: normalised, shape=[b, d]; `head(task)`: shape=[classes, d];
* `lengths(features)`: their tokens, by which batches are filled; `content(features)`: what to hash them by;
  `workers`: processes that prepare batches beside a GPU.

Causal models have the loss of their completions instead, and are evaluated by lm-evaluation-harness; `classifier`
gives one that classifies, whose frozen head is rows of its output layer.
"""

from transformers import AutoConfig

from ..assets import AssetError
from ..embedded import EMBEDDED
from .causal import Causal
from .encoder import MINILM, Encoder
from .next_token import NextToken
from .vision import Clip


def family(base: str) -> str:
    """'encoder', 'clip' or 'causal', by the config of a local folder or a hub name.

    Raises
    ------
    AssetError
        If transformers finds no config there.
    """
    if base in EMBEDDED:
        return EMBEDDED[base].family
    try:
        config = AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise AssetError(f"cannot load the base model {base!r}: {first}") from None
    if config.model_type == "clip":
        return "clip"
    named = config.architectures or ()
    return "causal" if any(name.endswith("ForCausalLM") for name in named) else "encoder"


def load(base: str = MINILM, quantise: str = "") -> Encoder | Clip | Causal:
    """The base model of that name, ready to be adapted.

    `quantise` is "", "8bit" or "4bit", the last two for causal models only.

    Raises
    ------
    AssetError
        If the model cannot be loaded.
    ValueError
        If quantisation is asked of another family.
    """
    kind = family(base)
    if kind == "causal":
        return Causal(base, quantise)
    if quantise:
        raise ValueError(f"{base}: quantise is {quantise!r}, but only causal language models are quantised here")
    return Encoder(base) if kind == "encoder" else Clip(base)


def classifier(base: str = MINILM, quantise: str = "") -> Encoder | Clip | NextToken:
    """As `load`, for tasks with labels: of a causal language model the next token is the label."""
    return NextToken(base, quantise) if family(base) == "causal" else load(base, quantise)


def slug(base: str) -> str:
    """The folder name of a base: the last part of its hub name or path."""
    return base.rstrip("/").rsplit("/", 1)[-1]
