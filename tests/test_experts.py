"""LoRA on the experts of a mixture (`target_parameters`), merged expert by expert; against peft and its models."""

import json
import sys
from copy import deepcopy

import numpy as np
import peft
import pytest
import torch
import transformers
from by_hand import CONFIG, PREFIX, WEIGHTS, gap, opcm, random_factors, run, tensors_of, write_peft
from safetensors.torch import load_file, save_file

import lora_opcm as lo
from lora_opcm.files import AdapterError
from lora_opcm.merging.shards import join, merge_shard

pytestmark = pytest.mark.filterwarnings("ignore")
HOME = "model.layers.{}.mlp.experts"
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
IDS = torch.arange(12).reshape(2, 6)


@pytest.fixture
def said(capsys, monkeypatch, tmp_path):
    return lambda *words, code=0: run(capsys, monkeypatch, tmp_path, *words, code=code)


def small(kind):
    """A tiny random model of four experts; those of gpt-oss lie (experts, in, out), the others (experts, out, in)."""
    common = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 2, "num_experts_per_tok": 2, "intermediate_size": 24}  # fmt: skip
    config = {
        "mixtral": lambda: transformers.MixtralConfig(**common, num_local_experts=4),
        "qwen": lambda: transformers.Qwen3MoeConfig(**common, num_experts=4, moe_intermediate_size=12, head_dim=8),
        "gpt-oss": lambda: transformers.GptOssConfig(**common, num_local_experts=4, head_dim=8),
    }[kind]()
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def trained(folder, model, seed, r=3, **options):
    """An adapter as peft writes it; what its wrappers add to the parameters (E, …) and the layers, by name."""
    options = {"lora_alpha": 5, "target_modules": ["q_proj"], "target_parameters": BOTH} | options
    model = peft.get_peft_model(deepcopy(model), peft.LoraConfig(r=r, **options))
    generator = torch.Generator().manual_seed(seed)
    for name, x in model.named_parameters():
        if "lora_" in name:
            x.data = torch.randn(x.shape, generator=generator) / 8
    model.save_pretrained(folder)
    model = model.merge_and_unload()
    return {name: x.detach().clone() for name, x in model.named_parameters()}


def added(before, *after):
    """The base with all that each of these models has more than it."""
    sums = deepcopy(before)
    for name, x in sums.named_parameters():
        x.data = x.data + sum(a[name] - x.data for a in after)
    return sums


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def opened(base, folder):
    return peft.PeftModel.from_pretrained(deepcopy(base), folder).eval()


@pytest.mark.parametrize("kind", ["mixtral", "qwen", "gpt-oss"])
def test_peft_loads_a_merge_with_the_right_logits(said, tmp_path, kind):
    base = small(kind)
    a = trained(tmp_path / "a", base, 1)
    b = trained(tmp_path / "b", base, 2, r=2, lora_alpha=3, use_rslora=True)
    said("merge", "a", "b", "-o", "m", "--method", "cat")
    expected = logits(added(base, a, b))
    torch.testing.assert_close(logits(opened(base, tmp_path / "m")), expected, rtol=0, atol=1e-4)
    assert (expected - logits(base)).abs().max() > 0.01  # the adapters do something
    attached = lo.attach(deepcopy(base), lo.load_adapter(tmp_path / "m"))
    torch.testing.assert_close(logits(attached), expected, rtol=0, atol=1e-4)
    said("resize", "m", "-o", "half", "--strength", "0.5")
    half = deepcopy(base)
    for name, x in half.named_parameters():
        x.data = x.data + (a[name] + b[name] - 2 * x.data) / 2
    torch.testing.assert_close(logits(opened(base, tmp_path / "half")), logits(half), rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"target_modules": []}, {"target_parameters": BOTH[1:]}])
def test_a_round_trip_keeps_every_byte(tmp_path, options):
    base = small("mixtral")
    trained(tmp_path / "a", base, 1, **options)
    adapter = lo.load_adapter(tmp_path / "a")
    adapter.save(tmp_path / "b")
    a, b = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    said = [json.loads((tmp_path / x / CONFIG).read_text()) for x in "ab"]
    assert said[0] == said[1]
    model = opened(base, tmp_path / "a")
    assert lo.from_peft(model).id == adapter.id


def test_each_expert_is_a_module(tmp_path):
    """ΔW of expert e is what peft adds to the parameter's entry e."""
    base = small("mixtral")
    parameters = dict(base.named_parameters())
    after = trained(tmp_path / "a", base, 1)
    adapter = lo.load_adapter(tmp_path / "a")
    assert len(adapter) == 2 + 2 * 2 * 4
    for layer in range(2):
        home = HOME.format(layer)
        for wrapper, name in ((f"{home}.base_layer", f"{home}.gate_up_proj"), (home, f"{home}.down_proj")):
            for e in range(4):
                update = adapter[f"{wrapper}.{e}"]
                assert update.rank == 3
                expected = (after[name] - parameters[name])[e]
                torch.testing.assert_close(update.delta(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ragged", [False, True])
def test_experts_are_merged_one_by_one(said, tmp_path, ragged):
    """OPCM of every expert alone, by dense matrices; states, shards and parts agree."""
    base = small("qwen")
    for name, seed in (("a", 1), ("b", 2)):
        trained(tmp_path / name, base, seed)
    ab = [lo.load_adapter(tmp_path / n) for n in "ab"]
    expected = opcm([{n: (u.left.double() @ u.right.double()).numpy() for n, u in a.items()} for a in ab])
    more = ["--ragged"] if ragged else []
    said("merge", "a", "b", "-o", "m", *more)
    said("add", "s", "a", "b")
    said("export", "s", "-o", "x", *more)
    for i in range(2):
        merge_shard([tmp_path / n for n in "ab"], tmp_path / f"part{i}", (i, 2), "opcm", ragged=ragged)
    join([tmp_path / f"part{i}" for i in range(2)])[0].save(tmp_path / "j")
    for folder in ("m", "x", "j"):
        found = lo.load_adapter(tmp_path / folder)
        assert gap({n: found.delta(n).double().numpy() for n in found}, expected) < 1e-5, folder
        loaded = opened(base, tmp_path / folder)
        assert torch.isfinite(logits(loaded)).all()
    assert said("verify", "a", "b", "--against", "m").out.count("the same") == 1


@pytest.mark.parametrize("words", [["--energy", 0.6, "--ragged"], ["--energy", 0.6], ["--rank", 2]])
def test_peft_reads_ranks_that_a_cut_made(said, tmp_path, words):
    base = small("mixtral")
    for seed, name in enumerate("ab"):
        trained(tmp_path / name, base, seed)
    said("merge", "a", "b", "-o", "m", "--method", "cat", *words)
    found, before = lo.load_adapter(tmp_path / "m"), dict(base.named_parameters())
    assert ("--ragged" in words) == bool(json.loads((tmp_path / "m" / CONFIG).read_text())["rank_pattern"])
    after = dict(opened(base, tmp_path / "m").merge_and_unload().named_parameters())
    for name, old in before.items():
        module, _, parameter = name.rpartition(".")
        wrapper = {"gate_up_proj": f"{module}.base_layer", "down_proj": module}.get(parameter)
        if wrapper and ".experts" in name:
            expected = torch.stack([found[f"{wrapper}.{e}"].delta() for e in range(4)])
        else:
            expected = found[module].delta() if module in found else torch.zeros_like(old)
        torch.testing.assert_close(after[name] - old, expected, rtol=1e-4, atol=1e-5)


def test_ranks_and_scales_of_two_parameters(tmp_path):
    """Ranks of the config that fit the factors in one way only tell the wrappers; others are refused."""
    base = small("mixtral")
    patterns = {"rank_pattern": {r".*\.gate_up_proj": 6}, "alpha_pattern": {r".*\.gate_up_proj": 7}}
    after = trained(tmp_path / "a", base, 1, **patterns)
    one = lo.load_adapter(tmp_path / "a")
    assert {one[f"{HOME.format(0)}{w}.0"].rank for w in ("", ".base_layer")} == {3, 6}
    lo.merge(one, method="cat").save(tmp_path / "m")
    torch.testing.assert_close(
        logits(opened(base, tmp_path / "m")), logits(added(base, after)), rtol=0, atol=1e-4
    )  # fmt: skip
    trained(tmp_path / "b", base, 1, alpha_pattern={r".*\.gate_up_proj": 7})
    with pytest.raises(AdapterError, match=r"mlp.experts: factors of 12, 12 rows for parameters \(down_proj rank 3"):
        lo.load_adapter(tmp_path / "b")


def test_other_parameters_are_refused_and_no_experts_are_not(said, tmp_path):
    base = small("qwen")  # down_proj and gate_up_proj of one shape would be taken for each other
    both = trained(tmp_path / "both", base, 1)
    trained(tmp_path / "down", base, 2, target_parameters=BOTH[1:])
    trained(tmp_path / "up", base, 2, target_parameters=BOTH[:1])
    for pair in (["both", "down"], ["down", "both"], ["up", "both"], ["up", "down"]):
        refused = said("merge", *pair, "-o", "m", code=2).err
        assert "expected LoRA on the same parameters of the experts (target_parameters), got" in refused
    none = trained(tmp_path / "none", base, 3, target_parameters=None)
    expected = logits(added(base, both, none))
    for pair in (["both", "none"], ["none", "both"]):
        said("merge", *pair, "-o", "m", "--method", "cat", "--overwrite")
        torch.testing.assert_close(logits(opened(base, tmp_path / "m")), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("pattern", ["*experts*", "*q_proj", "*.experts.base_layer.*", "*.experts.2", "*.1.mlp.*"])
def test_dropped_experts_are_zero(said, tmp_path, pattern):
    base = small("mixtral")
    after = trained(tmp_path / "a", base, 1)
    said("merge", "a", "-o", "m", "--method", "cat", "--drop", pattern)
    kept = {n: x.clone() for n, x in base.named_parameters()}
    for name, x in after.items():
        if pattern == "*.experts.2" and name.endswith("down_proj"):
            x[2] = kept[name][2]
        gone = {"*experts*": "experts" in name, "*q_proj": "q_proj" in name, "*.1.mlp.*": ".1.mlp." in name,
                "*.experts.base_layer.*": name.endswith("gate_up_proj")}  # fmt: skip
        kept[name] = kept[name] if gone.get(pattern) else x
    torch.testing.assert_close(logits(opened(base, tmp_path / "m")), logits(added(base, kept)), rtol=0, atol=1e-4)


def test_kohya_and_diffusers_hold_no_experts(said, tmp_path):
    trained(tmp_path / "a", small("mixtral"), 1)
    for format in ("kohya", "diffusers"):
        said("convert", "a", "-o", "x.safetensors", "--to", format, code=2)


# -- in a base model -----------------------------------------------------------------------------------------


def by_class(model, folder):
    """The model as its class holds it, experts in one parameter, which transformers writes only where asked."""
    model.save_pretrained(folder, save_original_format=False)


def fused(said, tmp_path, *words, base="base", adapter="a"):
    said("fuse", adapter, "--base", base, "-o", f"fused {adapter}", *words)
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"fused {adapter}", dtype="auto").eval()


@pytest.mark.parametrize("options", [{}, {"target_parameters": BOTH[1:], "use_rslora": True}], ids=["both", "down"])
@pytest.mark.parametrize("lies", ["as its class", "as its authors"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen", "gpt-oss"])
def test_a_fused_model_is_that_of_peft(said, tmp_path, monkeypatch, kind, lies, options):
    """Parameter by parameter, whatever the size of a block; gate and up apart where authors have them apart."""
    base = small(kind)
    (by_class if lies == "as its class" else lambda m, f: m.save_pretrained(f, max_shard_size="9KB"))(
        base, tmp_path / "base"
    )
    after = trained(tmp_path / "a", base, 1, **options)
    keys = {key for file in (tmp_path / "base").glob("*.safetensors") for key in load_file(file)}
    assert any(".experts.3." in key for key in keys) == (lies == "as its authors" and kind != "gpt-oss")
    monkeypatch.setattr(sys.modules["lora_opcm.files.fuse"], "BLOCK", 100)
    found = fused(said, tmp_path)
    for name, x in found.named_parameters():
        torch.testing.assert_close(x, after[name], rtol=1e-5, atol=1e-6)
    moved = [name for name, x in base.named_parameters() if (after[name] - x).abs().max() > 1e-3]
    assert len(moved) == 2 * (1 + (2 if not options else 1))


def test_dropped_experts_are_the_bytes_of_the_base(said, tmp_path):
    base = small("qwen")
    base.save_pretrained(tmp_path / "base")
    after = trained(tmp_path / "a", base, 1)
    found = fused(said, tmp_path, "--drop", "*.experts.base_layer.*", "--drop", "*.experts.2")
    before = dict(base.named_parameters())
    for name, x in found.named_parameters():
        expected = before[name].clone() if name.endswith("gate_up_proj") else after[name]
        if name.endswith("down_proj"):
            expected[2] = before[name][2]
        torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-6)


def test_what_shapes_do_not_tell_is_refused(said, tmp_path):
    """Square parameters alone, two of one shape, another number of experts, a name the base lacks."""
    rng = torch.Generator().manual_seed(0)

    def adapter(name, *sizes, parameters, experts=2):
        """Wrappers of one module, the last by its name, as peft nests them."""
        modules, kinds = {}, {}
        for i, (m, n) in enumerate(sizes):
            for e in range(experts):
                modules[f"m.experts{'.base_layer' * (len(sizes) - 1 - i)}.{e}"] = lo.LowRank(
                    torch.randn(m, 1, generator=rng), torch.randn(1, n, generator=rng)
                )
        kinds = dict.fromkeys(modules, lo.files.Kind("expert", (), experts, parameters))
        lo.files.save_adapter(lo.Adapter(modules, None, "peft", kinds), tmp_path / name)

    def refused(name, base, message):
        save_file(base, tmp_path / "base.safetensors")
        told = said("fuse", name, "--base", "base.safetensors", "-o", "x.safetensors", code=2).err
        assert message in told and "m.experts: updates of" in told and not (tmp_path / "x.safetensors").exists()

    whole = {f"m.experts.{p}": torch.zeros(2, m, n) for p, m, n in (("gate_up_proj", 8, 4), ("down_proj", 4, 4))}
    adapter("square", (4, 4), parameters=("down_proj",))
    refused("square", whole, "(4, 4), the base has down_proj (2, 4, 4), expected parameters that fit in one way only")
    adapter("two", (4, 4), (8, 4), parameters=("down_proj", "gate_up_proj"))
    save_file(whole, tmp_path / "base.safetensors")
    said("fuse", "two", "--base", "base.safetensors", "-o", "two.safetensors")  # one of them tells how both lie
    found, a = load_file(tmp_path / "two.safetensors"), lo.load_adapter(tmp_path / "two")
    for e in range(2):
        torch.testing.assert_close(found["m.experts.gate_up_proj"][e], a[f"m.experts.{e}"].delta())
        torch.testing.assert_close(found["m.experts.down_proj"][e], a[f"m.experts.base_layer.{e}"].delta())
    turned = {key: x.mT.contiguous() for key, x in whole.items()}
    save_file(turned, tmp_path / "base.safetensors")
    said("fuse", "two", "--base", "base.safetensors", "-o", "turned.safetensors")
    for key, x in load_file(tmp_path / "turned.safetensors").items():
        torch.testing.assert_close(x.mT, found[key])
    adapter("same", (8, 4), (8, 4), parameters=("gate_proj", "up_proj"))
    same = {f"m.experts.{p}": torch.zeros(2, 8, 4) for p in ("gate_proj", "up_proj")}
    refused("same", same, "gate_proj (2, 8, 4), up_proj (2, 8, 4), expected parameters that fit in one way only")
    adapter("three", (8, 4), parameters=("gate_up_proj",), experts=3)
    refused("three", whole, "3 experts (target_parameters), (8, 4), the base has gate_up_proj (2, 8, 4), expected")
    apart = {f"m.experts.{e}.{p}.weight": torch.zeros(4, 4) for e in range(2) for p in ("w1", "w3")}
    refused("three", apart, "the base has none of gate_up_proj")
    adapter("one", (8, 4), parameters=("gate_up_proj",), experts=1)
    refused("one", apart, "the base has none of gate_up_proj")  # and not the first of two experts
    twice = {f"{head}{key}": x.clone() for head in ("model.", "model.language_model.") for key, x in whole.items()}
    refused("two", twice, "m.experts: updates of 2 experts")


def test_a_layer_and_the_expert_that_it_is_are_refused(tmp_path):
    updates = {n: lo.LowRank(torch.ones(4, 1), torch.ones(1, 3)) for n in ("m.experts.0", "m.experts.0.w2")}
    adapter = lo.Adapter(updates, kinds={"m.experts.0": lo.files.Kind("expert", (), 1, ("down_proj",))})
    save_file({"m.experts.0.w2.weight": torch.zeros(4, 3)}, tmp_path / "base.safetensors")
    with pytest.raises(AdapterError, match="m.experts.0.w2: an update of m.experts.0.w2.weight, which has one of its"):
        lo.files.fuse(adapter, tmp_path / "base.safetensors", tmp_path / "x.safetensors")


def plain(folder, targets, modules=("q",), experts=0, r=2, **config):
    """A file by hand: a layer q and, at `experts`, a wrapper p of that many."""
    rng = np.random.default_rng(0)
    write_peft(folder, {"q": (rng.normal(size=(6, r)), rng.normal(size=(r, 5)))})
    tensors = tensors_of(folder)
    if experts:
        tensors |= {f"{PREFIX}p.lora_{x}.weight": torch.ones((6, experts * r) if x == "B" else (experts * r, 5))
                    for x in "AB"}  # fmt: skip
    save_file(tensors, folder / WEIGHTS)
    config = {"peft_type": "LORA", "r": r, "lora_alpha": r, "target_modules": list(modules)} | config
    (folder / CONFIG).write_text(json.dumps(config | {"target_parameters": targets}))


def test_bare_names_and_layers(tmp_path):
    """A target without a module's name fits every module: those that are layers stay layers."""
    plain(tmp_path / "bare", ["w"], experts=4)
    assert list(lo.load_adapter(tmp_path / "bare")) == ["p.0", "p.1", "p.2", "p.3", "q"]
    plain(tmp_path / "weight", ["q.weight"], modules=())
    weight = lo.load_adapter(tmp_path / "weight")
    assert list(weight) == ["q"] and not weight.kinds
    plain(tmp_path / "wrong", ["w"], experts=4, r=3)
    config = json.loads((tmp_path / "wrong" / CONFIG).read_text()) | {"r": 5}
    (tmp_path / "wrong" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="p: factors of 12 rows for parameters .w rank 5, scale 0.6"):
        lo.load_adapter(tmp_path / "wrong")


@pytest.mark.parametrize("targets", ["w", [3], {"w": 1}, ["w"] * 65537])
def test_targets_that_are_none_are_refused(tmp_path, targets):
    plain(tmp_path / "a", targets)
    with pytest.raises(AdapterError, match="target_parameters"):
        lo.load_adapter(tmp_path / "a")


@pytest.mark.parametrize("rows, message", [(10**9, "factors of 1000000000 rows"), (0, "factors of 0 rows")])
def test_a_header_of_a_billion_experts_costs_nothing(tmp_path, rows, message):
    plain(tmp_path / "a", ["p.w"])
    header = {f"{PREFIX}p.lora_{x}.weight": {"dtype": "F32", "shape": s, "data_offsets": [0, 0]}
              for x, s in (("A", [rows, 0]), ("B", [0, rows]))}  # fmt: skip
    text = json.dumps(header).encode()
    (tmp_path / "a" / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(AdapterError, match=message):
        lo.load_adapter(tmp_path / "a")
    with pytest.raises(AdapterError, match=message):
        merge_shard([tmp_path / "a"], tmp_path / "s", (0, 2), "cat")


def test_experts_as_layers_and_in_one_tensor_are_refused(said, tmp_path):
    """Of transformers 4 and of 5: peft loads either, and no sum of both."""
    trained(tmp_path / "new", small("mixtral"), 0)
    shapes = {f"model.layers.{i}.self_attn.q_proj": (16, 16) for i in range(2)}
    layers = [f"model.layers.{i}.block_sparse_moe.experts.{e}.w1" for i in range(2) for e in range(4)]
    rng = np.random.default_rng(0)
    write_peft(tmp_path / "old", random_factors(rng, shapes | dict.fromkeys(layers, (24, 16)), 3))
    for pair in (["old", "new"], ["new", "old"]):
        refused = said("merge", *pair, "-o", "m", "--method", "cat", "--any-base", code=2).err
        assert "expected one way to hold the experts" in refused and "block_sparse_moe.experts.0.w1" in refused
        said("merge", *pair, "-o", f"m{pair[0]}", "--method", "cat", "--any-base", "--drop", "*experts*")
    said("merge", "old", "old", "-o", "twice", "--method", "cat")
