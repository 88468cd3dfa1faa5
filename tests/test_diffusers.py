"""What is written, opened by diffusers itself, in tiny random models; ΔW of its layers against dense sums."""

import warnings

import numpy as np
import pytest
import torch
from by_hand import gap
from safetensors.torch import save_file

import lora_opcm as lo

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
diffusers = pytest.importorskip("diffusers")


def unet():
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
              "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}  # fmt: skip
    return diffusers.UNet2DConditionModel(
        block_out_channels=(4, 8), layers_per_block=1, cross_attention_dim=8, attention_head_dim=2, norm_num_groups=2,
        sample_size=8, **blocks,
    )  # fmt: skip


def flux():
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def wan():
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
        text_dim=32, freq_dim=256, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip


def qwen():
    return diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip


# name of the model in the file -> (model, what loads it, names there, their names in diffusers)
ATTENTION = ["blocks.0.attn1.to_q", "blocks.1.attn1.to_v", "blocks.1.ffn.net.2"]
MODELS = {
    "sd": (unet, "StableDiffusionLoraLoaderMixin", "unet", "unet.{}", {n: n for n in (
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.resnets.0.conv1",
        "up_blocks.0.attentions.1.proj_in")}),
    "flux": (flux, "FluxLoraLoaderMixin", "transformer", "transformer.{}", {n: n for n in (
        "transformer_blocks.0.attn.to_q", "transformer_blocks.0.ff.net.2", "single_transformer_blocks.0.proj_out")}),
    "wan": (wan, "WanLoraLoaderMixin", "transformer", "diffusion_model.{}", dict(zip(
        ("blocks.0.self_attn.q", "blocks.1.self_attn.v", "blocks.1.ffn.2"), ATTENTION))),
    "qwen": (qwen, "QwenImageLoraLoaderMixin", "transformer", "diffusion_model.{}", {n: n for n in (
        "transformer_blocks.0.attn.to_q", "transformer_blocks.1.img_mlp.net.2")}),
}  # fmt: skip


def opened(path, model, mixin, component):
    """ΔW of every layer that diffusers gives the adapter to."""

    class Pipeline(getattr(diffusers.loaders, mixin)):
        def __init__(self):
            self.components = {component: model, "text_encoder": None}
            self.hf_device_map = None

        def __getattr__(self, name):
            if name in ("text_encoder", "tokenizer"):
                return None
            if name == component:
                return model
            raise AttributeError(name)

    Pipeline().load_lora_weights(str(path), adapter_name="x")
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "get_delta_weight") and "x" in m.lora_A}
    return {n: m.get_delta_weight("x").detach().double().numpy() for n, m in layers.items()}


def written(path, model, pattern, names, rank, seed, alpha):
    """An adapter as its trainers write it, α beside the factors; its ΔW by diffusers' names."""
    torch.manual_seed(seed)
    tensors, deltas = {}, {}
    for name, theirs in names.items():
        shape = model.get_submodule(theirs).weight.shape
        up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2))
        down = torch.randn(rank, *shape[1:])
        key = pattern.format(name)
        tensors |= {f"{key}.lora_B.weight": up, f"{key}.lora_A.weight": down, f"{key}.alpha": torch.tensor(alpha)}
        product = up.double().flatten(1) @ down.double().flatten(1)
        deltas[theirs] = (alpha / rank * product).reshape(shape).numpy()
    save_file(tensors, path)
    return deltas


@pytest.mark.parametrize("kind", MODELS)
def test_merged_aligned_and_saved_files(tmp_path, kind):
    build, mixin, component, pattern, names = MODELS[kind]
    paths = [tmp_path / f"{x}.safetensors" for x in "ab"]
    a, b = (written(p, build(), pattern, names, r, r, 3.0) for p, r in zip(paths, (2, 4)))
    total = {n: a[n] + b[n] for n in a}
    one, two = map(lo.load_adapter, paths)
    outputs = {
        "merged": (lo.merge(one, two, method="cat"), total),
        "ragged": (lo.merge(one, two, method="cat", ragged=True), total),
        "aligned": (lo.align(one, two), a),
        "saved": (one, a),
        "scaled": (0.5 * one, {n: d / 2 for n, d in a.items()}),
    }
    stream = lo.ContinualMerger(scale=1.0)
    stream.add(one)
    outputs["exported"] = stream.adapter(), a
    for name, (adapter, expected) in outputs.items():
        adapter.save(tmp_path / f"{name}.safetensors")
        found = opened(tmp_path / f"{name}.safetensors", build(), mixin, component)
        assert gap(found, {n: d.reshape(found[n].shape) for n, d in expected.items()}) < 1e-5, name
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = lo.load_adapter(tmp_path / f"{name}.safetensors")
        back = {names[n.split(".", 1)[1]]: again.delta(n).double().numpy() for n in again}
        assert gap(back, {n: d.reshape(back[n].shape) for n, d in expected.items()}) < 1e-5, name


def test_an_adapter_of_peft_converted(tmp_path):
    """From a PEFT folder of a UNet to kohya's and to diffusers' file, α other than r."""
    names = list(MODELS["sd"][4])
    import peft

    model = peft.get_peft_model(unet(), peft.LoraConfig(target_modules=names, r=3, lora_alpha=7))
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "lora_" in name:
                x.normal_()
    model.save_pretrained(tmp_path / "p")
    layers = {n: model.base_model.model.get_submodule(n) for n in names}
    expected = {n: m.get_delta_weight("default").detach().double().numpy() for n, m in layers.items()}
    adapter = lo.load_adapter(tmp_path / "p")
    for format in ("kohya", "diffusers"):
        adapter.save(tmp_path / f"{format}.safetensors", format)
        found = opened(tmp_path / f"{format}.safetensors", unet(), *MODELS["sd"][1:3])
        assert gap(found, expected) < 1e-5, format
    assert np.isfinite(list(expected.values())[0]).all()


def test_keys_of_attention_processors(tmp_path):
    """What an old diffusers wrote, read as the new one reads it."""
    attention = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    model, tensors = unet(), {}
    torch.manual_seed(0)
    for old, layer in (("to_q", "to_q"), ("to_k", "to_k"), ("to_v", "to_v"), ("to_out", "to_out.0")):
        m, n = model.get_submodule(f"{attention}.{layer}").weight.shape
        key = f"unet.{attention}.processor.{old}_lora"
        tensors |= {f"{key}.up.weight": torch.randn(m, 3), f"{key}.down.weight": torch.randn(3, n)}
    save_file(tensors, tmp_path / "old.safetensors")
    theirs = opened(tmp_path / "old.safetensors", model, *MODELS["sd"][1:3])
    with pytest.warns(UserWarning, match="attention-processor keys of an old diffusers"):
        ours = lo.load_adapter(tmp_path / "old.safetensors")
    assert len(theirs) == 4
    assert gap({n.removeprefix("unet."): ours.delta(n).double().numpy() for n in ours}, theirs) < 1e-6
