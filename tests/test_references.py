"""Every rule, option and stream against the dense matrices of `dense_rules`, which know nothing of the package.

A rule held against itself, in another order or dtype, passes whatever it computes.
"""

import warnings

import pytest
import torch
from dense_rules import (
    AUTO,
    RULES,
    auto,
    coordinates,
    cut,
    each,
    elect,
    log,
    opcm,
    opcm_stream,
    quotient_mean,
    span,
    svd,
    whitened_sum,
)
from factories import adapter, dense, error

import lora_opcm as lo

# One module with n below the summed rank 9: its core spans all of Rⁿ, and frames depend on each other.
SHAPES = {"wide": (18, 30), "tall": (33, 8)}
RANKS = (3, 4, 2)
WEIGHTS = (0.7, -1.3, 2.0)


# On a busy machine threads that wait for each other make matrices this small ten times slower.
pytestmark = pytest.mark.usefixtures("one_thread")


def adapters_of(dtype, ranks=RANKS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [adapter(SHAPES, r, generator, dtype) for r in ranks]


def neighbours(dtype, seed=0):
    """Adapters whose leading subspaces are near each other, so that Karcher and quotient means are unique."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    base = {n: (torch.linalg.qr(draw(a, 4))[0], torch.linalg.qr(draw(b, 4))[0]) for n, (a, b) in SHAPES.items()}
    found = []
    for rank in (4, 4, 3):
        modules = {}
        for name, (u, v) in base.items():
            s = torch.tensor([8.0, 5, 3, 2], dtype=torch.float64) * (1 + 0.2 * draw(4))
            left, right = u + 0.05 * draw(*u.shape), v + 0.05 * draw(*v.shape)
            factors = (left * s)[:, :rank], right[:, :rank].mT
            modules[name] = lo.LowRank(*(x.contiguous().to(dtype) for x in factors))
        found.append(lo.Adapter(modules))
    return found


def matrices(adapters, weights=None):
    """module -> [w₁ΔW₁, …] for each, zero where an adapter lacks the module."""
    found = {}
    for name, (m, n) in SHAPES.items():
        zero = torch.zeros(m, n, dtype=torch.float64)
        ds = [dense(a.modules[name]) if name in a.modules else zero for a in adapters]
        found[name] = [w * d for w, d in zip(weights or [1] * len(ds), ds, strict=True)]
    return found


INPUTS = [
    {n: torch.randn(60, s[1], generator=torch.Generator().manual_seed(i)).double() for n, s in SHAPES.items()}
    for i in range(3)
]
GRAMS = [{name: x.mT @ x for name, x in one.items()} for one in INPUTS]


# -- every rule, option and kind of adapter ------------------------------------------------------------------


CASES = [
    ("mean", {}), ("cat", {}), ("task_arithmetic", {}), ("task_arithmetic", {"scale": -0.3}), ("svd", {"scale": 2}),
    ("ties", {}), ("ties", {"density": 0.6, "scale": 2}), ("magnitude_prune", {"density": 0.3, "scale": 2}),
    ("knots_ties", {"density": 0.3}), ("knots_ties", {"density": 0.6, "scale": 2}),
    ("tsv", {}), ("tsv", {"directions": 2, "scale": -1.5}),
    ("whitening", {"scale": 0.4}),
    ("iso_c", {"scale": 0.5}),
    ("iso_cts", {}), ("iso_cts", {"common": 0.4, "scale": 3}),
    ("iso_cts", {"common": 0}), ("iso_cts", {"common": 1}),
    ("core_ties", {"density": 0.3}), ("core_ties", {"density": 0.6, "scale": 2}),
    ("core_ties", {"density": 1}),
    ("core_dare_ties", {"density": 1, "scale": 0.5}),
    ("ctm", {"scale": 2}), ("ctm", {"k": 2}), ("ctm", {"k": 6}),
    ("ctm", {"rule": "ties", "density": 0.3}), ("ctm", {"rule": "ties", "k": 3, "density": 0.7}),
    ("whitened_sum", {}), ("whitened_sum", {"power": 0, "scale": 0.4}),
    ("whitened_sum", {"power": 1}), ("whitened_sum", {"cap": 4}),
    ("whitened_sum", {"power": 0.8, "cap": 5, "scale": -1}),
    ("whitened_sum", {"sides": "left", "scale": 2}), ("whitened_sum", {"sides": "right", "power": 0}),
    ("whitened_sum", {"sides": "left", "power": 1, "cap": 4}), ("whitened_sum", {"sides": "right", "cap": 5}),
    ("chordal_mean", {"scale": 2}), ("chordal_mean", {"k": 2}),
    ("chordal_mean", {"k": 3}), ("chordal_mean", {"k": 5}),
    ("karcher_mean", {"scale": -2}), ("karcher_mean", {"k": 2}),
    ("quotient_mean", {"scale": 3}), ("quotient_mean", {"k": 2}),
    ("regmean", {"grams": GRAMS}),
    ("magmax", {}), ("magmax", {"scale": 2}),
    ("subspace_boosting", {}), ("subspace_boosting", {"beta": 0.3, "scale": 2}),
    ("subspace_boosting", {"beta": 0.85}), ("subspace_boosting", {"beta": 0}), ("subspace_boosting", {"beta": 1}),
    ("svc", {}), ("svc", {"alpha": 0.3, "scale": 2}),
    ("pico", {}), ("pico", {"scale": -1.5}),
    ("wudi", {}), ("wudi", {"ridge": 0.3, "scale": 2}), ("wudi", {"ridge": 0}), ("wudi", {"ridge": 1}),
    ("actmat", {}), ("actmat", {"ridge": 0.1, "scale": 2}), ("actmat", {"ridge": 1}),
    ("dop", {}), ("dop", {"alpha": 0.4, "scale": 2}),
    *[("opcm", {"alpha": alpha, "variant": variant}) for alpha in (0, 0.25, 0.5, 0.75, 1)
      for variant in ("paper", "fusionbench")],
    *[(method, {"scale": "auto"}) for method in ("cat", "mean", "svd", "magnitude_prune", "chordal_mean", "opcm")],
    ("opcm", {"scale": 0.3}), ("opcm", {"alpha": 0.75, "variant": "fusionbench", "scale": -2}),
]  # fmt: skip
NEAR = {"karcher_mean", "quotient_mean"}
SETTINGS = [
    *[(torch.float64, setting) for setting in ("whole", "rank", "energy", "weights", "missing", "zero")],
    (torch.float32, "whole"),
]


def flat(method, options):
    """Whether the merged spectrum has equal values: its leading directions are then up to rounding."""
    one_side = options.get("sides", "both") != "both"  # leaves √(σ‖σ‖) at power 1
    return method in ("iso_c", "iso_cts", "subspace_boosting") or (options.get("power") == 1 and not one_side)


def by_auto(method, options):
    return options.get("scale", "auto" if method in AUTO else None) == "auto"


def unscaled(options):
    return {name: x for name, x in options.items() if (name, x) != ("scale", "auto")}


def setting_id(x):
    return x if isinstance(x, str) else str(x).removeprefix("torch.")


def options_id(x):
    return x if isinstance(x, str) else ",".join(f"{k}={v}" for k, v in x.items() if k != "grams") or "-"


def close(merged, expected, bound):
    assert set(merged.modules) == set(expected)
    for name, x in expected.items():
        assert error(merged.modules[name], x) < bound, name


def changed(adapters, setting):
    """The adapters of a setting, and its common options."""
    if setting == "missing":
        adapters[2] = adapters[2].with_modules({"wide": adapters[2].modules["wide"]})
    if setting == "zero":
        adapters[1] = adapters[1].with_modules({n: 0.0 * u for n, u in adapters[1].modules.items()})
    return adapters, {"rank": {"rank": 2}, "energy": {"energy": 0.7}}.get(setting, {})


@pytest.mark.parametrize("dtype, setting", SETTINGS, ids=setting_id)
@pytest.mark.parametrize("method, options", CASES, ids=options_id)
def test_rules(method, options, dtype, setting):
    adapters, common = changed((neighbours if method in NEAR else adapters_of)(dtype), setting)
    if common and flat(method, options):
        pytest.skip("no leading directions in a flat spectrum")
    weights = WEIGHTS if setting == "weights" else None
    known = {"inputs": INPUTS} if method == "regmean" else unscaled(options)
    expected = RULES[method](matrices(adapters, weights), **known)
    merged = lo.merge(adapters, method, weights=weights, **common, **options)
    if method == "svd" and not common:  # to the largest rank, unless told otherwise
        sizes = [int(torch.linalg.matrix_rank(dense(u))) for a in adapters for u in a.modules.values()]
        common = {"rank": max(sizes)}  # of one that is zero, none
    kept = {n: cut(x, **common) for n, x in expected.items()}
    found = auto(kept, matrices(adapters, weights)) if by_auto(method, options) else kept
    close(merged, found, 1e-5 if dtype == torch.float32 or method in NEAR else 1e-8)
    shares = {n: float((kept[n] - x).norm() / x.norm()) ** 2 for n, x in expected.items()}
    assert merged.dropped == pytest.approx(shares, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("rank", [2, 5])
@pytest.mark.parametrize(
    "method, options",
    [
        ("iso_c", {"scale": 2}),
        ("iso_cts", {}),
        ("iso_cts", {"common": 0.4}),
        ("subspace_boosting", {}),
        ("subspace_boosting", {"beta": 0.9, "scale": 2}),
    ],  # fmt: skip
    ids=options_id,
)
def test_rank_enters_before_a_spectrum_is_made_flat(method, options, rank, dtype):
    adapters = adapters_of(dtype)
    merged = lo.merge(adapters, method, rank=rank, **options)
    expected = RULES[method](matrices(adapters), rank=rank, **options)
    close(merged, auto(expected, matrices(adapters)) if by_auto(method, options) else expected, 1e-5)
    assert {u.rank for u in merged.modules.values()} == {rank}


@pytest.mark.parametrize("beta", [0.2, 0.6])
def test_energy_enters_before_a_spectrum_is_raised(beta, dtype):
    adapters = adapters_of(dtype)
    expected = RULES["subspace_boosting"](matrices(adapters), beta=beta, energy=0.8)
    expected = auto(expected, matrices(adapters))
    close(lo.merge(adapters, "subspace_boosting", beta=beta, energy=0.8), expected, 1e-5)


def test_without_a_ridge_what_interferes_least_does_what_every_task_does(dtype):
    """Where the rows of the updates do not depend on each other, whatever the tasks weigh."""
    adapters = [a.with_modules({"wide": a.modules["wide"]}) for a in adapters_of(dtype)]
    one, other = (lo.merge(adapters, method, ridge=0, scale=1) for method in ("wudi", "actmat"))
    close(one, {"wide": dense(other.modules["wide"])}, 1e-5)
    for a in adapters:
        d = dense(a.modules["wide"])
        assert error(lo.LowRank(dense(one.modules["wide"]) @ d.mT, torch.eye(len(d)).double()), d @ d.mT) < 1e-5


def test_dual_projections_of_tasks_that_share_no_direction_are_their_sum(generator):
    u, v = (torch.linalg.qr(torch.randn(n, 6, generator=generator).double())[0] for n in SHAPES["wide"])
    s = torch.tensor([9, 8, 7, 3, 2, 1]).double()
    adapters = [
        lo.Adapter({"wide": lo.LowRank(u[:, i] * s[i], v[:, i].mT.contiguous())}) for i in ([0, 4], [1, 3], [2, 5])
    ]
    close(lo.merge(adapters, "dop", alpha=0.3, scale=1), {"wide": u @ s.diag() @ v.mT}, 1e-9)


def test_dual_projections_that_never_give_way_are_opcm(dtype):
    """At α = 1 the merged update stays where it acts, and takes of a new one what is outside on both sides."""
    adapters = adapters_of(dtype)
    close(lo.merge(adapters, "dop", alpha=1, scale=1), opcm(matrices(adapters), alpha=1, scale=1.0), 1e-5)


def test_iso_cts_takes_no_direction_of_a_task_that_the_common_ones_hold(dtype, generator):
    """Orthogonal tasks, one large: its residual is zero, the other has one direction left that counts."""
    u, v = (torch.linalg.qr(torch.randn(n, 6, generator=generator).double())[0] for n in SHAPES["wide"])
    s = torch.tensor([9, 8, 7, 3, 2, 1]).double()
    adapters = [
        lo.Adapter({"wide": lo.LowRank(u[:, i] * s[i], v[:, i].mT.contiguous()).to(dtype)})
        for i in (slice(0, 3), slice(3, 6))
    ]
    expected = (9 + 8 + 7 + 3 + 2) / 5 * u[:, :5] @ v[:, :5].mT
    close(lo.merge(adapters, "iso_cts", common=0.7, scale=1), {"wide": expected}, 1e-5)


@pytest.mark.filterwarnings("ignore:karcher_mean")
def test_karcher_mean_of_unrelated_adapters_is_stationary():
    """Far apart, the mean need not be unique: what is returned has no gradient, and beats the chordal mean."""
    adapters = adapters_of(torch.float64, ranks=(3, 3, 3))
    merged, chordal = (lo.merge(adapters, m) for m in ("karcher_mean", "chordal_mean"))
    for name, ds in matrices(adapters).items():
        frames = [svd(dense(x.modules[name]), 3) for x in (merged, chordal)]
        for side in (0, 2):
            at, other = (f[side] for f in frames)
            logs = [log(at, svd(d)[side]) for d in ds]
            assert sum(logs).norm() / 3 < 1e-4 < logs[0].norm()
            assert sum(x.norm() ** 2 for x in logs) < sum(log(other, svd(d)[side]).norm() ** 2 for d in ds)
        u, _, v = frames[0]
        assert error(merged.modules[name], span(u) @ sum(ds) @ span(v)) < 1e-9


def test_means_of_subspaces_warn_where_nearly_nothing_of_the_sum_is_left():
    """X and −X turned by 80° cancel seen through the bisectors, at φ = cos² 40° to both; X and its turn do not."""
    g = torch.Generator().manual_seed(2)
    u, v = (torch.linalg.qr(torch.randn(20, 6, generator=g, dtype=torch.float64))[0] for _ in "uv")
    t, s = torch.tensor(80.0).deg2rad().double(), torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    x, (p, q) = (u[:, :3], v[:, :3]), (t.cos() * z[:, :3] + t.sin() * z[:, 3:] for z in (u, v))
    for method in ("chordal_mean", "karcher_mean"):
        for sign in (-1, 1):
            pair = [lo.Adapter({"w": lo.LowRank(a * s * c, b.mT)}) for (a, b), c in ((x, 1), ((p, q), sign))]
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                merged = lo.merge(pair, method)
            assert any("less than 1 % of the sum" in str(w.message) for w in said) == (sign < 0)
            assert (merged.norm() < 1e-6) == (sign < 0)
    assert float(lo.phi(lo.geometry.chordal_mean([u[:, :3], p]), p)) == pytest.approx(
        torch.tensor(40.0).deg2rad().cos() ** 2
    )


@pytest.mark.parametrize("k", [None, 2])
def test_quotient_mean_of_neighbours_does_not_depend_on_the_start(k):
    adapters = neighbours(torch.float64)
    merged = lo.merge(adapters, "quotient_mean", k=k, steps=200)
    for name, ds in matrices(adapters).items():
        assert error(merged.modules[name], quotient_mean(ds, k, steps=200, start=ds[0])) < 1e-9


def test_quotient_mean_stops_after_its_steps():
    adapters = adapters_of(torch.float64)
    for steps in (1, 3):
        found = each(quotient_mean)(matrices(adapters), steps=steps)
        close(lo.merge(adapters, "quotient_mean", steps=steps), found, 1e-9)


@pytest.mark.parametrize("dtype, setting", SETTINGS, ids=setting_id)
@pytest.mark.parametrize("gauge, alpha", [("given", 0.25), ("balanced", 0.25), ("balanced", 0.75), ("given", 1)])
def test_lora_opcm_is_opcm_on_either_factor(gauge, alpha, dtype, setting):
    adapters, common = changed(adapters_of(dtype, ranks=(3, 3, 3)), setting)
    weights = WEIGHTS if setting == "weights" else [1, 1, 1]
    lefts, rights = {}, {}
    for name, (m, n) in SHAPES.items():
        pairs = []
        for w, a in zip(weights, adapters):
            b, c = torch.zeros(m, 3).double(), torch.zeros(3, n).double()
            if name in a.modules:
                b, c = w * a.modules[name].left.double(), a.modules[name].right.double()
            if gauge == "balanced" and not b.any():
                c = 0 * c
            elif gauge == "balanced":
                u, s, v = svd(b @ c)
                u, v = (x * u[u.abs().argmax(0), range(3)].sign() for x in (u, v))
                b, c = u @ s.sqrt().diag(), s.sqrt().diag() @ v.mT
            pairs.append((b, c))
        lefts[name], rights[name] = zip(*pairs)
    left, right = opcm(lefts, alpha=alpha), opcm(rights, alpha=alpha)
    options = {"weights": WEIGHTS} if setting == "weights" else {}
    merged = lo.merge(adapters, "lora_opcm", gauge=gauge, alpha=alpha, **common, **options)
    close(
        merged,
        {n: cut(left[n] @ right[n], **common) for n in SHAPES},
        1e-5 if dtype == torch.float32 else 1e-8,
    )


# -- random masks: what can be known of them -----------------------------------------------------------------

RANDOM = ["dare", "dare_ties", "core_dare_ties"]


def copies(count, generator):
    """Two adapters of `count` modules, all alike: as many draws of a mask."""
    found = []
    for _ in range(2):
        one = adapter({"a": (5, 6)}, 2, generator, torch.float64).modules["a"]
        found.append(lo.Adapter({f"m{i}": one for i in range(count)}))
    return found


@pytest.mark.parametrize("method", RANDOM)
@pytest.mark.parametrize("density", [0.3, 0.7])
def test_masks_keep_a_share_of_entries_and_rescale_them(method, density, generator):
    """An entry has four outcomes; that only these occur, and how often, fixes the masks' law and the rescaling."""
    adapters = copies(600, generator)
    ds = [dense(a.modules["m0"]) * w for a, w in zip(adapters, (2, -1))]
    u, parts, v = coordinates(ds) if method == "core_dare_ties" else (torch.eye(5), ds, torch.eye(6))
    u, v = u.double(), v.double()
    merged = lo.merge(adapters, method, weights=[2, -1], density=density, scale=3, seed=5)
    seen = torch.stack([u.mT @ dense(x) @ v for x in merged.modules.values()]) / 3 * density
    a, b = parts
    both = a + b if method == "dare" else elect([a, b])
    outcomes = torch.stack([torch.zeros_like(a), a, b, both])
    chances = torch.tensor([(1 - density) ** 2, density * (1 - density), density * (1 - density), density**2])
    chances = chances.double()[:, None, None]
    assert (seen[:, None] - outcomes).abs().amin(1).max() < 1e-9
    for power in (1, 2):  # mean and mean square over modules, in standard errors of a mean
        mean = (chances * outcomes**power).sum(0)
        spread = ((chances * outcomes ** (2 * power)).sum(0) - mean**2).sqrt() / len(seen) ** 0.5
        assert ((seen**power).mean(0) - mean).abs().div(spread).max() < 4.5
    if method == "dare":  # election keeps the sign of what is left, so it alone is biased
        assert torch.allclose((chances * outcomes).sum(0) / density, sum(ds))
    kept = float((seen.abs() > 1e-9).double().mean())
    assert kept == pytest.approx(1 - (1 - density) ** 2, abs=4 * (0.25 / seen.numel()) ** 0.5)


@pytest.mark.parametrize("method", RANDOM)
def test_a_seed_draws_one_mask_a_module(method, generator):
    adapters = copies(3, generator)
    make = lambda adapters, **options: lo.merge(adapters, method, density=0.5, scale=1, **options).modules  # noqa: E731
    same = lambda x, y: torch.equal(x.left, y.left) and torch.equal(x.right, y.right)  # noqa: E731
    one, again, other = make(adapters, seed=1), make(adapters, seed=1), make(adapters, seed=2)
    default, zero = make(adapters), make(adapters, seed=0)
    alone = make([a.with_modules({"m1": a.modules["m1"]}) for a in adapters], seed=1)
    for name in one:
        assert same(one[name], again[name]) and same(default[name], zero[name])
        assert error(one[name], dense(other[name])) > 0.1 < error(one[name], dense(zero[name]))
    assert error(one["m0"], dense(one["m1"])) > 0.1 < error(one["m1"], dense(one["m2"]))
    assert same(one["m1"], alone["m1"])  # a mask depends on the name, not on what else is merged


# -- one adapter at a time -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [None, 3])
@pytest.mark.parametrize("variant, alpha", [("paper", 0.25), ("paper", 0.75), ("fusionbench", 0.6), ("paper", 0)])
def test_a_stream_says_what_it_did(variant, alpha, cap, dtype):
    adapters = adapters_of(dtype, ranks=(3, 4, 2, 5))
    adapters[0] = adapters[0].with_modules({"wide": adapters[0].modules["wide"]})
    adapters[2] = adapters[2].with_modules({n: 0.0 * u for n, u in adapters[2].modules.items()})
    merger = lo.ContinualMerger(alpha=alpha, variant=variant, rank=cap)
    for t, a in enumerate(adapters):
        merger.add(a, name=f"task {t}")
    total, rows = opcm_stream(matrices(adapters), alpha, variant, cap)
    bound, state = 2e-6 if dtype == torch.float32 else 1e-9, merger.state
    history = state.history
    assert [row.pop("name") for row in history] == state.names == [f"task {t}" for t in range(4)]
    for found, expected in zip(history, rows, strict=True):
        assert found == pytest.approx(expected, rel=bound, abs=bound)
    assert state.norms == pytest.approx([row["norm"] for row in rows], rel=bound)
    scale = 1 / rows[-1]["lambda"]
    for name, x in total.items():
        assert error(state.modules[name], x) < 5 * bound
        assert error(merger.adapter(rank=2).modules[name], cut(scale * x, 2)) < 5 * bound
    if cap:
        assert all(row["rank"] <= cap for row in rows) and rows[1]["dropped"] > 0.01
    assert rows[0]["cleared"] == 0 < rows[3]["cleared"]


@pytest.mark.parametrize("power, sides", [(0, "both"), (0.5, "both"), (1, "both"), (0.3, "left"), (0.7, "right")])
@pytest.mark.parametrize("gone", [0, 1, 2])
def test_removed_is_summed_without(gone, power, sides):
    adapters = changed(adapters_of(torch.float64), "missing")[0]
    merger = lo.SumMerger(power=power, scale=1.7, sides=sides)
    summed = lambda adapters: each(whitened_sum)(matrices(adapters), power=power, scale=1.7, sides=sides)  # noqa: E731
    for a in adapters:
        merger.add(a)
    merger.remove(adapters[gone])
    rest = [a for i, a in enumerate(adapters) if i != gone]
    close(merger.adapter(), summed(rest), 1e-8)
    merger.add(adapters[gone])
    whole = summed(adapters)
    close(merger.adapter(), whole, 1e-8)
    if power < 1:
        close(merger.adapter(rank=2), {n: cut(x, 2) for n, x in whole.items()}, 1e-8)


@pytest.mark.parametrize("power, sides", [(0.3, "both"), (0.3, "left"), (1, "right")])
def test_a_capped_sum_is_cut_after_every_adapter(power, sides):
    adapters, merger = adapters_of(torch.float64), lo.SumMerger(power=power, cap=4, sides=sides)
    for t, a in enumerate(adapters, 1):
        merger.add(a)
        found = matrices(adapters[:t])
        expected = each(whitened_sum)(found, power=power, cap=4, sides=sides)
        close(merger.adapter(), auto(expected, found), 1e-8)
        if sides != "both" or power < 1:  # else there is no leading direction
            close(merger.adapter(rank=2), auto({n: cut(x, 2) for n, x in expected.items()}, found), 1e-8)
