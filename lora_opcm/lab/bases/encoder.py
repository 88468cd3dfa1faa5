"""Base models that are sentence encoders, and the frozen head made of label sentences.

logits = 20 · cosine(embedding of the text, embedding of each label sentence), both mean-pooled over tokens
and normalised. The head is embedded once by the base model without any adapter and never trained, so the
base model already has a zero-shot accuracy and a LoRA is all that training changes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..assets import AssetError
from ..embedded import place
from ..tasks import Task

MINILM = "minilm"  # the embedded default base
MAX_LENGTH = 64  # tokens
SCALE = 20.0  # inverse temperature of the cosine head
# Every linear layer of a BERT encoder, by full name: peft matches the whole string.
BERT_LINEAR = (
    r"encoder\.layer\.\d+\.(attention\.self\.(query|key|value)|attention\.output\.dense"
    r"|intermediate\.dense|output\.dense)"
)
MPNET_LINEAR = r"encoder\.layer\.\d+\.(attention\.attn\.(q|k|v|o)|intermediate\.dense|output\.dense)"


def load_base(base: str = MINILM) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (evaluation mode, float32) and tokenizer.

    Raises
    ------
    AssetError
        If transformers can load neither from `base`.
    """
    path = place(base)
    logging.set_verbosity_error()  # the report of the unused pooler and a bar for 0.1 s of loading
    logging.disable_progress_bar()
    try:
        # The pooler is no part of the embedding; asking for it would only add an unused module.
        model = AutoModel.from_pretrained(path, add_pooling_layer=False, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise AssetError(f"cannot load the base model {base!r}: {first}") from None
    return model.eval(), tokenizer


def tokenise(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of each text, cut at `MAX_LENGTH`."""
    # Every word gives a token or more; cutting long texts first spares the tokenizer most of a long post.
    clipped = [" ".join(text.split()[: 2 * MAX_LENGTH]) for text in texts]
    return tokenizer(clipped, truncation=True, max_length=MAX_LENGTH)["input_ids"]


def pad(ids: list[list[int]], pad_id: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Right-padded `input_ids` and `attention_mask`, shape=[b, longest]."""
    longest = max(map(len, ids))
    rows = torch.full((len(ids), longest), pad_id)
    for row, tokens in zip(rows, ids):
        row[: len(tokens)] = torch.tensor(tokens)
    lengths = torch.tensor([len(tokens) for tokens in ids])
    mask = (torch.arange(longest) < lengths[:, None]).long()
    return {"input_ids": rows.to(device), "attention_mask": mask.to(device)}


def embed(model: torch.nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean-pooled, normalised sentence embeddings, shape=[b, d]."""
    hidden = model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.float()  # (b, t, d)
    mask = attention_mask[..., None].float()
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


@torch.inference_mode()
def head(task: Task, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Embeddings of the task's label sentences by the base model, shape=[classes, d]."""
    batch = pad(tokenise(list(task.sentences), tokenizer), tokenizer.pad_token_id, model.device)
    return embed(model, **batch)


class Texts:
    """What a base does whose features are token ids."""

    tokenizer: PreTrainedTokenizerBase

    def lengths(self, features: list[list[int]]) -> list[int]:
        return [len(ids) for ids in features]

    def content(self, features: list[list[int]]) -> list[list[int]]:
        return features

    def collate(self, features: list[list[int]]) -> dict[str, Tensor]:
        return pad(features, self.tokenizer.pad_token_id)


class Encoder(Texts):
    """A sentence encoder as a base model; `bases` says what the methods are for."""

    family, task_type, scale, workers = "encoder", "FEATURE_EXTRACTION", SCALE, 0

    def __init__(self, name: str = MINILM):
        self.name = name
        self.model, self.tokenizer = load_base(name)
        self.targets = MPNET_LINEAR if self.model.config.model_type == "mpnet" else BERT_LINEAR

    def encode(self, task: Task, split: str, limit: int | None = None) -> list[list[int]]:
        return tokenise(task[split]["text"][:limit], self.tokenizer)

    def embed(self, model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return embed(model, batch["input_ids"], batch["attention_mask"])

    def head(self, task: Task) -> Tensor:
        return head(task, self.model, self.tokenizer)
