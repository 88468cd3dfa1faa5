"""Merging beyond one machine: on a device, and by shards."""

import pytest
import torch
from factories import adapter, dense, error
from test_methods import RANK, REGISTRY, SHAPES, distance, grams, run, stream

import lora_opcm as lo
from lora_opcm.lowrank import gram_matrix, reduce, reduce_batch

MANY = SHAPES | {f"layers.{i}.{name}": shape for i in range(3) for name, shape in SHAPES.items()}
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")),
    pytest.param("mps", marks=pytest.mark.skipif(not torch.backends.mps.is_available(), reason="no MPS")),
]


def many(method, dtype=torch.float32, ranks=(3, 3, 3, 3)):
    """Adapters with several modules of each shape, the second of which lacks two modules."""
    generator = torch.Generator().manual_seed(0)
    ranks = (RANK,) * len(ranks) if method == "lora_opcm" else ranks
    found = [adapter(MANY, r, generator, dtype) for r in ranks]
    less = {n: u for n, u in found[1].modules.items() if n not in ("b", "layers.1.a")}
    return [found[0], found[1].with_modules(less), *found[2:]]


def both(method, adapters, device):
    options = {"grams": grams(len(adapters), MANY)} if REGISTRY[method].data else {}
    there = lo.merge(adapters, method, device=device, **options)
    return there, lo.merge(adapters, method, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", sorted(REGISTRY))
@pytest.mark.parametrize("ranks", [(3, 3, 3, 3), (2, 5, 3, 16)], ids=["one rank", "mixed ranks"])
def test_in_batches_as_module_by_module(method, ranks, device):
    there, here = both(method, many(method, ranks=ranks), device)
    assert list(there.modules) == list(here.modules)
    assert {u.left.device.type for u in there.modules.values()} == {"cpu"}
    assert distance(there, here) < 1e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", sorted(REGISTRY))
def test_in_batches_in_every_dtype(method, dtype, device):
    there, here = both(method, many(method, dtype), device)
    assert {u.dtype for u in there.modules.values()} == {dtype}
    assert distance(there, here) < {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float64: 1e-9}[dtype]


@pytest.mark.parametrize("device", DEVICES)
def test_what_a_device_multiplies_is_within_the_contract(device):
    adapters = stream(torch.float32)
    merged = lo.merge(adapters, "cat", device=device)
    for name in SHAPES:
        assert error(merged.modules[name], sum(dense(a.modules[name]) for a in adapters)) < 1e-5


@pytest.fixture
def low_precision():
    """What training scripts set: on CUDA products in TF32, on CPUs that can in bfloat16."""
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("device", [None, *DEVICES])
@pytest.mark.parametrize("method", sorted(REGISTRY))
def test_low_matmul_precision_outside_changes_no_bit(method, device, request, monkeypatch):
    exact = run(method, stream(torch.float16), device=device)
    request.getfixturevalue("low_precision")
    seen = set()
    matmul = torch.Tensor.__matmul__

    def watched(a, b):
        if a.dtype == b.dtype == torch.float32:
            seen.add(torch.get_float32_matmul_precision())
        return matmul(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    again = run(method, stream(torch.float16), device=device)
    assert seen <= {"highest"}
    assert seen or REGISTRY[method].space != "core"
    assert torch.get_float32_matmul_precision() == "medium"
    for name in SHAPES:
        assert torch.equal(exact.modules[name].left, again.modules[name].left)


def test_a_batch_of_cores_is_the_cores_one_by_one():
    modules = [[a.modules["a"] for a in stream(torch.float16, seed)] for seed in range(3)]
    for core, updates in zip(reduce_batch(modules, "cpu"), modules):
        alone = reduce(updates)
        for c, d in zip(core.cores, alone.cores):
            assert float((c - d).norm() / d.norm()) < 1e-12
        assert core.dtype == alone.dtype and core.left.nested


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_gram_and_lift_keep_to_their_devices(dtype):
    """On fake tensors, one device of which is "meta": where devices were mixed, this raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from lora_opcm.lowrank import Basis

    with FakeTensorMode():
        columns = torch.empty(2, 64, 6, dtype=dtype, device="meta")
        gram = gram_matrix(columns)
        assert (gram.device.type, gram.dtype, gram.shape) == ("cpu", torch.float64, (2, 6, 6))
        transform = torch.empty(6, 6, dtype=torch.float64)
        lifted = Basis(columns[0].float(), transform, transform) @ torch.empty(6, 4, dtype=torch.float64)
        assert (lifted.device.type, lifted.dtype, lifted.shape) == ("cpu", torch.float32, (64, 4))
