"""Plans of merges, against what merges then take."""

import time

import pytest
import torch
from factories import adapter

import lora_opcm as lo
from lora_opcm.merging import table
from lora_opcm.merging.counts import CORES, ONE_RANK, PASSES, SPECTRA
from lora_opcm.merging.plan import Machine, calibrate

REGISTRY = table()
TASKS = "ng-comp ng-rec ng-sci ng-politics ng-religion reuters-r8 reuters-rare tweets".split()
MACHINE = Machine(1e10, 1e11, 1e10)


@pytest.fixture(scope="module")
def shipped():
    return [lo.load_adapter(lo.adapter_path(task)) for task in TASKS]


def bytes_of(a):
    return sum((u.left.numel() + u.right.numel()) * u.dtype.itemsize for u in a.modules.values())


@pytest.mark.parametrize("rank", [None, 5])
@pytest.mark.parametrize("method", sorted(m.name for m in REGISTRY.values() if not m.data))
def test_ranks_and_bytes_are_those_of_the_merge(method, rank):
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (40, 32), "b": (36, 48)}
    adapters = [adapter(shapes, 3, generator, torch.float16) for _ in range(4)]
    found = lo.plan(adapters, method, rank=rank, machine=MACHINE)
    merged = lo.merge(adapters, method, rank=rank)
    assert found.read == sum(map(bytes_of, adapters)) and found.summed_rank == 12 and found.modules == 2
    assert found.rank >= max(u.rank for u in merged.modules.values())
    assert found.written >= bytes_of(merged)
    if method not in ("core_ties", "core_dare_ties", "iso_cts"):  # which may lose directions on the way
        assert found.written == bytes_of(merged)


def test_adapters_and_shapes_give_one_plan(shipped):
    shapes = {name: u.shape for name, u in shipped[0].modules.items()}
    for method in REGISTRY:
        assert lo.plan(shipped, method, machine=MACHINE) == lo.plan(shapes, method, machine=MACHINE)


@pytest.mark.parametrize("method", sorted(REGISTRY))
def test_costs_grow_with_what_they_depend_on(method):
    shapes = {"a": (512, 256), "b": (256, 512)}
    one = lo.plan(shapes, method, machine=MACHINE)
    for more in (
        lo.plan(shapes | {"c": (256, 256)}, method, machine=MACHINE),
        lo.plan({n: (2 * a, 2 * b) for n, (a, b) in shapes.items()}, method, machine=MACHINE),
        lo.plan(shapes, method, count=12, machine=MACHINE),
        lo.plan(shapes, method, ranks=24, machine=MACHINE),
    ):
        assert more.seconds > one.seconds and more.products >= one.products and more.peak >= one.peak


def test_layers_cost_nothing_squared_in_the_core_and_everything_dense():
    small, large = ({"w": (n, n)} for n in (4096, 8192))
    grow = lambda m: lo.plan(large, m, machine=MACHINE).seconds / lo.plan(small, m, machine=MACHINE).seconds  # noqa: E731
    assert grow("opcm") < 2.01 and grow("ties") > 6


def test_plans_know_the_registry_and_refuse_what_it_does_not():
    assert set(CORES) | set(ONE_RANK) | SPECTRA | set(PASSES) <= set(REGISTRY)
    with pytest.raises(ValueError, match="unknown method 'opmc'"):
        lo.plan({"a": (4, 4)}, "opmc")
    with pytest.raises(ValueError, match="expected 8 ranks, one per adapter, got 2"):
        lo.plan({"a": (4, 4)}, ranks=[2, 3])
    assert lo.plan({"a": (64, 64)}, count=2, ranks=[2, 3], machine=MACHINE).summed_rank == 5


@pytest.mark.parametrize(
    "name, total, active, modules",
    [  # as the models' cards count them, in millions
        ("MiniLM", 22.6, 22.6, 36), ("BERT", 108.9, 108.9, 72), ("ViT-L", 303.2, 303.2, 144),
        ("Llama-2-7B", 6738.4, 6738.4, 224), ("Llama-2-70B", 68976.6, 68976.6, 560),
        ("Mixtral-8x7B", 46702.8, 12879.9, 640),
    ],
)  # fmt: skip
def test_models_on_the_meta_device_have_their_published_sizes(name, total, active, modules):
    from lora_opcm.lab.bases import shapes

    model = shapes.build(name)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert [round(x / 1e6, 1) for x in shapes.parameters(model)] == [total, active]
    found = lo.plan(shapes.linear_shapes(model), "opcm", machine=MACHINE)
    assert found.modules == modules and found.summed_rank == 128 and found.seconds > 0


def test_minilm_on_meta_has_the_modules_of_the_shipped_adapters(shipped):
    from lora_opcm.lab.bases import shapes

    assert shapes.linear_shapes(shapes.build("MiniLM")) == {n: u.shape for n, u in shipped[0].modules.items()}


@pytest.mark.nightly
@pytest.mark.parametrize("method", ["cat", "opcm", "tsv", "whitened_sum", "knots_ties", "chordal_mean", "ties"])
def test_the_estimate_for_minilm_is_within_twice_what_is_measured(method, shipped):
    """Best of several, each beside a calibration of its own: other programs slow both down."""
    lo.merge(shipped, method)
    ratios = []
    for _ in range(5):
        calibrate.cache_clear()
        expected = lo.plan(shipped, method).seconds
        start = time.perf_counter()
        lo.merge(shipped, method)
        ratios.append(expected / (time.perf_counter() - start))
    assert 0.5 < sorted(ratios)[len(ratios) // 2] < 2, ratios


def test_nothing_to_plan_is_refused():
    for nothing in ([], {}):
        with pytest.raises(ValueError, match="got none"):
            lo.plan(nothing, machine=MACHINE)
