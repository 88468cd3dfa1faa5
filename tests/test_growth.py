"""From two adapters to twenty: curves are counted again from single texts."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from lora_opcm.lab.evidence import growth, rows, tables
from lora_opcm.lab.evidence.choice import RULE, ratio, rule
from lora_opcm.lab.evidence.outcomes import Outcome, Trial
from lora_opcm.lab.evidence.run import BOUNDS
from lora_opcm.lab.evidence.tables import Evidence, interval

NAMES = tuple("abcd")
SIZE = 10  # texts of a task


@pytest.fixture(scope="module")
def run():
    return growth.published()


def share(right):
    return np.arange(SIZE) < right


def outcome(label, method, names, validation, test, **rest):
    trial = Trial("growth", label, method, names, **rest)
    return Outcome(trial, [1.0], 1.0, validation, test, {s: [SIZE] * len(names) for s in ("validation", "test")})


def bound(label, method, rights):
    bits = np.concatenate([share(r) for r in rights])
    return outcome(label, method, NAMES, {(0, 0): bits}, {(0, 0): bits}, natural=True)


def merged(names, best, rights):
    """Validation is all right at one step and wrong beside it; test has so many right at each step."""
    on = {step: np.full(SIZE * len(names), step == best) for step in rights}
    test = {(0, step): np.tile(share(right), len(names)) for step, right in rights.items()}
    return outcome("sum", "cat", names, {(0, step): bits for step, bits in on.items()}, test)


@pytest.fixture
def small():
    """Bases are right on 2 of 10, own adapters on 10, 10, 6 and 6; two sets of two, one of four."""
    made = [bound("zero-shot", "", [2] * 4), bound("own adapter", "own", [10, 10, 6, 6])]
    made += [merged(("a", "b"), 1, {1: 8, 2: 4}), merged(("c", "d"), 3, {1: 4, 3: 5})]
    return Evidence({}, [*made, merged(NAMES, 2, {2: 5, 3: 9})])


def test_a_curve_is_a_mean_over_sets(small):
    curve = growth.curve(small, "sum")
    assert curve.index.tolist() == [2, 4] and curve.sets.tolist() == [2, 1]
    # 8 − 2 of 10 − 2 and 5 − 2 of 6 − 2, twice each; 5 − 2 four times of 8 + 8 + 4 + 4
    assert curve.gain.tolist() == pytest.approx([100 * 18 / 24, 50])
    assert curve.scale.tolist() == pytest.approx([2, 2])  # √(√2 · 2√2), and the rule
    assert (curve.shortest[2], curve.longest[2]) == pytest.approx((ratio(1), ratio(3)))
    # of two the rule is step 1: as chosen, and 4 − 2 in place of 5 − 2
    assert curve.lost.tolist() == pytest.approx([100 * 2 / 24, 0])
    assert (curve.low <= curve.gain).all() and (curve.gain <= curve.high).all()


def test_the_trend_is_a_line_through_all_sets(small):
    slope = np.polyfit([1, 1, 2], [1, 3, 2], 1)[0]
    # every draw has one of the two sets of two, at step 1 or 3, and the one of four, at step 2
    assert growth.trend(small, "sum") == pytest.approx((2 ** (slope / 2), 2**-0.5, 2**0.5))


def test_of_four_sets_three_are_drawn(small):
    """One of the four is at step 1, the others at 3. In 16 % of draws it is two of three at least, in 1.6 % all."""
    pairs = [merged(names, 3 if i else 1, {1: 8, 3: 5}) for i, names in enumerate(list(combinations(NAMES, 2))[:4])]
    made = Evidence({}, [*small.outcomes[:2], *pairs, small.outcomes[-1]])  # the one of four is at step 2
    assert growth.trend(made, "sum") == pytest.approx([2 ** ((2 - step) / 2) for step in (2.5, 3, 5 / 3)])


@pytest.mark.slow
def test_a_trend_may_be_of_some_numbers(run):
    drawn = growth.sets(run, "TSV")
    for first, last in ((1, 8), (8, 20), (1, 20)):
        points = [(np.log2(n), o.picked[0][1]) for n, each in drawn.items() if first <= n <= last for o in each]
        by, low, high = growth.trend(run, "TSV", first=first, last=last)
        assert by == pytest.approx(2 ** (np.polyfit(*zip(*points, strict=True), 1)[0] / 2)) and low < by < high


def test_methods_that_lack_a_set_are_left_out(small):
    more = [merged(("a", "b"), 1, {1: 8}), merged(("c", "d"), 1, {1: 8})]
    others = [outcome("less", "tsv", o.trial.tasks, o.validation, o.test) for o in more]
    assert growth.labels(Evidence({}, [*small.outcomes, *others])) == ["sum"]


def test_the_rule_is_the_root_of_their_number_and_at_most_two():
    assert [ratio(rule(count)) for count in (1, 2, 4, 8, 20)] == pytest.approx([1, 2**0.5, 2, 2, 2])
    assert rule(3) == RULE and abs(ratio(rule(3)) - 3**0.5) < abs(ratio(1) - 3**0.5)


def test_the_published_curve_is_whole(run):
    trials = {o.trial for o in run.outcomes}
    assert trials == set(rows.growth(4)) and len(trials) == len(run.outcomes)
    for rank in (None, rows.RANK):
        labels = growth.labels(run, rank)
        assert len(labels) == 6
        for label in labels:
            drawn = {count: len(each) for count, each in growth.sets(run, label, rank).items()}
            assert drawn == rows.SUBSETS, label
    assert Counter(o.trial.method in BOUNDS for o in run.outcomes)[True] == 2
    assert sum(run.about["devices"].values()) == len(run.outcomes)


@pytest.mark.slow
def test_published_gains_are_counted_from_single_texts(run):
    zero, own = (next(o for o in run.outcomes if o.trial.method == m) for m in ("", "own"))

    def right(outcome, at, names):
        edges = np.cumsum([0, *outcome.sizes["test"]])
        place = {task: slice(a, b) for task, a, b in zip(outcome.trial.tasks, edges, edges[1:])}
        return np.mean([outcome.test[at][place[name]].mean() for name in names])

    for label in growth.labels(run):
        curve = growth.curve(run, label)
        for count, outcomes in growth.sets(run, label).items():
            found = []
            for o in outcomes:
                low, high = (right(x, (0, 0), o.trial.tasks) for x in (zero, own))
                tuned, ruled = (right(o, at, o.trial.tasks) for at in (o.picked[0], (0, rule(count))))
                found.append((tuned - low, ruled - low, high - low))
            tuned, ruled, whole = np.mean(found, 0)
            chosen, ruled = 100 * tuned / whole, 100 * ruled / whole
            assert curve.gain[count] == pytest.approx(chosen), (label, count)
            assert curve.lost[count] == pytest.approx(chosen - ruled), (label, count)


@pytest.mark.slow
def test_what_the_page_says_in_words_holds(run):
    """Sentences without a number that other results would make false."""
    curves = {label: growth.curve(run, label) for label in growth.labels(run)}
    gains = {label: curve.gain for label, curve in curves.items()}
    first, last = min(rows.SUBSETS), max(rows.SUBSETS)
    assert all(gain[first] > 90 for gain in gains.values())  # of two nine tenths by any method
    least = "task arithmetic"

    def ahead(count, label, of=least, rank=None):
        one, other = (run.row(growth.sets(run, name, rank)[count]).pooled for name in (label, of))
        return interval(one - other)

    others = [label for label in gains if label != least]
    assert all(low < 0 < high for low, high in (ahead(first, label) for label in others))  # not told apart
    assert all(ahead(last, label)[0] > 0 for label in others)  # with twenty, everything was
    assert all(gain[first] > gain[8] > gain[last] for gain in gains.values())  # all lose
    assert all(min(gains, key=lambda label: gains[label][count]) == least for count in (16, last))
    assert max(gains, key=lambda label: gains[label][first] - gains[label][last]) == least  # plain addition most
    pairs = tables.published().select("pairs", (1,))
    plain = tables.published().row(pairs["sum, scale 1", None]).draws
    more = tables.published().row(pairs["TSV", None], lambda o: (0, 1)).draws - plain
    assert interval(more)[0] > 0 and round(more[0]) == 1  # on the pairs of Two LoRAs TSV was, by a point
    assert len(pairs["TSV", None]) > rows.SUBSETS[first]  # which are more
    trends = [{label: growth.trend(run, label, **ends) for label in curves} for ends in ({"last": 8}, {"first": 8}, {})]
    grown, still, line = ({k: v for k, v in each.items() if k != least} for each in trends)
    assert all(1.25 < by < 2**0.5 and high > 2**0.5 for by, _, high in grown.values())  # nearly as the square root
    assert all(by < 1.1 and low < 1 for by, low, _ in still.values())  # no further growth was seen
    assert all(by < 2**0.5 and high > 1.38 for by, _, high in line.values())  # hardly told apart from the root
    assert trends[2][least][1] < 1 < trends[2][least][2] and abs(trends[2][least][0] - 1) < 0.05  # nor plain addition
    by, low, high = growth.trend(run, "Iso-C", rows.RANK)
    assert by < 1 and low < 1 < high  # nor flat updates, cut
    assert [rule(n) for n in (2, 4, 8)] == [1, 2, 2]  # which stops growing at four
    assert all(curve.scale[last] < last**0.5 for curve in curves.values())
