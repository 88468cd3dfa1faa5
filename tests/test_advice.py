"""What the pages of advice say in words, counted again from the outcomes: sentences that other results would make
false."""

import json
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

import lora_opcm as lo
from lora_opcm.files.shipped import results
from lora_opcm.lab import travel
from lora_opcm.lab.bases import shapes
from lora_opcm.lab.evidence import tables
from lora_opcm.lab.evidence.choice import RULE, ratio
from lora_opcm.lab.evidence.rows import MAIN
from lora_opcm.lab.experiments.cost import counted
from lora_opcm.lab.experiments.peers import updates
from lora_opcm.lab.tasks import tasks
from lora_opcm.merging.plan import Machine

ROOT = Path(__file__).parents[1]
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


def test_eight_adapters(run):
    own = [
        o for o in run.outcomes if o.trial.part == "bake_off" and o.trial.method == "own" and o.trial.seed in run.seeds
    ]
    (right,) = zip(*(o.test.values() for o in own), strict=True)  # shape=[seeds, texts], task after task
    assert len(own) == 5
    each = np.stack([np.add.reduceat(bits, np.cumsum([0, *own[0].sizes["test"][:-1]])) for bits in right])
    each = 100 * each / own[0].sizes["test"]
    assert each.std(0, ddof=1).max() < each.mean(0).std(ddof=1) / 3  # of no task does the seed change much
    manifest = json.loads((lo.data_dir() / "adapters" / "manifest.json").read_text())
    start, quarter, end = [], [], []
    for task in tasks():
        history = json.loads((lo.adapter_path(task) / "history.json").read_text())
        found = {h["step"]: h["eval_accuracy"] for h in history if "eval_accuracy" in h}
        start.append(manifest[task]["zero_shot"])
        quarter.append(found[25])
        end.append(found[100])
    assert np.mean(np.subtract(quarter, start)) > np.mean(np.subtract(end, start)) / 2  # most of the gain


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


def test_the_threshold(run):
    seven = {each[0].trial.options[0]["alpha"]: run.row(each) for each in run.select("alpha").values()}
    less = {alpha: row.draws - seven[0.75].draws for alpha, row in seven.items()}
    assert sorted(less) == [0, 0.1, 0.25, 0.5, 0.75, 0.9, 1] and max(of[0] for of in less.values()) == 0  # best at 0.75
    low, high = tables.interval(less[0.9])
    assert low < 0 < high  # not told apart from it
    assert all(tables.interval(less[alpha])[1] < 0 for alpha in (0, 0.1, 0.25, 0.5, 1))
    assert less[0][0] < -5 and -5 < less[1][0] < -2  # nearly nothing, or everything, costs more


def test_the_rank(run):
    for label in ("TSV", "whitened sum", "sequential whitening", "output whitening"):
        cut, more, four, whole = (
            run.row(run.select(part, (1, 4))[label, rank])
            for part, rank in (("bake_off", 16), ("joint", 32), ("joint", 64), ("bake_off", None))
        )
        low, high = tables.interval(whole.draws - four.draws)
        assert low < 0 < high  # at four times the rank not told from the whole
        lost = whole.value - cut.value
        assert (more.value - cut.value > lost / 2) == (label in ("whitened sum", "sequential whitening")), label
        assert four.value - cut.value > lost / 2
    found = {label: run.row(each) for (label, _), each in run.select("robustness", recipe="rank 4").items()}
    for label in set(found) - {"zero-shot", "own adapter"}:  # not told apart from those of rank 16
        low, high = tables.interval(found[label].draws - run.row(run.select("bake_off", (4,))[label, None]).draws)
        assert low < 0 < high, label
    assert len(found) == 8


def test_adapters_of_more_rank_than_a_layer_has(run):
    """Eight of rank 64 are 512 directions of 384."""
    layers = shapes.linear_shapes(shapes.build("MiniLM")).values()
    assert max(min(shape) for shape in layers) == 384
    other = tables.published(travel.RECIPES)
    found = {label: each for (label, _), each in other.select("robustness", recipe="rank 64").items()}
    rows = {label: other.row(found[label]) for label in MAIN}
    more = {m: rows[m].draws - run.row(run.select("bake_off", (4,))[m, None]).draws for m in MAIN}
    over = {m: tables.interval(draws) for m, draws in more.items()}
    assert over["TSV"][1] < 0 and all(low < 0 < high for m, (low, high) in over.items() if m != "TSV")
    assert all(more[m][0] < -3 for m in ("OPCM", "task arithmetic")) and more["TSV"][0] < -5
    assert all(more[m][0] > 0 for m in ("Iso-C", "whitened sum"))
    (tsv,) = found["TSV"]
    assert tsv.trial.options[tsv.picked[0][0]] == {"directions": 8}
    assert [float(rows[m].ratios[0]) for m in ("task arithmetic", "whitened sum")] == pytest.approx([1, 8**0.5])
    plain = rows["task arithmetic"].draws - tables.at_step(other, found["task arithmetic"], RULE).draws
    assert plain[0] > 10 and tables.interval(plain)[0] > 0


def test_the_card():
    """Neither a card nor the cores beside it were as fast as one core elsewhere; modules are fewer calls together."""
    ran = results("card").set_index("what").value
    assert 0.9 < ran["processor / card"] < 1.1
    assert ran["32 modules on the card"] / 32 > 2 * ran["one thread elsewhere"] / 16
    parts = [[u.to(torch.float16) for u in updates(512, 512, seed=i)] for i in range(4)]
    adapters = [lo.Adapter({str(i): of[t] for i, of in enumerate(parts)}) for t in range(8)]
    assert counted(lambda: lo.merge(adapters, "opcm", rank=16))["torch calls"] / 4 == pytest.approx(300, rel=0.1)


def test_at_scale():
    """Planned beside measured seconds, and what a card gains by counts, with the machines of the page."""
    exact = results("cost").query("what == 'exact'")
    assert (exact.planned / exact.seconds).between(1 / 1.6, 1.6).all()
    page = nbformat.read(ROOT / "book" / "practice" / "at_scale.ipynb", 4)
    lines = [line for cell in page.cells for line in cell.source.splitlines()]
    machines = {"Machine": Machine}
    for name in ("two_cores", "sixteen", "a100"):
        exec(next(line for line in lines if line.startswith(f"{name} = ")), machines)
    for name in shapes.CONFIGS:
        layers = shapes.linear_shapes(shapes.build(name))
        two, sixteen, card = (
            lo.plan(layers, "opcm", rank=16, machine=machines[m]).seconds for m in ("two_cores", "sixteen", "a100")
        )
        assert two / 2 < card < two and sixteen < card  # less than twofold, and more cores gain more
