"""Adapters trained otherwise: gains are counted again from single texts, and the page's words from gains."""

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
    assert list(found) == ["published", "q and v", "one start"]
    assert {o.trial for o in other.outcomes} <= set(robustness(4))
    for name in ("q and v", "one start"):
        rows = other.select("robustness", recipe=name)
        assert {label for label, _ in rows} == {*MAIN, "zero-shot", "own adapter"}
        for label in MAIN:
            landed, (outcome,) = found[name][label], rows[label, None]
            assert landed.gain[0] == pytest.approx(by_hand(rows, label)), label
            assert landed.lost[0] == pytest.approx(landed.gain[0] - by_hand(rows, label, RULE)), label
            assert landed.scale == ratio(outcome.picked[0][1])
    whole = tables.published().select("bake_off", (4,))
    assert all(found["published"][label].gain[0] == pytest.approx(by_hand(whole, label)) for label in MAIN)


def test_what_the_page_says(found):
    gain = {name: {label: rows[label].gain[0] for label in MAIN} for name, rows in found.items()}
    less = {label: gain["published"][label] - gain["q and v"][label] for label in MAIN}
    assert min(less.values()) > 4
    apart = {label: tables.interval(found["q and v"][label].gain - found["published"][label].gain) for label in MAIN}
    assert sum(high < 0 for _, high in apart.values()) > len(MAIN) / 2  # surely so by most methods
    assert max(less, key=less.get) in ("task arithmetic", "output whitening") and less["task arithmetic"] > 15
    assert all(gain["one start"][label] > gain["published"][label] - 1 for label in MAIN)  # no less
    assert max(gain["q and v"], key=gain["q and v"].get) == "Iso-C"
    ahead = travel.ahead({"q and v": found["q and v"]}, "Iso-C").set_index("method")
    assert all(ahead.high[label] > 0 for label in ("TSV", "OPCM", "whitened sum"))  # not surely before them
    lengths = travel.lengths(found)
    assert (lengths.loc[["TSV", "OPCM"]] == 2).all(axis=None)
    for label in ("Iso-C",):
        assert lengths["q and v"][label] > lengths["published"][label] > 2
    assert lengths["q and v"]["task arithmetic"] < 2
    for name in ("published", "one start"):  # whitening is ahead of addition here as there
        assert gain[name]["TSV"] > gain[name]["task arithmetic"] + 8
