"""Accuracy of an adapter on many tasks at once, with bootstrap intervals."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..files import Adapter
from ..files.disk import replacing
from .assets import cache_dir
from .attach import applied
from .bases import classifier
from .bases.encoder import MINILM
from .resampling import redrawn
from .tasks import Task

TOKENS_PER_BATCH = 4096  # keeps the activations of a batch in cache; larger ones are slower on a CPU
RESAMPLES = 2000


def bfloat16_here() -> bool:
    """Whether the device multiplies bfloat16 in hardware; emulated it would be slower than float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    flags = getattr(torch.cpu, "get_capabilities", dict)()  # torch >= 2.9
    return bool(flags.get("avx512_bf16") or flags.get("amx_bf16"))


def _array(tensor: torch.Tensor) -> np.ndarray:
    """Numbers to hash: what pickles of a tensor say depends on where in memory it lies."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


class Remembering:
    """Answers `correct` from disk where the same was asked before; `_correct` finds out what is new."""

    memory: Path | None = None
    tasks: dict
    fast: bool | str

    def correct(
        self, adapter: Adapter | None = None, tasks: Sequence[str] | None = None, progress: str = "", scale: float = 1.0
    ) -> dict[str, np.ndarray]:
        """Per task, how right each example is with `scale` times `adapter` (None: zero-shot), shape=[examples].

        Classification gives booleans, generation the metric of each answer, in [0, 1].
        """
        names = list(tasks or self.tasks)
        if self.memory is None:
            return self._correct(adapter, names, progress, scale)
        known = joblib.hash([None if adapter is None else (adapter.id, scale), self.fast])
        files = {n: self.memory / f"{joblib.hash([known, *self._content(n)])}.npy" for n in names}
        new = [n for n in names if not files[n].exists()]
        for n, found in (self._correct(adapter, new, progress, scale) if new else {}).items():
            self.memory.mkdir(parents=True, exist_ok=True)
            with replacing(files[n]) as scratch, open(scratch, "xb") as file:
                np.save(file, found)
        return {n: np.load(files[n]) for n in names}


class Evaluator(Remembering):
    """Evaluates adapters on fixed texts or images: encoded and sorted by length once, embedded in one sweep.

    Parameters
    ----------
    tasks : sequence of Task
    split : {"test", "validation"}
    limit : int, optional
        Examples per task; the splits are shuffled, so the first ones are a sample. None takes all.
    base : str
        A sentence encoder, a CLIP model, or a causal language model whose next token is the label; name or folder.
    remember : bool
        Keep what was found on disk, by the content of adapter, examples, labels and head: an experiment that
        was interrupted goes on where it stopped, and one that asks again is answered at once.
    fast : bool
        Run the model in bfloat16 where the processor can (`bfloat16_here`); twice as fast. The update is
        added to the weights in float32 either way.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        split: str = "test",
        limit: int | None = None,
        base: str = MINILM,
        remember: bool = False,
        fast: bool = False,
    ):
        self.fast = fast and bfloat16_here()
        self.memory = cache_dir() / "evaluations" if remember else None
        self.tasks = {task.name: task for task in tasks}
        self.base = classifier(base)
        self.model = self.base.model
        if torch.cuda.is_available():
            self.model.cuda()
        self.heads = {task.name: self.base.head(task) for task in tasks}
        self.exact = None
        if self.fast:
            # A language model may lie in bfloat16 on a GPU; the sum with an update is taken in float32 there, too.
            self.exact = {name: w.detach().to(torch.float32, copy=True) for name, w in self.model.named_parameters()}
            self.model.bfloat16()
        self.labels = {task.name: np.array(task[split]["label"][:limit]) for task in tasks}
        self.ids = {task.name: self.base.encode(task, split, limit) for task in tasks}
        self._kept = {}  # batches by task

    @property
    def precision(self) -> str:
        """Of the matrix products, for results tables."""
        return "bfloat16" if self.fast else "float32"

    def _content(self, name: str) -> list:
        return [self.base.content(self.ids[name]), self.labels[name], _array(self.heads[name])]

    @torch.inference_mode()
    def _correct(self, adapter, names: list[str], progress: str, scale: float) -> dict[str, np.ndarray]:
        found, device = {}, self.model.device
        bar = tqdm(total=sum(len(self.ids[name]) for name in names), desc=progress, disable=not progress)
        with applied(self.model, adapter, self.exact, scale), bar:
            for name in names:
                head, right = self.heads[name].to(device), torch.zeros(len(self.ids[name]), dtype=torch.bool)
                right, labels = right.to(device), torch.from_numpy(self.labels[name]).to(device)
                for where, features in self._batches(name):
                    z = self.base.embed(self.model, features)
                    right[where] = (z @ head.T).argmax(-1) == labels[where]
                    bar.update(len(where))
                found[name] = right  # fetched below: a device does not wait between tasks
        return {name: right.cpu().numpy() for name, right in found.items()}

    def _batches(self, name: str) -> Iterable[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        """Where the examples of each batch stand, and their features: sorted by length, filled to so many tokens."""
        if name in self._kept:
            return self._kept[name]
        lengths, device = self.base.lengths(self.ids[name]), self.model.device
        order, batches = sorted(range(len(lengths)), key=lambda i: -lengths[i]), []
        cuda = device.type == "cuda"
        while order:
            size = max(1, TOKENS_PER_BATCH * (32 if cuda else 1) // lengths[order[0]])
            batches.append(order[:size])
            order = order[size:]
        loader = DataLoader(
            self.ids[name],
            batch_sampler=batches,
            collate_fn=self.base.collate,
            num_workers=min(self.base.workers, os.cpu_count() or 1) if cuda else 0,
        )
        made = (
            (torch.tensor(batch, device=device), {k: t.to(device) for k, t in features.items()})
            for batch, features in zip(batches, loader)
        )
        if not self.base.workers:  # token ids are small enough to stay where they are read
            made = self._kept[name] = list(made)
        return made


def own_correct(evaluator: Remembering, adapters: dict[str, Adapter], progress: str = "") -> dict[str, np.ndarray]:
    """Each task with its own adapter: what merging is measured against."""
    found = {}
    for name in tqdm(evaluator.tasks, desc=progress, disable=not progress):
        found |= evaluator.correct(adapters[name], tasks=[name])
    return found


def summarise(
    correct: Mapping[str, Mapping[str, np.ndarray]],
    zero_shot: str = "zero-shot",
    own: str = "own adapter",
    seed: int = 0,
    against: str | None = None,
) -> pd.DataFrame:
    """Tidy table with 95 % percentile bootstrap intervals over test texts, and over training seeds.

    Parameters
    ----------
    correct : method -> task -> boolean array, shape=[texts] or [seeds, texts]
        All methods on the same texts and seeds; a resample draws the same ones for every method. With three
        seeds the interval says more of the texts than of the seeds.
    against : str, optional
        A method: every other one then also gets a row `gain difference`, its recovered gain minus that of
        `against` on the same resamples. Two methods whose own intervals overlap may still differ in this one.

    Returns
    -------
    DataFrame
        Columns method, task, metric, value, low, high. Metrics: `accuracy` per task and on average (task
        "mean"), `normalised` accuracy acc/own on average over tasks, and `recovered gain`
        (acc − zero-shot)/(own − zero-shot) of the averages.
    """
    rng = np.random.default_rng(seed)
    names = list(correct[own])
    correct = {m: {t: np.atleast_2d(c[t]) for t in names} for m, c in correct.items()}
    points = {m: np.array([correct[m][t].mean() for t in names]) for m in correct}
    draws = {m: np.empty((RESAMPLES, len(names))) for m in correct}
    seeds = len(correct[own][names[0]])
    share = redrawn(seeds, seed, RESAMPLES)[1:]
    for j, task in enumerate(names):
        count = correct[own][task].shape[1]
        pick = rng.integers(count, size=(RESAMPLES, count))
        for method in correct:
            each = np.stack([row[pick].mean(1) for row in correct[method][task]], 1)
            draws[method][:, j] = (each * share).sum(1)

    def row(method, task, metric, value, sample):
        low, high = np.quantile(sample, [0.025, 0.975])
        return {"method": method, "task": task, "metric": metric, "value": value, "low": low, "high": high}

    def gain(acc, zero, best):
        return (acc.mean(-1) - zero.mean(-1)) / (best.mean(-1) - zero.mean(-1))

    rows = []
    for m, acc in points.items():
        rows += [row(m, t, "accuracy", acc[j], draws[m][:, j]) for j, t in enumerate(names)]
        rows.append(row(m, "mean", "accuracy", acc.mean(), draws[m].mean(1)))
        normal = (draws[m] / draws[own]).mean(1)
        rows.append(row(m, "mean", "normalised", (acc / points[own]).mean(), normal))
        recovered = gain(acc, points[zero_shot], points[own])
        spread = gain(draws[m], draws[zero_shot], draws[own])
        rows.append(row(m, "mean", "recovered gain", recovered, spread))
        if against not in (None, m):
            other = gain(points[against], points[zero_shot], points[own])
            paired = spread - gain(draws[against], draws[zero_shot], draws[own])
            rows.append(row(m, "mean", "gain difference", recovered - other, paired))
    return pd.DataFrame(rows)
