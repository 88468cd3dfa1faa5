"""LoHa, LoKr and LoCon with a core, read as two factors; against dense products, as LyCORIS and peft form them."""

import json
import warnings

import numpy as np
import pytest
import torch
from by_hand import CONFIG, PREFIX, WEIGHTS, deltas_of, gap, random_factors, run, tensors_of, write_peft
from safetensors.torch import save_file
from torch import nn

import lora_opcm as lo
from lora_opcm.files import AdapterError

NAME = "lora_unet_mid_block_attentions_0_proj"


@pytest.fixture
def said(capsys, monkeypatch, tmp_path):
    return lambda *words, code=0: run(capsys, monkeypatch, tmp_path, *words, code=code)


def cored(core, a, b):
    """a (r, out), core (r, r', h, w), b (r', in) as a weight (out, in, h, w): LyCORIS's Tucker product."""
    return np.einsum("ijhw,ip,jr->prhw", core, a, b)


def dense(kind, t, alpha):
    """ΔW as LyCORIS's forward pass has it, from arrays by the ends of their keys."""
    t = {k: x.astype(float) for k, x in t.items()}
    if kind == "locon":
        r = t["lora_down.weight"].shape[0]
        up, down = t["lora_up.weight"][:, :, 0, 0], t["lora_down.weight"][:, :, 0, 0]
        return alpha / r * cored(t["lora_mid.weight"], up.T, down)
    if kind == "loha":
        w = [t[f"hada_w{i}_a"] @ t[f"hada_w{i}_b"] if "hada_t1" not in t else
             cored(t[f"hada_t{i}"], t[f"hada_w{i}_a"], t[f"hada_w{i}_b"]) for i in (1, 2)]  # fmt: skip
        return alpha / t["hada_w1_b"].shape[0] * w[0] * w[1]
    scale = 1.0
    w1, w2 = t.get("lokr_w1"), t.get("lokr_w2")
    if w2 is None:
        scale = alpha / t["lokr_w2_b"].shape[0]
        w2 = (
            t["lokr_w2_a"] @ t["lokr_w2_b"]
            if "lokr_t2" not in t
            else cored(t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
        )  # noqa: E501
    if w1 is None:
        scale = alpha / t["lokr_w1_b"].shape[0]
        w1 = t["lokr_w1_a"] @ t["lokr_w1_b"]
    return scale * np.kron(w1.reshape(*w1.shape, *[1] * (w2.ndim - 2)), w2)


# kind, shapes of the factors, rank expected
CASES = {
    "loha": ("loha", {"hada_w1_a": (24, 3), "hada_w1_b": (3, 20), "hada_w2_a": (24, 3), "hada_w2_b": (3, 20)}, 9),
    "loha-beyond-the-layer": (
        "loha", {"hada_w1_a": (8, 3), "hada_w1_b": (3, 20), "hada_w2_a": (8, 3), "hada_w2_b": (3, 20)}, 8,
    ),
    "loha-core": (
        "loha",
        {"hada_w1_a": (2, 24), "hada_w1_b": (2, 20), "hada_w2_a": (2, 24), "hada_w2_b": (2, 20),
         "hada_t1": (2, 2, 3, 3), "hada_t2": (2, 2, 3, 3)}, 4,
    ),
    "lokr": ("lokr", {"lokr_w1": (4, 5), "lokr_w2_a": (6, 2), "lokr_w2_b": (2, 7)}, 8),
    "lokr-tall": ("lokr", {"lokr_w1": (5, 3), "lokr_w2_a": (6, 2), "lokr_w2_b": (2, 7)}, 6),
    "lokr-both": (
        "lokr", {"lokr_w1_a": (9, 2), "lokr_w1_b": (2, 8), "lokr_w2_a": (6, 2), "lokr_w2_b": (2, 7)}, 4,
    ),
    "lokr-first": ("lokr", {"lokr_w1_a": (9, 2), "lokr_w1_b": (2, 8), "lokr_w2": (3, 4)}, 6),
    "lokr-whole": ("lokr", {"lokr_w1": (3, 4), "lokr_w2": (6, 5)}, 15),
    "lokr-conv": ("lokr", {"lokr_w1": (3, 4), "lokr_w2": (5, 6, 3, 3)}, 15),
    "lokr-core": ("lokr", {"lokr_w1": (3, 4), "lokr_w2_a": (2, 5), "lokr_w2_b": (2, 6), "lokr_t2": (2, 2, 3, 3)}, 6),
    "locon": ("locon", {"lora_up.weight": (24, 3, 1, 1), "lora_mid.weight": (3, 3, 3, 3),
                        "lora_down.weight": (3, 20, 1, 1)}, 3),
}  # fmt: skip


def write(path, case, alpha=2.0, dtype=torch.float32, name=NAME, seed=0):
    """A file of one module; its dense ΔW."""
    kind, shapes, _ = CASES[case]
    rng = np.random.default_rng(seed)
    tensors = {k: torch.tensor(rng.normal(size=s)).to(dtype) for k, s in shapes.items()}
    stored = {f"{name}.{k}": x.contiguous() for k, x in tensors.items()} | {f"{name}.alpha": torch.tensor(alpha)}
    save_file(stored, path)
    return dense(kind, {k: x.double().numpy() for k, x in tensors.items()}, alpha)


def plain(path, name=NAME):
    """ΔW of a kohya file of plain factors, and their shapes."""
    t = tensors_of(path)
    up, down = t[f"{name}.lora_up.weight"], t[f"{name}.lora_down.weight"]
    delta = float(t[f"{name}.alpha"]) / up.shape[1] * (up.double().flatten(1) @ down.double().flatten(1)).numpy()
    return delta, tuple(up.shape), tuple(down.shape)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_products_are_two_factors(tmp_path, case, dtype):
    """The same update to one rounding, of the rank it has; saved and merged alone it is an ordinary LoRA."""
    kind, _, rank = CASES[case]
    expected = write(tmp_path / "x.safetensors", case, 2.0, dtype)
    title = {"loha": "LoHa", "lokr": "LoKr", "locon": "LoCon"}[kind]
    with pytest.warns(UserWarning, match=f"{NAME}: {title}, expanded: the same update as two factors of rank {rank}$"):
        adapter = lo.load_adapter(tmp_path / "x.safetensors")
    assert adapter.format == "kohya" and adapter[NAME].rank == rank
    small = 1e-14 if dtype == torch.float64 else 1e-6
    assert gap({NAME: adapter.delta(NAME).double().numpy()}, {NAME: expected}) < small
    for how in ("save", "merge"):
        path = tmp_path / f"{how}.safetensors"
        (adapter if how == "save" else lo.merge(adapter, method="cat")).save(path)
        delta, up, down = plain(path)
        assert gap({NAME: delta}, {NAME: expected.reshape(delta.shape)}) < small
        assert (up[2:], down[2:]) == (((1, 1), (3, 3)) if expected.ndim == 4 else ((), ()))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing is left to expand
            lo.load_adapter(path)


def test_half_precision_products_are_exact(tmp_path):
    """Two halves multiply exactly in float32: column for column, bit for bit."""
    write(tmp_path / "x.safetensors", "loha", 3.0, torch.float16)
    t = {k.removeprefix(NAME + "."): x.double() for k, x in tensors_of(tmp_path / "x.safetensors").items()}
    with pytest.warns(UserWarning, match="LoHa"):
        adapter = lo.load_adapter(tmp_path / "x.safetensors")
    for i in range(3):
        for j in range(3):
            left, right = t["hada_w1_a"][:, i] * t["hada_w2_a"][:, j], t["hada_w1_b"][i] * t["hada_w2_b"][j]
            assert adapter[NAME].left[:, 3 * i + j].double().equal(left)  # α/r = 1
            assert adapter[NAME].right[3 * i + j].double().equal(right)
    assert adapter.dtype == torch.float32


@pytest.mark.parametrize("method", ["cat", "opcm", "ties"])
def test_a_merge_with_a_plain_lora(said, tmp_path, method):
    """One adapter of a product and one of plain factors merge as the two plain ones."""
    one = write(tmp_path / "x.safetensors", "loha", 2.0)
    torch.manual_seed(1)
    up, down = torch.randn(24, 4), torch.randn(4, 20)
    other = {f"{NAME}.lora_up.weight": up, f"{NAME}.lora_down.weight": down, f"{NAME}.alpha": torch.tensor(4.0)}
    save_file(other, tmp_path / "y.safetensors")
    told = said("merge", "x.safetensors", "y.safetensors", "-o", "m.safetensors", "--method", method).err
    assert f"{NAME}: LoHa, expanded" in told
    u, s, vh = np.linalg.svd(one, full_matrices=False)
    by_svd = {"lora_up": torch.tensor(u[:, :9] * s[:9]).float(), "lora_down": torch.tensor(vh[:9]).float()}
    stored = {f"{NAME}.{k}.weight": x.contiguous() for k, x in by_svd.items()} | {f"{NAME}.alpha": torch.tensor(9.0)}
    save_file(stored, tmp_path / "z.safetensors")
    said("merge", "z.safetensors", "y.safetensors", "-o", "n.safetensors", "--method", method)
    m, n = plain(tmp_path / "m.safetensors")[0], plain(tmp_path / "n.safetensors")[0]
    assert gap({NAME: m}, {NAME: n}) < 1e-5
    if method == "cat":
        assert gap({NAME: m}, {NAME: one + (up.double() @ down.double()).numpy()}) < 1e-6


def test_a_missing_alpha_and_two_whole_matrices(tmp_path):
    for case, rank in (("loha", 3.0), ("lokr", 2.0), ("lokr-whole", 7.0)):  # α = r is a scale of one
        path = tmp_path / f"{case}.safetensors"
        expected = write(path, case, rank)
        t = tensors_of(path)
        del t[f"{NAME}.alpha"]
        save_file(t, path)
        with pytest.warns(UserWarning, match="expanded"):
            found = lo.load_adapter(path).delta(NAME).double().numpy()
        assert gap({NAME: found}, {NAME: expected}) < 1e-6


def test_kernels_by_name(said, tmp_path):
    """A file that stores in·3·3 columns flat: the layers of a Stable Diffusion UNet say which they are."""
    resnet = "lora_unet_input_blocks_1_0_in_layers_2"
    expected = {}
    for name, kernel in ((resnet, (3, 3)), ("lora_unet_other", ())):
        path = tmp_path / f"{name}.safetensors"
        rng = np.random.default_rng(0)
        shapes = {"hada_w1_a": (24, 2), "hada_w1_b": (2, 18), "hada_w2_a": (24, 2), "hada_w2_b": (2, 18)}
        t = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
        save_file({f"{name}.{k}": torch.tensor(x) for k, x in t.items()}, path)
        expected[name] = dense("loha", t, 2)
        said("convert", path, "-o", f"out-{name}.safetensors")
        delta, _, down = plain(tmp_path / f"out-{name}.safetensors", name)
        assert down[2:] == kernel and gap({name: delta}, {name: expected[name]}) < 1e-6
    # A plain LoRA of the same convolution merges with it.
    save_file({"lora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight": torch.randn(24, 2, 1, 1),
               "lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight": torch.randn(2, 2, 3, 3)},
              tmp_path / "plain.safetensors")  # fmt: skip
    said("merge", f"{resnet}.safetensors", "plain.safetensors", "-o", "m.safetensors", "--method", "cat")


@pytest.mark.parametrize("head", ["diffusion_model.blocks.0.q", "transformer.blocks.0.q"])
def test_names_with_dots_are_those_of_diffusers(tmp_path, head):
    expected = write(tmp_path / "x.safetensors", "lokr", name=head)
    with pytest.warns(UserWarning, match="LoKr"):
        adapter = lo.load_adapter(tmp_path / "x.safetensors")
    assert adapter.format == "diffusers"
    adapter.save(tmp_path / "y.safetensors")
    t = tensors_of(tmp_path / "y.safetensors")
    found = t[f"{head}.lora_B.weight"].double() @ t[f"{head}.lora_A.weight"].double()
    assert gap({head: found.numpy()}, {head: expected}) < 1e-6


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(20, 24), nn.Conv2d(4, 6, 3)
        self.head = nn.Linear(24, 3)


PEFT = {
    "loha": ("LoHaConfig", {"r": 3, "alpha": 5}),
    "loha-patterns": ("LoHaConfig", {"r": 3, "alpha": 5, "rank_pattern": {"one": 2}, "alpha_pattern": {"two": 7}}),
    "loha-head": ("LoHaConfig", {"r": 3, "alpha": 5, "modules_to_save": ["head"]}),
    "lokr": ("LoKrConfig", {"r": 2, "alpha": 5}),
    "lokr-whole": ("LoKrConfig", {"r": 30, "alpha": 5}),
    "lokr-both": ("LoKrConfig", {"r": 1, "alpha": 5, "decompose_both": True}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", PEFT)
def test_what_peft_wrote(tmp_path, case):
    import peft

    torch.manual_seed(0)
    kind, options = PEFT[case]
    targets = ["one"] if case == "lokr-both" else ["one", "two"]  # peft itself fails on that convolution
    config = getattr(peft, kind)(target_modules=targets, use_effective_conv2d=True, **options)
    model = peft.get_peft_model(Small(), config)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "hada_" in name or "lokr_" in name or "modules_to_save" in name:
                x.normal_()
    model.save_pretrained(tmp_path / "a")
    adapter = lo.load_adapter(tmp_path / "a")
    layers = {n: model.base_model.model.get_submodule(n) for n in targets}
    expected = {n: layer.get_delta_weight("default").detach().double().numpy() for n, layer in layers.items()}
    assert gap({n: adapter.delta(n).double().numpy() for n in layers}, expected) < 1e-6
    adapter.save(tmp_path / "b")
    assert json.loads((tmp_path / "b" / CONFIG).read_text())["peft_type"] == "LORA"
    again = peft.PeftModel.from_pretrained(Small(), tmp_path / "b")
    layers = {n: again.base_model.model.get_submodule(n) for n in layers}
    found = {n: layer.get_delta_weight("default").detach().double().numpy() for n, layer in layers.items()}
    assert gap(found, expected) < 1e-6
    if "modules_to_save" in options:
        assert again.base_model.model.head.modules_to_save["default"].weight.equal(adapter.saved["head.weight"])


def test_an_option_of_peft_that_is_not_known_is_refused(tmp_path):
    shapes = {"one": (24, 20)}
    write_peft(tmp_path / "a", random_factors(np.random.default_rng(0), shapes, 2), peft_type="LOHA", use_new=True)
    with pytest.raises(AdapterError, match="use_new is set: a variant"):
        lo.load_adapter(tmp_path / "a")


BAD = {
    "one factor": ({"hada_w1_a": (4, 2)}, "expected the factors of one LoHa, got hada_w1_a"),
    "two kinds": ({"lokr_w1": (4, 2), "lokr_w2": (4, 2), "lora_up.weight": (4, 2)}, "expected the factors of one LoKr"),
    "half a core": (CASES["loha"][1] | {"hada_t1": (3, 3, 3, 3)}, "expected the factors of one LoHa"),
    "a lone core": ({"lora_mid.weight": (4, 2, 3, 3), "lora_up.weight": (4, 2)}, "expected lora_up and lora_down"),
    "shapes": (CASES["loha"][1] | {"hada_w1_b": (2, 20)}, r"this LoHa do not fit: hada_w1_a \(24, 3\)"),
    "sides": (CASES["loha"][1] | {"hada_w2_b": (3, 21)}, "this LoHa do not fit"),
    "flat": (CASES["loha"][1] | {"hada_w2_b": (60,)}, "this LoHa do not fit"),
    "empty": (CASES["lokr"][1] | {"lokr_w1": (4, 0)}, "this LoKr do not fit"),
    "two ranks": (CASES["lokr-both"][1] | {"lokr_w1_a": (9, 3), "lokr_w1_b": (3, 8)}, "this LoKr do not fit"),
    "core": (CASES["locon"][1] | {"lora_mid.weight": (3, 2, 3, 3)}, "this LoCon do not fit"),
    "core of two": (CASES["locon"][1] | {"lora_mid.weight": (3, 3)}, "this LoCon do not fit"),
    "a kernel up": (CASES["locon"][1] | {"lora_up.weight": (24, 3, 2, 2)}, "this LoCon do not fit"),
    "not low": ({"lokr_w1": (40, 40), "lokr_w2": (30, 30)}, r"is an update \(1200, 1200\) of rank 1200, which is not"),
    "a bomb": ({"lokr_w1": (30000, 1), "lokr_w2": (30000, 1)}, r"\(900000000, 1\) of rank 1, which is"),
    "KaSA's kin": ({"lokr_w1": (4, 2), "lokr_w2": (4, 2), "lokr_t1": (1, 1)}, "not a key of"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused(tmp_path, case):
    shapes, message = BAD[case]
    save_file({f"{NAME}.{k}": torch.ones(s) for k, s in shapes.items()}, tmp_path / "x.safetensors")
    with pytest.raises(AdapterError, match=message):
        lo.load_adapter(tmp_path / "x.safetensors")


def test_a_product_that_overflows_is_refused(tmp_path):
    t = {f"{NAME}.{k}": torch.full(s, 1e30) for k, s in CASES["loha"][1].items()}
    save_file(t, tmp_path / "x.safetensors")
    with pytest.raises(AdapterError, match="the product of its factors overflows torch.float32"):
        lo.load_adapter(tmp_path / "x.safetensors")
    save_file({k: x.double() for k, x in t.items()}, tmp_path / "x.safetensors")
    with pytest.raises(AdapterError, match=r"a factor holds 1.0e\+60, expected below 1e\+38"):
        lo.load_adapter(tmp_path / "x.safetensors")


# -- 8-bit floats --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_8_bit_floats_are_read_as_halves(said, tmp_path, dtype):
    """Every number of both is one of float16: nothing is rounded."""
    factors = random_factors(np.random.default_rng(0), {"layers.0.q": (12, 8), "layers.1.q": (6, 8)}, 3)
    eight = {n: [torch.tensor(x).float().to(dtype) for x in pair] for n, pair in factors.items()}
    expected = {n: (b.double() @ a.double()).numpy() for n, (b, a) in eight.items()}
    write_peft(tmp_path / "a", factors)
    ends = ("lora_B", "lora_A")
    save_file({f"{PREFIX}{n}.{end}.weight": x for n, pair in eight.items() for end, x in zip(ends, pair)},
              tmp_path / "a" / WEIGHTS)  # fmt: skip
    with pytest.warns(UserWarning, match="layers.0.q.lora_A.weight and 3 more: 8-bit floats, read as float16"):
        adapter = lo.load_adapter(tmp_path / "a")
    assert adapter.dtype == torch.float16
    assert gap({n: u.left.double().numpy() @ u.right.double().numpy() for n, u in adapter.items()}, expected) == 0
    assert "8-bit floats" in said("merge", "a", "-o", "m", "--method", "cat").err
    assert gap(deltas_of(tmp_path / "m"), expected) == 0
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    finite = every.float().isfinite()
    assert every[finite].float().equal(every[finite].half().float())
    eight["layers.0.q"][0].view(torch.uint8)[0, 0] = 0x7F  # NaN in both
    save_file({f"{PREFIX}{n}.{end}.weight": x for n, pair in eight.items() for end, x in zip(ends, pair)},
              tmp_path / "a" / WEIGHTS)  # fmt: skip
    with pytest.raises(AdapterError, match="lora_B.weight holds NaN or Inf"), pytest.warns(UserWarning):
        lo.load_adapter(tmp_path / "a")
