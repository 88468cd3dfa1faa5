"""Adapters: identities against peft itself, round trips bit for bit, refusals by name, atomic writes."""

import copy
import json
import math
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from lora_opcm.files import (
    Adapter,
    AdapterError,
    Kind,
    combine,
    load_adapter,
    peft,
    renamed,
    save_adapter,
)
from lora_opcm.files import disk as module
from lora_opcm.files.format import Stored
from lora_opcm.lowrank import LowRank, add
from lora_opcm.merging.merge import merge

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
IDS = torch.arange(12).reshape(2, 6)


# -- tiny base models ----------------------------------------------------------------------------------------


# Weights large enough that attention, and so an update of its queries, shows in the output.
SIZES = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 40,
         "initializer_range": 0.2}  # fmt: skip


def bert():
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(num_hidden_layers=2, **SIZES))


def classifier():
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(num_hidden_layers=1, **SIZES))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    # Untied: peft adapts the embedding alone, and a weight shared with the head would change there too.
    return GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=40, n_positions=16, tie_word_embeddings=False)
    )


def llama(**options):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **SIZES, **options))


class Convs(nn.Module):
    """All that peft adapts besides linear layers and embeddings."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv1d(3, 6, 3, padding=1)
        self.two = nn.Conv2d(3, 6, (3, 2), stride=2, padding=1)
        self.point = nn.Conv2d(6, 4, 1)
        self.three = nn.Conv3d(2, 4, 2)
        self.lin = nn.Linear(4, 5)

    def forward(self, ids):
        x = torch.linspace(-1, 1, 3 * 8 * 8).reshape(1, 3, 8, 8)
        y = self.point(self.two(x)).mean((2, 3))
        z = self.one(x[:, :, 0]).mean() + self.three(x.reshape(1, 2, 4, 4, 6)).mean()
        return (self.lin(y) + z,)


class Nested(nn.Module):
    """Linear layers some of whose names end in others' names, or match them as regular expressions."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(8, 8)
        self.block = nn.ModuleDict({n: nn.ModuleDict({"lin": nn.Linear(8, 8)}) for n in ("1", "11", "1x1")})
        self.block["lin"], self.block["1_lin"] = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, ids):
        x = self.lin(torch.linspace(-1, 1, 16).reshape(2, 8)).tanh()
        for name, part in self.block.items():
            x = (part if name.endswith("lin") else part["lin"])(x).tanh()
        return (x,)


@torch.no_grad()
def logits(model):
    return model.eval()(IDS)[0]


@torch.no_grad()
def applied(base, adapter):
    """A copy of the base with ΔW added to its weights, and carried tensors put in."""
    model = copy.deepcopy(base)
    for name in adapter.modules:
        weight = model.get_submodule(name).weight
        assert adapter.delta(name).shape == weight.shape
        weight += adapter.delta(name).to(weight.dtype)
    parameters = dict(model.named_parameters())
    for name, tensor in adapter.saved.items():
        if "base_layer" not in name:
            parameters[name].copy_(tensor)
    return model


def with_peft(base, folder):
    from peft import PeftModel

    return PeftModel.from_pretrained(copy.deepcopy(base), folder)


@pytest.fixture
def make(tmp_path):
    """make(model builder, **LoraConfig options) -> base, PEFT folder; every factor random."""

    def build(builder, folder="in", **options):
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        base = builder()
        options = {"r": 4, "lora_alpha": 6, "init_lora_weights": False} | options
        model = get_peft_model(copy.deepcopy(base), LoraConfig(**options))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name or "modules_to_save" in name:
                    parameter.copy_(torch.randn_like(parameter) * 0.3)
        model.save_pretrained(tmp_path / folder)
        return base, tmp_path / folder

    return build


@pytest.fixture
def plain(tmp_path):
    """plain(dtype=…, config changes) -> a PEFT folder with two linear modules, written without peft."""

    def build(folder="plain", tensors=None, drop=(), **options):
        torch.manual_seed(0)
        path = tmp_path / folder
        path.mkdir()
        keys = {
            "a.query.lora_A.weight": torch.randn(2, 5),
            "a.query.lora_B.weight": torch.randn(4, 2),
            "b.value.lora_A.weight": torch.randn(2, 3),
            "b.value.lora_B.weight": torch.randn(6, 2),
        } | (tensors or {})
        save_file(
            {f"base_model.model.{k}": v for k, v in keys.items() if v is not None and k not in drop},
            path / WEIGHTS,
        )
        config = {
            "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["query", "value"],
            "base_model_name_or_path": "org/base",
        }  # fmt: skip
        (path / CONFIG).write_text(json.dumps(config | options))
        return path

    return build


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def same_bits(a: Path, b: Path):
    ours, theirs = load_file(a), load_file(b)
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert ours[key].dtype == theirs[key].dtype and ours[key].shape == theirs[key].shape
        bits, others = (t[key].reshape(-1).view(torch.uint8) for t in (ours, theirs))
        assert bits.equal(others), key


# -- identities against peft ---------------------------------------------------------------------------------

CASES = {
    "plain": (bert, {"target_modules": ["query", "value", "dense"]}),
    "scale-2": (bert, {"target_modules": ["query"], "lora_alpha": 8}),
    "rslora": (bert, {"target_modules": ["query", "value"], "use_rslora": True, "r": 8, "lora_alpha": 5}),
    "rank_pattern": (
        bert,
        {
            "target_modules": ["query", "value"],
            "rank_pattern": {"layer.1.attention.self.query": 7, "value": 3},
        },
    ),
    "alpha_pattern": (
        bert,
        {
            "target_modules": ["query", "value"],
            "alpha_pattern": {r"^encoder\.layer\.0\..*(query|value)": 3, "query": 9},
        },
    ),
    "patterns-rslora": (
        bert,
        {
            "target_modules": r".*layer\.\d\..*\.(query|dense)",
            "use_rslora": True,
            "rank_pattern": {r"layer\.\d\.output\.dense": 2},
            "alpha_pattern": {"dense": 5},
        },
    ),
    "embedding": (bert, {"target_modules": ["word_embeddings", "key"]}),
    "fan_in_fan_out": (gpt2, {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}),
    "gpt2-embedding": (gpt2, {"target_modules": ["wte", "c_attn"], "fan_in_fan_out": True}),
    "conv": (Convs, {"target_modules": ["one", "two", "point", "three", "lin"], "r": 2}),
    "modules_to_save": (classifier, {"target_modules": ["query"], "modules_to_save": ["classifier"]}),
    "full-embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "nested": (Nested, {"target_modules": ["lin"], "rank_pattern": {"1.lin": 5, "block.lin": 3, "^lin": 2}}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_identity(case, make, tmp_path):
    builder, options = CASES[case]
    base, folder = make(builder, **options)
    expected = logits(with_peft(base, folder))
    assert (expected - logits(base)).abs().max() > 1e-2, "the adapter must matter"
    adapter = load_adapter(folder)
    assert (logits(applied(base, adapter)) - expected).abs().max() < 1e-5

    # Untouched: the same bytes, the same config, the same logits.
    save_adapter(adapter, tmp_path / "same")
    same_bits(folder / WEIGHTS, tmp_path / "same" / WEIGHTS)
    assert json.loads((folder / CONFIG).read_text()) == json.loads((tmp_path / "same" / CONFIG).read_text())
    assert logits(with_peft(base, tmp_path / "same")).equal(expected)

    # Touched: new factors of other ranks, scale 1.
    touched = {name: update.truncate()[0] for name, update in adapter.modules.items()}
    save_adapter(adapter.with_modules(touched), tmp_path / "new")
    assert (logits(with_peft(base, tmp_path / "new")) - expected).abs().max() < 1e-5
    again = load_adapter(tmp_path / "new")
    assert all(update.scale == 1 for update in again.modules.values())
    assert again.kinds == adapter.kinds

    # Half touched, half as it was: one config has to say both.
    name = next(iter(touched))
    mixed = adapter.modules | {name: add([touched[name]] * 2, [0.5, 0.5])}
    save_adapter(adapter.with_modules(mixed), tmp_path / "mixed")
    assert (logits(with_peft(base, tmp_path / "mixed")) - expected).abs().max() < 1e-5
    kept = load_adapter(tmp_path / "mixed").modules
    for other in set(mixed) - {name}:
        assert kept[other].up.equal(adapter.modules[other].up)
        assert kept[other].scale == pytest.approx(adapter.modules[other].scale, rel=1e-15)


@pytest.mark.filterwarnings("ignore")
def test_ranks_do_not_leak_to_modules_with_similar_names(tmp_path):
    """peft matches patterns by the end of a name; ours must match one module each, listed or not."""
    torch.manual_seed(0)
    base = Nested()
    ranks = {
        "lin": 2,
        "block.lin": 3,
        "block.1.lin": 5,
        "block.11.lin": 4,
        "block.1x1.lin": 4,
        "block.1_lin": 4,
    }
    modules = {n: LowRank(torch.randn(8, r), torch.randn(r, 8)) for n, r in ranks.items()}
    save_adapter(Adapter(modules), tmp_path / "a")
    model = with_peft(base, tmp_path / "a")
    for name, update in modules.items():
        layer = model.base_model.model.get_submodule(name)
        assert layer.r["default"] == ranks[name]
        torch.testing.assert_close(layer.get_delta_weight("default"), update.delta())

    # Only the root module: its name is the end of all others'.
    only = Adapter({"lin": modules["lin"], "block.1.lin": modules["block.1.lin"]})
    save_adapter(only, tmp_path / "b")
    assert (logits(with_peft(base, tmp_path / "b")) - logits(applied(base, only))).abs().max() < 1e-5


@pytest.mark.parametrize("rslora", [False, True])
def test_patterns_match_as_in_peft(rslora):
    from peft.utils.other import get_pattern_key

    names = ["layer.1.query", "layer.11.query", "enc.layer.1.query", "query", "layer.1.value", "a+b"]
    patterns = [{}, {"query": 3}, {"1.query": 3, "query": 5}, {"^query": 3}, {r"layer\.\d+\.query": 3},
                {"^layer\\.1\\.query": 3}, {"^layer\\.1\\.query": 3, "query": 5}, {"query": 5, "^query": 3},
                {"a+b": 3}, {"(query|value)": 3}, {"layer.1.query": 3}, {"": 3}]  # fmt: skip
    for pattern in patterns:
        config = {"r": 2, "lora_alpha": 7, "alpha_pattern": pattern, "use_rslora": rslora}
        scales = peft.Scales(config, "")
        for name in names:
            alpha = pattern.get(get_pattern_key(pattern.keys(), name), 7)
            assert scales(name, 2) == alpha / (math.sqrt(2) if rslora else 2), (pattern, name)


@pytest.mark.filterwarnings("ignore")
def test_conv_updates_are_those_of_peft(make):
    base, folder = make(Convs, target_modules=["one", "two", "point", "three"], r=2)
    adapter, model = load_adapter(folder), with_peft(base, folder)
    assert adapter.kinds["two"] == Kind("conv", (3, 2))
    for name in adapter.modules:
        theirs = model.base_model.model.get_submodule(name).get_delta_weight("default")
        torch.testing.assert_close(adapter.delta(name), theirs)


# -- round trips ---------------------------------------------------------------------------------------------

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@settings(max_examples=25, deadline=None)
@given(
    rank=st.integers(1, 9),
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    dtype=st.sampled_from(DTYPES),
    alpha=st.one_of(st.integers(-3, 64), st.floats(0.01, 100)),
    rslora=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_round_trip_is_bit_exact(rank, shape, dtype, alpha, rslora, seed):
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(shape[0], rank, generator=generator).to(dtype)
    down = torch.randn(rank, shape[1], generator=generator).to(dtype)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": rslora,
        "target_modules": ["x"],
    }
    scale = alpha / (math.sqrt(rank) if rslora else rank)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "in").mkdir()
        (folder / "in" / CONFIG).write_text(json.dumps(config))
        keys = {"base_model.model.m.x.lora_B.weight": up, "base_model.model.m.x.lora_A.weight": down}
        save_file(keys, folder / "in" / WEIGHTS)
        adapter = load_adapter(folder / "in")
        update = adapter.modules["m.x"]
        assert adapter.dtype == dtype
        # ΔW is s·B·A: exactly so for halves, which are widened when s is no power of two.
        eps = torch.finfo(update.dtype).eps
        left = up.double() * scale
        assert (update.left.double() - left).abs().max() <= (eps if update.dtype.itemsize > 2 else 0) * left.abs().max()
        assert update.right.double().equal(down.double())

        save_adapter(adapter, folder / "out")
        same_bits(folder / "in" / WEIGHTS, folder / "out" / WEIGHTS)
        again = load_adapter(folder / "out")
        assert again.modules["m.x"].left.equal(update.left) and again.modules["m.x"].scale == scale

        # A new update goes out in the dtype that came in.
        save_adapter(adapter.with_modules({"m.x": update * 0.5}), folder / "half")
        half = load_adapter(folder / "half").modules["m.x"]
        assert half.up.dtype == dtype and half.scale == 1
        torch.testing.assert_close(half.left.double(), left / 2, rtol=float(torch.finfo(dtype).eps), atol=1e-7)

        # kohya, from the same numbers.
        kohya = {"lora_te_x.lora_up.weight": up, "lora_te_x.lora_down.weight": down}
        if float(torch.tensor(alpha, dtype=dtype)):
            kohya["lora_te_x.alpha"] = torch.tensor(alpha, dtype=dtype)
        save_file(kohya, folder / "in.safetensors", metadata={"ss_network_dim": str(rank), "b": "ü", "a": "1"})
        save_adapter(load_adapter(folder / "in.safetensors"), folder / "out.safetensors")
        same_bits(folder / "in.safetensors", folder / "out.safetensors")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_dtype_is_what_is_asked_for(plain, tmp_path, dtype, target):
    folder = plain(tensors={"a.query.lora_A.weight": torch.randn(2, 5).to(dtype)})
    adapter = load_adapter(folder)
    save_adapter(adapter, tmp_path / "out", dtype=target)
    assert {t.dtype for t in load_file(tmp_path / "out" / WEIGHTS).values()} == {target}
    again = load_adapter(tmp_path / "out")
    for name in adapter.modules:
        torch.testing.assert_close(again.modules[name].delta().double(), adapter.modules[name].delta().double(),
                                   rtol=0.02, atol=0.05)  # fmt: skip


def test_scale_is_folded_without_loss():
    half = torch.tensor([[6e-8, 1.0, 60000.0]], dtype=torch.float16)
    down = torch.ones(3, 1, dtype=torch.float16)
    assert Stored.fold(half, down, 1.0).dtype == torch.float16
    assert Stored.fold(half[:, 1:], down[1:], 0.5).dtype == torch.float16
    for scale in (2.0, 0.5, 1.5, -3.0):  # overflow, underflow, not a power of two
        update = Stored.fold(half, down, scale)
        assert update.dtype == torch.float32
        assert update.left.double().equal(half.double() * scale)
    assert Stored.fold(half.bfloat16(), down.bfloat16(), 1 / 3).dtype == torch.float32
    assert isinstance(Stored.fold(half, down, 2.0) * 2, LowRank)
    assert not isinstance(Stored.fold(half, down, 2.0) * 2, Stored)


def test_alpha_of_a_new_config_gives_the_scale_back():
    for rank in range(1, 70):
        for scale in (1.0, 2.0, 1 / 3, 16 / math.sqrt(rank), 5 / rank):
            alpha = peft.config_for({"m": (rank, scale)}, {}, None)["lora_alpha"]
            assert alpha / rank == pytest.approx(scale, rel=2e-16)
    assert repr(peft.config_for({"m": (7, 5 / 7)}, {}, None)["lora_alpha"]) == "5"


def test_large_finite_values_are_not_taken_for_inf(plain):
    top = torch.full((2, 5), torch.finfo(torch.float32).max)  # their sum overflows
    adapter = load_adapter(plain("float32", {"a.query.lora_A.weight": top}))
    assert adapter.modules["a.query"].right.equal(top) and math.isfinite(adapter.norm())


def test_float64_whose_norms_would_overflow_is_refused(plain):
    top = torch.full((2, 5), torch.finfo(torch.float64).max, dtype=torch.float64)
    with pytest.raises(AdapterError, match="a.query: a factor holds 1.8e.308, expected below 1e.38"):
        load_adapter(plain("float64", {"a.query.lora_A.weight": top}))


def test_patterns_that_would_hang_are_refused(plain):
    """Few enough wildcards for a short name, and years of backtracking on a long one."""
    long = "a." * 100
    tensors = {f"{long}q.lora_A.weight": torch.ones(2, 5), f"{long}q.lora_B.weight": torch.ones(4, 2)}
    with pytest.raises(AdapterError, match="too expensive to match safely"):
        load_adapter(plain("long", tensors, rank_pattern={".*.*.*.*[bc]": 2}))
    with pytest.raises(AdapterError, match="expected at most 200000 and 500"):
        load_adapter(plain("longer", {"a." * 500 + "lora_A.weight": torch.ones(2, 5)}))
    for name, options in (
        ("names", {"modules_to_save": [f"head{i}" for i in range(300)]}),
        ("patterns", {"rank_pattern": {f".*x{i}": 2 for i in range(5000)}}),
    ):
        with pytest.raises(AdapterError, match="at most 256|too expensive"):
            load_adapter(plain(name, **options))


def test_mixed_dtypes_in_one_module(plain, tmp_path):
    odd = {"a.query.lora_A.weight": torch.randn(1, 5).half(), "a.query.lora_B.weight": torch.randn(4, 1)}
    folder = plain(tensors=odd, rank_pattern={"query": 1})
    adapter = load_adapter(folder)
    assert adapter.modules["a.query"].dtype == torch.float32
    save_adapter(adapter, tmp_path / "out")
    same_bits(folder / WEIGHTS, tmp_path / "out" / WEIGHTS)
    # Readers that map a file need every tensor aligned to its own item size.
    data = (tmp_path / "out" / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    for key, entry in json.loads(data[8 : 8 + length]).items():
        if key != "__metadata__":
            assert (8 + length + entry["data_offsets"][0]) % {"F16": 2, "F32": 4}[entry["dtype"]] == 0


def test_zero_update_is_written_with_rank_one(plain, tmp_path):
    adapter = load_adapter(plain())
    zero = (adapter.modules["a.query"] * 0).truncate()[0]
    assert zero.rank == 0
    save_adapter(adapter.with_modules(adapter.modules | {"a.query": zero}), tmp_path / "out")
    again = load_adapter(tmp_path / "out")
    assert again.modules["a.query"].rank == 1 and again.modules["a.query"].norm() == 0


def test_fewer_modules_are_listed_by_name(plain, tmp_path):
    adapter = load_adapter(plain(exclude_modules=["value"], layers_to_transform=[0]))
    save_adapter(adapter.with_modules({"b.value": adapter.modules["b.value"]}), tmp_path / "out")
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["target_modules"] == ["b.value"]
    assert config["exclude_modules"] is None and config["layers_to_transform"] is None
    assert config["base_model_name_or_path"] == "org/base"


# -- kohya and diffusers -------------------------------------------------------------------------------------


def kohya_file(path, dtype=torch.float32):
    """Linear, conv 3×3 and conv 1×1; one α an integer, one fractional, one missing."""
    torch.manual_seed(1)
    tensors = {
        "lora_unet_down_to_q.lora_up.weight": torch.randn(6, 4),
        "lora_unet_down_to_q.lora_down.weight": torch.randn(4, 5),
        "lora_unet_down_to_q.alpha": torch.tensor(2.0),
        "lora_unet_conv.lora_up.weight": torch.randn(6, 3, 1, 1),
        "lora_unet_conv.lora_down.weight": torch.randn(3, 2, 3, 3),
        "lora_unet_conv.alpha": torch.tensor(1.5),
        "lora_te1_proj.lora_up.weight": torch.randn(7, 2, 1, 1),
        "lora_te1_proj.lora_down.weight": torch.randn(2, 4, 1, 1),
    }
    tensors = {k: v.to(dtype) for k, v in tensors.items()}
    metadata = {"ss_base_model_version": "sdxl_base_v1-0", "ss_network_dim": "4", "sshs_model_hash": "f00",
                "ss_output_name": "naïve \"quoted\""}  # fmt: skip
    save_file(tensors, path, metadata=metadata)
    return tensors, metadata


@pytest.mark.parametrize("dtype", DTYPES)
def test_kohya_against_plain_arithmetic(tmp_path, dtype):
    tensors, metadata = kohya_file(tmp_path / "in.safetensors", dtype)
    adapter = load_adapter(tmp_path / "in.safetensors")
    assert adapter.format == "kohya" and adapter.base_model == "sdxl_base_v1-0" and adapter.dtype == dtype
    assert adapter.kinds == {"lora_unet_conv": Kind("conv", (3, 3)), "lora_te1_proj": Kind("conv", (1, 1))}
    for name, scale in {"lora_unet_down_to_q": 0.5, "lora_unet_conv": 0.5, "lora_te1_proj": 1.0}.items():
        up, down = (tensors[f"{name}.lora_{w}.weight"].double().flatten(1) for w in ("up", "down"))
        assert adapter.modules[name].scale == scale
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(adapter.modules[name].delta().double(), scale * up @ down,
                                   rtol=tolerance, atol=tolerance)  # fmt: skip

    # A convolution with ΔW is the two convolutions, one after the other.
    x = torch.randn(1, 2, 8, 8)
    up, down = (tensors[f"lora_unet_conv.lora_{w}.weight"].float() for w in ("up", "down"))
    two_steps = F.conv2d(F.conv2d(x, down, stride=2, padding=1), up) * 0.5
    delta = adapter.modules["lora_unet_conv"].to(torch.float32).delta().reshape(6, 2, 3, 3)
    torch.testing.assert_close(F.conv2d(x, delta, stride=2, padding=1), two_steps, rtol=1e-4, atol=1e-5)

    save_adapter(adapter, tmp_path / "same.safetensors")
    same_bits(tmp_path / "in.safetensors", tmp_path / "same.safetensors")
    assert load_adapter(tmp_path / "same.safetensors").metadata == metadata


def test_kohya_new_updates(tmp_path):
    kohya_file(tmp_path / "in.safetensors", torch.bfloat16)
    adapter = load_adapter(tmp_path / "in.safetensors")
    wide = LowRank(torch.randn(300, 257).bfloat16(), torch.randn(257, 299).bfloat16())
    modules = {n: u.truncate(rank=2)[0] for n, u in adapter.modules.items()} | {"lora_te2_new": wide}
    save_adapter(adapter.with_modules(modules), tmp_path / "new.safetensors")
    tensors = load_file(tmp_path / "new.safetensors")
    for name, update in modules.items():
        up, down = tensors[f"{name}.lora_up.weight"], tensors[f"{name}.lora_down.weight"]
        assert up.dtype == torch.bfloat16 and float(tensors[f"{name}.alpha"]) == len(down) == update.rank
        assert up.flatten(1).equal(update.left.bfloat16()) and down.flatten(1).equal(update.right.bfloat16())
    assert tensors["lora_unet_conv.lora_down.weight"].shape == (2, 2, 3, 3)
    assert tensors["lora_unet_conv.lora_up.weight"].shape == (6, 2, 1, 1)
    header = load_adapter(tmp_path / "new.safetensors").metadata
    assert header["ss_network_dim"] == "Dynamic" and "sshs_model_hash" not in header


def diffusers_file(path, metadata=None, spelling=("lora_A", "lora_B")):
    torch.manual_seed(2)
    names = ["unet.mid.attn.to_q", "text_encoder.text_model.layers.0.q_proj"]
    tensors = {}
    for name in names:
        tensors[f"{name}.{spelling[0]}.weight"] = torch.randn(2, 5)
        tensors[f"{name}.{spelling[1]}.weight"] = torch.randn(4, 2)
    save_file(tensors, path, metadata=metadata)
    return names, tensors


@pytest.mark.parametrize(
    "spelling",
    [("lora_A", "lora_B"), ("lora.down", "lora.up"), ("lora_linear_layer.down", "lora_linear_layer.up")],
)
def test_diffusers_to_kohya(tmp_path, spelling):
    names, tensors = diffusers_file(tmp_path / "d.safetensors", spelling=spelling)
    adapter = load_adapter(tmp_path / "d.safetensors")
    assert adapter.format == "diffusers" and list(adapter.modules) == sorted(names)
    for name in names:
        up, down = (tensors[f"{name}.{s}.weight"] for s in reversed(spelling))
        torch.testing.assert_close(adapter.modules[name].delta(), up @ down)
    save_adapter(adapter, tmp_path / "k.safetensors", format="kohya")
    kohya = load_adapter(tmp_path / "k.safetensors")
    assert set(kohya.modules) == {"lora_unet_mid_attn_to_q", "lora_te_text_model_layers_0_q_proj"}
    assert kohya.modules["lora_unet_mid_attn_to_q"].delta().equal(adapter.modules[names[0]].delta())
    assert kohya.modules["lora_unet_mid_attn_to_q"].alpha == 2
    with pytest.raises(AdapterError, match="has diffusers names, which do not say those of 'peft'"):
        save_adapter(adapter, tmp_path / "no", format="peft")
    with pytest.raises(AdapterError, match="has kohya names, which do not say those of 'diffusers'"):
        save_adapter(kohya, tmp_path / "no.safetensors", format="diffusers")
    save_adapter(adapter, tmp_path / "same.safetensors")
    for back in (load_adapter(tmp_path / "same.safetensors"), renamed(kohya, adapter)):
        assert back.format == "diffusers" and back.modules.keys() == adapter.modules.keys()
        for name, update in adapter.modules.items():
            assert back.modules[name].left.equal(update.left) and back.modules[name].right.equal(update.right)
    fewer = adapter.with_modules({names[0]: adapter.modules[names[0]]})
    with pytest.raises(AdapterError, match="lora_te_text_model_layers_0_q_proj: .* has no such module"):
        renamed(kohya, fewer)


def test_diffusers_scale_from_the_header(tmp_path):
    config = {
        "unet.r": 2, "unet.lora_alpha": 6, "unet.alpha_pattern": {"mid.attn.to_q": 3},
        "text_encoder.r": 2, "text_encoder.lora_alpha": 8, "text_encoder.use_rslora": True,
    }  # fmt: skip
    names, _ = diffusers_file(tmp_path / "d.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    modules = load_adapter(tmp_path / "d.safetensors").modules
    assert modules[names[0]].scale == 1.5 and modules[names[1]].scale == 8 / math.sqrt(2)
    for bad, message in [
        ({"unet.r": 2}, "expected a config for 'text_encoder'"),
        (config | {"unet.use_dora": True}, "use_dora is set"),
        (config | {"unet.r": 3}, "rank 2, .* says 3"),
    ]:
        diffusers_file(tmp_path / "d.safetensors", {"lora_adapter_metadata": json.dumps(bad)})
        with pytest.raises(AdapterError, match=message):
            load_adapter(tmp_path / "d.safetensors")


def test_kohya_from_peft_only_where_names_are_defined(plain, tmp_path):
    adapter = load_adapter(plain())
    with pytest.raises(AdapterError, match="UNet2DConditionModel and CLIPTextModel only, got None"):
        save_adapter(adapter, tmp_path / "k.safetensors", format="kohya")
    adapter = load_adapter(plain("unet", auto_mapping={"base_model_class": "UNet2DConditionModel"}))
    save_adapter(adapter, tmp_path / "k.safetensors", format="kohya")
    kohya = load_adapter(tmp_path / "k.safetensors")
    assert set(kohya.modules) == {"lora_unet_a_query", "lora_unet_b_value"}
    assert kohya.modules["lora_unet_a_query"].delta().equal(adapter.modules["a.query"].delta())
    with pytest.raises(AdapterError, match="has kohya names"):
        save_adapter(kohya, tmp_path / "p", format="peft")
    twins = {"a.b_c": adapter.modules["a.query"], "a_b.c": adapter.modules["a.query"]}
    with pytest.raises(AdapterError, match="a.b_c and a_b.c would both be lora_unet_a_b_c"):
        save_adapter(adapter.with_modules(twins), tmp_path / "t.safetensors", format="kohya")


# -- refusals ------------------------------------------------------------------------------------------------

CONFIG_REFUSALS = {
    "peft_type": ({"peft_type": "VERA"}, "peft_type is 'VERA', expected 'LORA'"),
    "no peft_type": ({"peft_type": None}, "peft_type is None, expected 'LORA'"),
    "dora": ({"use_dora": True}, "use_dora is set: DoRA"),
    "kasa": ({"kasa_config": {}}, "kasa_config is set: KaSA"),
    "lora_bias": ({"lora_bias": True}, "lora_bias is set"),
    "qalora": ({"use_qalora": True}, "use_qalora is set: QALoRA"),
    "alora": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is set: aLoRA"),
    "tokens": ({"trainable_token_indices": [0]}, "trainable_token_indices is set"),
    "replication": ({"layer_replication": [[0, 1]]}, "layer_replication is set"),
    "moe": ({"target_parameters": "experts.up"}, "target_parameters is 'experts.up', expected a list"),
    "future use": ({"use_zora": True}, "use_zora is set: a variant of LoRA that is not known"),
    "future config": ({"zora_config": {"k": 1}}, "zora_config is set: a variant of LoRA that is not known"),
    **{
        init: ({"init_lora_weights": init}, f"init_lora_weights is '{init}', which changed the base")
        for init in ("pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga")
    },
    "rank": ({"r": 3}, "a.query: the factors have rank 2, adapter_config.json says 3"),
    "rank_pattern": ({"rank_pattern": {"value": 5}}, "b.value: the factors have rank 2, .* says 5"),
    "rank text": ({"r": "2"}, "a.query: the factors have rank 2, .* says 2|rank is 2, expected a number"),
    "alpha text": ({"lora_alpha": "4"}, "alpha is 4, expected a number"),
    "alpha nan": ({"lora_alpha": float("nan")}, "alpha is nan, expected a number"),
    "alpha huge": ({"lora_alpha": 10**400}, "expected a number"),
    "alpha inf": ({"lora_alpha": float("inf")}, "alpha is inf, expected a number"),
    "alpha bool": ({"lora_alpha": True}, "expected a number"),
    "patterns": ({"rank_pattern": [1]}, r"pattern is \[1\], expected an object"),
    "bad regex": ({"alpha_pattern": {"(": 1}}, r"'\(' is no regular expression"),
    "slow regex": ({"alpha_pattern": {"(a+)+b": 1}}, "too expensive"),
    "slower regex": ({"rank_pattern": {".*a" * 30: 1}}, "too expensive"),
    "modules_to_save": (
        {"modules_to_save": "classifier"},
        "modules_to_save is 'classifier', expected a list",
    ),
}


@pytest.mark.parametrize("case", CONFIG_REFUSALS)
def test_refused_configs(case, plain):
    options, message = CONFIG_REFUSALS[case]
    folder = plain(**options)
    with pytest.raises(AdapterError, match=message) as error:
        load_adapter(folder)
    assert str(folder / CONFIG) in str(error.value)


def test_harmless_options_pass(plain):
    load_adapter(plain(eva_config={"rho": 2}, init_lora_weights="eva", use_rslora=False, qalora_group_size=16,
                       layer_replication=None, target_parameters=[], bias="lora_only", megatron_core="x",
                       lora_bias=False, use_dora=False, kasa_config=None, corda_config=None))  # fmt: skip


A, B = "a.query.lora_A.weight", "a.query.lora_B.weight"
TENSOR_REFUSALS = {
    "no A": ({A: None}, "a.query: expected two factors, got only base_model.model.a.query.lora_B.weight"),
    "no B": ({B: None}, "a.query: expected two factors, got only base_model.model.a.query.lora_A.weight"),
    "ranks": ({A: torch.ones(3, 5)}, r"a.query: .*\(4, 2\) and .*\(3, 5\), expected one rank, got 2 and 3"),
    "1-d": ({A: torch.ones(5)}, r"\(5,\), expected \(m, r\) and \(r, n\)"),
    "kernel": ({B: torch.ones(4, 2, 3, 3), A: torch.ones(2, 5, 3, 3)}, r"\(4, 2, 3, 3\) .* expected"),
    "grouped": ({B: torch.ones(4, 1, 1, 1), A: torch.ones(2, 5, 3, 3)}, "got 1 and 2 .a grouped convolution"),
    "zero rank": ({A: torch.ones(0, 5), B: torch.ones(4, 0)}, r"a.query: .*\(4, 0\) and .*\(0, 5\), expected"),
    "nan": ({A: torch.full((2, 5), float("nan"))}, "a.query.lora_A.weight holds NaN or Inf"),
    "inf": ({B: torch.tensor([[1.0, float("-inf")]] * 4)}, "a.query.lora_B.weight holds NaN or Inf"),
    "both infs": ({B: torch.tensor([[float("inf"), float("-inf")]] * 4)}, "holds NaN or Inf"),
    "int8": ({A: torch.ones(2, 5, dtype=torch.int8)}, "a.query.lora_A.weight is I8 .quantised.., expected one of F64"),
    "dora": ({"a.query.lora_magnitude_vector": torch.ones(4)}, "a.query.lora_magnitude_vector: DoRA"),
    "kasa": ({"a.query.lora_diag": torch.ones(2)}, "a.query.lora_diag: a KaSA diagonal"),
    "lora_bias": ({"a.query.lora_B.bias": torch.ones(4)}, "a.query.lora_B.bias: a lora_bias"),
    "bias": ({"a.query.bias": torch.ones(4)}, "a.query.bias: a trained bias"),
    "tokens": ({"emb.token_adapter.trainable_tokens_delta": torch.ones(4)}, "trainable_token_indices"),
    "adapter name": ({"a.query.lora_A.default.weight": torch.ones(2, 5)}, "name one module twice"),
    "two adapters": (
        {A: None, B: None}
        | {"a.query.lora_A.one.weight": torch.ones(2, 5), "a.query.lora_B.two.weight": torch.ones(4, 2)},
        "keys of 2 adapters, one, two; expected one",
    ),
    "quantised": ({"a.query.absmax": torch.ones(4)}, "quantised weights"),
    "stray": ({"a.query.weight_2": torch.ones(4)}, "a.query.weight_2: not a key of a PEFT"),
    "alpha": ({"a.query.alpha": torch.ones(())}, "a.query.alpha: not a key of a PEFT"),
    "two of the kind": (
        {"a.query.lora_embedding_A": torch.ones(2, 5), "a.query.lora_embedding_B": torch.ones(4, 2)},
        "name one module twice",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSOR_REFUSALS)
def test_refused_tensors(case, plain):
    tensors, message = TENSOR_REFUSALS[case]
    folder = plain(tensors=tensors)
    with pytest.raises(AdapterError, match=message) as error:
        load_adapter(folder)
    assert str(folder / WEIGHTS) in str(error.value)


KOHYA_REFUSALS = {
    "dora_scale": "DoRA", "oft_blocks": "OFT",
    "diff": "full weight differences", "diff_b": "full weight differences", "norm": "not a key",
}  # fmt: skip


@pytest.mark.parametrize("suffix", KOHYA_REFUSALS)
def test_refused_kohya_keys(tmp_path, suffix):
    path = tmp_path / "k.safetensors"
    tensors, _ = kohya_file(path)
    save_file(tensors | {f"lora_unet_conv.{suffix}": torch.ones(2)}, path)
    with pytest.raises(AdapterError, match=f"lora_unet_conv.{suffix}: .*{KOHYA_REFUSALS[suffix]}"):
        load_adapter(path)


@pytest.mark.parametrize("alpha", [torch.tensor(0.0), torch.ones(2), torch.tensor(float("nan")), torch.tensor(True)])
def test_refused_kohya_alpha(tmp_path, alpha):
    path = tmp_path / "k.safetensors"
    tensors, _ = kohya_file(path)
    save_file(tensors | {"lora_unet_conv.alpha": alpha}, path)
    with pytest.raises(AdapterError, match="lora_unet_conv(.alpha|: alpha) .*expected"):
        load_adapter(path)


def test_scale_that_overflows(tmp_path):
    path = tmp_path / "k.safetensors"
    tensors, _ = kohya_file(path)
    save_file(tensors | {"lora_unet_conv.alpha": torch.tensor(1e300, dtype=torch.float64)}, path)
    with pytest.raises(AdapterError, match="lora_unet_conv: scale 3.33333e.299 times .* overflows torch.float32"):
        load_adapter(path)


VARIANTS = {
    "dora": ({"use_dora": True}, "use_dora"),
    "lora_bias": ({"lora_bias": True}, "lora_bias"),
    "bias": ({"bias": "all"}, "bias: a trained bias|bias and .* more: a trained bias"),
    "pissa": ({"init_lora_weights": "pissa"}, "pissa"),
    "olora": ({"init_lora_weights": "olora"}, "olora"),
    "tokens": ({"trainable_token_indices": {"word_embeddings": [0, 1]}}, "trainable_token_indices"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", VARIANTS)
def test_variants_that_peft_wrote_are_refused(case, make):
    options, message = VARIANTS[case]
    _, folder = make(bert, target_modules=["query"], **options)
    with pytest.raises(AdapterError, match=message):
        load_adapter(folder)
    # Even where the config keeps quiet about it, the keys do not; PiSSA and OLoRA leave no trace in them.
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in config.items() if k not in options}))
    if case in ("pissa", "olora"):
        load_adapter(folder)
    else:
        with pytest.raises(AdapterError, match="DoRA|lora_bias|bias|trainable_token_indices"):
            load_adapter(folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["VeraConfig", "IA3Config"])
def test_other_methods_are_refused_by_name(kind, tmp_path):
    import peft

    options = {"feedforward_modules": []} if kind == "IA3Config" else {}
    config = getattr(peft, kind)(target_modules=["query"], **options)
    peft.get_peft_model(bert(), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="peft_type is .*, expected 'LORA'"):
        load_adapter(tmp_path)


def test_pickles_are_refused_with_the_reason(plain, tmp_path):
    folder = plain()
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "adapter_model.bin")
    for path in (folder, folder / "adapter_model.bin", tmp_path / "lora.pt", tmp_path / "x.CKPT"):
        with pytest.raises(AdapterError, match="a pickle can run code"):
            load_adapter(path)


def test_missing_files(plain, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError, match="expected adapter_config.json and adapter_model.safetensors"):
        load_adapter(tmp_path / "empty")
    with pytest.raises(AdapterError, match="nowhere"):
        load_adapter(tmp_path / "nowhere")
    with pytest.raises(AdapterError, match="nowhere.safetensors"):
        load_adapter(tmp_path / "nowhere.safetensors")
    folder = plain("snapshot/task") if (tmp_path / "snapshot").mkdir() is None else None
    (tmp_path / "hub" / "snapshots").mkdir(parents=True)
    folder.rename(deep := tmp_path / "hub" / "snapshots" / "0f3a")
    assert load_adapter(tmp_path / "hub").source == str(deep / WEIGHTS)
    shutil.copytree(deep, tmp_path / "hub" / "other")
    with pytest.raises(AdapterError, match="2 inside, name one: other, snapshots/0f3a"):
        load_adapter(tmp_path / "hub")
    folder = deep
    (folder / CONFIG).unlink()
    for path in (folder, folder / WEIGHTS):
        with pytest.raises(AdapterError, match="a.query: expected adapter_config.json beside it"):
            load_adapter(path)


def test_empty_adapter(plain, tmp_path):
    folder = plain(tensors={"classifier.weight": torch.ones(2, 2)}, modules_to_save=["classifier"])
    save_file({"base_model.model.classifier.weight": torch.ones(2, 2)}, folder / WEIGHTS)
    for weights in ({"base_model.model.classifier.weight": torch.ones(2, 2)}, {}):
        save_file(weights, folder / WEIGHTS)
        with pytest.raises(AdapterError, match="an empty adapter"):
            load_adapter(folder)
    with pytest.raises(AdapterError, match="an empty adapter"):
        save_adapter(Adapter({}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_formats_in_one_file(tmp_path):
    tensors, _ = kohya_file(tmp_path / "k.safetensors")
    save_file(tensors | {"unet.x.lora_A.weight": torch.ones(2, 2)}, tmp_path / "k.safetensors")
    with pytest.raises(AdapterError, match="expected keys of one format, got kohya and peft"):
        load_adapter(tmp_path / "k.safetensors")


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff\xfe", '{"peft_type":' * 5000, "nul\0"])
def test_config_that_is_not_json(plain, text):
    folder = plain()
    (folder / CONFIG).write_bytes(text.encode("latin-1"))
    with pytest.raises(AdapterError, match="adapter_config.json: (not JSON|expected a JSON object)"):
        load_adapter(folder)


def test_damaged_files_end_in_one_kind_of_error(plain):
    """Truncations, flipped bytes and hostile headers: an AdapterError or an adapter, nothing else."""
    folder = plain()
    whole = (folder / WEIGHTS).read_bytes()
    for length in [0, 4, 8, 9, 60, len(whole) // 2, len(whole) - 1]:
        (folder / WEIGHTS).write_bytes(whole[:length])
        with pytest.raises(AdapterError, match="adapter_model.safetensors: not a readable safetensors file"):
            load_adapter(folder)
    huge = b'{"x.lora_A.weight":{"dtype":"F32","shape":[9000000000,9000000000],"data_offsets":[0,8]}}'
    for header in [huge, b"{" * 4000, b"[]", b'{"__metadata__":{"a":1}}', b'{"a":null}']:
        (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
        with pytest.raises(AdapterError):
            load_adapter(folder)
    (folder / WEIGHTS).write_bytes((2**62).to_bytes(8, "little") + whole[8:])
    with pytest.raises(AdapterError):
        load_adapter(folder)
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        at = int(torch.randint(len(whole), (), generator=generator))
        damaged[at] ^= int(torch.randint(1, 256, (), generator=generator))
        (folder / WEIGHTS).write_bytes(damaged)
        try:
            load_adapter(folder)
        except AdapterError:
            refused += 1
    assert 100 < refused < 300


def test_config_with_text_that_utf8_cannot_hold(plain, tmp_path):
    adapter = load_adapter(plain(base_model_name_or_path="\ud800", task="naïve"))
    save_adapter(adapter, tmp_path / "out")
    assert load_adapter(tmp_path / "out").config == adapter.config


def test_keys_without_the_peft_prefix(plain):
    """As an injected model writes them; read alike, and refused alike."""
    folder = plain()
    expected = load_adapter(folder).modules["a.query"].left.clone()
    bare = {k.removeprefix("base_model.model."): v.clone() for k, v in load_file(folder / WEIGHTS).items()}
    save_file(bare, folder / WEIGHTS)
    assert load_adapter(folder).modules["a.query"].left.equal(expected)
    save_file(bare | {"a.query.alpha": torch.ones(())}, folder / WEIGHTS)
    with pytest.raises(AdapterError, match="a.query.alpha: not a key of a PEFT"):
        load_adapter(folder)


# -- writing safely ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["peft", "kohya"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("fail_at", [1, 2, 4])
def test_failed_write_leaves_nothing(plain, tmp_path, monkeypatch, format, error, fail_at):
    adapter = load_adapter(plain(auto_mapping={"base_model_class": "CLIPTextModel"}))
    target = tmp_path / "out" / ("a" if format == "peft" else "a.safetensors")
    write = module.write_bytes

    def failing(path, blocks):
        def some():
            for i, block in enumerate(blocks):
                if i == fail_at or path.name.startswith("." + CONFIG):
                    raise error
                yield block

        write(path, some())

    def attempt(**options):
        with monkeypatch.context() as patch:
            patch.setattr(module, "write_bytes", failing)
            with pytest.raises(type(error)):
                save_adapter(adapter, target, format=format, **options)

    attempt()
    assert files(tmp_path / "out") == {} and not target.exists() and not list((tmp_path / "out").iterdir())
    save_adapter(adapter, target, format=format)
    before = files(tmp_path / "out")
    changed = adapter.with_modules({name: u * 3 for name, u in adapter.modules.items()})
    adapter = changed
    attempt(overwrite=True)
    assert files(tmp_path / "out") == before
    save_adapter(adapter, target, format=format, overwrite=True)
    assert files(tmp_path / "out").keys() == before.keys()
    name = next(iter(load_adapter(target).modules))
    old = next(iter(changed.modules.values()))
    torch.testing.assert_close(load_adapter(target).modules[name].delta(), old.delta())


def test_existing_outputs_are_kept(plain, tmp_path):
    adapter = load_adapter(plain(auto_mapping={"base_model_class": "CLIPTextModel"}))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "README.md").write_text("mine")
    save_adapter(adapter, folder)  # beside what is there
    assert (folder / "README.md").read_text() == "mine"
    before = files(folder)
    for path, format in [(folder, "peft"), (tmp_path / "k.safetensors", "kohya")]:
        if format == "kohya":
            save_adapter(adapter, path, format)
        with pytest.raises(AdapterError, match="exists already, and overwriting is not asked for"):
            save_adapter(adapter, path, format)
    assert files(folder) == before
    with pytest.raises(AdapterError, match="a PEFT adapter is a folder"):
        save_adapter(adapter, tmp_path / "k.safetensors", "peft", overwrite=True)
    with pytest.raises(AdapterError, match="ending in .safetensors"):
        save_adapter(adapter, tmp_path / "k.bin", "kohya")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(AdapterError, match="adapter_model.bin exists already"):
        save_adapter(adapter, tmp_path / "old")


def test_saving_over_the_file_it_came_from(plain):
    """The tensors are mapped from the file that is being replaced."""
    folder = plain()
    adapter = load_adapter(folder)
    expected = {name: u.delta().clone() for name, u in adapter.modules.items()}
    save_adapter(adapter.with_modules({n: u * 2 for n, u in adapter.modules.items()}), folder, overwrite=True)
    for name, delta in expected.items():
        assert adapter.modules[name].delta().equal(delta)
        torch.testing.assert_close(load_adapter(folder).modules[name].delta(), 2 * delta)


def test_same_input_same_bytes(tmp_path):
    kohya_file(tmp_path / "in.safetensors")
    adapter = load_adapter(tmp_path / "in.safetensors")
    for name, order in (("1", 1), ("2", -1)):  # the order of a dict is no input
        turned = adapter.regauge(seed=3)
        modules, metadata = (dict(list(d.items())[::order]) for d in (turned.modules, turned.metadata))
        save_adapter(replace(turned, modules=modules, metadata=metadata), tmp_path / f"{name}.safetensors")
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()
    with safe_open(tmp_path / "1.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(load_file(tmp_path / "1.safetensors"))


def test_values_that_do_not_fit_the_dtype_asked_for(plain, tmp_path):
    adapter = load_adapter(plain())
    large = adapter.with_modules({n: u * 1e12 for n, u in adapter.modules.items()})
    with pytest.raises(AdapterError, match="a.query.lora_A.weight is not finite in torch.float16"):
        save_adapter(large, tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()
    save_adapter(large, tmp_path / "out", dtype=torch.bfloat16)
    save_adapter(
        adapter.with_modules({n: u * 1e6 for n, u in adapter.modules.items()}), tmp_path / "half", dtype=torch.float16
    )
    for name, update in load_adapter(tmp_path / "half").items():  # which two factors of like size have room for
        torch.testing.assert_close(update.wide().delta(), 1e6 * adapter[name].delta(), rtol=3e-3, atol=1e4)
    with pytest.raises(AdapterError, match="dtype is torch.int8, expected float64"):
        save_adapter(adapter, tmp_path / "int", dtype=torch.int8)


# -- the adapter itself --------------------------------------------------------------------------------------


def test_norm_and_regauge(plain):
    adapter = load_adapter(plain())
    dense = torch.cat([u.delta().flatten() for u in adapter.modules.values()])
    assert adapter.norm() == pytest.approx(float(dense.norm()), rel=1e-6)
    turned = adapter.regauge(seed=1)
    for name, update in adapter.modules.items():
        assert (turned.modules[name].left - update.left).abs().max() > 0.1
        torch.testing.assert_close(turned.modules[name].delta(), update.delta(), rtol=1e-4, atol=1e-5)
    again, other = adapter.regauge(seed=1), adapter.regauge(seed=2)
    assert again.modules["a.query"].left.equal(turned.modules["a.query"].left)
    assert not other.modules["a.query"].left.equal(turned.modules["a.query"].left)


def test_a_file_is_an_adapter_too(plain):
    folder = plain()
    assert load_adapter(folder / WEIGHTS).modules["a.query"].left.equal(load_adapter(folder).modules["a.query"].left)
    assert "2 modules, rank [2]" in repr(load_adapter(str(folder)))


def test_combine(plain):
    one = load_adapter(plain("one"))
    two = load_adapter(plain("two", base_model_name_or_path="/data/Base/"))
    both = combine([one, two], one.modules | {"new": one.modules["a.query"]})
    assert set(both.modules) == {"a.query", "b.value", "new"} and both.base_model == "org/base"
    other = load_adapter(plain("other", base_model_name_or_path="org/other"))
    with pytest.raises(
        AdapterError, match=r"one/\S+ and \S+other/\S+: expected one base model, got org/base and org/other"
    ):
        combine([one, other], one.modules)
    unknown = load_adapter(plain("unknown", base_model_name_or_path=None))
    assert combine([one, unknown], one.modules).base_model == "org/base"


def test_combine_kinds(tmp_path, plain):
    kohya_file(tmp_path / "a.safetensors")
    conv = load_adapter(tmp_path / "a.safetensors")
    linear = conv.with_modules({"lora_unet_down_to_q": conv.modules["lora_unet_down_to_q"]})
    merged = combine([Adapter(linear.modules, format="kohya", dtype=torch.float16), conv], conv.modules)
    assert merged.kinds == conv.kinds and merged.dtype == torch.float32
    twisted = Adapter(conv.modules, format="kohya")  # the conv modules as if they were linear
    with pytest.raises(AdapterError, match="lora_te1_proj: expected one kind of layer"):
        combine([conv, twisted], conv.modules)
    with pytest.raises(AdapterError, match="expected one format, got kohya and peft"):
        combine([conv, load_adapter(plain())], conv.modules)


def test_full_tensors_that_are_carried():
    """modules_to_save by the end of a module's name, as in peft; embeddings that peft writes unasked."""
    for key, carried in {
        "head.dense.weight": True, "m.my_head.bias": True, "m.header.weight": False, "m.embed_tokens.weight": True,
        "m.embed_tokens.bias": False, "m.q.base_layer.weight": True, "m.k.base_layer.weight": False,
    }.items():  # fmt: skip
        name = peft.carried(f"base_model.model.{key}", ["head", ""], {"m.q": {}})
        assert name == (key if carried else None), key


def test_combine_full_tensors(plain):
    def adapter(folder, value):
        extra = {"classifier.weight": torch.full((2, 2), value)} if value else {}
        return load_adapter(plain(folder, tensors=extra, modules_to_save=["classifier"]))

    one, same, other, none = adapter("1", 1.0), adapter("2", 1.0), adapter("3", 2.0), adapter("4", None)
    assert combine([one, same], one.modules).saved["classifier.weight"].equal(torch.ones(2, 2))
    for pair in ([one, other], [one, none], [none, one]):
        with pytest.raises(AdapterError, match="classifier.weight: expected one full tensor"):
            combine(pair, one.modules)


@pytest.mark.filterwarnings("ignore")
def test_a_head_tied_by_peft_is_merged_as_it_is(tmp_path):
    """`ensure_weight_tying` of one adapter would fill the merged head from the embedding."""
    from peft import LoraConfig, get_peft_model

    base, folders, alone = llama(tie_word_embeddings=True), [], []
    for i, tied in enumerate((True, False)):
        torch.manual_seed(i)
        options = {"target_modules": ["embed_tokens"], "ensure_weight_tying": tied, "r": 3}
        model = get_peft_model(copy.deepcopy(base), LoraConfig(**options))
        for name, x in model.named_parameters():
            x.data = torch.randn_like(x) * 0.2 if "lora_" in name else x.data
        model.save_pretrained(tmp_path / str(i))
        folders.append(tmp_path / str(i))
        alone.append(logits(model))
    for order, weights, expected in (((0, 1), [1, 0], 0), ((0, 1), [0, 1], 1), ((1, 0), [0, 1], 0), ((0,), [1], 0)):
        merged = merge([folders[i] for i in order], "cat", weights=weights)
        save_adapter(merged, tmp_path / "m", overwrite=True)
        found = logits(with_peft(base, tmp_path / "m"))
        torch.testing.assert_close(found, alone[expected], rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_parameters_of_linear_layers_are_written_as_layers(tmp_path):
    """peft takes a weight from `target_modules` or from `target_parameters`, and refuses one that is in both."""
    from peft import LoraConfig, get_peft_model

    base = llama()
    config = LoraConfig(r=3, target_modules=[], target_parameters=["q_proj.weight", "v_proj.weight"])
    model = get_peft_model(copy.deepcopy(base), config)
    for name, x in model.named_parameters():
        x.data = torch.randn_like(x) * 0.2 if "lora_" in name else x.data
    model.save_pretrained(tmp_path / "a")
    save_adapter(merge(tmp_path / "a", method="cat", rank=3), tmp_path / "m")
    found = logits(with_peft(base, tmp_path / "m"))
    torch.testing.assert_close(found, logits(model), rtol=0, atol=1e-4)
    assert (found - logits(base)).abs().max() > 1e-2
