"""What experiments choose, average, print and save, on small outcomes whose numbers are known by hand."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import lora_opcm as lo
from lora_opcm.lab.evaluation import Remembering, own_correct
from lora_opcm.lab.experiments.adapters import contents, hashes
from lora_opcm.lab.experiments.results import beside, cell, comparison, provenance, save_results
from lora_opcm.lab.experiments.trials import (
    GRID,
    Entry,
    bake,
    mean_accuracy,
    orders,
    over_seeds,
    references,
    tune,
)


class Known(Remembering):
    """Outcomes that are known before: `table(size, task)` for an adapter of norm `size`, None for the base."""

    fast = False

    def __init__(self, tasks, table):
        self.tasks, self.table, self.asked = dict.fromkeys(tasks), table, []

    def _correct(self, adapter, names, progress, scale):
        size = None if adapter is None else round(scale * adapter.norm(), 6)
        self.asked.append((size, tuple(names)))
        return {n: self.table(size, n) for n in names}

    def _content(self, name):
        return [name]


def sized(*spectrum):
    """An adapter with these singular values in one module."""
    left = torch.eye(8, len(spectrum), dtype=torch.float64)
    return lo.Adapter({"w": lo.LowRank(left * torch.tensor(spectrum, dtype=torch.float64), left.mT)})


def share(right, of):
    return np.arange(of) < right


# -- the choice of a scale -----------------------------------------------------------------------------------

# How many of 4 and of 20 texts are right at a scale. Over all texts 0.7 is best, on average over tasks 0.3.
RIGHT = {0.2: (1, 9), 0.3: (4, 8), 0.5: (3, 9), 0.7: (1, 18), 1.0: (2, 8), 1.5: (0, 0), 2.5: (0, 2)}


def by_scale(size, task):
    right = RIGHT[size]
    return share(right[0], 4) if task == "few" else share(right[1], 20)


def test_tune_takes_the_scale_that_is_best_on_average_over_tasks():
    validation = Known(["few", "many"], by_scale)
    entry = Entry("largest entry", "magnitude_prune", {"density": 1 / 64})  # leaves the 1 of 1 and 0.5
    options, scores = tune(entry, [sized(1.0, 0.5)], validation)
    assert scores == pytest.approx({scale: (a / 4 + b / 20) / 2 for scale, (a, b) in RIGHT.items()})
    assert options == {"density": 1 / 64, "scale": 0.3} and entry.options == {"density": 1 / 64}
    assert [size for size, _ in validation.asked] == list(GRID) == list(RIGHT)


def test_tune_takes_the_smallest_of_equal_scales():
    right = {scale: 3 if scale in (0.5, 1.0, 1.5) else 2 for scale in GRID}
    validation = Known(["t"], lambda size, task: share(right[size], 4))
    assert tune(Entry("sum", "task_arithmetic"), [sized(1.0)], validation)[0] == {"scale": 0.5}


def test_tune_leaves_alone_what_is_not_tuned():
    validation = Known(["t"], lambda *_: pytest.fail("asked"))
    assert tune(Entry("mean", "mean", {"x": 1}, tuned=False), [sized(1.0)], validation) == ({"x": 1}, {})


def test_tune_and_bake_cut_to_the_rank():
    """Of singular values 4 and 3 the cut keeps 4."""
    validation = Known(["t"], lambda size, task: share(round(size / 4, 6) == 0.7, 1))
    options, scores = tune(Entry("sum", "task_arithmetic"), [sized(4.0, 3.0)], validation, rank=1)
    assert options == {"scale": 0.7} and sum(scores.values()) == 1
    test = Known(["t"], lambda size, task: np.array([size or 0.0]))
    entries = [
        Entry("sum", "task_arithmetic", {"scale": 2.0}),
        Entry("half", "task_arithmetic", {"scale": 0.5}),
    ]
    found = bake(test, {"t": sized(4.0, 3.0)}, entries, {"half": {"scale": 0.25}}, rank=1)
    assert {m: float(c["t"][0]) for m, c in found.items()} == pytest.approx(
        {"zero-shot": 0, "own adapter": 5, "sum": 8, "half": 1}
    )
    assert list(found) == ["zero-shot", "own adapter", "sum", "half"]


# -- outcomes by task ----------------------------------------------------------------------------------------


def test_references_are_the_base_and_each_task_with_its_own_adapter():
    test = Known("xy", lambda size, task: np.array([size or 0.0, ord(task)]))
    found = references({"y": sized(2.0), "x": sized(3.0)}, test)
    assert {m: {t: list(c) for t, c in by.items()} for m, by in found.items()} == {
        "zero-shot": {"x": [0, 120], "y": [0, 121]}, "own adapter": {"x": [3, 120], "y": [2, 121]},
    }  # fmt: skip
    assert sorted(test.asked[1:]) == [(2, ("y",)), (3, ("x",))]
    assert list(own_correct(test, {"x": sized(1.0), "y": sized(1.0)})) == ["x", "y"]


def test_tasks_count_alike_whatever_their_numbers_of_texts():
    assert mean_accuracy({"a": share(2, 4), "b": share(3, 10)}) == pytest.approx(0.4)
    assert mean_accuracy({"a": share(3, 4), "b": np.array([0.65] * 3)}) == pytest.approx(0.7)  # metrics of answers, too


def test_seeds_are_stacked_in_order():
    runs = [{m: {t: np.array([s, len(m), ord(t)]) for t in "xy"} for m in ("own", "z")} for s in (7, 8, 9)]
    found = over_seeds(runs)
    assert list(found) == ["own", "z"] and list(found["z"]) == ["x", "y"]
    assert found["own"]["y"].tolist() == [[7, 3, 121], [8, 3, 121], [9, 3, 121]]


def test_memory_asks_once_for_every_content(tmp_path):
    test = Known("xy", lambda size, task: np.array([size or 0.0, ord(task)]))
    test.memory = tmp_path
    for adapter, tasks, asked in (
        (sized(2.0), ["x"], [(2, ("x",))]), (sized(2.0), None, [(2, ("y",))]), (sized(2.0), ["y", "x"], []),
        (None, None, [(None, ("x", "y"))]), (sized(3.0), ["y"], [(3, ("y",))]), (None, ["y"], []),
    ):  # fmt: skip
        test.asked = []
        found = test.correct(adapter, tasks)
        size = 0.0 if adapter is None else adapter.norm()
        assert {n: list(c) for n, c in found.items()} == {n: [size, ord(n)] for n in tasks or "xy"}
        assert test.asked == asked and list(found) == list(tasks or "xy")
    test.fast, test.asked = True, []
    test.correct(sized(2.0), ["x"])
    assert test.asked == [(2, ("x",))]
    test.asked = []
    for _ in range(2):  # a scale is content, too
        assert test.correct(sized(2.0), ["x"], scale=1.5)["x"][0] == 3
    assert test.asked == [(3, ("x",))]


# -- tables and files ----------------------------------------------------------------------------------------

ROWS = pd.DataFrame(
    [(m, t, x, v, v - 0.1, v + 0.2, at) for at, add in ((8, 0.0), (16, 0.001)) for m, t, x, v in (
        ("z", "mean", "accuracy", 0.4234 + add), ("z", "t", "accuracy", 0.9), ("a", "mean", "accuracy", 0.5 + add),
        ("a", "mean", "recovered gain", -0.0321 + add), ("z", "mean", "recovered gain", 0.6666 + add))],
    columns=["method", "task", "metric", "value", "low", "high", "rank"],
)  # fmt: skip


def test_comparison_is_in_per_cent_and_in_file_order():
    table = comparison(ROWS[ROWS["rank"] == 8])
    assert list(table.index) == ["z", "a"] and table.index.name == "method"
    assert table.to_dict("list") == {
        "accuracy %": ["42.3", "50.0"], "95 % interval of accuracy": ["32.3 to 62.3", "40.0 to 70.0"],
        "recovered gain %": ["66.7", "-3.2"], "95 % interval of recovered gain": ["56.7 to 86.7", "-13.2 to 16.8"],
    }  # fmt: skip
    assert list(comparison(ROWS[ROWS["rank"] == 8], ["recovered gain"]).columns) == list(table.columns)[2:]


def published(name):
    if name != "known":
        raise FileNotFoundError(name)
    return ROWS


def test_a_cell_is_one_mean_of_a_published_table(monkeypatch):
    monkeypatch.setattr(sys.modules[cell.__module__], "published", published)
    assert cell("known", "accuracy", method="z", rank=16) == "42.4 [32.4, 62.4]"
    assert cell("known", "accuracy", method="z", rank=8) == "42.3 [32.3, 62.3]"
    assert cell("known", "recovered gain", method="a", rank=8) == "-3.2 [-13.2, 16.8]"
    assert cell("known", "accuracy", method="b") == cell("unknown", "accuracy") == "not run"
    assert cell("known", "nothing", method="z") == "not run"


def test_a_quick_page_shows_the_published_table_and_says_so(monkeypatch):
    monkeypatch.setattr(sys.modules[beside.__module__], "published", published)
    own = ROWS.head(1)
    assert beside("known", own, "quick") is ROWS and beside("known", None, "quick") is ROWS
    assert all(beside("known", own, profile) is own for profile in ("full", "gpu", "rehearsal"))
    assert beside("unknown", own, "quick") is own and beside("unknown", None, "quick") is None
    assert "this build's own run (5 texts)" in provenance(own, own, "5 texts")
    assert "from the published run" in provenance(ROWS, own, "5 texts")


def test_results_are_saved_with_what_they_came_from(tmp_path):
    rows = pd.DataFrame({"method": ["a", "b"], "value": [0.123456789, 2.0]})
    path = save_results(rows, tmp_path / "new" / "folder", "table", profile="quick", seed=3)
    assert path == tmp_path / "new" / "folder" / "table.csv" and list(rows.columns) == ["method", "value"]
    lines = [f"a,0.12346,quick,3,{lo.__version__}", f"b,2.0,quick,3,{lo.__version__}"]
    assert path.read_bytes().decode() == "\n".join(["method,value,profile,seed,version", *lines, ""])
    save_results(rows.head(1), path.parent, "table")
    assert len(pd.read_csv(path)) == 1 and [p.name for p in path.parent.iterdir()] == ["table.csv"]


def test_orders_are_distinct_and_begin_with_the_two_ends():
    found = orders(24, length=4)
    assert found[:2] == [[0, 1, 2, 3], [3, 2, 1, 0]] and len({tuple(o) for o in found}) == 24  # all there are
    assert all(sorted(o) == [0, 1, 2, 3] for o in found)
    assert orders(1) == [list(range(8))] and orders(5) == orders(9)[:5] and orders(5, seed=1) != orders(5)


CALL = """
import time
import numpy as np
from lora_opcm.lab.experiments.cost import cost

before = np.ones(10_000_000)
del before

def call():
    np.ones(7_500_000)
    time.sleep(0.2)
    return np.ones(5_000_000)

result, seconds, grown = cost(call)
print(len(result), seconds, grown)
"""


@pytest.mark.slow
def test_cost_is_of_the_call_alone():
    """40 MB that the call holds and 60 that it frees; 80 before it do not count. In a process of its own, whose threads
    hold nothing else."""
    done = subprocess.run([sys.executable, "-c", CALL], capture_output=True, text=True, check=True)
    count, seconds, grown = map(float, done.stdout.split())
    assert count == 5_000_000 and 0.2 <= seconds < 20
    if not math.isnan(grown):  # where the kernel does not tell
        assert 55 < grown < 90


def test_adapters_are_named_by_their_numbers(tmp_path):
    one, two = sized(1.0), sized(2.0)
    first, second = contents([one, two]).split("+")
    assert len(first) == len(second) == 8 and first != second
    assert contents([two, sized(1.0)]) == f"{second}+{first}"
    tasks = list(json.loads((lo.data_dir() / "adapters" / "manifest.json").read_text()))
    tasks = [t for t in tasks if (Path(lo.adapter_path(t)) / "history.json").exists()]
    for task in tasks:  # of seed 2: the same adapters, twice as large
        lo.save_adapter(2 * lo.load_adapter(lo.adapter_path(task)), tmp_path / "seed2" / task)
    found = hashes([2, 0], tmp_path).split("+")
    assert found == hashes([2], tmp_path).split("+") + hashes([0]).split("+")
    assert sorted(found[8:]) == sorted(lo.load_adapter(lo.adapter_path(t)).id[:8] for t in tasks)
    assert len(set(found)) == 16
