"""What the pages of advice say in words, counted again from the outcomes: sentences that other results would make
false."""

import json
from collections import Counter
from inspect import signature
from itertools import combinations
from math import gcd
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
from lora_opcm.merging.rules.projection import opcm

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
    sizes = np.array(own[0].sizes["test"])
    each = 100 * each / sizes
    errors = each.mean(0) * (100 - each.mean(0)) / sizes  # squared: the fewest texts do not make the largest
    assert tasks()[sizes.argmin()] == "reuters-rare" != tasks()[errors.argmax()]
    assert each.mean(0)[errors.argmax()] < each.mean(0)[sizes.argmin()]  # but a task that is harder to learn
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


def test_rows_of_pairs(run):
    """All but the mean within three points; what is told apart from the plain sum, and from TIES."""
    pairs = {label: rows for (label, _), rows in run.select("pairs", (1,)).items()}
    labels = ("mean", "sum, scale 1", "OPCM as published", "TIES", "TSV", "OPCM", "whitened sum")
    rows = {label: run.row(pairs[label]) for label in labels}
    rows["TSV at √2"] = run.row(pairs["TSV"], lambda outcome: (0, 1))
    mean = rows.pop("mean")
    values = [row.value for row in rows.values()]
    assert max(values) - min(values) < 3 < min(values) - mean.value
    worst = [row.by_seed.min() for row in rows.values()]
    assert max(worst) - min(worst) > max(values) - min(values)

    def apart(one):
        ends = {name: tables.interval(row.draws - rows[one].draws) for name, row in rows.items() if name != one}
        return {name for name, (low, high) in ends.items() if low > 0 or high < 0}

    assert apart("sum, scale 1") == {"TSV at √2"}
    assert 0.5 < rows["TSV at √2"].value - rows["sum, scale 1"].value < 1.5
    assert apart("TIES") == {"TSV at √2", "OPCM", "whitened sum"}
    assert rows["TIES"].value < min(row.value for name, row in rows.items() if name != "TIES")


def test_your_own_adapters():
    """Inputs overlap as chance says or hardly more, outputs a few times more: φ of eight directions, by hand."""
    adapters = [lo.load_adapter(lo.adapter_path(task)).modules for task in ("tweets", "ng-sci", "ng-rec")]
    frames = [{name: torch.linalg.svd(u.delta().double())[::2] for name, u in of.items()} for of in adapters]
    times = {"outputs": [], "inputs": []}
    for one, other in combinations(frames, 2):
        found = {side: [0.0, 0.0] for side in times}
        for name, (left, right) in one.items():
            for side, x, y in (("outputs", left, other[name][0]), ("inputs", right.mT, other[name][1].mT)):
                found[side][0] += float((x[:, :8].mT @ y[:, :8]).square().sum() / 8)
                found[side][1] += 8 / len(x)
        for side, (value, chance) in found.items():
            times[side].append(value / chance)
    assert 0.95 < min(times["inputs"]) < 1.05 and max(times["inputs"]) < 1.25, times
    assert min(times["outputs"]) > 2.5 and max(times["outputs"]) < 6, times


def test_the_threshold(run):
    seven = {each[0].trial.options[0]["alpha"]: run.row(each) for each in run.select("alpha").values()}
    less = {alpha: row.draws - seven[0.75].draws for alpha, row in seven.items()}
    assert sorted(less) == [0, 0.1, 0.25, 0.5, 0.75, 0.9, 1] and max(of[0] for of in less.values()) == 0  # best at 0.75
    low, high = tables.interval(less[0.9])
    assert low < 0 < high  # not told apart from it
    assert all(tables.interval(less[alpha])[1] < 0 for alpha in (0, 0.1, 0.25, 0.5, 1))
    assert less[0][0] < -5 and -5 < less[1][0] < -2  # nearly nothing, or everything, costs more
    assert less[1][0] < less[0.5][0] and less[0.5][0] == pytest.approx(-2, abs=0.5)  # two points of gain
    accuracy = 100 * float((seven[0.75].accuracy - seven[0.5].accuracy)[:, 0].mean())
    assert accuracy == pytest.approx(0.5, abs=0.15)
    assert all(signature(of).parameters["alpha"].default == 0.5 for of in (opcm, lo.ContinualMerger))  # published
    for rank in (None, 16):  # on validation texts, all seeds
        (outcomes,) = (each for (_, at), each in run.select("bake_off", run.seeds, label="OPCM").items() if at == rank)
        means = {alpha: [] for alpha in (0.5, 0.75, 0.9)}
        for o in outcomes:
            for alpha, found in means.items():
                of = [bits for (i, _), bits in o.validation.items() if o.trial.options[i]["alpha"] == alpha]
                parts = [np.split(bits, np.cumsum(o.sizes["validation"])[:-1]) for bits in of]
                found.append(max(100 * np.mean([part.mean() for part in each]) for each in parts))
        assert len(outcomes) == 5 and np.ptp([np.mean(found) for found in means.values()]) < 1
        assert np.mean(means[0.5]) < np.mean(means[0.75])


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
    same = travel.recipes(alike=True)["published"]  # on the same texts
    more = {m: rows[m].draws - same[m].gain for m in MAIN}
    over = {m: tables.interval(draws) for m, draws in more.items()}
    assert over["TSV"][1] < 0 and all(low < 0 < high for m, (low, high) in over.items() if m != "TSV")
    assert all(more[m][0] < -3 for m in ("OPCM", "task arithmetic")) and more["TSV"][0] < -5
    for m in ("Iso-C", "whitened sum"):  # no sure loss, at intervals of several points to either side
        assert over[m][0] < -5 and over[m][1] > 5
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
    largest = exact[(exact.model == "Llama-2-70B") & (exact["T"] == 8)].iloc[0]
    assert largest.seconds < 60 and largest.threads == 2
    of = Counter(shapes.linear_shapes(shapes.build("Llama-2-70B")).values())
    assert gcd(*of.values()) == 80  # blocks, of which two were timed
    cost = nbformat.read(ROOT / "book" / "experiments" / "cost.ipynb", 4)
    assert any("\nBLOCKS = 2\n" in f"\n{cell.source}" for cell in cost.cells)
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
