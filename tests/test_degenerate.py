"""What is nearly dependent, cancels, ties, is padded or badly scaled: dense numbers say what is right."""

import math
import warnings

import numpy as np
import pytest
import torch

import lora_opcm as lo
from lora_opcm import testing
from lora_opcm.lowrank import add
from lora_opcm.merging.method import _table, merge_method
from lora_opcm.merging.plan import plan
from lora_opcm.testing import check_method

DOUBLE, SINGLE, HALF = torch.float64, torch.float32, torch.float16


class Draw:
    """Random factors, the same ones every time."""

    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape, dtype=DOUBLE):
        return torch.randn(*shape, generator=self.generator, dtype=DOUBLE).to(dtype)

    def update(self, m, n, r, dtype=DOUBLE):
        return lo.LowRank(self(m, r, dtype=dtype), self(r, n, dtype=dtype))


def dense(update):
    return update.left.double().numpy() @ update.right.double().numpy()


def gap(found, expected):
    return np.linalg.norm(dense(found) - expected) / np.linalg.norm(expected)


def padded(update, rank):
    more = rank - update.rank
    return lo.LowRank(
        torch.nn.functional.pad(update.left, (0, more)), torch.nn.functional.pad(update.right, (0, 0, 0, more))
    )


def turned(update, condition, draw):
    """The same update in a gauge of that condition number."""
    u, _, v = torch.linalg.svd(draw(update.rank, update.rank))
    return update.regauge(u @ torch.diag(torch.logspace(0, math.log10(condition), update.rank, dtype=DOUBLE)) @ v)


# -- ranks that are not those of the factors -----------------------------------------------------------------------


@pytest.mark.parametrize("order", [("small", "large"), ("large", "small")])
def test_a_module_of_svd_keeps_its_rank_beside_any_other(order):
    draw = Draw()
    small, large = ([draw.update(40, 50, r) for _ in range(3)] for r in (2, 8))
    adapters = [
        lo.Adapter({name: {"small": padded(s, 8), "large": b}[name] for name in order})
        for s, b in zip(small, large, strict=True)
    ]
    merged = lo.merge(adapters, "svd", ragged=True)
    for name, parts, rank in (("small", small, 2), ("large", large, 8)):
        u, s, vh = np.linalg.svd(sum(map(dense, parts)), full_matrices=False)
        assert merged[name].rank == rank
        assert gap(merged[name], (u[:, :rank] * s[:rank]) @ vh[:rank]) < 1e-9
        assert merged.dropped[name] == pytest.approx((s[rank:] ** 2).sum() / (s**2).sum())


@pytest.mark.parametrize("method", ["svd", "ctm"])
@pytest.mark.parametrize("m", [12, 3, 40])
def test_a_gauge_and_columns_of_zeros_do_not_set_a_rank(method, m):
    draw = Draw(m)
    bare = [draw.update(m, 44, 2) for _ in range(3)]
    mixed = [turned(padded(u, 8), 3.0, draw) for u in bare]
    plain, other = (lo.merge([lo.Adapter({"w": u}) for u in of], method) for of in (bare, mixed))
    assert plain["w"].rank == other["w"].rank == 2
    assert gap(other["w"], dense(plain["w"])) < 1e-9
    unheard = lo.merge([lo.Adapter({"w": u}) for u in [*bare, draw.update(m, 44, 5)]], method, weights=[1, 1, 1, 0])
    assert unheard["w"].rank == 2


@pytest.mark.parametrize("space", ["core", "updates", "dense"])
def test_the_largest_rank_is_that_of_an_update_in_every_space(space):
    """And an adapter that lacks a module has rank nought there."""

    def total(inside):
        """The sum."""
        return inside.total() if space == "core" else add(inside) if space == "updates" else sum(inside)

    merge_method("whole", space=space, source="a test", keeps="one sum", largest=True)(total)
    draw = Draw()
    try:
        updates = [padded(draw.update(20, 24, r, SINGLE), 9) for r in (2, 4)]
        adapters = [lo.Adapter({"w": u, "v": u}) for u in updates]
        adapters[1] = adapters[1].with_modules({"w": updates[1]})
        merged = lo.merge(adapters, "whole", ragged=True)
    finally:
        del _table["whole"]
    assert (merged["w"].rank, merged["v"].rank) == (4, 2)
    u, s, vh = np.linalg.svd(dense(updates[0]) + dense(updates[1]), full_matrices=False)
    assert gap(merged["w"], (u[:, :4] * s[:4]) @ vh[:4]) < 1e-5 and gap(merged["v"], dense(updates[0])) < 1e-5


@pytest.mark.parametrize("method", ["karcher_mean", "quotient_mean", "chordal_mean"])
def test_a_plan_of_means_of_mixed_ranks(method):
    draw = Draw()
    adapters = [lo.Adapter({"w": draw.update(60, 48, r)}) for r in (2, 6, 3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = lo.merge(adapters, method)
    planned = plan(adapters, method)
    assert planned.rank == merged["w"].rank
    assert planned.written == sum(x.numel() * x.element_size() for x in (merged["w"].left, merged["w"].right))


# -- gauges of large condition number ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["opcm", "actmat", "tsv", "iso_c", "wudi"])
@pytest.mark.parametrize("m, n", [(12, 14), (12, 90), (70, 90)])
def test_a_bad_gauge_changes_nothing_where_factors_span_a_side_too(method, m, n):
    draw = Draw()
    updates = [draw.update(m, n, 4) for _ in range(5)]
    bad = [turned(u, 1e6, draw) for u in updates]
    plain, other = (lo.merge([lo.Adapter({"w": u}) for u in of], method) for of in (updates, bad))
    assert gap(other["w"], dense(plain["w"])) < 1e-6


@pytest.mark.parametrize("condition", [1e2, 1e6, 1e8])
@pytest.mark.parametrize("dtype", [DOUBLE, SINGLE])
def test_a_norm_is_that_of_the_product_of_the_factors_as_they_are(condition, dtype):
    draw = Draw()
    update = turned(draw.update(30, 40, 5), condition, draw).to(dtype)
    with np.errstate(all="raise"):
        exact = (update.left.numpy().astype(np.longdouble)) @ update.right.numpy().astype(np.longdouble)
    assert update.norm() == pytest.approx(float(np.sqrt((exact**2).sum())), rel=1e-16 * 100 * condition)


def test_a_small_difference_has_a_norm():
    draw = Draw()
    a, small = (lo.Adapter({"w": draw.update(30, 40, 5)}) for _ in range(2))
    assert ((a + 1e-9 * small) - a).norm() == pytest.approx(1e-9 * small.norm(), rel=1e-5)
    assert (a - a).norm() < 1e-12 * a.norm() and lo.LowRank(torch.zeros(3, 0), torch.zeros(0, 2)).norm() == 0


# -- updates that cancel, or lie close -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [DOUBLE, SINGLE])
def test_sequential_whitening_goes_on_from_nothing_where_all_cancelled(dtype):
    draw = Draw()
    a, c = (lo.Adapter({"w": draw.update(24, 30, 4, dtype), "v": draw.update(24, 30, 4, dtype)}) for _ in range(2))
    three = [a, -1.0 * a, c]
    merged, merger = lo.merge(three, "whitening", scale=1.0), lo.WhiteningMerger(scale=1.0)
    for adapter in three:
        merger.add(adapter)
    for name in ("w", "v"):
        for found in (merged, merger.adapter()):
            assert gap(found[name], dense(c[name])) < (1e-9 if dtype == DOUBLE else 1e-5) and found[name].rank == 4
    assert merger.state.history[1]["rank"] == 0


@pytest.mark.parametrize("apart", [1e-2, 1e-3, 1e-5])
def test_a_whitened_sum_of_power_nought_is_tsv_of_adapters_that_lie_close(apart):
    draw = Draw()
    a = draw.update(30, 40, 4)
    b = lo.LowRank(a.left + apart * draw(30, 4), a.right + apart * draw(4, 40))
    frames = [np.linalg.svd(dense(x), full_matrices=False) for x in (a, b)]

    def polar(x):
        u, _, vh = np.linalg.svd(x, full_matrices=False)
        return u @ vh

    u, s, v = (np.concatenate([x[..., :4] for x in side], -1) for side in zip(*((u, s, vh.T) for u, s, vh in frames)))
    expected = (polar(u) * s) @ polar(v).T
    adapters, stream = [lo.Adapter({"w": x}) for x in (a, b)], lo.SumMerger(power=0, scale=1.0)
    for adapter in adapters:
        stream.add(adapter)
    assert gap(lo.merge(adapters, "tsv", scale=1.0)["w"], expected) < 1e-6
    assert gap(lo.merge(adapters, "whitened_sum", power=0, scale=1.0)["w"], expected) < 1e-5
    assert gap(stream.adapter()["w"], expected) < 1e-5


def test_a_chordal_mean_of_directions_that_are_equally_common_says_so():
    draw = Draw()
    shared = draw(6, 40)
    adapters = [lo.Adapter({"w": lo.LowRank(draw(30, 6), shared)}) for _ in range(3)]
    for inputs in (adapters[:1], adapters):
        with pytest.warns(UserWarning, match="direction 5 is as common as the next one"):
            lo.merge(inputs, "chordal_mean", k=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lo.merge(adapters, "chordal_mean", k=6)
        lo.merge([lo.Adapter({"w": draw.update(30, 40, 6)}) for _ in range(3)], "chordal_mean", k=5)
    frame = torch.linalg.qr(draw(30, 6)).Q
    with pytest.warns(UserWarning, match="chordal_mean: direction 2 is as common"):
        lo.geometry.chordal_mean([frame], k=2)


# -- numbers and graphs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["cat", "task_arithmetic", "mean", "tsv"])
@pytest.mark.parametrize("size", [1e-3, 1e-5])
def test_a_scale_is_multiplied_before_half_precision_rounds(method, size):
    draw = Draw()
    updates = [lo.LowRank((size * draw(40, 4)).to(HALF), (0.05 * draw(4, 50)).to(HALF)) for _ in range(2)]
    adapters = [lo.Adapter({"w": u}) for u in updates]
    exact = lo.merge([lo.Adapter({"w": u.to(DOUBLE)}) for u in updates], method, scale=0.01)
    assert gap(lo.merge(adapters, method, scale=0.01)["w"], dense(exact["w"])) < 2e-3
    assert gap(lo.merge(adapters, method, scale=0.01, dtype=SINGLE)["w"], dense(exact["w"])) < 1e-6
    large = lo.Adapter({"w": lo.LowRank(torch.full((3, 1), 3e4, dtype=HALF), torch.full((1, 3), 1e-3, dtype=HALF))})
    assert gap(lo.merge([large], "cat", scale=16.0)["w"], 16 * dense(large["w"])) < 2e-3


@pytest.mark.parametrize("method", ["cat", "mean", "tsv", "ties", "lora_opcm"])
def test_factors_in_training_are_merged_as_numbers(method):
    draw = Draw()
    updates = [draw.update(20, 30, 3, SINGLE) for _ in range(2)]
    learning = [lo.LowRank(u.left.clone().requires_grad_(), u.right.clone().requires_grad_()) for u in updates]
    plain, merged = (lo.merge([lo.Adapter({"w": u}) for u in of], method)["w"] for of in (updates, learning))
    assert not (merged.left.requires_grad or merged.right.requires_grad)
    assert torch.equal(merged.left, plain.left) and torch.equal(merged.right, plain.right)


# -- what check_method catches ---------------------------------------------------------------------------------


def wrong_in_a_batch(core):
    """Looks at its neighbours."""
    total = core.total()
    return total / total.abs().max()


def half(core):
    """Half of the sum."""
    return core.total() / 2


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "rule, true, claim",
    [
        (wrong_in_a_batch, {"batched": True}, "a module beside others"),
        (half, {"plain": True}, "a share of the sum"),
        (half, {"share": lambda count: 1.0}, "a share of the sum"),
    ],
)
def test_a_wrong_rule_is_caught(monkeypatch, rule, true, claim, threads):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    merge_method("wrong", source="nobody", keeps="one sum", **true)(rule)
    try:
        with pytest.raises(AssertionError, match=claim):
            check_method("wrong")
    finally:
        del _table["wrong"]


def test_a_neighbour_is_in_the_batch_in_front(monkeypatch):
    """So that a rule which takes the first module's numbers for all is caught."""
    seen = []
    monkeypatch.setattr(
        testing, "merge", lambda inputs, name, **rest: seen.append(list(inputs[0])) or lo.merge(inputs, name, **rest)
    )
    check_method("cat")
    assert any(names[0] == "another 0" and "square" in names[1:] for names in seen)
