"""What a live model loses on texts: a language model by likelihood, a sentence encoder by the labels' embeddings."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from torch.nn import functional as F
from transformers.utils import logging

from ...parallel import Progress
from ..bases import family
from ..bases.causal import IGNORED, Causal
from ..evaluation import Evaluator
from ..generation.model import encode
from ..tasks import Task
from .texts import Texts

TOKENS = {"cuda": 2**12, "cpu": 2**10}  # of a batch, each with as many logits as the vocabulary has words


class Likelihoods:
    """A causal language model; texts follow the prompt as they stand, or in the chat template.

    The loss of a completion is the mean over its tokens, the end included. That of a label is the cross entropy between
    all labels, by the likelihood of their names after the text.
    """

    def __init__(self, base: str, texts: Sequence[Texts], chat: bool = False):
        self.base, self.texts = Causal(base), texts
        self.model = self.base.model.to("cuda" if torch.cuda.is_available() else "cpu")
        if chat and not self.base.tokenizer.chat_template:
            raise ValueError(f"{base}: has no chat template, expected one, or the prompts as they stand")
        self.examples = [self._encode(each, chat) for each in texts]

    def _encode(self, texts: Texts, chat: bool) -> list[tuple[list[int], int]]:
        """Ids, and how many of them are the prompt: of every text or, where it is to be labelled, with every label."""
        rows = list(zip(texts.questions, texts.answers))
        if texts.labels:
            rows = [(text, label) for text in texts.questions for label in texts.labels]
        if chat:
            return encode(rows, self.base.tokenizer)
        if texts.labels:  # a name is a word of its own
            rows = [(text, label if text[-1].isspace() else f" {label}") for text, label in rows]
        prompt, completion = zip(*rows)
        return self.base.encode({"": Dataset.from_dict({"prompt": prompt, "completion": completion})}, "")

    @torch.inference_mode()
    def losses(self, i: int, progress: Progress) -> np.ndarray:
        """Of every text of task i, shape=[texts]."""
        examples, texts = self.examples[i], self.texts[i]
        lengths = [len(ids) for ids, _ in examples]
        found = torch.zeros(len(examples), dtype=torch.float64)
        parts = list(batches(lengths, TOKENS[self.model.device.type]))
        for where in progress(parts, total=len(parts)):
            found[where] = self._surprise([examples[k] for k in where]).cpu().double()
        if texts.labels:
            scores = -found.view(len(texts), len(texts.labels))
            right = torch.tensor([texts.labels.index(answer) for answer in texts.answers])
            return F.cross_entropy(scores, right, reduction="none").numpy()
        return (found / torch.tensor([len(ids) - asked for ids, asked in examples])).numpy()

    def _surprise(self, examples: list[tuple[list[int], int]]) -> torch.Tensor:
        """−log likelihood of what follows each prompt, shape=[b]."""
        batch = {name: x.to(self.model.device) for name, x in self.base.collate(examples).items()}
        first = max(0, min(asked for _, asked in examples) - 1)  # the first place that anything is predicted from
        told = batch.pop("labels")[:, first + 1 :]
        logits = self.model(**batch, logits_to_keep=batch["input_ids"].shape[1] - first, use_cache=False).logits
        each = F.cross_entropy(logits[:, :-1].mT.float(), told, ignore_index=IGNORED, reduction="none")
        return each.sum(1)


class Embeddings(Evaluator):
    """A sentence encoder: the loss is the cross entropy between labels, by the cosine of text and label.

    The labels are embedded as they stand in the file, by the base without any adapter.
    """

    def __init__(self, base: str, texts: Sequence[Texts]):
        if plain := [each.name for each in texts if not each.labels]:
            raise ValueError(f"{plain[0]}: {base} is an encoder, expected the columns 'text' and 'label'")
        self.texts = texts
        super().__init__([self._task(i, each) for i, each in enumerate(texts)], "validation", base=base)

    @staticmethod
    def _task(i: int, texts: Texts) -> Task:
        labels = [texts.labels.index(answer) for answer in texts.answers]
        rows = Dataset.from_dict({"text": texts.questions, "label": labels})
        return Task(str(i), texts.labels, texts.labels, DatasetDict({"validation": rows}))

    @torch.inference_mode()
    def losses(self, i: int, progress: Progress) -> np.ndarray:
        """Of every text of task i, shape=[texts]."""
        name, device = str(i), self.model.device
        head, labels = self.heads[name].to(device), torch.from_numpy(self.labels[name]).to(device)
        found, parts = torch.zeros(len(labels), device=device), list(self._batches(name))
        for where, features in progress(parts, total=len(parts)):
            logits = self.base.scale * self.base.embed(self.model, features) @ head.T
            found[where] = F.cross_entropy(logits, labels[where], reduction="none")
        return found.double().cpu().numpy()


Judge = Likelihoods | Embeddings


def judge(base: str, texts: Sequence[Texts], chat: bool = False) -> Judge:
    """The base model, loaded, with the texts of every task encoded.

    Raises
    ------
    AssetError
        If the base cannot be loaded.
    ValueError
        If it is neither a language model nor a sentence encoder, or the texts are none for it.
    """
    logging.disable_progress_bar()
    kind = family(base)
    if kind == "causal":
        return Likelihoods(base, texts, chat)
    if kind != "encoder":
        raise ValueError(f"{base}: a {kind} model, expected a causal language model or a sentence encoder")
    if chat:
        raise ValueError(f"{base}: an encoder has no chat template")
    return Embeddings(base, texts)


def batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Which examples go together: of like length, longest first, so many tokens with the padding, or one example."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        size = max(1, tokens // lengths[order[0]])
        yield order[:size]
        order = order[size:]
