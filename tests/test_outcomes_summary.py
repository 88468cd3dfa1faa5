"""Intervals of the experiments against laws that are known: binomial ones, and those of independent tasks."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom

from lora_opcm.lab.evaluation import summarise


def share(right, of):
    """The first `right` of `of` texts are right."""
    return np.arange(of) < right


def summary(correct, **options):
    return summarise(correct, **options).set_index(["method", "task", "metric"])


def bounds(frame, *where):
    return [frame.loc[where, "low"], frame.loc[where, "high"]]


def test_points_of_a_summary_by_hand():
    rights = {"zero-shot": (1, 3), "m": (3, 6), "other": (1, 7), "own adapter": (4, 8)}  # of 4 and of 10
    table = summary({m: {"a": share(x, 4), "b": share(y, 10)} for m, (x, y) in rights.items()}, against="m")
    for method, (x, y) in rights.items():
        a, b = x / 4, y / 10
        value = table.value[method]
        assert [value["a", "accuracy"], value["b", "accuracy"]] == pytest.approx([a, b])
        assert value["mean", "accuracy"] == pytest.approx((a + b) / 2)
        assert value["mean", "normalised"] == pytest.approx((a / 1 + b / 0.8) / 2)
        gain = ((a + b) / 2 - 0.275) / (0.9 - 0.275)  # of averages: the tasks have other ranges
        assert value["mean", "recovered gain"] == pytest.approx(gain)
        if method != "m":
            assert value["mean", "gain difference"] == pytest.approx(gain - (0.675 - 0.275) / 0.625)
    rows = [
        ["a", "accuracy"],
        ["b", "accuracy"],
        *(["mean", x] for x in ("accuracy", "normalised", "recovered gain")),
    ]
    assert [list(r) for r in table.loc["m"].index] == rows  # and no difference to itself
    assert list(dict.fromkeys(table.index.get_level_values(0))) == list(rights)
    renamed = {"z": {"a": share(10, 40)}, "o": {"a": share(40, 40)}, "m": {"a": share(20, 40)}}
    value = summary(renamed, zero_shot="z", own="o").value.loc["m"]["mean"]
    assert value["recovered gain"] == pytest.approx(1 / 3) and value["normalised"] == pytest.approx(1 / 2)


@pytest.mark.parametrize("right, of", [(70, 100), (12, 300), (390, 400)])
def test_an_interval_is_that_of_a_binomial(right, of):
    """A resample of `of` texts, of which a share is right, has a binomial number of right ones."""
    table = summary({m: {"t": share(n, of)} for m, n in (("zero-shot", 0), ("own adapter", of), ("m", right))})
    expected = binom.ppf([0.025, 0.975], of, right / of) / of
    assert bounds(table, "m", "t", "accuracy") == pytest.approx(expected, abs=1.01 / of)
    assert bounds(table, "own adapter", "t", "accuracy") == [1, 1]


def test_the_interval_of_a_mean_over_tasks_is_that_of_independent_tasks():
    rng = np.random.default_rng(0)
    parts = {"a": rng.random(50), "b": rng.random(800) ** 3, "c": share(40, 200)}
    table = summary(
        {
            "own adapter": {t: x * 0 + 1 for t, x in parts.items()},
            "zero-shot": {t: x * 0 for t, x in parts.items()},
            "m": parts,
        }
    )
    deviation = math.sqrt(sum(np.var(x) / len(x) for x in parts.values())) / 3
    for metric in ("accuracy", "normalised", "recovered gain"):  # all the same, between 0 and 1
        low, high = bounds(table, "m", "mean", metric)
        middle = table.value["m", "mean", metric]
        assert middle == pytest.approx(np.mean([x.mean() for x in parts.values()]))
        assert [middle - low, high - middle] == pytest.approx([1.96 * deviation] * 2, rel=0.1)


@pytest.mark.slow
def test_intervals_cover_what_is_true_19_times_in_20():
    rng, inside, rounds = np.random.default_rng(3), np.zeros(2), 200
    truth = {"zero-shot": 0.4, "m": 0.65, "own adapter": 0.9}
    for i in range(rounds):
        table = summary({m: {t: rng.random(60) < p for t in "ab"} for m, p in truth.items()}, seed=i)
        for j, (metric, value) in enumerate((("accuracy", 0.65), ("recovered gain", 0.5))):
            low, high = bounds(table, "m", "mean", metric)
            inside[j] += low <= value <= high
    assert (0.90 <= inside / rounds).all() and (inside / rounds <= 0.99).all(), inside  # 4 deviations are 0.06


def test_a_difference_is_taken_text_by_text():
    """Two methods that are right on nearly the same texts: b gains 12 and loses 4 of 300."""
    a = share(150, 300)
    b = a.copy()
    b[150:162], b[:4] = True, False
    fixed = {"zero-shot": {"t": a * 0}, "own adapter": {"t": a * 0 + 1}}
    table = summary(fixed | {"a": {"t": a}, "b": {"t": b}, "twin": {"t": a}}, against="a")
    law = np.array([1.0])  # of the number of texts b gains, from 300 draws of −1, 0 or 1
    for _ in range(300):
        law = np.convolve(law, np.array([4, 284, 12]) / 300)
    expected = (np.searchsorted(law.cumsum(), [0.025, 0.975]) - 300) / 300
    low, high = bounds(table, "b", "mean", "gain difference")
    assert table.value["b", "mean", "gain difference"] == pytest.approx(8 / 300)
    assert [low, high] == pytest.approx(list(expected), abs=1.01 / 300)
    own = [np.diff(bounds(table, m, "mean", "recovered gain"))[0] for m in "ab"]
    assert high - low < 0.5 * min(own)  # unpaired it would be wider than either: √(wa² + wb²)
    assert bounds(table, "twin", "mean", "gain difference") == [0, 0]
    # Of independent texts there is nothing to pair: the difference is as wide as the two together.
    free = np.random.default_rng(0).permutation(a)
    table = summary(fixed | {"a": {"t": a}, "free": {"t": free}}, against="a")
    width = np.diff(bounds(table, "free", "mean", "gain difference"))[0]
    assert width == pytest.approx(1.96 * 2 * np.std(a * 1.0 - free) / math.sqrt(300), rel=0.1) and width > max(own)


def test_seeds_are_drawn_once_for_all_tasks_and_methods():
    """Of four training seeds one is all right: a resample draws three and has Binomial(3, 1/4) of it."""
    seeds = np.zeros((4, 50))
    seeds[2] = 1
    other = seeds[[2, 3, 0, 1]]  # another seed is right: with the first, always as many as seeds 0 and 2
    fixed = {
        "zero-shot": {"x": seeds * 0, "y": seeds * 0},
        "own adapter": {"x": seeds * 0 + 1, "y": seeds * 0 + 1},
    }
    table = summary(fixed | {"m": {"x": seeds, "y": seeds}, "twin": {"x": seeds, "y": seeds},
                             "rest": {"x": seeds, "y": 1 - seeds},
                              "two": {"x": seeds, "y": other}}, against="m")  # fmt: skip
    law = list(binom.ppf([0.025, 0.975], 3, 1 / 4) / 3)
    assert law == [0, 2 / 3] == bounds(table, "m", "x", "accuracy") == bounds(table, "m", "mean", "accuracy")
    assert table.value["m", "x", "accuracy"] == 0.25
    assert bounds(table, "rest", "mean", "accuracy") == [0.5, 0.5]
    assert bounds(table, "two", "mean", "accuracy") == list(binom.ppf([0.025, 0.975], 3, 1 / 2) / 6)
    assert bounds(table, "twin", "mean", "gain difference") == [0, 0]
    one = summary({m: {"x": c["x"][2]} for m, c in (fixed | {"m": {"x": seeds}}).items()})
    assert bounds(one, "m", "x", "accuracy") == [1, 1]  # a single seed has no spread


def test_a_summary_is_the_same_every_time_and_another_for_another_seed():
    correct = {m: {"t": share(n, 90)} for m, n in (("zero-shot", 30), ("own adapter", 70))}
    one, again, other = (summarise(correct, seed=s) for s in (0, 0, 1))
    pd.testing.assert_frame_equal(one, again)
    assert (one.value == other.value).all() and not (one.low == other.low).all()
