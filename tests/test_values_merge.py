"""What merge and verify write and say, against dense matrices and plain readers of files."""

import hashlib
import json
import math
import sys

import numpy as np
import pytest
import torch
from by_hand import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    cut,
    deltas_of,
    gap,
    norm,
    opcm,
    opcm_stream,
    random_factors,
    read_peft,
    run,
    svd,
    tensors_of,
    whitened_sum,
    write_peft,
)
from factories import dense_opcm
from safetensors.torch import save_file

import lora_opcm as lo
from lora_opcm.command import console

SHAPES = {"layers.0.q": (24, 18), "layers.1.up": (40, 12)}
CLIP = "text_model.encoder.layers.0.mlp.fc1"  # a module that kohya has a name for
CLIP_CONFIG = {"auto_mapping": {"base_model_class": "CLIPTextModel"}}


@pytest.fixture
def said(capsys, monkeypatch, tmp_path):
    return lambda *words, code=0: run(capsys, monkeypatch, tmp_path, *words, code=code)


@pytest.fixture
def abc(tmp_path):
    """Folders a, b, c, float64, of different ranks, norms and scales: their ΔW."""
    rng = np.random.default_rng(3)
    return [
        write_peft(tmp_path / name, random_factors(rng, SHAPES, rank), alpha={"layers.0.q": alpha})
        for name, rank, alpha in (("a", 4, 8), ("b", 5, 1), ("c", 3, 3))
    ]


def combined(deltas, weights):
    return {n: sum(w * d[n] for w, d in zip(weights, deltas)) for n in deltas[0]}


# -- options reach the merge ---------------------------------------------------------------------------------


def trimmed_sum(deltas, density):
    def trim(x):
        return np.where(np.abs(x) >= np.sort(np.abs(x).ravel())[-round(density * x.size)], x, 0)

    return {n: sum(trim(d[n]) for d in deltas) for n in deltas[0]}


def by_auto(merged, parts):
    """At √T mean norms of T parts."""
    factor = np.sqrt(len(parts)) * np.mean([norm(d) for d in parts]) / norm(merged)
    return {n: factor * x for n, x in merged.items()}


def paper(deltas, alpha, variant):
    found = dense_opcm([{n: torch.as_tensor(d) for n, d in one.items()} for one in deltas], alpha, variant)
    return {n: d.numpy() for n, d in found.items()}


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--method", "cat"], lambda d: combined(d, [1, 1, 1])),
        (["--method", "mean"], lambda d: combined(d, [1 / 3] * 3)),
        (["--method", "cat", "--weights", "0.7,-0.4,2"], lambda d: combined(d, [0.7, -0.4, 2])),
        (["--method", "mean", "--weights", "3,0,0"], lambda d: d[0]),
        (["--method", "task_arithmetic", "--scale", 0.3], lambda d: combined(d, [0.3] * 3)),
        (["--method", "task_arithmetic", "--option", "scale=-2"], lambda d: combined(d, [-2] * 3)),
        (["--method", "cat", "--rank", 4], lambda d: {n: cut(x, 4)[0] for n, x in combined(d, [1] * 3).items()}),
        (["--method", "magnitude_prune", "--option", "density=0.3"], lambda d: trimmed_sum(d, 0.3)),
        (["--method", "whitened_sum", "--scale", 1, "--option", "power=0.8"], lambda d: whitened_sum(d, 0.8)),
        (["--method", "whitened_sum"], lambda d: by_auto(whitened_sum(d, 0.5), d)),
        (["--method", "cat", "--scale", "auto", "--weights", "1,0,-3"],
         lambda d: by_auto(combined(d, [1, 0, -3]), [d[0], combined(d, [0, 0, 3])])),
        ([], lambda d: opcm(d, 0.5)), (["--alpha", 0.2], lambda d: opcm(d, 0.2)),
        (["--alpha", 0], lambda d: opcm(d, 0)),
        (["--alpha", 0.2, "--option", "variant=fusionbench"], lambda d: paper(d, 0.2, "fusionbench")),
        (["--scale", 1.5], lambda d: {n: 1.5 * s for n, s in opcm_stream(d, 0.5)[0].items()}),
        (["--weights", "1,2,-1"], lambda d: opcm([combined([x], [w]) for x, w in zip(d, (1, 2, -1))])),
    ],
    ids=lambda x: " ".join(map(str, x)) if isinstance(x, list) else "",
)  # fmt: skip
def test_options_reach_the_merge(said, abc, tmp_path, words, expected):
    said("merge", "a", "b", "c", "-o", "m", *words)
    assert gap(deltas_of(tmp_path / "m"), expected(abc)) < 1e-9
    said("verify", "a", "b", "c", "--against", "m", "--tolerance", 1e-7)


def test_a_stream_has_an_order(said, abc, tmp_path):
    said("merge", "c", "a", "b", "-o", "m")
    found = deltas_of(tmp_path / "m")
    assert gap(found, opcm([abc[2], abc[0], abc[1]])) < 1e-9 and gap(found, opcm(abc)) > 0.01
    # λ gives the merge the mean norm of its parts.
    assert norm(found) == pytest.approx(np.mean([norm(d) for d in abc]))


def test_seed_and_density_reach_the_mask(said, abc, tmp_path):
    """DARE of one adapter: every entry is gone or divided by the density."""
    found = {}
    for name, seed in (("m", 3), ("again", 3), ("other", 4)):
        words = ["--method", "dare", "--option", "density=0.25", "--seed", seed, "--scale", 0.5]
        said("merge", "a", "-o", name, *words)
        found[name] = deltas_of(tmp_path / name)
    ratios = {n: np.concatenate([(found[n][m] / abc[0][m]).ravel() for m in SHAPES]) for n in found}
    for ratio in ratios.values():
        kept = np.abs(ratio) > 1e-6
        np.testing.assert_allclose(ratio[kept], 0.5 / 0.25, rtol=1e-6)
        assert abs(kept.mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / kept.size)
    np.testing.assert_allclose(ratios["m"], ratios["again"])
    assert 0.2 < (np.abs(ratios["m"] - ratios["other"]) > 1).mean() < 0.55  # 2 · 0.25 · 0.75 expected


@pytest.mark.parametrize("words, rule", [(["--energy", 0.8], "energy"), (["--rank", 5], "rank"), ([], "")])
def test_a_cut_keeps_what_it_should_and_says_what_it_dropped(said, abc, tmp_path, words, rule):
    told = said("merge", "a", "b", "c", "-o", "m", "--method", "cat", "--ragged", *words).err
    recipe, dropped, kept = json.loads((tmp_path / "m" / "merge_recipe.json").read_text()), {}, {}
    for name, whole in combined(abc, [1] * 3).items():
        share = (svd(whole)[1] ** 2).cumsum() / (whole**2).sum()
        k = {"energy": int((share < 0.8).sum()) + 1, "rank": 5, "": len(share)}[rule]
        kept[name], dropped[name] = cut(whole, k)[0], 1 - share[k - 1]
        assert read_peft(tmp_path / "m")[name][0].shape[1] == k
    assert gap(deltas_of(tmp_path / "m"), kept) < 1e-9
    assert recipe["dropped"] == (pytest.approx(dropped) if rule else {})
    worst = max(dropped, key=dropped.get)
    lost = f"the cut dropped at most {100 * dropped[worst]:.1f}% of a module's squared norm ({worst})"
    assert (lost in told) == bool(rule) and f"wrote m: 2 modules, norm {norm(kept):.4g}" in told


UNIT = {"float64": 2**-53, "float32": 2**-24, "float16": 2**-11, "bfloat16": 2**-8}


@pytest.mark.parametrize("dtype", UNIT)
def test_dtype_is_that_of_the_file_and_rounds_once(said, abc, tmp_path, dtype):
    said("merge", "a", "b", "-o", "m", "--method", "cat", "--dtype", dtype)
    tensors, unit = tensors_of(tmp_path / "m"), UNIT[dtype]
    assert {str(t.dtype) for t in tensors.values()} == {f"torch.{dtype}"}
    far = gap(deltas_of(tmp_path / "m"), combined(abc, [1, 1]))
    assert far < 4 * unit + 1e-12 and (dtype == "float64" or far > unit / 10)
    assert json.loads((tmp_path / "m" / "merge_recipe.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize("format, prefix", [("kohya", "lora_te_"), ("diffusers", "text_encoder.")])
def test_format_is_that_of_the_file(said, tmp_path, format, prefix):
    rng = np.random.default_rng(0)
    p, q = (write_peft(tmp_path / n, random_factors(rng, {CLIP: (24, 16)}, 3), {CLIP: 6}, **CLIP_CONFIG) for n in "pq")
    said("merge", "p", "q", "-o", "m.safetensors", "--format", format, "--method", "cat", "--weights", "1,2")
    tensors = tensors_of(tmp_path / "m.safetensors")
    up, down = ("lora_up", "lora_down") if format == "kohya" else ("lora_B", "lora_A")
    name = prefix + (CLIP.replace(".", "_") if format == "kohya" else CLIP)
    scale = float(tensors.pop(f"{name}.alpha")) / 6 if format == "kohya" else 1.0  # the sum has rank 6
    found = scale * tensors.pop(f"{name}.{up}.weight").numpy() @ tensors.pop(f"{name}.{down}.weight").numpy()
    assert not tensors and gap({CLIP: found}, combined([p, q], [1, 2])) < 1e-9
    recipe = json.loads((tmp_path / "m.recipe.json").read_text())
    assert recipe["format"] == format and recipe["merge"]["weights"] == [1, 2]
    whole = (tmp_path / "m.safetensors").read_bytes()
    assert recipe["output_sha256"] == hashlib.sha256(hashlib.sha256(whole).digest()).hexdigest()


def test_a_name_that_the_format_cannot_have_is_refused_before_the_work(said, tmp_path, monkeypatch):
    write_peft(tmp_path / "p", random_factors(np.random.default_rng(0), {CLIP: (24, 16)}, 3), **CLIP_CONFIG)
    said("convert", "p", "-o", "k.safetensors", "--to", "kohya")

    def merge(*words, **more):
        raise AssertionError("merged")

    monkeypatch.setattr(sys.modules[lo.merge.__module__], "merge", merge)
    refused = said("merge", "k.safetensors", "k.safetensors", "-o", "m", code=2).err
    assert "m: a kohya adapter is one file, expected a name ending in .safetensors" in refused


def test_a_merge_that_cut_nothing_says_nothing_of_a_cut(capsys):
    for dropped in ({}, {"w": 0.0}, {"w": 1e-9}):
        console.wrote("m", lo.Adapter({}, dropped=dropped))
        assert capsys.readouterr().err.split() == "wrote m: 0 modules, norm 0".split()
    console.wrote("m", lo.Adapter({}, dropped={"v": 0.002, "w": 0.0123}))
    assert "norm 0; the cut dropped at most 1.2% of a module's squared norm (w)" in capsys.readouterr().err


def test_a_recipe_names_all_that_went_in(said, abc, tmp_path):
    words = ["--alpha", 0.3, "--weights", "1,-2", "--rank", 3, "--option", "variant=fusionbench"]
    said("merge", "b", "a", "-o", "m", *words)

    def digest(folder):  # of the digests of weights and config
        parts = [hashlib.sha256((tmp_path / folder / n).read_bytes()).digest() for n in (WEIGHTS, CONFIG)]
        return hashlib.sha256(b"".join(parts)).hexdigest()

    recipe = json.loads((tmp_path / "m" / "merge_recipe.json").read_text())
    assert recipe.pop("dropped").keys() == set(SHAPES) and recipe.pop("versions").keys() == {
        "lora-opcm",
        "torch",
    }
    parts = [lo.load_adapter(tmp_path / n) for n in "ba"]
    call = {"alpha": 0.3, "variant": "fusionbench", "weights": [1, -2]}
    size = lo.merge(parts, "opcm", scale=1, **call).norm()
    factor = (parts[0].norm() + 2 * parts[1].norm()) / 2 / size
    assert recipe == {
        "recipe": 2, "format": "peft", "dtype": "float64", "output_sha256": digest("m"),
        "inputs": [{"name": n, "id": lo.load_adapter(tmp_path / n).id} for n in "ba"],
        "factor": pytest.approx(factor, rel=1e-12),
        "merge": {"method": "opcm", "scale": "norm", "rank": 3} | call,
    }  # fmt: skip
    card = (tmp_path / "m" / "README.md").read_text()
    assert "- `b`\n- `a`\n" in card and "- alpha: 0.3\n" in card and "- weights: [1.0, -2.0]\n" in card
    assert "- scale: norm\n" in card and f"- factor of the merged update: {factor:.6g}\n" in card


def test_a_recipe_that_says_no_scale_is_from_before_auto(said, abc, tmp_path):
    for method, scale in (("tsv", 1), ("opcm", "norm"), ("cat", 1)):
        said("merge", "a", "b", "-o", "m", "--method", method, "--scale", scale, "--overwrite")
        path = tmp_path / "m" / "merge_recipe.json"
        old = json.loads(path.read_text())
        del old["merge"]["scale"], old["factor"]
        path.write_text(json.dumps(old))
        said("verify", "a", "b", "--against", "m")


def test_what_a_scale_came_to_is_said(said, abc, tmp_path):
    told = said("merge", "a", "b", "c", "-o", "m", "--method", "tsv", "--rank", 2).err
    merged, parts = lo.load_adapter(tmp_path / "m"), [lo.load_adapter(tmp_path / n) for n in "abc"]
    plain = lo.merge(parts, "tsv", rank=2, scale=1).norm()
    assert merged.norm() == pytest.approx(3**0.5 * np.mean([p.norm() for p in parts]))
    assert f"norm {merged.norm():.4g} after a factor of {merged.norm() / plain:.4g};" in told
    recipe = json.loads((tmp_path / "m" / "merge_recipe.json").read_text())
    assert recipe["merge"]["scale"] == "auto" and recipe["factor"] == pytest.approx(merged.norm() / plain)
    said("add", "s", "a", "b", "--method", "whitened_sum")
    told = said("export", "s", "-o", "e").err
    assert "after a factor of" in told and f"norm {2**0.5 * (parts[0].norm() + parts[1].norm()) / 2:.4g} " in told
    assert "factor" not in said("merge", "a", "b", "-o", "n", "--method", "cat").err


# -- verify --------------------------------------------------------------------------------------------------


def rounding(folder, unit, tiny=0.0):
    """First order bound of ‖δΔW‖ / ‖ΔW‖: an entry x of a factor moves by at most unit · |x| + tiny."""
    total, factors = 0.0, read_peft(folder)
    for b, a in factors.values():
        off = [unit * np.linalg.norm(x) + tiny * math.sqrt(x.size) for x in (b, a)]
        total += (off[0] * np.linalg.norm(a, 2) + off[1] * np.linalg.norm(b, 2)) ** 2
    return math.sqrt(total) / norm(deltas_of(folder))


@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize("rank", [2, 7])
def test_the_tolerance_is_twice_what_rounding_can_do(said, abc, tmp_path, dtype, rank):
    said("merge", "a", "b", "-o", "m", "--method", "cat", "--dtype", dtype, "--rank", rank)
    found = json.loads(said("verify", "b", "a", "--against", "m", "--json").out)
    unit, tiny = UNIT[dtype], {"float16": 2**-25}.get(dtype, 0)  # half the smallest subnormal
    assert found["tolerance"] == pytest.approx(2 * rounding(tmp_path / "m", unit, tiny) + 1e-5, rel=2e-3, abs=1e-12)
    assert found["tolerance"] < 4 * unit * rank**0.25 * 1.1 + 1e-5  # as the help of the command says
    whole = combined(abc[:2], [1, 1])
    exact = {n: cut(d, rank)[0] for n, d in whole.items()}
    assert found["distance"] == pytest.approx(gap(deltas_of(tmp_path / "m"), exact), rel=1e-3, abs=1e-9)
    assert found["distance"] <= found["tolerance"] / 2 and found["same"] and found["unchanged"]
    # Factors of unlike size, as other tools write them: their sizes must be crossed in the bound.
    tensors = tensors_of(tmp_path / "m")
    for key, t in tensors.items():
        gauge = 2.0 ** (torch.arange(rank) % 3 + 2)
        tensors[key] = (t.double() * gauge if "lora_B" in key else t.double() / gauge[:, None]).to(t.dtype)
    save_file(tensors, tmp_path / "m" / WEIGHTS)
    found = json.loads(said("verify", "a", "b", "--against", "m", "--json", code=3).out)  # in other bytes
    expected = 2 * rounding(tmp_path / "m", unit, tiny) + 1e-5
    assert found["tolerance"] == pytest.approx(expected, rel=2e-3) and not found["unchanged"]


@pytest.mark.parametrize("amount, same", [(0.0, True), (2e-6, True), (4e-5, False), (0.5, False)])
def test_verify_measures_the_distance_to_the_repeated_merge(said, abc, tmp_path, amount, same):
    """A file whose B of one module is (1 + amount) times what was written, of the other (1 − amount/4) times."""
    said("merge", "a", "b", "c", "-o", "m")
    merge, file = opcm(abc), tmp_path / "m" / WEIGHTS  # distances are exact to 1e-8: Gram matrices are taken
    factor = dict(zip(SHAPES, (1 + amount, 1 - amount / 4)))
    tensors = tensors_of(tmp_path / "m")
    for name, f in factor.items():
        tensors[f"{PREFIX}{name}.lora_B.weight"] *= f
    if amount:
        save_file(tensors, file)
    found = json.loads(
        said("verify", "a", "b", "c", "--against", "m", "--json", code=(3 if amount else 0) if same else 1).out
    )
    off = norm({n: (factor[n] - 1) * merge[n] for n in merge}) / norm(merge)
    assert found["distance"] == pytest.approx(off, rel=1e-6, abs=1e-8) and found["same"] == same
    assert found["tolerance"] == pytest.approx(1e-5, rel=1e-6)  # float64: nothing for rounding
    assert found["unchanged"] == (amount == 0)
    worst = max(merge, key=lambda n: abs(factor[n] - 1) * np.linalg.norm(merge[n]))
    assert amount == 0 or found["worst"] == worst
    for tolerance, code in (
        (off * 1.001 + 1e-8, 3 if amount else 0),
        (max(off * 0.999 - 1e-8, 0), int(amount > 0)),
    ):
        words = said("verify", "c", "b", "a", "--against", "m", "--tolerance", tolerance, code=code if off else 0)
        assert ("the same" in words.out) == (code != 1) and f"{off:.1e}"[:3] in words.out


@pytest.mark.parametrize("change", ["module", "shape"])
def test_verify_of_other_modules_is_infinitely_far(said, abc, tmp_path, change):
    said("merge", "a", "b", "-o", "m")
    recipe, name = (tmp_path / "m" / "merge_recipe.json").read_text(), "layers.1.up"
    shapes = {n: s for n, s in SHAPES.items() if n != name} | ({name: (40, 13)} if change == "shape" else {})
    write_peft(tmp_path / "x", random_factors(np.random.default_rng(0), shapes, 2))
    (tmp_path / "x" / "merge_recipe.json").write_text(recipe)
    found = json.loads(said("verify", "a", "b", "--against", "x", "--json", code=1).out)
    assert found["distance"] == math.inf and found["worst"] == name and not found["same"]


# -- resize --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [None, -0.8])
def test_resize_is_the_nearest_of_a_rank(said, tmp_path, strength):
    rng = np.random.default_rng(7)
    deltas = write_peft(tmp_path / "a", random_factors(rng, {"x.q": (12, 9), "x.up": (7, 10)}, 5), {"x.q": 3})
    words = [] if strength is None else ["--strength", strength]
    told = said("resize", "a", "-o", "b", "--rank", 2, *words).err
    expected = {n: (strength or 1) * cut(d, 2)[0] for n, d in deltas.items()}
    assert gap(deltas_of(tmp_path / "b"), expected) < 1e-9
    assert json.loads((tmp_path / "b" / CONFIG).read_text())["r"] == 2 and "the cut dropped at most" in told
    said("verify", "a", "--against", "b")
    said("resize", "a", "-o", "same", "--strength", 1)
    assert gap(deltas_of(tmp_path / "same"), deltas) == 0
    assert "expected what to change: --rank" in said("resize", "a", "-o", "c", code=2).err
    assert "exists already" in said("resize", "a", "-o", "b", "--rank", 1, code=2).err
