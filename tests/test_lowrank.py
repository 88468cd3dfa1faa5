import math

import pytest
import torch
from factories import adapter, dense, error, update
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_opcm import Adapter, LowRank, merge
from lora_opcm.lowrank import add
from lora_opcm.merging.core import Basis, Core
from lora_opcm.merging.merge import Part
from lora_opcm.merging.method import Method
from lora_opcm.merging.plan import Machine, Plan
from lora_opcm.merging.rules.frames import Sums
from lora_opcm.numerics import keep_rank

shapes = st.tuples(st.integers(4, 40), st.integers(4, 40), st.integers(1, 4), st.integers(0, 10**6))
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-12}


@settings(max_examples=25, deadline=None)
@given(shapes, st.sampled_from(list(TOLERANCE)), st.sampled_from([1e-3, 1.0, 1e3]))
def test_svd_reconstructs(shape, dtype, scale):
    m, n, r, seed = shape
    u = update(m, n, r, torch.Generator().manual_seed(seed), dtype, scale)
    U, S, Vh = u.svd()
    assert U.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.all(S[:-1] >= S[1:])
    assert torch.allclose(U.mT @ U, torch.eye(len(S), dtype=U.dtype), atol=1e-5)
    reference = dense(u)
    assert ((U * S @ Vh).double() - reference).norm() <= 1e-5 * reference.norm()


def test_svd_drops_what_is_zero(generator, dtype):
    u = update(30, 20, 3, generator, dtype)
    doubled = LowRank(torch.cat([u.left, u.left], 1), torch.cat([u.right, u.right], 0))
    assert len(doubled.svd()[1]) == 3
    assert torch.allclose(doubled.svd()[1], 2 * u.svd()[1], rtol=1e-5)


def test_inner_norm_and_sum_agree_with_dense(generator, dtype):
    a, b = update(30, 20, 3, generator, dtype), update(30, 20, 5, generator, dtype)
    assert a.inner(b) == pytest.approx(float((dense(a) * dense(b)).sum()), rel=1e-6)
    assert a.norm() == pytest.approx(float(dense(a).norm()), rel=1e-6)
    assert error(add([a, b], [0.5, -2.0]), 0.5 * dense(a) - 2 * dense(b)) < 1e-6
    assert error((a + b) * 3.0, 3 * (dense(a) + dense(b))) < 1e-6


def test_truncate_is_eckart_young(generator):
    u = update(30, 20, 6, generator, torch.float64)
    cut, dropped = u.truncate(rank=4)
    s = torch.linalg.svdvals(dense(u))
    assert cut.rank == 4
    assert error(cut, dense(u)) == pytest.approx(float((s[4:6].square().sum() / s.square().sum()).sqrt()))
    assert dropped == pytest.approx(float(s[4:6].square().sum() / s.square().sum()))


@pytest.mark.parametrize("energy", [0.1, 0.5, 0.9, 1.0])
def test_energy_keeps_the_smallest_rank_that_suffices(generator, energy):
    s = update(30, 20, 6, generator, torch.float64).svd()[1]
    share = s.square().cumsum(0) / s.square().sum()
    k = keep_rank(s, energy=energy)
    assert share[k - 1] >= energy - 1e-9 and (k == 1 or share[k - 2] < energy)


def test_balanced_gauge_is_balanced_and_regauge_changes_nothing(generator):
    u = update(30, 20, 4, generator, torch.float64)
    g = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    balanced = u.regauge(g).balanced()
    assert error(balanced, dense(u)) < 1e-12
    assert torch.allclose(balanced.left.mT @ balanced.left, balanced.right @ balanced.right.mT)


@example(m=23, n=29, ranks=[2, 5, 5, 5, 5], dtype=torch.float16, repeat=False, seed=0)
@settings(max_examples=30, deadline=None)
@given(
    st.integers(6, 40), st.integers(6, 40), st.lists(st.integers(1, 6), min_size=1, max_size=5),
    st.sampled_from([torch.float16, torch.float32, torch.float64]), st.booleans(), st.integers(0, 10**6),
)  # fmt: skip
def test_core_space_is_exact(m, n, ranks, dtype, repeat, seed):
    """ΔWₜ = Q_B Cₜ Q_Aᵀ, with orthonormal Q, also for identical adapters and more columns than rows."""
    generator = torch.Generator().manual_seed(seed)
    updates = [update(m, n, r, generator, dtype) for r in ranks]
    updates += [updates[0], updates[0] * 2.0] if repeat else []
    core = Core.of(updates)
    q_left = core.left @ torch.eye(core.cores[0].shape[0], dtype=torch.float64)
    # Gram matrices of half-precision factors are multiplied in single precision: off by its rounding, at most times the
    # squared condition number up to which Cholesky is taken.
    limit = 64 * sum(u.rank for u in updates) * torch.finfo(torch.float32).eps if dtype == torch.float16 else 0.0
    gram = q_left.mT.double() @ q_left.double()
    assert torch.allclose(gram, torch.eye(len(gram)).double(), atol=max(1e-5, limit))
    for u, c in zip(updates, core.cores):
        assert error(core.lift(c)[0], dense(u)) < max(1e-5, TOLERANCE[dtype])
        assert c.norm().item() == pytest.approx(u.norm(), rel=1e-5)


def test_core_space_of_nearly_dependent_adapters(generator):
    base = update(200, 150, 4, generator)
    for gap in (1e-1, 1e-3, 1e-5, 1e-7):
        noise = update(200, 150, 4, generator, scale=gap)
        near = LowRank(base.left + noise.left, base.right)
        core = Core.of([base, near])
        difference = core.lift(core.cores[1] - core.cores[0])[0]
        reference = dense(near) - dense(base)
        assert float((dense(difference) - reference).norm()) < 1e-6 * base.norm()


@pytest.mark.parametrize(
    "factors, words",
    [
        ((torch.ones(3, 2), torch.ones(3, 4)), r"\(3, 2\) and \(3, 4\)"),
        ((torch.ones(3, 2), torch.ones(2, 4).double()), "float32 and torch.float64"),
        ((torch.ones(3, 2).int(), torch.ones(2, 4).int()), "float dtype"),
    ],
)
def test_wrong_factors_are_refused(factors, words):
    with pytest.raises(ValueError, match=words):
        LowRank(*factors)


def test_wrong_arguments_are_refused(generator):
    a, b = update(5, 4, 2, generator), update(5, 6, 2, generator)
    with pytest.raises(ValueError, match=r"\(5, 4\).*\(5, 6\)"):
        Core.of([a, b])
    with pytest.raises(ValueError, match="one shape"):
        a.inner(b)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        a.truncate(rank=0)
    with pytest.raises(ValueError, match="energy"):
        a.truncate(energy=1.5)
    with pytest.raises(ValueError, match=r"one shape, got \[\(5, 4\), \(5, 6\)\]"):
        add([a, b])


def ill(u, condition, generator):
    """The same float64 update in a gauge of this condition number."""
    q, p = (torch.linalg.qr(torch.randn(u.rank, u.rank, generator=generator, dtype=torch.float64))[0] for _ in "qp")
    return u.regauge((q * torch.logspace(0, math.log10(condition), u.rank, dtype=torch.float64)) @ p)


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("condition", [1e5, 1e6, 1e7])
def test_a_gauge_of_large_condition_moves_no_merge(condition, device, generator):
    updates = [update(60, 50, 8, generator, torch.float64) for _ in range(3)]
    plain, spun = (
        [Adapter({"a": u}) for u in found] for found in (updates, [ill(u, condition, generator) for u in updates])
    )
    for method in ("opcm", "tsv", "whitened_sum"):
        expected = dense(merge(plain, method).modules["a"])
        assert error(merge(spun, method, device=device).modules["a"], expected) < 1e-7, method


def test_a_tiny_adapter_loses_nothing_of_another(generator):
    a, b = (update(30, 20, 4, generator, torch.float64) for _ in range(2))
    tiny = LowRank(b.left * 1e-170, b.right)
    core = Core.of([a, tiny])
    assert error(core.lift(core.cores[0])[0], dense(a)) < 1e-12
    large = LowRank(1e85 * core.lift(core.cores[1])[0].left, 1e85 * core.lift(core.cores[1])[0].right)
    assert error(large, dense(b)) < 1e-12


def test_regauge_goes_where_the_update_is():
    with FakeTensorMode():
        u = LowRank(torch.empty(5, 2, device="meta"), torch.empty(2, 4, device="meta"))
        assert u.regauge(torch.empty(2, 2)).left.device.type == "meta"


@pytest.mark.parametrize("kind", [LowRank, Basis, Core, Sums, Part, Method, Machine, Plan])
def test_what_merges_hand_on_cannot_be_changed(kind):
    """Nor is what holds tensors compared by them, which torch cannot say in one word."""
    said = kind.__dataclass_params__
    assert said.frozen and said.eq == (kind in (Method, Machine, Plan))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("method, options", [("svd", {}), ("ctm", {"rank": 12})])
def test_columns_of_zeros_change_no_merge(method, options, dtype):
    """Which bring the modules of an adapter to one rank, and are no directions."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"a": (16, 16), "b": (16, 16)}
    one, two = (adapter(sizes, 3, generator, dtype) for _ in range(2))
    pad = lambda x: torch.nn.functional.pad(x, (0, 4))  # noqa: E731
    wide = [a.with_modules({n: LowRank(pad(u.left), pad(u.right.mT).mT) for n, u in a.items()}) for a in (one, two)]
    assert {u.rank for u in wide[0].values()} == {7} and {len(u.svd()[1]) for u in wide[0].values()} == {3}
    plain, padded = merge([one, two], method, **options), merge(wide, method, **options)
    for name in sizes:
        assert error(padded[name], dense(plain[name])) < TOLERANCE[dtype]
