"""Adapters of models in memory: what a merge does to the logits of peft itself."""

from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

import lora_opcm as lo
from lora_opcm.files import fuse
from lora_opcm.files.names import canonical

IDS = torch.arange(12)[None]


def base():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def trained(seed, **options):
    """A model whose adapter does something."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], **options)
    model = get_peft_model(base(), config)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"alpha_pattern": {"down_proj": 3}}])
def test_out_of_a_model_and_onto_another(options):
    model = trained(1, **options)
    adapter = lo.from_peft(model)
    assert len(adapter) == 4
    again = lo.attach(base(), adapter)
    assert torch.allclose(logits(again), logits(model), atol=1e-5)
    assert not torch.allclose(logits(again), logits(base()), atol=1e-2)


def test_a_merge_goes_beside_the_adapters_of_a_model():
    one, two = trained(1), trained(2)
    merged = lo.merge(lo.from_peft(one), lo.from_peft(two), method="cat", weights=[0.5, -1.5])
    before = logits(two)
    model = lo.attach(two, merged)
    assert model is two and set(two.peft_config) == {"default", "merged"} and two.active_adapter == "merged"
    expected = base()
    for name, update in merged.items():
        expected.get_submodule(name).weight.data += update.delta()
    assert torch.allclose(logits(two), logits(expected), atol=1e-5)
    two.set_adapter("default")
    assert torch.equal(logits(two), before)
    assert (lo.from_peft(two, "merged") - merged).norm() < 1e-5 * merged.norm()


def test_numbers_are_copies():
    model = trained(1)
    adapter = lo.from_peft(model)
    size = adapter.norm()
    for parameter in model.parameters():
        parameter.data.zero_()
    assert adapter.norm() == size


def test_mistakes_are_named():
    model = trained(1)
    with pytest.raises(ValueError, match="no adapter 'other'; it has default"):
        lo.from_peft(model, "other")
    with pytest.raises(ValueError, match="adapter 'default' already"):
        lo.attach(model, lo.from_peft(model), "default")
    wrong = lo.Adapter({"layers.9.q_proj": lo.LowRank(torch.ones(2, 1), torch.ones(1, 2))})
    with pytest.raises(ValueError, match="no module 'layers.9.q_proj'"):
        lo.attach(base(), wrong)
    with pytest.raises(lo.AdapterError, match="DoRA"):
        lo.from_peft(trained(1, use_dora=True))


def test_attention_that_peft_wraps_twice_comes_back():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attn, self.out = torch.nn.MultiheadAttention(16, 4, batch_first=True), torch.nn.Linear(16, 16)

        def forward(self, x):
            return self.out(self.attn(x, x, x)[0])

    torch.manual_seed(0)
    base, x = Block().eval(), torch.randn(2, 3, 16)
    model = get_peft_model(
        deepcopy(base), LoraConfig(r=2, target_modules=["attn", "out"], init_lora_weights=False)
    ).eval()
    again = lo.attach(deepcopy(base), lo.from_peft(model)).eval()
    torch.testing.assert_close(again(x), model(x))


def test_a_vision_transformer_under_the_names_of_either_transformers(tmp_path):
    """Version 4 wrote an adapter with the names that files of the model have still; version 5 writes others."""
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16,
                       patch_size=8, num_labels=3)  # fmt: skip
    torch.manual_seed(0)
    base, x = ViTForImageClassification(config).eval(), torch.linspace(-1, 1, 3 * 256).reshape(1, 3, 16, 16)
    base.save_pretrained(tmp_path / "base")
    with safe_open(tmp_path / "base" / "model.safetensors", "pt") as file:
        there = {name.removesuffix(".weight") for name in file.keys()}  # noqa: SIM118
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
    model = get_peft_model(deepcopy(base), LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).eval()
    new = lo.from_peft(model)
    names = {n: next(old for old in there if canonical(old) == canonical(n)) for n in new}
    assert len(set(names.values())) == len(new) == 12 and not set(names.values()) & set(new)
    old = new.with_modules({names[name]: update for name, update in new.items()})
    for adapter in (new, old):
        torch.testing.assert_close(lo.attach(deepcopy(base), adapter).eval()(x).logits, model(x).logits)
        lo.save_adapter(adapter, tmp_path / "a", overwrite=True)
        fuse(lo.load_adapter(tmp_path / "a"), tmp_path / "base", tmp_path / f"fused {adapter is old}")
        fused = ViTForImageClassification.from_pretrained(tmp_path / f"fused {adapter is old}").eval()
        torch.testing.assert_close(fused(x).logits, model(x).logits, rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="12 modules under the names of"):
        both = lo.merge([new, old], "cat")
    assert set(both) == set(new)
    with pytest.raises(ValueError, match="the model has no module"):
        lo.attach(deepcopy(base), old.with_modules({f"x.{n}": u for n, u in old.items()}))
