"""A language model that classifies: what it says next is held to transformers and to lm-evaluation-harness."""

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict

import lora_opcm as lo
from lora_opcm.lab import evaluation
from lora_opcm.lab.attach import applied
from lora_opcm.lab.bases import classifier
from lora_opcm.lab.bases.next_token import NextToken, spoken
from lora_opcm.lab.bases.tiny import tiny
from lora_opcm.lab.evaluation import Evaluator
from lora_opcm.lab.protocol import Protocol
from lora_opcm.lab.tasks import Task, load_task, tasks
from lora_opcm.lab.training import train_adapter

RIVERS = ("A note about rivers.", "A note about clouds in summer.", "A note about the stones of a river.")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny(folder)
    return str(folder / "tiny-llama")


def notes(sentences=RIVERS, count=60):
    """Texts of many lengths, whose first word is their label."""
    rng, splits = np.random.default_rng(0), {}
    words = ["river", "cloud", "stone"]
    for split in ("train", "validation", "test"):
        labels = rng.integers(3, size=count).tolist()
        texts = [" ".join([words[k], *rng.choice(words, rng.integers(1, 12))]) for k in labels]
        splits[split] = Dataset.from_dict({"text": texts, "label": labels})
    return Task("notes", ("r", "c", "s"), sentences, DatasetDict(splits))


def test_what_label_sentences_share_is_said_first():
    assert spoken(notes()) == ("A note about", ["rivers", "clouds in summer", "the stones of a river"])
    other = notes(("The cat.", "The car.", "The cats and dogs."))  # words are not cut
    assert spoken(other) == ("The", ["cat", "car", "cats and dogs"])
    for task in map(load_task, tasks()):
        opening, words = spoken(task)
        assert [f"{opening} {w}." for w in words] == list(task.sentences) and len(opening.split()) > 2


def test_labels_that_begin_alike_are_refused_by_name(llama):
    task = notes(("On sun and rain.", "On sun and wind.", "On the moon."))
    with pytest.raises(ValueError, match="notes: two labels begin with one token of .*'sun and rain'"):
        classifier(llama).head(task)


def test_batches_of_a_language_model_answer_as_one_text_alone(llama):
    """Logits of the model's own output layer at the last token, without padding."""
    task, base, g = notes(), classifier(llama), torch.Generator().manual_seed(0)
    modules = {n: m for n, m in base.model.named_modules() if n.endswith(("q_proj", "down_proj"))}
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    parts = {n: lo.LowRank(draw(m.out_features, 2), draw(2, m.in_features)) for n, m in modules.items()}
    adapter, (opening, words) = lo.Adapter(parts), spoken(task)
    found = Evaluator([task], base=llama).correct(adapter)["notes"]
    ids = lambda text: base.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    first, features, told = [ids(" " + w)[0] for w in words], base.encode(task, "test"), []
    with torch.inference_mode(), applied(base.model, adapter):
        batched = base.embed(base.model, base.collate(features)) @ base.head(task).T
        for text in task["test"]["text"]:
            whole = torch.tensor([base.tokenizer(text)["input_ids"] + ids(f"\n\n{opening}")])
            told.append(base.model(whole).logits[0, -1, first])
    assert torch.allclose(batched, torch.stack(told), atol=1e-4)
    assert np.array_equal(found, batched.argmax(1).numpy() == np.array(task["test"]["label"][:]))


def test_updates_are_added_in_float32_to_a_model_in_bfloat16(llama, monkeypatch):
    """As it lies on a GPU: one rounding, of the sum."""
    base, g = classifier(llama), torch.Generator().manual_seed(0)
    base.model.bfloat16()
    monkeypatch.setattr(evaluation, "classifier", lambda name: base)
    monkeypatch.setattr(evaluation, "bfloat16_here", lambda: True)
    evaluator, name = Evaluator([notes()], base=llama, fast=True), "model.layers.0.mlp.down_proj"
    module = base.model.get_submodule(name)
    before, update = (
        module.weight.detach().clone(),
        lo.LowRank(torch.randn(32, 2, generator=g), torch.randn(2, 64, generator=g)),
    )
    with applied(evaluator.model, lo.Adapter({name: update}), evaluator.exact):
        assert torch.equal(module.weight, (before.float() + update.left @ update.right).bfloat16())
    assert torch.equal(module.weight, before)


@pytest.mark.slow
def test_a_language_model_learns_labels(llama, tmp_path):
    protocol = Protocol(
        base=llama,
        target_modules=NextToken.targets,
        learning_rate=2e-2,
        steps=60,
        evaluate_every=20,
        checkpoint="train",
    )
    task = notes(count=120)
    model = train_adapter(task, tmp_path, protocol, quiet=True)
    assert {n.split(".lora_")[0] for n, p in model.named_parameters() if p.requires_grad and p.abs().sum() > 0}
    evaluator, adapter = Evaluator([task], base=llama), lo.load_adapter(tmp_path / "best")
    before, after = (evaluator.correct(a)["notes"].mean() for a in (None, adapter))
    assert after > max(0.6, before + 0.1)


@pytest.mark.slow
def test_the_harness_and_held_decoding_choose_the_same_label():
    """lm-evaluation-harness by the likelihood of the label's token, and `generate` that may say nothing but labels."""
    from lm_eval.models.huggingface import HFLM

    task, base = load_task("ng-sci"), classifier("smollm2")
    features, head = base.encode(task, "test", 12), base.head(task)
    first = [base.tokenizer(f" {w}", add_special_tokens=False)["input_ids"][0] for w in spoken(task)[1]]
    with torch.inference_mode():
        ours = [int((base.embed(base.model, base.collate([f])) @ head.T).argmax()) for f in features]
        batched = (base.embed(base.model, base.collate(features)) @ head.T).argmax(1).tolist()
    harness = HFLM(base.model, tokenizer=base.tokenizer, batch_size=4)
    asked = [(("", ""), ids, [token]) for ids in features for token in first]
    scores = [score for score, _ in harness._loglikelihood_tokens(asked, disable_tqdm=True)]
    assert np.reshape(scores, (12, len(first))).argmax(1).tolist() == ours == batched
    for ids, label in zip(features, ours, strict=True):
        said = base.model.generate(
            torch.tensor([ids]), max_new_tokens=1, do_sample=False, prefix_allowed_tokens_fn=lambda *_: first
        )
        assert int(said[0, -1]) == first[label]
