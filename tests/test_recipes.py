"""Adapters trained otherwise: gains are counted again from single texts, and the page's words from gains."""

from dataclasses import replace

import numpy as np
import pytest
from test_travel import by_hand

from lora_opcm.lab import travel
from lora_opcm.lab.evidence import tables
from lora_opcm.lab.evidence.choice import RULE, ratio
from lora_opcm.lab.evidence.rows import MAIN, robustness

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("travel")]


@pytest.fixture(scope="module")
def found():
    return travel.recipes()


def test_gains_are_counted_from_texts(found):
    other = tables.published(travel.RECIPES)
    assert list(found) == ["published", "q and v", "one start", "uneven", "400 steps"]
    assert {o.trial for o in other.outcomes} <= set(robustness(4))
    for name in ("q and v", "one start", "uneven", "400 steps"):
        rows = other.select("robustness", recipe=name)
        assert {label for label, _ in rows} == {*MAIN, "zero-shot", "own adapter"}
        for label in MAIN:
            landed, (outcome,) = found[name][label], rows[label, None]
            assert landed.gain[0] == pytest.approx(by_hand(rows, label)), label
            assert landed.lost[0] == pytest.approx(landed.gain[0] - by_hand(rows, label, RULE)), label
            assert landed.scale == ratio(outcome.picked[0][1])
    whole = tables.published().select("bake_off", (4,))
    assert all(found["published"][label].gain[0] == pytest.approx(by_hand(whole, label)) for label in MAIN)


def first(outcomes):
    """The first two hundred test texts of each task; the base and own adapters are tried once, merges as chosen."""
    found = {}
    for key, (outcome,) in outcomes.items():
        edges = np.cumsum([0, *outcome.sizes["test"]])
        kept = np.concatenate([np.arange(a, min(b, a + 200)) for a, b in zip(edges, edges[1:])])
        test = {c: bits[kept] for c, bits in outcome.test.items()}
        found[key] = [replace(outcome, test=test, sizes=outcome.sizes | {"test": [200] * 8})]
    return found


def test_differences_are_on_the_same_texts(found):
    """Which are the first of all: the base, which recipes share, answers them alike but for rounding."""
    alike, whole = travel.recipes(alike=True), first(tables.published().select("bake_off", (4,), rank=None))
    for label in MAIN:
        assert alike["published"][label].gain[0] == pytest.approx(by_hand(whole, label))
        assert alike["published"][label].scale == found["published"][label].scale
        assert all((alike[name][label].gain == found[name][label].gain).all() for name in found if name != "published")
    other = tables.published(travel.RECIPES)
    for (of, _), (outcome,) in other.select("robustness", recipe="q and v").items():
        if of == "zero-shot":
            assert (outcome.test[0, 0] == whole["zero-shot", None][0].test[0, 0]).mean() > 0.99


def test_halves_are_counted_from_texts():
    """Every second task has the longer adapter."""
    theirs = tables.published(travel.RECIPES).select("robustness", recipe="uneven")
    ours = first(tables.published().select("bake_off", (4,), rank=None))
    found = travel.longer()
    assert list(found.index) == list(MAIN)
    for label, row in found.iterrows():
        kept = {
            name: [by_hand(of, label, tasks=slice(i, None, 2)) for i in (1, 0)]
            for name, of in (("published", ours), ("uneven", theirs))
        }
        for name, (longer, others) in kept.items():
            assert row[f"longer, {name}"] == pytest.approx(longer) and row[f"others, {name}"] == pytest.approx(others)
        assert row.value == pytest.approx(-np.subtract(*map(np.subtract, *kept.values())))
        assert row.least < row.low < row.value < row.high < row.most


def test_what_the_page_says(found):
    gain = {name: {label: rows[label].gain[0] for label in MAIN} for name, rows in found.items()}
    less = {label: gain["published"][label] - gain["q and v"][label] for label in MAIN}
    assert min(less.values()) > 4
    same = travel.recipes(alike=True)["published"]
    apart = {label: tables.interval(found["q and v"][label].gain - same[label].gain) for label in MAIN}
    assert sum(high < 0 for _, high in apart.values()) > len(MAIN) / 2  # surely so by most methods
    assert max(less, key=less.get) in ("task arithmetic", "output whitening") and less["task arithmetic"] > 15
    assert all(gain["one start"][label] > same[label].gain[0] - 1 for label in MAIN)  # no less
    assert max(gain["q and v"], key=gain["q and v"].get) == "Iso-C"
    ahead = travel.ahead({"q and v": found["q and v"]}, "Iso-C").set_index("method")
    assert all(ahead.high[label] > 0 for label in ("TSV", "OPCM", "whitened sum"))  # not surely before them
    lengths = travel.lengths(found)
    assert list(lengths.columns[lengths.loc["TSV"] != 2]) == ["400 steps"]
    assert list(lengths.columns[lengths.loc["OPCM"] != 2]) == ["uneven", "400 steps"]
    shorter = lengths["400 steps"] / lengths["published"]
    assert shorter.round(3).isin([0.5, 0.707]).all()  # by half or by a root of two
    run, other = tables.published(), tables.published(travel.RECIPES)
    mean = {
        name: of["TSV", None][0].mean
        for name, of in (
            ("published", run.select("bake_off", (4,))), ("400 steps", other.select("robustness", recipe="400 steps"))
        )
    }  # fmt: skip
    longer = mean["400 steps"] / mean["published"]
    assert 1.7 < longer < 2  # nearly twice as long
    assert (longer * shorter).between(0.9, 1.35).all()  # so that what is chosen is about as long as it was
    for label in ("task arithmetic", "OPCM"):  # for which two is too long then
        assert found["400 steps"][label].lost[0] > 10 and tables.interval(found["400 steps"][label].lost)[0] > 0, label
    surely = [label for label in MAIN if tables.interval(found["400 steps"][label].lost)[0] > 1e-9]  # of these alone
    assert sorted(surely) == ["OPCM", "task arithmetic"]
    assert abs(found["uneven"]["OPCM"].lost[0]) < 0.5
    assert lengths["uneven"]["task arithmetic"] == lengths["one start"]["task arithmetic"] / 2 == 1
    for label in ("Iso-C",):
        assert lengths["q and v"][label] > lengths["published"][label] > 2
    assert lengths["q and v"]["task arithmetic"] < 2
    for name in ("uneven", "400 steps"):  # neither surely less nor surely more where half or all were trained longer
        for label in MAIN:
            low, high = tables.interval(found[name][label].gain - same[label].gain)
            assert low < 0 < high, (name, label)
    order = travel.agreement(found).query("one == 'published'").set_index("other").value
    assert order[["one start", "uneven", "400 steps"]].min() > 0.9
    sides = travel.longer()
    assert list(sides.index[sides.low > 0]) == ["TIES"] and list(sides.index[sides.high < 0]) == ["Iso-C"]
    wide = {m: tuple(sides.loc[m, ["least", "most"]]) for m in MAIN}  # with seven looks
    assert len(MAIN) == 7 and [m for m, (low, high) in wide.items() if not low < 0 < high] == ["Iso-C"]
    assert -3 < wide["Iso-C"][1] < 0  # and it hardly
    for name in ("published", "one start", "uneven", "400 steps"):  # whitening is ahead of addition here as there
        assert gain[name]["TSV"] > gain[name]["task arithmetic"] + 8
