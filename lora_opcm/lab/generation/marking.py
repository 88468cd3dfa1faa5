"""Marking answers in one forward pass.

Greedy decoding writes exactly the answer if and only if, with the answer given as input, every token of it and the
end of the turn are the most likely at their place. So no question needs a generation, and a batch of questions needs
one pass.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .model import Rows, encode, pad

TOKENS = {"cuda": 2**15, "cpu": 2**12}  # of a batch
LOGITS = 2**13  # rows of logits at once, each as long as the vocabulary


class Marker:
    """Questions of many tasks, encoded, sorted by length and put on the model's device once.

    Parameters
    ----------
    questions : mapping of (str, str) to list of (str, str)
        (task, split) → question and answer of each example.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        questions: Mapping[tuple[str, str], Rows],
    ):
        self.model = model
        self.head = model.get_output_embeddings().weight.detach().float()
        self.sizes = {key: len(rows) for key, rows in questions.items()}
        self.batches = {key: self._batches(rows, tokenizer) for key, rows in questions.items()}

    def _batches(self, rows: Rows, tokenizer) -> list[tuple[Tensor, ...]]:
        examples = encode(rows, tokenizer)
        order = sorted(range(len(rows)), key=lambda i: -len(examples[i][0]))
        device, found = self.model.device, []
        while order:
            size = max(1, TOKENS[device.type] // len(examples[order[0]][0]))
            chosen, order = order[:size], order[size:]
            *batch, owner = pad([examples[i] for i in chosen], tokenizer.pad_token_id)
            found.append(tuple(x.to(device) for x in (*batch, torch.tensor(chosen)[owner])))
        return found

    def mark(self, keys: Iterable[tuple[str, str]]) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
        """Per task and split, whether each answer is exactly right, and the mean log likelihood of its tokens.

        Returns
        -------
        dict of (str, str) to (array of bool, array of float32), shapes [questions]
        """
        found = {key: self._mark(key) for key in keys}  # the device is not waited for in between
        return {key: (right.cpu().numpy(), score.cpu().numpy()) for key, (right, score) in found.items()}

    @torch.inference_mode()
    def _mark(self, key: tuple[str, str]) -> tuple[Tensor, Tensor]:
        size, device = self.sizes[key], self.model.device
        wrong, total, count = torch.zeros(3, size, device=device)
        for ids, places, tokens, owner in self.batches[key]:
            hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)[places]
            for h, token, who in zip(hidden.split(LOGITS), tokens.split(LOGITS), owner.split(LOGITS)):
                logits = h.float() @ self.head.T
                told = logits.gather(1, token[:, None])[:, 0]
                wrong.index_add_(0, who, (logits.argmax(1) != token).float())
                total.index_add_(0, who, told - logits.logsumexp(1))
                count.index_add_(0, who, torch.ones_like(told))
        return wrong == 0, total / count
