"""`fuse`: a base model with an adapter in it; against peft's merge_and_unload, transformers, and plain tensors."""

import json
import subprocess
import sys

import peft
import pytest
import torch
import transformers
from by_hand import CONFIG, PREFIX, WEIGHTS, run, tensors_of
from safetensors.torch import load_file, save_file

import lora_opcm as lo
from lora_opcm.files import fuse

IDS = torch.arange(12).reshape(2, 6)
SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip


@pytest.fixture
def said(capsys, monkeypatch, tmp_path):
    return lambda *words, code=0: run(capsys, monkeypatch, tmp_path, *words, code=code)


def llama(**options):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | {"tie_word_embeddings": False} | options))


def gpt2(**options):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16, **options)
    return transformers.GPT2LMHeadModel(config)


def mixtral():
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.3)
    return transformers.MixtralForCausalLM(config)


def trained(folder, model, targets, seed=0, **options):
    """An adapter as peft writes it, on a copy of what `model()` makes."""
    found = peft.get_peft_model(
        model(), peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, **options)
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    for name, x in found.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            x.data = torch.randn(x.shape, generator=generator) / 4
    found.save_pretrained(folder)


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def read(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def by_peft(base, adapter):
    return peft.PeftModel.from_pretrained(read(base), adapter).merge_and_unload()


CASES = {
    "llama": (llama, ["q_proj", "down_proj"], {}),
    "embeddings": (llama, ["q_proj", "embed_tokens", "lm_head"], {}),
    "a trained head": (llama, ["q_proj"], {"modules_to_save": ["lm_head"]}),
    "tied": (lambda: llama(tie_word_embeddings=True), ["q_proj", "v_proj"], {}),
    "gpt2": (gpt2, ["c_attn", "c_fc", "c_proj"], {"fan_in_fan_out": True}),
    "a router": (mixtral, ["q_proj", "gate"], {}),  # whose files have it as block_sparse_moe.gate
}


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_fused_model_is_that_of_peft(said, tmp_path, case, shards):
    model, targets, options = CASES[case]
    model().save_pretrained(tmp_path / "base", max_shard_size="4KB" if shards else "1GB")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    (tmp_path / "base" / "pytorch_model.bin").write_text("a pickle")
    trained(tmp_path / "a", model, targets, **options)
    told = said("fuse", "a", "--base", "base", "-o", "out/fused").err
    assert f"wrote out/fused: {len(lo.load_adapter(tmp_path / 'a')) + bool(case == 'a trained head')} of" in told
    fused, expected = logits(read(tmp_path / "out" / "fused")), logits(by_peft(tmp_path / "base", tmp_path / "a"))
    torch.testing.assert_close(fused, expected, rtol=0, atol=1e-4)
    assert (expected - logits(read(tmp_path / "base"))).abs().max() > 0.05
    base = {p.name: p for p in (tmp_path / "base").iterdir() if p.suffix != ".bin"}
    files = {p.name: p for p in (tmp_path / "out" / "fused").iterdir()}
    assert files.keys() == base.keys() and (len(files) > 8) == shards
    for name, path in base.items():
        same = path.read_bytes() == files[name].read_bytes()
        assert same or path.suffix == ".safetensors", name
        assert path.stat().st_size == files[name].stat().st_size


def test_a_merge_fused(said, tmp_path):
    """Two adapters merged, then fused, are the two put in one after the other."""
    llama().save_pretrained(tmp_path / "base")
    for seed, name in enumerate("ab"):
        trained(tmp_path / name, llama, ["q_proj", "up_proj"], seed)
    said("merge", "a", "b", "-o", "m", "--method", "cat")
    said("fuse", "m", "--base", "base", "-o", "fused")
    model = by_peft(tmp_path / "base", tmp_path / "a")
    model.save_pretrained(tmp_path / "with a")
    expected = logits(by_peft(tmp_path / "with a", tmp_path / "b"))
    torch.testing.assert_close(logits(read(tmp_path / "fused")), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_of_the_base_stays_and_is_rounded_to_once(said, tmp_path, dtype):
    llama().to(dtype).save_pretrained(tmp_path / "base")
    trained(tmp_path / "a", llama, ["q_proj"])
    said("fuse", "a", "--base", "base", "-o", "fused")
    base, fused = (load_file(tmp_path / n / "model.safetensors") for n in ("base", "fused"))
    adapter = lo.load_adapter(tmp_path / "a")
    for key, x in base.items():
        name = key.removesuffix(".weight")
        assert fused[key].dtype == x.dtype
        if name not in adapter:
            assert torch.equal(fused[key], x)
            continue
        exact = x.double() + adapter[name].left.double() @ adapter[name].right.double()
        off = (fused[key].double() - exact).abs() / exact.abs().clamp_min(torch.finfo(dtype).tiny)
        assert off.max() < (1e-12 if dtype == torch.float64 else torch.finfo(dtype).eps * 0.51)


def test_blocks_of_rows(tmp_path, monkeypatch):
    """Whatever the size of a block, the same numbers to rounding; a trained tensor and an update of one weight."""
    torch.manual_seed(0)
    base = {"a.weight": torch.randn(7, 5), "b.weight": torch.randn(4, 3, 2, 2), "c.bias": torch.randn(5),
            "d": torch.tensor(2.0), "e.weight": torch.empty(0, 3)}  # fmt: skip
    save_file(base, tmp_path / "base.safetensors", metadata={"format": "pt"})
    full = {"a.base_layer.weight": torch.randn(7, 5), "c.bias": torch.randn(5), "d": torch.tensor(3.0)}
    updates = {n: lo.LowRank(torch.randn(m, 2), torch.randn(2, n_)) for n, m, n_ in (("a", 7, 5), ("b", 4, 12))}
    adapter = lo.Adapter(updates, saved=full, kinds={"b": lo.files.Kind("conv", (2, 2))})
    for block in (1, 11, 10**6):
        monkeypatch.setattr(sys.modules[fuse.__module__], "BLOCK", block)
        path = tmp_path / f"{block}.safetensors"
        assert fuse(adapter, tmp_path / "base.safetensors", path) == (4, 5)
        found = load_file(path)
        torch.testing.assert_close(found["a.weight"], full["a.base_layer.weight"] + updates["a"].delta())
        torch.testing.assert_close(found["b.weight"], base["b.weight"] + updates["b"].delta().reshape(4, 3, 2, 2))
        assert torch.equal(found["c.bias"], full["c.bias"]) and found["d"] == 3 and found["e.weight"].shape == (0, 3)


def test_names_of_kohya_on_a_file_of_another_spelling(said, tmp_path):
    torch.manual_seed(0)
    block = "model.diffusion_model.input_blocks.4.1"
    names = {"lora_unet_input_blocks_4_1_proj_in": f"{block}.proj_in",
             "lora_unet_down_blocks_1_attentions_0_proj_out": f"{block}.proj_out"}  # fmt: skip
    base = {f"{n}.weight": torch.randn(6, 5, 1, 1) for n in names.values()} | {"first_stage_model.x": torch.randn(3)}
    save_file(base, tmp_path / "base.safetensors")
    up, down = torch.randn(6, 2), torch.randn(2, 5)
    save_file({f"{n}.lora_{x}.weight": t.clone() for n in names for x, t in (("up", up), ("down", down))},
              tmp_path / "k.safetensors")  # fmt: skip
    told = said("fuse", "k.safetensors", "--base", "base.safetensors", "-o", "out.safetensors").err
    assert "lora_unet_down_blocks_1_attentions_0_proj_out and 1 more under the base's names: model.diff" in told
    found = load_file(tmp_path / "out.safetensors")
    for key in base:
        more = (up @ down).reshape(6, 5, 1, 1) if "proj" in key else 0
        torch.testing.assert_close(found[key], base[key] + more)


def test_two_spellings_of_one_layer_are_refused(said, tmp_path):
    save_file({"model.layers.0.q.weight": torch.ones(3, 3)}, tmp_path / "base.safetensors")
    save_file({f"{n}.lora_{x}.weight": torch.ones(3, 3) for n in ("layers.0.q", "model.layers.0.q") for x in "AB"},
              tmp_path / "a.safetensors")  # fmt: skip
    told = said("fuse", "a.safetensors", "--base", "base.safetensors", "-o", "x.safetensors", code=2).err
    assert "layers.0.q and model.layers.0.q are one layer of the base, model.layers.0.q.weight" in told


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    trained(tmp_path / "a", llama, ["q_proj"])
    return tmp_path / "base", tmp_path / "a"


def refused(said, tmp_path, *words):
    before = sorted(p for p in tmp_path.rglob("*"))
    told = said("fuse", *words, code=2).err
    assert sorted(p for p in tmp_path.rglob("*")) == before and told.count("error: ") == 1
    return told


def test_a_module_that_the_base_lacks(said, tmp_path, two):
    trained(tmp_path / "b", lambda: llama(num_hidden_layers=3), ["q_proj"])
    told = refused(said, tmp_path, "b", "--base", "base", "-o", "x")
    assert "model.layers.2.self_attn.q_proj: not in the base, expected the model the adapter is of" in told
    said("fuse", "b", "--base", "base", "-o", "x", "--drop", "*.2.*")
    trained(tmp_path / "c", lambda: llama(hidden_size=32), ["q_proj"])
    told = refused(said, tmp_path, "c", "--base", "base", "-o", "y")
    assert "q_proj is an update (32, 32), model.safetensors has it as (16, 16)" in told


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_tied_embeddings(said, tmp_path, target):
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    trained(tmp_path / "a", llama, ["q_proj", target])
    told = refused(said, tmp_path, "a", "--base", "base", "-o", "x")
    assert ("the base ties its output to its embeddings" if target == "embed_tokens" else "(tied to the") in told
    if target == "embed_tokens":  # a file has its config beside it
        told = refused(said, tmp_path, "a", "--base", "base/model.safetensors", "-o", "x.safetensors")
        assert "the base ties its output to its embeddings" in told
    module = {"embed_tokens": "model.embed_tokens"}.get(target, target)
    said("fuse", "a", "--base", "base", "-o", "x", "--drop", module)  # with what peft saved of the base


@pytest.mark.parametrize("targets", [["attn.c_proj", "lm_head"], ["lm_head", "attn.c_proj"], ["c_fc", "c_attn"]])
def test_the_layer_says_how_a_weight_lies(said, tmp_path, targets):
    """peft saves one `fan_in_fan_out` of layers of both kinds, true or not, and goes by the layer where it loads."""
    gpt2(tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    trained(tmp_path / "a", lambda: gpt2(tie_word_embeddings=False), targets)
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    for flag in (False, True):
        (tmp_path / "a" / CONFIG).write_text(json.dumps(config | {"fan_in_fan_out": flag}))
        said("fuse", "a", "--base", "base", "-o", f"x{flag}")
        theirs, ours = by_peft(tmp_path / "base", tmp_path / "a").state_dict(), read(tmp_path / f"x{flag}").state_dict()
        assert all(torch.allclose(x, theirs[name], atol=1e-6) for name, x in ours.items())


def test_a_layer_that_lies_the_other_way(said, tmp_path):
    """Where no bias tells which side are the outputs."""
    llama().save_pretrained(tmp_path / "base")
    trained(tmp_path / "a", llama, ["up_proj"])
    file = tmp_path / "base" / "model.safetensors"
    save_file({k: x.mT.contiguous() if "up_proj" in k else x for k, x in load_file(file).items()}, file)
    told = refused(said, tmp_path, "a", "--base", "base", "-o", "x")
    assert "up_proj is an update (24, 16), model.safetensors has it as (16, 24); fan_in_fan_out is False, which" in told


def test_what_is_no_base(said, tmp_path, two):
    base, _ = two
    tensors = load_file(base / "model.safetensors")
    key = "model.layers.0.self_attn.q_proj.weight"

    def changed(name, **files):
        (tmp_path / name).mkdir()
        for file, content in files.items():
            save_file(content, tmp_path / name / f"{file}.safetensors")

    changed("eight", model=tensors | {key: tensors[key].to(torch.float8_e4m3fn)})
    changed("both", model=tensors, other=tensors)
    changed("pipe")
    for part in ("unet", "text_encoder"):
        (tmp_path / "pipe" / part).mkdir()
        (tmp_path / "pipe" / part / "config.json").write_text("{}")
    (tmp_path / "bad.safetensors").write_bytes(b"\x00" * 40)
    save_file({PREFIX + key: tensors[key]}, tmp_path / "model-00001-of-00002.safetensors")
    (tmp_path / "there").mkdir()
    for name, message in {
        "eight": "q_proj.weight is F8_E4M3 (quantised?) in the base",
        "both": "expected the weights of one model in .safetensors files; there are model.safetensors, other",
        "pipe": "there are text_encoder/, unet/: name one",
        "none": "expected a folder of a model, or a .safetensors file",
        "bad.safetensors": "not a readable safetensors file",
        "model-00001-of-00002.safetensors": "one part of a model in several files",
    }.items():
        assert message in refused(said, tmp_path, "a", "--base", name, "-o", "x.safetensors"), name
    assert "there: exists already" in refused(said, tmp_path, "a", "--base", "base", "-o", "there")
    assert "base: exists already" in refused(said, tmp_path, "a", "--base", "base", "-o", "base")


def test_a_key_in_two_files(said, tmp_path, two):
    base, _ = two
    tensors, names = load_file(base / "model.safetensors"), [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    (tmp_path / "twice").mkdir()
    for name in names:
        save_file(tensors, tmp_path / "twice" / name)
    places = {key: names[i % 2] for i, key in enumerate(tensors)}
    (tmp_path / "twice" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    told = refused(said, tmp_path, "a", "--base", "twice", "-o", "x")
    assert f"{names[1]}: lm_head.weight and 20 more is in {names[0]}, too" in told


def test_what_overflows_leaves_nothing(said, tmp_path, two):
    base, adapter = two
    llama().half().save_pretrained(tmp_path / "half")
    save_file({k: t * 1e4 for k, t in tensors_of(adapter).items()}, adapter / WEIGHTS)
    told = refused(said, tmp_path, "a", "--base", "half", "-o", "x")
    assert "q_proj.weight with the update is not finite in torch.float16" in told


PROGRAM = """
import re
from lora_opcm.files import fuse, load_adapter
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
for size in ("small", "large"):  # the first for what torch itself takes
    before, adapter = peak(), load_adapter(f"{size}-a.safetensors")
    fuse(adapter, f"{size}.safetensors", f"{size}-fused.safetensors")
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the peak")
def test_the_base_is_never_in_memory(tmp_path):
    """A base of 160 MB, half of it in one weight that changes: the process grows by less than a quarter of that."""
    name, width = "model.layers.0.q", 2048
    for size, rows in (("small", 4), ("large", 2**14 + 2**12)):
        header, end = {}, 0
        for key in (f"{name}.weight", "model.embed.weight"):
            header[key] = {"dtype": "F16", "shape": [rows, width], "data_offsets": [end, end + 2 * rows * width]}
            end += 2 * rows * width
        text = json.dumps(header).encode()
        with open(tmp_path / f"{size}.safetensors", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)  # zeros that take no room on the disk
        factors = {f"{name}.lora_B.weight": torch.ones(rows, 1), f"{name}.lora_A.weight": torch.ones(1, width)}
        save_file(factors, tmp_path / f"{size}-a.safetensors")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert (tmp_path / "large-fused.safetensors").stat().st_size == 8 + len(text) + end > 1.6e8
    assert int(done.stdout) < end / 4
