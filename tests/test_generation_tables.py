"""Tables of the puzzles against numbers computed apart, question by question."""

import json
import lzma

import numpy as np
import pytest
from scipy.stats import binom

from lora_opcm.lab.generation import publish, tables
from lora_opcm.lab.generation.outcomes import Outcomes, packed, read

SIZES = {"validation": {"a": 40, "b": 20}, "test": {"a": 60, "b": 30}}
ROOT2 = 2**0.5


def evaluation(rng, split, tasks, share, likelihood):
    """Marks with about such a share of right answers and such a mean likelihood."""
    return {
        (t, split): (rng.random(SIZES[split][t]) < share, rng.normal(likelihood, 0.1, SIZES[split][t]).astype("f4"))
        for t in tasks
    }


class Written:
    """A run's file, and the marks in it as they were before they were packed."""

    def __init__(self, path):
        self.file = Outcomes(path, {"tasks": ["a", "b"], "sizes": SIZES})
        self.marks = {}

    def add(self, name, found, **line):
        """`found`: split → scale → marks."""
        line["tasks"] = list(dict.fromkeys(t for of in found.values() for m in of.values() for t, _ in m))
        for split, by_scale in found.items():
            line[split] = [{"scale": s, **packed(marks)} for s, marks in by_scale.items()]
            for s, marks in by_scale.items():
                self.marks |= {(name, s, *key): m for key, m in marks.items()}
        self.file.add(line)

    def mean(self, name, split, kind=0, scale=1.0, tasks="ab"):
        """Mean over tasks of right answers (kind 0) or likelihoods (kind 1)."""
        return np.mean([self.marks[name, scale, t, split][kind].astype(float).mean() for t in tasks])

    def gain(self, name, split="test", kind=0, scale=1.0, tasks="ab"):
        base, own = (self.mean(n, split, kind, tasks=tasks) for n in ("base", "own"))
        return (self.mean(name, split, kind, scale, tasks) - base) / (own - base)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Two tasks, two methods at a unit of a half, one of them twice, and one pair merged by both."""
    rng = np.random.default_rng(0)
    out = Written(tmp_path_factory.mktemp("run") / "outcomes.jsonl")

    def both(share, likelihood, tasks="ab"):
        return {s: {1.0: evaluation(rng, s, tasks, share, likelihood)} for s in SIZES}

    out.add("base", both(0.1, -4), kind="base")
    for task in "ab":
        out.add("own", both(0.8, -1, task), kind="own")
    out.add("commonest", both(0.3, 0), kind="commonest")
    for name, options, shares in (("cat", {}, (0.2, 0.4, 0.5)), ("opcm", {"alpha": 0.5}, (0.3, 0.5, 0.7))):
        found = {}
        for split in SIZES:  # likelihood is best at 1 mean norm, exact match at √2
            likely = (-2.5, -2, -3)
            found[split] = {
                0.5 * s: evaluation(rng, split, "ab", share, k) for s, share, k in zip((0.5, 1, ROOT2), shares, likely)
            }
        about = {"unit": 0.5, "scale": 0.5, "rank": None, "seed": 0}
        out.add(name, found, kind="row", method=name, options=options, **about)
        if name == "opcm":
            out.add(name, found, kind="row", method="tsv", options={}, **about)
    for name, options in (("cat", {}), ("opcm", {"alpha": 0.5})):
        found = {"test": {s: evaluation(rng, "test", "ab", 0.6, -2) for s in (0.25, 0.5)}}
        out.add(f"pair {name}", found, kind="pair", method=name, options=options, unit=0.25, rank=None, seed=0)
    return out


@pytest.fixture(scope="module")
def run(written):
    return tables.Run(written.file.path)


def test_gains_are_those_of_means_over_tasks(written, run):
    found = tables.gains(run, None)
    assert list(found.index) == ["OPCM, α = 0.5", "task arithmetic"] and (found.scale == 1).all()
    for label, name in (("task arithmetic", "cat"), ("OPCM, α = 0.5", "opcm")):
        row = found.loc[label]
        assert row.exact == pytest.approx(written.gain(name, scale=0.5), abs=1e-5)
        assert row.likelihood == pytest.approx(written.gain(name, kind=1, scale=0.5), abs=1e-3)
        beyond = written.mean(name, "test", scale=0.5) - written.mean("commonest", "test")
        assert row["over the commonest"] == pytest.approx(beyond, abs=1e-5)
        assert row["exact low"] < row.exact < row["exact high"] and row.untested == 0
    behind = written.gain("opcm", scale=0.5) - written.gain("cat", scale=0.5)
    assert found.behind.iloc[1] == pytest.approx(behind, abs=1e-5) and found.behind.iloc[0] == 0


def test_rows_with_the_same_marks_are_one(run):
    assert [(one.label, two.label) for one, two in run.twins] == [("OPCM, α = 0.5", "TSV")]
    assert len(run.rows) == 2


def test_each_measure_chooses_its_scale(written, run):
    for row in run.rows:
        assert tables.picks(run, row)[0] == 1
        assert tables.picks(run, row, "right")[0] == round(ROOT2, 3)
        name = "cat" if row.label == "task arithmetic" else "opcm"
        fixed = tables.fixed(run, row, ROOT2)[0]
        assert fixed == pytest.approx(written.gain(name, "validation", scale=0.5 * ROOT2), abs=1e-5)
        assert tables.fixed(run, row, 2.0) is None
        # Likelihood chooses 1 on either half, so crossing changes nothing.
        likely = written.gain(name, "validation", scale=0.5)
        assert tables.crossed(run, row, "likelihood")[0] == pytest.approx(likely, abs=1e-5)


def test_a_scale_that_was_not_tested_gets_the_nearest(run):
    row = run.rows[0]
    few = {s: m for s, m in row.marks["test"].items() if s != 1}
    part = tables.Merge(row.label, None, row.tasks, row.marks | {"test": few}, 1.0)
    means, untested = tables.tested(run, part)
    assert untested == 1
    assert means[0] == pytest.approx(run.weights["test"][0] @ few[round(ROOT2, 3)]["right"])


def test_intervals_follow_the_binomial_law(run):
    """Base all wrong and own all right make a gain a mean of right answers; two tasks of one size."""
    n, p = 2000, 0.3
    right = (np.arange(2 * n) % n < p * n).astype(float)
    one = object.__new__(tables.Run)
    one.tasks, one.sizes = ("a", "b"), {"validation": (1, 1), "test": (n, n)}
    one.base, one.own = ({"test": {"right": np.full(2 * n, x)}} for x in (0.0, 1.0))
    found = tables.interval(one.gain(one.weights["test"] @ right), "x")
    law = binom(2 * n, p)
    assert found["x"] == pytest.approx(p, abs=1e-6)
    assert found["x low"] == pytest.approx(law.ppf(0.025) / (2 * n), abs=0.004)
    assert found["x high"] == pytest.approx(law.ppf(0.975) / (2 * n), abs=0.004)


def test_an_interval_over_tasks_is_that_of_their_draws(run):
    """Of two tasks one is drawn: the ends are the gain of either task alone."""
    right = run.rows[0].marks["test"][1.0]["right"]
    alone = (run.by_task(right) - run.by_task(run.base["test"]["right"])) / (
        run.by_task(run.own["test"]["right"]) - run.by_task(run.base["test"]["right"])
    )
    found = tables.over_tasks(run, right)
    assert found["over tasks low"] == pytest.approx(alone.min())
    assert found["over tasks high"] == pytest.approx(alone.max())


def test_pairs_are_summed(written, run):
    found = tables.pair_gains(run).set_index(["method", "scale"])
    assert set(found.index.get_level_values(0)) == {"commonest answer", "task arithmetic", "OPCM, α = 0.5"}
    assert found.loc["task arithmetic"].pairs.eq(1).all()
    for label, name in (("task arithmetic", "pair cat"), ("OPCM, α = 0.5", "pair opcm")):
        for scale in (0.25, 0.5):
            expected = written.gain(name, scale=scale)
            assert found.exact[label, scale / 0.25] == pytest.approx(expected, abs=1e-5)
    assert found.exact["commonest answer"].item() == pytest.approx(written.gain("commonest"), abs=1e-5)


def test_a_published_file_is_the_run_rounded_with_the_commonest_answers(written, tmp_path, monkeypatch):
    answers = {"a": ["x"] * 30 + ["y"] * 30, "b": ["y"] * 10 + ["x"] * 20}
    rows = {
        task: {split: [("?", x) for x in of[: SIZES[split][task]]] for split in SIZES}
        | {"train": [("?", "y"), ("?", "x"), ("?", "y")]}
        for task, of in answers.items()
    }
    monkeypatch.setattr(publish, "load_puzzle", rows.__getitem__)
    publish.publish(written.file.path, tmp_path / "out.jsonl.xz", commit="abc", date="2026-01-02")
    header, lines = read(tmp_path / "out.jsonl.xz")
    assert (header["commit"], header["date"], header["protocol"]) == ("abc", "2026-01-02", 2)
    _, before = read(written.file.path)
    for old, new in zip(before, lines):
        for one, two in zip(old["test"], new["test"]):
            for task in old["tasks"]:
                assert (one["right"][task] == two["right"][task]).all()
                gap = np.abs(one["likelihood"][task] - two["likelihood"][task])
                assert gap.max() <= publish.STEP / 2 + 2e-3  # half precision of the numbers themselves
    (said,) = lines[-1]["test"]
    assert lines[-1]["kind"] == "commonest" and "likelihood" not in said
    assert said["right"]["a"].sum() == 30 and said["right"]["b"].sum() == 10


@pytest.mark.slow
def test_the_published_file_is_whole():
    path = tables.data_dir() / "results" / tables.FILE
    assert path.stat().st_size < 2**20
    assert len(json.loads(lzma.decompress(path.read_bytes()).split(b"\n")[0])["commit"]) == 40
    run = tables.Run()
    assert len(run.tasks) == 9 and len(run.rows) == 25 and len(run.twins) == 2 and len(run.pairs) == 70
    for row in run.rows:
        assert row.scale == tables.picks(run, row)[0] and len(row.marks["test"]) == 3
    assert tables.pair_gains(run).pairs.max() == 23
    assert tables.pair_gains(run, without=["letter_counting"]).pairs.max() == 15


def test_no_scale_that_was_tried_is_surely_ahead_of_the_guess():
    """The words of *A language model*, of validation and of test questions; three grids may end too early."""
    run = tables.Run()
    for split, weights in run.weights.items():
        for row in run.rows:
            for scale, marks in row.marks[split].items():
                more = weights[1:] @ (marks["right"] - run.commonest[split]["right"])
                assert np.quantile(more, 0.025) <= 0, (split, row.label, row.rank, scale)
    whole = [row for row in run.rows if row.rank is None]
    ends = [r.label for r in whole if tables.picks(run, r, "right")[0] == max(r.marks["validation"])]
    assert sorted(ends) == ["Iso-C", "Iso-CTS", "TIES"] and len(whole) == 12
    assert all(len(row.marks["test"]) == 3 and row.scale in row.marks["test"] for row in run.rows)
