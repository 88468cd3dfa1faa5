"""Every method of the registry, held to what the registry says of it."""

import zlib

import pytest
import torch
from factories import adapter, dense, dense_opcm, error
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_opcm as lo
import lora_opcm.merging.method as method_table
from lora_opcm.files import scaled
from lora_opcm.lowrank import LowRank
from lora_opcm.merging import Basis, Core, Spectrum, table
from lora_opcm.merging.merge import Part
from lora_opcm.merging.rules import polar
from lora_opcm.testing import check_method

REGISTRY = table()
SHAPES = {"a": (40, 32), "b": (36, 48)}
T, RANK = 4, 3
SHARED = {"iso_cts", "svc"}  # what it takes of an adapter depends on how many there are
FLAT = {"iso_c", "iso_cts"}  # their point is not to return the one adapter they are given


def stream(dtype=torch.float64, seed=0, rank=RANK, shapes=SHAPES, count=T):
    generator = torch.Generator().manual_seed(seed)
    return [adapter(shapes, rank, generator, dtype) for _ in range(count)]


def grams(count, shapes=SHAPES, seed=9):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        inputs = {
            name: torch.randn(200, n, generator=generator, dtype=torch.float64) for name, (_, n) in shapes.items()
        }
        found.append({name: x.mT @ x for name, x in inputs.items()})
    return found


def _seed(name, seed=0):
    """Every module draws another mask: a hash of the seed and its name."""
    return zlib.crc32(f"{seed} {name}".encode())


def run(method, adapters, neutral=False, order=None, **options):
    entry = REGISTRY[method]
    if neutral:
        options |= {"scale": 1.0} | ({"density": 1.0} if "density" in entry.options else {})
        options |= {"power": 0.0} if "power" in entry.options else {}
        options |= {"beta": 1.0} if "beta" in entry.options else {}
    if entry.data:
        options["grams"] = [grams(len(adapters))[i] for i in (order or range(len(adapters)))]
    return lo.merge(adapters, method, **options)


def distance(a, b):
    """Relative distance of two adapters, the largest over modules."""
    return max(error(a.modules[n], dense(b.modules[n])) for n in b.modules)


SLOW = ("karcher_mean", "quotient_mean")  # a hundred steps a side, in sixty merges


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=[pytest.mark.slow] if m in SLOW else []) for m in sorted(REGISTRY)]
)
def test_what_the_table_says_of_a_method(method):
    """Shapes, bytes, order, gauge, missing and zero modules, precision, scale: at full rank, a rank, an energy."""
    check_method(method)


OPTIONS = [
    ("opcm", {"alpha": 0.9, "variant": "fusionbench"}), ("whitened_sum", {"power": 1, "sides": "left"}),
    ("wudi", {"ridge": 0}), ("ctm", {"rule": "ties", "k": 3}),
]  # fmt: skip
MORE_OPTIONS = [
    ("lora_opcm", {"alpha": 0.2}), ("iso_cts", {"common": 0.3}), ("whitened_sum", {"power": 0.9}),
    ("whitened_sum", {"sides": "right"}), ("actmat", {"ridge": 0.1}), ("dop", {"alpha": 0.3}),
    ("subspace_boosting", {"beta": 0.9}), ("svc", {"alpha": 0.3}), ("tsv", {"directions": 2}),
]  # fmt: skip


@pytest.mark.parametrize(
    "method, options", [*OPTIONS, *(pytest.param(*each, marks=pytest.mark.slow) for each in MORE_OPTIONS)]
)
def test_what_the_table_says_holds_with_options(method, options):
    check_method(method, seed=1, **options)


def test_a_false_claim_is_found():
    """Of a rule that depends on the order, the gauge and one dtype, said not to."""
    try:
        lo.merge_method("first", space="updates", source="a test", keeps="one sum")(lambda updates: updates[0])
        with pytest.raises(AssertionError, match="first with {}: order: it moves the result"):
            check_method("first")
        by_gauge = lambda updates: lo.LowRank(sum(u.left for u in updates), sum(u.right for u in updates))  # noqa: E731
        lo.merge_method("gauged", space="updates", source="a test", keeps="one sum")(by_gauge)
        with pytest.raises(AssertionError, match="gauge: it moves the result"):
            check_method("gauged")
        # A flat spectrum, cut after it is made flat: what holds at full rank does not hold at a rank.
        lo.merge_method("flat", source="a test", keeps="one sum")(lambda core: polar(core.total()))
        with pytest.raises(AssertionError, match="flat with {'rank': 3}: "):
            check_method("flat")
    finally:
        for name in ("first", "gauged", "flat"):
            method_table._table.pop(name, None)


@pytest.mark.parametrize("method", sorted(set(REGISTRY) - FLAT))
def test_identity(method):
    one = stream(count=1)
    assert distance(run(method, one, neutral=True), one[0]) < 1e-6


@pytest.mark.parametrize("method", sorted(FLAT))
def test_flat_methods_keep_the_subspace_of_one_adapter(method):
    one = stream(count=1)
    merged = run(method, one)
    for name, u in one[0].modules.items():
        assert float(lo.phi(merged.modules[name], u)) == pytest.approx(1, abs=1e-6)
        s = merged.modules[name].svd()[1]
        assert float(s.max() / s.min()) == pytest.approx(1, abs=1e-6)


def test_lora_opcm_depends_on_the_gauge_and_the_balanced_gauge_repairs_that():
    given_, spun = stream(), [a.regauge(seed) for seed, a in enumerate(stream())]
    assert distance(run("lora_opcm", spun), run("lora_opcm", given_)) > 0.05
    assert distance(run("lora_opcm", spun, gauge="balanced"), run("lora_opcm", given_, gauge="balanced")) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("method", sorted(REGISTRY))
def test_dtype_in_is_dtype_out(method, dtype):
    merged = run(method, stream(dtype))
    assert {u.dtype for u in merged.modules.values()} == {dtype}
    assert all(torch.isfinite(u.left).all() and u.norm() > 0 for u in merged.modules.values())


@pytest.mark.parametrize(
    "method", sorted(m.name for m in REGISTRY.values() if m.space == "core" and m.name != "knots_ties")
)
def test_core_rules_commute_with_rotations(method):
    """f(P X Qᵀ) = P f(X) Qᵀ: the theorem that lets them run in the core."""
    generator = torch.Generator().manual_seed(5)
    p, q = (torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0] for n in SHAPES["a"])
    plain = [a.with_modules({"a": a.modules["a"]}) for a in stream()]
    turned = [a.with_modules({"a": LowRank(p @ a.modules["a"].left, a.modules["a"].right @ q.mT)}) for a in plain]
    expected = p @ dense(run(method, plain).modules["a"]) @ q.mT
    assert error(run(method, turned).modules["a"], expected) < 1e-6


@pytest.mark.parametrize("method", ["ties", "magnitude_prune", "knots_ties", "magmax"])
def test_element_wise_rules_do_not_commute(method):
    generator = torch.Generator().manual_seed(5)
    q = torch.linalg.qr(torch.randn(32, 32, generator=generator, dtype=torch.float64))[0]
    plain = [a.with_modules({"a": a.modules["a"]}) for a in stream()]
    turned = [a.with_modules({"a": LowRank(a.modules["a"].left, a.modules["a"].right @ q.mT)}) for a in plain]
    options = {"density": 0.3} if "density" in REGISTRY[method].options else {}
    expected = dense(run(method, plain, **options).modules["a"]) @ q.mT
    assert error(run(method, turned, **options).modules["a"], expected) > 0.05


# -- dense float64 references, written from the papers -------------------------------------------------------


def _svd(x, k=None):
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    k = int((s > 1e-6 * s[0]).sum()) if k is None else k
    return u[:, :k], s[:k], vh[:k]


def _ortho(x):
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u @ vh


def _top(x, density):
    flat = x.abs().flatten().sort(descending=True).values
    return torch.where(x.abs() >= flat[max(1, round(density * x.numel())) - 1], x, 0)


def _ties(xs, density):
    xs = [_top(x, density) for x in xs]
    sign = torch.sign(sum(xs))
    hits = sum(((x.sign() == sign) & (x != 0)).double() for x in xs)
    return sum(torch.where(x.sign() == sign, x, 0) for x in xs) / hits.clamp_min(1)


def _largest(ds):
    return torch.stack([d.flatten().abs() for d in ds]).argmax(0)


def _tsv(ds):
    parts = [_svd(d) for d in ds]
    u, v = torch.cat([p[0] for p in parts], 1), torch.cat([p[2].mT for p in parts], 1)
    return _ortho(u) @ torch.cat([p[1] for p in parts]).diag() @ _ortho(v).mT


def _iso(ds):
    u, s, vh = _svd(sum(ds))
    return s.mean() * u @ vh


def _chordal(ds):
    k = len(_svd(ds[0])[1])
    left = torch.linalg.eigh(sum(u @ u.mT for u, _, _ in map(_svd, ds)))[1][:, -k:]
    right = torch.linalg.eigh(sum(vh.mT @ vh for _, _, vh in map(_svd, ds)))[1][:, -k:]
    return left @ left.mT @ sum(ds) @ right @ right.mT


def _knots(ds, density):
    u, s, vh = _svd(torch.cat(ds, 1))
    return u @ s.diag() @ _ties([v.mT for v in vh.split(ds[0].shape[1], 1)], density).mT


def _ctm(ds):
    k = len(_svd(ds[0])[1])
    left = _svd(torch.cat(ds, 1), k)[0]
    right = _svd(torch.cat([d.mT for d in ds], 1), k)[0]
    return left @ left.mT @ sum(ds) @ right @ right.mT


def _whitening(ds):
    u, s, vh = _svd(ds[0])
    for d in ds[1:]:
        nu, ns, nv = _svd(d)
        u, vh, s = _ortho(torch.cat([u, nu], 1)), _ortho(torch.cat([vh.mT, nv.mT], 1)).mT, torch.cat([s, ns])
    return u @ s.diag() @ vh


DENSE = {
    "mean": lambda ds: sum(ds) / len(ds),
    "task_arithmetic": sum,
    "cat": sum,
    "svd": lambda ds: (lambda u, s, vh: u @ s.diag() @ vh)(*_svd(sum(ds), RANK)),
    "ties": lambda ds: _ties(ds, 0.2),
    "magnitude_prune": lambda ds: sum(_top(d, 0.5) for d in ds),
    "magmax": lambda ds: torch.stack([d.flatten() for d in ds]).T[range(ds[0].numel()), _largest(ds)].view_as(ds[0]),
    "knots_ties": lambda ds: _knots(ds, 0.5),
    "tsv": _tsv,
    "iso_c": _iso,
    "ctm": _ctm,
    "chordal_mean": _chordal,
    "whitening": _whitening,
}


@pytest.mark.parametrize("method", sorted(DENSE))
@pytest.mark.parametrize("seed", range(3))
def test_float32_agrees_with_the_dense_float64_reference(method, seed):
    adapters = stream(torch.float32, seed)
    merged = run(method, adapters, scale=1)
    for name in SHAPES:
        assert error(merged.modules[name], DENSE[method]([dense(a.modules[name]) for a in adapters])) < 1e-5


def full_core(deltas):
    """Dense float64 matrices posing as cores: no reduction, every rule sees all m × n entries."""
    m, n = deltas[0].shape
    eye = lambda k: torch.eye(k, dtype=torch.float64)  # noqa: E731
    whole = Core(*(Basis(eye(k), None, eye(k)) for k in (m, n)), [], torch.float32)
    whole.factors.extend(LowRank(d, eye(n)) for d in deltas)
    return whole


IN_CORE = [m.name for m in REGISTRY.values() if m.space == "core" and m.name not in DENSE]


@pytest.mark.parametrize("method", IN_CORE)
@pytest.mark.parametrize("seed", range(3))
def test_float32_in_the_core_agrees_with_the_same_rule_on_dense_float64(method, seed):
    adapters = stream(torch.float32, seed)
    merged = run(method, adapters, scale=1.0)
    for name in SHAPES:
        local = {"seed": _seed(name)} if "seed" in REGISTRY[method].options else {}
        whole = full_core([dense(a.modules[name]) for a in adapters])
        # Stops at a gradient of 1e-6, on a flat part of its objective.
        limit = 1e-4 if method == "karcher_mean" else 1e-5
        found = REGISTRY[method].rule(whole, **local)
        assert error(merged.modules[name], found.dense() if isinstance(found, Spectrum) else found) < limit


@pytest.mark.parametrize("method", ["dare", "dare_ties"])
def test_float32_random_masks_agree_with_float64(method):
    adapters = stream(torch.float32)
    merged = run(method, adapters, scale=1)
    for name in SHAPES:
        deltas = [dense(a.modules[name]) for a in adapters]
        generator = torch.Generator().manual_seed(_seed(name))
        kept = [d * (torch.rand(d.shape, generator=generator, dtype=torch.float64) < 0.5) * 2 for d in deltas]
        assert error(merged.modules[name], sum(kept) if method == "dare" else _ties(kept, 1.0)) < 1e-5


def test_every_method_has_a_dense_reference():
    elsewhere = {"regmean", "lora_opcm", "dare", "dare_ties"}  # tests of their own
    assert set(REGISTRY) == set(DENSE) | set(IN_CORE) | elsewhere


def test_regmean_is_least_squares():
    adapters, statistics = stream(), grams(T)
    merged = lo.merge(adapters, "regmean", grams=statistics)
    for name in SHAPES:
        numerator = sum(dense(a.modules[name]) @ g[name] for a, g in zip(adapters, statistics))
        assert error(merged.modules[name], numerator @ torch.linalg.inv(sum(g[name] for g in statistics))) < 1e-6
    with pytest.raises(ValueError, match="grams"):
        lo.merge(adapters, "regmean")


@pytest.mark.parametrize("times", [1e-8, 1e8])
def test_regmean_does_not_see_the_size_of_inputs_that_span_too_little(times):
    """Of three samples in a layer of 32 and 48 inputs."""
    generator, adapters, inputs = torch.Generator().manual_seed(4), stream(count=2), []
    for _ in adapters:
        xs = {n: torch.randn(3, shape[1], generator=generator, dtype=torch.float64) for n, shape in SHAPES.items()}
        inputs.append({n: x.mT @ x for n, x in xs.items()})
    one = lo.merge(adapters, "regmean", grams=inputs)
    other = lo.merge(adapters, "regmean", grams=[{n: times * g for n, g in each.items()} for each in inputs])
    assert all(error(other.modules[n], dense(u)) < 1e-5 for n, u in one.modules.items())


def test_quotient_mean_of_regauged_copies_is_the_adapter():
    one = stream(count=1)[0]
    copies = [one, one.regauge(1), one.regauge(2)]
    assert distance(lo.merge(copies, "quotient_mean"), one) < 1e-6


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(REGISTRY)), st.lists(st.integers(1, 5), min_size=2, max_size=4), st.integers(0, 99))
def test_mixed_ranks(method, ranks, seed):
    generator = torch.Generator().manual_seed(seed)
    adapters = [adapter(SHAPES, r, generator) for r in ranks]
    if method == "lora_opcm" and len(set(ranks)) > 1:
        with pytest.raises(ValueError, match="equal ranks"):
            run(method, adapters)
        return
    merged = run(method, adapters, rank=2)
    assert all(u.rank <= 2 and u.shape == SHAPES[n] for n, u in merged.modules.items())


def test_weights_rank_and_energy():
    adapters = stream()
    weights = [0.7, -0.4, 0.0, 2.0]
    merged = lo.merge(adapters, "cat", weights=weights)
    for name in SHAPES:
        assert error(merged.modules[name], sum(w * dense(a.modules[name]) for w, a in zip(weights, adapters))) < 1e-9
    assert all(u.rank == 5 for u in lo.merge(adapters, "cat", rank=5).modules.values())
    kept = lo.merge(adapters, "cat", energy=0.6)
    assert all(0.6 <= (kept.modules[n].norm() / lo.merge(adapters, "cat").modules[n].norm()) ** 2 < 1 for n in SHAPES)


def test_a_missing_module_counts_as_zero():
    whole, part = stream()[0], stream(seed=1, shapes={"b": SHAPES["b"]})[0]
    merged = lo.merge([whole, part], "cat")
    assert error(merged.modules["a"], dense(whole.modules["a"])) < 1e-9
    half = lo.merge([whole, part], "mean")
    assert error(half.modules["a"], dense(whole.modules["a"]) / 2) < 1e-9
    for method in sorted(set(REGISTRY) - {"regmean", "lora_opcm"}):
        assert torch.isfinite(dense(lo.merge([whole, part], method).modules["a"])).all(), method


@pytest.mark.parametrize("method", sorted(m.name for m in REGISTRY.values() if m.gauge_invariant and not m.data))
def test_gauge_invariance_with_an_adapter_given_twice(method):
    a, b = stream(count=2)
    copies = [a, a.regauge(1), b], [a, a.regauge(2), b]
    assert distance(*(run(method, each) for each in copies)) < 1e-6


def test_identical_adapters():
    one = stream(torch.float32)[0]
    for method in sorted(set(REGISTRY) - {"regmean"}):
        merged = lo.merge([one, one, one], method)
        assert all(torch.isfinite(u.left).all() and u.rank <= 40 for u in merged.modules.values()), method


def test_registry_opcm_is_the_streaming_one():
    adapters = stream()
    for variant in ("paper", "fusionbench"):
        merger = lo.ContinualMerger(alpha=0.4, variant=variant)
        for a in adapters:
            merger.add(a)
        assert distance(merger.adapter(), lo.merge(adapters, "opcm", alpha=0.4, variant=variant)) < 1e-9
    reference = dense_opcm([{n: dense(u) for n, u in a.modules.items()} for a in adapters], 0.4, "paper")
    assert all(error(lo.merge(adapters, "opcm", alpha=0.4).modules[n], reference[n]) < 1e-6 for n in SHAPES)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"method": "opmc"}, "unknown method 'opmc'; the methods are .*opcm"),
        ({"method": "opcm", "beta": 1}, r"opcm has no option \['beta'\]; it takes \['alpha'"),
        ({"method": "opcm", "alpha": 1.5}, "1.5"),
        ({"method": "opcm", "variant": "x"}, "'paper' or 'fusionbench'"),
        ({"method": "ties", "density": 0}, "density"),
        ({"method": "ctm", "rule": "x"}, "'sum' or 'ties'"),
        ({"method": "cat", "weights": [1.0]}, "expected 4 weights"),
        ({"method": "cat", "weights": [1.0, float("nan"), 1, 1]}, "finite"),
        ({"method": "cat", "rank": 0}, "at least 1, got 0"),
        ({"method": "cat", "rank": 2.5}, "rank must be None or an integer of at least 1, got 2.5"),
        ({"method": "cat", "energy": 0}, r"energy must be None or a number in \(0, 1\], got 0"),
        ({"method": "tsv", "directions": -1}, "directions must be None or an integer of at least 1, got -1"),
        ({"method": "tsv", "directions": 0}, "directions must be"),
        ({"method": "tsv", "directions": "x"}, "directions must be .* got 'x'"),
        ({"method": "ctm", "k": -1}, "k must be"),
        ({"method": "karcher_mean", "k": -1}, "k must be"),
        ({"method": "quotient_mean", "k": 0}, "k must be"),
        ({"method": "quotient_mean", "steps": None}, "steps must be"),
        ({"method": "whitened_sum", "cap": -1}, "cap must be"),
        ({"method": "whitened_sum", "cap": 0}, "cap must be"),
        ({"method": "whitened_sum", "power": -3}, r"power must be a number in \[0, 1\], got -3"),
        ({"method": "whitened_sum", "sides": "outputs"}, "sides must be 'both' or 'left' or 'right'"),
        ({"method": "iso_cts", "common": 7}, "common must be"),
        ({"method": "wudi", "ridge": -1}, "ridge must be"),
        ({"method": "svc", "alpha": 0}, "alpha must be"),
        (
            {"method": "tsv", "scale": "x"},
            "scale must be a finite number, 'auto', 'norm' or a multiple of it such as '2norm', got 'x'",
        ),
        ({"method": "tsv", "scale": float("nan")}, "scale must be"),
        ({"method": "tsv", "scale": True}, "scale must be"),
    ],
)
def test_wrong_arguments_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        lo.merge(stream(), **arguments)
    if "weights" not in words and "finite" not in words:  # nor with one adapter, which no method has work with
        with pytest.raises(ValueError, match=words):
            lo.merge(stream(count=1), **arguments)


@pytest.mark.parametrize("method", sorted(REGISTRY))
@pytest.mark.parametrize("dtype, count", [(torch.float16, 4), (torch.float64, 4), (torch.float64, 1)])
def test_a_module_that_is_zero_in_all_adapters_stays_zero(method, dtype, count):
    """As every module of a fresh LoRA."""
    adapters = stream(dtype)[:count]
    for a in adapters:
        a.modules["b"].left.zero_()
    merged = run(method, adapters)
    assert merged.modules["b"].norm() == 0 and merged.modules["b"].shape == SHAPES["b"]
    assert merged.modules["a"].norm() > 0


@pytest.mark.parametrize("method", sorted(set(REGISTRY) - {"lora_opcm"}))
def test_scale_norm_gives_the_mean_norm_wherever_it_is_taken(method):
    adapters = stream()
    merged = run(method, adapters, scale="norm", rank=99 if method == "svd" else None)  # it is taken before a cut
    assert merged.norm() == pytest.approx(sum(a.norm() for a in adapters) / T, rel=1e-6)


@pytest.mark.parametrize("method", sorted(REGISTRY))
@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_what_is_small_or_large_is_told_by_the_updates_alone(method, size):
    """All of them times a number give the merge times that number."""
    adapters = stream(count=3)
    sized = [a.with_modules({n: u * size for n, u in a.modules.items()}) for a in adapters]
    one, other = run(method, adapters), run(method, sized)
    assert other.norm() == pytest.approx(size * one.norm(), rel=1e-6)
    assert all(error(other.modules[n], size * dense(u)) < 1e-5 for n, u in one.modules.items())


@pytest.mark.parametrize("method", sorted(set(REGISTRY) - {"regmean"}))
def test_the_defaults_that_the_table_says_are_those_of_the_merge(method):
    adapters, entry = stream(), REGISTRY[method]
    silent, told = lo.merge(adapters, method), lo.merge(adapters, method, scale=entry.scale, **entry.options)
    assert all(torch.equal(u.left, told.modules[n].left) for n, u in silent.modules.items())


def test_the_two_ways_to_call_and_no_other(tmp_path):
    a, b = stream(count=2)
    path = lo.save_adapter(b, tmp_path / "b")
    expected = lo.merge(a, b, method="tsv")
    for found in (lo.merge([a, b], "tsv"), lo.merge([a, path], method="tsv"), lo.merge(iter([a, str(path)]), "tsv")):
        assert all(torch.equal(found.modules[n].left, u.left) for n, u in expected.modules.items())
    assert distance(lo.merge([a, b]), lo.merge(a, b, method="opcm")) == 0
    for wrong in (([a, b], "tsv", "cat"), ([a, b], a), ([a, b], "tsv", a)):
        with pytest.raises(TypeError, match=rf"expected merge\(a, b, …\) .* got {len(wrong)} arguments"):
            lo.merge(*wrong)


def test_the_factor_of_a_merge_by_hand():
    """Squared norms of the sum, then of two parts: 5 of 3 and 2; of a second group 2 of 1 and 3."""
    factor = lambda scale, **sizes: Part(lo.Adapter({}), sizes, scale).factor  # noqa: E731
    v, w = [[9.0, 1.0, 4.0], [4.0, 1.0, 1.0]], [[16.0, 8.0, 0.0], [0.0, 0.0, 8.0]]
    assert factor(0.7, v=v, w=w) == 0.7
    assert factor("norm", v=v[:1], w=w[:1]) == 0.5 and factor("3norm", v=v[:1], w=w[:1]) == 1.5
    assert factor("norm", v=v, w=w) == 0.5 * 1
    assert factor("norm", w=[[0.0, 0.0, 0.0]]) == 1 and factor("2norm", w=[[0.0, 1.0], [4.0, 1.0]]) == 1
    assert factor("norm") == 1 == factor("auto")  # of no module
    assert factor("auto", v=v[:1]) == 2**0.5 * 1.5 / 3 and factor("auto", v=[[4.0, 1.0]], w=[[5.0, 3.0]]) == 2 / 3
    assert factor("auto", v=[[1.0, *[9.0] * 5]]) == 6  # of five parts as of four
    assert factor("auto", v=[[1.0, 9.0, 0.0]], w=[[0.0, 0.0, 0.0]]) == 3  # one that is zero is none
    assert factor("auto", w=[[0.0, 0.0]]) == 1 == factor("auto", w=[[1e-13, 1.0, 1.0]])  # rounding stays what it is
    cut = lo.Adapter({}, dropped={"v": 0.75})
    assert Part(cut, {"v": [[16.0, 4.0]], "w": [[0.0, 0.0]]}, "auto").factor == 1  # of what is left
    assert Part(cut, {"v": [[16.0, 4.0]]}, "norm").factor == 0.5


MORE = [(1, 1), (4, 2), (8, 2)]  # 1, 2 and 4 are tried by `check_method`, too


@pytest.mark.parametrize("count, times", [(2, 2**0.5), *(pytest.param(n, t, marks=pytest.mark.slow) for n, t in MORE)])
@pytest.mark.parametrize("method", sorted(REGISTRY))
def test_auto_is_the_root_of_their_number_and_at_most_two_mean_norms(method, count, times):
    """Of the finished adapter: as it comes, cut, with a module missing, in half precision, with a weight of zero."""
    if method == "karcher_mean" and count > 2:
        pytest.skip("a hundred steps a side")
    adapters = stream(count=count)
    less = [a.with_modules({"a": a.modules["a"]}) if i else a for i, a in enumerate(adapters)]
    half = [lo.Adapter({n: u.to(torch.float16) for n, u in a.modules.items()}) for a in adapters]
    weights = [(-2) ** i for i in range(count - 1)] + [0] if count > 1 else [3]
    used, T = (count - 1, min((count - 1) ** 0.5, 2)) if count > 1 else (1, 1)
    mean = lambda found, n=count: sum(a.norm() for a in found) / n  # noqa: E731
    weighted = T * sum(abs(w) * a.norm() for w, a in zip(weights, adapters, strict=True)) / used
    for parts, options, expected, rounding in (
        (adapters, {}, times * mean(adapters), 1e-6),
        (adapters, {"rank": 2}, times * mean(adapters), 1e-6),
        (adapters, {"energy": 0.5}, times * mean(adapters), 1e-6),
        (less, {"rank": 4}, times * mean(less), 1e-6),
        (half, {"rank": 2}, times * mean(half), 2e-3),
        (adapters, {"weights": weights}, weighted, 1e-6),
    ):
        merged = run(method, parts, scale="auto", **options)
        assert merged.norm() == pytest.approx(expected, rel=rounding), options
        plain = run(method, parts, scale=1, **options)
        assert merged.factor == pytest.approx(expected / plain.norm(), rel=rounding)
        assert plain.factor == 1 == (2.0 * merged).factor  # of other numbers nothing is known
        assert (merged - merged.factor * plain).norm() < rounding * expected  # and nothing but a factor


@pytest.mark.parametrize("method", sorted(m.name for m in REGISTRY.values() if m.scale == "auto"))
def test_by_default_one_adapter_is_itself_and_what_does_nothing_does_not_count(method):
    one, two = stream(count=2)
    exact = {name: x for name, x in (("density", 1), ("power", 0), ("beta", 1)) if name in REGISTRY[method].options}
    if method not in FLAT:
        assert distance(lo.merge(one, method=method, **exact), one) < 1e-6
    merged, zero = lo.merge(one, two, method=method, **exact), 0.0 * two
    assert distance(lo.merge(one, two, zero, method=method, **exact, scale="auto"), merged) < 1e-6 or method in SHARED
    for more, weights in ((zero, [1, 1, 1]), (two, [1, 1, 0])):
        assert lo.merge(one, two, more, method=method, weights=weights).norm() == pytest.approx(
            lo.merge(one, two, method=method).norm(), rel=1e-6
        )


@pytest.mark.parametrize("scale, left", [("auto", 1), ("norm", 1), ("0.5norm", 0.5)])
@pytest.mark.parametrize("method", ["cat", "tsv", "svc", "whitened_sum"])
def test_of_updates_that_cancel_the_rounding_is_not_blown_up(method, scale, left):
    one = stream(torch.float32, count=1)[0]
    merged = lo.merge(one, one.regauge(1), method=method, weights=[1, -1], scale=scale)
    assert merged.factor == left and merged.norm() < 1e-5 * one.norm()


def test_a_large_factor_goes_to_both_sides():
    one = lo.LowRank(torch.full((3, 1), 300.0), torch.full((1, 3), 0.01)).to(torch.float16)
    whole = lo.Adapter({"a": one})
    assert scaled(whole, whole.modules, 900.0).modules["a"].norm() == pytest.approx(900 * one.norm(), rel=2e-3)
    with pytest.raises(lo.AdapterError, match="a: the merge is not finite in torch.float16"):
        scaled(whole, whole.modules, 1e9)
    flipped = scaled(whole, whole.modules, -4.0).modules["a"]
    assert error(flipped, -4 * dense(one)) < 1e-3


def test_wrong_adapters_are_refused():
    with pytest.raises(ValueError, match="at least one adapter"):
        lo.merge([])
    other = stream(shapes={"a": (40, 30), "b": SHAPES["b"]})[0]
    with pytest.raises(ValueError, match=r"a has shape \(40, 30\), in an earlier adapter \(40, 32\)"):
        lo.merge([stream()[0], other])


def test_table_lists_every_method():
    shown = lo.methods()
    assert list(shown.index) == list(REGISTRY)
    assert shown.loc["opcm", "order matters"] and not shown.loc["lora_opcm", "gauge-invariant"]


@pytest.mark.parametrize("method", ["opcm", "cat", "ties", "lora_opcm"])
def test_what_truncation_drops_is_reported(method):
    adapters = stream()
    exact, cut = lo.merge(adapters, method), lo.merge(adapters, method, rank=2)
    for name, u in exact.modules.items():
        s = u.svd()[1]
        assert cut.dropped[name] == pytest.approx(float(s[2:].square().sum() / s.square().sum()), abs=1e-9)
        assert cut.modules[name].rank == 2


@pytest.mark.parametrize("method", ["cat", "task_arithmetic"])
def test_a_plain_sum_is_the_stored_factors_side_by_side(method, generator):
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    one, other = (lo.LowRank(normal(9, r), normal(r, 12)) for r in (2, 3))
    found = lo.merge([lo.Adapter({"w": one}), lo.Adapter({"w": other})], method, scale=1.0)["w"]
    assert found.left.equal(torch.cat([one.left, other.left], 1))
    assert found.right.equal(torch.cat([one.right, other.right]))


@pytest.mark.parametrize("options", [{}, {"rank": 2}, {"energy": 0.7}, {"common": 0.3}])
def test_iso_cts_of_what_cancels_is_nothing(options):
    """p − p in another gauge: of the sum rounding is left, and no direction of a task beside it."""
    (p,) = stream(torch.float32, count=1)
    merged = lo.merge([p, p.regauge(seed=1)], "iso_cts", weights=[1, -1], scale=1.0, **options)
    assert merged.norm() < 1e-4 * p.norm()
