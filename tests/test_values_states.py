"""What states, align and convert write, against dense matrices and plain readers of files."""

import json
import re

import numpy as np
import pytest
import torch
from by_hand import (
    CONFIG,
    PREFIX,
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
from factories import adapter, error

import lora_opcm as lo

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


# -- states --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha, cap", [(0.5, None), (0.2, 6), (1.0, 4), (0.3, 2)])
def test_history_is_that_of_dense_opcm(said, abc, tmp_path, alpha, cap):
    said("add", "s", "a", "--alpha", alpha, *(["--cap", cap] if cap else []))
    rows = json.loads(said("add", "s", "b", "c", "--json").out)
    total, expected = opcm_stream(abc, alpha, cap)
    assert [row["name"] for row in rows] == ["a", "b", "c"]
    for row, numbers in zip(rows, expected):
        for column, value in numbers.items():
            assert row[column] == pytest.approx(value, rel=1e-8, abs=1e-9), column
    said("export", "s", "-o", "m")
    assert gap(deltas_of(tmp_path / "m"), {n: d / rows[-1]["lambda"] for n, d in total.items()}) < 1e-8
    head, _, last, *_ = said("add", "s", "a").out.partition("4 taken in")
    assert f"opcm, alpha {alpha}, variant paper, scale norm, cap {cap or 'none'}:" in head


def test_a_module_that_comes_later_and_a_fixed_scale(said, tmp_path):
    """A module's first update is taken whole; λ counts the norms of whole adapters; --scale replaces 1/λ."""
    rng = np.random.default_rng(1)
    ranks = [dict(list(SHAPES.items())[:1]), SHAPES]
    one, two = (write_peft(tmp_path / n, random_factors(rng, s, 3)) for n, s in zip("xy", ranks))
    rows = json.loads(said("add", "s", "x", "y", "--scale", 2.5, "--json").out)
    total, expected = opcm_stream([one, two], 0.5)
    assert rows[1]["cleared"] == pytest.approx(expected[1]["cleared"]) and 0 < rows[1]["cleared"] < 1
    assert rows[1]["lambda"] == pytest.approx(norm(total) / ((norm(one) + norm(two)) / 2))
    assert [row["rank"] for row in rows] == [3, 6] == [row["rank"] for row in expected]  # the largest
    said("export", "s", "-o", "m")
    assert gap(deltas_of(tmp_path / "m"), {n: 2.5 * d for n, d in total.items()}) < 1e-9


@pytest.mark.parametrize("words", [["--rank", 2], ["--energy", 0.6], ["--dtype", "float16"]])
def test_export_cuts_and_rounds(said, abc, tmp_path, words):
    said("add", "s", "a", "b", "c")
    said("export", "s", "-o", "m", *words)
    for name, whole in opcm(abc).items():
        share = (svd(whole)[1] ** 2).cumsum() / (whole**2).sum()
        k = {"--rank": 2, "--energy": int((share < 0.6).sum()) + 1}.get(words[0], len(share))
        found = deltas_of(tmp_path / "m")[name]
        assert np.linalg.norm(found - cut(whole, k)[0]) < (2e-3 if "--dtype" in words else 1e-9) * norm({0: whole})
        assert "--dtype" in words or len(svd(found)[1]) == k
    dtype = torch.float16 if "--dtype" in words else torch.float64
    assert {t.dtype for t in tensors_of(tmp_path / "m").values()} == {dtype}


@pytest.mark.parametrize("power", [0, 0.5, 1])
def test_a_sum_with_one_taken_out_is_the_sum_of_the_others(said, abc, tmp_path, power):
    words = ["--method", "whitened_sum", "--power", power, "--scale", 0.5]
    added = json.loads(said("add", "s", "a", "b", "c", *words, "--json").out)
    assert [row["norm"] for row in added] == pytest.approx([norm(d) for d in abc])
    said("export", "s", "-o", "all")
    half = lambda d: {n: 0.5 * x for n, x in whitened_sum(d, power).items()}  # noqa: E731
    assert gap(deltas_of(tmp_path / "all"), half(abc)) < 1e-8
    left = json.loads(said("remove", "s", "b", "--json").out)
    assert left == [added[0], added[2] | {"rank": 4 + 3}] and len({(row["name"], row["norm"]) for row in added}) == 3
    said("export", "s", "-o", "two")
    assert gap(deltas_of(tmp_path / "two"), half([abc[0], abc[2]])) < 1e-8
    assert json.loads(said("remove", "s", "c", "--json").out) == [added[0]]
    assert gap(deltas_of(tmp_path / "two"), half(abc)) > 0.01


# -- align and convert ---------------------------------------------------------------------------------------


def balanced(d):
    """[U√Σ; V√Σ], the largest entry of each column of U positive."""
    u, s, vh = svd(d)
    signs = np.sign(u[np.abs(u).argmax(0), range(len(s))])
    return np.concatenate([u, vh.T]) * signs * np.sqrt(s)


def test_align_finds_the_nearest_factors_of_the_same_update(said, tmp_path):
    rng = np.random.default_rng(4)
    x, y = (write_peft(tmp_path / n, random_factors(rng, SHAPES, 3), {"layers.0.q": 5}) for n in "xy")
    said("align", "x", "--to", "y", "-o", "z")
    assert gap(deltas_of(tmp_path / "z"), x) < 1e-12
    for name, (b, a) in read_peft(tmp_path / "z").items():
        target, found = balanced(y[name]), np.concatenate([b, a.T])
        # The best rotation of all is known: Q = U Vᵀ of the cross product, at which it becomes symmetric and ≥ 0.
        u, s, vh = np.linalg.svd(balanced(x[name]).T @ target)
        np.testing.assert_allclose(found, balanced(x[name]) @ u @ vh, atol=1e-9)
        assert np.linalg.norm(found - target) < np.linalg.norm(balanced(x[name]) - target)
        before = np.concatenate([read_peft(tmp_path / "x")[name][0], read_peft(tmp_path / "x")[name][1].T])
        assert np.linalg.norm(found - target) < np.linalg.norm(before - target)


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_convert_keeps_numbers_and_scales(said, tmp_path, dtype):
    """PEFT to kohya (α beside the factors, underscores) and back under the names of another of the model."""
    rng = np.random.default_rng(0)
    shapes = {CLIP: (24, 16), CLIP.replace("fc1", "fc2"): (16, 24)}
    delta = write_peft(tmp_path / "p", random_factors(rng, shapes, 4), {CLIP: 6}, **CLIP_CONFIG)
    write_peft(tmp_path / "like", random_factors(rng, shapes, 2), **CLIP_CONFIG)
    said("convert", "p", "-o", "k.safetensors", *(["--dtype", dtype] if dtype else []))  # kohya is the default
    kept = torch.float16 if dtype else torch.float64
    source, found = tensors_of(tmp_path / "p"), tensors_of(tmp_path / "k.safetensors")
    assert len(found) == 6
    for name in shapes:
        short = f"lora_te_{name.replace('.', '_')}"
        for ours, theirs in (("lora_B", "lora_up"), ("lora_A", "lora_down")):
            assert torch.equal(found[f"{short}.{theirs}.weight"], source[f"{PREFIX}{name}.{ours}.weight"].to(kept))
        assert float(found[f"{short}.alpha"]) == (6 if name == CLIP else 4)
    said("convert", "k.safetensors", "-o", "back", "--to", "peft", "--like", "like")
    again = deltas_of(tmp_path / "back")
    assert (gap(again, delta) < 1e-12) if not dtype else (1e-5 < gap(again, delta) < 1e-3)
    assert {t.dtype for t in tensors_of(tmp_path / "back").values()} == {kept}
    config = json.loads((tmp_path / "back" / CONFIG).read_text())
    assert config["auto_mapping"] == CLIP_CONFIG["auto_mapping"] and re.search("fc2", str(config["target_modules"]))


def test_an_export_is_rounded_once_to_the_dtype_asked_for(said, tmp_path):
    rng = np.random.default_rng(0)
    for name in "ab":
        write_peft(tmp_path / name, random_factors(rng, SHAPES, 3), dtype=torch.float16)
    said("add", "s", "a", "b")
    said("export", "s", "-o", "wide", "--dtype", "float32")
    said("merge", "a", "b", "-o", "m", "--method", "opcm", "--scale", "norm", "--dtype", "float32")
    assert gap(deltas_of(tmp_path / "wide"), deltas_of(tmp_path / "m")) < 1e-6
    assert any((x != x.half().float()).any() for x in tensors_of(tmp_path / "wide").values())


def test_what_no_merge_wrote_has_no_recipe_beside_it(said, abc, tmp_path):
    said("add", "s", "a", "b")
    for words in (["export", "s"], ["convert", "a", "--to", "peft"], ["align", "a", "--to", "b"]):
        said("merge", "a", "b", "-o", "m", "--method", "tsv", "--overwrite")
        assert (tmp_path / "m" / "merge_recipe.json").exists() and (tmp_path / "m" / "README.md").exists()
        said(*words, "-o", "m", "--overwrite")
        assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [CONFIG, "adapter_model.safetensors"]
    (tmp_path / "n").mkdir()
    (tmp_path / "n" / "README.md").write_text("mine")
    said("convert", "a", "--to", "peft", "-o", "n", "--overwrite")
    assert (tmp_path / "n" / "README.md").read_text() == "mine"


def test_an_adapter_that_comes_twice_is_told_of(said, abc):
    assert "warning" not in said("add", "s", "a", "b").err
    assert "its very factors, as a, are in already: counted again" in said("add", "s", "a").err


@pytest.mark.parametrize("small", [1e-5, 1e-8])
@pytest.mark.parametrize(
    "words", [["merge", "a", "--method", "cat", "-o", "m"], ["convert", "a", "--to", "peft", "-o", "m"]]
)
def test_small_numbers_do_not_fade_in_half_precision(said, tmp_path, words, small):
    """Those of one factor are made larger, those of the other smaller; a file that has lost them is another."""
    rng = np.random.default_rng(0)
    factors = {n: (small * b, a) for n, (b, a) in random_factors(rng, SHAPES, 3).items()}
    expected = write_peft(tmp_path / "a", factors, dtype=torch.float32)
    said(*words, "--dtype", "float16")
    assert gap(deltas_of(tmp_path / "m"), expected) < 1e-3
    if "merge" in words:
        said("verify", "a", "--against", "m")
        half = {n: (b * 0, a) for n, (b, a) in read_peft(tmp_path / "m").items()}
        keep = (tmp_path / "m" / "merge_recipe.json").read_bytes()
        write_peft(tmp_path / "zero", half, dtype=torch.float16)
        (tmp_path / "zero" / "merge_recipe.json").write_bytes(keep)
        said("verify", "a", "--against", "zero", code=1)


def test_a_state_of_factors_is_never_half_precision():
    generator = torch.Generator().manual_seed(0)
    adapters = [adapter(SHAPES, 3, generator, torch.bfloat16) for _ in range(3)]
    merger = lo.FactorMerger(gauge="balanced")
    for one in adapters:
        merger.add(one)
    merged = lo.merge(adapters, "lora_opcm", gauge="balanced", scale="norm", dtype=torch.float32)
    found = merger.adapter(dtype=torch.float32)
    for name in SHAPES:
        assert error(found[name], merged[name].delta()) < 1e-5


def test_a_link_to_nothing_is_no_output(said, abc, tmp_path):
    (tmp_path / "dangling").symlink_to("nowhere")
    for words in (["merge", "a", "b", "-o", "dangling"], ["resize", "a", "--rank", 2, "-o", "dangling", "--overwrite"]):
        assert "dangling: a link to what is not there" in said(*words, code=2).err
