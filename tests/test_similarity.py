import math

import pytest
import torch
from factories import adapter, dense, error

import lora_opcm as lo
from lora_opcm.command.recipe import distance, relative_rounding
from lora_opcm.gauge import random_gauge, regauge

SHAPES = {"a": (24, 30), "b": (30, 18)}


def test_rows_agree_with_dense_svds(generator):
    a, b = adapter(SHAPES, 4, generator), adapter(SHAPES, 5, generator)
    table = lo.similarity(a, b, k=3, l=4)
    for name in SHAPES:
        (ua, _, va), (ub, _, vb) = (torch.linalg.svd(dense(x.modules[name])) for x in (a, b))
        row = table.loc[name]
        assert row.phi_left == pytest.approx(float((ua[:, :3].mT @ ub[:, :4]).square().sum() / 3), abs=1e-6)
        assert row.phi_right == pytest.approx(float((va[:3] @ vb[:4].mT).square().sum() / 3), abs=1e-6)
        assert row.null_left == pytest.approx(4 / SHAPES[name][0])
        da, db = dense(a.modules[name]), dense(b.modules[name])
        assert row.cosine == pytest.approx(float((da * db).sum() / da.norm() / db.norm()), abs=1e-6)
        assert 0 < row.p_left < 1 and 0 < row.energy_a < 1


def test_an_adapter_overlaps_itself_and_a_zero_update_with_nothing(generator):
    a = adapter(SHAPES, 4, generator)
    table = lo.similarity(a, a)
    assert (table[["phi_left", "phi_right", "cosine"]] - 1).abs().max().max() < 1e-6
    assert table.angle_left.max() < 1e-6
    zero = a.with_modules({n: u * 0.0 for n, u in a.modules.items()})
    assert lo.similarity(a, zero).cosine.isna().all()
    nothing = lo.similarity(zero, zero)
    assert list(nothing.columns) == list(table.columns) and nothing.phi_left.isna().all()
    for wrong in (0, -1, 2.5):
        with pytest.raises(ValueError, match="k must be"):
            lo.similarity(a, a, k=wrong)
        with pytest.raises(ValueError, match="l must be"):
            lo.similarity(a, a, l=wrong)
    with pytest.raises(ValueError, match="no module is in two"):
        lo.similarity(a, adapter({"c": (4, 5)}, 2, generator))


def test_eight_directions_of_each_unless_told(generator):
    a, b = (adapter({"a": (40, 30)}, 12, generator) for _ in range(2))
    assert lo.similarity(a, b).equals(lo.similarity(a, b, 8, 8))
    assert not lo.similarity(a, b).equals(lo.similarity(a, b, 8, 9))


def gap(u, target):
    """Squared distance of the factors."""
    return float((u.left - target.left).norm() ** 2 + (u.right - target.right).norm() ** 2)


def test_align_finds_the_gauge_copy_and_never_moves_the_update(generator):
    a = adapter(SHAPES, 4, generator, torch.float64)
    aligned = lo.align(a.regauge(3), to=a)
    other = adapter(SHAPES, 4, generator, torch.float64)
    for name in SHAPES:
        target = a.modules[name].balanced()
        assert torch.allclose(aligned.modules[name].left, target.left, atol=1e-8)
        assert error(aligned.modules[name], dense(a.modules[name])) < 1e-10
        before, after = other.modules[name].balanced(), lo.align(other, to=a).modules[name]
        assert gap(after, target) < gap(before, target) and error(after, dense(other.modules[name])) < 1e-10


def test_align_balances_what_there_is_nothing_to_align_with(generator):
    a = adapter(SHAPES, 4, generator, torch.float64)
    aligned = lo.align(a, to=a.with_modules({"b": a.modules["b"]})).modules["a"]
    balanced = a.modules["a"].balanced()
    assert torch.equal(aligned.left, balanced.left) and torch.equal(aligned.right, balanced.right)
    with pytest.raises(ValueError, match=r"a: expected updates of one shape, got \(24, 30\) and \(24, 29\)"):
        lo.align(a, to=adapter({"a": (24, 29)}, 4, generator))


@pytest.mark.parametrize("dtype, unit", [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_align_rounds_once(dtype, unit, generator):
    a, b = adapter(SHAPES, 4, generator, dtype), adapter(SHAPES, 4, generator, dtype)
    aligned, wide = (
        lo.align(x, to=b) for x in (a, a.with_modules({n: u.to(torch.float64) for n, u in a.modules.items()}))
    )
    for name, u in aligned.modules.items():
        exact = wide.modules[name].left
        assert float(((u.left.double() - exact) / exact).abs().max()) <= unit * 1.001


def test_a_random_gauge_scales_orthonormal_columns_by_a_half_to_two():
    G = random_gauge(400, torch.Generator().manual_seed(1))
    gram = G.mT @ G
    d = gram.diagonal().sqrt()
    assert G.dtype == torch.float64 and float((gram - (d**2).diag()).abs().max()) < 1e-12
    assert 0.5 <= float(d.min()) < 0.51 and 1.95 < float(d.max()) <= 2
    assert float(d.log2().mean()) == pytest.approx(0, abs=0.1)  # as often larger as smaller
    assert torch.equal(G, random_gauge(400, torch.Generator().manual_seed(1)))


def test_regauge_is_told_by_its_seed_and_of_each_module_another(generator):
    a = adapter({"a": (9, 7), "b": (9, 7)}, 3, generator, torch.float64)
    one, same, other = regauge(a), regauge(a, 0), regauge(a, 1)
    gauges = [torch.linalg.lstsq(a.modules[n].left, x.modules[n].left).solution for x in (one, other) for n in "ab"]
    drawn = torch.Generator().manual_seed(0)
    for n, found in zip("ab", gauges):
        assert torch.equal(one.modules[n].left, same.modules[n].left)
        assert float((found - random_gauge(3, drawn)).abs().max()) < 1e-12
        assert error(one.modules[n], a.modules[n].delta()) < 1e-12
    assert float((gauges[0] - gauges[2]).abs().max()) > 0.1


def test_nothing_has_no_rounding():
    zero = lo.LowRank(torch.zeros(6, 2), torch.ones(2, 5))
    assert relative_rounding(lo.Adapter({"w": zero})) == relative_rounding(lo.Adapter({})) == 0
    assert distance(lo.Adapter({"w": zero}), lo.Adapter({"w": zero})) == (0.0, "w")


def test_what_two_adapters_do_not_share_is_named_by_its_first_name():
    one = lo.LowRank(torch.ones(6, 2), torch.ones(2, 5))
    have = lambda names: lo.Adapter({n: one for n in names})  # noqa: E731
    assert distance(have("ab"), have("ba")) == (0.0, "a")
    assert distance(have("zab"), have("bc")) == distance(have("bc"), have("zab")) == (math.inf, "a")
    turned = lo.Adapter(
        {"a": one, "b": lo.LowRank(one.right.mT, one.left.mT), "c": lo.LowRank(one.right.mT, one.left.mT)}
    )
    assert distance(have("abc"), turned) == (math.inf, "b")
    twice = lo.Adapter({"a": one, "b": 2 * one, "c": 4 * one})  # of norms 1, 2, 4 each, in units of the first
    found, worst = distance(have("abc"), twice)
    assert worst == "c" and found == pytest.approx(((1 + 9) / (1 + 4 + 16)) ** 0.5)
