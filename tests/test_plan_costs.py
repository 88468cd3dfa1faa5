"""What a plan counts, against the same counts written out factorisation by factorisation; and what it measures."""

import sys

import pytest
import torch

import lora_opcm as lo
from lora_opcm.lab.experiments.cost import Calls
from lora_opcm.merging import table
from lora_opcm.merging.plan import Machine, calibrate
from lora_opcm.numerics import nonzero_svd

PLAN = sys.modules[lo.plan.__module__]
RANKS = [4, 2, 3]
R, T = sum(RANKS), len(RANKS)
SIZES = [(24, 16), (24, 7), (7, 24), (8, 6)]  # room for all ranks; on one side; on none
CALL = 2e6  # operations that starting a factorisation costs


# Golub and Van Loan, for p×q: Householder QR with Q, SVD through the Gram matrix, SVD by divide and conquer
def leading(square, cube, p, q):
    p, q = max(p, q), min(p, q)
    return square * p * q * q + cube * q * q * q + CALL


def qr(p, q):
    return leading(4, 0, p, q)


def svd(p, q):
    return leading(2, 11, p, q)


def thin(p, q):
    return leading(4, 14, p, q)


def frames(p, q):
    """QR of both factors of every core, SVD of r×r, both frames rotated."""
    return sum(qr(p, r) + qr(q, r) + thin(r, r) + 2 * p * r * r + 2 * q * r * r for r in RANKS)


def both(cost, p, q, *rest):
    return cost(p, *rest) + cost(q, *rest)


def opcm(p, q):
    """Blocks of half of the 0, 4 and 6 directions and the new 4, 2, 3; the columns of two frames turned by each; and as
    many calls as four more factorisations have."""
    found = 0.0
    for done, new in ((0, 4), (4, 2), (6, 3)):
        block = min(done, p, q) / 2 + new
        found += svd(block, block) + 2 * block**2 * min(done + new, p) + 2 * block**2 * min(done + new, q) + 4 * CALL
    return found


def whitening(p, q):
    """QᵀU of 4 directions and 2, of 6 and 3: its SVD, and it, QA and (…)Aᵀ for two sides."""
    steps = [(min(done, p, q), new) for done, new in ((4, 2), (6, 3))]
    return frames(p, q) + sum(2 * thin(d, r) + 3 * 2 * p * d * r + 3 * 2 * q * d * r for d, r in steps)


def whitened_sum(p, q):
    """S, L and R from stacked frames, eigenproblems of L and R, L^{-1/2} S R^{-1/2}."""
    return (
        frames(p, q)
        + 2 * p * R * q
        + 2 * p * R * p
        + 2 * q * R * q
        + 9 * p**3
        + 9 * q**3
        + 2 * p * p * q
        + 2 * p * q * q
    )


def chordal(p, q):
    return frames(p, q) + both(thin, p, q, R)


def canonical(p, q):
    return svd(p, T * q) + svd(q, T * p)


def interference(p, q):
    """Σ CᵀC and Σ C(CᵀC), of stacked factors, and an eigenproblem of q×q."""
    return 2 * q * R * q + 2 * p * R * q + 9 * q**3


def dop(p, q):
    """After 6 and 9 directions: eigenproblems of both sides, eight products with cores on either."""
    found = 0.0
    for done in (6, 9):
        a, b = min(done, p), min(done, q)
        found += 9 * a**3 + 9 * b**3 + 8 * 2 * a * a * b + 8 * 2 * a * b * b
    return found


def polar(p, q):
    """SVD, and U Vᵀ."""
    return svd(p, q) + 2 * p * q * min(p, q)


IN_CORE = {  # beside the SVD of what is lifted, which four have already
    "svd": lambda p, q: 0, "iso_c": lambda p, q: 0, "opcm": lambda p, q: opcm(p, q) - svd(p, q),
    "whitening": whitening, "whitened_sum": whitened_sum,
    "chordal_mean": chordal, "core_ties": canonical, "core_dare_ties": canonical, "ctm": canonical,
    "tsv": lambda p, q: frames(p, q) + both(polar, p, q, R) + 2 * p * q * R,
    "iso_cts": lambda p, q: svd(p, q) + frames(p, q) + 2 * polar(p, q),
    "karcher_mean": lambda p, q: chordal(p, q) + 100 * (T + 1) * both(thin, p, q, 2),
    "quotient_mean": lambda p, q: frames(p, q) + thin(p, q) + 50 * T * (thin(2, 2) + 4 * p * 4 + 4 * q * 4),
    "knots_ties": lambda p, q: svd(p, T * q), "subspace_boosting": lambda p, q: 0, "wudi": interference,
    "actmat": interference, "dop": dop,
    "svc": lambda p, q: 2 * p * p * R + 2 * p * R * q,
    "pico": lambda p, q: 2 * p * R * p + 9 * p**3,
    "cat": lambda p, q: 0, "mean": lambda p, q: 0, "task_arithmetic": lambda p, q: 0, "lora_opcm": lambda p, q: 0,
}  # fmt: skip
# Bytes that go by for every entry of every adapter, where a method looks at entries
BYTES = {"ties": 140, "dare": 30, "dare_ties": 130, "magnitude_prune": 40, "core_ties": 140, "core_dare_ties": 130,
         "magmax": 50}  # fmt: skip
DENSE = ["ties", "dare", "dare_ties", "magnitude_prune", "magmax"]
ONE_RANK = ["ctm", "chordal_mean", "lora_opcm"]
COMMON = ["karcher_mean", "quotient_mean"]  # of as many directions as all have


def expected(method, m, n, cut=None):
    """Operations in products and in factorisations, bytes that go by, bytes held, rank of the result."""
    small, p, q, stack = min(m, n), min(R, m), min(R, n), 30 * (m * R + n * R)
    if method in ("cat", "task_arithmetic") and not cut and R <= small:  # as they are stored
        return 0, 0, 0, 0, R
    if method in DENSE:
        return 2 * m * n * R, thin(m, n), T * m * n * BYTES[method] + stack, 8 * m * n * (T + 6), small
    rank = min(max(RANKS) if method in ONE_RANK else min(RANKS) if method in COMMON else R, m, n)
    if method == "regmean":  # Gram matrices of n×n
        work = T * 2 * n**3 / 3 + both(qr, m, n, R) + thin(R, R)
        return 2 * n * n * R, work, 8 * T * n * n, 8 * n * n * (T + 2), rank
    lifted = min(rank, cut or rank)
    products, work = 2 * m * R * lifted + 2 * n * R * lifted, 2 * p * q * R + svd(p, q) + IN_CORE[method](p, q)
    for side in (m, n):
        if side >= R:  # Gram matrix, Cholesky
            products, work = products + side * R * R, work + 2 * R**3 / 3 + 3 * CALL
        else:
            work += qr(side, R) + thin(side, R)
    passed = T * p * q * BYTES.get(method, 0) + stack
    if method == "lora_opcm":
        work += 2 * opcm(p, 4) + 2 * qr(4, R) + 2 * thin(4, R) + both(qr, m, n, 4)
    if method == "knots_ties":
        products, passed = products + 2 * n * R * p * T, 140 * n * p * T + stack
        work += qr(m, p) + qr(n, p) + thin(p, p)
    return products, work, passed, 12 * (m + n) * R + 8 * (T + 6) * p * q, rank


@pytest.mark.parametrize("cut", [None, 2])
@pytest.mark.parametrize("m, n", SIZES)
@pytest.mark.parametrize("method", sorted(table()))
def test_counts_are_those_of_the_factorisations(method, m, n, cut):
    speeds = Machine(bytes_per_second=2.0, matmul=8.0, factor=32.0, threads=3)
    plan = lo.plan({"w": (m, n)}, method, count=T, ranks=RANKS, rank=cut, dtype=torch.float32, machine=speeds)
    products, work, passed, held, rank = expected(method, m, n, cut)
    rank = min(rank, cut or (4 if method == "svd" else rank))
    exactly = lambda x: pytest.approx(x, rel=1e-12)  # noqa: E731
    assert (plan.products, plan.factorisations) == (exactly(products), exactly(work))
    assert (plan.rank, plan.read, plan.written) == (rank, 4 * (m + n) * R, 4 * (m + n) * rank)
    assert plan.peak == plan.read + 8 * (m + n) * rank + 3 * held
    assert plan.seconds == exactly((plan.read + plan.written + passed) / 2 + products / 8 + (work + 8 * CALL) / 32)
    assert plan.space == {"lora_opcm": "updates", "regmean": "updates"}.get(
        method, "dense" if method in DENSE else "core"
    )


def test_counts_of_a_sketch():
    """Of 20 adapters of rank 16, 320 columns, in 200 × 300, cut to 4 by 20 vectors and 10 probes, in float16."""
    m, n, columns = 200, 300, 320
    plan = lo.plan({"w": (m, n)}, "svd", count=20, rank=4, machine=Machine(2.0, 8.0, 32.0))
    assert plan.sketched == 1 and plan.rank == 4 and plan.written == 2 * (m + n) * 4
    assert plan.products == 2 * (m + n) * columns * (6 * 20 + 5 * 10)  # SΩ, two times SᵀQ and SQ, QᵀS; Rω, RᵀR twice
    assert plan.factorisations == 4 * qr(m, 20) + 3 * qr(n, 20) + thin(20, 20)


def test_a_plan_adds_modules_and_holds_the_largest():
    each = [lo.plan({"w": shape}, "tsv", count=T, ranks=RANKS, machine=Machine(2.0, 8.0, 32.0)) for shape in SIZES]
    whole = lo.plan({str(s): s for s in SIZES}, "tsv", count=T, ranks=RANKS, machine=Machine(2.0, 8.0, 32.0))
    for field in ("modules", "read", "products", "factorisations"):
        assert getattr(whole, field) == pytest.approx(sum(getattr(p, field) for p in each), rel=1e-12)
    assert whole.written == 2 * whole.rank * sum(m + n for m, n in SIZES)  # all modules at one rank, by zeros
    seconds = [p.seconds - p.written / 2.0 for p in (whole, *each)]  # but for what is written, at 2 bytes a second
    assert seconds[0] == pytest.approx(sum(seconds[1:]), rel=1e-12)
    assert whole.rank == max(p.rank for p in each) and whole.read == 2 * R * sum(m + n for m, n in SIZES)  # float16
    held = torch.get_num_threads() * max(expected("tsv", *s)[3] for s in SIZES)
    assert whole.peak == whole.read + 4 * whole.written + held


def test_a_plan_is_of_eight_adapters_of_rank_16_unless_told():
    machine = Machine(1.0, 1.0, 1.0)
    assert lo.plan({"w": (99, 98)}, machine=machine) == lo.plan(
        {"w": (99, 98)}, "opcm", count=8, ranks=[16] * 8, rank=None, dtype=torch.float16, machine=machine
    )


def test_speeds_are_amounts_of_the_fastest_of_three_rounds(monkeypatch):
    """With a clock on which the three rounds of each measurement take 3, 0.5 and 2 seconds."""
    took, calls, now = iter([0, 3, 0, 0.5, 0, 2] * 3), [], 0.0
    threads = torch.get_num_threads()

    def clock():
        nonlocal now
        now += next(took)
        return now

    def each(function, items, worth):
        assert len(items) == threads and worth == 0  # all at work at once
        with Calls() as found:
            function(items[0])
        calls.append(found.count)

    monkeypatch.setattr(PLAN.time, "perf_counter", clock)
    monkeypatch.setattr(PLAN, "parallel_map", each)
    calibrate.cache_clear()
    try:
        found = calibrate()
    finally:
        calibrate.cache_clear()
    core = torch.randn(96, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with Calls() as one:
        nonzero_svd(core, torch.float32)
    assert calls == [8] * 3 + [2 * 40] * 3 + [20 * one.count] * 3  # a product with a transpose is two calls
    assert found.bytes_per_second == 8 * threads * 2**20 * 16 / 0.5  # 8 bytes read and 8 written
    assert found.matmul == 40 * threads * 2 * 1024 * 128 * 128 / 0.5
    assert found.factor == 20 * threads * svd(96, 96) / 0.5
