"""Three bases side by side: every number is counted again from the outcomes of single texts and questions."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from lora_opcm.lab import travel
from lora_opcm.lab.evidence import growth, rows, tables
from lora_opcm.lab.evidence.choice import RULE, ratio
from lora_opcm.lab.evidence.rows import TRAVELLED
from lora_opcm.lab.generation import tables as generation
from lora_opcm.lab.tasks import tasks

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("travel")]  # resamples of three runs, drawn once


@pytest.fixture(scope="module")
def found():
    return travel.bases()


def by_hand(rows, label, at=None, tasks=slice(None)):
    """Recovered gain of a row of one outcome on its tasks, or some, a ratio of means over tasks, by counting."""

    def accuracy(outcome, where):
        edges = np.cumsum(outcome.sizes["test"])[:-1]
        return np.mean([part.mean() for part in np.split(outcome.test[where], edges)[tasks]])

    (row,), (zero,), (own,) = (rows[name, None] for name in (label, "zero-shot", "own adapter"))
    merged = accuracy(row, row.picked[0] if at is None else (row.picked[0][0], at))
    low, high = accuracy(zero, (0, 0)), accuracy(own, (0, 0))
    return 100 * (merged - low) / (high - low)


@pytest.mark.parametrize("name, said", [("mpnet", "mpnet"), ("smollm2", "SmolLM2, texts")])
def test_gains_on_another_base_are_counted_from_its_texts(found, name, said):
    evidence = travel.elsewhere(name)
    assert evidence.seeds == (1,) and {o.trial.recipe for o in evidence.outcomes} == {name}
    rows = evidence.select("bake_off")
    for label in travel.common(found):
        row = found[said][label]
        assert row.gain[0] == pytest.approx(by_hand(rows, label)), label
        assert row.lost[0] == pytest.approx(row.gain[0] - by_hand(rows, label, RULE)), label
        outcome = next(o for o in evidence.outcomes if (o.trial.label, o.trial.rank) == (label, None))
        assert row.scale == ratio(outcome.picked[0][1])
    assert by_hand(rows, "own adapter", 0) == 100 and by_hand(rows, "zero-shot", 0) == 0


def test_other_bases_are_what_their_own_pages_say(found):
    first = tables.published().bake_off
    assert all(found["MiniLM"][label].gain[0] == first[label, None].value for label in travel.common(found))
    table = generation.gains(generation.Run(), None)
    for said, label in {"OPCM, α = 0.75": "OPCM", "whitened sum, p = 0.5": "whitened sum", "TSV": "TSV"}.items():
        assert found["SmolLM2, exact"][label].gain[0] == pytest.approx(100 * table.exact[said])
        assert found["SmolLM2, likelihood"][label].gain[0] == pytest.approx(100 * table.likelihood[said])
        assert TRAVELLED[label] in ({"alpha": 0.75}, {"power": 0.5}, {"directions": None})  # one knob on all bases


def test_bases_are_compared_over_the_methods_they_share(found):
    labels = travel.common(found)
    assert len(labels) >= 10 and travel.PLAIN in labels
    table = travel.agreement(found)
    assert len(table) == 10
    for row in table.itertuples():
        one, other = ([found[name][label].gain[0] for label in labels] for name in (row.one, row.other))
        assert row.value == pytest.approx(spearmanr(one, other).statistic)
        assert row.low <= row.value <= row.high
    ahead = travel.ahead(found).set_index(["base", "method"])
    assert (ahead.loc[(slice(None), travel.PLAIN), "value"] == 0).all()
    for base, label in (("mpnet", "TSV"), ("SmolLM2, exact", "Iso-C")):
        more = found[base][label].gain[0] - found[base][travel.PLAIN].gain[0]
        assert ahead.value[base, label] == pytest.approx(more)
        assert ahead.low[base, label] < more < ahead.high[base, label]


def test_the_rule_is_compared_on_the_same_questions(found):
    run = generation.Run()
    row = next(r for r in run.rows if r.label == "TSV" and r.rank is None)
    by = {scale: marks["likelihood"] for scale, marks in row.marks["validation"].items()}
    base, own = (of["validation"]["likelihood"] for of in (run.base, run.own))
    gain = {scale: 100 * (marks - base).mean() / (own - base).mean() for scale, marks in by.items()}
    assert len(set(run.sizes["validation"])) == 1  # so that a mean over questions is one over puzzles
    expected = max(gain.values()) - gain[ratio(RULE)]
    assert found["SmolLM2, likelihood"]["TSV"].lost[0] == pytest.approx(expected)


def test_the_rule_loses_nothing_where_texts_choose_its_length(found):
    scales, lost = travel.lengths(found), travel.ruled(found).set_index(["base", "method"])
    for base in ("mpnet", "SmolLM2, texts"):  # of MiniLM, seeds may choose several lengths
        for label in scales.index[scales[base] == ratio(RULE)]:
            assert lost.value[base, label] == 0
    assert (lost.low <= lost.value).all() and (lost.value <= lost.high).all()


def test_what_the_page_says_in_words_holds(found):
    """Sentences without a number that other results would make false."""
    assert {"TSV", "whitened sum", "sequential whitening"} <= set(travel.ahead_everywhere(found))
    order = {base: sorted(travel.common(found), key=lambda m: -rows[m].gain[0]) for base, rows in found.items()}
    assert len({names[0] for names in order.values()}) > 1
    last = {base for base, names in order.items() if names[-1] == travel.PLAIN}
    assert last == set(order) - {"SmolLM2, exact"}  # by four of the five measures, and there among the last
    assert order["SmolLM2, exact"].index(travel.PLAIN) >= len(travel.common(found)) - 3
    ahead = travel.ahead(found)
    exact = ahead[(ahead.base == "SmolLM2, exact") & (ahead.method != travel.PLAIN)]
    assert ((exact.low <= 0) & (exact.high >= 0)).mean() > 0.5  # where most are not told apart from it
    table = travel.agreement(found).set_index(["one", "other"]).value
    others = [label for label in travel.common(found) if label != travel.PLAIN]
    gains = {name: [rows[label].gain[0] for label in others] for name, rows in found.items()}
    without = {(one, other): spearmanr(gains[one], gains[other]).statistic for one, other in table.index}
    told = travel.agreement(found, without=travel.PLAIN).set_index(["one", "other"]).value
    assert told.to_dict() == pytest.approx(without)
    two = "MiniLM", "mpnet"  # that one place makes half of the agreement between the encoders
    assert 0.4 < without[two] / table[two] < 0.6
    for measure in ("exact", "likelihood"):  # but not of that with puzzles
        assert without["MiniLM", f"SmolLM2, {measure}"] > table["MiniLM", f"SmolLM2, {measure}"] - 0.15 > 0.4
    one = "SmolLM2, texts", "SmolLM2, likelihood"  # the order does not stay on one base
    assert abs(table[one]) < 0.1 and without[one] < 0
    scales = travel.lengths(found)
    longer = scales["SmolLM2, texts"] / scales["MiniLM"]
    assert (longer >= 1).all() and list(longer.index[longer >= 2]) == ["Iso-C", "Iso-CTS"]  # flat spectra ask for twice
    assert (scales["SmolLM2, likelihood"] <= scales["SmolLM2, texts"] / 2).all()
    judged = travel.judged(found)
    assert (judged.whole > judged.likelihood).all()  # likelihood asks for shorter ones
    whole = judged.whole[others]
    assert (whole / judged.likelihood[others] >= 1.9).all() and whole.min() > 1.4 and whole.max() < 2.9
    between = (judged.likelihood < judged.whole) & (judged.whole < judged.texts)
    assert list(between.index[~between]) == ["TIES"]  # with most methods
    surely = judged.surely[others].astype(bool)  # of some methods, and not of others
    assert 0 < surely.sum() < len(others) / 2 and not (surely & judged["last"][others].astype(bool)).any()
    assert judged.value[others].drop("core TIES").max() < 1.2 and (judged.low[others] > 0).sum() == 1  # worth little
    lost = travel.ruled(found).set_index(["base", "method"]).value["SmolLM2, texts"]
    assert lost[["TSV", "sequential whitening", "whitened sum", "OPCM"]].max() < 1  # a point at most
    assert (scales["SmolLM2, likelihood"] <= scales["MiniLM"] / 2).all()
    steps = np.abs(np.log2(scales["mpnet"] / scales["MiniLM"]) * 2).round(6)
    assert (steps <= 1).all() and (steps == 0).mean() >= 0.7  # the lengths of one encoder, nearly those of another
    for evidence in (tables.published(), travel.elsewhere("mpnet"), travel.elsewhere("smollm2")):  # merge nearly whole
        two = travel.two(evidence).set_index("method")
        assert (two.pairs == 28).all() and len(two) == 3 and (two.value > 87).all()
        assert two.value["mean"] == two.value.min()


def test_what_whole_answers_ask_for_is_counted_from_their_questions(found):
    run, judged = generation.Run(), travel.judged(found)
    weights = run.weights["validation"]
    ends = np.cumsum(run.sizes["validation"])[:-1]

    def gain(marks):
        base, own = run.base["validation"]["right"], run.own["validation"]["right"]
        merged, low, high = (np.mean([p.mean() for p in np.split(x, ends)]) for x in (marks, base, own))
        return 100 * (merged - low) / (high - low)

    for label, said in {"TSV": "TSV", "core TIES": "core TIES", "whitened sum": "whitened sum, p = 0.5"}.items():
        (row,) = (r for r in run.rows if r.label == said and r.rank is None)
        right = {scale: marks["right"] for scale, marks in row.marks["validation"].items()}
        at = max(right, key=lambda s: gain(right[s]))
        assert judged.whole[label] == at and judged["last"][label] == (at == max(right))
        assert judged.value[label] == pytest.approx(gain(right[at]) - gain(right[2.0]))
        assert judged.low[label] <= judged.value[label] <= judged.high[label]
        drawn = np.array([[w @ marks for marks in right.values()] for w in weights[1:]])
        shorter = np.array(list(right))[drawn.argmax(1)] < judged.texts[label] - 0.1
        assert judged.surely[label] == (shorter.mean() > 0.975)


def test_two_four_and_eight_are_counted_from_their_texts():
    table = travel.few().set_index(["adapters", "method"])
    evidence = travel.elsewhere("smollm2")
    trials = [o.trial for o in evidence.outcomes if o.trial.part == "growth"]
    assert set(trials) == set(rows.fours(2, "smollm2")) and len(table) == 3 * len(rows.GROWTH_ROWS)
    every = {(o.trial.label, o.trial.tasks): o for o in evidence.outcomes if o.trial.part == "growth"}
    four = tasks()[1::2]

    def right(label, names, where=None):
        outcome = every[label, names]
        assert outcome.sizes["test"] == [100] * len(names)
        bits = outcome.test[where or outcome.picked[0]].reshape(len(names), 100)
        return dict(zip(names, bits.mean(1), strict=True))

    zero, own = (right(label, four) for label in ("zero-shot", "own adapter"))
    sets = {2: [four[:2], four[2:]], 4: [four]}

    def kept(names, label, step=None):
        found = []
        for some in names:
            where = None if step is None else (every[label, some].picked[0][0], step)
            found += [x - zero[t] for t, x in right(label, some, where).items()]
        return 100 * np.mean(found) / np.mean([own[t] - zero[t] for some in names for t in some])

    for count, names in sets.items():
        for label in rows.GROWTH_ROWS:
            line, value = table.loc[count, label], kept(names, label)
            assert line.value == pytest.approx(value)
            assert line.more == pytest.approx(value - kept(names, travel.PLAIN))
            assert line.lost == pytest.approx(value - kept(names, label, {2: 1, 4: 2}[count]))  # √2, then 2 mean norms
            steps = [every[label, some].picked[0][1] for some in names]
            assert line.scale == pytest.approx(2 ** (np.mean(steps) / 2))
            for of in ("", "more ", "lost "):
                assert line[f"{of}low"] <= line[of.strip() or "value"] <= line[f"{of}high"]
    assert table.value[8, "TSV"] == travel.texts(evidence, None)["TSV"].gain[0]


def test_what_the_page_says_of_two_to_eight_holds():
    table = travel.few().set_index(["adapters", "method"])
    kept, scale = (table[of].unstack("adapters") for of in ("value", "scale"))
    assert (kept[2] > kept[4]).all() and (kept[4] > kept[8]).all() and (scale[2] <= scale[8]).all()  # as on MiniLM
    spread = kept.max() - kept.min()
    assert spread[2] < spread[4] < spread[8]
    first = kept[8].idxmax()  # the choice comes to matter: what it gains with two is surely less than with eight
    assert table["more high"][2, first] < table["more low"][8, first]
    low, high = (table[f"more {end}"].xs(first, level="method") for end in ("low", "high"))
    assert low[4] < high[2] and low[8] < high[4]  # four are told apart from neither
    assert kept[2].min() > 90  # about nine tenths of two
    surely = (table["more low"] > 1e-9).unstack("adapters").sum()
    assert surely.tolist() == [0, 0, 5]
    wide = table.high - table.low
    assert wide[2].min() > wide[8].max() and wide[4].min() > wide[8].max()
    assert table["lost"][4].idxmax() == travel.PLAIN  # best shorter on MiniLM, too
    curve = growth.curve(growth.published(), travel.PLAIN)
    assert curve.scale[4] < 1.5 and curve.scale[8] < 1.5
