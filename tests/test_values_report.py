"""What the report says and draws, and what plans and dry runs count, against numbers from hand."""

import html
import math
import re
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from by_hand import random_factors, run, write_peft

import lora_opcm as lo
from lora_opcm.command.report import adapter_map, advice, heat_map
from lora_opcm.merging.plan import Machine


@pytest.fixture
def said(capsys, monkeypatch, tmp_path):
    return lambda *words, code=0: run(capsys, monkeypatch, tmp_path, *words, code=code)


# -- the report ----------------------------------------------------------------------------------------------

SAME, START, FREE = "point the same way", "Inputs are shared", "nearly orthogonal"
OPPOSITE = "opposite ways"


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
        (-1, 1, OPPOSITE), (-(0.31**0.5), 0.31**0.5, OPPOSITE), (-(0.29**0.5), 0.29**0.5, FREE),
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
    lines = [html.unescape(line) for line in re.findall("<li>(.*?)</li>", (tmp_path / "r.html").read_text(), re.S)]
    found = re.fullmatch(
        r"x and y: outputs overlap (\S+) times chance \(most in w\.0\), inputs (\S+) times; mean cosine (\S+)\.",
        lines[0],
    )
    # One decimal and three: half a unit of the last, and a hair for what lies in the middle.
    assert float(found[1]) == pytest.approx(8 * out**2, abs=0.0501)
    assert float(found[2]) == pytest.approx(8 * into**2, abs=0.0501)
    assert float(found[3]) == pytest.approx(out * into, abs=0.000501)
    assert len(lines) == 3 and "Measure the merged adapter" in lines[2]
    assert branch in lines[1]


def test_advice_takes_means_over_modules_and_the_worst_pair():
    """Ratios are means of the modules' ratios; 'most in' is the module of the largest ratio, not of the largest φ."""
    table = pd.DataFrame({
        "phi_left": [0.5, 0.4], "null_left": [0.25, 0.1], "phi_right": [0.1, 0.3], "null_right": [0.1, 0.1],
        "cosine": [0.5, -0.3],
    }, index=["wide", "narrow"])  # fmt: skip
    line, branch, _ = advice("xy", {(0, 1): table})
    assert line == "x and y: outputs overlap 3.0 times chance (most in narrow), inputs 2.0 times; mean cosine 0.100."
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


def test_the_layers_of_a_second_text_encoder_are_told_apart():
    names = [f"lora_te1_text_model_encoder_layers_{i}_mlp_fc1" for i in (3, 7)]
    values = {"phi_left": [0.2, 0.4], "null_left": 0.1, "phi_right": [0.2, 0.4], "null_right": 0.1}
    figure = heat_map("xy", {(0, 1): pd.DataFrame(values, index=names)})
    assert list(figure.data[0].x) == [3, 7] and np.shape(figure.data[0].z) == (1, 2)


# -- plans ---------------------------------------------------------------------------------------------------

MACHINE = Machine(1e6, 1e7, 1e8)


def test_a_plan_counts_bytes_and_operations_of_a_small_layer():
    """By hand, for one layer of 24×16 and ranks 3 + 4 = 7."""
    layer = {"count": 2, "ranks": [3, 4], "dtype": torch.float16, "machine": MACHINE}
    plan = lo.plan({"w": (24, 16)}, "mean", **layer)
    assert (plan.modules, plan.summed_rank, plan.rank) == (1, 7, 7)
    assert plan.read == (24 + 16) * 7 * 2 == plan.written
    assert plan.products == (24 + 16) * 7**2 + 2 * (24 + 16) * 7 * 7  # Gram matrices, lift
    cholesky = 2 * (2 / 3 * 7**3 + 3 * 2e6)
    assert plan.factorisations == pytest.approx(cholesky + 2 * 7**3 + (2 * 7**3 + 11 * 7**3 + 2e6))
    passed = 40 * 7 * 30  # until the factors stand side by side; and a module makes calls for 1.6e7 operations
    seconds = (plan.read + plan.written + passed) / 1e6 + plan.products / 1e7 + (plan.factorisations + 1.6e7) / 1e8
    assert plan.seconds == pytest.approx(seconds)
    stored = lo.plan({"w": (24, 16)}, "cat", **layer)  # factors side by side, with no arithmetic
    assert (stored.products, stored.factorisations, stored.written) == (0, 0, plan.written)
    assert stored.seconds == pytest.approx((stored.read + stored.written) / 1e6 + 1.6e7 / 1e8)
    cut, whole = (lo.plan({"w": (24, 16)}, method, **layer, rank=2) for method in ("cat", "opcm"))
    assert cut.products == whole.products == (24 + 16) * 7**2 + 2 * (24 + 16) * 7 * 2  # only what is kept is lifted
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
    assert plan.products == 2 * 24 * 16 * 7
    # 140 bytes pass by for every entry of both adapters, see `PASSES`.
    passed = 2 * 24 * 16 * 140 + 40 * 7 * 30
    assert plan.seconds == pytest.approx(
        (plan.read + plan.written + passed) / 1e6 + plan.products / 1e7 + (plan.factorisations + 1.6e7) / 1e8
    )


def test_a_plan_knows_the_dtype_of_every_adapter():
    half, single = (
        lo.Adapter({"w": lo.LowRank(torch.ones(8, r, dtype=t), torch.ones(r, 4, dtype=t))})
        for r, t in ((2, torch.float16), (3, torch.float32))
    )
    plan = lo.plan([half, single], "cat", machine=MACHINE)
    assert plan.read == 12 * 2 * 2 + 12 * 3 * 4 and plan.written == 12 * 4 * 4  # 4 is all the layer has


@pytest.fixture
def abc(tmp_path):
    """Folders a, b, c of ranks 4, 5, 3, float64."""
    rng, shapes = np.random.default_rng(0), {"up": (40, 12), "q": (24, 18)}
    for name, rank in zip("abc", (4, 5, 3)):
        write_peft(tmp_path / name, random_factors(rng, shapes, rank))
    return "abc"


def test_dry_run_prints_a_hand_count(said, abc, monkeypatch):
    """Ranks 4 + 5 + 3 in layers of 52 and 42 rows and columns together, float64; cut to 5."""
    monkeypatch.setattr(sys.modules[lo.plan.__module__], "calibrate", lambda: MACHINE)
    words = said("merge", *abc, "-o", "m", "--method", "cat", "--rank", 5, "--dry-run").out
    assert "would merge 3 adapters, 2 modules, by {'method': 'cat', 'scale': 1.0, 'rank': 5}" in words
    assert "summed rank up to 12, cut to 5" in words
    read, wrote = (52 + 42) * 12 * 8, (52 + 42) * 5 * 8
    assert f"would read {read / 1e6:.3g} MB" in words and f"write {wrote / 1e6:.3g} MB" in words
    assert "read 0.00902 MB" in words and "write 0.00376 MB" in words
    plan = lo.plan([lo.load_adapter(n) for n in abc], "cat", rank=5, machine=MACHINE)
    assert f"hold {plan.peak / 1e6:.3g} MB" in words and f"about {plan.seconds:.2g} s" in words


def test_dry_run_says_what_auto_comes_to(said, abc, monkeypatch, tmp_path):
    monkeypatch.setattr(sys.modules[lo.plan.__module__], "calibrate", lambda: MACHINE)
    norms = [lo.load_adapter(tmp_path / n).norm() for n in abc]
    for words, expected, times in (
        ((), sum(norms) / 3 * 3**0.5, "1.73"),
        (("--weights", "1,0,-3"), (norms[0] + 3 * norms[2]) / 2 * 2**0.5, "1.41"),
    ):
        out = said("merge", *abc, "-o", "m", "--method", "tsv", "--dry-run", *words).out
        assert f"would scale to norm {expected:.4g}, {times} times the mean norm" in out
    assert "would scale" not in said("merge", *abc, "-o", "m", "--dry-run").out


def test_dry_run_heeds_the_dtype_of_the_output(said, abc, monkeypatch):
    monkeypatch.setattr(sys.modules[lo.plan.__module__], "calibrate", lambda: MACHINE)
    words = said("merge", *abc, "-o", "m", "--method", "cat", "--dtype", "float16", "--dry-run").out
    assert f"write {94 * 12 * 2 / 1e6:.3g} MB" in words
