"""What tables, reports and plans say, against numbers from dense matrices and from hand."""

import html
import json
import math
import re
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from by_hand import norm, random_factors, run, svd, write_peft
from scipy.linalg import subspace_angles
from scipy.stats import beta

import lora_opcm as lo
from lora_opcm.plan import Machine
from lora_opcm.report import adapter_map, advice, heat_map

# Two shapes, so that means of ratios are no ratios of means, and no side can stand for the other.
SHAPES = {"layers.1.up": (40, 12), "layers.0.q": (24, 18)}


@pytest.fixture
def said(capsys, monkeypatch, tmp_path):
    return lambda *words, code=0: run(capsys, monkeypatch, tmp_path, *words, code=code)


@pytest.fixture
def abc(tmp_path):
    """Folders a, b, c of ranks 4, 5, 3 that lean to each other more in inputs than in outputs, and their ΔW."""
    rng = np.random.default_rng(5)
    a = random_factors(rng, SHAPES, 4)
    found = {"a": a}
    for name, rank, out, into in (("b", 5, 0.4, 1.5), ("c", 3, -1.0, 0.7)):
        found[name] = {}
        for module, (m, n) in SHAPES.items():
            left = rng.normal(size=(m, rank))
            right = rng.normal(size=(rank, n))
            left[:, :3] += out * a[module][0][:, :3]
            right[:3] += into * a[module][1][:3]
            found[name][module] = left, right
    return {name: write_peft(tmp_path / name, f, alpha={"layers.0.q": 7}) for name, f in found.items()}


def by_svd(x, y, k, l):
    """The columns of one row of `similarity`, of dense matrices."""
    (ux, sx, vx), (uy, sy, vy) = svd(x), svd(y)
    k, l = min(k, len(sx)), min(l, len(sy))
    row = {
        "norm_a": np.linalg.norm(x), "norm_b": np.linalg.norm(y),
        "energy_a": (sx[:k] ** 2).sum() / (x**2).sum(), "energy_b": (sy[:l] ** 2).sum() / (y**2).sum(),
        "cosine": (x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum()),
    }  # fmt: skip
    for side, p, q in (("left", ux[:, :k], uy[:, :l]), ("right", vx[:k].T, vy[:l].T)):
        row[f"phi_{side}"] = ((p.T @ q) ** 2).sum() / min(k, l)
        row[f"null_{side}"] = max(k, l) / len(p)
        row[f"angle_{side}"] = subspace_angles(p, q).min()  # scipy lists them from the largest
    return row


# -- similarity ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k, l", [(2, 4), (4, 2), (1, 3), (3, 1), (9, 2), (8, 8)])
def test_every_column_of_similarity_is_that_of_dense_svds(abc, tmp_path, k, l):
    table = lo.similarity(lo.load_adapter(tmp_path / "a"), lo.load_adapter(tmp_path / "b"), k, l)
    assert list(table.index) == list(lo.load_adapter(tmp_path / "a").modules)
    for name in SHAPES:
        for column, expected in by_svd(abc["a"][name], abc["b"][name], k, l).items():
            assert table.loc[name, column] == pytest.approx(expected, rel=1e-9, abs=1e-9), column
        # Of one direction with several, φ follows a Beta law exactly.
        k_here, l_here = min(k, 4), min(l, 5)
        if min(k_here, l_here) == 1:
            d = max(k_here, l_here)
            for side, n in zip(("left", "right"), SHAPES[name]):
                expected = beta.sf(table.loc[name, f"phi_{side}"], d / 2, (n - d) / 2)
                assert table.loc[name, f"p_{side}"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("k, l", [(2, 3), (4, 2)])
def test_p_values_are_the_share_of_uniform_subspaces_that_overlap_more(abc, tmp_path, k, l):
    rng = np.random.default_rng(0)
    table = lo.similarity(lo.load_adapter(tmp_path / "a"), lo.load_adapter(tmp_path / "c"), k, l)
    for name in SHAPES:
        for side, n in zip(("left", "right"), SHAPES[name]):
            frames = np.linalg.qr(rng.normal(size=(20_000, n, k)))[0]
            drawn = (frames[:, :l] ** 2).sum((1, 2)) / min(k, l)  # against the first l axes
            assert table.loc[name, f"p_{side}"] == pytest.approx(
                (drawn >= table.loc[name, f"phi_{side}"]).mean(), abs=0.02
            )


def test_a_zero_update_has_a_norm_and_nothing_else():
    rng = np.random.default_rng(1)
    left, right = (torch.as_tensor(rng.normal(size=s)) for s in ((9, 2), (2, 7)))
    some, none = (lo.Adapter({"w": lo.LowRank(x * left, right)}) for x in (1.0, 0.0))
    row = lo.similarity(none, some, 1, 2).loc["w"]
    assert row.norm_a == 0 and row.norm_b == pytest.approx(float((left @ right).norm())) and row.energy_b == 1
    assert row.drop(["norm_a", "norm_b", "energy_b"]).isna().all()


# -- inspect -------------------------------------------------------------------------------------------------


def test_inspect_gives_every_number_of_every_module(said, tmp_path):
    """A module of full rank, one whose last two columns are equal, one that is zero, and a full tensor."""
    rng = np.random.default_rng(2)
    factors = random_factors(rng, SHAPES | {"twin": (10, 8), "zero": (6, 5)}, 6)
    factors["layers.0.q"] = rng.normal(size=(24, 2)), rng.normal(size=(2, 18))
    factors["twin"][0][:, -1], factors["twin"][1][-1] = factors["twin"][0][:, -2], factors["twin"][1][-2]
    factors["zero"] = np.zeros((6, 3)), rng.normal(size=(3, 5))
    deltas = write_peft(
        tmp_path / "x", factors, alpha={"layers.1.up": 3, "twin": 12}, full={"head.weight": torch.ones(3, 5)},
        modules_to_save=["head"], base_model_name_or_path="org/model",
    )  # fmt: skip
    found = json.loads(said("inspect", "x", "--json").out)
    rows = {row["module"]: row for row in found.pop("table")}
    assert rows.keys() == factors.keys()
    for name, row in rows.items():
        s = svd(deltas[name])[1]
        m, n = deltas[name].shape
        assert row["shape"] == f"{m}×{n}" and row["rank"] == factors[name][0].shape[1]
        assert row["scale"] == {"layers.1.up": 0.5, "twin": 2.0}.get(name, 1.0)
        assert row["spectrum"] == pytest.approx(list(s))
        assert row["‖ΔW‖"] == pytest.approx(np.linalg.norm(deltas[name]))
        if name != "zero":
            assert row["σ₁"] == pytest.approx(np.linalg.norm(deltas[name], 2))
            assert row["effective rank"] == pytest.approx(s.sum() ** 2 / (s**2).sum())
            assert row["energy in 4"] == pytest.approx((s[:4] ** 2).sum() / (s**2).sum())
    assert [rows["zero"][c] for c in ("σ₁", "effective rank", "energy in 4", "spectrum")] == [0, 0, 0, []]
    assert found.pop("odd") == [
        "zero is zero", "twin has rank 5, stored as 6", "head.weight is stored in full ((3, 5)), not as factors",
    ]  # fmt: skip
    assert found.pop("norm") == pytest.approx(norm(deltas), abs=5e-5)
    numbers = 6 * (40 + 12) + 2 * (24 + 18) + 6 * (10 + 8) + 3 * (6 + 5)
    assert found == {
        "source": found["source"], "format": "peft", "base model": "org/model", "dtype": "float64", "modules": 4,
        "numbers stored": numbers,
    }  # fmt: skip


# -- compare -------------------------------------------------------------------------------------------------

PAIRS = [("a", "b"), ("a", "c"), ("b", "c")]


@pytest.mark.parametrize("k, l", [(2, 3), (3, 2), (2, None)])
def test_compare_is_a_mean_over_modules(said, abc, k, l):
    """ "× chance" is the mean of the modules' ratios, not the ratio of their means."""
    words = ["compare", *abc, "--k", k, *(["--l", l] if l else [])]
    rows = json.loads(said(*words, "--json").out)
    assert [row["pair"] for row in rows] == [f"{x} + {y}" for x, y in PAIRS]
    for row, (x, y) in zip(rows, PAIRS):
        t = pd.DataFrame([by_svd(abc[x][n], abc[y][n], k, l or k) for n in SHAPES])
        ratio = {side: np.mean(t[f"phi_{side}"] / t[f"null_{side}"]) for side in ("left", "right")}
        assert ratio["left"] != pytest.approx(t.phi_left.mean() / t.null_left.mean(), rel=0.002)
        assert row == {"pair": row["pair"], "modules": 2} | {
            name: pytest.approx(value)
            for name, value in {
                "cosine": t.cosine.mean(),
                "φ outputs": t.phi_left.mean(),
                "× chance": ratio["left"],
                "φ inputs": t.phi_right.mean(),
                "× chance ": ratio["right"],
                "smallest angle, °": math.degrees(min(t.angle_left.min(), t.angle_right.min())),
            }.items()
        }
    said_so = f"leading {k} directions" + (f" of the first and {l} of the second" if l else "")
    assert f"{said_so}, means over modules; 1 × chance" in said(*words).out.replace("\n", " ")


def test_compare_by_module_gives_each_its_own_row(said, abc):
    rows = json.loads(said("compare", *abc, "--k", 3, "--l", 1, "--modules", "--json").out)
    names = list(lo.load_adapter("a").modules)
    assert [(row["pair"], row["module"]) for row in rows] == [
        (f"{x} + {y}", n) for x, y in PAIRS for n in names
    ]
    for row, (x, y, n) in zip(rows, [(x, y, n) for x, y in PAIRS for n in names]):
        t = by_svd(abc[x][n], abc[y][n], 3, 1)
        assert [row["cosine"], row["φ outputs"], row["φ inputs"]] == pytest.approx(
            [t["cosine"], t["phi_left"], t["phi_right"]]
        )
        assert row["× chance"] == pytest.approx(t["phi_left"] * SHAPES[n][0] / 3)
        assert row["× chance "] == pytest.approx(t["phi_right"] * SHAPES[n][1] / 3)
        assert row["smallest angle, °"] == pytest.approx(np.degrees(min(t["angle_left"], t["angle_right"])))


def test_tables_for_people_have_the_numbers_of_the_json(said, abc):
    (row,) = json.loads(said("compare", "a", "c", "--json").out)
    table = said("compare", "a", "c").out
    for value in row.values():
        assert (f"{value:.3g}" if isinstance(value, float) else str(value)) in table


# -- the report ----------------------------------------------------------------------------------------------

SAME, START, FREE = "point the same way", "Inputs are shared", "nearly orthogonal"


def one_direction(out, into, n=8):
    """Unit vectors u, v of a second update u vᵀ whose cosines with the first axis are `out` and `into`."""
    u, v = np.zeros((n, 1)), np.zeros((1, n))
    u[:2, 0] = out, math.sqrt(1 - out**2)
    v[0, :2] = into, math.sqrt(1 - into**2)
    return u, v


@pytest.mark.parametrize(
    "out, into, branch",
    [  # of one direction in 8: cosine = out · into, and the overlap is 8 out² and 8 into² times chance
        (1, 1, SAME),
        pytest.param(-1, 1, None, marks=pytest.mark.xfail(
            strict=True, reason="opposite updates are said to point the same way, and a sum to count them twice")),
        (0, 1, START), (1, 0, FREE), (0, 0, FREE),
        (0.29**0.5, 0.29**0.5, FREE), (0.31**0.5, 0.31**0.5, SAME),  # cosine 0.29 and 0.31 about 0.3
        (0.1, (2.9 / 8) ** 0.5, FREE), (0.1, (3.1 / 8) ** 0.5, START), (-0.1, -((3.1 / 8) ** 0.5), START),  # 3 times
        (0.9, (3.1 / 8) ** 0.5, SAME),  # both: what points the same way is said
    ],
)  # fmt: skip
def test_advice_follows_from_the_numbers_it_gives(said, tmp_path, out, into, branch):
    write_peft(tmp_path / "x", {"w.0": one_direction(1, 1)})
    write_peft(tmp_path / "y", {"w.0": one_direction(out, into)})
    said("compare", "x", "y", "--k", 1, "--html", "r.html")
    lines = [
        html.unescape(line) for line in re.findall("<li>(.*?)</li>", (tmp_path / "r.html").read_text(), re.S)
    ]
    found = re.fullmatch(
        r"x and y: outputs overlap (\S+) times chance \(most in w\.0\), inputs (\S+) times; mean cosine (\S+)\.",
        lines[0],
    )
    # One decimal and three: half a unit of the last, and a hair for what lies in the middle.
    assert float(found[1]) == pytest.approx(8 * out**2, abs=0.0501)
    assert float(found[2]) == pytest.approx(8 * into**2, abs=0.0501)
    assert float(found[3]) == pytest.approx(out * into, abs=0.000501)
    assert len(lines) == 3 and "Measure the merged adapter" in lines[2]
    assert branch in lines[1] if branch else SAME not in lines[1]


def test_advice_takes_means_over_modules_and_the_worst_pair():
    """Ratios are means of the modules' ratios; 'most in' is the module of the largest ratio, not of the largest φ."""
    table = pd.DataFrame({
        "phi_left": [0.5, 0.4], "null_left": [0.25, 0.1], "phi_right": [0.1, 0.3], "null_right": [0.1, 0.1],
        "cosine": [0.5, -0.3],
    }, index=["wide", "narrow"])  # fmt: skip
    line, branch, _ = advice("xy", {(0, 1): table})
    assert (
        line
        == "x and y: outputs overlap 3.0 times chance (most in narrow), inputs 2.0 times; mean cosine 0.100."
    )
    assert FREE in branch
    for column, value, branch in (("cosine", 0.4, SAME), ("phi_right", 0.4, START)):
        lines = advice("xyz", {(0, 1): table, (0, 2): table.assign(**{column: value}), (1, 2): table})
        assert len(lines) == 5 and branch in lines[3]


def test_the_drawings_hold_the_numbers_of_the_tables():
    index = ["layers.0.q", "layers.1.q", "layers.0.up"]
    values = {"phi_left": [0.2, 0.4, 0.6], "null_left": 0.1, "phi_right": [0.3, 0.5, 0.9], "null_right": 0.2}
    tables = {(0, 1): pd.DataFrame(values, index=index), (0, 2): pd.DataFrame(values, index=index) / [2, 1, 2, 1],
              (1, 2): pd.DataFrame(values, index=index) / [1, 1, 3, 1]}  # fmt: skip
    figure = heat_map("xyz", tables)
    assert [b.label for b in figure.layout.updatemenus[0].buttons][:3] == [
        "x + y, outputs", "x + y, inputs", "x + z, outputs",
    ]  # fmt: skip
    nan = math.nan
    for trace, grid in zip(figure.data, ([[2, 4], [6, nan]], [[1.5, 2.5], [4.5, nan]], [[1, 2], [3, nan]])):
        assert list(trace.x) == [0, 1] and list(trace.y) == ["layers.·.q", "layers.·.up"]
        np.testing.assert_allclose(trace.z, grid, atol=0.006)
    # Three points fit in a plane with all their distances, here √(1 − φ) with φ the mean over modules and sides.
    points = np.stack([adapter_map("xyz", tables).data[0].x, adapter_map("xyz", tables).data[0].y], 1)
    for (i, j), t in tables.items():
        expected = math.sqrt(1 - (t.phi_left.mean() + t.phi_right.mean()) / 2)
        assert np.linalg.norm(points[i] - points[j]) == pytest.approx(expected)


# -- plans ---------------------------------------------------------------------------------------------------

MACHINE = Machine(1e6, 1e7, 1e8)


def test_a_plan_counts_bytes_and_operations_of_a_small_layer():
    """By hand, for one layer of 24×16 and ranks 3 + 4 = 7."""
    plan = lo.plan({"w": (24, 16)}, "cat", count=2, ranks=[3, 4], dtype=torch.float16, machine=MACHINE)
    assert (plan.modules, plan.summed_rank, plan.rank) == (1, 7, 7)
    assert plan.read == (24 + 16) * 7 * 2 == plan.written
    assert plan.products == (24 + 16) * 7**2 + 2 * (24 + 16) * 7 * 7  # Gram matrices, lift
    cholesky = 2 * (2 / 3 * 7**3 + 3 * 2e6)
    assert plan.factorisations == pytest.approx(cholesky + 2 * 7**3 + (2 * 7**3 + 11 * 7**3 + 2e6))
    seconds = (plan.read + plan.written) / 1e6 + plan.products / 1e7 + plan.factorisations / 1e8
    assert plan.seconds == pytest.approx(seconds)
    held = 40 * 7 * 12 + (2 + 6) * 7 * 7 * 8
    assert plan.peak == plan.read + 8 * 40 * 7 + torch.get_num_threads() * held


@pytest.mark.parametrize(
    "method, options, rank, written",
    [
        ("cat", {}, 7, 40 * 7 * 4), ("cat", {"rank": 5}, 5, 40 * 5 * 4), ("cat", {"rank": 50}, 7, 40 * 7 * 4),
        ("svd", {}, 4, 40 * 4 * 4), ("ties", {}, 16, 40 * 16 * 4), ("ties", {"rank": 3}, 3, 40 * 3 * 4),
        ("opcm", {"ranks": [9, 9]}, 16, 40 * 16 * 4),  # no more than the layer has
    ],
)  # fmt: skip
def test_what_a_plan_writes_follows_the_rank_of_the_result(method, options, rank, written):
    call = {"count": 2, "ranks": [3, 4], "dtype": torch.float32, "machine": MACHINE} | options
    plan = lo.plan({"w": (24, 16)}, method, **call)
    assert (plan.rank, plan.written) == (rank, written) and plan.read == 40 * sum(call["ranks"]) * 4


def test_a_plan_for_entries_forms_the_layer():
    plan = lo.plan({"w": (24, 16)}, "ties", count=2, ranks=[3, 4], machine=MACHINE)
    assert plan.products == 2 * 24 * 16 * 7 + 2 * (24 + 16) * 16**2
    # 140 bytes pass by for every entry of both adapters, see `PASSES`.
    passed = 2 * 24 * 16 * 140
    assert plan.seconds == pytest.approx(
        (plan.read + plan.written + passed) / 1e6 + plan.products / 1e7 + plan.factorisations / 1e8
    )


@pytest.mark.xfail(strict=True, reason="bytes are counted in the dtype of the first adapter")
def test_a_plan_knows_the_dtype_of_every_adapter():
    half, single = (
        lo.Adapter({"w": lo.LowRank(torch.ones(8, r, dtype=t), torch.ones(r, 4, dtype=t))})
        for r, t in ((2, torch.float16), (3, torch.float32))
    )
    plan = lo.plan([half, single], "cat", machine=MACHINE)
    assert plan.read == 12 * 2 * 2 + 12 * 3 * 4 and plan.written == 12 * 4 * 4  # 4 is all the layer has


def test_dry_run_prints_a_hand_count(said, abc, monkeypatch):
    """Ranks 4 + 5 + 3 in layers of 52 and 42 rows and columns together, float64; cut to 5."""
    monkeypatch.setattr(sys.modules[lo.plan.__module__], "calibrate", lambda: MACHINE)
    words = said("merge", *abc, "-o", "m", "--method", "cat", "--rank", 5, "--dry-run").out
    assert "would merge 3 adapters, 2 modules, by {'method': 'cat', 'rank': 5}" in words
    assert "summed rank up to 12, cut to 5" in words
    read, wrote = (52 + 42) * 12 * 8, (52 + 42) * 5 * 8
    assert f"would read {read / 1e6:.3g} MB" in words and f"write {wrote / 1e6:.3g} MB" in words
    assert "read 0.00902 MB" in words and "write 0.00376 MB" in words
    plan = lo.plan([lo.load_adapter(n) for n in abc], "cat", rank=5, machine=MACHINE)
    assert f"hold {plan.peak / 1e6:.3g} MB" in words and f"about {plan.seconds:.2g} s" in words


@pytest.mark.xfail(strict=True, reason="a dry run counts what is written in the dtype of the inputs")
def test_dry_run_heeds_the_dtype_of_the_output(said, abc, monkeypatch):
    monkeypatch.setattr(sys.modules[lo.plan.__module__], "calibrate", lambda: MACHINE)
    words = said("merge", *abc, "-o", "m", "--method", "cat", "--dtype", "float16", "--dry-run").out
    assert f"write {94 * 12 * 2 / 1e6:.3g} MB" in words


# -- methods -------------------------------------------------------------------------------------------------


def test_the_command_lists_the_methods_of_the_library(said):
    rows = json.loads(said("methods", "--json").out)
    table = lo.methods()
    table = table[~table["needs data"]]
    assert [row["method"] for row in rows] == list(table.index)
    for row in rows:
        expected = table.loc[row["method"]]
        assert row["sees"] == expected.sees and row["order matters"] == str(expected["order matters"])
        assert row["options"] == expected.options and row["source"] == expected.source
    # And what is known of some of them from their papers.
    by = {row["method"]: row for row in rows}
    assert by["opcm"]["sees"] == "one at a time" and by["opcm"]["order matters"] == "True"
    assert by["tsv"]["sees"] == "all at once" and by["tsv"]["order matters"] == "False"
    assert by["opcm"]["options"] == "alpha, variant, scale" and "regmean" not in by
