"""Three families of base models through one interface, on random checkpoints of a few kilobytes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from datasets import Dataset, DatasetDict
from peft import PeftModel
from safetensors.torch import save_file
from transformers import CLIPModel

import lora_opcm as lo
from lora_opcm.lab import AssetError, evaluation, training
from lora_opcm.lab.attach import applied, attached, fitted
from lora_opcm.lab.bases import causal, family, load
from lora_opcm.lab.bases.tiny import tiny as make
from lora_opcm.lab.evaluation import Evaluator
from lora_opcm.lab.experiments import adapters
from lora_opcm.lab.protocol import Protocol
from lora_opcm.lab.tasks import Task, load_named, load_prompts, load_vision_task
from lora_opcm.lab.tasks.hub import GLUE
from lora_opcm.lab.tasks.prompts import PROMPTED
from lora_opcm.lab.tasks.vision import VISION
from lora_opcm.lab.training import last_checkpoint, train_adapter

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tiny):
    return load(str(tiny / "tiny-clip"))


def random_adapter(model, targets, rank=2, scale=0.3):
    """On every linear layer the pattern names, its whole name as peft matches it."""
    import re

    generator = torch.Generator().manual_seed(0)
    modules = {}
    for name, module in model.named_modules():
        if re.fullmatch(targets, name):
            m, n = module.weight.shape
            left = scale * torch.randn(m, rank, generator=generator)
            modules[name] = lo.LowRank(left, torch.randn(rank, n, generator=generator))
    return lo.Adapter(modules)


# -- bases ------------------------------------------------------------------------------------------------


def test_the_config_tells_the_family(tiny):
    found = {name: family(str(tiny / name)) for name in ("tiny-bert", "tiny-clip", "tiny-llama")}
    assert found == {"tiny-bert": "encoder", "tiny-clip": "clip", "tiny-llama": "causal"}
    assert family("minilm") == "encoder"
    with pytest.raises(AssetError, match="cannot load the base model"):
        family(str(tiny / "nothing"))


def test_what_cannot_be_done_is_refused_by_name(tiny, monkeypatch):
    llama = str(tiny / "tiny-llama")
    with pytest.raises(ValueError, match="only causal language models are quantised"):
        load(str(tiny / "tiny-clip"), "4bit")
    with pytest.raises(ValueError, match="quantise is '3bit'"):
        load(llama, "3bit")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(causal, "is_bitsandbytes_available", lambda: True)
    with pytest.raises(AssetError, match="'4bit' needs a GPU"):
        load(llama, "4bit")
    monkeypatch.setattr(causal, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(AssetError, match="needs bitsandbytes"):
        load(llama, "8bit")
    with pytest.raises(ValueError, match="only causal language models are quantised"):
        train_adapter(load_named("rte", str(tiny / "data")), tiny / "run", Protocol(base="minilm", quantise="4bit"))
    with pytest.raises(ValueError, match="squad is no task for the base"):
        train_adapter(load_prompts("squad", str(tiny / "data")), tiny / "run", Protocol(base=str(tiny / "tiny-bert")))
    with pytest.raises(ValueError, match="unknown task 'mnits'"):
        load_named("mnits")


def test_logits_are_those_of_clip_itself(tiny, clip):
    """scale · embedding @ head, with one template, is what CLIPModel computes from images and sentences."""
    task = load_named("mnist", str(tiny / "data"))
    features = clip.encode(task, "test", 6)
    batch = clip.collate([features[i] for i in range(6)])
    with torch.inference_mode():
        ours = clip.scale * clip.embed(clip.model, batch) @ clip.head(task).T
        whole = CLIPModel.from_pretrained(tiny / "tiny-clip").eval()
        words = clip.tokenizer([s for (s,) in task.sentences], padding=True, return_tensors="pt")
        theirs = whole(**words, **batch).logits_per_image
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_batched_evaluation_of_images_equals_one_at_a_time(tiny, clip):
    task = load_named("eurosat", str(tiny / "data"))
    adapter = random_adapter(clip.model, clip.targets)
    batched = Evaluator([task], base=str(tiny / "tiny-clip")).correct(adapter)["eurosat"]
    features, head = clip.encode(task, "test"), clip.head(task)
    with torch.inference_mode(), applied(clip.model, adapter):
        one = [
            int((clip.embed(clip.model, clip.collate([features[i]])) @ head.T).argmax()) for i in range(len(features))
        ]
    assert np.array_equal(np.array(one) == np.array(task["test"]["label"][:]), batched)


def random_task(name, count=40):
    """Texts of all lengths with labels that say nothing of them; half of the answers will be right."""
    rng, splits = np.random.default_rng(len(name)), {}
    for split, size in (("train", count), ("validation", count // 4), ("test", count)):
        texts = [" ".join(rng.choice(["river", "cloud", "stone"], rng.integers(1, 12))) + f" {split} {i}"
                 for i in range(size)]  # fmt: skip
        splits[split] = Dataset.from_dict({"text": texts, "label": rng.integers(2, size=size).tolist()})
    return Task(name, ("r", "c"), ("About a river.", "The clouds of summer, high."), DatasetDict(splits))


@pytest.mark.parametrize("remember", [False, True])
def test_a_scale_is_of_the_adapter_and_answers_are_in_the_order_of_the_texts(tiny, monkeypatch, remember, tmp_path):
    """In small batches, sorted by length and kept from one adapter to the next."""
    monkeypatch.setattr(evaluation, "TOKENS_PER_BATCH", 64)
    data, base = [random_task("one"), random_task("three", 20)], load(str(tiny / "tiny-bert"))
    evaluator = Evaluator(data, base=str(tiny / "tiny-bert"))
    evaluator.memory = tmp_path if remember else None
    adapter, found, heads = random_adapter(base.model, base.targets), {}, {t.name: base.head(t) for t in data}
    for scale in (1.0, -3.0, 0.25):
        found[scale] = evaluator.correct(adapter, ["three", "one"], scale=scale)
        assert list(found[scale]) == ["three", "one"]
        again = evaluator.correct(scale * adapter)
        for task in data:
            with torch.inference_mode(), applied(base.model, scale * adapter):
                one = [base.embed(base.model, base.collate([ids])) for ids in base.encode(task, "test")]
                answers = (torch.cat(one) @ heads[task.name].T).argmax(-1)
            expected = answers.numpy() == np.array(task["test"]["label"][:])
            assert np.array_equal(found[scale][task.name], expected), (scale, task.name)
            assert np.array_equal(again[task.name], expected)
    assert len({b["one"].tobytes() for b in found.values()}) == 3  # the scale matters here
    assert len(evaluator._batches("one")) > 3


# -- adapters on bases ------------------------------------------------------------------------------------


def write_knots(folder: Path, layers: int, width: int) -> Path:
    """A folder as KnOTS publishes them: LoRA on the vision tower alone, so names begin at `encoder`."""
    folder.mkdir(parents=True)
    config = {
        "auto_mapping": {"base_model_class": "CLIPVisionTransformer",
                         "parent_library": "transformers.models.clip.modeling_clip"},
        "base_model_name_or_path": "openai/clip-vit-base-patch32", "bias": "none", "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True, "lora_alpha": 16, "lora_dropout": 0.1, "modules_to_save": None,
        "peft_type": "LORA", "r": 16,
        "rank_pattern": {}, "alpha_pattern": {}, "target_modules": ["q_proj", "k_proj", "v_proj", "out_proj"],
        "task_type": None,
        "use_dora": False, "use_rslora": False,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for i in range(layers):
        for name in config["target_modules"]:
            stem = f"base_model.model.encoder.layers.{i}.self_attn.{name}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(16, width)
            tensors[f"{stem}.lora_B.weight"] = torch.randn(width, 16)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_published_vision_adapters_load_as_they_are(tiny, clip, tmp_path, monkeypatch):
    for task in ("mnist", "dtd"):
        write_knots(tmp_path / f"lora_R16_{task}", 2, 32)
    found = adapters.collected(f"{tmp_path}/lora_R16_{{task}}", ["mnist", "dtd"])
    names = set(fitted(clip.model, found["dtd"]).modules)
    assert "vision_model.encoder.layers.1.self_attn.out_proj" in names and len(names) == 8
    batch = {"pixel_values": torch.randn(3, 3, 16, 16)}
    with torch.inference_mode(), applied(clip.model, found["mnist"]):
        ours = clip.model.vision_model(**batch).pooler_output
    tower = load(str(tiny / "tiny-clip")).model.vision_model
    theirs = PeftModel.from_pretrained(tower, tmp_path / "lora_R16_mnist").eval()
    with torch.inference_mode():
        assert torch.allclose(ours, theirs(**batch).pooler_output, atol=1e-4)
    # a name that is no folder is a repository of the hub
    asked = []
    monkeypatch.setattr(
        adapters, "snapshot_download", lambda name, **_: asked.append(name) or str(tmp_path / "lora_R16_dtd")
    )
    assert adapters.collected({"dtd": "lab/dtd"}, ["dtd"])["dtd"].norm() == found["dtd"].norm()
    assert asked == ["lab/dtd"]
    with pytest.raises(lo.AdapterError, match="no adapter for 'sun397'"):
        adapters.collected({"dtd": "lab/dtd"}, ["sun397"])


def test_attached_answers_as_added_and_leaves_nothing_behind(tiny):
    base = load(str(tiny / "tiny-llama"))
    adapter = random_adapter(base.model, base.targets)
    assert len(adapter.modules) == 14
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode():
        before = base.model(input_ids=ids).logits
        with applied(base.model, adapter):
            added = base.model(input_ids=ids).logits
        with attached(base.model, adapter):
            beside = base.model(input_ids=ids).logits
        after = base.model(input_ids=ids).logits
    assert torch.allclose(added, beside, atol=1e-4) and not torch.allclose(added, before, atol=1e-2)
    assert torch.equal(before, after)
    assert not any("lora" in name for name, _ in base.model.named_parameters())


def test_an_8_bit_base_answers_with_an_adapter_beside_it(tiny):
    """As the float32 base with the update added, up to what rounding the base to 8 bits does by itself."""
    pytest.importorskip("bitsandbytes")
    base, exact = load(str(tiny / "tiny-llama"), "8bit"), load(str(tiny / "tiny-llama"))
    adapter = random_adapter(exact.model, exact.targets, scale=0.03)
    ids = torch.arange(5, 25)[None]
    found = {}
    with torch.inference_mode():
        for name, model in (("8bit", base.model), ("exact", exact.model)):
            found[name] = [model(input_ids=ids).logits]
            with applied(model, adapter):
                found[name].append(model(input_ids=ids).logits)
        assert torch.equal(base.model(input_ids=ids).logits, found["8bit"][0])
    alone, beside = (float((x - y).norm() / y.norm()) for x, y in zip(found["8bit"], found["exact"]))
    moved = float((found["exact"][1] - found["exact"][0]).norm() / found["exact"][0].norm())
    assert beside < 3 * alone < 0.1 < moved


def test_a_half_precision_base_gets_the_sum_rounded_once(tiny):
    base = load(str(tiny / "tiny-llama"))
    exact = {name: w.detach().clone() for name, w in base.model.named_parameters()}
    model = base.model.bfloat16()
    rounded = {name: w.detach().clone() for name, w in model.named_parameters()}
    adapter = random_adapter(model, base.targets)
    assert exact.keys() == rounded.keys()
    with applied(model, adapter):
        for name, update in adapter.modules.items():
            sum_ = rounded[f"{name}.weight"].float() + update.delta()
            gap = (model.get_submodule(name).weight.float() - sum_).abs()
            assert (gap <= sum_.abs() * 2**-8 + 1e-6).all(), name
    assert all(torch.equal(w, rounded[name]) for name, w in model.named_parameters())


# -- tasks ------------------------------------------------------------------------------------------------


def test_every_task_of_the_tables_loads_from_a_folder(tiny):
    for name in (*GLUE, *VISION):
        task = load_named(name, str(tiny / "data"))
        assert len(task.labels) == len(task.sentences) and len(task["test"]) == 40, name
        assert len(task["train"]) + len(task["validation"]) == 120 and len(task["validation"]) == 24, name
    sizes = {name: len(recipe.names) for name, recipe in VISION.items() if recipe.names}
    assert sizes == {"resisc45": 45, "eurosat": 10, "svhn": 10, "gtsrb": 43, "mnist": 10, "dtd": 47}
    assert all(len(set(r.names)) == len(r.names) for r in VISION.values())


def test_a_vision_task_that_does_not_fit_is_refused(tiny, tmp_path):
    rows = Dataset.from_dict({"image": [b"x"] * 10, "label": list(range(10))})
    for name, table, words in (
        ("sun397", rows, "without class names"),
        ("eurosat", rows.remove_columns("image"), "not \\['image'\\]"),
        ("mnist", Dataset.from_dict({"image": [b"x"] * 11, "label": list(range(11))}), "labels reach 10"),
    ):
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            table.to_parquet(tmp_path / name / f"{split}.parquet")
        with pytest.raises(ValueError, match=words):
            load_vision_task(name, str(tmp_path))


def test_the_loss_is_on_the_completion_alone(tiny):
    base = load(str(tiny / "tiny-llama"))
    task = load_prompts("gsm8k", str(tiny / "data"))
    features = base.encode(task, "validation", 3)
    batch = base.collate(features)
    for i in range(3):
        told = batch["labels"][i][batch["labels"][i] != causal.IGNORED]
        assert base.tokenizer.decode(told) == task["validation"]["completion"][i] + base.tokenizer.eos_token
    with torch.inference_mode():
        out = base.model(**batch)
    kept = batch["labels"][:, 1:] != causal.IGNORED
    p = out.logits[:, :-1].log_softmax(-1).gather(-1, batch["labels"][:, 1:].clamp(min=0)[..., None])[..., 0]
    assert float(out.loss) == pytest.approx(float(-p[kept].mean()), rel=1e-5)


def test_a_long_prompt_loses_its_beginning(tiny, monkeypatch):
    monkeypatch.setattr(causal, "MAX_LENGTH", 20)
    base = load(str(tiny / "tiny-llama"))
    task = load_prompts("squad", str(tiny / "data"))
    (ids, asked), *_ = base.encode(task, "train", 1)
    assert len(ids) == 20 and 0 < asked < 20
    whole = base.tokenizer(task["train"]["prompt"][0])["input_ids"]
    assert ids[:asked] == whole[-asked:] and ids[-1] == base.tokenizer.eos_token_id


@pytest.mark.slow
def test_the_harness_marks_real_tasks_on_local_data(tiny, tmp_path):
    pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    from lora_opcm.lab.experiments.harness import Harness

    known = set(TaskManager().all_tasks)
    assert {r.harness for r in PROMPTED.values() if r.harness} <= known
    names = ["squad", "xsum", "gsm8k", "wmt16"]
    data = [load_prompts(name, str(tiny / "data")) for name in names]
    test = Harness(data, str(tiny / "tiny-llama"), limit=3)
    test.memory = tmp_path
    adapter = random_adapter(test.base.model, test.base.targets)
    found = test.correct(adapter)
    assert {n: len(v) for n, v in found.items()} == dict.fromkeys(names, 3)
    assert found["squad"].mean() == test.reports["squad"]["exact_match,none"]
    assert found["xsum"].mean() == pytest.approx(test.reports["xsum"]["rouge1,none"])
    assert found["gsm8k"].mean() == test.reports["gsm8k"]["exact_match,flexible-extract"]
    assert 0 < found["wmt16"].mean() < 1 and "bleu,none" in test.reports["wmt16"]
    test.reports = {}
    assert all(np.array_equal(v, found[n]) for n, v in test.correct(adapter).items()) and not test.reports


# -- training ---------------------------------------------------------------------------------------------


def test_a_checkpoint_cut_short_is_not_resumed_from(tmp_path):
    for step, state in ((5, '{"global_step": 5}'), (10, '{"global_step": 10}'), (15, '{"glob'), (20, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-5"]
    assert last_checkpoint(tmp_path / "nothing") is None


def test_a_batch_that_cannot_be_shared_is_refused(tiny):
    protocol = Protocol(base=str(tiny / "tiny-bert"), batch_size=16, device_batch=5)
    with pytest.raises(ValueError, match="a batch of 16 cannot be shared by 1 processes, 5 examples at once"):
        train_adapter(load_named("rte", str(tiny / "data")), tiny / "run", protocol, quiet=True)


# -- what is learnt from, and what chooses ----------------------------------------------------------------


def shown(part):
    """Texts and labels as a trainer gets them."""
    return [part[i] for i in range(len(part))]


class Reads:
    """A base whose features are the texts."""

    family = "encoder"

    def encode(self, task, split):
        return task[split]["text"][:]


@pytest.mark.parametrize("count, held", [(40, 4), (49, 4), (2000, 200), (2500, 200)])
def test_a_tenth_of_the_training_texts_chooses_the_checkpoint_and_trains_nothing(count, held):
    task = random_task("one", count)
    train, held_out = map(shown, training._encode(Reads(), task, Protocol(checkpoint="train")))
    rows = list(zip(task["train"]["text"], task["train"]["label"]))
    assert train + held_out == rows and len(held_out) == held  # nothing is lost or stands in both
    train, held_out = map(shown, training._encode(Reads(), task, Protocol()))
    assert train == rows and held_out == list(zip(task["validation"]["text"], task["validation"]["label"]))


def test_shuffled_labels_are_the_same_labels_on_other_texts():
    task = random_task("one", 200)
    texts, labels = zip(*shown(training._encode(Reads(), task, Protocol(shuffled=True))[0]))
    assert list(texts) == task["train"]["text"][:] and sorted(labels) == sorted(task["train"]["label"])
    assert 0.35 < np.mean(np.array(labels) == np.array(task["train"]["label"])) < 0.65
    held = shown(training._encode(Reads(), task, Protocol(shuffled=True))[1])
    assert held == list(zip(task["validation"]["text"], task["validation"]["label"]))
    parts = training._encode(Reads(), task, Protocol(shuffled=True, checkpoint="train"))
    assert [row for part in parts for row in shown(part)] == list(zip(texts, labels))
    assert shown(training._encode(Reads(), task, Protocol(shuffled=True, seed=1))[0]) != list(zip(texts, labels))


def test_training_never_looks_at_validation_or_held_out_texts(tiny, tmp_path, monkeypatch):
    seen, plain = {True: [], False: []}, training.HeadTrainer.compute_loss

    def compute_loss(self, model, inputs, **rest):
        ids = (row[mask].tolist() for row, mask in zip(inputs["input_ids"], inputs["attention_mask"].bool()))
        seen[model.training] += map(tuple, ids)
        return plain(self, model, inputs, **rest)

    monkeypatch.setattr(training.HeadTrainer, "compute_loss", compute_loss)
    task, base = random_task("one", 60), str(tiny / "tiny-bert")
    train_adapter(task, tmp_path, Protocol(base=base, checkpoint="train", steps=8, evaluate_every=4), quiet=True)
    texts = [tuple(ids) for ids in load(base).encode(task, "train")]
    assert set(seen[True]) == set(texts[:54]) and set(seen[False]) == set(texts[54:])


def test_one_start_is_one_random_a_for_all_tasks(tiny, tmp_path):
    """With a learning rate of 0 an adapter is what it starts from."""
    found = []
    for name in ("one", "three"):
        protocol = Protocol(base=str(tiny / "tiny-bert"), one_start=True, learning_rate=0.0, steps=1, evaluate_every=1)
        model = train_adapter(random_task(name), tmp_path / name, protocol, quiet=True)
        found.append(next(w for n, w in model.named_parameters() if "lora_A" in n).detach())
    assert torch.equal(*found) and found[0].std() > 0
    starts = {Protocol(one_start=o, seed=s).start(t) for o in (True, False) for s in (0, 1) for t in "ab"}
    assert len(starts) == 6


@pytest.mark.parametrize("groups", [None, (0, 0, 1, 1, 1)])
def test_a_text_competes_for_the_labels_of_its_own_task(groups, generator):
    z, head = torch.randn(6, 4, generator=generator), torch.randn(5, 4, generator=generator)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    base = SimpleNamespace(scale=2.0, embed=lambda model, inputs: z)
    trainer = SimpleNamespace(base=base, head=head, groups=groups and torch.tensor(groups))
    loss, found = training.HeadTrainer.compute_loss(trainer, None, {"labels": labels}, return_outputs=True)
    expected = []
    for text, label in zip(z, labels.tolist()):
        against = [j for j in range(5) if groups is None or groups[j] == groups[label]]
        logits = {j: 2 * float(text @ head[j]) for j in against}
        expected.append(np.log(sum(np.exp(list(logits.values())))) - logits[label])
        assert int(found["logits"][len(expected) - 1].argmax()) == max(logits, key=logits.get)
    assert float(loss) == pytest.approx(np.mean(expected), rel=1e-5) and torch.equal(found["loss"], loss)


@pytest.mark.parametrize("name, kind, count", [("one", "NO", 1), ("many", "MULTI_GPU", 4), ("fsdp", "FSDP", 4)])
def test_accelerate_profiles_are_read_by_accelerate(name, kind, count):
    config = load_config_from_file(str(ROOT / "profiles" / "accelerate" / f"{name}.yaml"))
    assert (config.distributed_type.value, config.num_processes, config.mixed_precision) == (
        kind,
        count,
        "bf16",
    )
    if name == "fsdp":
        from accelerate import FullyShardedDataParallelPlugin

        options = {k.removeprefix("fsdp_"): v for k, v in config.fsdp_config.items()}
        options |= {"fsdp_version": options.pop("version"), "cpu_offload": options.pop("offload_params")}
        plugin = FullyShardedDataParallelPlugin(**options)
        assert plugin.fsdp_version == 2 and "FULL_STATE_DICT" in str(plugin.state_dict_type)


def command(tiny, out, task, base, *options):
    return ["-m", "lora_opcm.lab.train", str(out), "--task", task, "--base", str(tiny / base), "--sources",
            str(tiny / "data"), *map(str, options)]  # fmt: skip


def environment(cache):
    return os.environ | {"LORA_OPCM_CACHE": str(cache), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def distance(first, second):
    """The largest relative Frobenius distance between the updates of a module."""
    a, b = lo.load_adapter(first), lo.load_adapter(second)
    assert set(a.modules) == set(b.modules)
    deltas = [(a.modules[n].delta().double(), b.modules[n].delta().double()) for n in a.modules]
    return max(float((x - y).norm() / x.norm()) for x, y in deltas)


@pytest.mark.slow
def test_two_processes_train_the_adapter_of_one(tiny, tmp_path):
    """Gloo on CPUs, the same global batch; the tiny BERT has no dropout.

    The gradient of a batch is now the mean of two halves: float32 sums in another order, 1e-7 relative, which
    Adam's division lets grow, and the saved factors are float16. 1e-3 is far above both, and far below what a
    batch shared wrongly does (0.2 and more).
    """
    for count in (1, 2):
        many = ["--multi_gpu"] if count == 2 else []  # the launcher's word for several processes, GPUs or not
        launch = [sys.executable, "-m", "accelerate.commands.launch", *many, "--num_processes", str(count)]
        launch += [
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--main_process_port",
            "0",
        ]
        options = ("--steps", 40, "--batch-size", 16, "--rank", 4)
        done = subprocess.run(
            [*launch, *command(tiny, tmp_path / str(count), "rte", "tiny-bert", *options)],
            env=environment(tmp_path / f"cache{count}"), capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert ("rte: training, 2 processes" in done.stdout) == (count == 2)
    assert distance(tmp_path / "1" / "rte", tmp_path / "2" / "rte") < 1e-3


def wait_for(found, process, seconds=120):
    """Poll until `found()` is true while `process` runs."""
    end = time.monotonic() + seconds
    while not (value := found()):
        assert process.poll() is None, "it ended before it could be interrupted"
        assert time.monotonic() < end
        time.sleep(0.01)
    return value


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_adapter(tiny, tmp_path):
    options = ("--steps", 250, "--batch-size", 8, "--rank", 4)
    run = [sys.executable, *command(tiny, tmp_path / "killed", "gsm8k", "tiny-llama", *options)]
    cut = subprocess.Popen(run, env=environment(tmp_path / "cache"), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    wait_for(lambda: list((tmp_path / "cache").glob("runs/*/checkpoint-*/trainer_state.json")), cut)
    cut.send_signal(signal.SIGKILL)
    cut.wait()
    assert not (tmp_path / "killed" / "gsm8k").exists()
    again = subprocess.run(run, env=environment(tmp_path / "cache"), capture_output=True, text=True)
    assert "gsm8k: training, resumed from checkpoint-" in again.stdout, again.stderr[-3000:]
    whole = [sys.executable, *command(tiny, tmp_path / "whole", "gsm8k", "tiny-llama", *options)]
    subprocess.run(whole, env=environment(tmp_path / "other"), capture_output=True, check=True)
    assert distance(tmp_path / "whole" / "gsm8k", tmp_path / "killed" / "gsm8k") < 1e-3
    assert not list((tmp_path / "cache" / "runs").iterdir())  # the checkpoints are gone


@pytest.mark.nightly
@pytest.mark.timeout(2400)  # a quarter of an hour on two cores that do other things, too
def test_the_gpu_profile_rehearses_from_data_to_page(tmp_path):
    """Checkpoints, training killed once and resumed, merges, evaluation, notebooks, pages: all on one CPU."""
    import shutil

    import nbformat
    import pandas as pd

    pytest.importorskip("lm_eval")
    for name in ("Snakefile", "lora_opcm", "book", "data/adapters/manifest.json", "_config.yml"):
        source, target = ROOT / name, tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        skip = shutil.ignore_patterns("__pycache__", "_build")
        shutil.copytree(source, target, ignore=skip) if source.is_dir() else shutil.copy(source, target)
    profiles = tmp_path / "book" / "experiments" / "profiles.yaml"
    profiles.write_text(profiles.read_text().replace("tiny-llama]", "tiny-llama], steps: 300"))
    cache = tmp_path / "cache"
    env = environment(cache) | {"PYTHONPATH": str(tmp_path), "XDG_CACHE_HOME": str(cache)}
    with open(tmp_path / "log", "w") as log:
        make_all = [sys.executable, "-m", "snakemake", "--cores", "2", "--config", "profile=rehearsal"]
        run = subprocess.Popen(make_all, cwd=tmp_path, env=env, stdout=log, stderr=log)
        seen = wait_for(lambda: list(cache.glob("runs/tiny-llama-*/checkpoint-*/trainer_state.json")), run, 600)
        task = seen[0].parent.parent.name.split("-")[2]
        for child in psutil.Process(run.pid).children(recursive=True):
            if "lora_opcm.lab.train" in child.cmdline() and task in child.cmdline():
                child.kill()
        assert run.wait() == 0, (tmp_path / "log").read_text()[-3000:]
    told = (tmp_path / "_build" / "logs" / "rehearsal" / "adapters" / "tiny-llama" / f"seed0-{task}.log").read_text()
    assert f"{task}: training, resumed from checkpoint-" in told

    out = tmp_path / "_build" / "rehearsal"
    for name in ("classic", "vision", "planned"):
        cells = nbformat.read(out / "executed" / f"{name}.ipynb", 4).cells
        assert not [o for c in cells if c.cell_type == "code" for o in c.outputs if o.output_type == "error"]
        rows = pd.read_csv(out / "results" / f"{name}.csv")
        assert set(rows.profile) == {"rehearsal"} and len(rows) >= 30 and rows.adapters.notna().all()
        assert {"zero-shot", "own adapter", "TSV", "OPCM, paper"} <= set(rows.method)
        kind = "score" if name == "planned" else "accuracy"
        assert rows.value[rows.metric == kind].between(0, 1).all()
        shutil.copy(out / "executed" / f"{name}.ipynb", tmp_path / "book" / "experiments")
    pages = ("classic", "vision", "planned")
    toc = {
        "format": "jb-book",
        "root": "book/references",
        "chapters": [{"file": f"book/experiments/{n}"} for n in pages],
    }
    (tmp_path / "_toc.yml").write_text(json.dumps(toc))
    config = tmp_path / "_config.yml"  # without the copies for Colab: they link to pages that are not built here
    config.write_text(config.read_text().replace("    colab: book/_ext\n", ""))
    build = [
        Path(sys.executable).parent / "jupyter-book",
        "build",
        "--path-output",
        str(tmp_path / "jb"),
        ".",
    ]
    done = subprocess.run(build, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in pages:
        page = (tmp_path / "jb" / "_build" / "html" / "book" / "experiments" / f"{name}.html").read_text()
        assert "own adapter</th>" in page and 'class="lo-figure"' in page, name
