"""Causal language models as base models, in 4 or 8 bits where bitsandbytes is.

An adapter is tuned on prompt and completion, with the loss on the completion alone.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from ..assets import AssetError
from ..embedded import place
from ..tasks import Prompts

# Every linear layer of a Llama, Mistral or Qwen block.
LLAMA_LINEAR = r"model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
MAX_LENGTH = 1024  # tokens of prompt and completion; a longer prompt loses its beginning
IGNORED = -100  # the label torch's cross entropy skips


class Causal:
    """A causal language model as a base; `bases` says what the methods are for."""

    family, task_type, targets, workers = "causal", "CAUSAL_LM", LLAMA_LINEAR, 0

    def __init__(self, name: str, quantise: str = ""):
        self.name = name
        cuda = torch.cuda.is_available()
        options = {"dtype": torch.bfloat16 if cuda and torch.cuda.is_bf16_supported() else torch.float32}
        if quantise:
            options |= {"quantization_config": quantisation(quantise, options["dtype"])}
        try:
            self.model = AutoModelForCausalLM.from_pretrained(place(name), **options).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(place(name))
        except (OSError, ValueError) as error:
            raise AssetError(f"cannot load the language model {name!r}: {str(error).strip().splitlines()[0]}") from None
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token  # masked wherever it stands

    def encode(self, task: Prompts, split: str, limit: int | None = None) -> list[tuple[list[int], int]]:
        """(ids, how many of them are the prompt) of each example; a long prompt is cut at its beginning."""
        rows = task[split][:limit]
        found = []
        for prompt, completion in zip(rows["prompt"], rows["completion"]):
            asked = self.tokenizer(prompt)["input_ids"]
            told = self.tokenizer(completion, add_special_tokens=False)["input_ids"]
            told = [*told[: MAX_LENGTH - 1], self.tokenizer.eos_token_id]
            asked = asked[max(0, len(asked) + len(told) - MAX_LENGTH) :]
            found.append((asked + told, len(asked)))
        return found

    def collate(self, features: list[tuple[list[int], int]]) -> dict[str, Tensor]:
        """Right-padded `input_ids`, `attention_mask`, `labels`, shape=[b, longest]; prompts have no label."""
        longest = max(len(ids) for ids, _ in features)
        ids = torch.full((len(features), longest), self.tokenizer.pad_token_id)
        labels = torch.full((len(features), longest), IGNORED)
        mask = torch.zeros(len(features), longest, dtype=torch.long)
        for i, (tokens, asked) in enumerate(features):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            labels[i, asked : len(tokens)] = torch.tensor(tokens[asked:])
            mask[i, : len(tokens)] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def quantisation(quantise: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """The bitsandbytes config of "4bit" (NF4, products in `dtype`) or "8bit".

    Raises
    ------
    ValueError
        For another word.
    AssetError
        If bitsandbytes is not installed, or 4 bits are asked for without a GPU.
    """
    kinds: dict[str, Callable] = {
        "4bit": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype),
        "8bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
    }
    if quantise not in kinds:
        raise ValueError(f"quantise is {quantise!r}, expected '', '4bit' or '8bit'")
    if not is_bitsandbytes_available():
        raise AssetError(f"quantise={quantise!r} needs bitsandbytes: pip install 'lora-opcm[llm]'")
    if quantise == "4bit" and not torch.cuda.is_available():
        # On CPUs bitsandbytes 0.50 packs the weights at their first use; an adapter that peft attaches to a
        # model after that gives wrong answers, and so does the model from then on.
        raise AssetError("quantise='4bit' needs a GPU; on CPUs use '8bit'")
    return kinds[quantise]()
