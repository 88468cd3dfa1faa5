"""What the pages of advice say in words, counted again from the outcomes: sentences that other results would make
false."""

import pytest

from lora_opcm.lab import travel
from lora_opcm.lab.evidence import tables
from lora_opcm.lab.evidence.choice import RULE, ratio

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("travel")]  # resamples of three runs, drawn once
LEADERS = {"sequential whitening", "TSV", "whitened sum", "OPCM"}


@pytest.fixture(scope="module")
def run():
    return tables.published()


def behind(run, rank):
    """How far every method is behind the one that validation texts like best, with its interval."""
    rows = {label: row for (label, at), row in run.bake_off.items() if at == rank and label not in ("zero-shot",)}
    merges = {
        label: row for label, row in rows.items() if row.outcomes[0].trial.method not in ("own", "joint", "regmean")
    }
    first = tables.favourite(merges)
    return first, tables.summary(merges, first)


def test_which_method(run):
    first, whole = behind(run, None)
    assert (whole.gain > 75).sum() == 8  # eight methods keep three quarters
    others = whole.drop(first)
    near = others[others["minus high"] >= 0]
    assert len(near) == 3 and {first, *near.index} == LEADERS  # not told apart from it
    least = near["minus low"]
    assert list(least.index[least > -tables.MARGIN]) == ["sequential whitening"]  # surely as good
    assert -2.5 < least["TSV"] < -tables.MARGIN and -4.5 < least["OPCM"] < -3.5  # a little more, twice as much
    at_rank, cut = behind(run, 16)
    less = cut.drop(at_rank)
    assert set(less.index[less["minus high"] >= 0]) | {at_rank} == LEADERS | {"DOP", "output whitening"}
    assert (less["minus low"] < -tables.MARGIN).all()
    rows = {label: run.bake_off[label, None] for label in LEADERS}
    lost = {label: row.draws - tables.at_step(run, row.outcomes, 2).draws for label, row in rows.items()}
    assert all(of[0] == 0 for label, of in lost.items() if label != "whitened sum")  # three are best at twice the norm
    assert set(rows["whitened sum"].ratios) == {2, ratio(RULE + 1)}  # there or a step beyond
    flat = {label: run.bake_off[label, None] for label in ("Iso-C", "Iso-CTS")}
    for row in flat.values():  # the rule is too short for what is flat
        assert tables.interval(row.draws - tables.at_step(run, row.outcomes, 2).draws)[0] > 2
        assert sorted(row.ratios)[2] == pytest.approx(2.8, abs=0.05)


def test_two_loras(run):
    """The mean of two against their sum, on three bases."""
    apart = {}
    for base, evidence in (("MiniLM", run), *((name, travel.elsewhere(name)) for name in ("mpnet", "smollm2"))):
        found = {
            label: evidence.row(rows)
            for (label, _), rows in evidence.select("pairs", (1,)).items()
            if label in ("mean", "sum, scale 1")
        }
        lost = {label: 100 - row.value for label, row in found.items()}
        apart[base] = (
            lost["mean"] / lost["sum, scale 1"],
            tables.interval(found["mean"].draws - found["sum, scale 1"].draws),
        )
        assert max(lost.values()) < 13  # nearly whole
    assert 2 < apart["MiniLM"][0] < 2.5 < apart["smollm2"][0]  # twice as much, and more
    assert all(apart[base][1][1] < 0 for base in ("MiniLM", "smollm2"))
    assert 0.9 < apart["mpnet"][0] < 1.1 and apart["mpnet"][1][0] < 0 < apart["mpnet"][1][1]  # as much
    pairs = {label: rows for (label, _), rows in run.select("pairs", (1,)).items()}
    for label in ("task arithmetic", "TIES", "TSV", "OPCM", "whitened sum"):
        at = [tables.at_step(run, pairs[label], step).value for step in range(4)]
        assert max(at) - min(at) > 9, label
