"""The table behind the mixing desk: sums of two adapters at any two weights, and texts that are right."""

from itertools import product

import numpy as np
import pytest
import torch

import lora_opcm as lo
from lora_opcm.files.shipped import results
from lora_opcm.lab.evaluation import Evaluator
from lora_opcm.lab.experiments import desk
from lora_opcm.lab.experiments.adapters import adapters_of
from lora_opcm.lab.tasks import load_task, tasks

PAIR = ("ng-sci", "tweets")


@pytest.mark.parametrize("weights", product((0, 0.5, 2), repeat=2))
def test_a_point_is_the_weighted_sum(weights, generator):
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    one, other = (lo.Adapter({"q": lo.LowRank(normal(9, 3), normal(3, 7))}) for _ in range(2))
    adapter, scale = desk.weighted(one, other, weights)
    found = np.zeros((9, 7)) if adapter is None else scale * adapter.delta("q").double().numpy()
    dense = [a.modules["q"].left.double() @ a.modules["q"].right.double() for a in (one, other)]
    assert found == pytest.approx((weights[0] * dense[0] + weights[1] * dense[1]).numpy(), abs=1e-5)


def test_the_published_table_is_of_every_pair_and_of_the_adapters_that_ship():
    table, ids = results("desk"), {task: a.id[:8] for task, a in adapters_of().items()}
    names = tasks()
    for (first, second), rows in table.groupby(["first", "second"]):
        assert names.index(first) < names.index(second)
        points = set(map(tuple, rows[["weight of first", "weight of second"]].to_numpy().tolist()))
        assert points == {*product(desk.WEIGHTS, repeat=2)} and len(rows) == 25
        assert set(rows.adapters) == {f"{ids[first]}+{ids[second]}"}
    assert table.groupby(["first", "second"]).ngroups == 28


def test_what_one_adapter_does_alone_is_the_same_in_every_pair():
    table, alone = results("desk"), {}
    for mine, its in (("first", "second"), ("second", "first")):
        for row in table[table[f"weight of {its}"] == 0].to_dict("records"):
            alone.setdefault((row[mine], row[f"weight of {mine}"]), set()).add(row[f"{mine} right"])
    assert len(alone) == 8 * 5 and all(len(found) == 1 for found in alone.values())


@pytest.mark.slow
def test_the_published_table_is_counted_again():
    """A few points, merged by the method and classified without a batch's neighbours in mind."""
    table, adapters = results("desk"), adapters_of()
    rows = table[(table["first"] == PAIR[0]) & (table["second"] == PAIR[1])]
    texts = int(rows["texts of first"].iloc[0])
    evaluator = Evaluator([load_task(t) for t in PAIR], limit=texts)
    for weights in ((0, 0), (1, 0), (0, 1), (0.5, 1)):
        merged = lo.merge([adapters[t] for t in PAIR], "cat", weights=list(weights)) if any(weights) else None
        right = evaluator.correct(merged)
        [row] = rows[
            (rows["weight of first"] - weights[0]).abs() + (rows["weight of second"] - weights[1]).abs() < 1e-3
        ].to_dict("records")
        for which, task in zip(("first", "second"), PAIR, strict=True):
            assert (
                abs(int(right[task].sum()) - row[f"{which} right"]) <= 0.02 * texts
            )  # the table's run was in bfloat16
