"""`lora-opcm tune`: what was planted is what is chosen, and losses are those of transformers and peft."""

import csv
import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from factories import update
from test_cli import run
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import lora_opcm as lo
from lora_opcm.files.adapter import Kind
from lora_opcm.lab.attach import applied, attached, beside
from lora_opcm.lab.bases import tiny
from lora_opcm.lab.tune.choose import Choice, choose
from lora_opcm.lab.tune.losses import judge
from lora_opcm.lab.tune.texts import Texts, read_texts

WORDS = [f"w{i}" for i in range(40)]
LABELS = tuple(WORDS[:6])
METHODS = {name: (name, {}) for name in ("tsv", "whitened_sum", "task_arithmetic", "opcm")}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The folder of a random Llama of 40 words, with logits that are far from flat."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "?", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}w1 {{ m.content }} w2{% endfor %}"
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.2,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(llama):
    return LlamaForCausalLM.from_pretrained(llama).eval()


def adapters(model, strength=0.02):
    """Two adapters of which half of either is common: no two methods make the same of them."""
    generator, found = torch.Generator().manual_seed(1), []
    layers = {
        n: m.weight.shape for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n
    }
    common = {n: update(*shape, 2, generator, scale=strength) for n, shape in layers.items()}
    for _ in range(2):
        modules = {n: common[n] + update(*layers[n], 2, generator, scale=strength) for n in layers}
        found.append(lo.Adapter(modules, config={"peft_type": "LORA", "task_type": "CAUSAL_LM"}))
    return found


@torch.no_grad()
def likelihood(model, prompts, completion):
    """log p of words and the end after prompts, all of one length, shape=[b]."""
    ids = torch.tensor([[0, *(3 + WORDS.index(w) for w in f"{p} {completion}".split()), 1] for p in prompts])
    logs = model(ids).logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    return logs[:, -1 - len(completion.split()) :].sum(1)


def silent(text):
    return lambda items, total=None: items


def texts(count, seed):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, 6)) for _ in range(count)]


def planted(model, teacher, count, seed):
    """Texts with labels as the base with `teacher` would give them: in the mean, no other model loses less on them."""
    found, rng = texts(count, seed), np.random.default_rng(seed)
    with applied(model, teacher):
        scores = torch.stack([likelihood(model, found, label) for label in LABELS], 1)
    return [(text, str(rng.choice(LABELS, p=p))) for text, p in zip(found, scores.double().softmax(1).numpy())]


def as_texts(rows, name="task", labels=LABELS):
    questions, answers = zip(*rows)
    return Texts(name, "", questions, answers, labels, len(rows))


# -- the choice ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:adapter. gains")
@pytest.mark.parametrize(
    ("method", "norms"),
    [
        ("tsv", 2**0.5),
        pytest.param("task_arithmetic", 2.0, marks=pytest.mark.slow),
        pytest.param("opcm", 1.0, marks=pytest.mark.slow),
        ("whitened_sum", 32**0.5),
    ],
)
def test_the_planted_method_and_length_are_chosen(llama, model, method, norms):
    """The labels are drawn from one merge of two adapters: it is the one that loses least on them."""
    both = adapters(model)
    teacher = lo.merge(both, method, scale=f"{norms}norm")
    tasks = [as_texts(planted(model, teacher, 60, seed), f"task {seed}") for seed in range(2)]
    found = choose(both, judge(str(llama), tasks), METHODS, silent)
    curve = found.curves()[method]
    assert found.best[0] == method and max(curve, key=curve.get) == pytest.approx(norms)
    assert list(curve) == sorted(curve) and min(curve) < norms < max(curve)
    others = [max(curve.values()) for name, curve in found.curves().items() if name != method]
    assert max(others) < found.kept(found.tried[found.best]) - 0.05
    for own, adapter, task in zip(found.own, both, tasks):
        with applied(model, adapter):
            scores = torch.stack([likelihood(model, task.questions, label) for label in LABELS], 1)
        right = torch.tensor([LABELS.index(answer) for answer in task.answers])
        assert own == pytest.approx(F.cross_entropy(scores, right, reduction="none").numpy(), rel=1e-3, abs=1e-4)
    assert found.again.method > 0.8 and found.again.low < found.kept(found.tried[found.best]) < found.again.high


def choice(losses, base=(8.0, 0.2), own=(4.0, 0.1), count=20):
    """Of made up mean losses of two tasks by candidate, with texts that differ a little."""
    spread = np.linspace(0.99, 1.01, count)
    rows = lambda means: [mean * spread for mean in means]  # noqa: E731
    of = [as_texts([("w1", "w2")] * count, name, ()) for name in "ab"]
    return Choice(of, rows(base), rows(own), {key: rows(means) for key, means in losses.items()})


def test_tasks_count_alike_whatever_their_losses_are():
    """By losses as they are the first would win: half a unit of the first task outweighs all of the second."""
    found = choice({("a", 0): (4.0, 0.2), ("b", 0): (4.8, 0.1), ("c", 0): (np.inf, 0.1)})
    assert found.best == ("b", 0)
    assert found.curves() == {"a": {1.0: pytest.approx(0.5)}, "b": {1.0: pytest.approx(0.9)}, "c": {1.0: -np.inf}}
    assert [row["kept"] for row in found.tasks()] == pytest.approx([0.8, 1.0])
    assert found.record()["tried"]["c"] == {"1": None}


def test_what_few_texts_cost_is_what_other_draws_lose():
    """Against resampling written apart: two candidates of equal promise, of which chance decides."""
    rng, count = np.random.default_rng(0), 12
    base, own = np.full(count, 2.0), np.full(count, 1.0)
    tried = {("a", 0): [1.2 + 0.3 * rng.standard_normal(count)], ("b", 2): [1.22 + 0.3 * rng.standard_normal(count)]}
    found = Choice([as_texts([("w1", "w2")] * count, "t", ())], [base], [own], tried)
    kept = np.array([2 - losses[0] for losses in tried.values()])  # of every text; the unit is one
    drawn = kept[:, rng.integers(count, size=(20_000, count))].mean(2)
    best, picks = kept.mean(1).argmax(), drawn.argmax(0)
    again = found.again
    assert again.method == again.length == pytest.approx((picks == best).mean(), abs=0.04)
    assert again.cost == pytest.approx(kept.mean(1)[best] - kept.mean(1)[picks].mean(), abs=0.01)
    assert again.flattery == pytest.approx((drawn.max(0) - kept.mean(1)[picks]).mean(), abs=0.01)
    assert [again.low, again.high] == pytest.approx(np.quantile(drawn[best], [0.025, 0.975]), abs=0.02)


def test_an_adapter_that_does_not_help_on_its_texts_is_refused(llama, model):
    both = adapters(model)
    tasks = [as_texts(planted(model, sign * both[i], 40, i), f"task {i}") for i, sign in enumerate((1, -1))]
    with pytest.raises(ValueError, match="loses .* on task 1, expected less than .* are these its texts"):
        choose(both, judge(str(llama), tasks), METHODS, silent)


# -- losses --------------------------------------------------------------------------------------------------


def test_the_loss_of_a_completion_is_that_of_transformers(llama, model):
    rows = [(prompt, answer) for prompt, answer in zip(texts(5, 0), ("w3", "w3 w4 w5", "w9 w9", "w1", "w7 w8"))]
    rows.append(("w1", "w2 w3 w4"))  # of another length
    live = judge(str(llama), [as_texts(rows, labels=())])
    for (prompt, answer), loss in zip(rows, live.losses(0, silent(""))):
        asked = [0, *(3 + WORDS.index(w) for w in prompt.split())]
        told = [*(3 + WORDS.index(w) for w in answer.split()), 1]
        expected = model(torch.tensor([asked + told]), labels=torch.tensor([[-100] * len(asked) + told])).loss
        assert loss == pytest.approx(expected.item(), rel=1e-5)
    chat = judge(str(llama), [as_texts([("w5", "w6")], labels=())], chat=True)
    templated = model(torch.tensor([[4, 8, 5, 9, 1]]), labels=torch.tensor([[-100, -100, -100, 9, 1]])).loss
    assert chat.losses(0, silent(""))[0] == pytest.approx(templated.item(), rel=1e-5)


def test_a_label_is_weighed_against_the_others(llama, model):
    labels = ("w1", "w2", "w3 w4", "w5 w6 w7")
    rows = list(zip(texts(7, 3), 2 * labels))
    live = judge(str(llama), [as_texts(rows, labels=labels)])
    questions = [text for text, _ in rows]
    scores = torch.stack([likelihood(model, questions, label) for label in labels], 1)
    expected = F.cross_entropy(scores, torch.tensor([labels.index(right) for _, right in rows]), reduction="none")
    assert live.losses(0, silent("")) == pytest.approx(expected.numpy(), rel=1e-5)


def test_a_label_is_a_word_of_its_own_unless_the_text_ends_in_space(tmp_path):
    tiny.llama(tmp_path, ["The river", "a cloud"])
    live = judge(str(tmp_path), [as_texts([("The", "river"), ("A\n", "cloud")], labels=("cloud", "river"))])
    read = live.base.tokenizer.decode
    found = [(read(ids[:asked]), read(ids[asked:])) for ids, asked in live.examples[0]]
    assert found == [
        (f"<s>{text}", f"{gap}{label}</s>")
        for text, gap in (("The", " "), ("A\n", ""))
        for label in live.texts[0].labels
    ]


def test_an_encoder_is_asked_by_the_cosine_of_its_labels(tmp_path):
    tiny.bert(tmp_path, [*WORDS, "river", "cloud"])
    tasks = [as_texts([("w1 river", "cloud"), ("w2", "a river")], labels=("a river", "cloud"))]
    live = judge(str(tmp_path), tasks)

    def embedding(text):
        ids = torch.tensor([live.base.tokenizer(text)["input_ids"]])
        return F.normalize(live.model(ids).last_hidden_state.mean(1), dim=-1)

    head = torch.cat([embedding(label) for label in ("a river", "cloud")])
    with torch.no_grad():
        logits = torch.cat([20 * embedding(text) @ head.T for text in tasks[0].questions])
    expected = F.cross_entropy(logits, torch.tensor([1, 0]), reduction="none")
    assert live.losses(0, silent("")) == pytest.approx(expected.numpy(), rel=1e-4)
    with pytest.raises(ValueError, match="is an encoder, expected the columns 'text' and 'label'"):
        judge(str(tmp_path), [as_texts([("w1", "w2")], labels=())])
    with pytest.raises(ValueError, match="an encoder has no chat template"):
        judge(str(tmp_path), tasks, chat=True)


@torch.no_grad()
def test_beside_the_weights_is_added_to_them(model):
    adapter = adapters(model, 0.1)[0]
    generator = torch.Generator().manual_seed(2)
    embedding = lo.Adapter(
        adapter.modules | {"model.embed_tokens": update(32, 43, 2, generator)},
        kinds={"model.embed_tokens": Kind("embedding")},
        config={"peft_type": "LORA"},
    )
    ids, before = torch.tensor([[0, 5, 9, 20]]), {name: x.clone() for name, x in model.named_parameters()}
    plain = model(ids).logits
    with beside(model, embedding, 0.7):
        found = model(ids).logits
    with applied(model, embedding, scale=0.7):
        torch.testing.assert_close(found, model(ids).logits, atol=1e-4, rtol=1e-4)
    with attached(model, 0.7 * embedding):
        torch.testing.assert_close(found, model(ids).logits, atol=1e-4, rtol=1e-4)
    assert (found - plain).abs().max() > 0.1
    assert torch.equal(model(ids).logits, plain)
    assert all(torch.equal(x, before[name]) for name, x in model.named_parameters())


@torch.no_grad()
def test_beside_weights_that_lie_the_other_way_round():
    torch.manual_seed(0)
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=16, n_layer=1, n_head=2)).eval()
    one = {"transformer.h.0.attn.c_attn": update(48, 16, 2, torch.Generator().manual_seed(1))}
    one |= {"transformer.h.0.attn.c_proj": update(16, 16, 2, torch.Generator().manual_seed(2))}
    ids = torch.tensor([[1, 2, 3]])
    for said in (True, False):  # which peft may save of layers of both kinds, and goes by the layer
        adapter = lo.Adapter(one, config={"fan_in_fan_out": said})
        with beside(gpt, adapter):
            found = gpt(ids).logits
        with applied(gpt, adapter):
            torch.testing.assert_close(found, gpt(ids).logits, atol=1e-4, rtol=1e-4)
        with attached(gpt, adapter):
            torch.testing.assert_close(found, gpt(ids).logits, atol=1e-4, rtol=1e-4)
    wide = {"transformer.h.0.attn.c_attn": update(16, 48, 2, torch.Generator().manual_seed(1))}
    with pytest.raises(ValueError, match=r"c_attn: the weight is \(48, 16\), the update \(16, 48\)"):
        with beside(gpt, lo.Adapter(wide)):
            pass


# -- files ---------------------------------------------------------------------------------------------------


def write(path, rows, columns):
    with open(path, "w", encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            csv.writer(file).writerows([columns, *rows])
        else:
            file.writelines(json.dumps(dict(zip(columns, row))) + "\n" for row in rows)
    return path


@pytest.mark.parametrize("columns", [("prompt", "completion"), ("text", "label")])
def test_both_kinds_of_file_say_the_same(tmp_path, columns):
    rows = [('one,\n"two"', "äh"), ("three", "b"), (" four", "b ")]
    found = [read_texts(write(tmp_path / f"a{end}", rows, columns)) for end in (".csv", ".jsonl")]
    for each in found:
        assert list(zip(each.questions, each.answers)) == rows
        assert each.labels == (() if columns[0] == "prompt" else ("b", "b ", "äh"))
        assert each.sha256 == hashlib.sha256((tmp_path / each.name).read_bytes()).hexdigest()
    some = read_texts(tmp_path / "a.csv", 2)
    assert len(some) == 2 and some.total == 3 and some.labels == found[0].labels
    assert some == read_texts(tmp_path / "a.csv", 2) and set(some.questions) < set(found[0].questions)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "expected a file that ends in .jsonl or .csv"),
        ("a.jsonl", "\n \n", "no text in it"),
        ("a.csv", "text,label\n", "no text in it"),
        ("a.csv", "prompt,answer\nq,a\n", "has the columns prompt, answer, expected 'prompt' and 'completion' or"),
        ("a.jsonl", '{"text": "t"}', "has the columns text, expected"),
        ("a.jsonl", '{"text": "t", "label": "a"}\n{"text": "u"}', "line 2: expected a text as 'label', got null"),
        ("a.jsonl", '{"text": "t", "label": "a"}\n{"text"', "line 2 is no JSON"),
        ("a.jsonl", "[1]", "line 1: expected an object"),
        (
            "a.jsonl",
            '{"prompt": [{"role": "user"}], "completion": "a"}',
            "line 1: expected a text as 'prompt', got \\[",
        ),
        ("a.csv", "prompt,completion\nq,\n", "line 2: 'completion' is empty"),
        ("a.csv", "text,label\nt\n", "line 2: expected a text as 'label', got null"),
        ("a.jsonl", '{"text": "t", "label": 1}\n{"text": "u", "label": 1}', "every label is '1', expected two"),
        ("a.csv", 'text,label\n"t,a\n', "unexpected end of data"),
        ("a.csv", b"text,label\n\xff,a\n", "can't decode"),
    ],
)
def test_files_are_refused_by_name_and_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        read_texts(path)


# -- the command ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def desk(llama, model, tmp_path_factory):
    """Adapters a and b, and texts that the task arithmetic of both would have labelled; a base beside them."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "base").symlink_to(llama)
    both = adapters(model)
    teacher = lo.merge(both, "task_arithmetic", scale="2norm")
    for i, (name, end) in enumerate((("a", ".csv"), ("b", ".jsonl"))):
        lo.save_adapter(both[i], folder / name)
        rows = planted(model, teacher, 70, i)
        write(folder / f"{name}{end}", rows, ("text", "label"))
        write(folder / f"{name}-asked.jsonl", rows, ("prompt", "completion"))
    return folder


TWO = ("tune", "a", "b", "--base", "base")
LABELLED = (*TWO, "--data", "a.csv", "--data", "b.jsonl")


def test_the_command_writes_what_it_chose_and_by_what(desk, llama):
    done = run(desk, *LABELLED, "-o", "m", "--texts", 60)
    assert "task_arithmetic at 2 mean norms keeps" in done.stdout and "120 texts chose it" in done.stdout
    assert "←" in done.stdout and done.stderr.startswith("wrote m: ")
    recipe = json.loads((desk / "m" / "merge_recipe.json").read_text())
    assert recipe["merge"] == {"method": "task_arithmetic", "scale": "2.0norm"}
    said = recipe["choice"]
    assert said["base"] == "base" and said["candidate"] == "task_arithmetic" and said["norms"] == 2
    assert [task["number"] for task in said["tasks"]] == [60, 60] and [task["of"] for task in said["tasks"]] == [70, 70]
    for task, name in zip(said["tasks"], ("a.csv", "b.jsonl")):
        assert task["texts"] == name and task["sha256"] == hashlib.sha256((desk / name).read_bytes()).hexdigest()
        assert task["merged"] < task["own"] < task["base"]
    assert set(said["tried"]) == set(METHODS)
    run(desk, "verify", "b", "a", "--against", "m")
    files = [read_texts(desk / name, 60) for name in ("a.csv", "b.jsonl")]
    live = judge(str(llama), files)
    with beside(live.model, lo.load_adapter(desk / "m")):
        found = [live.losses(i, silent("")).mean() for i in range(2)]
    assert found == pytest.approx([task["merged"] for task in said["tasks"]], rel=1e-4)


def test_the_command_takes_options_of_methods_and_of_merge(desk):
    words = (*TWO, "--data", "a-asked.jsonl", "--data", "b-asked.jsonl", "--texts", 40, "--rank", 3, "--json")
    done = run(
        desk,
        *words,
        "-o",
        "n",
        "--method",
        "opcm:alpha=0.75,variant=fusionbench",
        "--dtype",
        "float16",
        "--drop",
        "*k_proj",
    )
    said = json.loads(done.stdout)
    assert list(said["tried"]) == ["opcm:alpha=0.75,variant=fusionbench"]
    recipe, merged = json.loads((desk / "n" / "merge_recipe.json").read_text()), lo.load_adapter(desk / "n")
    assert recipe["choice"] == said and recipe["dtype"] == "float16"
    scale = f"{said['norms']!r}norm"
    call = {"method": "opcm", "scale": scale, "alpha": 0.75, "variant": "fusionbench", "rank": 3}
    assert recipe["merge"] == call | {"drop": ["*k_proj"]} and not any("k_proj" in name for name in merged)
    assert {u.rank for u in merged.values()} == {3}
    run(desk, "verify", "a", "b", "--against", "n")


def test_without_a_base_it_is_the_rule_without_data(desk):
    done = run(desk, "tune", "a", "b", "-o", "ruled")
    assert "nothing was measured, without --base: tsv at 1.41 mean norms" in done.stderr
    expected = lo.merge([desk / "a", desk / "b"], "tsv", scale="auto")
    found = lo.load_adapter(desk / "ruled")
    assert all(torch.equal(found[name].left, update.left) for name, update in expected.items())
    run(desk, "tune", "a", "b", "-o", "ruled", "--method", "opcm:alpha=0.75", "--overwrite")
    recipe = json.loads((desk / "ruled" / "merge_recipe.json").read_text())
    assert recipe["merge"] == {"method": "opcm", "scale": "auto", "alpha": 0.75} and "choice" not in recipe


@pytest.fixture
def odd(desk):
    """Adapters that are none for the base."""
    generator = torch.Generator().manual_seed(0)
    name, causal = "model.layers.0.mlp.up_proj", {"peft_type": "LORA", "task_type": "CAUSAL_LM"}
    kinds = {
        "other": lo.Adapter({"encoder.query": update(32, 32, 2, generator)}, config=causal),
        "wide": lo.Adapter({name: update(48, 16, 2, generator)}, config=causal),
        "head": lo.Adapter({name: update(48, 32, 2, generator)}, config=causal | {"task_type": "SEQ_CLS"}),
        "full": lo.Adapter(
            {name: update(48, 32, 2, generator)}, config=causal, saved={"lm_head.weight": torch.ones(43, 32)}
        ),
    }
    for name, adapter in kinds.items():
        lo.save_adapter(adapter, desk / name, overwrite=True)
    return desk


DATA = ("--data", "a.csv", "--data", "b.jsonl", "-o", "x")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tune", "a", "-o", "x"], "expected two adapters or more, got 1"),
        ([*TWO, "-o", "x"], "expected --data 2 times, once for each adapter and in their order, got it 0 times"),
        ([*TWO, "--data", "a.csv", "-o", "x"], "got it 1 times"),
        ([*TWO, "--data", "a.csv", "b.jsonl", "-o", "x"], "b.jsonl: expected an adapter there; give texts by --data"),
        ([*TWO, "--data", "a.csv", "--data", "none.csv", "-o", "x"], "none.csv"),
        ([*LABELLED, "-o", "a"], "a/adapter_model.safetensors: exists already"),
        ([*LABELLED, "-o", "x", "--method", "tvs"], "unknown method 'tvs'"),
        ([*LABELLED, "-o", "x", "--method", "opcm:beta=1"], "opcm has no option 'beta'"),
        ([*LABELLED, "-o", "x", "--method", "opcm:alpha=2"], "alpha must be"),
        ([*LABELLED, "-o", "x", "--method", "opcm:scale=2"], "the scale is what is chosen"),
        ([*LABELLED, "-o", "x", "--method", "regmean"], "regmean needs Gram matrices"),
        (["tune", "a", "b", "--base", "nowhere", *DATA], "cannot load the base model 'nowhere'"),
        (["tune", "other", "other", "--base", "base", *DATA], "the base model has no module 'encoder.query'"),
        (["tune", "wide", "wide", "--base", "base", *DATA], "the weight is (48, 32), the update (48, 16)"),
        (
            ["tune", "a", "head", "--base", "base", *DATA],
            "head/adapter_model.safetensors: is for SEQ_CLS, expected low-rank updates alone",
        ),
        (["tune", "a", "full", "--base", "base", *DATA], "holds lm_head.weight in full, expected low-rank"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(odd, words, message):
    before = sorted(p.name for p in odd.iterdir())
    done = run(odd, *words, code=2)
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert sorted(p.name for p in odd.iterdir()) == before


@pytest.mark.slow
def test_help_is_quick_and_a_missing_extra_is_named(desk):
    """In a process of its own: nothing that takes long is imported until it is needed."""
    code = "import sys, lora_opcm.command.app as app; assert 'torch' not in sys.modules"
    code += f"; sys.modules['datasets'] = None; app.main({[*LABELLED, '-o', 'x']})"
    done = subprocess.run([sys.executable, "-c", code], cwd=desk, capture_output=True, text=True)
    assert done.returncode == 2 and "--base needs datasets, which is not installed" in done.stderr
