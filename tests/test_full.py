"""Trained heads in full (`modules_to_save`) of several adapters: refused, or what --full says; on plain files."""

import json

import numpy as np
import pytest
import torch
from by_hand import CONFIG, PREFIX, WEIGHTS, deltas_of, gap, random_factors, run, tensors_of, write_peft
from safetensors.torch import save_file

import lora_opcm as lo
from lora_opcm.merging.shards import join, merge_shard

SHAPES = {f"layers.{i}.q": (12, 8) for i in range(3)}


@pytest.fixture
def said(capsys, monkeypatch, tmp_path):
    return lambda *words, code=0: run(capsys, monkeypatch, tmp_path, *words, code=code)


@pytest.fixture
def heads(tmp_path):
    """Three adapters: a and b with a head each, of other dtypes, c with none; what they hold."""
    rng, found, deltas = np.random.default_rng(0), {}, {}
    torch.manual_seed(0)
    for name, dtype in (("a", torch.float32), ("b", torch.float16), ("c", None)):
        full = {"head.weight": torch.randn(3, 8).to(dtype), "head.bias": torch.ones(3).to(dtype)} if dtype else {}
        more = {"modules_to_save": ["head"]} if dtype else {}
        deltas[name] = write_peft(tmp_path / name, random_factors(rng, SHAPES, 2), full=full, **more)
        found[name] = full
    return found, deltas


def kept(folder):
    return {k.removeprefix(PREFIX): t for k, t in tensors_of(folder).items() if "lora_" not in k}


def test_refused_by_default_with_the_way_on(said, heads):
    for pair in (["a", "b"], ["a", "c"], ["c", "b"]):
        refused = said("merge", *pair, "-o", "m", code=2).err
        assert "expected one full tensor (modules_to_save) in both" in refused and "--full (full=) takes" in refused
    assert "head" in said("merge", "a", "b", "-o", "m", "--dry-run", code=2).err


@pytest.mark.parametrize("order", [["a", "b", "c"], ["c", "b", "a"]])
def test_first_drop_and_mean(said, heads, tmp_path, order):
    found, deltas = heads
    have = [found[n] for n in order if found[n]]
    expected = {
        "first": have[0],
        "drop": {},
        "mean": {k: sum(h[k].double() for h in have) / 2 for k in have[0]},
    }
    for how, full in expected.items():
        said("merge", *order, "-o", how, "--method", "cat", "--full", how)
        tensors, config = kept(tmp_path / how), json.loads((tmp_path / how / CONFIG).read_text())
        assert tensors.keys() == full.keys() and config["modules_to_save"] == (["head"] if full else None)
        for key, tensor in full.items():
            assert tensors[key].dtype == (tensor.dtype if how == "first" else torch.float32)
            torch.testing.assert_close(tensors[key].double(), tensor.double(), rtol=1e-6, atol=1e-6)
        total = {n: sum(d[n] for d in deltas.values()) for n in SHAPES}
        assert gap(deltas_of(tmp_path / how), total) < 1e-12
        said("verify", *order, "--against", how)
        if full:
            file, whole = tmp_path / how / WEIGHTS, tensors_of(tmp_path / how)
            other_head = whole | {f"{PREFIX}head.weight": torch.full((3, 8), -7.0)}
            for other in (other_head, {k: x for k, x in whole.items() if "bias" not in k}):
                save_file(other, file)
                assert "head." in said("verify", *order, "--against", how, code=1).out
            save_file(whole, file)
        merged = lo.merge([tmp_path / n for n in order], "cat", full=how)
        assert {k: t.tolist() for k, t in merged.saved.items()} == {k: t.tolist() for k, t in tensors.items()}
        parts = [tmp_path / f"{how}-{i}" for i in range(2)]
        for i, part in enumerate(parts):
            merge_shard([tmp_path / n for n in order], part, (i, 2), "cat", full=how)
        joined = join(parts)[0]
        assert joined.saved.keys() == tensors.keys() and all(joined.saved[k].equal(tensors[k]) for k in tensors)
        assert joined.config["modules_to_save"] == config["modules_to_save"]


def test_peft_loads_the_mean_head(heads, tmp_path):
    import peft
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(8, 12)}) for _ in range(3)])
            self.head = nn.Linear(8, 3)

    found, _ = heads
    lo.merge(tmp_path / "c", tmp_path / "a", tmp_path / "b", full="mean").save(tmp_path / "m")
    model = peft.PeftModel.from_pretrained(Net(), tmp_path / "m")
    mean = (found["a"]["head.weight"].double() + found["b"]["head.weight"].double()) / 2
    torch.testing.assert_close(model.base_model.model.head.modules_to_save["default"].weight.double(), mean)


def test_what_has_no_mean_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    for name, tensor in (("a", torch.ones(3, 8)), ("b", torch.ones(4, 8)), ("c", torch.ones(3, 8).int())):
        write_peft(tmp_path / name, random_factors(rng, SHAPES, 2), full={"head.w": tensor}, modules_to_save=["head"])
    for other, said in (("b", r"float32 \(3, 8\), float32 \(4, 8\)"), ("c", r"float32 \(3, 8\), int32 \(3, 8\)")):
        with pytest.raises(lo.AdapterError, match=f"head.w: a mean needs floats of one shape, got {said}"):
            lo.merge(tmp_path / "a", tmp_path / other, full="mean")
        assert lo.merge(tmp_path / "a", tmp_path / other, full="first").saved["head.w"].equal(torch.ones(3, 8))
    with pytest.raises(ValueError, match="full must be None, 'first', 'drop' or 'mean', got 'avg'"):
        lo.merge(tmp_path / "a", full="avg")


# -- states --------------------------------------------------------------------------------------------------


def test_a_state_refuses_heads_that_differ_and_says_how_to_go_on(said, heads, tmp_path):
    said("add", "s", "a")
    before = (tmp_path / "s").read_bytes()
    refused = said("add", "s", "b", code=2).err
    assert "expected one full tensor (modules_to_save) in both" in refused and "--full (full=) takes" in refused
    refused = said("add", "s", "b", "--full", "mean", code=2).err
    assert "a mean needs all that came: full is 'first' or 'drop' here" in refused and "merge --full mean" in refused
    assert (tmp_path / "s").read_bytes() == before


@pytest.mark.parametrize("order", [["a", "b", "c"], ["c", "b", "a"]])
@pytest.mark.parametrize("how", ["first", "drop"])
@pytest.mark.parametrize("apart", [True, False])
def test_a_state_takes_the_first_head_or_drops_all(said, heads, tmp_path, order, how, apart):
    found, deltas = heads
    for names in [[n] for n in order] if apart else [order]:
        said("add", "s", *names, "--full", how, *(["--method", "whitened_sum"] if names[0] == order[0] else []))
    said("export", "s", "-o", "m")
    said("merge", *order, "-o", "n", "--method", "whitened_sum", "--full", how)
    assert gap(deltas_of(tmp_path / "m"), deltas_of(tmp_path / "n")) < 1e-6
    full = next(found[n] for n in order if found[n]) if how == "first" else {}
    for folder in "mn":
        tensors, config = kept(tmp_path / folder), json.loads((tmp_path / folder / CONFIG).read_text())
        assert tensors.keys() == full.keys() and all(torch.equal(tensors[k], full[k]) for k in full)
        assert config.get("modules_to_save") == (["head"] if full else None)


def test_full_tensors_stay_when_their_adapter_is_removed(said, heads, tmp_path):
    found, _ = heads
    said("add", "s", "a", "b", "c", "--full", "first", "--method", "whitened_sum")
    assert "its full tensors (head.bias, …) are no part of the sum" in said("remove", "s", "a").err
    assert "full tensors" not in said("remove", "s", "c").err
    said("export", "s", "-o", "m")
    assert all(torch.equal(t, found["a"][k]) for k, t in kept(tmp_path / "m").items())


def test_an_update_and_a_full_tensor_of_one_layer_are_refused(said, tmp_path):
    """peft loads one of them, and says nothing."""
    rng, shapes = np.random.default_rng(0), {"layers.0.q": (12, 8)}
    write_peft(tmp_path / "low", random_factors(rng, shapes | {"head": (3, 8)}, 2))
    write_peft(
        tmp_path / "full",
        random_factors(rng, shapes, 2),
        full={"head.weight": torch.ones(3, 8)},
        modules_to_save=["head"],
    )
    for order in (["low", "full"], ["full", "low"]):
        for words in (["merge", *order, "-o", "m"], ["add", "s" + order[0], *order]):
            told = said(*words, "--full", "first", code=2).err
            assert "head.weight in full in one and an update in the other, which peft would not add" in told
        said("merge", *order, "-o", order[0] + "m", "--full", "drop")
        said("merge", *order, "-o", order[0] + "n", "--full", "first", "--drop", "head")


def test_a_head_that_is_dropped_leaves_the_config(said, heads, tmp_path):
    said("merge", "a", "b", "-o", "m", "--method", "cat", "--drop", "head*")
    assert not kept(tmp_path / "m") and not json.loads((tmp_path / "m" / CONFIG).read_text())["modules_to_save"]
    said("convert", "a", "-o", "n", "--to", "peft", "--drop", "head.bias")
    assert json.loads((tmp_path / "n" / CONFIG).read_text())["modules_to_save"] == ["head"]


def test_weights_do_not_multiply_a_head_and_that_is_said(said, heads, tmp_path):
    assert "full tensors (head.bias, …) are not multiplied" in said("resize", "a", "-o", "m", "--strength", 0.5).err
    assert "multiplied" not in said("resize", "a", "-o", "n", "--rank", 1).err
    assert "multiplied" not in said("resize", "c", "-o", "o", "--strength", 0.5).err
