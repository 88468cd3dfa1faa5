"""The language model, its device, and updates added to its weights in place."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ...lowrank import LowRank
from ..embedded import place

Rows = list[tuple[str, str]]  # question, answer
Example = tuple[list[int], int]  # ids of prompt, answer and end; how many are the prompt


def load_model(base: str = "smollm2") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer, on the GPU in bfloat16 if there is one, else in bfloat16 where the processor has it."""
    logging.disable_progress_bar()
    flags = getattr(torch.cpu, "get_capabilities", dict)()  # torch >= 2.9
    half = torch.cuda.is_available() or flags.get("avx512_bf16") or flags.get("amx_bf16")
    folder = place(base)
    dtype = torch.bfloat16 if half else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    model.requires_grad_(False).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    return model, AutoTokenizer.from_pretrained(folder)


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """All linear layers but the output head, by name: what a LoRA goes on."""
    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def encode(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Token ids of the question in the chat template, of the answer and of the end of the turn."""
    chats = [[{"role": "user", "content": question}] for question, _ in rows]
    asked = chats and tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    prompts = tokenizer(asked, add_special_tokens=False)["input_ids"]
    answers = tokenizer([answer for _, answer in rows], add_special_tokens=False)["input_ids"]
    return [(p + a + [tokenizer.eos_token_id], len(p)) for p, a in zip(prompts, answers, strict=True)]


def pad(examples: list[Example], pad_id: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A batch, right-padded: no mask is needed where attention is causal and padding is not looked at.

    Returns
    -------
    ids : Tensor, shape=[b, longest]
    places : Tensor, shape=[k]
        In ids.flatten(), the positions that the answers' tokens are predicted from.
    tokens : Tensor, shape=[k]
        Those tokens, the end included.
    owner : Tensor, shape=[k]
        The example each belongs to.
    """
    longest = max(len(ids) for ids, _ in examples)
    ids = torch.full((len(examples), longest), pad_id)
    places, tokens, owner = [], [], []
    for i, (row, asked) in enumerate(examples):
        ids[i, : len(row)] = torch.tensor(row)
        places += range(i * longest + asked - 1, i * longest + len(row) - 1)
        tokens += row[asked:]
        owner += [i] * (len(row) - asked)
    return ids, torch.tensor(places), torch.tensor(tokens), torch.tensor(owner)


class Weights:
    """The model's linear weights, to which updates are added in place and taken away again, bit for bit."""

    def __init__(self, model: PreTrainedModel):
        self.layers = {name: layer.weight for name, layer in linear_layers(model).items()}
        self.exact = {name: weight.detach().float() for name, weight in self.layers.items()}
        if next(iter(self.layers.values())).dtype == torch.float32:
            self.exact = {name: weight.clone() for name, weight in self.exact.items()}

    def deltas(self, updates: Mapping[str, LowRank]) -> dict[str, Tensor]:
        """Each ΔW (out, in), float32, where the weights are."""
        like = next(iter(self.exact.values()))
        return {name: u.left.to(like) @ u.right.to(like) for name, u in updates.items()}

    @contextmanager
    def plus(self, deltas: Mapping[str, Tensor], scale: float = 1.0) -> Iterator[None]:
        """W + scale·ΔW in place of W; the sum is taken in float32 and rounded once."""
        try:
            for name, delta in deltas.items():
                self.layers[name].data.copy_(torch.add(self.exact[name], delta, alpha=scale))
            yield
        finally:
            for name in deltas:
                self.layers[name].data.copy_(self.exact[name])
