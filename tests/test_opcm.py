import weakref

import by_hand
import pytest
import torch
from factories import adapter, dense, dense_opcm, error, update
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_opcm as lo
from lora_opcm.merging.rules import cut, project

VARIANTS = ("paper", "fusionbench")
SHAPES = {"a": (24, 30), "b": (30, 18)}


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(VARIANTS), st.floats(0, 0.99), st.integers(1, 4), st.integers(0, 10**6))
def test_agrees_with_the_dense_algorithm(variant, alpha, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    stream = [adapter(SHAPES, rank, generator) for _ in range(4)]
    merged = lo.merge(stream, "opcm", alpha=alpha, variant=variant)
    reference = dense_opcm([{n: dense(u) for n, u in a.modules.items()} for a in stream], alpha, variant)
    for name, update_ in merged.modules.items():
        assert error(update_, reference[name]) < 1e-5
        assert update_.rank <= 4 * rank


@pytest.mark.parametrize("variant", VARIANTS)
def test_full_rank_updates_agree_with_the_dense_algorithm(variant, generator):
    stream = [adapter({"a": (12, 16)}, 12, generator) for _ in range(3)]
    merged = lo.merge(stream, "opcm", alpha=0.5, variant=variant)
    reference = dense_opcm([{n: dense(u) for n, u in a.modules.items()} for a in stream], 0.5, variant)
    assert error(merged.modules["a"], reference["a"]) < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_what_is_let_in_is_orthogonal_to_what_is_there(variant, alpha, generator):
    merged, new = (dense(update(20, 15, 4, generator, torch.float64)) for _ in range(2))
    kept = project(new, merged, alpha, variant, torch.float64)
    assert abs(float((kept * merged).sum())) < 1e-10 * float(kept.norm() * merged.norm())
    assert float(kept.norm()) < float(new.norm())


@pytest.mark.parametrize("variant", VARIANTS)
def test_projection_does_not_see_the_scale(variant, generator):
    merged, new = (dense(update(20, 15, 4, generator, torch.float64)) for _ in range(2))
    kept = project(new, merged, 0.5, variant, torch.float64)
    assert torch.allclose(kept, project(new, 1e4 * merged, 0.5, variant, torch.float64), atol=1e-10)


def test_alpha_one_paper_keeps_only_the_orthogonal_complement(generator):
    merged, new = (
        update(20, 15, 4, generator, torch.float64),
        dense(update(20, 15, 4, generator, torch.float64)),
    )
    U, _, Vh = merged.svd()
    kept = project(new, dense(merged), 1.0, "paper", torch.float64)
    assert float((U.mT @ kept).norm()) < 1e-10 and float((kept @ Vh.mT).norm()) < 1e-10


def test_cut_counts_as_the_two_sources_do():
    s = torch.tensor([4.0, 3.0, 2.0, 1.0])
    assert [cut(s, a) for a in (0, 0.39, 0.4, 0.41, 0.7, 1)] == [0, 1, 1, 2, 2, 4]
    assert [cut(s, a, "fusionbench") for a in (0, 0.39, 0.4, 0.41, 0.7, 1)] == [0, 0, 1, 1, 2, 4]


def test_merged_norm_is_the_running_mean(generator):
    stream = [adapter(SHAPES, 3, generator) for _ in range(4)]
    merger = lo.ContinualMerger(alpha=0.5)
    for i, a in enumerate(stream, 1):
        merger.add(a)
        assert merger.adapter().norm() == pytest.approx(sum(x.norm() for x in stream[:i]) / i, rel=1e-5)


def test_state_stays_thin_and_reports_what_it_drops(generator):
    merger = lo.ContinualMerger(alpha=0.5, rank=5)
    for _ in range(6):
        merger.add(adapter(SHAPES, 3, generator))
        assert all(u.rank <= 5 for u in merger.state.modules.values())
    assert merger.state.history[0]["dropped"] == pytest.approx(0, abs=1e-9)
    assert 0 < merger.state.history[-1]["dropped"] < 1
    assert 0 < merger.state.history[-1]["cleared"] < 1


def test_a_missing_module_counts_as_zero(generator):
    whole, part = adapter(SHAPES, 3, generator), adapter({"b": SHAPES["b"]}, 3, generator)
    merger = lo.ContinualMerger().add(whole).add(part)
    scaled = dense(merger.adapter().modules["a"]) * merger.state.history[-1]["lambda"]
    assert torch.allclose(scaled, dense(whole.modules["a"]), rtol=1e-4, atol=1e-4)


def test_null_space_rotation_changes_nothing(generator):
    """A gauge change alters the factors, and with them any arbitrary padding basis; not the result."""
    stream = [adapter(SHAPES, 3, generator, torch.float64) for _ in range(3)]
    spun = [
        a.with_modules(
            {n: u.regauge(torch.randn(3, 3, generator=generator, dtype=torch.float64)) for n, u in a.modules.items()}
        )
        for a in stream
    ]
    one, two = lo.merge(stream, "opcm"), lo.merge(spun, "opcm")
    assert all(error(one.modules[n], dense(two.modules[n])) < 1e-8 for n in SHAPES)


@pytest.mark.parametrize("options, words", [({"alpha": 1.5}, "1.5"), ({"variant": "x"}, "'paper' or 'fusionbench'")])
def test_wrong_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        lo.ContinualMerger(**options)
    with pytest.raises(ValueError, match="nothing was added"):
        lo.ContinualMerger().adapter()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "kind, options",
    [
        (lo.ContinualMerger, {"alpha": 0.4, "rank": 6}), (lo.ContinualMerger, {"variant": "fusionbench"}),
        (lo.FactorMerger, {"alpha": 0.4}), (lo.FactorMerger, {"gauge": "balanced", "scale": 2.0}),
    ],
)  # fmt: skip
def test_a_saved_state_goes_on_as_if_it_had_not_stopped(kind, options, dtype, generator, tmp_path):
    stream = [adapter(SHAPES, 3, generator, dtype) for _ in range(4)]
    straight, stopped = kind(**options), kind(**options)
    for i, a in enumerate(stream):
        straight.add(a, name=f"task {i}")
        stopped.add(a, name=f"task {i}")
        stopped = kind.load(stopped.save(tmp_path / "state.safetensors"))
    assert stopped.options == kind.defaults() | options
    assert straight.state.history == stopped.state.history and stopped.state.names[-1] == "task 3"
    for name in SHAPES:
        one, two = straight.adapter().modules[name], stopped.adapter().modules[name]
        assert torch.equal(one.left, two.left) and torch.equal(one.right, two.right)
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


def test_a_damaged_state_is_refused_and_a_failed_save_keeps_the_old_one(generator, tmp_path, monkeypatch):
    path = lo.ContinualMerger().add(adapter(SHAPES, 3, generator)).save(tmp_path / "state.safetensors")
    whole = path.read_bytes()
    merger = lo.ContinualMerger.load(path)

    def full_disk(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("lora_opcm.files.disk.write_bytes", full_disk)
    with pytest.raises(OSError, match="no space"):
        merger.save(path)
    assert path.read_bytes() == whole and len(list(tmp_path.iterdir())) == 1
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(lo.AdapterError, match="expected a state written by"):
        lo.ContinualMerger.load(path)


def test_a_wrong_shape_leaves_the_state_as_it_was(generator):
    merger = lo.ContinualMerger().add(adapter(SHAPES, 3, generator))
    before = {name: dense(u) for name, u in merger.state.modules.items()}
    with pytest.raises(ValueError, match=r"b has shape \(30, 20\), in an earlier adapter \(30, 18\)"):
        merger.add(adapter({"a": SHAPES["a"], "b": (30, 20)}, 3, generator))
    assert all(torch.equal(dense(u), before[name]) for name, u in merger.state.modules.items())
    assert len(merger.state.norms) == 1


def test_factor_merger_is_the_registry_lora_opcm():
    generator = torch.Generator().manual_seed(1)
    adapters = [adapter({"a": (40, 32), "b": (36, 48)}, 3, generator, torch.float64) for _ in range(4)]
    for gauge in ("given", "balanced"):
        merger = lo.FactorMerger(alpha=0.4, gauge=gauge)
        for a in adapters:
            merger.add(a)
        joint = lo.merge(adapters, "lora_opcm", alpha=0.4, gauge=gauge).modules
        assert all(error(u, dense(joint[name])) < 1e-9 for name, u in merger.adapter().items())
    with pytest.raises(ValueError, match="'given' or 'balanced', got 'x'"):
        lo.merge(adapters, "lora_opcm", gauge="x")


def test_an_adapter_without_modules_leaves_a_state_that_goes_on(generator):
    a = adapter(SHAPES, 3, generator)
    merger = lo.ContinualMerger().add(lo.Adapter({}), name="none").add(a)
    assert len(merger.state.names) == len(merger.state.norms) == len(merger.state.history) == 2
    assert merger.state.history[0]["rank"] == 0 and merger.adapter().norm() == pytest.approx(a.norm() / 2)
    row = {"name": "none", "norm": 0.0, "cleared": 0.0, "dropped": 0.0}
    assert merger.state.history[0] == row | {"lambda": 1.0, "rank": 0}
    merger.add(lo.Adapter({}), name="none")  # ‖S‖ = ‖a‖, of three adapters of mean norm ‖a‖ / 3
    assert merger.state.history[2] == row | {"lambda": pytest.approx(3), "rank": 3}
    sums = lo.SumMerger().add(lo.Adapter({})).add(a).add(lo.Adapter({}))
    assert [row["rank"] for row in sums.state.history] == [0, 3, 3]


def test_sums_of_factors_begin_with_nothing(generator):
    """Of an adapter alone λ is 1; beside one without modules its norm is twice the mean."""
    a = adapter({"w": (30, 20)}, 3, generator)
    b, c = a.modules["w"].left.norm().item(), a.modules["w"].right.norm().item()
    merger = lo.FactorMerger().add(lo.Adapter({})).add(a)
    none, row = merger.state.history
    for side, norm in (("left", b), ("right", c)):
        assert (none[f"norm {side}"], none[f"cleared {side}"], none[f"lambda {side}"]) == (0.0, 0.0, 1.0)
        assert row[f"norm {side}"] == pytest.approx(norm) and row[f"cleared {side}"] == pytest.approx(0, abs=1e-12)
        assert row[f"lambda {side}"] == pytest.approx(2)
    assert error(merger.adapter().modules["w"], a.modules["w"].delta().double() / 4) < 1e-6
    assert error(lo.FactorMerger(scale=2).add(a).adapter().modules["w"], 2 * a.modules["w"].delta().double()) < 1e-6
    half = lo.FactorMerger(scale="0.5norm").add(a).adapter().modules["w"]
    assert error(half, a.modules["w"].delta().double() / 2) < 1e-6


@pytest.mark.parametrize("kind", [lo.ContinualMerger, lo.SumMerger, lo.FactorMerger, lo.WhiteningMerger])
def test_a_stream_that_stopped_writes_the_same_file(kind, generator, tmp_path):
    through, until = kind(), kind()
    for i in range(4):
        a = adapter(SHAPES, 3, generator)
        through.add(a)
        until.add(a)
        until = kind.load(until.save(tmp_path / f"{i}.safetensors"))
    files = [m.save(tmp_path / f"{m is until}.safetensors").read_bytes() for m in (through, until)]
    assert files[0] == files[1]


@pytest.mark.parametrize("kind", [lo.ContinualMerger, lo.FactorMerger])
def test_nothing_is_cleared_of_the_first_adapter(kind, generator):
    said = kind().add(adapter({f"m{i}": (24, 30) for i in range(9)}, 3, generator)).state.history[0]
    cleared = [value for key, value in said.items() if key.startswith("cleared")]
    assert cleared and not any(cleared)


def test_a_column_of_any_stride_has_an_id():
    column, row = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
    ids = {lo.Adapter({"w": lo.LowRank(left, row)}).id for left in (column.mT, column.mT.clone(), column.reshape(2, 1))}
    assert len(ids) == 1


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_factors_apart_are_two_dense_streams(alpha, generator):
    """Their sums, and every column of their history, over two modules."""
    adapters = [adapter(SHAPES, 3, generator, torch.float64) for _ in range(3)]
    merger, factor = lo.FactorMerger(alpha=alpha), 1.0
    for a in adapters:
        merger.add(a)
    sums = []
    for side in ("left", "right"):
        deltas = [{n: getattr(u, side).numpy() for n, u in a.items()} for a in adapters]
        total, rows = by_hand.opcm_stream(deltas, alpha)
        sums.append(total)
        factor /= rows[-1]["lambda"]
        for found, row in zip(merger.state.history, rows):
            for column in ("norm", "lambda", "cleared"):
                assert found[f"{column} {side}"] == pytest.approx(row[column], abs=1e-9), (column, side)
    for name in SHAPES:
        dense_sum = torch.from_numpy(sums[0][name] @ sums[1][name])
        assert error(merger.adapter().modules[name], factor * dense_sum) < 1e-9


@pytest.mark.parametrize("kind", [lo.ContinualMerger, lo.SumMerger, lo.FactorMerger, lo.WhiteningMerger])
def test_a_merger_keeps_no_factor_of_an_adapter(kind, generator):
    first = adapter(SHAPES, 3, generator)
    held = [weakref.ref(u.left) for u in first.modules.values()]
    merger = kind().add(first).add(adapter(SHAPES, 3, generator))
    assert [u.rank for u in merger.like.values()] == [0, 0]
    del first
    assert [ref() for ref in held] == [None, None]
