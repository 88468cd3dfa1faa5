"""Two into one: what the page's table says is counted again from single texts."""

import numpy as np
import pytest

from lora_opcm.lab.evidence import rows, two
from lora_opcm.lab.evidence.outcomes import Outcome, Trial
from lora_opcm.lab.evidence.tables import Evidence

SIZE = 10  # texts of a task
OWN = {"a": 10, "b": 8, "c": 6}  # of them an own adapter has right; the base model 2


def outcome(label, method, rights, **rest):
    bits = np.concatenate([np.arange(SIZE) < right for right in rights.values()])
    at = {(0, 0): bits}
    return Outcome(
        Trial(two.PART, label, method, tuple(rights), **rest),
        [1.0],
        1.0,
        at,
        at,
        {s: [SIZE] * len(rights) for s in ("validation", "test")},
    )


@pytest.fixture
def small():
    rest = {"rank": 16}
    made = [
        outcome("zero-shot", "", dict.fromkeys(OWN, 2), natural=True),
        outcome("own adapter", "own", OWN, natural=True),
    ]
    made += [outcome("sum", "cat", {x: OWN[x] - 1 for x in pair}, **rest) for pair in ("ab", "bc", "ac")]
    made += [
        outcome("mean", "mean", {x: lost for x in pair}, **rest) for pair, lost in (("ab", 2), ("ac", 6), ("bc", 4))
    ]
    return Evidence({}, made)


def test_a_table_of_pairs(small):
    found = two.methods(small)
    assert list(found) == ["sum", "mean"]
    pairs = two.by_pair(found)
    assert pairs.index.tolist() == ["a + b", "a + c", "b + c"]  # the same pairs beside each other for both
    assert pairs["sum"].tolist() == pytest.approx([100 * 12 / 14, 100 * 10 / 12, 100 * 8 / 10])
    assert pairs["mean"].tolist() == pytest.approx([0, 100 * 8 / 12, 100 * 4 / 10])
    table = two.summary(found, "sum")
    assert table.gain.tolist() == pytest.approx([100 * 30 / 36, 100 * 12 / 36])
    assert table["minus"].tolist() == pytest.approx([0, -50]) and table["worst pair"]["mean"] == 0
    assert table.ahead.tolist() == [0, 0] and (table["minus low"] <= table["minus"]).all()


def test_tasks_are_drawn_and_pairs_follow():
    """All 64 draws of three of four tasks by hand: a pair counts the product of its tasks, and no pair is no draw."""
    own, rest = OWN | {"d": 9}, {"rank": 16}
    made = [outcome("zero-shot", "", dict.fromkeys(own, 2), natural=True)]
    made.append(outcome("own adapter", "own", own, natural=True))
    less = {"ab": 12, "ac": 2, "bc": 4, "ad": 6, "bd": 0, "cd": 8}
    whole = {pair: sum(own[x] - 2 for x in pair) for pair in less}
    for pair, lost in less.items():
        made.append(outcome("sum", "cat", {x: own[x] for x in pair}, **rest))
        halves = lost // 2, lost - lost // 2
        made.append(outcome("mean", "mean", {x: own[x] - n for x, n in zip(pair, halves)}, **rest))
    found = two.methods(Evidence({}, made))
    values = []
    for draw in np.ndindex(4, 4, 4):
        times = {x: sum("abcd"[i] == x for i in draw) for x in "abcd"}
        weight = {pair: times[pair[0]] * times[pair[1]] for pair in less}
        if any(weight.values()):
            values.append(-100 * sum(weight[p] * less[p] for p in less) / sum(weight[p] * whole[p] for p in less))
    assert len(values) == 60
    ends = np.quantile(values, [0.025, 0.975])
    assert two.over_tasks(found["mean"], found["sum"]) == pytest.approx(tuple(ends), abs=0.01)
    assert two.over_tasks(found["sum"], found["sum"]) == (0, 0)


@pytest.fixture(scope="module")
def run():
    return two.published()


def test_the_published_pairs_are_whole(run):
    assert {o.trial for o in run.outcomes} == set(rows.two_into_one()) and len(run.outcomes) == 2 + 4 * 28
    assert sum(run.about["devices"].values()) == len(run.outcomes)


@pytest.mark.slow
def test_published_gains_are_counted_from_single_texts(run):
    zero, own = (next(o for o in run.outcomes if o.trial.method == m) for m in ("", "own"))
    place = {task: i for i, task in enumerate(zero.trial.tasks)}

    def right(o, at, tasks):
        parts = np.split(o.test[at], np.cumsum(o.sizes["test"])[:-1])
        return np.mean([parts[place[t] if o in (zero, own) else i].mean() for i, t in enumerate(tasks)])

    table = two.summary(two.methods(run), "task arithmetic")
    for label, line in table.iterrows():
        each = [o for o in run.outcomes if o.trial.label == label]
        low, high = ([right(o, (0, 0), x.trial.tasks) for x in each] for o in (zero, own))
        kept = np.array([right(o, o.picked[0], o.trial.tasks) for o in each]) - low
        whole = np.array(high) - low
        assert line.gain == pytest.approx(100 * kept.sum() / whole.sum()), label
        assert line["worst pair"] == pytest.approx(100 * (kept / whole).min()), label


@pytest.mark.slow
def test_what_the_page_says_in_words_holds(run):
    """Sentences without a number that other results would make false."""
    table = two.summary(two.methods(run), "task arithmetic")
    means = table.loc[["chordal mean", "quotient mean"]]
    chordal, quotient = (means.loc[label] for label in means.index)
    assert chordal["minus high"] < 0 and chordal["tasks high"] < 0  # it loses what addition keeps
    assert set(table.index[-2:]) == set(means.index)  # they lie to the left
    assert quotient["minus"] < -2  # and so does the mean that weighs by size
