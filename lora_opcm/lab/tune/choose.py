"""The choice: every method at lengths on a geometric grid, and what another draw of the texts would have chosen.

What a merge keeps of a task is its share of the way from the base's loss to that of the task's own adapter: 1 where it
loses as little as that adapter, 0 where it is no better than the base. Tasks count alike, whatever their losses are.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ...files import Adapter
from ...merging.merge import merge
from ...parallel import Progress
from ..attach import beside
from ..evidence.choice import ratio
from ..generation.run import LIMITS, search
from ..resampling import draws
from .losses import Judge
from .texts import Texts

Losses = list[np.ndarray]  # of every task, shape=[texts]
Candidates = Mapping[str, tuple[str, Mapping[str, Any]]]  # how it is called → method and options


@dataclass(frozen=True)
class Choice:
    """What was tried, and what is best of it.

    Attributes
    ----------
    base, own : list of array
        Losses without an adapter, and of every task with its own.
    tried : dict of (str, int) to list of array
        Losses by candidate and step of the length, see `evidence.choice.ratio`.
    """

    texts: Sequence[Texts]
    base: Losses
    own: Losses
    tried: dict[tuple[str, int], Losses]

    def shares(self, losses: Losses) -> list[float]:
        """What is kept of every task."""
        parts = zip(self.base, self.own, losses, strict=True)
        return [float((base.mean() - x.mean()) / (base.mean() - own.mean())) for base, own, x in parts]

    def kept(self, losses: Losses) -> float:
        """The share that is kept, averaged over tasks; −∞ for a model that breaks down."""
        found = float(np.mean(self.shares(losses)))
        return found if math.isfinite(found) else -math.inf

    @cached_property
    def best(self) -> tuple[str, int]:
        return max(self.tried, key=lambda key: self.kept(self.tried[key]))

    def curves(self) -> dict[str, dict[float, float]]:
        """Candidate → length in mean norms → the share that is kept."""
        found: dict[str, dict[float, float]] = {}
        for (name, step), losses in sorted(self.tried.items(), key=lambda item: item[0][1]):
            found.setdefault(name, {})[ratio(step)] = self.kept(losses)
        return {name: found[name] for name in dict.fromkeys(name for name, _ in self.tried)}

    def tasks(self) -> list[dict[str, Any]]:
        """A row a task: mean losses of the base, its own adapter and the best merge, and the share that is kept."""
        best = self.tried[self.best]
        parts = zip(self.texts, self.base, self.own, best, self.shares(best), strict=True)
        return [
            {"texts": of.name, "number": len(of), "base": float(b.mean()), "own": float(o.mean()),
             "merged": float(m.mean()), "kept": share}
            for of, b, o, m, share in parts
        ]  # fmt: skip

    def record(self) -> dict[str, Any]:
        """For a recipe: the data by their hashes, every length that was tried, and the losses of the best."""
        hashes = [{"sha256": of.sha256, "of": of.total} for of in self.texts]
        curves = {
            name: {f"{length:.4g}": round(kept, 6) if math.isfinite(kept) else None for length, kept in curve.items()}
            for name, curve in self.curves().items()
        }
        return {
            "tasks": [row | more for row, more in zip(self.tasks(), hashes, strict=True)],
            "candidate": self.best[0],
            "norms": ratio(self.best[1]),
            "kept": self.kept(self.tried[self.best]),
            "drawn_again": asdict(self.again),
            "tried": curves,
        }

    @cached_property
    def again(self) -> "Again":
        """The choice by texts drawn again, with replacement, a thousand times."""
        keys = [key for key, losses in self.tried.items() if math.isfinite(self.kept(losses))]
        shares = []
        for i, of in enumerate(self.texts):
            drawn = draws(f"{i} {of.name}", len(of), "validation")
            with np.errstate(divide="ignore", invalid="ignore"):
                unit = drawn @ (self.base[i] - self.own[i])  # drawn too: where the base loses much, so does a merge
                shares.append(drawn @ np.stack([self.base[i] - self.tried[key][i] for key in keys], 1) / unit[:, None])
            shares[-1][unit <= 0] = np.nan
        scores = np.mean(shares, axis=0)  # (1 + draws, tried)
        scores = scores[np.isfinite(scores).all(1)]
        here, drawn = scores[0], scores[1:]
        picks, own = drawn.argmax(1), keys.index(self.best)
        low, high = np.quantile(drawn[:, own], [0.025, 0.975])
        return Again(
            float(low),
            float(high),
            method=float(np.mean([keys[k][0] == self.best[0] for k in picks])),
            length=float(np.mean(picks == own)),
            cost=float(here[own] - here[picks].mean()),
            flattery=float((drawn.max(1) - here[picks]).mean()),
        )


@dataclass(frozen=True)
class Again:
    """What other texts of the same kind would say.

    Attributes
    ----------
    low, high : float
        95 % interval of the share that the chosen merge keeps.
    method, length : float
        Shares of draws that choose the same method, and the same length too.
    cost : float
        What the choice by a draw loses of the share, on all texts.
    flattery : float
        By how much the share of a chosen merge looks better on the texts that chose it.
    """

    low: float
    high: float
    method: float
    length: float
    cost: float
    flattery: float


def choose(
    adapters: Sequence[Adapter],
    judge: Judge,
    candidates: Candidates,
    progress: Callable[[str], Progress],
    **common: Any,
) -> Choice:
    """Try every candidate on a live model at lengths that go on until the best is inside.

    Parameters
    ----------
    adapters : sequence of Adapter
        With names that agree, see `files.matched`.
    judge : Judge
        With the texts that each adapter was made for, in their order.
    progress : callable
        Text → what is wrapped around the batches of a measurement.
    **common
        Of every `merge`.

    Raises
    ------
    ValueError
        If an adapter does not fit the base, or is no better than the base on its own texts.
    """

    def lost(what: str, adapter: Adapter | None, tasks: Sequence[int], scale: float = 1.0) -> Losses:
        with beside(judge.model, adapter, scale):
            return [judge.losses(i, progress(f"{what} on {texts[i].name}")) for i in tasks]

    texts = judge.texts
    every = range(len(texts))
    own = [lost("own adapter", adapter, [i])[0] for i, adapter in enumerate(adapters)]
    found = Choice(texts, lost("base", None, every), own, {})
    for adapter, of, without, with_it in zip(adapters, texts, found.base, own, strict=True):
        _check_gain(adapter, of, without, with_it)
    names = progress("methods")(candidates, total=len(candidates))
    for name in names:
        method, options = candidates[name]
        merged = merge(
            adapters, method, scale="norm", dtype=torch.float32, ragged=True, progress=progress(f"merging by {name}"),
            **common, **options,
        )  # fmt: skip
        curve = search(lambda step: lost(f"{name} × {ratio(step):.3g}", merged, every, ratio(step)), found.kept)  # noqa: B023
        found.tried.update({(name, step): losses for step, losses in curve.items()})
    _check_best(found)
    return found


def _check_gain(adapter: Adapter, texts: Texts, base: np.ndarray, own: np.ndarray) -> None:
    """What an adapter gains is the unit that its task is measured in."""
    gain = base - own
    if not gain.mean() > 0:
        raise ValueError(
            f"{adapter.source}: loses {own.mean():.3g} on {texts.name}, expected less than the {base.mean():.3g} of the"
            " base without it: are these its texts, in the form it was trained on (prompts of a chat need --chat)?"
        )
    if gain.mean() < 2 * gain.std(ddof=1) / math.sqrt(len(gain)):
        warnings.warn(
            f"{adapter.source}: gains {gain.mean():.2g} on {texts.name}, less than twice its standard error: the share"
            " that is kept of it is mostly chance",
            stacklevel=3,
        )


def _check_best(found: Choice) -> None:
    name, step = found.best
    if found.kept(found.tried[name, step]) <= 0:
        warnings.warn("the best merge is no better than the base, on average over tasks", stacklevel=3)
    if step in LIMITS:
        warnings.warn(f"{name}: the best length, {ratio(step):.3g} mean norms, is where the search ends", stacklevel=3)
