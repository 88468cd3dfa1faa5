"""Training one LoRA a task, all of them at once.

The adapters share the frozen base and nothing else: one batch holds some examples of every task, each layer adds to
each task's rows the update of its own adapter, and the loss is the sum of the tasks' losses. Gradients do not mix, so
each adapter is what it would be alone. On a GPU a model of this size is bound by the launches of its many small
products, and these are as many for nine adapters as for one.
"""

import math
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...files import Adapter
from ...lowrank import LowRank
from ..embedded import public_name
from .model import Example, Rows, encode, linear_layers, pad

TOKENS = {"cuda": 2**16, "cpu": 2**12}  # held for a backward pass at once: about 0.8 MB each in bfloat16


@dataclass(frozen=True)
class Recipe:
    """What every adapter shares; A is random by seed and task, as in `training.Protocol`."""

    rank: int = 16
    alpha: int = 32
    seed: int = 0
    learning_rate: float = 1e-3
    batch_size: int = 32  # examples of each task
    epochs: int = 2
    warmup: float = 0.1  # share of the steps

    def start(self, task: str) -> int:
        return zlib.crc32(f"{task} {self.seed}".encode())


class Stacked(nn.Module):
    """A frozen linear layer and T LoRAs; the rows of its input are T equal parts, one for each.

    a (T, r, n) and b (T, m, r) are float32 and multiplied in the precision of the layer.
    """

    def __init__(self, linear: nn.Linear, count: int, rank: int, scaling: float):
        super().__init__()
        self.linear, self.scaling = linear, scaling
        m, n = linear.weight.shape
        self.a = nn.Parameter(linear.weight.new_zeros(count, rank, n, dtype=torch.float32))
        self.b = nn.Parameter(linear.weight.new_zeros(count, m, rank, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        low = x.reshape(len(self.a), -1, x.shape[-1]) @ self.a.to(x.dtype).mT
        sums = torch.baddbmm(y.view(len(self.b), -1, y.shape[-1]), low, self.b.to(x.dtype).mT, alpha=self.scaling)
        return sums.view(y.shape)


def tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Mapping[str, Rows],
    recipe: Recipe = Recipe(),  # noqa: B008
    log: Callable[[str], None] = print,
) -> dict[str, Adapter]:
    """One adapter for each task of `rows`; the model is left as it was.

    As many steps an epoch as the shortest task has batches.
    """
    count, tasks = len(rows), list(rows)
    scaling = recipe.alpha / recipe.rank
    examples = {task: encode(rows[task], tokenizer) for task in tasks}
    plain = linear_layers(model)
    stacked = {name: Stacked(layer, count, recipe.rank, scaling) for name, layer in plain.items()}
    _start(stacked, tasks, recipe)
    try:
        for name, layer in stacked.items():
            model.set_submodule(name, layer)
        _train(model, stacked, examples, recipe, tokenizer.pad_token_id, log)
    finally:
        for name, layer in plain.items():
            model.set_submodule(name, layer)
    return {task: _adapter(stacked, i, recipe) for i, task in enumerate(tasks)}


def _start(stacked: Mapping[str, Stacked], tasks: list[str], recipe: Recipe) -> None:
    """A uniform in ±1/√n, as peft has it, and B zero; the same on every device."""
    for i, task in enumerate(tasks):
        generator = torch.Generator().manual_seed(recipe.start(task))
        for layer in stacked.values():
            r, n = layer.a.shape[1:]
            layer.a.data[i] = (2 * torch.rand(r, n, generator=generator) - 1) / math.sqrt(n)


def _adapter(stacked: Mapping[str, Stacked], i: int, recipe: Recipe) -> Adapter:
    modules = {
        name: LowRank(recipe.alpha / recipe.rank * layer.b.data[i].cpu(), layer.a.data[i].cpu())
        for name, layer in stacked.items()
    }
    targets = sorted({name.rsplit(".", 1)[1] for name in modules})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "target_modules": targets}
    return Adapter(modules, base_model=public_name("smollm2"), config=config)


def plan(
    lengths: list[list[int]], batch_size: int, rngs: list[np.random.Generator], order: np.random.Generator
) -> list[list[np.ndarray]]:
    """One epoch: steps, and in each the examples of every task, all of like length; a short rest is left out.

    `rngs` choose for each task, `order` the order of the steps, which is one for all.
    """
    steps = min(map(len, lengths)) // batch_size
    found = []
    # Tasks differ in length more than examples of one task do; batches of like rank in length waste least.
    for of, rng in zip(lengths, rngs, strict=True):
        ranked = np.argsort(np.array(of) + rng.uniform(0, 4, len(of)), kind="stable")
        skipped = rng.permutation(len(of))[: len(of) - steps * batch_size]
        found.append(np.delete(ranked, skipped).reshape(steps, batch_size))
    return [[own[k] for own in found] for k in order.permutation(steps)]


def _train(model, stacked, examples: Mapping[str, list[Example]], recipe: Recipe, pad_id: int, log) -> None:
    device = model.device
    tasks = list(examples.values())
    rngs, order = [np.random.default_rng(recipe.start(name)) for name in examples], np.random.default_rng(recipe.seed)
    lengths = [[len(ids) for ids, _ in of] for of in tasks]
    steps = [step for _ in range(recipe.epochs) for step in plan(lengths, recipe.batch_size, rngs, order)]
    parameters = [p for layer in stacked.values() for p in (layer.a, layer.b)]
    optimiser = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=device.type == "cuda")
    warm = max(1, round(recipe.warmup * len(steps)))
    begun, seen, losses = time.perf_counter(), 0, []
    for k, step in enumerate(steps):
        rate = min((k + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * max(0, k - warm) / max(1, len(steps) - warm)))
        optimiser.param_groups[0]["lr"] = recipe.learning_rate * rate
        loss = torch.zeros(len(tasks), device=device)
        for part in _parts(step, lengths, TOKENS[device.type]):
            chosen = [of[i] for of, own in zip(tasks, part) for i in own]
            size = torch.tensor([sum(len(of[i][0]) - of[i][1] for i in own) for of, own in zip(tasks, step)])
            batch = pad(chosen, pad_id)
            seen += batch[0].numel()
            ids, places, tokens, task = (x.to(device) for x in (*batch[:3], batch[3] // len(part[0])))
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)[places]
            each = F.cross_entropy(model.get_output_embeddings()(hidden).float(), tokens, reduction="none")
            own = torch.zeros(len(tasks), device=device).index_add(0, task, each) / size.to(device)
            own.sum().backward()
            loss += own.detach()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss)
        if (k + 1) % 25 == 0 or k + 1 == len(steps):
            spent = time.perf_counter() - begun
            told = " ".join(f"{x:.2f}" for x in torch.stack(losses).mean(0).tolist())
            log(f"step {k + 1}/{len(steps)} {spent:.0f} s, {seen / spent:,.0f} tokens/s, losses {told}")
            losses = []


def _parts(step: list[np.ndarray], lengths: list[list[int]], budget: int) -> list[list[np.ndarray]]:
    """A step in parts of at most so many tokens with padding, each with equally many examples of every task."""
    longest = max(lengths[t][i] for t, own in enumerate(step) for i in own)
    count = min(len(step[0]), -(-longest * sum(map(len, step)) // budget))
    size = -(-len(step[0]) // count)
    return [[own[k : k + size] for own in step] for k in range(0, len(step[0]), size)]
