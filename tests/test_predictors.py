"""Measures of overlap from the weights, against dense arithmetic; the published table is of the published pairs."""

from itertools import combinations

import numpy as np
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
