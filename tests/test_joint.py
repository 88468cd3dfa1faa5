"""Joint merges: sums of many adapters and shared columns, against dense float64 and the same step by step."""

import pytest
import torch
from factories import dense, dense_opcm, error, update
from torch.utils._python_dispatch import TorchDispatchMode

from lora_opcm import Adapter, LowRank, merge
from lora_opcm.merging import Basis, Core, Spectrum
from lora_opcm.merging.rules import opcm, project, projection, whitened_sum, whitening
from lora_opcm.merging.rules.frames import Sums, extend


@pytest.fixture(autouse=True)
def locked(monkeypatch):
    """OPCM keeps account of what is locked however few the adapters are."""
    monkeypatch.setattr(projection, "SMALL", 0)


def spectra(count, m=90, n=70, r=4, seed=0, dtype=torch.float64):
    """Updates whose singular values fall by a factor of ten."""
    generator = torch.Generator().manual_seed(seed)
    found = [update(m, n, r, generator, torch.float64) for _ in range(count)]
    return [LowRank(u.left * torch.logspace(0, -1, r, dtype=torch.float64), u.right).to(dtype) for u in found]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_locked_sum_is_the_sum_step_by_step(alpha, dtype):
    core = Core.of(spectra(12, dtype=dtype))
    found = opcm(core, alpha)
    cores = core.cores
    total = cores[0]
    for c in cores[1:]:
        total = total + project(c, total, alpha, "paper", core.dtype)
    assert float((found.dense() - total).norm() / total.norm()) < (1e-7 if dtype == torch.float32 else 1e-10)
    s = torch.linalg.svdvals(total)
    assert torch.allclose(found.s, s[: len(found.s)], atol=1e-7 * float(s[0]))
    assert float((found.u.mT @ found.u - torch.eye(len(found.s)).double()).norm()) < 1e-6


@pytest.mark.parametrize("alpha", [0.2, 0.6])
@pytest.mark.parametrize(
    "case", ["twice", "cancels", "zero between", "zero first", "fills one side", "fills both", "of rank one more"]
)
def test_the_locked_sum_where_ranks_are_not_what_they_seem(case, alpha):
    a, b, c, d = spectra(4)
    nothing = a.zero()
    updates = {
        "twice": [a, b, a, c, b], "cancels": [a, b, a * -1.0, c], "zero between": [a, nothing, b, nothing, c],
        "zero first": [nothing, a, b, nothing], "of rank one more": [a, b, *spectra(2, r=7, seed=2), c, d],
        "fills one side": spectra(9, 10, 60), "fills both": spectra(9, 10, 12),
    }[case]  # fmt: skip
    reference = dense_opcm([{"w": dense(u)} for u in updates if u.rank], alpha, "paper")["w"]
    found = dense(merge([Adapter({"w": u}) for u in updates], "opcm", alpha=alpha, scale=1.0).modules["w"])
    assert float((found / found.norm() - reference / reference.norm()).norm()) < 1e-8


def test_a_step_decomposes_what_is_not_locked_only():
    """Of 16 updates of rank 8 and a flat spectrum, half of what is there and the new 8."""
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "eigh" in function.name() or "svd" in function.name():
                sizes.append(args[0].shape[-1])
            return function(*args, **kwargs or {})

    generator = torch.Generator().manual_seed(0)
    core = Core.of([update(400, 400, 8, generator) for _ in range(16)])
    with Watch():
        opcm(core, 0.5)
    assert len(sizes) == 16 and all(size <= 8 * t * 0.75 + 8 for t, size in enumerate(sizes))


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("sides", ["both", "left", "right"])
def test_sums_at_once_are_sums_one_by_one(power, sides):
    core = Core.of(spectra(5, dtype=torch.float32))
    sums = Sums.empty(*core.shape)
    for svd in core.frames():
        sums = sums.add(svd, power, None, sides)
    expected = sums.left @ sums.core(sides) @ sums.right.mT
    found = whitened_sum(core, power, None, sides)
    assert float((found - expected).norm() / expected.norm()) < 1e-9


def nearest(frame, new):
    p, s, qh = torch.linalg.svd(torch.cat([frame, new], 1), full_matrices=False)
    k = int((s > 1e-6 * s[0]).sum())
    return p[:, :k] @ qh[:k]


@pytest.mark.parametrize("case", ["own", "shared", "twice", "of more ranks"])
def test_whitening_is_the_polar_factor_of_the_stack_step_by_step(case):
    a, b, c = spectra(3)
    updates = {
        "own": [a, b, c], "twice": [a, b, a, c], "of more ranks": [a, *spectra(2, r=9, seed=1), b],
        "shared": [a, LowRank(a.left + 0.01 * b.left, b.right), c],
    }[case]  # fmt: skip
    core = Core.of(updates)
    (u, s, vh), *others = core.frames()
    left, right, spectrum = u, vh.mT, s
    for u, s, vh in others:
        left, right = nearest(left, u), nearest(right, vh.mT)
        spectrum = torch.cat([spectrum, s])
    expected = (left * spectrum) @ right.mT
    assert float((whitening(core) - expected).norm() / expected.norm()) < 1e-9


def test_a_spectrum_is_lifted_as_its_matrix():
    core = Core.of(spectra(3))
    total = core.total()
    one, two = (core.lift(x, rank=5) for x in (total, Spectrum.of(total, core.dtype)))
    assert error(one[0], dense(two[0])) < 1e-12 and one[1] == pytest.approx(two[1])


@pytest.mark.parametrize("small", [0.0, 1e-3, 1e-7])
def test_extend_holds_what_is_outside(small):
    """Two columns outside the frame, of which one nearly depends on the other."""
    generator = torch.Generator().manual_seed(0)
    frame = torch.linalg.qr(torch.randn(30, 6, generator=generator, dtype=torch.float64))[0]
    a, b = torch.randn(2, 30, 1, generator=generator, dtype=torch.float64)
    new = torch.cat([a, a + small * b + 3 * frame[:, :1]], 1)
    beside, inside, outside = extend(frame, new)
    assert beside.shape[1] == (2 if small else 1)
    assert torch.allclose(frame @ inside + beside @ outside, new, atol=1e-9)
    both = torch.cat([frame, beside], 1)
    assert torch.allclose(both.mT @ both, torch.eye(both.shape[1]).double(), atol=1e-8)


# -- bases of columns that are nearly, or exactly, the same ------------------------------------------------------


def started(gap, count=5, dtype=torch.float32):
    """Adapters whose right factors are one random start and a share `gap` of their own."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(6, 150, generator=generator)
    found = []
    for _ in range(count):
        own = update(200, 150, 6, generator)
        found.append(LowRank(own.left, start + gap * own.right).to(dtype))
    return found


@pytest.mark.parametrize("gap", [1.0, 0.1, 0.02, 3e-3, 1e-5, 0.0])
@pytest.mark.parametrize("method", ["opcm", "tsv", "whitened_sum", "iso_c"])
def test_one_random_start_is_merged_within_the_contract(method, gap):
    """However near the factors are, no worse than the same numbers in float64, which takes the rank-revealing way."""
    here, there = ([Adapter({"w": u}) for u in x] for x in (started(gap), started(gap, dtype=torch.float64)))
    there = [a.with_modules({"w": h["w"].to(torch.float64)}) for a, h in zip(there, here, strict=True)]
    expected = dense(merge(there, method).modules["w"])
    assert error(merge(here, method).modules["w"], expected) < 1e-5


@pytest.mark.parametrize("gap, way", [(1.0, torch.float32), (0.02, torch.float64), (0.0, torch.float32)])
def test_what_is_nearly_dependent_takes_float64_columns_and_what_is_the_same_counts_once(gap, way):
    updates = started(gap)
    basis = Basis.of([u.right.mT for u in updates])
    assert basis.nested and basis.columns.dtype == way and basis.columns.shape[1] == (30 if gap else 6)
    q = basis @ torch.eye(len(basis.coords), dtype=torch.float64)
    assert torch.allclose(q.double().mT @ q.double(), torch.eye(q.shape[1]).double(), atol=1e-5)
    whole = torch.cat([u.right.mT for u in updates], 1)
    assert torch.allclose(basis @ basis.coords, whole.to(way), atol=1e-4)


def test_columns_that_may_fill_the_space_are_their_own_coordinates():
    updates = started(1.0, 40)  # 240 columns in 200 and in 150 dimensions
    core = Core.of(updates)
    assert core.shape == (200, 150) and core.left.columns.shape == (200, 200) and not core.left.nested
    assert error(updates[7], core.cores[7]) < 1e-12
