"""Somebody's own package: a method, a stream, a format and a task that appear everywhere without touching ours."""

import subprocess
import sys

import pytest
from factories import adapter

import lora_opcm as lo
from lora_opcm.values import Share

MODULE = '''
from __future__ import annotations

import torch
from lora_opcm.files.format import Format, Part, factors_of
from lora_opcm.lowrank import LowRank, add
from lora_opcm.merging import Core, merge_method
from lora_opcm.streams import Stream
from lora_opcm.values import Scale, Share


@merge_method("portion", source="a test", keeps="one sum")
def portion(core: Core, share: Share = 0.5) -> torch.Tensor:
    """A portion of the sum."""
    return share * core.total()


class PlainSum(Stream[LowRank]):
    kind = "plain_sum"

    def __init__(self, scale: Scale = 1.0):
        super().__init__(scale=scale)

    def grow(self, kept, update):
        update = update.wide()
        return (update if kept is None else add([kept, update])), {}

    def export(self, kept):
        return kept

    def shape(self, kept):
        return kept.shape

    def pack(self, kept):
        return {"left": kept.left, "right": kept.right}

    def unpack(self, tensors):
        return LowRank(tensors["left"], tensors["right"])


def contents(adapter, names, dtype):
    tensors = {}
    for name in adapter:
        up, down = factors_of(adapter, name, dtype)
        tensors[f"{names[name]}.toy_up"], tensors[f"{names[name]}.toy_down"] = up, down
    return tensors, {}


TOY = Format(
    "toy", {".toy_up": Part("up"), ".toy_down": Part("down")}, lambda a: {n: n for n in a}, contents,
    lambda metadata, modules, where: None,
)


def task():
    return "a task"
'''
POINTS = """
[lora_opcm.methods]
portion = mine:portion
[lora_opcm.streams]
plain_sum = mine:PlainSum
[lora_opcm.formats]
toy = mine:TOY
[lora_opcm.tasks]
own = mine:task
"""


RUN = """
import contextlib, io, json, sys
import lora_opcm as lo
from lora_opcm.command.app import main

def run(*words, code=0):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            main([*words])
        except SystemExit as end:
            assert (end.code or 0) == code, (words, end.code)
    return out.getvalue()

def same(x, y):
    return (x - y).norm() < 1e-5 * y.norm()
"""


@pytest.fixture
def python(tmp_path, generator):
    """Run a script where the package is installed, in a folder with two adapters a and b."""
    site = tmp_path / "site"
    (site / "mine-1.0.dist-info").mkdir(parents=True)
    (site / "mine.py").write_text(MODULE)
    (site / "mine-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (site / "mine-1.0.dist-info" / "entry_points.txt").write_text(POINTS)
    for name in "ab":
        lo.save_adapter(adapter({"layers.0.q": (12, 10), "layers.1.q": (8, 14)}, 3, generator), tmp_path / name)

    def run(script):
        paths = f"import sys; sys.path[:0] = {[str(site), str(lo.data_dir().parent)]}\n"
        done = subprocess.run(
            [sys.executable, "-c", paths + RUN + script], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.slow
def test_a_method_of_their_own_appears_everywhere(python):
    python("""
row = next(row for row in json.loads(run("methods", "--json")) if row["method"] == "portion")
assert (row["does"], row["keeps"], row["options"]) == ("A portion of the sum.", "one sum", "share"), row
run("merge", "a", "b", "-o", "m", "--method", "portion", "--option", "share=0.25", "--rank", "2")
whole = 0.25 * (lo.load_adapter("a") + lo.load_adapter("b"))
assert same(lo.load_adapter("m"), whole.with_modules({n: u.truncate(2)[0] for n, u in whole.items()}))
run("verify", "b", "a", "--against", "m")
assert "by {'method': 'portion', 'scale': 1.0}" in run("merge", "a", "b", "-o", "n", "--method", "portion", "--dry-run")
run("merge", "a", "b", "-o", "n", "--method", "portion", "--option", "share=2", code=2)

from lora_opcm.testing import check_method
check_method("portion"), check_method("portion", share=1.0)

from lora_opcm.lab.evaluation import Remembering  # a row of the bake-off is a name and its options
from lora_opcm.lab.experiments.trials import Entry, bake

class Sizes(Remembering):
    fast, tasks = False, {"a": None, "b": None}
    def _correct(self, adapter, names, progress, scale):
        return dict.fromkeys(names, 0.0 if adapter is None else scale * adapter.norm())

found = bake(Sizes(), {n: lo.load_adapter(n) for n in "ab"}, [Entry("P", "portion", {"share": 0.5})])
assert abs(found["P"]["a"] - lo.merge("a", "b", method="cat", scale=0.5).norm()) < 1e-5
""")


@pytest.mark.slow
def test_a_stream_a_format_and_a_task_of_their_own(python, tmp_path):
    python("""
run("add", "s.safetensors", "a", "--method", "plain_sum", "--scale", "0.5")
run("add", "s.safetensors", "b")
run("export", "s.safetensors", "-o", "m")
a, b = lo.load_adapter("a"), lo.load_adapter("b")
assert same(lo.load_adapter("m"), 0.5 * (a + b))
a.save("a.safetensors", "toy")
toy = lo.load_adapter("a.safetensors")
assert toy.format == "toy" and same(lo.Adapter(toy.modules), a)
from lora_opcm.lab.tasks import load_named
assert load_named("own") == "a task"
""")
    with pytest.raises(lo.AdapterError, match="a state of kind 'plain_sum', expected opcm"):
        lo.ContinualMerger.load(tmp_path / "s.safetensors")
    with pytest.raises(lo.AdapterError):  # here it is not known
        lo.load_adapter(tmp_path / "a.safetensors")


@pytest.mark.slow
def test_what_cannot_be_loaded_says_whose_it_is(python, tmp_path):
    (tmp_path / "site" / "mine.py").write_text("import nothing_of_this_name")
    script = "try: lo.methods()\nexcept ValueError as e: print(e)"
    assert "mine: its methods 'portion' cannot be loaded" in python(script)


def test_a_rule_says_the_types_of_its_options():
    def untyped(core, share=0.5):
        return share * core.total()

    with pytest.raises(TypeError, match="option share has no type that can be checked"):
        lo.merge_method("untyped", source="a test", keeps="one sum")(untyped)

    def required(core, share: Share):
        return share * core.total()

    with pytest.raises(TypeError, match="option share has no default"):
        lo.merge_method("required", source="a test", keeps="one sum")(required)
    with pytest.raises(ValueError, match="there is a method 'cat' already"):
        lo.merge_method("cat", source="a test", keeps="one sum")(lambda core: core.total())
    with pytest.raises(ValueError, match="space is 'nowhere'"):
        lo.merge_method("x", space="nowhere", source="a test", keeps="one sum")(lambda core: core.total())
    assert not {"untyped", "required", "x"} & set(lo.methods().index)
