"""A merge by the command line, loaded by peft, is the base model plus the dense sum of what its recipe says."""

import json
from itertools import product

import pytest
import torch
from factories import dense_opcm
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_cli import run
from transformers import BertConfig, BertForSequenceClassification, CLIPTextConfig, CLIPTextModel

import lora_opcm as lo
from lora_opcm.command.recipe import relative_rounding as rounding

DTYPES = ["float32", "float16", "bfloat16"]
METHODS = {"cat": ["--weights", "0.7,-0.4"], "opcm": ["--alpha", "0.3"]}
TOLERANCE = 1e-4
INPUT = torch.tensor([[1, 5, 9, 3, 49], [1, 7, 2, 11, 49]])


def base(kind):
    """A random model of two layers, the same every time."""
    torch.manual_seed(0)
    size = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 50,
    }
    if kind == "clip":  # a model that kohya has names for
        return CLIPTextModel(CLIPTextConfig(**size, max_position_embeddings=8, eos_token_id=49)).eval()
    return BertForSequenceClassification(BertConfig(**size, max_position_embeddings=8, initializer_range=0.3)).eval()


def logits(model):
    with torch.no_grad():
        found = model(input_ids=INPUT)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def inputs(folder, kind, format):
    """Two adapters made by peft, or written key by key as kohya does; their dense updates, not read by the package."""
    targets = ["q_proj", "fc1"] if kind == "clip" else ["query", "intermediate.dense"]
    deltas = []
    for i, name in enumerate("ab"):
        options = {"r": 3 + i, "lora_alpha": 5, "use_rslora": i == 1, "target_modules": targets[: 2 - i]}
        model = get_peft_model(base(kind), LoraConfig(**options))
        torch.manual_seed(i + 1)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(parameter, std=0.3)
        layers = {n: m for n, m in model.get_base_model().named_modules() if hasattr(m, "get_delta_weight")}
        deltas.append({n: m.get_delta_weight("default").detach().double() for n, m in layers.items()})
        model.save_pretrained(folder / name)
        if format == "kohya":
            tensors = {}
            for n, m in layers.items():
                short = f"lora_te_{n.replace('.', '_')}"
                tensors[f"{short}.lora_up.weight"] = m.lora_B["default"].weight.detach().clone()
                tensors[f"{short}.lora_down.weight"] = m.lora_A["default"].weight.detach().clone()
                tensors[f"{short}.alpha"] = torch.tensor(m.scaling["default"] * (3 + i))
            save_file(tensors, folder / f"{name}.safetensors")
    return deltas


def dense_sum(recipe, deltas):
    """What a recipe says, on dense float64 matrices."""
    call = recipe["merge"]
    if call["method"] == "cat":
        names = {n for d in deltas for n in d}
        return {n: sum(w * d[n] for w, d in zip(call["weights"], deltas) if n in d) for n in names}
    whole = [{n: d.get(n, torch.zeros_like(deltas[0][n])) for n in deltas[0]} for d in deltas]
    return dense_opcm(whole, call["alpha"], "paper")


def added(kind, deltas):
    """Logits of the base model with dense updates in its weights."""
    model = base(kind)
    with torch.no_grad():
        for name, delta in deltas.items():
            model.get_submodule(name).weight += delta.float()
    return logits(model)


WAYS = [("bert", "peft", "peft"), ("clip", "peft", "peft"), ("clip", "peft", "kohya"), ("clip", "kohya", "kohya")]


def quickly(way, dtype, method):
    """Every dtype and method of one way, every way in one dtype and method; all of them when there is time."""
    return way[0] == "bert" or (dtype, method) == ("bfloat16", "opcm")


@pytest.mark.parametrize(
    "kind, format, output, dtype, method",
    [
        pytest.param(*way, dtype, method, marks=() if quickly(way, dtype, method) else pytest.mark.slow)
        for way, dtype, method in product(WAYS, DTYPES, METHODS)
    ],
)
def test_merged_logits_are_those_of_the_dense_sum(tmp_path, kind, format, output, dtype, method):
    deltas = inputs(tmp_path, kind, format)
    names = ["a", "b"] if format == "peft" else ["a.safetensors", "b.safetensors"]
    out = "m" if output == "peft" else "m.safetensors"
    words = ["--method", method, *METHODS[method], "--dtype", dtype, "--format", output]
    run(tmp_path, "merge", *names, "-o", out, *words)
    assert "the same" in run(tmp_path, "verify", *names, "--against", out).stdout
    recipe = json.loads((tmp_path / ("m/merge_recipe.json" if output == "peft" else "m.recipe.json")).read_text())
    expected = dense_sum(recipe, deltas)
    if output == "kohya":
        keys = set(load_file(tmp_path / out))
        ends = ("lora_up.weight", "lora_down.weight", "alpha")
        assert keys == {f"lora_te_{n.replace('.', '_')}.{end}" for n in expected for end in ends}
        run(tmp_path, "convert", out, "-o", "m", "--to", "peft", "--like", "a")

    stored = lo.load_adapter(tmp_path / "m")
    assert stored.dtype == getattr(torch, dtype) and stored.modules.keys() == expected.keys()
    tensors = load_file(tmp_path / "m" / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {stored.dtype}
    parts = {n: [tensors[f"base_model.model.{n}.lora_{x}.weight"].double() for x in "BA"] for n in expected}
    rounded = {n: up @ down for n, (up, down) in parts.items()}

    got = logits(PeftModel.from_pretrained(base(kind), tmp_path / "m").eval())
    assert float((got - logits(base(kind))).abs().max()) > 100 * TOLERANCE  # the merge does something
    # What is stored is what peft adds, in every dtype …
    assert float((got - added(kind, rounded)).abs().max()) < TOLERANCE
    # … and differs from the dense sum by no more than rounding the factors can do: half a unit in the last
    # place of every entry, carried through the product (`recipe.rounding`); 1e-5 for float32 arithmetic.
    off = sum(float((rounded[n] - expected[n]).norm()) ** 2 for n in expected) ** 0.5
    size = sum(float(d.norm()) ** 2 for d in expected.values()) ** 0.5
    assert off < (rounding(stored) + 1e-5) * size
    if dtype == "float32":
        assert float((got - added(kind, expected)).abs().max()) < TOLERANCE


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_bounds_what_storing_in_a_dtype_changes(tmp_path, dtype):
    deltas = inputs(tmp_path, "bert", "peft")
    run(tmp_path, "merge", "a", "b", "-o", "m", "--method", "cat", "--dtype", dtype)
    stored = lo.load_adapter(tmp_path / "m")
    off = sum(float((stored.modules[n].left.double() @ stored.modules[n].right.double()
                     - sum(d[n] for d in deltas if n in d)).norm()) ** 2 for n in stored.modules) ** 0.5  # fmt: skip
    unit = torch.finfo(stored.dtype).eps / 2
    rank = max(u.rank for u in stored.modules.values())
    assert off < (rounding(stored) + 1e-5) * stored.norm()
    assert unit < rounding(stored) < 2.1 * unit * rank**0.25
