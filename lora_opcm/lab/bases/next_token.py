"""Causal language models as classifiers: the label is the next token.

The model reads a text and the words that all label sentences of its task begin with ("A newsgroup post about"). What
it says next names the label, since no two labels go on with the same token: decoding that is held to the labels is
decided there, by one forward pass. The frozen head is the rows of the model's own output layer for these tokens, so
texts, labels and words are those of the encoders, and nothing but a LoRA is trained here either.
"""

import os

import torch
from torch import Tensor

from ..tasks import Task
from .causal import Causal
from .encoder import Texts, tokenise


class NextToken(Texts, Causal):
    """A causal language model that classifies; `bases` says what the methods are for."""

    scale = 1.0

    def encode(self, task: Task, split: str, limit: int | None = None) -> list[list[int]]:
        opening, _ = spoken(task)
        asked = self.tokenizer(f"\n\n{opening}", add_special_tokens=False)["input_ids"]
        return [text + asked for text in tokenise(task[split]["text"][:limit], self.tokenizer)]

    def embed(self, model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The hidden state that the output layer reads after the last token, shape=[b, d]; its length is kept."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        found = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, logits_to_keep=1, use_cache=False)
        last = mask.sum(1) - 1
        return found.hidden_states[-1][torch.arange(len(ids), device=ids.device), last].float()

    @torch.inference_mode()
    def head(self, task: Task) -> Tensor:
        """Rows of the output layer, shape=[classes, d].

        Raises
        ------
        ValueError
            If two labels go on with the same token.
        """
        _, words = spoken(task)
        first = [ids[0] for ids in self.tokenizer([f" {w}" for w in words], add_special_tokens=False)["input_ids"]]
        if len(set(first)) < len(first):
            said = ", ".join(f"{w!r} {t!r}" for w, t in zip(words, self.tokenizer.batch_decode([[i] for i in first])))
            raise ValueError(f"{task.name}: two labels begin with one token of {self.name}: {said}")
        return self.model.get_output_embeddings().weight[first].float()


def spoken(task: Task) -> tuple[str, list[str]]:
    """The words that all label sentences of a task begin with, and what is left of each sentence."""
    sentences = [sentence.rstrip(".") for sentence in task.sentences]
    opening = os.path.commonprefix(sentences).rpartition(" ")[0]
    return opening, [sentence[len(opening) :].strip() for sentence in sentences]
