"""What other packages add through entry points: methods, streams; and packages that cannot be loaded."""

from types import SimpleNamespace

import dense_rules
import pytest
import torch
from factories import adapter, error
from torch import Tensor

import lora_opcm as lo
from lora_opcm import plugins
from lora_opcm.lowrank import LowRank
from lora_opcm.merging import method, table
from lora_opcm.merging.core import Core
from lora_opcm.merging.method import merge_method
from lora_opcm.streams import Stream, load_stream, streams
from lora_opcm.values import Share


@pytest.fixture
def offer(monkeypatch):
    """Offer (group, name, function that loads it, package) as an entry point, as if that package were installed."""
    before, kinds = dict(method._table), dict(Stream.kinds)

    def offer(group, name, load, package="theirs"):
        dist = package and SimpleNamespace(name=package)
        points = {f"lora_opcm.{group}": [SimpleNamespace(name=name, load=load, value="theirs.module", dist=dist)]}
        monkeypatch.setattr(plugins, "entry_points", lambda group: points.get(group, []))
        plugins.found.cache_clear()
        method._loaded.clear()

    yield offer
    plugins.found.cache_clear()
    for held, was in ((method._loaded, {}), (method._table, before), (Stream.kinds, kinds)):
        held.clear()
        held.update(was)


def test_a_method_of_another_package_is_loaded_once_and_merges(offer):
    loads = []

    def load():
        @merge_method("a_share", source="theirs", keeps="one sum")
        def a_share(core: Core, share: Share = 0.5) -> Tensor:
            """A share of the sum."""
            return share * core.total()

        loads.append(a_share)
        return a_share

    offer("methods", "a_share", load)
    known = set(table())
    assert "a_share" in known and {"opcm", "cat"} < known and set(table()) == known
    assert len(loads) == 1
    generator = torch.Generator().manual_seed(0)
    a, b = (adapter({"w": (9, 7)}, 2, generator, torch.float64) for _ in range(2))
    for options, share in (({}, 0.5), ({"share": 0.25}, 0.25)):
        expected = share * (a.modules["w"].delta() + b.modules["w"].delta())
        assert error(lo.merge(a, b, method="a_share", **options).modules["w"], expected) < 1e-12


def test_a_stream_of_another_package_saves_and_loads(offer, tmp_path):
    class Last(Stream[LowRank]):
        """Keeps the last adapter."""

        kind = "last"

        def __init__(self, share: Share = 1.0):
            super().__init__(share=share)

        def grow(self, kept, update):
            return update, {"came": 2.0}

        def export(self, kept):
            return kept

        def shape(self, kept):
            return kept.shape

        def pack(self, kept):
            return {"left": kept.left, "right": kept.right}

        def unpack(self, tensors):
            return LowRank(tensors["left"], tensors["right"])

    Stream.kinds.pop("last")  # until the package is loaded
    offer("streams", "last", lambda: Stream.kinds.update(last=Last))
    assert set(streams()) == {"opcm", "whitened_sum", "whitening", "lora_opcm", "last"}
    assert Last.defaults() == {"share": 1.0}
    generator = torch.Generator().manual_seed(0)
    a, b = (adapter({"v": (9, 7), "w": (5, 4)}, 2, generator, torch.float64) for _ in range(2))
    last = Last(share=0.3).add(a).add(b)
    # Numbers of `grow` add up over modules, and are the record unless the stream says otherwise.
    assert [row["came"] for row in last.state.history] == [4.0, 4.0]
    last.save(tmp_path / "s")
    found = load_stream(tmp_path / "s")
    assert type(found) is Last and found.share == 0.3 and found.state.history == last.state.history
    for name in ("v", "w"):  # without a scale of its own a stream is taken as it is
        assert error(found.adapter().modules[name], b.modules[name].delta()) < 1e-12
    with pytest.raises(AttributeError, match="Last has no attribute 'alpha'"):
        _ = last.alpha
    with pytest.raises(ValueError, match="cannot remove"):  # it does not shrink
        last.remove(a)


@pytest.mark.parametrize("package, owner", [("theirs", "theirs"), (None, "theirs.module")])
def test_what_cannot_be_loaded_is_named(offer, package, owner):
    offer("methods", "broken", lambda: 1 / 0, package)
    with pytest.raises(ValueError, match=f"^{owner}: its methods 'broken' cannot be loaded: ZeroDivisionError"):
        table()


def test_names_of_methods_are_taken_once():
    with pytest.raises(ValueError, match="there is a method 'cat' already, from lora_opcm.merging.rules.sums"):
        merge_method("cat", source="theirs")(lambda core: core.total())


def typed(core, share: Share = 0.5, rank=None, energy=None):
    """A rule.

    It says more below.
    """


def untyped(core, share=0.5): ...


def without_default(core, share: Share): ...


@pytest.mark.parametrize(
    "rule, field, error, words",
    [
        (typed, {"space": "cores"}, ValueError, "x: space is 'cores', expected one of 'core', 'updates', 'dense'"),
        (typed, {"keeps": "two sums"}, ValueError, "x: keeps is 'two sums', expected one of one sum, three sums"),
        (untyped, {}, TypeError, "x: option share has no type that can be checked"),
        (without_default, {}, TypeError, "x: option share has no default"),
    ],
)
def test_a_method_that_says_too_little_is_refused(rule, field, error, words):
    with pytest.raises(error, match=words):
        merge_method("x", **{"source": "theirs"} | field)(rule)
    assert "x" not in method._table


def test_a_method_is_what_its_rule_says():
    """Its options without the cuts it does itself, and the first line of its words."""
    found = method.Method("x", typed, "core", "theirs", "one sum")
    assert found.options == {"share": 0.5} and found.cuts == {"rank", "energy"} and found.summary == "A rule."
    assert method.Method("x", lambda core: core, "core", "theirs", "one sum").summary == ""
    found.check(share=1.0)
    with pytest.raises(ValueError, match=r"x has no option \['rank'\]; it takes \['share'\]"):
        found.check(rank=3)
    with pytest.raises(ValueError, match="share must be a number in"):
        found.check(share=1.5)


def test_the_table_is_by_what_methods_keep_and_tells_each_field():
    shown, entries = lo.methods(), table()
    kept = [method.KEEPS.index(m.keeps) for m in entries.values()]
    assert kept == sorted(kept) and list(shown.index) == list(entries)
    for keeps in method.KEEPS:
        names = [m.name for m in entries.values() if m.keeps == keeps]
        assert names == sorted(names)
    row = shown.loc["lora_opcm"]
    assert row["options"] == "alpha, gauge" and row["runs on"] == "factors" and row["scale"] == "norm"
    for name, m in entries.items():
        said = [m.summary, m.keeps, m.ordered, m.gauge_invariant, m.scale, m.data, m.source]
        columns = ["does", "keeps", "order matters", "gauge-invariant", "scale", "needs data", "source"]
        assert list(shown.loc[name, columns]) == said


def test_what_is_true_of_the_methods_of_this_package():
    """Tests ask the table which methods to try: so what it says is said once more here."""
    which = lambda true: {name for name, m in table().items() if true(m)}  # noqa: E731
    ordered = {"opcm", "lora_opcm", "dop", "whitening", "dare", "dare_ties", "core_dare_ties"}
    assert which(lambda m: m.ordered) == ordered
    assert which(lambda m: not m.gauge_invariant) == {"lora_opcm"} and which(lambda m: m.data) == {"regmean"}
    assert which(lambda m: m.largest) == {"svd"} and which(lambda m: m.scale == "norm") == {"opcm", "lora_opcm"}
    plain = {"cat", "mean", "svd", "task_arithmetic", "dare", "magnitude_prune"}
    own = plain | {"regmean", "chordal_mean", "karcher_mean", "quotient_mean"}
    assert which(lambda m: m.scale == 1) == own and which(lambda m: m.scale == "auto") == dense_rules.AUTO
    assert which(lambda m: m.space == "dense") == {"ties", "dare", "dare_ties", "magnitude_prune", "magmax"}
    assert which(lambda m: m.space == "updates") == {"lora_opcm", "regmean"}
    assert which(lambda m: m.cuts) == {"iso_c", "iso_cts", "subspace_boosting"} and len(table()) == 30
