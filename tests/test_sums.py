"""Whitened sums: the theorem behind them, order, caps, streams."""

import json
import warnings

import dense_rules
import numpy as np
import pytest
import torch
from factories import adapter, error
from safetensors import safe_open
from safetensors.torch import save_file

import lora_opcm as lo
from lora_opcm.files import Kind

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
        assert gap(merger.adapter(rank=3), lo.merge(stream(), "whitened_sum", power=power, scale=0.7, rank=3)) < 1e-9


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
    assert {s.S.shape for s in merger.state.modules.values()} == {(6, 6)}
    assert merger.adapter().modules["a"].rank == 6
    assert gap(free.adapter(), lo.merge(stream(), "whitened_sum")) < 1e-9
    assert gap(lo.merge(stream(), "whitened_sum", cap=6), merger.adapter()) < 1e-9


def test_missing_modules_and_refusals():
    a, b = stream(2)
    merger = lo.SumMerger(scale=1).add(a.with_modules({"a": a.modules["a"]})).add(b)
    alone = lo.SumMerger(scale=1).add(b).adapter()
    assert set(merger.adapter().modules) == {"a", "b"}
    assert (
        gap(
            alone.with_modules({"b": alone.modules["b"]}),
            merger.adapter().with_modules({"b": merger.adapter().modules["b"]}),
        )
        < 1e-12
    )
    with pytest.raises(ValueError, match="power must be"):
        lo.SumMerger(power=2)
    with pytest.raises(ValueError, match="cap must be"):
        lo.SumMerger(cap=0)
    with pytest.raises(ValueError, match="nothing was added"):
        lo.SumMerger().adapter()
    with pytest.raises(ValueError, match="a has shape"):
        merger.add(b.with_modules({"a": lo.LowRank(torch.ones(3, 1), torch.ones(1, 4))}))


@pytest.mark.parametrize("make", [lo.SumMerger, lo.ContinualMerger, lo.FactorMerger, lo.WhiteningMerger])
def test_by_auto_a_stream_grows_with_the_root_of_its_adapters(make, tmp_path):
    """However it is cut: 1, √2, √3, 2 and 2 mean norms; an adapter that is zero is none."""
    adapters, merger = stream(5), make(scale="auto")
    for t, a in enumerate(adapters, 1):
        mean = sum(b.norm() for b in adapters[:t]) / t
        merger = make.load(merger.add(a).save(tmp_path / "s"))
        for cut in ({}, {"rank": 2}, {"energy": 0.5}):
            merged = merger.adapter(**cut)
            assert merged.norm() == pytest.approx(min(t**0.5, 2) * mean, rel=1e-6)
            whole = make(scale=1)
            for b in adapters[:t]:
                whole.add(b)
            assert gap(merged, merged.factor * whole.adapter(**cut)) < 1e-6
    two = make(scale="auto").add(adapters[0]).add(0.0 * adapters[1]).add(adapters[2])
    assert two.adapter().norm() == pytest.approx((adapters[0].norm() + adapters[2].norm()) / 2**0.5, rel=1e-6)


def test_by_auto_a_removal_counts(tmp_path):
    a, b, c = stream(3)
    merger = lo.SumMerger().add(a).add(b).add(c).remove(b)
    assert merger.scale == "auto"
    assert merger.adapter(rank=3).norm() == pytest.approx((a.norm() + c.norm()) / 2**0.5)


def test_a_state_keeps_the_scale_it_was_made_with(tmp_path):
    a, b = stream(2)
    old = lo.SumMerger(scale=1.0).add(a).save(tmp_path / "s")
    merger = lo.SumMerger.load(old).add(b)
    assert merger.scale == 1.0 and gap(merger.adapter(), lo.merge(a, b, method="whitened_sum", scale=1.0)) < 1e-9


@pytest.mark.parametrize("power", [0, 0.5, 1])
def test_removing_is_never_having_added(power):
    a, b, c, d = stream(4)
    merger = lo.SumMerger(power=power).add(a).add(b).add(c).remove(b)
    straight = lo.SumMerger(power=power).add(a).add(c)
    assert gap(merger.adapter(), straight.adapter()) < 1e-9
    assert {n: s.S.shape for n, s in merger.state.modules.items()} == {
        n: s.S.shape for n, s in straight.state.modules.items()
    }
    assert gap(merger.add(d).adapter(), straight.add(d).adapter()) < 1e-9


def test_removing_one_of_two_copies_or_of_shared_directions_keeps_the_other():
    a, b, c = stream(3)
    both = a + b
    merger = lo.SumMerger().add(a).add(a).add(both).add(c)
    straight = lo.SumMerger().add(a).add(c)
    assert gap(merger.remove(both).remove(a).adapter(), straight.adapter()) < 1e-9


def test_float32_adapters_are_removed_to_their_rounding():
    a, b, c = stream(3, dtype=torch.float32)
    merger = lo.SumMerger().add(a).add(b).add(c).remove(b)
    assert gap(merger.adapter(), lo.SumMerger().add(a).add(c).adapter()) < 1e-6


def test_what_cannot_be_removed_is_refused():
    a, b, c = stream(3)
    with pytest.raises(ValueError, match="cap of 6"):
        lo.SumMerger(cap=6).add(a).add(b).remove(a)
    merger = lo.SumMerger().add(a, name="first").add(b, name="second")
    for other in (c, a.regauge(), a.with_modules({n: 2 * u for n, u in a.modules.items()})):
        with pytest.raises(ValueError, match=r"not those of an adapter in the state \(first, second\)"):
            merger.remove(other)
    with pytest.raises(ValueError, match="the only adapter"):
        merger.remove(a).remove(b)


@pytest.mark.parametrize("cap", [None, 5])
def test_a_saved_state_goes_on_as_if_it_had_not_stopped(cap, tmp_path):
    straight, stopped = lo.SumMerger(0.7, cap, 0.8), lo.SumMerger(0.7, cap, 0.8)
    for i, a in enumerate(stream(dtype=torch.float32)):
        straight.add(a, name=f"task {i}")
        stopped = lo.SumMerger.load(stopped.add(a, name=f"task {i}").save(tmp_path / "s.safetensors"))
    assert straight.state.members == stopped.state.members and stopped.scale == 0.8
    for name in SHAPES:
        one, two = straight.adapter().modules[name], stopped.adapter().modules[name]
        assert torch.equal(one.left, two.left) and torch.equal(one.right, two.right)
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


def test_a_state_knows_its_sides_and_one_from_before_them_whitens_both(tmp_path):
    a, b, c = stream(3)
    for sides in ("left", "both"):
        path = lo.SumMerger(power=0.3, sides=sides).add(a).add(b).save(tmp_path / sides)
        assert (
            gap(lo.SumMerger.load(path).add(c).adapter(), lo.merge([a, b, c], "whitened_sum", power=0.3, sides=sides))
            < 1e-9
        )
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    before = {key: text.replace(',"sides":"both"', "") for key, text in metadata.items()}
    assert before != metadata
    save_file(tensors, path, before)
    assert gap(lo.SumMerger.load(path).adapter(), lo.merge([a, b], "whitened_sum", power=0.3)) < 1e-9


def test_states_know_their_kind(tmp_path):
    a = stream(1)[0]
    sums = lo.SumMerger().add(a).save(tmp_path / "sums.safetensors")
    opcm = lo.ContinualMerger().add(a).save(tmp_path / "opcm.safetensors")
    with pytest.raises(lo.AdapterError, match="a state of kind 'whitened_sum', expected opcm"):
        lo.ContinualMerger.load(sums)
    with pytest.raises(lo.AdapterError, match="a state of kind 'opcm', expected whitened_sum"):
        lo.SumMerger.load(opcm)
    with pytest.raises(ValueError, match="no state to save"):
        lo.SumMerger().save(tmp_path / "empty")


@pytest.mark.parametrize("kind", [lo.ContinualMerger, lo.SumMerger, lo.FactorMerger, lo.WhiteningMerger])
def test_modules_and_kinds_of_later_adapters_outlive_a_reload(kind, tmp_path):
    a, b = stream(2, dtype=torch.float32)
    first = a.with_modules({"a": a.modules["a"]})
    first = lo.Adapter(first.modules, config={"target_modules": ["a"], "r": 3, "lora_alpha": 3, "peft_type": "LORA"})
    second = lo.Adapter({"b": b.modules["b"]}, kinds={"b": Kind("embedding")})
    merger = kind().add(first).add(second, disjoint=True).add(first)
    for m in (merger, kind.load(merger.save(tmp_path / "s.safetensors"))):
        folder = lo.save_adapter(m.adapter(), tmp_path / f"out {m is merger}")
        again = lo.load_adapter(folder)
        assert again.kinds == {"b": Kind("embedding")} and again.config["target_modules"] == ["a", "b"]


def test_a_module_only_the_removed_adapter_had_is_gone(tmp_path):
    a, b = stream(2, dtype=torch.float32)
    config = {"target_modules": ["a"], "r": 3, "lora_alpha": 3, "peft_type": "LORA"}
    part = lo.Adapter({"a": a.modules["a"]}, config=config)
    zero = lo.Adapter({"b": 0.0 * b.modules["b"]})
    merger = lo.SumMerger(power=0).add(part).add(zero, disjoint=True).add(b).remove(b)
    assert list(merger.state.modules) == ["a"] == list(merger.adapter().modules)
    assert gap(merger.adapter(), part) < 1e-5
    assert merger.remove(zero).state.names[0] == "adapter 1"  # its module is gone already
    assert list(lo.SumMerger.load(merger.save(tmp_path / "s")).state.modules) == ["a"]


@pytest.mark.parametrize("field, value", [("name", 3), ("id", 3), ("norm", "x"), ("norm", None)])
def test_members_of_other_types_are_a_damaged_state(field, value, tmp_path):
    merger = lo.SumMerger().add(stream(1)[0])
    setattr(merger.state.members[0], field, value)
    with pytest.raises(lo.AdapterError, match="a damaged state"):
        lo.SumMerger.load(merger.save(tmp_path / "s"))


@pytest.mark.parametrize("field", ["members", "modules"])
@pytest.mark.parametrize("kind", [lo.ContinualMerger, lo.SumMerger, lo.FactorMerger, lo.WhiteningMerger])
def test_a_state_of_nothing_is_a_damaged_one(kind, field, tmp_path):
    path = kind().add(stream(1)[0]).save(tmp_path / "s")
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    (key, text), *_ = metadata.items()
    said = json.loads(text)
    assert said["content"][field]
    said["content"][field] = []
    save_file(tensors, path, {key: json.dumps(said)})
    with pytest.raises(lo.AdapterError, match="a damaged state: ValueError: expected modules, and a name"):
        kind.load(path)


@pytest.mark.parametrize("damage", ["left/a is flat", "kernel is infinite"])
@pytest.mark.parametrize("kind", [lo.ContinualMerger, lo.SumMerger, lo.FactorMerger, lo.WhiteningMerger])
def test_damage_of_every_sort_is_an_adapter_error(damage, kind, tmp_path):
    merger = kind().add(lo.Adapter(stream(1)[0].modules, kinds={"a": Kind("conv", (3, 3))}))
    path = merger.save(tmp_path / "s")
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if damage == "left/a is flat":
        tensors["left/a"] = tensors["left/a"].flatten()
    else:
        metadata = {key: text.replace("[3,3]", "[3,1e999]") for key, text in metadata.items()}
    save_file(tensors, path, metadata)
    with pytest.raises(lo.AdapterError, match="a damaged state"):
        kind.load(path)


def test_what_a_flat_spectrum_cannot_decide_is_refused_or_said():
    """At power 1 the singular values of independent tasks are their norms, each as often as there are directions."""
    adapters = stream(3)
    for refused in (lambda: lo.SumMerger(power=1, cap=4), lambda: lo.merge(adapters, "whitened_sum", power=1, cap=4)):
        with pytest.raises(ValueError, match="power 1 leaves a flat spectrum, of which a cap of 4"):
            refused()
    with pytest.warns(UserWarning, match="between equal singular values"):
        lo.merge(adapters, "whitened_sum", power=1, rank=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lo.merge(adapters, "whitened_sum", power=1, rank=3)  # all directions of the largest task
        lo.merge(adapters, "whitened_sum", power=0.9, rank=2)


def dense_whitening(deltas, cap):
    """Sequential whitening of dense matrices by numpy alone: what is kept is the merged matrix, cut to the cap."""
    rank = 3
    kept, size = deltas[0], rank
    for delta in deltas[1:]:
        (u, s, vh), (a, t, bh) = (np.linalg.svd(x, full_matrices=False) for x in (kept, delta))
        left, right = np.hstack([u[:, :size], a[:, :rank]]), np.hstack([vh[:size].T, bh[:rank].T])
        left, right = (p @ qh for p, _, qh in (np.linalg.svd(x, full_matrices=False) for x in (left, right)))
        kept = left @ np.diag(np.concatenate([s[:size], t[:rank]])) @ right.T
        size = min(size + rank, cap or size + rank)
        u, s, vh = np.linalg.svd(kept, full_matrices=False)
        kept = (u[:, :size] * s[:size]) @ vh[:size]
    return kept


@pytest.mark.parametrize("cap", [None, 4])
def test_a_whitening_stream_keeps_the_merged_adapter_alone(cap):
    merger = lo.WhiteningMerger(rank=cap, scale=1.0)
    for one in stream():
        merger.add(one)
    merged = merger.adapter()
    for name in SHAPES:
        dense = dense_whitening([one.modules[name].delta().numpy() for one in stream()], cap)
        assert error(merged.modules[name], torch.from_numpy(dense)) < 1e-9
    if cap is None:
        assert gap(merged, lo.merge(stream(), "whitening", scale=1.0)) < 1e-9
    assert {u.rank for u in merged.modules.values()} == {cap or 15}


def test_a_whitening_stream_says_what_its_cap_cut_and_cannot_forget():
    one, two = stream(2)
    merger = lo.WhiteningMerger(rank=4, scale=1.0).add(one).add(two)
    whole = lo.merge([one, two], "whitening", scale=1.0).norm() ** 2
    cut = merger.adapter().norm() ** 2
    assert merger.state.history[1]["dropped"] == pytest.approx(1 - cut / whole)
    assert merger.state.history[0]["dropped"] == 0
    with pytest.raises(ValueError, match="turned to stand at right angles"):
        merger.remove(one)


@pytest.mark.parametrize("dtype, near", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2), (torch.float32, 1e-5)])
@pytest.mark.parametrize("cap", [None, 4])
def test_a_whitening_stream_in_half_precision_and_with_missing_modules(cap, dtype, near):
    """An adapter that lacks a module leaves it as it is, first or in between; the state itself is never half."""
    adapters = stream(4, dtype=dtype)
    lacking = [
        one.with_modules({name: one[name] for name in names})
        for one, names in zip(adapters, ("b", "ab", "a", "ab"), strict=True)
    ]
    merger = lo.WhiteningMerger(rank=cap, scale=1.0)
    for one in lacking:
        merger.add(one, disjoint=True)
        assert {u.left.dtype for u in merger.state.modules.values()} == {torch.float32}
    merged = merger.adapter()
    assert merged.dtype == dtype
    for name in SHAPES:
        dense = dense_whitening([one[name].delta().double().numpy() for one in lacking if name in one], cap)
        assert error(merged[name], torch.from_numpy(dense)) < near, name


@pytest.mark.parametrize("case", ["one factor for all", "more directions than a side"])
def test_a_whitening_stream_is_the_merge_where_directions_depend_on_each_other(case):
    generator = torch.Generator().manual_seed(0)
    if case == "one factor for all":  # as of adapters that train B alone
        adapters = [adapter({"a": (64, 48)}, 8, generator, torch.float64) for _ in range(4)]
        adapters = [a.with_modules({"a": lo.LowRank(a["a"].left, adapters[0]["a"].right)}) for a in adapters]
    else:
        adapters = [adapter({"a": (8, 50)}, 4, generator, torch.float64) for _ in range(5)]
    merger = lo.WhiteningMerger()
    for one in adapters:
        merger.add(one)
    merged = lo.merge(adapters, "whitening")
    assert gap(merger.adapter(), merged) < 1e-6 * merged.norm()
    dense = dense_rules.whitening([a["a"].delta() for a in adapters])
    dense = dense * merged.norm() / dense.norm()
    assert error(merged["a"], dense) < 1e-6
