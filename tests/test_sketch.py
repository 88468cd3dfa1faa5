"""Sketched sums of very many adapters, against the exact way and against the bound they state."""

import warnings

import pytest
import torch
from factories import adapter, dense, update

import lora_opcm as lo
from lora_opcm import Adapter, LowRank
from lora_opcm.merging import sketch
from lora_opcm.merging.plan import Machine
from lora_opcm.merging.shards import join, merge_shard
from lora_opcm.merging.sketch import expected, sketched_sum, worth

SHAPE = (200, 260)


def shared(count, common, noise, seed=0, dtype=torch.float32):
    """Updates of rank 8 with `common` directions that all of them have, falling, and the rest their own."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(SHAPE[0], common, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(SHAPE[1], common, generator=generator, dtype=torch.float64))[0]
    found = []
    for _ in range(count):
        own = update(*SHAPE, 8 - common, generator, torch.float64, noise)
        left_ = torch.cat([left * torch.logspace(0, -1, common, dtype=torch.float64), own.left], 1)
        found.append(LowRank(left_, torch.cat([right.mT, own.right])).to(dtype))
    return found


@pytest.mark.parametrize("noise", [0.0, 1e-3, 1e-1])
@pytest.mark.parametrize("seed", range(3))
def test_a_sketch_is_as_near_as_it_says(noise, seed):
    updates = shared(40, 4, noise, seed)
    total = sum(dense(u) for u in updates)
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    found, dropped, bound = sketched_sum(updates, 6, seed)
    off = dense(found) - total
    assert float(torch.linalg.matrix_norm(off, 2)) <= float(s[6] + bound * s[0]) + 1e-5 * float(s[0])
    best = float(s[6:].square().sum())
    assert best * (1 - 1e-6) <= float(off.square().sum()) + 1e-9 * float(s[0]) ** 2
    assert float(off.square().sum()) < 1.1 * best + 1e-10 * float(s.square().sum())
    share = float(off.square().sum()) / float(s.square().sum())
    assert dropped == pytest.approx(share, rel=0.4, abs=1e-9)


def test_the_bound_is_of_what_the_frame_misses_and_no_more_than_some_times_that(monkeypatch):
    """Of 20 sketches with fewer steps: at least what was missed, at most what ten vectors can overrate."""
    updates = shared(40, 4, 0.1)
    total = sum(dense(u) for u in updates)
    largest, next_one = torch.linalg.svdvals(total)[[0, 6]]
    frames = []
    monkeypatch.setattr(sketch, "beside", lambda q, x: frames.append(q) or x - q @ (q.mT @ x))
    missed = []
    for seed in range(20):
        bound = sketched_sum(updates, 6, seed).bound
        q = frames[-1].double()
        missed.append(float(torch.linalg.matrix_norm(total - q @ (q.mT @ total), 2)))
        assert missed[-1] <= bound * float(largest) <= 6 * missed[-1]
    assert sum(missed) / 20 <= expected(SHAPE, 6) * float(next_one)


def test_a_sum_of_no_more_directions_than_asked_is_exact():
    found, dropped, bound = sketched_sum(shared(40, 4, 0.0, dtype=torch.float64), 6, 0)
    total = sum(dense(u) for u in shared(40, 4, 0.0, dtype=torch.float64))
    assert float((dense(found) - total).norm() / total.norm()) < 1e-12 and dropped < 1e-20 and bound < 1e-5
    assert found.rank == 4


def test_where_a_sketch_is_worth_it():
    assert worth((4096, 4096), [16] * 257, 16) and not worth((4096, 4096), [16] * 256, 16)
    assert not worth((4096, 4096), [16] * 400, None) and not worth((200, 4096), [16] * 400, 16)
    assert worth((256, 4096), [16] * 400, 16)


def adapters(count=40):
    """Of three modules, one has 320 columns; one 48, of the few adapters that have it; one is small."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for t in range(count):
        modules = dict(adapter({"c": (9, 7)}, 2, generator).modules) | {"a": shared(1, 4, 0.1, t % 2)[0]}
        found.append(Adapter(modules if t % 7 else modules | {"b": shared(1, 4, 0.1, t)[0]}))
    return found


@pytest.mark.parametrize("method", ["svd", "cat", "task_arithmetic", "mean"])
def test_merges_are_sketched_when_a_rank_is_asked_and_said_to_be(method):
    many = adapters()
    with pytest.warns(UserWarning, match=r"1 of 3 modules were sketched.* rank 4, as sketch=False has it"):
        found = lo.merge(many, method, rank=4)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "sketched")
        exact = lo.merge(many, method, rank=4, sketch=False)
        lo.merge(many, method, energy=0.9, rank=4)
        lo.merge(many, method, rank=4, scale="norm")
        lo.merge(many, "tsv", rank=4)
    for name in "ab":
        assert float((dense(found[name]) - dense(exact[name])).norm() / dense(exact[name]).norm()) < 0.02
    assert torch.equal(found["c"].left, exact["c"].left)
    assert torch.equal(found["a"].left, lo.merge(many, method, rank=4)["a"].left)


def test_shards_of_a_sketched_merge_give_its_bytes(tmp_path):
    paths = [lo.save_adapter(a, tmp_path / f"in{i}") for i, a in enumerate(adapters())]
    whole = lo.merge(paths, "svd", rank=4)
    joined = join([merge_shard(paths, tmp_path / f"{i}.part", (i, 2), "svd", rank=4) for i in (0, 1)])[0]
    for name, u in whole.items():
        assert torch.equal(joined[name].left, u.left) and torch.equal(joined[name].right, u.right)


def test_plans_count_what_a_sketch_saves():
    machine = Machine(1e10, 1e11, 1e10)
    many, few = (lo.plan({"w": (4096, 4096)}, "svd", count=count, rank=16, machine=machine) for count in (512, 256))
    assert (many.sketched, few.sketched) == (1, 0)
    assert many.products + many.factorisations < (few.products + few.factorisations) / 10
    assert lo.plan({"w": (4096, 4096)}, "tsv", count=512, rank=16, machine=machine).sketched == 0


def test_the_mean_bound_is_that_of_halko_martinsson_and_tropp():
    """Corollary 10.10 of arXiv 0909.4061: rank 6, 16 vectors more, two rounds, min(m, n) = 200."""
    without = 1 + (6 / 15) ** 0.5 + 2.718281828459045 * (22 * 194) ** 0.5 / 16
    assert expected(SHAPE, 6) == pytest.approx(without**0.2, rel=1e-12)


def test_large_numbers_do_not_overflow():
    """Products of five updates of size 1e12 are beyond what single precision holds."""
    updates = shared(40, 4, 0.1)
    (found, dropped, bound), (large, same, there) = (sketched_sum([u * f for u in updates], 6, 0) for f in (1.0, 1e12))
    assert float((dense(large) / 1e12 - dense(found)).norm() / dense(found).norm()) < 1e-4
    assert (same, there) == (pytest.approx(dropped, rel=1e-3), pytest.approx(bound, rel=1e-2))
