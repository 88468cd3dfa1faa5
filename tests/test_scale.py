"""Merging beyond one machine: on a device, and by shards."""

import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from factories import adapter, dense, error
from safetensors.torch import load_file, save_file
from test_methods import RANK, REGISTRY, SHAPES, distance, grams, run, stream

import lora_opcm as lo
from lora_opcm.merging import shards
from lora_opcm.merging.shards import belongs, join, merge_apart, merge_shard
from lora_opcm.numerics import full_precision, gram_matrix
from lora_opcm.parallel import parallel_map

MANY = SHAPES | {f"layers.{i}.{name}": shape for i in range(3) for name, shape in SHAPES.items()}
FOUND = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
DEVICES = [name for name, here in FOUND.items() if here]


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


METHODS = [pytest.param(m, marks=[pytest.mark.slow] if m == "karcher_mean" else []) for m in sorted(REGISTRY)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ranks", [(3, 3, 3, 3), (2, 5, 3, 16)], ids=["one rank", "mixed ranks"])
def test_in_batches_as_module_by_module(method, ranks, device):
    there, here = both(method, many(method, ranks=ranks), device)
    assert list(there.modules) == list(here.modules)
    assert {u.left.device.type for u in there.modules.values()} == {"cpu"}
    assert distance(there, here) < 1e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow), torch.float64])
@pytest.mark.parametrize("method", METHODS)
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


PRECISIONS = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]


def precision():
    return [b.fp32_precision for b in PRECISIONS]


@contextmanager
def low_precision(way):
    """What training scripts set: on CUDA products in TF32, on CPUs that can in bfloat16."""
    before = torch.backends.fp32_precision
    if way == "old":
        torch.set_float32_matmul_precision("medium")
    else:  # as transformers does
        torch.backends.fp32_precision = "tf32"
    try:
        yield precision()
    finally:
        torch.backends.fp32_precision = before
        torch.set_float32_matmul_precision("highest")
        for b in PRECISIONS:
            b.fp32_precision = "none"


@pytest.mark.parametrize("way", ["old", "new"])
def test_precision_comes_back_whoever_set_it_and_from_overlapping_threads(way):
    entered, leave = threading.Event(), threading.Event()

    def long(_):
        entered.set()
        assert leave.wait(10)

    other = threading.Thread(target=parallel_map, args=(long, [0]))
    with low_precision(way) as low:
        with full_precision():
            other.start()
            assert entered.wait(10)
            assert torch.get_float32_matmul_precision() == "highest" and not PRECISIONS[0].allow_tf32
        assert set(precision()) == {"ieee"}  # the other is not done
        leave.set()
        other.join()
        assert precision() == low


@pytest.mark.parametrize("device", [None, *DEVICES])
@pytest.mark.parametrize("method", METHODS)
def test_low_matmul_precision_outside_changes_no_bit(method, device, monkeypatch):
    exact = run(method, stream(torch.float16), device=device)
    seen = set()
    matmul = torch.Tensor.__matmul__

    def watched(a, b):
        if a.dtype == b.dtype == torch.float32:
            seen.update(precision())
        return matmul(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    with low_precision("new") as low:
        again = run(method, stream(torch.float16), device=device)
        assert precision() == low
    assert seen <= {"ieee"}
    assert seen or REGISTRY[method].space != "core" or REGISTRY[method].plain  # factors side by side
    for name in SHAPES:
        assert torch.equal(exact.modules[name].left, again.modules[name].left)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_gram_and_lift_keep_to_their_devices(dtype):
    """On fake tensors, one device of which is "meta": where devices were mixed, this raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from lora_opcm.merging import Basis

    with FakeTensorMode():
        columns = torch.empty(2, 64, 6, dtype=dtype, device="meta")
        gram = gram_matrix(columns)
        assert (gram.device.type, gram.dtype, gram.shape) == ("cpu", torch.float64, (2, 6, 6))
        transform = torch.empty(6, 6, dtype=torch.float64)
        lifted = Basis(columns[0].float(), transform, transform) @ torch.empty(6, 4, dtype=torch.float64)
        assert (lifted.device.type, lifted.dtype, lifted.shape) == ("cpu", torch.float32, (64, 4))


# -- shards ---------------------------------------------------------------------------------------------------


@pytest.fixture
def inputs(tmp_path):
    """Four adapters in files; the second lacks two modules, and all carry two full tensors."""
    saved = {f"{n}.weight": torch.arange(6, dtype=torch.float32) for n in ("classifier", "head")}
    config = {"modules_to_save": ["classifier", "head"], "target_modules": ["a", "b"], "peft_type": "LORA"}
    for i, a in enumerate(many("lora_opcm", torch.float16)):
        lo.save_adapter(replace(a, saved=saved, config=config), tmp_path / f"in{i}")
    return [tmp_path / f"in{i}" for i in range(4)]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("method", METHODS)
def test_three_shards_give_the_bytes_of_one_process(method, inputs, tmp_path):
    options = {"rank": 4, "weights": [1.0, 0.5, -1.0, 2.0]}
    options |= {"grams": grams(4, MANY)} if REGISTRY[method].data else {}
    whole = lo.merge([lo.load_adapter(path) for path in inputs], method, **options)
    lo.save_adapter(whole, tmp_path / "whole")
    parts = [merge_shard(inputs, tmp_path / f"{i}.safetensors", (i, 3), method, **options) for i in (2, 0, 1)]
    joined, call, _ = join(parts)
    lo.save_adapter(joined, tmp_path / "joined")
    assert files(tmp_path / "joined") == files(tmp_path / "whole")
    assert joined.dropped == whole.dropped
    assert joined.factor == whole.factor
    assert call == {"method": method, "rank": 4, "weights": [1.0, 0.5, -1.0, 2.0], "scale": REGISTRY[method].scale}


def test_a_single_shard_is_the_whole(inputs, tmp_path):
    lo.save_adapter(lo.merge(inputs, "tsv", rank=4), tmp_path / "whole")
    lo.save_adapter(join([merge_shard(inputs, tmp_path / "part", (0, 1), "tsv", rank=4)])[0], tmp_path / "joined")
    assert files(tmp_path / "joined") == files(tmp_path / "whole")


@pytest.mark.parametrize("method", ["cat", "tsv", "lora_opcm", "ties", "knots_ties"])
def test_shards_by_auto_have_the_norm_of_the_rule_together(method, inputs, tmp_path):
    parts = [merge_shard(inputs, tmp_path / f"{i}", (i, 3), method, rank=2, scale="auto") for i in range(3)]
    expected = 2 * sum(lo.load_adapter(path).norm() for path in inputs) / 4
    joined, call, _ = join(parts)
    assert joined.norm() == pytest.approx(expected, rel=1e-3) and call["scale"] == "auto"  # float16


@pytest.mark.slow
def test_shards_in_processes_of_their_own(inputs, tmp_path):
    code = "import sys; from lora_opcm.merging.shards import merge_shard\n"
    code += "merge_shard(sys.argv[3:], sys.argv[2], (int(sys.argv[1]), 3))"
    names = [tmp_path / f"{i}.safetensors" for i in range(3)]
    running = [subprocess.Popen([sys.executable, "-c", code, str(i), names[i], *inputs]) for i in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    lo.save_adapter(join(names)[0], tmp_path / "joined")
    lo.save_adapter(lo.merge([lo.load_adapter(path) for path in inputs]), tmp_path / "whole")
    assert files(tmp_path / "joined") == files(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, call",
    [("opcm", {"rank": 2, "scale": "norm"}), ("dare", {"seed": 3, "dtype": torch.float16}), ("cat", {"ragged": True})],
)
def test_processes_merge_to_the_bytes_of_one(method, call, inputs, tmp_path):
    apart = merge_apart(inputs, method, processes=3, progress=lambda done, total: watched(done, total, 3), **call)
    lo.save_adapter(apart, tmp_path / "apart")
    whole = lo.merge(inputs, method, **call)
    lo.save_adapter(whole, tmp_path / "whole")
    assert files(tmp_path / "apart") == files(tmp_path / "whole")
    assert apart.dropped == whole.dropped and apart.dtype == whole.dtype


def watched(done, total, expected):
    assert total == expected
    return done


@pytest.mark.slow
def test_processes_hand_on_what_was_warned_of_and_refused(inputs):
    with pytest.raises(ValueError, match="expected one process or more, got 0"):
        merge_apart(inputs, processes=0)
    with pytest.raises(ValueError, match="no option"):
        merge_apart(inputs, "opcm", processes=2, bogus=1)
    with pytest.warns(UserWarning) as alone:
        lo.merge(inputs, "karcher_mean", k=1)
    with pytest.warns(UserWarning) as apart:
        merge_apart(inputs, "karcher_mean", processes=1, k=1)
    assert {str(w.message) for w in apart} == {str(w.message) for w in alone}


@pytest.mark.slow
def test_a_process_that_is_ended_from_outside_is_an_error_of_one_line(inputs, monkeypatch):
    monkeypatch.setattr(shards, "_heard", ends)
    with pytest.raises(OSError, match="ended from outside"):
        merge_apart(inputs, processes=2)


def ends(*args):
    os._exit(9)


def test_more_shards_than_modules_and_kohya_files(tmp_path):
    generator = torch.Generator().manual_seed(0)
    shapes = {"lora_unet_a": (12, 8), "lora_unet_b": (16, 8)}
    names = [tmp_path / f"in{i}.safetensors" for i in range(2)]
    for path in names:
        lo.save_adapter(replace(adapter(shapes, 3, generator), format="kohya"), path, format="kohya")
    parts = [merge_shard(names, tmp_path / f"part{i}", (i, 7)) for i in range(7)]
    lo.save_adapter(join(parts)[0], tmp_path / "joined" / "m.safetensors")  # a kohya file says its own name
    lo.save_adapter(lo.merge([lo.load_adapter(p) for p in names]), tmp_path / "whole" / "m.safetensors")
    assert (tmp_path / "joined" / "m.safetensors").read_bytes() == (tmp_path / "whole" / "m.safetensors").read_bytes()


def test_a_shard_reads_its_own_tensors_only(inputs):
    """A NaN in a module of another shard is another shard's trouble."""
    broken = lo.load_adapter(inputs[0])
    name = next(n for n in broken.modules if belongs(n, (0, 2)))
    path = inputs[0] / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[f"base_model.model.{name}.lora_A.weight"][:] = float("nan")
    save_file(tensors, path)
    found = lo.load_adapter(inputs[0], only=lambda n: belongs(n, (1, 2)))
    assert set(found.modules) == {n for n in broken.modules if belongs(n, (1, 2))} and found.dtype == broken.dtype
    with pytest.raises(lo.AdapterError, match="NaN"):
        lo.load_adapter(inputs[0], only=lambda n: belongs(n, (0, 2)))


def test_shards_that_do_not_belong_together_are_refused(inputs, tmp_path):
    one, two = (merge_shard(inputs, tmp_path / f"{i}.safetensors", (i, 2), "cat") for i in (0, 1))
    other = merge_shard(inputs, tmp_path / "other.safetensors", (1, 2), "mean")
    with pytest.raises(lo.AdapterError, match=r"expected 2 shards, got 1; missing: \[1\]"):
        join([one])
    with pytest.raises(lo.AdapterError, match="shard 0 of 2 is given twice"):
        join([one, one])
    with pytest.raises(
        lo.AdapterError, match="other.safetensors: expected one of 2 shards of {'method': 'cat', 'scale': 1.0}"
    ):
        join([one, other])
    with pytest.raises(lo.AdapterError, match="got none"):
        join([])
    with pytest.raises(lo.AdapterError, match="expected a state"):
        join([two, inputs[0] / "adapter_model.safetensors"])
    with pytest.raises(ValueError, match=r"0 ≤ index < count, got \(2, 2\)"):
        merge_shard(inputs, tmp_path / "x", (2, 2))
