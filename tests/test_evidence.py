"""The published run on small outcomes whose numbers are known by hand or counted in plain loops."""

import itertools
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from statistics import mean

import numpy as np
import pytest
import torch

import lora_opcm as lo
from lora_opcm.lab.evidence import recipes, rows, run
from lora_opcm.lab.evidence.choice import ENDS, RULE, START, best, chosen, ratio, score, search
from lora_opcm.lab.evidence.outcomes import Outcome, Trial, cut, read, read_lines, write
from lora_opcm.lab.evidence.publish import main as publish
from lora_opcm.lab.evidence.tables import (
    Evidence,
    accuracy,
    at_step,
    favourite,
    few_texts,
    interval,
    over_tasks,
    published,
    summary,
)
from lora_opcm.lab.resampling import RESAMPLES, draws, redrawn
from lora_opcm.lab.tasks import load_task, small_tasks, tasks
from lora_opcm.merging.method import method_of


def share(right, of):
    return np.arange(of) < right


def random_bits(generator, names, count, chance=0.7):
    return {c: generator.random(count) < chance for c in names}


def outcome_of(trial, validation, test, sizes=(3, 4), test_sizes=None):
    sizes = {"validation": list(sizes), "test": list(test_sizes or sizes)}
    return Outcome(trial, [1.0] * len(trial.options), 1.0, validation, test, sizes)


def bound(method, test, sizes, seed=1, names=("a", "b"), part="bake_off"):
    label = {"": "zero-shot", "own": "own adapter"}[method]
    return outcome_of(Trial(part, label, method, names, natural=True, seed=seed), {}, {(0, 0): test}, sizes)


# -- choice --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, tried",
    [
        (lambda k: -abs(k - 1), START),  # inside: nothing more is tried
        (lambda k: -abs(k - 6), range(-2, 8)),  # one step beyond the best
        (lambda k: -abs(k + 4), range(-5, 5)),
        (lambda k: k, range(-2, ENDS[1] + 1)),  # for ever better: to the end
        (lambda k: -k, range(ENDS[0], 5)),
        (lambda k: min(k, 3), range(-2, ENDS[1] + 1)),  # a plateau that has no end
        (lambda k: float(2 <= k <= 5), range(-2, 7)),  # one that has
        (lambda k: float(k in (-2, 4)), range(-3, 6)),  # both ends
    ],
)
def test_the_grid_grows_until_the_best_is_inside(values, tried):
    asked = []
    found = search(lambda i, k: asked.append((i, k)) or values(k) - 10 * i, 2)
    assert sorted(found) == sorted(asked) == [(i, k) for i in (0, 1) for k in tried]  # every option grows, none twice
    assert all(value == values(k) - 10 * i for (i, k), value in found.items())


def test_ratios_are_of_norms():
    assert [ratio(k) for k in (-2, 0, 1, 2, 4)] == pytest.approx([0.5, 1, 2**0.5, 2, 4])


@pytest.mark.parametrize(
    "top, expected",
    [
        ([(0, 3)], (0, 3)),
        ([(0, 1), (0, 2), (0, 3)], (0, 2)),
        ([(0, -2), (0, -1), (0, 0), (0, 1), (0, 2)], (0, 0)),
        ([(0, 1), (0, 2)], (0, 2)),  # of two the larger
        ([(0, 1), (1, 2), (1, 3), (1, 4), (0, 2)], (1, 3)),  # of options those with the wider plateau
        ([(1, 4), (0, -1)], (0, -1)),
    ],
)
def test_ties_go_to_the_middle_of_the_plateau_in_whatever_order(top, expected):
    for order in itertools.permutations([*top, (0, 4), (2, 0)], len(top) + 2):
        assert best({c: 1.0 if c in top else 0.5 for c in order}) == expected


def test_equal_scores_are_equal_whatever_texts_are_right():
    """Single precision would tell apart which texts are right, not only how many."""
    generator, sizes = np.random.default_rng(0), (391, 400, 57)
    bits = np.concatenate([share(right, n) for right, n in zip((300, 211, 33), sizes)])
    edges = np.cumsum((0, *sizes))
    mixed = [np.concatenate([generator.permutation(bits[a:b]) for a, b in zip(edges, edges[1:])]) for _ in range(50)]
    assert {score(m, sizes) for m in mixed} == {round((300 / 391 + 211 / 400 + 33 / 57) / 3, 9)}
    right = {(0, k): m for k, m in enumerate(mixed[:7])}
    assert chosen(right, "abc", sizes)[0] == (0, 3)
    up, down = (np.concatenate([share(n, 10) for n in rights]) for rights in ((1, 2, 3), (3, 2, 1)))
    assert chosen({(0, 0): up, (0, 1): down, (0, 2): up}, "abc", (10, 10, 10))[0] == (0, 1)  # in floats 0.1 + 0.2 > 0.3


def test_draws_are_of_as_many_texts_with_replacement():
    found = draws("a", 50, "test")
    assert found.shape == (1 + RESAMPLES, 50) and (found[0] == 1).all() and (found.sum(1) == 50).all()
    assert abs(found[1:].var() - 49 / 50) < 0.03 and np.array_equal(found, found.round())
    assert not np.array_equal(found, draws("a", 50, "validation"))
    assert not np.array_equal(found, draws("b", 50, "test"))


@pytest.mark.parametrize("often", [None, "all"])
@pytest.mark.parametrize("count", [2, 3, 5, 8, 20])
def test_few_units_are_drawn_as_far_apart_as_they_lie(count, often):
    """The mean of n units varies by their unbiased variance over n."""
    values = np.random.default_rng(count).normal(size=count)
    weights = redrawn(count, 7, 4000, often and count)
    assert weights.shape == (4001, count) and (weights.sum(1) == pytest.approx(1))
    assert often or ((weights * (count - 1)).round(9) % 1 == 0)[1:].all() and weights.min() == 0  # whole units
    assert weights[0] @ values == pytest.approx(values.mean())
    assert (weights[1:] @ values).var() == pytest.approx(values.var(ddof=1) / count, rel=0.1)
    assert (redrawn(1, 7, often=often and 1) == 1).all()


def plain_choice(validation, counts):
    """The best candidate in fractions; `counts` says how often each text of each task was drawn."""
    scores = {}
    for candidate, bits in validation.items():
        texts = iter(bits.tolist())
        scores[candidate] = sum(
            Fraction(sum(int(n) * next(texts) for n in task), len(task)) for task in counts
        )  # the sum over tasks
    top = [c for c in scores if scores[c] == max(scores.values())]
    option, _ = max(Counter(i for i, _ in top).items(), key=lambda x: (x[1], -x[0]))
    steps = sorted(k for i, k in top if i == option)
    return option, steps[len(steps) // 2]


def test_choices_in_resamples_are_those_of_plain_loops():
    """Seven texts: most resamples have ties."""
    names = [(1, 2), (0, 0), (0, 2), (0, 1), (1, 0)]
    validation = random_bits(np.random.default_rng(0), names, 7)
    counts = [draws("a", 3, "validation"), draws("b", 4, "validation")]
    expected = [plain_choice(validation, [c[j] for c in counts]) for j in range(1 + RESAMPLES)]
    found = chosen(validation, "ab", (3, 4))
    assert found == expected and len(set(found)) > 2
    backwards = dict(reversed(validation.items()))
    assert chosen(backwards, "ab", (3, 4)) == expected
    other = {c: np.concatenate([bits[3:], bits[:3]]) for c, bits in validation.items()}
    assert chosen(other, "ba", (4, 3)) == expected  # another order of the tasks


def test_a_choice_that_was_not_tested_gives_way_to_the_best_that_was():
    """And nothing else does: a plateau has its middle where it had it."""
    trial = Trial("p", "l", "cat", ("a", "b"))
    validation = random_bits(np.random.default_rng(0), [(0, k) for k in range(5)], 7)
    every, moved = chosen(validation, "ab", (3, 4)), 0
    assert outcome_of(trial, validation, validation).picked == every
    for gone in set(every) - {every[0]}:
        kept = {c: bits for c, bits in validation.items() if c != gone}
        tested = chosen(kept, "ab", (3, 4))
        picked = outcome_of(trial, validation, kept).picked
        assert picked == [c if c != gone else d for c, d in zip(every, tested, strict=True)]
        moved += picked != tested
    assert moved


# -- outcomes ------------------------------------------------------------------------------------------------


def some_outcomes():
    generator, found = np.random.default_rng(0), []
    for seed, names, sizes in ((1, "ab", (3, 4)), (2, "ab", (3, 4)), (1, "ba", (4, 3))):
        options = ({"x": None, "y": 0.1}, {"x": 2, "sides": "left"})
        trial = Trial("p", "l", "cat", tuple(names), options, rank=4, seed=seed, steps=None)
        bits = random_bits(generator, [(0, -1), (1, 3), (0, 2)], 7)
        found.append(outcome_of(trial, bits, {c: ~b for c, b in bits.items()}, sizes))
        found[-1].about["seconds"] = [0.1, 2]
    return [*found, bound("", share(2, 7), (3, 4))]


def assert_same(found, expected):
    assert [o.trial for o in found] == [o.trial for o in expected]
    for one, other in zip(found, expected):
        assert (one.norms, one.mean, one.sizes, one.about) == (other.norms, other.mean, other.sizes, other.about)
        for split in ("validation", "test"):
            mine, theirs = getattr(one, split), getattr(other, split)
            assert list(mine) == list(theirs) and all(np.array_equal(mine[c], theirs[c]) for c in theirs)
            assert all(bits.dtype == bool for bits in mine.values())


def test_outcomes_come_back_from_lines_and_from_the_packed_file(tmp_path):
    made = some_outcomes()
    (tmp_path / "lines").write_text("".join(o.line() + "\n" for o in made))
    assert_same(list(read_lines(tmp_path / "lines")), made)
    assert list(read_lines(tmp_path / "none")) == []
    about, found = read(write(tmp_path / "packed", made, {"protocol": 2}))
    assert about == {"protocol": 2}
    assert_same(found, made)
    assert len({o.trial for o in [*made, *found]}) == 4


def test_the_same_tasks_may_have_other_texts_in_another_run(tmp_path):
    made = some_outcomes()
    for seed, sizes in ((3, (30, 4)), (4, (2, 1)), (5, (31, 3)), (6, (3, 4))):
        trial = Trial("p", "l", "cat", ("a", "b"), seed=seed)
        bits = random_bits(np.random.default_rng(seed), [(0, 0), (0, 1)], sum(sizes))
        made.append(outcome_of(trial, bits, bits, sizes))
    assert_same(read(write(tmp_path / "packed", made, {}))[1], made)


def test_a_torn_last_line_is_left_out_and_cut(tmp_path):
    made, file = some_outcomes(), tmp_path / "lines"
    whole = "".join(o.line() + "\n" for o in made[:2])
    for torn in ("", made[2].line()[:-9], made[2].line()[:5], made[2].line()):  # the last lacks its line's end alone
        file.write_text(whole + torn)
        if not torn.endswith("}"):
            assert_same(list(read_lines(file)), made[:2])
        cut(file)
        assert file.read_text() == whole
    cut(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_published_outcomes_count_once_and_say_of_what_texts_they_are(tmp_path):
    names, sizes = ("tweets", "ng-sci"), (3, 4)
    made = [bound(m, share(n, 7), sizes, names=names) for m, n in (("", 1), ("own", 5), ("", 3))]
    for name, outcomes in (("one", made[:2]), ("two", made[2:])):
        (tmp_path / name).write_text("".join(o.line() + "\n" for o in outcomes))
    publish([tmp_path / "one", tmp_path / "two"], tmp_path / "outcomes.xz", "abc")
    about, found = read(tmp_path / "outcomes.xz")
    assert [o.about.pop("commit") for o in found] == ["abc", "abc"]
    assert_same(found, made[:2])
    assert about["texts"] == {n: load_task(n).sha256 for n in names}
    assert (about["protocol"], about["commits"], about["devices"]) == (2, {"abc": 2}, {"": 2})
    more = bound("own", share(2, 7), sizes, seed=2, names=names)
    (tmp_path / "more").write_text(more.line() + "\n" + made[0].line() + "\n")
    publish([tmp_path / "outcomes.xz", tmp_path / "more"], tmp_path / "both.xz", "defghijk")
    about, found = read(tmp_path / "both.xz")
    assert about["commits"] == {"abc": 2, "defghijk": 1} and Evidence(about, found).commits == "abc, defghij"
    assert [o.about.pop("commit") for o in found] == ["abc", "abc", "defghijk"]
    old = write(tmp_path / "old.xz", made[:1], {"commit": "older"})
    publish([old, tmp_path / "more"], tmp_path / "three.xz", "new")
    assert read(tmp_path / "three.xz")[0]["commits"] == {"older": 1, "new": 1}  # from before each said so itself
    assert_same(found, [*made[:2], more])


# -- tables --------------------------------------------------------------------------------------------------


def evidence_of(seeds=(1, 2), sizes=(3, 4), names=("a", "b"), generator=None, parts=("one", "two")):
    """Random outcomes of two rows with chosen scales, of the base model and of own adapters."""
    generator, count, made = generator or np.random.default_rng(3), sum(sizes), []
    for seed in seeds:
        made.append(bound("", generator.random(count) < 0.3, sizes, seed, names))
        made.append(bound("own", np.ones(count, bool), sizes, seed, names))
        for label in parts:
            trial = Trial("bake_off", label, "cat", names, ({"a": 1}, {"a": 2}), seed=seed)
            candidates = [(0, -1), (0, 2), (1, 0), (1, 1)]
            made.append(outcome_of(trial, *(random_bits(generator, candidates, count) for _ in range(2)), sizes))
    return Evidence({}, made)


def test_gains_and_their_resamples_are_those_of_plain_loops():
    evidence, shares = evidence_of(), redrawn(2, 7, often=2)
    ends = {(0.5 - 0.5**0.5, 0.5 + 0.5**0.5), (0.5 + 0.5**0.5, 0.5 - 0.5**0.5), (0.5, 0.5)}  # √2 times as far
    assert {tuple(w.round(9)) for w in shares} == {tuple(np.round(w, 9)) for w in ends}
    for label in ("one", "two"):
        row = evidence.bake_off[label, None]
        for j in (0, 1, 2, 500, RESAMPLES):
            drawn = [draws("a", 3, "test")[j], draws("b", 4, "test")[j]]
            kept = whole = 0.0
            for outcome, weight in zip(row.outcomes, shares[j], strict=True):
                base, own = (
                    next(o for o in evidence.outcomes if (o.trial.method, o.trial.seed) == (m, outcome.trial.seed))
                    for m in ("", "own")
                )

                each = [base.test[0, 0], outcome.test[outcome.picked[j]], own.test[0, 0]]
                zero, merged, best_ = (mean([x[:3] @ drawn[0] / 3, x[3:] @ drawn[1] / 4]) for x in each)
                kept += weight * (merged - zero)
                whole += weight * (best_ - zero)
            assert row.draws[j] == pytest.approx(100 * kept / whole), (label, j)


def by_hand(rights, sizes=(10, 10), seed=1):
    """A row that is right on so many texts of each task; its base is right on half, its own on 9 and on 6 of 10."""
    test = np.concatenate([share(r, n) for r, n in zip(rights, sizes)])
    made = [bound("", np.concatenate([share(5, 10), share(5, 10)]), sizes, seed)]
    made.append(bound("own", np.concatenate([share(9, 10), share(6, 10)]), sizes, seed))
    return [*made, outcome_of(Trial("bake_off", "row", "cat", ("a", "b"), seed=seed), {}, {(0, 2): test}, sizes)]


@pytest.mark.filterwarnings("ignore:.*encountered in divide")  # in resamples of so few texts nothing is to gain
def test_gain_is_a_ratio_of_means_beside_the_mean_of_ratios():
    evidence = Evidence({}, [*by_hand((7, 5), seed=1), *by_hand((9, 6), seed=2), *by_hand((5, 4), seed=3)])
    row = evidence.bake_off["row", None]
    assert row.by_seed == pytest.approx([40, 100, -20])
    assert row.value == pytest.approx(40)  # gained 2 + 5 − 1 of 15 tenths
    assert row.by_task == pytest.approx(np.array([[0.2, 0], [0.4, 0.1]]))
    assert row.mean_of_ratios == pytest.approx(25)
    assert row.ratios == [2, 2, 2] and row.options == [{}] * 3
    single = Evidence({}, by_hand((7, 5))).bake_off["row", None]
    assert single.value == pytest.approx(40) and single.mean_of_ratios == pytest.approx(25)


def test_intervals_over_tasks_draw_tasks_and_nothing_else():
    """Of three tasks with equal room two are drawn: 1 in 9 has the worst alone, so the 2.5 % quantile is its gain."""
    sizes, names = (10, 10, 10), ("a", "b", "c")

    def row(*rights):
        trial = Trial("bake_off", "row", "cat", names)
        bits = np.concatenate([share(r, 10) for r in rights])
        made = [bound(m, np.tile(share(n, 10), 3), sizes, names=names) for m, n in (("", 4), ("own", 8))]
        return Evidence({}, [*made, outcome_of(trial, {}, {(0, 0): bits}, sizes)]).bake_off["row", None]

    assert over_tasks(row(5, 6, 8)) == pytest.approx((25, 100))
    assert over_tasks(row(6, 6, 6)) == pytest.approx((50, 50))
    assert over_tasks(row(5, 6, 8), row(4, 5, 7)) == pytest.approx((25, 25))  # the same tasks for both
    assert over_tasks(row(5, 6, 8), row(6, 6, 6)) == pytest.approx((-25, 50))


def test_intervals_over_tasks_are_of_ratios_of_sums():
    """Against all 5⁴ draws of four of five tasks, two of which have most to gain."""
    own, row = (10, 8, 1, 2, 1), (5, 7, 0, 2, 1)
    names, sizes = tuple("abcde"), (10,) * 5
    bits = {k: np.concatenate([share(r, 10) for r in rights]) for k, rights in (("own", own), ("row", row))}
    made = [bound("", np.zeros(50, bool), sizes, names=names), bound("own", bits["own"], sizes, names=names)]
    made.append(outcome_of(Trial("bake_off", "row", "cat", names), {}, {(0, 0): bits["row"]}, sizes))
    each = [100 * sum(row[i] for i in p) / sum(own[i] for i in p) for p in itertools.product(range(5), repeat=4)]
    found = over_tasks(Evidence({}, made).bake_off["row", None])
    for end, part in zip(found, (0.025, 0.975)):  # of 10,000 draws, so a little more or less is beyond an end
        low, high = np.quantile(each, [part - 0.006, part + 0.006])
        assert low - 1e-9 <= end <= high + 1e-9


def test_intervals_cover_the_truth():
    """Of 200 worlds in which a method recovers half of the gain; texts are drawn, and nothing is chosen."""
    sizes, generator, inside, widths = (120, 80), np.random.default_rng(0), 0, []
    chances = {"": (0.4, 0.6), "own": (0.8, 0.9), "row": (0.55, 0.8)}  # 0.175 of 0.35
    for _ in range(200):
        luck = generator.random(200)  # some texts are easy for all
        each = {k: np.where(generator.random(200) < 0.5, luck, generator.random(200)) for k in chances}
        bits = {k: each[k] < np.repeat(chance, sizes) for k, chance in chances.items()}
        made = [bound(m, bits[m], sizes) for m in ("", "own")]
        made.append(outcome_of(Trial("bake_off", "row", "cat", ("a", "b")), {}, {(0, 0): bits["row"]}, sizes))
        low, high = interval(Evidence({}, made).bake_off["row", None].draws)
        inside += low <= 50 <= high
        widths.append(high - low)
    assert 0.91 <= inside / 200 <= 0.985 and 10 < np.mean(widths) < 50


def test_what_validation_texts_leave_open_widens_the_interval():
    """Two scales that validation cannot tell apart, one right on all test texts and one on half."""
    validation = {(0, 0): np.tile([True, False], 10), (0, 1): np.tile([False, True], 10)}
    test = {(0, 0): np.ones(20, bool), (0, 1): np.tile([True, False], 10)}
    outcome = outcome_of(Trial("p", "l", "cat", ("a", "b")), validation, test, (10, 10))
    found, at = (accuracy([outcome], at)[0].mean(1) for at in (None, lambda o: (0, 0)))
    assert (at == 1).all() and 0.3 < (found == 1).mean() < 0.7 and found.min() < 0.5


def test_a_method_against_itself_in_another_order_is_exactly_no_difference():
    """Whatever else was merged, a task has the same draws; choices, texts and seeds are drawn together."""
    evidence, turned = evidence_of(), []
    for outcome in evidence.outcomes:
        trial = replace(outcome.trial, tasks=("b", "a"))
        turn = [{c: np.concatenate([b[3:], b[:3]]) for c, b in s.items()} for s in (outcome.validation, outcome.test)]
        turned.append(outcome_of(trial, *turn, (4, 3)))
    for key, row in evidence.bake_off.items():
        other = Evidence({}, turned).bake_off[key]
        assert np.array_equal(row.accuracy, other.accuracy[..., ::-1]), key
        assert (row.draws - other.draws == 0).all(), key


def test_a_summary_is_paired():
    evidence = evidence_of()
    named = {label: row for (label, _), row in evidence.bake_off.items()}
    table = summary(named, "one")
    assert list(table["gain"]) == sorted(table["gain"], reverse=True) and table.loc[
        "own adapter", "gain"
    ] == pytest.approx(100)
    for column in ("minus", "minus low", "minus high", "minus tasks low", "minus tasks high"):
        assert table.loc["one", column] == 0, column
    low, high = np.quantile((named["two"].draws - named["one"].draws)[1:], [0.025, 0.975])
    assert list(table.loc["two", ["minus low", "minus high"]]) == [low, high]
    assert list(table.loc["zero-shot", ["gain", "low", "high"]]) == [0, 0, 0]


def test_a_row_at_a_given_step_keeps_its_knob():
    evidence = evidence_of(seeds=(1,))
    (outcome,) = evidence.select("bake_off", label="one")["one", None]
    candidates = [(0, 0), (0, 1), (1, 0), (1, 1)]
    validation = {c: share(6 if c == (1, 1) else 2, 7) for c in candidates}
    test = {c: share(n, 7) for c, n in zip(candidates, (1, 2, 5, 6))}
    found = at_step(evidence, [replace(outcome, validation=validation, test=test)], 0)
    assert found.accuracy[0, 0] == pytest.approx([3 / 3, 2 / 4]) and found.options == [{"a": 2}]
    assert at_step(evidence, [outcome], 3) is None


def test_favourite_is_what_validation_texts_like():
    """Averaged over tasks and not over texts; bounds and what was never validated are no favourites."""
    evidence = evidence_of(seeds=(1,), parts=())
    for label, rights in (("many texts", (0, 4)), ("few texts", (3, 1)), ("none", None)):
        bits = None if rights is None else np.concatenate([share(rights[0], 3), share(rights[1], 4)])
        trial = Trial("bake_off", label, "cat", ("a", "b"))
        evidence.outcomes.append(outcome_of(trial, {} if bits is None else {(0, 0): bits}, {(0, 0): share(5, 7)}))
    assert favourite({label: row for (label, _), row in evidence.bake_off.items()}) == "few texts"


def test_only_whole_seeds_count():
    evidence = evidence_of(seeds=(1, 2, 3, 4))
    made = [o for o in evidence.outcomes if o.trial.seed != 3 or o.trial.label == "one"]
    made += [replace(o, trial=replace(o.trial, seed=0)) for o in evidence.outcomes if o.trial.seed == 1]
    made = [o for o in made if (o.trial.label, o.trial.seed) != ("two", 4)]  # one row may lack
    found = Evidence({}, made[::-1])
    assert found.seeds == (1, 2, 4) and set(found.bake_off) == {(n, None) for n in ("zero-shot", "own adapter", "one")}
    assert [o.trial.seed for o in found.bake_off["one", None].outcomes] == [1, 2, 4]


def test_few_texts_lose_what_the_others_say():
    names, sizes = [(0, -2), (0, -1), (0, 0)], (40, 60)
    trial = Trial("p", "l", "cat", ("a", "b"))

    def lost(*parts, counts=(1, 1000)):
        validation = {c: np.concatenate([share(p, n) for n in sizes]) for c, p in zip(names, parts)}
        outcome = outcome_of(trial, validation, validation, sizes)
        return list(few_texts([outcome], counts, 50)["lost"])

    assert lost(100, 100, 100) == [0, 0]
    assert lost(0, 0, 100) == [0, 0]
    assert lost(30, 100, 100) == [0, 0]  # ties are many with one text: they go to the middle, not to the first
    few, many = lost(10, 0, 20)
    assert 0 < few < 30 and many == 0


# -- what is run ---------------------------------------------------------------------------------------------


def test_the_run_is_of_distinct_trials_with_one_knob_each():
    found = rows.published()
    assert len({t.key for t in found}) == len(found)
    for trial in found:
        assert trial.method in (*run.BOUNDS, "regmean") or method_of(trial.method), trial.label
        assert 1 <= len(trial.options) <= 3 or trial.part == "alpha", trial.label
        knobs = {k for o in trial.options for k in o if len({str(p.get(k)) for p in trial.options}) > 1}
        assert len(knobs) <= 1, trial.label
    by_row = {}
    for t in found:  # another seed, the same row
        by_row.setdefault((t.part, t.label, t.rank, t.cap), set()).add((t.method, json.dumps(t.options)))
    assert all(len(row) == 1 for row in by_row.values())


@pytest.mark.slow
@pytest.mark.parametrize("base", ["mpnet", "smollm2"])
def test_what_travels_keeps_the_knob_of_the_first_base(base):
    found = rows.elsewhere(base, 2)
    assert len({t.key for t in found}) == len(found)
    assert all(t.recipe == base and t.seed == 2 and len(t.options) == 1 for t in found)
    assert recipes.protocol(base, 2).base == recipes.base(base) == base and recipes.base("uneven") == "minilm"
    assert Counter(t.part for t in found) == {"bake_off": len(found) - 104, "pairs": 84, "growth": 20}
    known, seen = published().bake_off, set()
    for trial in [t for t in found if t.part == "bake_off" or (t.part == "growth" and not t.natural)]:
        mine = known[trial.label, None]
        picked = sorted(o.picked[0][0] for o in mine.outcomes[:3])[1]  # of seeds 1 to 3
        assert trial.method == mine.outcomes[0].trial.method, trial.label
        assert trial.options[0] == mine.outcomes[0].trial.options[picked], trial.label
        seen.add((trial.label, trial.rank))
    assert seen >= {(label, rank) for label in rows.MAIN for rank in (None, rows.RANK)}
    assert not any(t.part == "bake_off" and t.recipe == base for t in rows.published())


def test_an_order_comes_after_the_one_it_follows():
    leaders, seen = set(), Counter()
    for trial in rows.published():
        if trial.steps == ():
            assert run.follow(trial) in leaders, trial
            seen[trial.seed, trial.rank] += 1
        elif trial.part == "stream":
            leaders.add(run.follow(trial))
    assert seen == {(s, cap): (n - 1) * len(rows.STREAMS) for s in (1, 4, 5) for cap, n in rows.CAPS.items()}
    assert rows.orders(20)[:5] == rows.orders(5) and len({tuple(o) for o in rows.orders(24, 4)}) == 24
    assert len(rows.orders(9, length=2)) == 2


def test_subsets_of_small_tasks_are_of_those_tasks():
    assert len(small_tasks()) == 20
    sizes = Counter(len(set(t.tasks)) for t in rows.growth(1) if t.method not in run.BOUNDS)
    assert sizes == {count: 12 * n for count, n in rows.SUBSETS.items()}
    assert all(set(t.tasks) <= set(small_tasks()) for t in rows.growth(1))


def test_recipes_choose_nothing_on_validation_texts(tmp_path):
    for name in recipes.RECIPES:
        assert recipes.protocol(name, 3).checkpoint == "train" and recipes.protocol(name, 3).seed == 3
    assert [recipes.source("uneven", t) for t in tasks()] == ["published", "400 steps"] * 4
    assert recipes.place(tmp_path, "q and v", 2, "tweets") == tmp_path / "q-and-v" / "seed2" / "tweets"
    assert recipes.place(tmp_path, "uneven", 2, tasks()[1]).parent.parent.name == "400-steps"
    place = recipes.place(tmp_path, "published", 1, "tweets")
    place.mkdir(parents=True)
    (place / "adapter_model.safetensors").touch()
    assert not recipes.there(tmp_path, "published", 1, "tweets")  # its record is written last
    (place / "training.json").touch()
    assert recipes.there(tmp_path, "published", 1, "tweets") and recipes.there(tmp_path, "book", 0, "tweets")


# -- the run, without a model --------------------------------------------------------------------------------

NAMES, SIZES = ("a", "b", "c"), {"validation": 40, "test": 50}
SIZE_OF = {"a": 1.0, "b": 2.0, "c": 3.0, "joint": 5.0}
BEST = 13.5  # the norm of a merged adapter at which most texts are right: beyond the grid, between steps 5 and 6


def sized(name):
    """An adapter of one direction of its own, of a known norm."""
    left = torch.zeros(8, 1)
    left[list(SIZE_OF).index(name)] = SIZE_OF[name]
    return lo.Adapter({"w": lo.LowRank(left, left.mT / SIZE_OF[name])})


class Evaluates:
    """An evaluator that knows from the norm of an adapter which texts are right, and what it was asked."""

    def __init__(self, split):
        self.split, self.labels, self.asked = split, {n: np.zeros(SIZES[split]) for n in NAMES}, []

    def correct(self, adapter, names, scale=1.0):
        norm = 0.0 if adapter is None else scale * adapter.norm()
        self.asked.append((round(norm, 5), tuple(names)))
        return {name: right(self.split, name, norm) for name in names}


def right(split, name, norm):
    luck = np.random.default_rng([ord(name), len(split), round(1000 * norm)]).random(SIZES[split])
    return luck < 0.9 - 0.1 * abs(np.log2(max(norm, 0.01) / BEST))


class Bench(run.Bench):
    def __init__(self, names, limit=None):
        self.splits = {split: Evaluates(split) for split in SIZES}
        self.start, self.always = START, run.ALWAYS
        self.device, self.name, self.left = torch.device("cpu"), "none", float("inf")

    def outcome(self, *args):
        if self.left <= 0:
            raise KeyboardInterrupt
        self.left -= 1
        return super().outcome(*args)


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setattr(recipes, "adapter", lambda folder, recipe, seed, task: sized(task))
    monkeypatch.setattr(recipes, "there", lambda *a: True)
    monkeypatch.setattr(run.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(run, "ProcessPoolExecutor", lambda n, mp_context, initializer: ThreadPoolExecutor(1))
    return Bench(NAMES)


MEAN = 2.0  # of the norms 1, 2 and 3
KNOBS = ({"weights": [1.0, 1.0, 1.0], "scale": 7.0}, {"weights": [1.0, 2.0, 0.0]})
WHOLE = Trial("stream", "sum", "cat", NAMES, KNOBS)


def test_scales_make_the_norms_that_their_ratios_say(bench):
    (found,) = run.run_trials([WHOLE], "", bench, 1)
    assert found.mean == pytest.approx(MEAN) and found.norms == pytest.approx([14**0.5, 17**0.5])
    for split in SIZES:
        rights, asked = getattr(found, split), bench.splits[split].asked
        assert asked == [(round(ratio(k) * MEAN, 5), NAMES) for _, k in rights] and len(rights) == len(asked)
        for (_, k), bits in rights.items():
            assert np.array_equal(bits, np.concatenate([right(split, n, round(ratio(k) * MEAN, 6)) for n in NAMES]))
    option, step = found.picked[0]
    assert step in {k for _, k in found.picked} and set(found.picked) >= {(option, k) for k in (5, 6, 7)}
    assert set(found.picked) | {(option, k) for k in run.ALWAYS} == set(found.test)
    assert set(chosen(found.validation, NAMES, found.sizes["validation"])) <= set(found.test)
    assert found.sizes == {split: [n] * 3 for split, n in SIZES.items()}


def test_on_another_base_few_scales_are_tried_and_the_best_is_among_them(bench, monkeypatch):
    """The rule without data and its neighbours first; what the search goes on to is the best of the whole grid."""
    (whole,) = run.run_trials([WHOLE], "", bench, 1)
    monkeypatch.setattr(run, "load_task", lambda name: name)
    monkeypatch.setattr(run, "Evaluator", lambda data, split, **how: Evaluates(split))
    monkeypatch.setattr(Evaluates, "model", torch.nn.Linear(1, 1), raising=False)
    monkeypatch.setattr(torch.nn.Linear, "device", torch.device("cpu"), raising=False)
    narrow = run.Bench(NAMES, base="mpnet")
    (found,) = run.run_trials([WHOLE], "", narrow, 1)
    assert {k for _, k in found.validation} == set(range(RULE - 1, 8)) < {k for _, k in whole.validation}
    assert found.picked[0] == whole.picked[0] and (found.picked[0][0], RULE) in found.test


def test_what_has_a_scale_of_its_own_keeps_it(bench):
    trial = Trial("p", "mean", "cat", NAMES, ({"scale": 0.5},), natural=True)
    weighted = replace(trial, options=({"weights": [1.0, 0.0, 2.0]},))
    found = {o.trial: o for o in run.run_trials([trial, weighted], "", bench, 1)}
    assert bench.splits["test"].asked == [(round(0.5 * 14**0.5, 5), NAMES), (round(37**0.5, 5), NAMES)]
    assert all(not o.validation and o.picked == [(0, 0)] for o in found.values())


def test_bounds_are_of_the_base_of_own_adapters_and_of_one_for_all(bench):
    trials = [Trial("p", m, m, NAMES, natural=True) for m in run.BOUNDS]
    found = [bench.bounds(trial, "") for trial in trials]
    expected = {"": [0, 0, 0], "own": [1, 2, 3], "joint": [5, 5, 5]}
    for outcome in found:
        for split in SIZES:
            bits = [right(split, n, norm) for n, norm in zip(NAMES, expected[outcome.trial.method])]
            assert np.array_equal(getattr(outcome, split)[0, 0], np.concatenate(bits)), outcome.trial.method
    assert [run.needs(t) for t in trials] == [
        [], [("published", 1, n) for n in NAMES], [("joint", 1, "joint")],
    ]  # fmt: skip


def ordered(order, **rest):
    """A stream in an order of tasks: one adapter of rank 2 is kept, and the last two directions weigh most."""
    rest = {"rank": 2, "cap": 2, "steps": None if order == "abc" else ()} | rest
    return Trial("stream", "running", "cat", tuple(order), **rest)


def test_an_order_follows_the_scale_that_the_first_order_chose(bench):
    orders = ["cab", "abc", "bca"]
    found = {"".join(o.trial.tasks): o for o in run.run_trials([ordered(o) for o in orders], "", bench, 1)}
    assert set(found) == set(orders)
    leader = found["abc"].picked[0]
    for order in ("cab", "bca"):
        assert not found[order].validation and list(found[order].test) == [leader] == found[order].picked
        assert (round(ratio(leader[1]) * MEAN, 5), tuple(order)) in bench.splits["test"].asked


def test_a_capped_stream_keeps_one_adapter_between_two(bench):
    """Of norms 3, 2, 1 in turn, rank 2 keeps 3 and 2."""
    packed, size, about = run.merge_trial(ordered("cba"), "")
    (left, right_), = (p["w"] for p in packed)  # fmt: skip
    assert np.linalg.svd(left @ right_)[1][:3] == pytest.approx([3, 2, 0], abs=1e-5)
    assert size == pytest.approx(MEAN) and about["rank"] == [2]
    assert about["dropped"] == [pytest.approx(1 / (9 + 4 + 1), abs=1e-5)]


def lines(file):
    found = [json.loads(line) for line in file.read_text().splitlines()]
    for line in found:
        line["about"].pop("seconds", None)
    return sorted(json.dumps(line, sort_keys=True) for line in found)


def test_a_run_that_is_killed_goes_on_where_it_stopped(bench, tmp_path, monkeypatch):
    trials = [*(Trial("stream", m, m, NAMES, natural=True) for m in run.BOUNDS), ordered("abc"), WHOLE]
    trials += [replace(ordered("abc"), seed=2), *(ordered(o) for o in ("cab", "bca")), ordered("cba", seed=2)]
    monkeypatch.setattr(rows, "published", lambda: [*trials, Trial("other", "x", "cat", NAMES)])

    def go(folder, left, seed=None):
        benches = []

        def make(names, limit, base):
            benches.append(Bench(names))
            benches[0].left = left
            return benches[0]

        monkeypatch.setattr(run, "Bench", make)
        run.main(folder, part=["stream"], seed=seed, train=False, workers=1, seconds=20, limit=0)
        return benches[0]

    go(tmp_path / "whole", float("inf"))
    expected = lines(tmp_path / "whole" / "outcomes.jsonl")
    assert len(expected) == len(trials)
    go(tmp_path / "second", float("inf"), [2])
    found = [o.trial for o in read_lines(tmp_path / "second" / "outcomes.jsonl")]
    assert sorted(map(hash, found)) == sorted(hash(t) for t in trials if t.seed == 2) and len(found) == 2
    for left in (0, 1, 3, 4):
        folder = tmp_path / str(left)
        with pytest.raises(KeyboardInterrupt):
            go(folder, left)
        file = folder / "outcomes.jsonl"
        assert len(list(read_lines(file))) == 3 + left
        with open(file, "a") as out:  # it was killed while it wrote
            out.write('{"trial": {"part": "str')
        second = go(folder, float("inf"))
        assert lines(file) == expected
        once = [(norm, names) for norm, names in second.splits["test"].asked if len(names) == 1]
        assert not once  # bounds were not evaluated again


# -- what is published ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "group, file", [(tasks, "outcomes.xz"), pytest.param(small_tasks, "growth.xz", marks=pytest.mark.slow)]
)
def test_the_published_run_is_of_todays_texts_and_of_all(group, file):
    evidence, data = published(file), {name: load_task(name) for name in group()}
    assert evidence.about["protocol"] == 2 and set(data) <= set(evidence.about["texts"])
    assert {name: evidence.about["texts"][name] for name in data} == {name: t.sha256 for name, t in data.items()}
    sizes = {(name, split): len(task[split]) for name, task in data.items() for split in SIZES}
    found = [o for o in evidence.outcomes if o.trial.tasks[0] in data]
    for o, split in itertools.product(found, SIZES):
        assert o.sizes[split] == [sizes[n, split] for n in o.trial.tasks], o.trial.label
        assert all(len(bits) == sum(o.sizes[split]) for bits in getattr(o, split).values())
    assert len(found) > (500 if group is tasks else 150)


def test_the_published_run_is_whole():
    evidence = published()
    assert sum(evidence.about["devices"].values()) == len(evidence.outcomes) > 600
    assert set(evidence.about["texts"]) == {task for o in evidence.outcomes for task in o.trial.tasks}
    for o in evidence.outcomes:
        assert set(o.test) <= set(o.validation) or not o.validation
        assert all(i < len(o.trial.options) and ENDS[0] <= k <= ENDS[1] for i, k in {**o.test, **o.validation})
    assert len({o.trial for o in evidence.outcomes}) == len(evidence.outcomes)
    assert {o.trial for o in evidence.outcomes} <= set(rows.published())
    assert set(evidence.seeds) >= {1, 2, 3}
    for seed in evidence.seeds:
        there = {o.trial for o in evidence.outcomes if o.trial.part == "bake_off" and o.trial.seed == seed}
        assert {t.label for t in set(rows.bake_off(seed)) - there} <= {"one LoRA on all tasks"}, seed
    for key, outcomes in evidence.select("bake_off").items():
        assert len({json.dumps(o.trial.options) for o in outcomes}) == 1, key


def test_no_two_bounds_are_the_same_outcome():
    """The base model, own adapters and one adapter for all are three things."""
    for seed in published().seeds:
        found = published().select("bake_off", [seed], recipe="published", natural=True)
        bits = [o.test[0, 0].tobytes() for each in found.values() for o in each]
        assert len(set(bits)) == len(bits), seed


@pytest.mark.slow
def test_what_is_picked_in_a_resample_has_test_outcomes():
    """The published run broke ties in resamples otherwise; of what is chosen today a trifle was not tested."""
    missing = total = 0
    for o in published().outcomes:
        if o.validation:
            picked = chosen(o.validation, o.trial.tasks, o.sizes["validation"])
            assert picked[0] in o.test and {c for c in o.picked} <= set(o.test), o.trial.label
            missing += sum(c not in o.test for c in picked)
            total += len(picked)
    assert total > 100_000 and missing / total < 2e-3


@pytest.mark.slow
def test_the_published_run_comes_out_again():
    """Shipped adapters, on the first eight texts of every task; the published outcomes are of another device."""
    found = [o for o in published().outcomes if o.trial.recipe == "book" and o.trial.part == "bake_off"]
    labels = {("zero-shot", None), ("own adapter", None), ("whitened sum", 16), ("TIES", 16), ("task arithmetic", 16)}
    found = [o for o in found if (o.trial.label, o.trial.rank) in labels]
    assert len(found) == len(labels)
    bench = run.Bench(tasks(), 8)
    for o in found:
        if o.trial.method in run.BOUNDS:
            here = bench.bounds(o.trial, "")
        else:
            like = recipes.adapter("", "book", 0, tasks()[0])
            here = bench.outcome(o.trial, run.merge_trial(o.trial, ""), like, tuple(o.test)[:2])
            assert here.norms == pytest.approx(o.norms, rel=1e-3) and here.mean == pytest.approx(o.mean, rel=1e-4)
        edges = np.cumsum([0, *o.sizes["test"]])
        for c, bits in here.test.items():
            then = np.concatenate([o.test[c][a : a + 8] for a in edges[:-1]])
            assert len(bits) == len(then) == 64 and (bits == then).mean() >= 0.97, (o.trial.label, c)
