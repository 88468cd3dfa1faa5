"""Two spellings of one layer: merged as one, told of, or refused; on plain files, by library and command."""

import json
import warnings

import numpy as np
import pytest
import torch
from by_hand import (
    WEIGHTS,
    deltas_of,
    gap,
    opcm,
    random_factors,
    run,
    tensors_of,
    write_peft,
)
from safetensors.torch import save_file

import lora_opcm as lo
from lora_opcm.files.names import alike, base_of, canonical, respelled
from lora_opcm.merging.shards import join, merge_shard

LAYERS = [f"layers.{i}.self_attn.{x}_proj" for i in range(3) for x in "qv"]
SHAPES = {name: (12 + i, 8) for i, name in enumerate(LAYERS)}


@pytest.fixture
def said(capsys, monkeypatch, tmp_path):
    return lambda *words, code=0: run(capsys, monkeypatch, tmp_path, *words, code=code)


def spelled(factors, head):
    return {head + name: f for name, f in factors.items()}


def write_kohya(path, factors, alpha=2.0, metadata=None):
    """A kohya file from name -> (B, A), all with one α; name -> ΔW."""
    tensors = {}
    for name, (b, a) in factors.items():
        tensors[f"{name}.lora_up.weight"], tensors[f"{name}.lora_down.weight"] = torch.tensor(b), torch.tensor(a)
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path, metadata=metadata or {})
    return {name: alpha / b.shape[1] * b @ a for name, (b, a) in factors.items()}


def read_kohya(path):
    tensors, found = tensors_of(path), {}
    for key, up in tensors.items():
        if key.endswith(".lora_up.weight"):
            name = key.removesuffix(".lora_up.weight")
            scale = float(tensors[f"{name}.alpha"]) / up.shape[1]
            up, down = up.double().flatten(1), tensors[f"{name}.lora_down.weight"].double().flatten(1)
            found[name] = scale * (up @ down).numpy()
    return found


def total(*parts):
    """The sum of dense updates, over the modules of any."""
    return {n: sum(p[n] for p in parts if n in p) for n in dict.fromkeys(n for p in parts for n in p)}


# -- the table of names --------------------------------------------------------------------------------------

# As diffusers' conversion scripts and sd-scripts pair them, typed in apart from the rules.
PAIRS = [
    ("model.layers.0.mlp.up_proj", "model.language_model.layers.0.mlp.up_proj"),
    ("model.layers.0.mlp.up_proj", "language_model.model.layers.0.mlp.up_proj"),
    ("h.0.attn.c_attn", "transformer.h.0.attn.c_attn"),
    ("layers.0.q", "base_model.model.base_model.model.layers.0.q"),
    ("layers.0.q", "transformer.base_model.model.layers.0.q"),
    ("transformer.blocks.3.attn.to_q", "diffusion_model.blocks.3.attn.to_q"),
    ("lora_te_text_model_encoder_layers_0_mlp_fc1", "lora_te1_text_model_encoder_layers_0_mlp_fc1"),
    ("text_encoder.text_model.encoder.layers.0.mlp.fc1", "lora_te_text_model_encoder_layers_0_mlp_fc1"),
    ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1", "lora_te2_text_model_encoder_layers_0_mlp_fc1"),
    ("lora_unet_input_blocks_1_0_in_layers_2", "lora_unet_down_blocks_0_resnets_0_conv1"),
    ("lora_unet_input_blocks_2_0_out_layers_3", "lora_unet_down_blocks_0_resnets_1_conv2"),
    ("lora_unet_input_blocks_3_0_op", "lora_unet_down_blocks_0_downsamplers_0_conv"),
    ("lora_unet_input_blocks_4_1_proj_in", "lora_unet_down_blocks_1_attentions_0_proj_in"),
    ("lora_unet_input_blocks_5_1_proj_in", "lora_unet_down_blocks_1_attentions_1_proj_in"),
    ("lora_unet_input_blocks_7_0_emb_layers_1", "unet.down_blocks.2.resnets.0.time_emb_proj"),
    ("lora_unet_middle_block_0_in_layers_2", "lora_unet_mid_block_resnets_0_conv1"),
    ("lora_unet_middle_block_1_proj_out", "lora_unet_mid_block_attentions_0_proj_out"),
    ("lora_unet_middle_block_2_skip_connection", "lora_unet_mid_block_resnets_1_conv_shortcut"),
    ("lora_unet_output_blocks_0_1_proj_in", "lora_unet_up_blocks_0_attentions_0_proj_in"),
    ("lora_unet_output_blocks_2_2_conv", "lora_unet_up_blocks_0_upsamplers_0_conv"),
    ("lora_unet_output_blocks_2_1_conv", "lora_unet_up_blocks_0_upsamplers_0_conv"),
    ("lora_unet_output_blocks_8_0_skip_connection", "lora_unet_up_blocks_2_resnets_2_conv_shortcut"),
    ("diffusion_model.time_embed.2", "lora_unet_time_embedding_linear_2"),
    ("lora_unet_double_blocks_7_img_attn_proj", "lora_transformer_transformer_blocks_7_attn_to_out_0"),
    ("lora_unet_double_blocks_7_txt_mlp_2", "transformer.transformer_blocks.7.ff_context.net.2"),
    ("lora_unet_single_blocks_11_linear2", "transformer.single_transformer_blocks.11.proj_out"),
    ("diffusion_model.single_blocks.1.modulation.lin", "transformer.single_transformer_blocks.1.norm.linear"),
]
APART = [
    ("text_encoder.text_model.encoder.layers.0.mlp.fc1", "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"),
    ("unet.mid.to_q", "text_encoder.mid.to_q"),
    ("model.layers.1.q_proj", "model.layers.11.q_proj"),
    ("model.encoder.layers.0.q_proj", "model.decoder.layers.0.q_proj"),
    ("model.visual.blocks.0.attn.qkv", "model.language_model.blocks.0.attn.qkv"),
    ("lora_unet_input_blocks_4_1_proj_in", "lora_unet_down_blocks_1_attentions_1_proj_in"),
    ("lora_unet_input_blocks_4_0_in_layers_2", "lora_unet_down_blocks_1_attentions_0_in_layers_2"),
    # Not one to one: three layers in one, and swapped halves.
    ("lora_unet_double_blocks_0_img_attn_qkv", "lora_transformer_transformer_blocks_0_attn_to_q"),
    ("lora_unet_single_blocks_0_linear1", "lora_transformer_single_transformer_blocks_0_attn_to_q"),
    ("lora_unet_final_layer_adaLN_modulation_1", "lora_transformer_norm_out_linear"),
]  # fmt: skip


@pytest.mark.parametrize("one, other", PAIRS)
def test_known_spellings_are_one_layer(one, other):
    assert canonical(one) == canonical(other)


@pytest.mark.parametrize("one, other", APART)
def test_layers_that_differ_stay_apart(one, other):
    assert canonical(one) != canonical(other)


def test_every_block_of_sdxl_has_a_name_of_its_own():
    """Places of the SDXL UNet as its two configurations list them: 9 input blocks, 3 middle, 9 output."""
    theirs, ours = [], []
    for level in range(3):
        for j in range(2):
            theirs.append(f"input_blocks_{1 + 3 * level + j}_0_in_layers_2")
            ours.append(f"down_blocks_{level}_resnets_{j}_conv1")
            if level:
                theirs.append(f"input_blocks_{1 + 3 * level + j}_1_proj_in")
                ours.append(f"down_blocks_{level}_attentions_{j}_proj_in")
        for j in range(3):
            theirs.append(f"output_blocks_{3 * level + j}_0_out_layers_3")
            ours.append(f"up_blocks_{level}_resnets_{j}_conv2")
            if level < 2:
                theirs.append(f"output_blocks_{3 * level + j}_1_proj_out")
                ours.append(f"up_blocks_{level}_attentions_{j}_proj_out")
    theirs, ours = ([f"lora_unet_{n}" for n in names] for names in (theirs, ours))
    assert len(set(theirs)) == len(theirs) == 25
    assert respelled(ours, theirs) == dict(zip(theirs, ours))
    assert respelled(theirs, ours) == dict(zip(ours, theirs))


def test_a_layer_that_only_they_have_is_named_after_the_pattern_of_the_others():
    q, v = "model.layers.0.q", "model.layers.1.v"
    far = ["model.language_model.layers.0.q", "model.language_model.layers.1.v"]
    assert respelled([q], far) == {far[0]: q, far[1]: v}
    assert respelled([far[0]], [q, v]) == {q: far[0], v: far[1]}
    # A pattern that would name another layer is not followed: block 2_0 is a resnet, 2_1 an attention.
    ours = ["lora_unet_down_blocks_0_attentions_1_proj_in"]
    theirs = ["lora_unet_input_blocks_2_1_proj_in", "lora_unet_input_blocks_2_0_in_layers_2"]
    assert respelled(ours, theirs) == {theirs[0]: ours[0], theirs[1]: theirs[1]}
    # Dots become underscores, never the other way.
    short, dotted = "lora_te_text_model_layers_0_fc1", "text_model.layers.0.fc1"
    assert respelled([short], [dotted, dotted.replace("1", "2")])[dotted.replace("1", "2")] == short.replace("1", "2")
    lone = short.replace("0_fc1", "1_fc_1")
    assert respelled([dotted], [short, lone])[lone] == lone


def test_one_layer_twice_in_one_adapter_is_matched_by_its_own_name_only():
    both = ["model.layers.0.q", "model.language_model.layers.0.q"]
    assert respelled(["model.layers.0.q"], both) == dict(zip(both, both))
    assert respelled(["layers.0.q"], both) == dict(zip(both, both))


def test_names_that_end_alike():
    bert = [f"bert.encoder.layer.{i}.attention.self.query" for i in range(2)]
    bare = [name.removeprefix("bert.") for name in bert]
    assert alike(bert, bare) == list(zip(bert, bare))
    assert alike(bert, bert) == [] == alike(bert, ["bert.encoder.layer.0.attention.self.key"])
    # One side knows both places: these are two layers.
    down, up = (f"{x}_blocks.0.attentions.0.to_q" for x in ("down", "up"))
    assert alike([down], [up]) == [(down, up)]
    assert alike([down, "up_blocks.1.attentions.0.to_q"], [up]) == [] == alike([down], [up, "down_blocks.1.x.0.y"])
    fused = alike(["double_blocks.3.img_attn.qkv"], [f"transformer_blocks.3.attn.to_{x}" for x in "qkv"])
    assert fused == [("double_blocks.3.img_attn.qkv", "transformer_blocks.3.attn.to_q")]


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("org/base", "/data/Base/", True), ("org/base", "other/base", True), ("C:\\models\\Base", "org/base", True),
        ("meta-llama/Llama-3.2-1B", "/home/u/.cache/hub/models--meta-llama--Llama-3.2-1B/snapshots/4e20de362430", True),
        ("meta-llama/Llama-3.2-1B", "unsloth/Llama-3.2-1B-bnb-4bit", True),
        ("meta-llama/Llama-3.2-1B", "unsloth/llama-3.2-1b-unsloth-bnb-4bit", True),
        ("sdxl_base_v1-0", "sdxl_1.0", True), ("sdxl_base_v1-0", "stabilityai/stable-diffusion-xl-base-1.0", True),
        ("gpt2", "models--gpt2/snapshots/11c5a3d5", True),
        ("org/base", "org/base-2", False), ("org/Llama-3.2-1B", "org/Llama-3.2-3B", False), ("sd_v1", "sd_v2", False),
    ],
)  # fmt: skip
def test_one_base_model_by_many_names(one, other, same):
    assert (base_of(one) == base_of(other)) == same


# -- merges --------------------------------------------------------------------------------------------------

HEADS = [
    ("model.", "model.language_model."),
    ("transformer.", "diffusion_model."),
    ("", "base_model.model."),  # beside the prefix that every key has
    ("", "transformer.base_model.model."),
]


@pytest.mark.parametrize("ours, theirs", HEADS)
@pytest.mark.parametrize("words", [["--method", "cat"], []], ids=["cat", "opcm"])
def test_two_spellings_are_merged_as_one_layer(said, tmp_path, ours, theirs, words):
    """6 modules, not 12, in the first's spelling, with the values of dense sums; what only they have goes along."""
    rng = np.random.default_rng(0)
    one = write_peft(tmp_path / "a", spelled(random_factors(rng, dict(list(SHAPES.items())[:4]), 3), ours))
    two = write_peft(tmp_path / "b", spelled(random_factors(rng, SHAPES, 2), theirs))
    told = said("merge", "a", "b", "-o", "m", *words).err
    two = {ours + name.removeprefix(theirs): d for name, d in two.items()}
    expected = total(one, two) if words else opcm([one, two])
    assert len(expected) == 6 and gap(deltas_of(tmp_path / "m"), expected) < 1e-9
    assert (
        f"warning: b/{WEIGHTS}: 6 modules under the names of a/{WEIGHTS}: {theirs}{LAYERS[0]} is {ours}{LAYERS[0]}"
        in told
    )
    said("verify", "b", "a", "--against", "m")
    assert "would merge 2 adapters, 6 modules" in said("merge", "a", "b", "-o", "n", "--dry-run").out
    said("add", "s", "a", "b")
    said("export", "s", "-o", "n")
    if not words:
        assert gap(deltas_of(tmp_path / "n"), expected) < 1e-9
    (row,) = json.loads(said("compare", "a", "b", "--json").out)
    assert (row["modules"], row["only first"], row["only second"]) == (4, 0, 2)
    said("align", "b", "--to", "a", "-o", "aligned")
    with pytest.warns(UserWarning, match="6 modules under the names of"):
        summed = lo.load_adapter(tmp_path / "a") + lo.load_adapter(tmp_path / "b")
    assert gap({n: u.delta().numpy() for n, u in summed.items()}, total(one, two)) < 1e-12


def test_convolutions_and_full_tensors_of_two_spellings(said, tmp_path):
    pair = [f"lora_unet_{x}.lora_" for x in ("input_blocks_1_0_in_layers_2", "down_blocks_0_resnets_0_conv1")]
    deltas = []
    for name, key in zip("ab", pair):
        up, down = torch.randn(6, 2, 1, 1), torch.randn(2, 3, 3, 3)
        save_file({f"{key}up.weight": up, f"{key}down.weight": down}, tmp_path / f"{name}.safetensors")
        deltas.append(torch.einsum("orxy,ricd->oicd", up, down))
    said("merge", "a.safetensors", "b.safetensors", "-o", "m.safetensors", "--method", "cat")
    found = tensors_of(tmp_path / "m.safetensors")
    delta = torch.einsum("orxy,ricd->oicd", found[f"{pair[0]}up.weight"], found[f"{pair[0]}down.weight"])
    torch.testing.assert_close(delta, sum(deltas), rtol=1e-5, atol=1e-5)
    assert found[f"{pair[0]}down.weight"].shape == (4, 3, 3, 3)
    rng, head = np.random.default_rng(0), torch.randn(3, 3)
    for name, start in (("p", "model."), ("q", "model.language_model.")):
        full = {f"{start}head.weight": head.clone()}
        write_peft(tmp_path / name, spelled(random_factors(rng, SHAPES, 2), start), full=full, modules_to_save=["head"])
    said("merge", "p", "q", "-o", "m")
    saved = {k: t for k, t in tensors_of(tmp_path / "m").items() if "head" in k}
    assert list(saved) == ["base_model.model.model.head.weight"] and saved["base_model.model.model.head.weight"].equal(
        head
    )


def test_a_merge_of_two_spellings_is_what_peft_loads(tmp_path):
    """Of the model of the first: every module of both, with the sum of their updates."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from torch import nn

    class Model(nn.Module):
        def __init__(self, deep):
            super().__init__()
            inner = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"q": nn.Linear(6, 6)}) for _ in range(2))})
            self.model = nn.ModuleDict({"language_model": inner}) if deep else inner

        def forward(self, x):
            inner = self.model["language_model"] if "language_model" in self.model else self.model
            for layer in inner["layers"]:
                x = layer["q"](x).tanh()
            return x

    torch.manual_seed(0)
    flat, added = Model(False), Model(False)
    added.load_state_dict(flat.state_dict())
    for i, deep in enumerate((False, True)):
        model = get_peft_model(
            Model(deep), LoraConfig(r=2, lora_alpha=3, target_modules=["q"], init_lora_weights=False)
        )
        for j in range(2):
            name = f"model.{'language_model.' * deep}layers.{j}.q"
            delta = model.base_model.model.get_submodule(name).get_delta_weight("default")
            with torch.no_grad():
                added.get_submodule(f"model.layers.{j}.q").weight += delta
        model.save_pretrained(tmp_path / f"in{i}")
    with pytest.warns(UserWarning, match="2 modules under the names of"):
        lo.merge(tmp_path / "in0", tmp_path / "in1", method="cat").save(tmp_path / "m")
    x = torch.randn(5, 6)
    loaded = PeftModel.from_pretrained(flat, tmp_path / "m")
    torch.testing.assert_close(loaded(x), added(x), rtol=1e-5, atol=1e-6)


UNET = "transformer_blocks_0"
SDXL = {
    f"lora_unet_input_blocks_4_1_{UNET}_attn1_to_q": f"lora_unet_down_blocks_1_attentions_0_{UNET}_attn1_to_q",
    f"lora_unet_output_blocks_1_1_{UNET}_ff_net_2": f"lora_unet_up_blocks_0_attentions_1_{UNET}_ff_net_2",
    "lora_te_text_model_encoder_layers_0_mlp_fc1": "lora_te1_text_model_encoder_layers_0_mlp_fc1",
}
FLUX = {
    "lora_unet_double_blocks_0_img_attn_proj": "lora_transformer_transformer_blocks_0_attn_to_out_0",
    "lora_unet_single_blocks_9_linear2": "lora_transformer_single_transformer_blocks_9_proj_out",
}


@pytest.mark.parametrize("table", [SDXL, FLUX], ids=["sdxl", "flux"])
@pytest.mark.parametrize("turned", [False, True])
def test_kohya_files_of_two_trainers(said, tmp_path, table, turned):
    rng, names = np.random.default_rng(1), list(table.items())
    ours, theirs = zip(*[pair[::-1] if turned else pair for pair in names])
    shape = {name: (10, 7) for name in ours}
    one = write_kohya(tmp_path / "a.safetensors", random_factors(rng, shape, 2), 1.0)
    two = write_kohya(tmp_path / "b.safetensors", random_factors(rng, dict.fromkeys(theirs, (10, 7)), 3), 6.0)
    said("merge", "a.safetensors", "b.safetensors", "-o", "m.safetensors", "--method", "cat")
    expected = total(one, {dict(zip(theirs, ours))[n]: d for n, d in two.items()})
    assert gap(read_kohya(tmp_path / "m.safetensors"), expected) < 1e-9


CLIP = [f"text_model.encoder.layers.{i}.mlp.fc{j}" for i in range(2) for j in (1, 2)]
CLIP_CONFIG = {"auto_mapping": {"base_model_class": "CLIPTextModel"}}


def test_formats_may_differ_where_all_names_match(said, tmp_path):
    rng, shape = np.random.default_rng(2), dict.fromkeys(CLIP, (10, 7))
    factors = random_factors(rng, shape, 3)
    one = write_peft(tmp_path / "p", random_factors(rng, shape, 2), alpha={CLIP[0]: 5}, **CLIP_CONFIG)
    short = {name: "lora_te_" + name.replace(".", "_") for name in CLIP}
    two = write_kohya(tmp_path / "k.safetensors", {short[n]: f for n, f in factors.items()}, 1.5)
    two = {name: two[short[name]] for name in CLIP}
    said("merge", "p", "k.safetensors", "-o", "m", "--method", "cat")
    assert gap(deltas_of(tmp_path / "m"), total(one, two)) < 1e-9
    said("merge", "k.safetensors", "p", "-o", "m.safetensors", "--method", "cat")
    expected = {short[n]: d for n, d in total(one, two).items()}
    assert gap(read_kohya(tmp_path / "m.safetensors"), expected) < 1e-9
    # A sum, where only the second has the module: its α = 5 goes into the factors, since kohya has no config.
    some = {short[CLIP[1]]: factors[CLIP[1]]}
    alone = write_kohya(tmp_path / "some.safetensors", some, 1.5)
    with pytest.warns(UserWarning, match="under the names of"):
        summed = lo.load_adapter(tmp_path / "some.safetensors") + lo.load_adapter(tmp_path / "p")
    summed.save(tmp_path / "sum.safetensors")
    expected = total(alone, {short[n]: d for n, d in one.items()})
    assert gap(read_kohya(tmp_path / "sum.safetensors"), expected) < 1e-9
    # A module without a dotted name cannot be written into a PEFT folder; the other way it can.
    write_peft(tmp_path / "part", random_factors(rng, {CLIP[0]: (10, 7)}, 2), **CLIP_CONFIG)
    refused = said("merge", "part", "k.safetensors", "-o", "no", code=2).err
    assert "expected one format, got peft and kohya; 3 modules of the second" in refused and short[CLIP[1]] in refused
    said("merge", "k.safetensors", "part", "-o", "yes.safetensors")


def test_adapters_without_a_common_module_are_refused_unless_told(said, tmp_path):
    rng = np.random.default_rng(3)
    one, two = (
        write_peft(tmp_path / n, random_factors(rng, {f"{head}.0.q": (8, 6), f"{head}.1.q": (8, 6)}, 2))
        for n, head in (("a", "bert.encoder.layer"), ("b", "encoder.layer"))
    )
    for words in (["merge", "a", "b", "-o", "m"], ["merge", "a", "b", "-o", "m", "--dry-run"], ["add", "s", "a", "b"],
                  ["compare", "a", "b"], ["merge", "a", "b", "-o", "part", "--shard", "0/2"]):  # fmt: skip
        refused = said(*words, code=2).err
        assert "no module is in two of the 2 adapters" in refused and refused.count("\n") == 1
        assert (
            "2 modules that end alike" in refused and "bert.encoder.layer.0.q there, encoder.layer.0.q here" in refused
        )
    with pytest.raises(lo.AdapterError, match=r"disjoint=True"):
        lo.merge(tmp_path / "a", tmp_path / "b", method="cat")
    told = said("merge", "a", "b", "-o", "m", "--method", "cat", "--disjoint").err
    assert "warning" in told and "end alike" in told
    assert gap(deltas_of(tmp_path / "m"), total(one, two)) < 1e-9
    said("verify", "a", "b", "--against", "m")
    said("add", "new", "a", "b", "--disjoint", "--method", "whitened_sum", "--power", 0)
    said("merge", "a", "b", "a", "-o", "three")  # two of them do


def test_names_that_end_alike_are_told_of(said, tmp_path):
    rng = np.random.default_rng(4)
    shared = {"head": (5, 4)}
    for n, head in (("a", "bert.encoder.layer"), ("b", "encoder.layer")):
        write_peft(tmp_path / n, random_factors(rng, shared | {f"{head}.{i}.q": (8, 6) for i in range(3)}, 2))
    told = said("merge", "a", "b", "-o", "m").err
    assert "3 modules that end alike" in told and "bert.encoder.layer.0.q there, encoder.layer.0.q here" in told
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lo.merge(tmp_path / "a", tmp_path / "a")


def test_shards_of_two_spellings_are_the_bytes_of_one_merge(tmp_path):
    rng = np.random.default_rng(5)
    write_peft(tmp_path / "a", spelled(random_factors(rng, SHAPES, 3), "model."))
    more = SHAPES | {f"layers.{i}.self_attn.q_proj": (9, 8) for i in range(7, 15)}  # some are alone in their shard
    write_peft(tmp_path / "b", spelled(random_factors(rng, more, 2), "model.language_model."))
    with pytest.warns(UserWarning, match="under the names of"):
        whole = lo.merge(tmp_path / "a", tmp_path / "b")
        parts = [merge_shard([tmp_path / "a", tmp_path / "b"], tmp_path / f"{i}", (i, 9)) for i in range(9)]
    whole.save(tmp_path / "whole")
    join(parts)[0].save(tmp_path / "joined")
    for name in (WEIGHTS, "adapter_config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "joined" / name).read_bytes()


def test_a_state_forgets_an_adapter_of_another_spelling(said, tmp_path):
    rng = np.random.default_rng(6)
    one = write_peft(tmp_path / "a", spelled(random_factors(rng, SHAPES, 3), "model."))
    write_peft(tmp_path / "b", spelled(random_factors(rng, SHAPES, 2), "model.language_model."))
    said("add", "s", "a", "b", "--method", "whitened_sum", "--power", 0)
    said("remove", "s", "b")
    said("export", "s", "-o", "m")
    polar = {n: u[:, :3] @ vh[:3] for n, (u, _, vh) in ((n, np.linalg.svd(d)) for n, d in one.items())}
    assert deltas_of(tmp_path / "m").keys() == polar.keys()
    state = lo.SumMerger.load(tmp_path / "s")
    alone = lo.SumMerger(power=0).add(lo.load_adapter(tmp_path / "a")).adapter()
    for name, u in state.adapter().items():
        torch.testing.assert_close(u.delta(), alone[name].delta(), rtol=1e-7, atol=1e-7)


# -- one layer under two names in one file -------------------------------------------------------------------


@pytest.fixture
def doubled(tmp_path):
    """Files: `twice` and `again` hold every layer under two names, `once` under one."""
    rng = np.random.default_rng(7)
    shapes = {f"layers.{i}.q": (8, 6) for i in range(2)}
    heads = {"once": ["model."], "twice": ["model.", "model.language_model."]}
    heads["again"] = heads["twice"]
    return {name: write_peft(tmp_path / name, {head + n: f for head in some
                                               for n, f in random_factors(rng, shapes, 2).items()})
            for name, some in heads.items()}  # fmt: skip


SAYS = "2 layers are there under several names, such as model.language_model.layers.0.q and model.layers.0.q"


@pytest.mark.parametrize("order", [["once", "twice"], ["twice", "once"], ["twice", "again"], ["twice"]], ids=" ".join)
def test_a_layer_twice_in_a_file_is_told_of_and_merged_by_sums_only(said, tmp_path, doubled, order):
    """Of every file alike; a sum is what adding both gives, any other merge is refused, and nothing is written."""
    double = [name for name in order if name != "once"]
    told = said("merge", *order, "-o", "m", "--method", "cat").err
    for name in order:
        assert told.count(f"warning: {name}/{WEIGHTS}: {SAYS}: each is a module of its own") == (name in double)
    added = lambda deltas: total(*({n.split("model.")[-1]: d} for n, d in deltas.items()))  # noqa: E731
    assert gap(added(deltas_of(tmp_path / "m")), total(*(added(doubled[name]) for name in order))) < 1e-9
    said("merge", *order, "-o", "mean", "--method", "mean")
    before = {path for path in tmp_path.rglob("*") if path.suffix != ".lock"}
    for words in (["merge", *order, "-o", "n"], ["merge", *order, "-o", "n", "--dry-run"],
                  ["merge", *order, "-o", "n", "--method", "cat", "--rank", 1], ["add", "n", double[0]],
                  ["merge", *order, "-o", "n", "--method", "svd"], ["merge", *order, "-o", "n", "--shard", "0/3"],
                  ["merge", *order, "-o", "n", "--method", "cat", "--scale", "norm"]):  # fmt: skip
        told = said(*words, code=2).err
        assert f"error: {double[0]}/{WEIGHTS}: {SAYS}; expected one name for each layer" in told, words
    assert {path for path in tmp_path.rglob("*") if path.suffix != ".lock"} == before
    said("merge", *order, "-o", "n", "--drop", "model.language_model.*")
    kept = [{n: d for n, d in doubled[name].items() if "language" not in n} for name in order]
    assert gap(deltas_of(tmp_path / "n"), opcm(kept)) < 1e-9
    said("verify", *order, "--against", "m")


@pytest.mark.parametrize("words", ["inspect twice", "compare once twice", "compare twice once",
                                   "convert twice -o x --to peft", "align once --to twice -o x"])  # fmt: skip
def test_every_command_says_what_is_one_layer_under_two_names(said, doubled, words):
    told = said(*words.split())
    assert told.err.count(f"warning: twice/{WEIGHTS}: {SAYS}") == 1
    if words.startswith("inspect"):
        assert "model.language_model.layers.0.q and model.layers.0.q are one layer, under 2 names" in told.out


# -- base models and what is left out ------------------------------------------------------------------------


def test_base_models(said, tmp_path):
    rng = np.random.default_rng(8)
    for n, base, revision in (("a", "org/base", None), ("b", "org/other", None), ("c", "/x/Base-bnb-4bit", "v2")):
        write_peft(tmp_path / n, random_factors(rng, SHAPES, 2), base_model_name_or_path=base, revision=revision)
    assert (
        "expected one base model, got org/base and org/other; if they are one, --any-base"
        in said("merge", "a", "b", "-o", "m", code=2).err
    )
    said("merge", "a", "b", "-o", "m", "--any-base")
    said("verify", "a", "b", "--against", "m")
    said("add", "s", "a", "b", "--any-base")
    lo.merge(tmp_path / "a", tmp_path / "b", any_base=True)
    told = said("merge", "a", "c", "-o", "n").err
    assert "different revisions of their base model: main" in told and "v2" in told


def test_drop_leaves_modules_and_full_tensors_out(said, tmp_path):
    rng = np.random.default_rng(9)
    full = lambda value: {"head.weight": torch.full((2, 2), value)}  # noqa: E731
    one = write_peft(tmp_path / "a", random_factors(rng, SHAPES, 2), full=full(1.0), modules_to_save=["head"])
    two = write_peft(tmp_path / "b", random_factors(rng, SHAPES, 2), full=full(2.0), modules_to_save=["head"])
    assert "--drop" in said("merge", "a", "b", "-o", "m", code=2).err
    said("merge", "a", "b", "-o", "m", "--method", "cat", "--drop", "head*", "--drop", "*.v_proj")
    kept = {n: d for n, d in total(one, two).items() if "v_proj" not in n}
    assert len(kept) == 3 and gap(deltas_of(tmp_path / "m"), kept) < 1e-9
    assert not [key for key in tensors_of(tmp_path / "m") if "head" in key]
    said("verify", "a", "b", "--against", "m")
    said("convert", "a", "-o", "c", "--to", "peft", "--drop", "layers.0.*", "--drop", "head.*")
    assert gap(deltas_of(tmp_path / "c"), {n: d for n, d in one.items() if "layers.0" not in n}) < 1e-12
    assert "--drop nothing*: no name of a" in said("merge", "a", "b", "-o", "x", "--drop", "nothing*", code=2).err
    assert "leaves no module" in said("merge", "a", "b", "-o", "x", "--drop", "*", code=2).err
    for i in range(2):
        said("merge", "a", "b", "-o", f"part{i}", "--shard", f"{i}/2", "--method", "cat", "--drop", "head*")
    said("join", "part0", "part1", "-o", "joined")
    assert gap(deltas_of(tmp_path / "joined"), total(one, two)) < 1e-9


# -- two adapters asked together -----------------------------------------------------------------------------


def test_similarity_and_align_match_spellings(tmp_path):
    """A copy in another gauge under other names: φ = 1 everywhere, and its factors are found again."""
    rng = np.random.default_rng(4)
    factors = random_factors(rng, SHAPES, 3)
    g = rng.normal(size=(3, 3))
    write_peft(tmp_path / "a", spelled(factors, "model."))
    turned = {n: (b @ g, np.linalg.solve(g, a)) for n, (b, a) in factors.items()}
    write_peft(tmp_path / "b", spelled(turned, "model.language_model."))
    a, b = (lo.load_adapter(tmp_path / n) for n in "ab")
    with pytest.warns(UserWarning, match="6 modules under the names of .*/a/"):
        table = lo.similarity(a, b, 3, 3)
    assert list(table.index) == [f"model.{n}" for n in SHAPES]
    assert (table[["phi_left", "phi_right", "cosine"]] - 1).abs().max().max() < 1e-9
    with pytest.warns(UserWarning, match="6 modules under the names of .*/b/"):
        aligned = lo.align(b, to=a)
    assert aligned.keys() == b.keys()
    for name in SHAPES:
        nearest = a[f"model.{name}"].balanced()
        assert torch.allclose(aligned[f"model.language_model.{name}"].left, nearest.left, atol=1e-9)


def test_similarity_and_align_refuse_and_warn_as_a_merge_does(tmp_path):
    rng = np.random.default_rng(4)
    write_peft(tmp_path / "a", spelled(random_factors(rng, SHAPES, 3), "model."))
    write_peft(tmp_path / "b", spelled(random_factors(rng, SHAPES, 3), "model.tower."))
    shared = random_factors(rng, {"proj": (4, 5)}, 2)
    write_peft(tmp_path / "d", spelled(random_factors(rng, SHAPES, 3), "model.") | shared)
    write_peft(tmp_path / "c", spelled(random_factors(rng, SHAPES, 3), "tower.") | shared)
    a, b, c, d = (lo.load_adapter(tmp_path / n) for n in "abcd")
    for ask in (lo.similarity, lo.align):
        with pytest.raises(ValueError, match="no module is in two of the 2 adapters"):
            ask(a, b)
        with pytest.warns(UserWarning, match="6 modules that end alike under names that differ"):
            ask(c, d)


def test_a_pattern_drops_a_layer_under_all_its_names(said, tmp_path):
    rng, sizes = np.random.default_rng(0), {"self_attn.q_proj": (6, 6)}
    for name, head in (("a", "model.layers"), ("b", "model.language_model.layers")):
        shapes = {f"{head}.{i}.{end}": size for i in range(2) for end, size in sizes.items()}
        write_peft(tmp_path / name, random_factors(rng, shapes, 2))
    for order in (["a", "b"], ["b", "a"]):
        for pattern in ("model.layers.0.*", "model.language_model.layers.0.*", "*layers.0.*"):
            out = f"{order[0]}-{hash(pattern)}"
            said("merge", *order, "-o", out, "--method", "cat", "--drop", pattern)
            (left,) = lo.load_adapter(tmp_path / out)
            assert left.endswith("layers.1.self_attn.q_proj")
    whole = {n: lo.load_adapter(tmp_path / n) for n in "ab"}
    assert (
        len(lo.merge(*whole.values(), method="cat", drop="model.layers.0.*")) == 1
    )  # one pattern is no list of letters
    # Of a layer under two names in one file, one name goes and the other stays.
    first = {f"model.layers.{i}.self_attn.q_proj": (6, 6) for i in range(2)}
    second = {n.replace("model.", "model.language_model.", 1): s for n, s in first.items()}
    write_peft(tmp_path / "both", random_factors(rng, first | second, 2))
    said("merge", "both", "a", "-o", "kept", "--method", "tsv", "--drop", "model.language_model.*")
    assert len(lo.load_adapter(tmp_path / "kept")) == 2


def test_kohya_is_renamed_like_a_pipeline_of_one_text_encoder(said, tmp_path):
    """`lora_te1` is its `text_encoder`, though there is no second one: as `merge` has it."""
    rng = np.random.default_rng(0)
    ends = {"text_model.encoder.layers.0.self_attn.q_proj": (6, 6)}
    short = {f"lora_te1_{end.replace('.', '_')}": size for end, size in ends.items()}
    factors = random_factors(rng, short, 2)
    deltas = write_kohya(tmp_path / "k.safetensors", factors, 2.0)
    like = {
        f"text_encoder.{end}.{side}.weight": torch.randn(*s)
        for end in ends
        for side, s in (("lora_A", (2, 6)), ("lora_B", (6, 2)))
    }
    save_file(like, tmp_path / "d.safetensors")
    said("convert", "k.safetensors", "-o", "o.safetensors", "--to", "diffusers", "--like", "d.safetensors")
    found = lo.load_adapter(tmp_path / "o.safetensors")
    assert list(found) == [f"text_encoder.{end}" for end in ends]
    assert np.allclose(next(iter(found.values())).delta(), next(iter(deltas.values())), atol=1e-5)
