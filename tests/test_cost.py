"""How the bench measures: counts that do not depend on the load, and ratios of ways that ran in turn."""

import sys

import pytest
import torch

import lora_opcm as lo
from lora_opcm.lab.experiments import dense
from lora_opcm.lab.experiments.cost import counted, in_turn
from lora_opcm.parallel import parallel_map

COST = sys.modules[in_turn.__module__]


def test_counts_are_of_one_call():
    a, b = torch.ones(30, 40), torch.ones(40, 50)
    found = counted(lambda: (a @ b).abs().sum())
    assert found["torch calls"] == 3 and found["products, Gflop"] == pytest.approx(2 * 30 * 40 * 50 / 1e9)
    assert counted(lambda: torch.zeros(2**25))["page faults"] > 1000 * (found["page faults"] < 1000)


def test_counts_are_of_all_threads():
    numbers, before = [torch.ones(3)] * 5, torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert counted(lambda: parallel_map(torch.abs, numbers))["torch calls"] == 5
    finally:
        torch.set_num_threads(before)


def test_ratios_are_the_median_of_rounds_in_turn_without_the_first(monkeypatch):
    """On clocks that a way moves by 2, the other by 3, 30 (once) and, in the first round, 1000."""
    now, order = [0.0], []
    for clock in ("perf_counter", "process_time"):
        monkeypatch.setattr(COST.time, clock, lambda: now[0])
    slow = iter([1000.0, 3.0, 30.0, 3.0])

    def move(name, by):
        order.append(name)
        now[0] += by()

    ways = {"one": lambda: move("one", lambda: 2.0), "other": lambda: move("other", lambda: next(slow))}
    used, ratios = in_turn(ways, 3)
    assert ratios == {"other / one": 1.5} and used == {"one, ms": 2000.0, "other, ms": 3000.0}
    assert order == ["other", "one", "one", "other"] * 2


@pytest.mark.parametrize("variant", ["paper", "fusionbench"])
def test_the_dense_algorithms_are_opcm(variant, generator):
    """Of updates of full rank: beyond the rank of a sum the released code clears what an arbitrary basis says."""
    draw = lambda: torch.randn(12, 12, generator=generator, dtype=torch.float64)  # noqa: E731
    adapters = [lo.Adapter({name: lo.LowRank(draw(), draw()) for name in "ab"}) for _ in range(3)]
    layers = {name: [a.modules[name].delta() for a in adapters] for name in "ab"}
    ours = lo.merge(adapters, "opcm", alpha=0.4, variant=variant)
    if variant == "paper":
        found = {name: dense.step(dense.step(a, b, 0.4), c, 0.4) for name, (a, b, c) in layers.items()}
        ours = lo.merge(adapters, "opcm", alpha=0.4, variant=variant, scale=1.0)
    else:
        found = dense.fusionbench(layers, 0.4)
    for name, update in ours.modules.items():
        assert torch.allclose(update.delta(), found[name], atol=1e-8), name
