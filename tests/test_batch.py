"""Modules of one shape side by side: each as it is alone, and as the same rule makes it of one core."""

import warnings

import pytest
import torch
from factories import adapter, dense, dense_opcm, update
from test_joint import spectra
from test_methods import REGISTRY
from torch.utils._python_dispatch import TorchDispatchMode

import lora_opcm as lo
from lora_opcm import Adapter, LowRank
from lora_opcm.lab.experiments.cost import counted
from lora_opcm.merging import Basis, Core, batch, method_of
from lora_opcm.merging.batch import Batch, batches
from lora_opcm.merging.rules import opcm
from lora_opcm.merging.rules.frames import inverse_root, polar
from lora_opcm.merging.rules.projection import cut, projected_sum
from lora_opcm.merging.space import merge_module
from lora_opcm.numerics import Uneven, keep_rank, nonzero_svd

BATCHED = sorted(name for name, method in REGISTRY.items() if method.batched)
OPTIONS = {
    "opcm": [{}, {"alpha": 0.0}, {"alpha": 0.9}, {"alpha": 1.0}, {"variant": "fusionbench"}],
    "tsv": [{}, {"directions": 2}],
    "whitened_sum": [{}, {"power": 0.0}, {"power": 1.0, "sides": "left"}, {"sides": "right"}, {"cap": 5}],
}  # fmt: skip
CASES = [(name, options) for name in BATCHED for options in OPTIONS.get(name, [{}])]


class Sizes(TorchDispatchMode):
    """The sizes of what is decomposed."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "eigh" in function.name() or "svd" in function.name():
            self.sizes.append(args[0].shape[-1])
        return function(*args, **kwargs or {})


pytestmark = pytest.mark.usefixtures("one_thread")  # many share a few modules out one by one


def modules(count, tasks=5, dtype=torch.float32, m=90, n=70):
    """Updates of several modules of one shape."""
    return [spectra(tasks, m, n, seed=i, dtype=dtype) for i in range(count)]


def adapters(found):
    return [Adapter({str(i): updates[t] for i, updates in enumerate(found)}) for t in range(len(found[0]))]


def test_most_methods_of_the_core_take_batches():
    assert set(BATCHED) >= {"opcm", "tsv", "whitened_sum", "whitening", "iso_c", "svd", "mean"}
    assert all(REGISTRY[name].space == "core" for name in BATCHED)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("method, options", CASES, ids=str)
@pytest.mark.parametrize("cut", [{}, {"rank": 6}, {"energy": 0.8}], ids=str)
def test_a_module_of_a_batch_is_that_of_its_core(method, options, dtype, cut):
    if cut and (method == "iso_c" or options.get("power") == 1 or "cap" in options):
        pytest.skip("of a flat spectrum rounding chooses what is cut")
    found = modules(4, dtype=dtype)
    merged = lo.merge(adapters(found), method, scale=1.0, **cut, **options)
    entry = method_of(method)
    for i, updates in enumerate(found):
        wide = [u.to(torch.float64) for u in updates]
        rank = cut.get("rank") or (4 if method == "svd" and not cut else None)
        expected = dense(
            merge_module(entry, Core.of(wide), {"rank": rank, "energy": cut.get("energy")}, 1.0, options).update
        )
        gap = float((dense(merged[str(i)]) - expected).norm() / expected.norm())
        assert gap < {torch.float16: 2e-3, torch.float32: 1e-6, torch.float64: 1e-10}[dtype]


@pytest.mark.parametrize("method, options", CASES, ids=str)
def test_a_module_has_the_same_bytes_in_any_batch(method, options):
    """Among them one whose update cancels, one with a small direction, and one that one adapter lacks."""
    found = modules(6, dtype=torch.float32)
    a, b, *_ = found[1]
    found[1] = [a, b, a * -1.0, *found[1][3:]]
    found[3] = [LowRank(u.left * torch.tensor([1, 1, 1, 1e-5]), u.right) for u in found[3]]
    found[4] = [found[4][0].zero(), *found[4][1:]]
    whole = lo.merge(adapters(found), method, scale=1.0, ragged=True, **options)
    for some in ([0], [1], [2], [3], [4], [0, 2], [0, 1, 5], [2, 3, 4, 5]):
        part = lo.merge(adapters([found[i] for i in some]), method, scale=1.0, ragged=True, **options)
        for at, i in enumerate(some):
            one, other = part[str(at)], whole[str(i)]
            assert torch.equal(one.left, other.left) and torch.equal(one.right, other.right), (some, i)


def test_a_batch_has_modules_of_one_kind_and_no_more_numbers_than_allowed(monkeypatch):
    """Factors of 4×3 and ranks 2 and 1 have 14 + 7 numbers; of 5×3, 16 + 8; one adapter lacks f, and g stays alone."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"g": (4, 3), "a": (4, 3), "b": (5, 3), "c": (4, 3), "d": (4, 3), "e": (5, 3), "f": (4, 3)}
    first, second = (adapter(shapes, rank, generator) for rank in (2, 1))
    second = second.with_modules({n: u for n, u in second.modules.items() if n != "f"})
    expected = {
        2**20: ["g", "acd", "be", "f"], 63: ["g", "acd", "be", "f"], 62: ["g", "ac", "d", "be", "f"],
        48: ["g", "ac", "d", "be", "f"], 47: ["g", "ac", "d", "b", "e", "f"], 42: ["g", "ac", "d", "b", "e", "f"],
        41: ["g", "a", "c", "d", "b", "e", "f"], 1: ["g", "a", "c", "d", "b", "e", "f"],
    }  # fmt: skip
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    for device in (True, False):
        for allowed, groups in expected.items():
            monkeypatch.setattr(batch, "NUMBERS", {device: allowed})
            found = batches([first, second], shapes, lambda name: name != "g", device)
            assert ["".join(names) for names in found] == groups, allowed
        monkeypatch.setattr(batch, "NUMBERS", {device: 2**20})
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        found = batches([first, second], shapes, lambda name: name != "g", device)
        assert ["".join(names) for names in found] == ["g", "ac", "d", "b", "e", "f"]  # something for both threads
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


def test_a_module_in_double_stays_exact_beside_one_that_is_not():
    single, exact = modules(2, dtype=torch.float64)
    exact[0] = exact[0].to(torch.float32)  # that of the first adapter, in both
    both = lo.merge(adapters([[u.to(torch.float32) for u in single], exact]), "tsv", scale=1.0)
    alone = lo.merge(adapters([exact]), "tsv", scale=1.0)
    assert torch.equal(both["1"].left, alone["0"].left) and both["1"].dtype == torch.float64


def test_a_batch_makes_about_as_many_calls_as_one_module():
    counts = {}
    for count in (1, 4, 8):
        some = adapters([[u.to(torch.float16) for u in updates] for updates in modules(count, 8)])
        counts[count] = counted(lambda some=some: lo.merge(some, "opcm", rank=16, dtype=torch.float32))["torch calls"]
    assert counts[8] < 2.5 * counts[1] and counts[8] - counts[4] < counts[1]


def test_who_is_in_a_batch():
    """Not a module with a column of zeros, nor one with a factor that two adapters share."""
    found = modules(4)
    a, b, *rest = found[1]
    found[1] = [a, LowRank(b.left, a.right), *rest]
    left = found[2][0].left.clone()
    left[:, 1] = 0
    found[2][0] = LowRank(left, found[2][0].right)
    made, which, others = Batch.of(found)
    assert which == [0, 3] and len(made) == 2 and others.keys() == {1, 2}
    for i, core in others.items():
        assert float((core.total() - Core.of(found[i]).total()).norm()) < 1e-12 * float(core.total().norm())
    for i, at in enumerate(which):
        alone = Core.of(found[at])
        for c, d in zip(made[i].cores, alone.cores, strict=True):
            assert float((c - d).norm() / d.norm()) < 1e-6
        assert made.norms()[i] == pytest.approx(alone.norms(), rel=1e-6)
        assert float((made.total()[i] - alone.total()).norm() / alone.total().norm()) < 1e-6
    assert len(Batch.of([found[1], found[2]])[0]) == 0
    gram = torch.tensor([[[1.0, 0.5], [0.5, 1.0]], [[1.0, 2.0], [2.0, 1.0]]], dtype=torch.float64)
    assert Basis.by_cholesky(torch.zeros(2, 5, 2), gram)[1].tolist() == [True, False]  # what rounding made indefinite


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.8])
def test_modules_that_lock_more_and_less_go_together(alpha):
    """Spectra that fall at different rates, of which α locks different numbers of directions."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for fall in (0.0, 0.5, 1.0, 1.5):
        weights = torch.logspace(0, -fall, 12, dtype=torch.float64)
        made = [update(200, 180, 12, generator, torch.float64) for _ in range(8)]
        found.append([LowRank(u.left * weights, u.right) for u in made])
    locked = {cut(torch.linalg.svdvals(Core.of(updates).total()), alpha) for updates in found}
    assert len(locked) == 4
    together = Batch.of(found)[0]
    with Sizes() as calls:
        spectrum = opcm(together, alpha)
    # a block leaves out the locked quarters, of all modules that lock as many
    assert (calls.sizes[-1] < 96) == (len(calls.sizes) > 8) == (alpha > 0.2)
    for i, updates in enumerate(found):
        reference = dense_opcm([{"w": dense(u)} for u in updates], alpha, "paper")["w"]
        made = (spectrum.u[i] * spectrum.s[i]) @ spectrum.vh[i]
        lifted = (together.left @ (spectrum.u * spectrum.s[:, None]))[i] @ (together.right @ spectrum.vh.mT)[i].mT
        assert float((lifted / lifted.norm() - reference / reference.norm()).norm()) < 1e-8
        stepwise = projected_sum(together[i], alpha, "paper")
        assert float((made - stepwise).norm() / stepwise.norm()) < 1e-9
        assert bool((spectrum.s[i].diff() <= 0).all())


def test_who_parts_ways_says_so():
    generator = torch.Generator().manual_seed(0)
    whole, poor = (torch.randn(20, 20, generator=generator, dtype=torch.float64) for _ in range(2))
    poor[:, 0] = poor[:, 1]
    for function in (lambda x: nonzero_svd(x, torch.float32), polar, lambda x: inverse_root(x @ x.mT)):
        function(torch.stack([whole, 2 * whole]))
        with pytest.raises(Uneven):
            function(torch.stack([whole, poor]))
    ill = whole @ torch.diag(torch.logspace(0, -4, 20, dtype=torch.float64))
    u, s, vh = nonzero_svd(torch.stack([ill, whole]), torch.float32)  # of one rank, by other ways
    for i, x in enumerate((ill, whole)):
        assert float(((u[i] * s[i]) @ vh[i] - x).norm()) < 1e-12 * float(x.norm())
    several = torch.tensor([[4.0, 2.0, 1.0], [4.0, 1.0, 1.0]])
    assert keep_rank(several, 1) == 1 and keep_rank(several, energy=0.7) == 1
    for how in ({"rank": 2}, {"energy": 0.8}):  # a tie, of which one is to hear; two directions and one
        with pytest.raises(Uneven):
            keep_rank(several, **how)


def test_a_tie_is_told_of_in_a_batch_too():
    eye = torch.eye(40, dtype=torch.float64)
    found = [
        [LowRank(eye[:, :2], eye[:2]), LowRank(eye[:, 2:4] / 2, eye[2:4])],
        modules(1, 2, torch.float64, 40, 40)[0],
    ]
    found[1] = [LowRank(u.left[:, :2], u.right[:2]) for u in found[1]]
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        lo.merge(adapters(found), "mean", rank=3, sketch=False)
    assert any("equal singular values" in str(w.message) for w in heard)


def test_what_a_batch_returns_is_saved_alone(tmp_path):
    """A view of all of the batch would take its memory along, and its bytes into a pickle."""
    merged = lo.merge(adapters(modules(4)), "opcm", rank=4)
    for u in merged.values():
        for x in (u.left, u.right):
            assert x.untyped_storage().nbytes() == x.numel() * x.element_size()
    lo.save_adapter(merged, tmp_path / "merged")
    assert lo.load_adapter(tmp_path / "merged").keys() == merged.keys()
