"""Measures of overlap from the weights, against dense arithmetic; the published table is of the published pairs."""

import math
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch

import lora_opcm as lo
from lora_opcm.files import Adapter
from lora_opcm.lab.evidence import predictors, tables
from lora_opcm.lab.tasks import tasks


def adapter_of(generator, shapes, rank=10):
    """An adapter with random factors."""
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return Adapter({f"m{i}": lo.LowRank(normal(m, rank), normal(rank, n)) for i, (m, n) in enumerate(shapes)})


def leading(dense, k):
    """Projectors onto the k leading left and right singular vectors."""
    u, _, vh = np.linalg.svd(dense)
    return u[:, :k] @ u[:, :k].T, vh[:k].T @ vh[:k]


def test_predictors_are_those_of_dense_updates():
    generator = torch.Generator().manual_seed(4)
    a, b = (adapter_of(generator, [(20, 30), (24, 18)]) for _ in range(2))
    found, by_module = predictors.predictors(a, b), []
    for name in a.modules:
        x, y = (adapter.modules[name].delta().numpy() for adapter in (a, b))
        size = np.linalg.norm(x) * np.linalg.norm(y)
        left, right = (np.trace(p @ q) / predictors.K for p, q in zip(leading(x, 8), leading(y, 8)))
        inputs, outputs = np.linalg.norm(x @ y.T) / size, np.linalg.norm(x.T @ y) / size
        by_module.append([abs((x * y).sum()) / size, left, right, left * right, inputs, outputs])
    assert list(found) == list(predictors.COLUMNS)
    assert list(found.values()) == pytest.approx(np.mean(by_module, 0), rel=1e-6)


def test_the_published_table_is_of_the_published_pairs():
    table = predictors.published()
    assert list(table.index) == list(combinations(tasks(), 2)) and list(table) == list(predictors.COLUMNS)
    measured = tables.published().select("pairs", (1,), label="sum, scale 1")["sum, scale 1", None]
    assert [outcome.trial.tasks for outcome in measured] == list(table.index)


def test_chance_is_what_random_updates_of_these_shapes_show():
    generator = torch.Generator().manual_seed(0)
    shapes = [u.shape for u in lo.load_adapter(lo.adapter_path("tweets")).values()]
    adapters = [adapter_of(generator, shapes, 16) for _ in range(4)]
    shown = pd.DataFrame(predictors.predictors(a, b) for a, b in combinations(adapters, 2)).mean()
    expected = predictors.chance()
    assert list(expected.index) == ["|cosine|", "φ outputs", "φ inputs"]
    assert (shown[expected.index] / expected).between(0.87, 1.13).all(), shown


def test_the_size_of_a_cosine_by_chance_is_less_than_a_normal_number_has():
    """The words of *Two nulls*: the mean square is 1/mn, the mean size a few hundredths below that of a normal number.

    Of two updates in random frames, with the spectra of shipped adapters: Σ σᵢτⱼ (uᵢ·u'ⱼ)(vᵢ·v'ⱼ).
    """
    rng, times = np.random.default_rng(0), []
    one, other = (lo.load_adapter(lo.adapter_path(task)) for task in ("ng-sci", "tweets"))

    def products(size, r, k):
        """Of two frames, shape=[draws, r, k]: the first rows of one uniform frame."""
        q, triangle = np.linalg.qr(rng.normal(size=(500, size, k)))
        return (q * np.sign(np.diagonal(triangle, axis1=1, axis2=2))[:, None])[:, :r]

    for name in list(one)[::6]:
        s, t = (adapter[name].svd()[1].numpy().astype(float) for adapter in (one, other))
        left, right = (products(size, len(s), len(t)) for size in one[name].shape)
        cosines = np.einsum("i,j,bij,bij->b", s, t, left, right) / np.linalg.norm(s) / np.linalg.norm(t)
        times.append(cosines * math.sqrt(math.prod(one[name].shape)))
    times = np.array(times)
    assert np.sqrt((times**2).mean()) == pytest.approx(1, abs=0.06)
    assert 0.02 < 1 - np.abs(times).mean() / np.sqrt((times**2).mean()) / np.sqrt(2 / np.pi) < 0.09


def test_adapters_with_shuffled_labels_overlap_more():
    """The words of *Overlap*; the control is of the tasks, starts and pairs of the adapters it is compared with."""
    found = predictors.controlled()
    assert list(found["true"].index) == list(found["shuffled"].index) == list(combinations(tasks(), 2))
    table = pd.read_csv(lo.data_dir() / "results" / "control.csv")
    assert len(set("+".join(table.adapters).split("+"))) == 16 and set(table.seed) == {4}
    mean = {labels: each.mean() for labels, each in found.items()}
    assert 1 < mean["true"]["φ outputs"] < mean["shuffled"]["φ outputs"]
    assert mean["shuffled"]["|cosine|"] > 3 * mean["true"]["|cosine|"]  # larger by far
    assert mean["shuffled"]["φ inputs"] < 1.25 and mean["shuffled"]["|cosine|"] > 10  # though inputs are near chance
    cosine = found["shuffled"]["|cosine|"]
    news = np.array([a.startswith("ng-") and b.startswith("ng-") for a, b in cosine.index])
    assert cosine[news].mean() > 1.5 * cosine[~news].mean() and news[cosine.argmax()]


def test_the_correlation_is_of_ranks_and_its_interval_is_of_tasks():
    """By plain loops: a pair counts as often as both of its tasks were drawn, with the losses of that resample."""
    rng = np.random.default_rng(2)
    pairs = list(combinations("abcde", 2))
    measure = pd.Series(rng.normal(size=10), index=pd.MultiIndex.from_tuples(pairs))
    lost = measure.to_numpy()[:, None] + rng.normal(size=(10, 40))
    found = predictors.correlation(measure, lost, count=60)

    def ranks(values):
        return [sum((other < value) + (other == value) / 2 for other in values) for value in values]

    def spearman(x, y):
        return np.corrcoef(ranks(x), ranks(y))[0, 1]

    draws = []
    for i, often in enumerate(np.random.default_rng(0).multinomial(4, [1 / 5] * 5, size=60)):  # four of five tasks
        tasks_drawn = "".join(np.repeat(list("abcde"), often))
        sample = [(a, b) for a in tasks_drawn for b in tasks_drawn if a < b]  # each pair of draws once
        x = [measure[pair] for pair in sample]
        if len(set(x)) > 2:
            draws.append(spearman(x, [lost[pairs.index(pair), 1 + i % 39] for pair in sample]))
    assert found[0] == pytest.approx(spearman(list(measure), list(lost[:, 0])))
    assert found[1:] == pytest.approx(np.quantile(draws, [0.025, 0.975]))
