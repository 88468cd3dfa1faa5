"""The Karcher mean as a merge, begun at several subspaces; and what rules remark, told once for a merge."""

import warnings

import numpy as np
import pytest
import torch
from by_hand import deltas_of, gap, random_factors, run, svd, write_peft

import lora_opcm as lo
from lora_opcm.merging import remarks

SHAPES = {"p": (24, 20), "q": (20, 24), "v": (20, 20)}
NAMES = [f"a{i}" for i in range(5)]


@pytest.fixture
def said(capsys, monkeypatch, tmp_path):
    rng = np.random.default_rng(5)
    for name in NAMES:
        write_peft(tmp_path / name, random_factors(rng, SHAPES, 2))
    return lambda *words, code=0: run(capsys, monkeypatch, tmp_path, *words, code=code)


def squares(deltas, merged):
    """Per module and side, Σ θ² from the span of the merged update to those of the updates, by arccosines."""
    found = []
    for name in SHAPES:
        for side in (0, 2):
            frame, *frames = (np.atleast_2d(svd(d[name])[side]) for d in (merged, *deltas))
            frame, *frames = (f if side == 0 else f.T for f in (frame, *frames))
            cosines = [np.linalg.svd(frame[:, :2].T @ f[:, :2], compute_uv=False).clip(0, 1) for f in frames]
            found.append(sum(np.arccos(c) @ np.arccos(c) for c in cosines))
    return np.array(found)


@pytest.mark.slow
def test_more_starts_are_never_higher(said, tmp_path):
    deltas, costs = [deltas_of(tmp_path / n) for n in NAMES], []
    for starts in (1, 2, 4, 6, 9):
        said("merge", *NAMES, "-o", f"m{starts}", "--method", "karcher_mean", "--option", f"starts={starts}")
        costs.append(squares(deltas, deltas_of(tmp_path / f"m{starts}")))
    for fewer, more in zip(costs, costs[1:]):
        assert (more <= fewer + 1e-9).all()
    assert costs[0].sum() > costs[3].sum() + 0.01  # another start ends lower somewhere
    assert gap(deltas_of(tmp_path / "m6"), deltas_of(tmp_path / "m9")) == 0  # there are no more than six
    said("merge", *NAMES, "-o", "unsaid", "--method", "karcher_mean")
    assert gap(deltas_of(tmp_path / "unsaid"), deltas_of(tmp_path / "m1")) == 0
    said("verify", *reversed(NAMES), "--against", "m4")


def test_the_order_of_the_adapters_does_not_choose_the_starts(said, tmp_path):
    loaded = [lo.load_adapter(tmp_path / n) for n in NAMES]
    ends = [{n: u.delta().numpy() for n, u in lo.merge(some, method="karcher_mean", starts=3).items()}
            for some in (loaded, loaded[::-1])]  # fmt: skip
    assert gap(*ends) < 1e-9


def test_they_are_an_option_as_others_are(said):
    assert "starts" in lo.methods().loc["karcher_mean", "options"]
    assert "'starts': 3" in said("merge", *NAMES, "-o", "m", "--method", "karcher_mean", "--option", "starts=3",
                                 "--dry-run").out  # fmt: skip
    for wrong in ("0", "1.5", "many"):
        told = said("merge", *NAMES, "-o", "m", "--method", "karcher_mean", "--option", f"starts={wrong}", code=2).err
        assert "starts must be an integer of at least 1" in told


def test_a_remark_is_told_once_for_a_merge_with_its_modules(said, tmp_path):
    told = said("merge", *NAMES, "-o", "m", "--method", "karcher_mean").err
    far = "3 of 3 modules: the subspaces lie further than π/4 from their karcher_mean, where there may be a lower one"
    assert told.count(f"warning: {far}; --option starts=6 (starts=6) begins at each") == 1 == told.count("π/4")
    told = said("merge", *NAMES, "-o", "n", "--method", "karcher_mean", "--option", "starts=6").err
    assert far in told and "begins at each" not in told
    two = [lo.load_adapter(tmp_path / n) for n in NAMES]
    lone = [two[0].with_modules({n: two[0][n] for n in ("p", "v")}), *(a.with_modules({"p": a["p"]}) for a in two[1:])]
    with pytest.warns(UserWarning) as heard:
        lo.merge(lone, method="karcher_mean")
    assert [str(w.message)[:15] for w in heard if "π/4" in str(w.message)] == ["1 of 2 modules:"]
    assert all(w.filename == __file__ for w in heard)  # where merge was called


def test_a_rule_alone_warns_at_once():
    with pytest.warns(UserWarning, match="^odd$"):
        remarks.remark("odd")
    with warnings.catch_warnings(), remarks.hearing() as heard:
        warnings.simplefilter("error")
        remarks.remark("odd")
        with remarks.hearing() as inner:
            remarks.remark("odder")
    assert (heard, inner) == (["odd"], ["odder"])
    with pytest.warns(UserWarning) as told:
        remarks.tell([["odd", "odd"], ["odder"], ["odd"], []])
    assert [str(w.message) for w in told] == ["2 of 4 modules: odd", "1 of 4 modules: odder"]


@pytest.mark.parametrize("rest, told", [(0.1, 1), (1e-4, 0)])
def test_a_mean_that_keeps_nothing_of_the_sum_is_told_of_where_there_is_a_sum(rest, told):
    """Two updates that cancel but for a rest elsewhere; a rest a ten-thousandth as large is no sum to speak of."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    one, other = lo.LowRank(normal(200, 3), normal(3, 160)), lo.LowRank(rest * normal(200, 3), normal(3, 160))
    less = lo.LowRank(torch.cat([-one.left, other.left], 1), torch.cat([one.right, other.right]))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        lo.merge([lo.Adapter({"w": one}), lo.Adapter({"w": less})], "chordal_mean", k=3)
    said = [str(w.message) for w in heard]
    assert said == ["1 of 1 modules: the mean subspaces keep less than 1 % of the sum of the updates"] * told
