"""What similarity, inspect, compare and methods say, against numbers from dense matrices."""

import json
import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from by_hand import norm, random_factors, run, svd, write_peft
from scipy.linalg import subspace_angles
from scipy.stats import beta

import lora_opcm as lo
from lora_opcm.command.tables import inspected

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
        "gap_a": 1 - (*sx, 0)[k] / sx[k - 1], "gap_b": 1 - (*sy, 0)[l] / sy[l - 1],
        "cosine": (x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum()),
    }  # fmt: skip
    for side, p, q in (("left", ux[:, :k], uy[:, :l]), ("right", vx[:k].T, vy[:l].T)):
        row[f"phi_{side}"] = ((p.T @ q) ** 2).sum() / min(k, l)
        n = len(p)
        row[f"null_{side}"] = max(k, l) / n
        row[f"std_{side}"] = np.sqrt(2 * k * l * (n - k) * (n - l) / (n**2 * (n - 1) * (n + 2))) / min(k, l)
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
    assert row.drop(["norm_a", "norm_b", "energy_b", "gap_b"]).isna().all() and row.gap_b == 1


def test_pooled_modules_show_what_none_shows_alone(abc, tmp_path):
    a, b = (lo.load_adapter(tmp_path / name) for name in "ab")
    table, line = lo.similarity(a, b, 2, 3), lo.geometry.pooled(lo.similarity(a, b, 2, 3))
    for side in ("left", "right"):
        std = np.sqrt((table[f"std_{side}"] ** 2).sum()) / 2  # of a mean over two modules
        expected = [table[f"phi_{side}"].mean(), table[f"null_{side}"].mean(), std]
        assert list(line.loc[side, ["phi", "null", "std"]]) == pytest.approx(expected)
        assert line.loc[side, "z"] == pytest.approx((expected[0] - expected[1]) / std)
    rng, zs = np.random.default_rng(3), []
    for _ in range(40):
        x, y = (
            lo.Adapter({str(i): lo.LowRank(*map(torch.as_tensor, pair)) for i, pair in enumerate(drawn)})
            for drawn in ([[rng.normal(size=(20, 4)), rng.normal(size=(4, 16))] for _ in range(6)] for _ in "xy")
        )
        zs += list(lo.geometry.pooled(lo.similarity(x, y, 2, 3)).z)
    assert abs(np.mean(zs)) < 4 / np.sqrt(80) and 0.7 < np.std(zs) < 1.3


def test_leading_directions_across_a_tie_are_warned_of():
    s = torch.tensor([2.0, 1.0, 1.0 - 1e-4, 0.5], dtype=torch.float64)
    x = lo.LowRank(torch.eye(6, 4).double() * s, torch.eye(4, 5).double())
    with pytest.warns(UserWarning, match="phi: σ_2 and σ_3 tie, which 2 directions lead"):
        lo.phi(x, x, 2, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for k, l in ((1, 1), (3, 3), (4, None), (None, None)):
            lo.phi(x, x, k, l)
    row = lo.similarity(*[lo.Adapter({"w": x})] * 2, 2, 4).loc["w"]
    assert [row.gap_a, row.gap_b] == pytest.approx([1e-4, 1])


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
    assert found.pop("id") == lo.load_adapter("x").id
    assert found.pop("odd") == [
        "zero is zero", "twin has rank 5, stored as 6", "head.weight is stored in full ((3, 5)), not as factors",
    ]  # fmt: skip
    assert found.pop("norm") == pytest.approx(norm(deltas), abs=5e-5)
    numbers = 6 * (40 + 12) + 2 * (24 + 18) + 6 * (10 + 8) + 3 * (6 + 5)
    assert found == {
        "source": found["source"], "format": "peft", "base model": "org/model", "dtype": "float64", "modules": 4,
        "numbers stored": numbers,
    }  # fmt: skip


@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_shares_and_angles_do_not_see_the_size(abc, tmp_path, size):
    a, b = (lo.load_adapter(tmp_path / name) for name in "ab")
    sized = lo.Adapter({n: u.to(torch.float64) * size for n, u in a.modules.items()})
    for row, other in zip(inspected(a)[0], inspected(sized)[0]):
        for column in ("effective rank", "energy in 4"):
            assert other[column] == pytest.approx(row[column])
        for column in ("‖ΔW‖", "σ₁", "spectrum"):
            assert other[column] == pytest.approx(size * np.array(row[column]))
    left = ["norm_a"]
    assert np.allclose(lo.similarity(sized, b).drop(columns=left), lo.similarity(a, b).drop(columns=left), atol=1e-7)


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
        assert row == {"pair": row["pair"], "modules": 2, "only first": 0, "only second": 0} | {
            name: pytest.approx(value)
            for name, value in {
                "cosine": t.cosine.mean(),
                "φ outputs": t.phi_left.mean(),
                "× chance": ratio["left"],
                "φ inputs": t.phi_right.mean(),
                "× chance ": ratio["right"],
                "smallest angle, °": math.degrees(min(t.angle_left.min(), t.angle_right.min())),
                "z outputs": (t.phi_left - t.null_left).sum() / np.sqrt((t.std_left**2).sum()),
                "z inputs": (t.phi_right - t.null_right).sum() / np.sqrt((t.std_right**2).sum()),
            }.items()
        }
    for (x, y), row in zip(PAIRS, rows):
        t = pd.DataFrame([by_svd(abc[x][n], abc[y][n], k, l or k) for n in SHAPES])
        std = np.sqrt((t.std_right**2).sum()) / 2
        line = (
            f"inputs {t.phi_right.mean():.4f}, chance {t.null_right.mean():.4f} ± {std:.4f} (z = {row['z inputs']:.1f})"
        )
        assert line in said(*words).out
    said_so = f"leading {k} directions" + (f" of the first and {l} of the second" if l else "")
    assert f"{said_so}, means over modules; 1 × chance" in said(*words).out.replace("\n", " ")


def test_compare_by_module_gives_each_its_own_row(said, abc):
    rows = json.loads(said("compare", *abc, "--k", 3, "--l", 1, "--modules", "--json").out)
    names = list(lo.load_adapter("a").modules)
    assert [(row["pair"], row["module"]) for row in rows] == [(f"{x} + {y}", n) for x, y in PAIRS for n in names]
    for row, (x, y, n) in zip(rows, [(x, y, n) for x, y in PAIRS for n in names]):
        t = by_svd(abc[x][n], abc[y][n], 3, 1)
        assert [row["cosine"], row["φ outputs"], row["φ inputs"]] == pytest.approx(
            [t["cosine"], t["phi_left"], t["phi_right"]]
        )
        assert row["× chance"] == pytest.approx(t["phi_left"] * SHAPES[n][0] / 3)
        assert row["× chance "] == pytest.approx(t["phi_right"] * SHAPES[n][1] / 3)
        assert row["smallest angle, °"] == pytest.approx(np.degrees(min(t["angle_left"], t["angle_right"])))


def test_compare_takes_eight_directions_unless_told(said, tmp_path):
    rng = np.random.default_rng(6)
    for name in "ab":
        write_peft(tmp_path / name, random_factors(rng, {"w": (30, 20)}, 10))
    silent, told, other = (said("compare", "a", "b", *words, "--json").out for words in ([], ["--k", 8], ["--k", 9]))
    assert silent == told != other


def test_tables_for_people_have_the_numbers_of_the_json(said, abc):
    (row,) = json.loads(said("compare", "a", "c", "--json").out)
    table = said("compare", "a", "c").out
    for value in row.values():
        assert (f"{value:.3g}" if isinstance(value, float) else str(value)) in table


# -- methods -------------------------------------------------------------------------------------------------


def test_the_command_lists_the_methods_of_the_library(said):
    rows = json.loads(said("methods", "--json").out)
    table = lo.methods()
    table = table[~table["needs data"]]
    assert [row["method"] for row in rows] == list(table.index)
    for row in rows:
        expected = table.loc[row["method"]]
        assert row["keeps"] == expected.keeps and row["order matters"] == str(expected["order matters"])
        assert row["options"] == expected.options and row["source"] == expected.source
    # And what is known of some of them from their papers.
    by = {row["method"]: row for row in rows}
    assert by["opcm"]["keeps"] == "one sum" and by["opcm"]["order matters"] == "True"
    assert by["tsv"]["keeps"] == "three sums" and by["tsv"]["order matters"] == "False"
    assert by["opcm"]["options"] == "alpha, variant" and by["opcm"]["scale"] == "norm" and "regmean" not in by
