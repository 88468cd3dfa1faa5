"""Whitened sums: the theorem behind them, order, caps, streams."""

import pytest
import torch
from factories import adapter, error

import lora_opcm as lo

SHAPES = {"a": (40, 32), "b": (36, 48)}


def stream(count=5, rank=3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [adapter(SHAPES, rank, generator, dtype) for _ in range(count)]


def gap(a, b):
    return max(error(a.modules[n], b.modules[n].delta().double()) for n in b.modules)


def test_three_sums_are_tsv():
    assert gap(lo.merge(stream(), "whitened_sum", power=0), lo.merge(stream(), "tsv")) < 1e-9


@pytest.mark.parametrize("power", [0, 0.5, 1])
def test_one_at_a_time_is_all_at_once_in_any_order(power):
    joint = lo.merge(stream(), "whitened_sum", power=power, scale=0.7)
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1]):
        merger = lo.SumMerger(power=power, scale=0.7)
        for i in order:
            merger.add(stream()[i])
        assert gap(merger.adapter(), joint) < 1e-9
        assert (
            gap(merger.adapter(rank=3), lo.merge(stream(), "whitened_sum", power=power, scale=0.7, rank=3))
            < 1e-9
        )


def test_power_one_makes_one_adapter_flat_and_power_zero_leaves_it():
    one = stream(1)[0]
    spectrum = lo.SumMerger(power=1).add(one).adapter().modules["a"].svd()[1]
    assert float(spectrum.max() / spectrum.min()) == pytest.approx(1)
    assert gap(lo.SumMerger(power=0).add(one).adapter(), one) < 1e-9


def test_a_cap_bounds_the_state_and_one_that_does_not_bind_changes_nothing():
    merger, free = lo.SumMerger(cap=6), lo.SumMerger(cap=15)
    for a in stream():
        merger.add(a)
        free.add(a)
    assert {s.S.shape for s in merger.sums.values()} == {(6, 6)}
    assert merger.adapter().modules["a"].rank == 6
    assert gap(free.adapter(), lo.merge(stream(), "whitened_sum")) < 1e-9
    assert gap(lo.merge(stream(), "whitened_sum", cap=6), merger.adapter()) < 1e-9


def test_missing_modules_and_refusals():
    a, b = stream(2)
    merger = lo.SumMerger().add(a.with_modules({"a": a.modules["a"]})).add(b)
    assert set(merger.adapter().modules) == {"a", "b"}
    assert (
        gap(
            lo.SumMerger().add(b).adapter().with_modules({"b": lo.SumMerger().add(b).adapter().modules["b"]}),
            merger.adapter().with_modules({"b": merger.adapter().modules["b"]}),
        )
        < 1e-12
    )
    with pytest.raises(ValueError, match="power must lie"):
        lo.SumMerger(power=2)
    with pytest.raises(ValueError, match="cap must be"):
        lo.SumMerger(cap=0)
    with pytest.raises(ValueError, match="nothing was added"):
        lo.SumMerger().adapter()
    with pytest.raises(ValueError, match="a has shape"):
        merger.add(b.with_modules({"a": lo.LowRank(torch.ones(3, 1), torch.ones(1, 4))}))
