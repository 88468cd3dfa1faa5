"""Adapters as they come from other trainers, and outputs as other readers take them; held against plain tensors."""

import json
import re
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from by_hand import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    deltas_of,
    gap,
    norm,
    random_factors,
    read_peft,
    run,
    tensors_of,
    write_peft,
)
from safetensors import safe_open
from safetensors.torch import save_file

import lora_opcm as lo
from lora_opcm.files import AdapterError

SHAPES = {"layers.0.q": (24, 18), "layers.1.up": (40, 12)}
CLIP = "text_model.encoder.layers.0.mlp.fc1"
CLIP_CONFIG = {"auto_mapping": {"base_model_class": "CLIPTextModel"}}


@pytest.fixture
def said(capsys, monkeypatch, tmp_path):
    return lambda *words, code=0: run(capsys, monkeypatch, tmp_path, *words, code=code)


def header(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def kohya(path, metadata=None, alpha=None, **more):
    """Two modules of rank 4 and 2, α as given; their ΔW."""
    torch.manual_seed(0)
    tensors, deltas = {}, {}
    for name, rank in (("lora_unet_a", 4), ("lora_unet_b", 2)):
        up, down = torch.randn(6, rank), torch.randn(rank, 5)
        tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
        tensors[f"{name}.alpha"] = torch.tensor(2.0) if alpha is None else alpha.clone()
        deltas[name] = 2 / rank * (up.double() @ down.double())
    save_file(tensors | more, path, metadata=metadata or {})
    return deltas


# -- several files -------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path):
    """An adapter in one file (whole) and the same in two with an index (parts)."""
    deltas = write_peft(tmp_path / "whole", random_factors(np.random.default_rng(0), SHAPES, 3), {"layers.0.q": 7})
    tensors = tensors_of(tmp_path / "whole")
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / CONFIG).write_text((tmp_path / "whole" / CONFIG).read_text())
    names = [f"adapter_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    halves = [{k: t for k, t in tensors.items() if ("layers.0" in k) == first} for first in (True, False)]
    for name, half in zip(names, halves):
        save_file(half, folder / name)
    places = {key: name for name, half in zip(names, halves) for key in half}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder, names, places, deltas


def test_an_adapter_in_several_files_is_read_whole(said, sharded, tmp_path):
    folder, _, _, deltas = sharded
    for path in (folder, folder / f"{WEIGHTS}.index.json"):
        assert lo.load_adapter(path).id == lo.load_adapter(tmp_path / "whole").id
    said("merge", "parts", "-o", "m", "--method", "cat")
    assert gap(deltas_of(tmp_path / "m"), deltas) < 1e-12
    lo.load_adapter(folder).save(tmp_path / "again")
    assert {k: t.tolist() for k, t in tensors_of(tmp_path / "again").items()} == {
        k: t.tolist() for k, t in tensors_of(tmp_path / "whole").items()
    }


def test_one_part_alone_is_refused_by_name(said, sharded):
    folder, names, _, _ = sharded
    for words in (["inspect", f"parts/{names[0]}"], ["merge", f"parts/{names[0]}", "whole", "-o", "m"]):
        refused = said(*words, code=2).err
        assert f"parts/{names[0]}: one part of an adapter in several files" in refused and refused.count("\n") == 1
    (folder / f"{WEIGHTS}.index.json").unlink()
    assert f"{names[0]}: one part of" in said("inspect", "parts", code=2).err


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda places, names: {k: "../whole/" + WEIGHTS for k in places}, "'../whole/adapter_model.safetensors' is"),
        (lambda places, names: {k: "/etc/passwd" for k in places}, "'/etc/passwd' is named, expected .safetensors"),
        (lambda places, names: {k: "..\\x.safetensors" for k in places}, "is named"),
        (lambda places, names: {k: 3 for k in places}, "3 is named"),
        (lambda places, names: {k: CONFIG for k in places}, "'adapter_config.json' is named"),
        (lambda places, names: {k: "other.safetensors" for k in places}, "other.safetensors is missing beside it"),
        (lambda places, names: {k: v for k, v in places.items() if v == names[0]} | {"x": names[1]}, "in the index or"),
        (lambda places, names: {k: names[0] for k in places}, "in the index or in the file only"),
        (lambda places, names: {}, "weight_map is {}"),
        (lambda places, names: [], "weight_map is"),
    ],
)  # fmt: skip
def test_an_index_that_is_wrong_is_refused(sharded, change, message):
    folder, names, places, _ = sharded
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": change(places, names)}))
    with pytest.raises(AdapterError, match="index.json: ") as error:
        lo.load_adapter(folder)
    assert message in str(error.value)


# -- what is read with a line --------------------------------------------------------------------------------


def test_integer_alpha(tmp_path):
    deltas = kohya(tmp_path / "k.safetensors", alpha=torch.tensor(2))
    with pytest.warns(UserWarning, match="lora_unet_a.alpha and 1 more: stored as integers, read as numbers"):
        found = lo.load_adapter(tmp_path / "k.safetensors")
    for name, delta in deltas.items():
        torch.testing.assert_close(found[name].delta().double(), delta, rtol=1e-5, atol=1e-5)
    found.save(tmp_path / "same.safetensors")
    assert tensors_of(tmp_path / "same.safetensors")["lora_unet_a.alpha"].dtype == torch.int64


def test_an_adapter_name_inside_the_keys(tmp_path):
    deltas = write_peft(tmp_path / "a", random_factors(np.random.default_rng(0), SHAPES, 3), {"layers.0.q": 7})
    tensors = tensors_of(tmp_path / "a")
    save_file({k.replace(".weight", ".default.weight"): t for k, t in tensors.items()}, tmp_path / "a" / WEIGHTS)
    with pytest.warns(UserWarning, match="keys name the adapter 'default', read without it"):
        found = lo.load_adapter(tmp_path / "a")
    assert gap({n: u.delta().numpy() for n, u in found.items()}, deltas) < 1e-12
    found.save(tmp_path / "b")
    assert tensors_of(tmp_path / "b").keys() == tensors.keys()


def test_names_without_a_component(tmp_path):
    torch.manual_seed(0)
    up, down = torch.randn(4, 2), torch.randn(2, 5)
    path = tmp_path / "d.safetensors"
    tensors = {"mid.to_q.lora_A.weight": down, "mid.to_q.lora_B.weight": up}
    save_file(tensors, path)
    with pytest.warns(UserWarning, match="mid.to_q: no component, config or alpha; read with scale 1"):
        found = lo.load_adapter(path)
    assert found.format == "diffusers" and found["mid.to_q"].delta().equal(up @ down)
    save_file(tensors | {"mid.to_q.alpha": torch.tensor(1.0)}, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the scale is known
        assert lo.load_adapter(path)["mid.to_q"].delta().equal(0.5 * up @ down)
    save_file({PREFIX + k: t for k, t in tensors.items()}, path)  # peft's: its scale is in a config that is not here
    with pytest.raises(AdapterError, match="mid.to_q: expected adapter_config.json beside it, for the scale"):
        lo.load_adapter(path)


def test_differences_that_are_zero(tmp_path):
    zero = {"lora_unet_norm.diff": torch.zeros(4), "lora_unet_a.diff_b": torch.zeros(6)}
    deltas = kohya(tmp_path / "k.safetensors", None, None, **zero)
    with pytest.warns(UserWarning, match="lora_unet_a.diff_b and 1 more: differences that are zero, left out"):
        assert lo.load_adapter(tmp_path / "k.safetensors").keys() == deltas.keys()
    kohya(tmp_path / "k.safetensors", None, None, **zero | {"lora_unet_norm.diff": torch.tensor([0.0, 1e-8])})
    with pytest.raises(AdapterError, match="lora_unet_norm.diff: full weight differences"), pytest.warns(UserWarning):
        lo.load_adapter(tmp_path / "k.safetensors")


def test_a_frozen_head_that_peft_saved_unasked(said, tmp_path):
    rng, head = np.random.default_rng(0), {"lm_head.base_layer.weight": torch.randn(5, 4)}
    one = write_peft(tmp_path / "a", random_factors(rng, SHAPES, 3), full=head)
    two = write_peft(tmp_path / "b", random_factors(rng, SHAPES, 2))
    for pair in (["a", "b"], ["b", "a"]):
        told = said("merge", *pair, "-o", "m", "--method", "cat", "--overwrite").err
        assert "lm_head.base_layer.weight is in one of them only" in told and "kept" in told
        saved = tensors_of(tmp_path / "m")[f"{PREFIX}lm_head.base_layer.weight"]
        assert saved.equal(head["lm_head.base_layer.weight"])
        assert gap({n: d for n, d in deltas_of(tmp_path / "m").items()}, {n: one[n] + two[n] for n in one}) < 1e-9


def test_full_tensors_that_hold_nothing_are_refused(tmp_path):
    factors = random_factors(np.random.default_rng(0), SHAPES, 3)
    write_peft(tmp_path / "a", factors, full={"head.weight": torch.zeros(0, 4)}, modules_to_save=["head"])
    with pytest.raises(AdapterError, match=r"head.weight: a full tensor of shape \(0, 4\), which holds nothing"):
        lo.load_adapter(tmp_path / "a")


# -- what readers of tensors alone see -----------------------------------------------------------------------


@pytest.mark.parametrize("source", ["peft", "kohya"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_scale_is_in_the_factors_of_a_new_container(said, tmp_path, source, dtype):
    """α = 2 at rank 4: up @ down alone is ΔW in diffusers and in PEFT, and α/r · up @ down in kohya."""
    factors = random_factors(np.random.default_rng(0), {CLIP: (24, 16)}, 4)
    delta = write_peft(tmp_path / "p", factors, {CLIP: 2}, dtype, **CLIP_CONFIG)
    if source == "kohya":
        said("convert", "p", "-o", "k.safetensors")
        kept = tensors_of(tmp_path / "k.safetensors")
        up, down = (kept[f"lora_te_{CLIP.replace('.', '_')}.lora_{w}.weight"].double() for w in ("up", "down"))
        assert (
            gap({CLIP: (float(kept[f"lora_te_{CLIP.replace('.', '_')}.alpha"]) / 4 * up @ down).numpy()}, delta) < 1e-12
        )
    said("convert", "p", "-o", "d.safetensors", "--to", "diffusers")
    outputs = {"d.safetensors": f"text_encoder.{CLIP}"}
    if source == "kohya":
        said("convert", "k.safetensors", "-o", "back", "--to", "peft", "--like", "p")
        said("convert", "k.safetensors", "-o", "dk.safetensors", "--to", "diffusers", "--like", "d.safetensors")
        outputs |= {"dk.safetensors": f"text_encoder.{CLIP}", "back": PREFIX + CLIP}
    for output, key in outputs.items():
        kept = tensors_of(tmp_path / output)
        found = kept[f"{key}.lora_B.weight"].double() @ kept[f"{key}.lora_A.weight"].double()
        assert gap({CLIP: found.numpy()}, delta) < 1e-6
        assert {t.dtype for t in kept.values()} == {dtype}
        (update,) = lo.load_adapter(tmp_path / output).values()
        assert update.scale == 1
    said("convert", "d.safetensors", "-o", "same.safetensors", "--to", "diffusers")
    assert (tmp_path / "d.safetensors").read_bytes() == (tmp_path / "same.safetensors").read_bytes()


@pytest.mark.parametrize("head", ["diffusion_model.", ""])
@pytest.mark.filterwarnings("ignore")  # of names without a component
def test_names_that_diffusers_translates_come_without_a_config(said, tmp_path, head):
    """It would look for the config under its own names, find none, and fail: factors alone say the scale."""
    torch.manual_seed(0)
    deltas = []
    for name, rank in (("a", 4), ("b", 2)):
        up, down, key = torch.randn(6, rank), torch.randn(rank, 5), f"{head}blocks.0.q"
        stored = {f"{key}.lora_B.weight": up, f"{key}.lora_A.weight": down, f"{key}.alpha": torch.tensor(3.0)}
        save_file(stored, tmp_path / f"{name}.safetensors")
        deltas.append((3 / rank * up.double() @ down.double()).numpy())
    said("merge", "a.safetensors", "b.safetensors", "-o", "m.safetensors", "--method", "cat")
    said("convert", "a.safetensors", "-o", "c.safetensors", "--to", "diffusers")
    for name, expected in (("m", sum(deltas)), ("c", deltas[0])):
        kept = tensors_of(tmp_path / f"{name}.safetensors")
        assert kept.keys() == {f"{key}.lora_{x}.weight" for x in "AB"}
        assert "lora_adapter_metadata" not in header(tmp_path / f"{name}.safetensors")
        found = kept[f"{key}.lora_B.weight"].double() @ kept[f"{key}.lora_A.weight"].double()
        assert gap({key: found.numpy()}, {key: expected}) < 1e-6


@pytest.mark.parametrize("words", [["merge", "a", "b"], ["export", "s"]])
def test_all_modules_of_a_merge_have_one_rank_and_one_scale(said, tmp_path, words):
    rng = np.random.default_rng(0)
    one, two = ({}, {})
    for found, name, ranks in ((one, "a", (2, 5)), (two, "b", (3, 1))):
        factors = {k: random_factors(rng, {k: shape}, r)[k] for (k, shape), r in zip(SHAPES.items(), ranks)}
        found |= write_peft(tmp_path / name, factors, {"layers.0.q": 7})
    said("add", "s", "a", "b", "--scale", 1, "--alpha", 0)
    words += ["--method", "cat"] if words[0] == "merge" else []
    said(*words, "-o", "m")
    said(*words, "-o", "ragged", "--ragged")
    config, tensors = json.loads((tmp_path / "m" / CONFIG).read_text()), tensors_of(tmp_path / "m")
    assert config["r"] == config["lora_alpha"] == 6 and not config["rank_pattern"] and not config["alpha_pattern"]
    assert {min(t.shape) for t in tensors.values()} == {6}
    ranks = {n: b.shape[1] for n, (b, _) in read_peft(tmp_path / "ragged").items()}
    assert ranks == {"layers.0.q": 5, "layers.1.up": 6}
    assert gap(deltas_of(tmp_path / "m"), deltas_of(tmp_path / "ragged")) == 0
    if words[0] == "merge":
        assert gap(deltas_of(tmp_path / "m"), {n: one[n] + two[n] for n in SHAPES}) < 1e-12


def test_one_adapter_at_weight_one_is_as_it_was_stored(said, tmp_path):
    factors = {k: random_factors(np.random.default_rng(0), {k: s}, r)[k] for (k, s), r in zip(SHAPES.items(), (2, 5))}
    write_peft(tmp_path / "a", factors, {"layers.0.q": 3}, torch.float16)
    for method in ("cat", "task_arithmetic"):
        said("merge", "a", "-o", method, "--method", method)
        kept, was = tensors_of(tmp_path / method), tensors_of(tmp_path / "a")
        assert kept.keys() == was.keys() and all(torch.equal(kept[k], was[k]) for k in was)
        config = [json.loads((tmp_path / n / CONFIG).read_text()) for n in ("a", method)]
        assert config[0]["alpha_pattern"] == config[1]["alpha_pattern"]
    # Another dtype is one rounding of the update, and another weight is another update.
    said("merge", "a", "-o", "wide", "--method", "cat", "--dtype", "float32")
    assert gap(deltas_of(tmp_path / "wide"), deltas_of(tmp_path / "a")) < 1e-6
    said("merge", "a", "-o", "half", "--method", "cat", "--weights", "0.5")
    assert gap(deltas_of(tmp_path / "half"), {n: d / 2 for n, d in deltas_of(tmp_path / "a").items()}) < 1e-3


@pytest.mark.parametrize("size", [1.0, 1e-5])
def test_a_sum_is_the_stored_factors_side_by_side(tmp_path, size):
    """Bit for bit in float32 and, where s is a power of two, in float16 to powers of two, however small they are."""
    rng = np.random.default_rng(1)
    for dtype in (torch.float32, torch.float16):
        for name in "ab":
            small = {n: (size * b, a) for n, (b, a) in random_factors(rng, SHAPES, 3).items()}
            write_peft(tmp_path / f"{name}{dtype}", small, {n: 6 for n in SHAPES}, dtype)
        a, b = (tensors_of(tmp_path / f"{n}{dtype}") for n in "ab")
        merged = lo.merge(tmp_path / f"a{dtype}", tmp_path / f"b{dtype}", method="cat")
        for name in SHAPES:
            left = torch.cat([2 * x[f"{PREFIX}{name}.lora_B.weight"] for x in (a, b)], 1)
            right = torch.cat([x[f"{PREFIX}{name}.lora_A.weight"] for x in (a, b)], 0)
            assert merged[name].left.equal(left) and merged[name].right.equal(right)
    # In half precision a weight would push small entries below what it can hold.
    exact = {n: 0.37 * d for n, d in deltas_of(tmp_path / f"a{torch.float16}").items()}
    lo.merge(tmp_path / f"a{torch.float16}", method="cat", weights=[0.37]).save(tmp_path / "m")
    assert gap(deltas_of(tmp_path / "m"), exact) < 2**-10


def test_a_sum_of_more_rank_than_the_layer_has_is_decomposed(tmp_path):
    rng = np.random.default_rng(2)
    paths = [tmp_path / str(i) for i in range(4)]
    deltas = [write_peft(p, random_factors(rng, SHAPES, 5)) for p in paths]
    merged = lo.merge(paths, "cat", ragged=True)
    assert {n: u.rank for n, u in merged.items()} == {"layers.0.q": 18, "layers.1.up": 12}
    assert (
        gap({n: u.delta().numpy() for n, u in merged.items()}, {n: sum(d[n] for d in deltas) for n in SHAPES}) < 1e-12
    )


@pytest.mark.parametrize("method", ["ties", "opcm"])
def test_linear_algebra_of_a_device_is_loaded_before_the_threads(tmp_path, monkeypatch, method):
    """torch loads that of CUDA at the first call, and two threads that call at once make it fail."""
    write_peft(tmp_path / "a", random_factors(np.random.default_rng(0), SHAPES, 2))
    calls, inverse = [], torch.linalg.inv
    merging = sys.modules[lo.merge.__module__]

    def inv(x, **rest):
        calls.append(("inv", x.device.type, threading.current_thread() is threading.main_thread()))
        return inverse(x, **rest)

    def threads(*rest, _run=merging.parallel_map):
        calls.append(("threads",))
        return _run(*rest)

    monkeypatch.setattr(torch.linalg, "inv", inv)
    monkeypatch.setattr(merging, "parallel_map", threads)
    lo.merge(tmp_path / "a", method=method, device="cpu")
    assert calls[0] == ("inv", "cpu", True) and ("threads",) in calls


# -- what a merge says of itself -----------------------------------------------------------------------------


def test_ids_in_recipes_and_states_stay_what_they_are():
    x = torch.arange(12.0).reshape(4, 3)
    kinds = {"b": lo.files.Kind("conv", (2, 2)), "c": lo.files.Kind("embedding")}
    adapter = lo.Adapter({n: lo.LowRank(x, x.mT) for n in "abc"}, kinds=kinds, saved={"h": x})
    assert adapter.id == "1227e4234982ae5f099152c9203bbe93b41b95a42ef57df617fe9c83b1c303ea"


def test_a_merged_kohya_file_has_its_own_title(said, tmp_path):
    first = {"ss_output_name": "cats", "modelspec.title": "cats", "modelspec.trigger_phrase": "a photo of sks cat",
             "ss_tag_frequency": "{}", "ss_base_model_version": "sdxl_base_v1-0",
             "ss_network_module": "networks.lora",
             "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
             "sshs_model_hash": "f00", "note": "kept"}  # fmt: skip
    kohya(tmp_path / "cats.safetensors", first)
    kohya(tmp_path / "dogs.safetensors", {"ss_base_model_version": "sdxl_1.0"})
    expected = {
        "ss_output_name": "pets", "modelspec.title": "pets", "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_module": "networks.lora", "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "note": "kept",
        "lora_opcm": '{"inputs": ["cats.safetensors", "dogs.safetensors", "cats.safetensors"]}',
    }  # fmt: skip
    three = ["cats.safetensors", "dogs.safetensors", "cats.safetensors"]
    said("merge", *three, "-o", "pets.safetensors")
    assert header(tmp_path / "pets.safetensors") == expected
    said("add", "s", *three)
    said("export", "s", "-o", "out/pets.safetensors")
    assert header(tmp_path / "out" / "pets.safetensors") == expected
    said("convert", "cats.safetensors", "-o", "same.safetensors")  # no merge: as it was
    assert header(tmp_path / "same.safetensors") == first


def test_a_kohya_file_of_peft_adapters_has_a_title(said, tmp_path):
    for name in "pq":
        write_peft(tmp_path / name, random_factors(np.random.default_rng(0), {CLIP: (8, 6)}, 2), **CLIP_CONFIG)
    said("merge", "p", "q", "-o", "m.safetensors", "--format", "kohya")
    assert header(tmp_path / "m.safetensors") == {
        "ss_output_name": "m", "modelspec.title": "m", "lora_opcm": '{"inputs": ["p", "q"]}',
    }  # fmt: skip


def test_a_file_name_for_a_folder_is_refused(said, tmp_path):
    for name in "pq":
        write_peft(tmp_path / name, random_factors(np.random.default_rng(0), {CLIP: (8, 6)}, 2), **CLIP_CONFIG)
    said("add", "s", "p", "q")
    before = sorted(p.name for p in tmp_path.iterdir())
    for words in (["merge", "p", "q"], ["export", "s"], ["convert", "p", "--to", "peft"], ["align", "p", "--to", "q"]):
        refused = said(*words, "-o", "x.safetensors", code=2).err
        assert "name a folder, or ask for --format kohya or diffusers" in refused and refused.count("\n") == 1
        assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert "would refuse" in said("merge", "p", "q", "-o", "x.safetensors", "--dry-run", code=1).out


def test_the_dtype_after_a_removal_is_the_widest_that_is_left(said, tmp_path):
    rng = np.random.default_rng(0)
    for name, dtype in (("a", torch.float16), ("b", torch.float64), ("c", torch.float16)):
        write_peft(tmp_path / name, random_factors(rng, SHAPES, 2), dtype=dtype)
    said("add", "s", "a", "b", "c", "--method", "whitened_sum")
    for removed, dtype in ((None, torch.float64), ("b", torch.float16)):
        if removed:
            said("remove", "s", removed)
        said("export", "s", "-o", "m", "--overwrite")
        assert {t.dtype for t in tensors_of(tmp_path / "m").values()} == {dtype}


UNET = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn"
# A key of an old diffusers before .down.weight -> the layer, as diffusers' own tables of today have it.
PROCESSORS = {
    f"{UNET}.processor.to_q_lora": f"{UNET}.to_q",
    f"{UNET}.processor.to_k_lora": f"{UNET}.to_k",
    f"{UNET}.processor.to_out_lora": f"{UNET}.to_out.0",
    f"{UNET}.processor.add_v_proj_lora": f"{UNET}.add_v_proj",
    f"{TEXT}.to_v_lora": f"{TEXT}.v_proj",
    f"{TEXT}.to_out_lora": f"{TEXT}.out_proj",
}


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_keys_of_attention_processors(said, tmp_path, alpha):
    torch.manual_seed(0)
    old, deltas = {}, {}
    for key, layer in PROCESSORS.items():
        up, down = torch.randn(6, 4), torch.randn(4, 5)
        old |= {f"{key}.up.weight": up, f"{key}.down.weight": down}
        old |= {} if alpha is None else {f"{key}.alpha": torch.tensor(alpha)}
        deltas[layer] = ((1 if alpha is None else alpha / 4) * up.double() @ down.double()).numpy()
    save_file(old, tmp_path / "old.safetensors")
    more = 6 * (2 + (alpha is not None)) - 1
    with pytest.warns(UserWarning, match=f"and {more} more: attention-processor keys of an old diffusers, read as"):
        found = lo.load_adapter(tmp_path / "old.safetensors")
    assert gap({n: found.delta(n).double().numpy() for n in found}, deltas) < 1e-6
    # Beside a file of today, under its names.
    new = {f"{layer}.lora_{x}.weight": torch.randn(6, 4) if x == "B" else torch.randn(4, 5)
           for layer in deltas for x in "AB"}  # fmt: skip
    save_file(new, tmp_path / "new.safetensors")
    told = said("merge", "old.safetensors", "new.safetensors", "-o", "m.safetensors", "--method", "cat").err
    assert "old.safetensors: " in told and "read as" in told and told.count("warning") == 1
    kept = tensors_of(tmp_path / "m.safetensors")
    for layer, delta in deltas.items():
        other = new[f"{layer}.lora_B.weight"].double() @ new[f"{layer}.lora_A.weight"].double()
        both = kept[f"{layer}.lora_B.weight"].double() @ kept[f"{layer}.lora_A.weight"].double()
        torch.testing.assert_close(both, other + torch.tensor(delta), rtol=1e-5, atol=1e-5)


def test_two_keys_of_one_layer_are_refused(tmp_path):
    layer = f"{UNET}.to_q"
    old = {f"{UNET}.processor.to_q_lora.{x}.weight": torch.ones(4, 4) for x in ("up", "down")}
    for ends in (".lora.up.weight", ".lora.down.weight"), (".lora_A.weight", ".lora_B.weight"):
        save_file(old | {layer + end: torch.ones(4, 4) for end in ends}, tmp_path / "two.safetensors")
        with pytest.raises(AdapterError, match="name one module twice"), pytest.warns(UserWarning):
            lo.load_adapter(tmp_path / "two.safetensors")


@pytest.mark.parametrize("first", ["kohya", "other"])
@pytest.mark.parametrize("kind", ["diffusers", "peft"])
def test_the_format_asked_for_is_that_of_another_input(said, tmp_path, first, kind):
    """Underscores become the dots of the input that has them; the order of the inputs, and so the merge, stays."""
    torch.manual_seed(0)
    names = ["blocks.0.self_attn.q", "blocks.1.ffn.0"]
    factors = {n: [(torch.randn(24, 3), torch.randn(3, 18)) for _ in range(2)] for n in names}
    short = {n: "lora_unet_" + n.replace(".", "_") for n in names}
    save_file(
        {f"{short[n]}.lora_{x}.weight": t for n in names for x, t in zip(("up", "down"), factors[n][0])},
        tmp_path / "k.safetensors",
    )
    if kind == "peft":
        write_peft(tmp_path / "o", {n: factors[n][1] for n in names}, dtype=torch.float32, task_type="X")
        paths, other, output = {"kohya": "k.safetensors", "other": "o"}, {n: n for n in names}, "m"
    else:
        other = {n: f"diffusion_model.{n}" for n in names}
        save_file({f"{other[n]}.lora_{x}.weight": t for n in names for x, t in zip("BA", factors[n][1])},
                  tmp_path / "o.safetensors")  # fmt: skip
        paths, output = {"kohya": "k.safetensors", "other": "o.safetensors"}, "m.safetensors"
    order = [paths.pop(first), *paths.values()]
    said("merge", *order, "-o", output, "--method", "cat", "--format", kind)
    found = lo.load_adapter(tmp_path / output)
    assert found.format == kind and found.keys() == set(other.values())
    for n in names:
        exact = sum(b.double() @ a.double() for b, a in factors[n])
        torch.testing.assert_close(found[other[n]].delta().double(), exact, rtol=1e-5, atol=1e-5)
    assert "the same" in said("verify", *order, "--against", output).out
    if kind == "peft":
        config = json.loads((tmp_path / output / CONFIG).read_text())
        assert config["task_type"] == "X" and config["target_modules"] == names
    else:
        assert json.loads(header(tmp_path / output)["lora_opcm"])["inputs"] == order


def test_a_folder_without_the_prefix_of_peft(said, tmp_path):
    deltas = write_peft(tmp_path / "a", random_factors(np.random.default_rng(0), SHAPES, 3))
    save_file({k.removeprefix(PREFIX): t for k, t in tensors_of(tmp_path / "a").items()}, tmp_path / "a" / WEIGHTS)
    told = said("merge", "a", "-o", "m", "--method", "cat").err
    assert f"layers.0.q.lora_A.weight and 3 more: read as {PREFIX}layers.0.q.lora_A.weight" in told
    assert gap(deltas_of(tmp_path / "m"), deltas) < 1e-12


def test_a_scale_far_from_the_rule_is_told_of(said, tmp_path):
    """The rule of `whitened_sum`: √2 times the mean norm of two adapters."""
    rng = np.random.default_rng(0)
    norms = [norm(write_peft(tmp_path / n, random_factors(rng, SHAPES, 2))) for n in "ab"]
    rule = 2**0.5 * (norms[0] + 3 * norms[1]) / 2
    for scale, times in (("8norm", 8 / 2**0.5), ("0.1norm", 0.1 / 2**0.5), ("3norm", 0), ("auto", 0)):
        words = ["a", "b", "-o", scale, "--method", "whitened_sum", "--weights", "1,-3", "--scale", scale]
        told = said("merge", *words).err
        assert (f"that is {times:.3g} times the norm that --scale auto gives, {rule:.4g}" in told) == bool(times)
    assert "auto" not in said("merge", "a", "b", "-o", "sum", "--method", "cat", "--scale", "50").err


def test_align_and_convert_say_what_they_wrote(said, tmp_path):
    for name in "pq":
        write_peft(tmp_path / name, random_factors(np.random.default_rng(0), {CLIP: (8, 6)}, 2), **CLIP_CONFIG)
    assert said("convert", "p", "-o", "k.safetensors").err == "wrote k.safetensors: 1 modules\n"
    assert said("align", "p", "--to", "q", "-o", "r").err == "wrote r: 1 modules\n"


@pytest.mark.parametrize(
    "words, hint",
    [
        (["merge", "a", "-o", "m", "--method", "opmc"], "did you mean 'opcm'?"),
        (["merge", "a", "-o", "m", "--option", "alhpa=1"], "did you mean 'alpha'?"),
        (["merge", "a", "-o", "m.safetensors", "--format", "koyha"], "did you mean 'kohya'?"),
        (["convert", "a", "-o", "m.safetensors", "--to", "difusers"], "did you mean 'diffusers'?"),
        (["add", "s", "a", "--method", "whitend_sum"], "did you mean 'whitened_sum'?"),
    ],
)
def test_errors_suggest_the_nearest_name(said, tmp_path, words, hint):
    write_peft(tmp_path / "a", random_factors(np.random.default_rng(0), SHAPES, 2))
    assert hint in said(*words, code=2).err


def test_every_dialect_on_the_formats_page_has_its_test():
    tests = Path(__file__).parent
    page = json.loads((tests.parent / "book" / "practice" / "formats.ipynb").read_text(encoding="utf8"))
    text = "\n".join("".join(cell["source"]) for cell in page["cells"])
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)` \|\n", text + "\n")
    assert len(named) >= 18
    for file, test in named:
        assert f"def {test}(" in (tests / file).read_text(encoding="utf8"), f"{file}::{test}"


@pytest.mark.parametrize(
    "words",
    [
        ["merge", "a", "b", "--format", "khoya"],
        ["convert", "a", "--to", "khoya"],
        ["resize", "a", "--rank", 1, "--format", "khoya"],
    ],
)
@pytest.mark.parametrize("output", ["x", "x.safetensors"])
def test_a_format_that_is_none_is_refused_by_name(said, tmp_path, words, output):
    rng = np.random.default_rng(0)
    for name in "ab":
        write_peft(tmp_path / name, random_factors(rng, {"q": (5, 4)}, 2))
    told = said(*words, "-o", output, code=2).err
    assert "format is 'khoya', expected one of peft, kohya, diffusers" in told and "did you mean 'kohya'?" in told
    assert not (tmp_path / output).exists()


def test_a_config_beside_a_file_that_says_its_scales_is_not_of_it(tmp_path):
    """A diffusers file in the folder of a PEFT adapter; and keys of kohya where PEFT's are expected."""
    torch.manual_seed(0)
    name = "unet.down_blocks.0.attentions.0.to_q"
    factors = {f"{name}.lora_A.weight": torch.randn(4, 8), f"{name}.lora_B.weight": torch.randn(6, 4)}
    header = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 4})}
    config = json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 64, "target_modules": ["to_q"], "use_dora": True})
    for folder in ("alone", "beside"):
        (tmp_path / folder).mkdir()
        save_file(factors, tmp_path / folder / "pytorch_lora_weights.safetensors", metadata=header)
    (tmp_path / "beside" / "adapter_config.json").write_text(config)
    one, other = (lo.load_adapter(tmp_path / f / "pytorch_lora_weights.safetensors") for f in ("alone", "beside"))
    assert one.norm() == other.norm() and one.format == other.format == "diffusers"
    short = {
        f"lora_unet_x.lora_{side}.weight": factors[f"{name}.lora_{x}.weight"]
        for side, x in (("down", "A"), ("up", "B"))
    }
    save_file(short, tmp_path / "beside" / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match="kohya keys: adapter_config.json beside it says nothing of them"):
        lo.load_adapter(tmp_path / "beside" / "adapter_model.safetensors")


def test_what_is_dropped_does_not_hold_back_a_format(tmp_path):
    """An embedding left out, of an adapter that kohya can hold otherwise."""
    torch.manual_seed(0)
    layer, table = "text_model.encoder.layers.0.mlp.fc1", "text_model.embeddings.token_embedding"
    config = {"auto_mapping": {"base_model_class": "CLIPTextModel"}, "peft_type": "LORA", "r": 2, "lora_alpha": 2}
    keys = {f"{layer}.lora_A.weight": (2, 8), f"{layer}.lora_B.weight": (6, 2)}
    keys |= {f"{table}.lora_embedding_A": (2, 9), f"{table}.lora_embedding_B": (8, 2)}
    tensors = {f"base_model.model.{key}": torch.randn(shape) for key, shape in keys.items()}
    (tmp_path / "a").mkdir()
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["fc1"]}))
    merged = lo.merge(tmp_path / "a", method="cat", drop=["*token_embedding"])
    merged.save(tmp_path / "m.safetensors", format="kohya")
    assert len(lo.load_adapter(tmp_path / "m.safetensors")) == 1
