"""A sentence answered in the page: the page reads words as transformers does, and says what the package says."""

import base64
import json

import numpy as np
import pytest
import torch
from conftest import SITE
from transformers import AutoTokenizer

import lora_opcm as lo
from lora_opcm.lab import load_task, tasks
from lora_opcm.lab.bases import load
from lora_opcm.lab.bases.encoder import tokenise
from lora_opcm.lab.embedded import place
from lora_opcm.site import explore, live

PAGE = "book/experiments/eight_adapters.html"
FOLDER = SITE.parent.parent / explore.FOLDER
ODD = [
    "Café naïve, 東京 tower — it's $5 & up!  (ok?)",
    "x" * 120 + " tail, unbelievable\tTabs\nnew 🙂 emoji\u200b 1,234.5%",
    "İstanbul ÅNGSTRÖM ß ﬁ … «quoted» ~tilde~ ^^ `tick` 한국어",
    " ".join(["word"] * 90),
]
ERROR = 0.03  # of a probability, for weights in 8 bits


def in_browser(test):
    return pytest.mark.browser(pytest.mark.timeout(300)(test))


def numbers(text, dtype, *shape):
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype).copy().reshape(shape or -1))


def unpacked(pack):
    """As the page reads it, written apart."""
    scales, whole, plain = (numbers(pack[k], t) for k, t in (("scales", "<f4"), ("bytes", "i1"), ("numbers", "<f4")))
    found, row, byte, number = {}, 0, 0, 0
    for name, m, n in pack["matrices"]:
        found[name] = whole[byte : byte + m * n].reshape(m, n) * scales[row : row + m, None]
        row, byte = row + m, byte + m * n
    for name, length in pack["vectors"]:
        found[name] = plain[number : number + length]
        number += length
    assert (row, byte, number) == (len(scales), len(whole), len(plain))
    return found


@pytest.mark.slow
def test_a_pack_is_the_model_to_half_a_step_of_eight_bits():
    """All weights that MiniLM uses, both factors of every module of every adapter, and the heads as they are."""
    packs, base, adapters = live.packs(), load(), live.adapters()
    weights = {n: w for n, w in base.model.state_dict().items() if not n.endswith("_ids")}
    seen = set()
    for name, pack in packs.items():
        found = unpacked(pack)
        if name == "words" or name.startswith("layer"):
            prefix = "embeddings." if name == "words" else f"encoder.layer.{name.removeprefix('layer')}."
            for key, x in found.items():
                true = weights[prefix + key]
                half = true.abs().amax(-1, keepdim=True) / 254 if x.ndim == 2 else 0
                assert ((x - true).abs() <= half + 1e-6).all(), (name, key)
                seen.add(prefix + key)
            continue
        adapter = adapters[name]
        if name != "merged":
            assert torch.equal(found.pop("head"), base.head(load_task(name)).flatten())
        assert len(found) == 2 * len(adapter)
        for key, update in adapter.items():
            dense = found[f"{key}/left"].mT @ found[f"{key}/right"]
            assert (dense - update.left.float() @ update.right.float()).norm() < 0.02 * update.norm(), (name, key)
    assert seen == set(weights)
    words = packs["words"]["vocabulary"].split("\n")
    assert [base.tokenizer.convert_tokens_to_ids(w) for w in words] == list(range(len(base.tokenizer)))


@pytest.mark.slow
def test_the_merged_adapter_is_of_all_eight_at_the_length_that_is_told():
    asked, data = live.adapters(), explore.read("live", FOLDER)
    assert list(asked) == [*tasks(), "merged"]
    mean = np.mean([asked[name].norm() for name in tasks()])
    assert asked["merged"].norm() == pytest.approx(data["length"] * mean, rel=1e-4)
    assert max(u.rank for u in asked["merged"].values()) == 16
    again = lo.merge([lo.adapter_path(name) for name in tasks()], "whitening", rank=16)
    assert (again - asked["merged"]).norm() < 1e-4 * mean


@pytest.mark.slow
def test_the_answers_to_begin_with_are_those_of_the_package():
    stored, fresh = explore.read("live", FOLDER), live.data()
    assert [t["labels"] for t in stored["tasks"]] == [list(load_task(t["name"]).labels) for t in stored["tasks"]]
    for one, other in zip(stored["sentences"], fresh["sentences"], strict=True):
        assert (one["text"], one["task"]) == (other["text"], other["task"])
        for name, rows in one["answers"].items():
            assert np.allclose(rows, other["answers"][name], atol=2e-3), (one["text"], name)
            assert np.allclose(np.sum(rows, 1), 1, atol=2e-3)
    opening = stored["sentences"][stored["opens"]]
    base, own, merged = opening["answers"][opening["task"]]  # what the page says of it
    assert np.argmax(base) != np.argmax(own) == np.argmax(merged) and max(merged) < max(own)
    goalie = stored["sentences"][list(live.SENTENCES).index("ng-rec")]
    assert len({int(np.argmax(row)) for row in goalie["answers"]["ng-rec"]}) == 1


def answered(page, text, **also):
    page.locator(".lo-explore textarea").fill(text)
    want = json.dumps({"text": text, "live": True} | also)
    page.wait_for_function(
        f"() => {{ const n = document.querySelector('.lo-explore').numbers, w = {want};"
        " return Object.keys(w).every(k => n[k] === w[k]) }"
    )
    return page.locator(".lo-explore").evaluate("b => b.numbers")


def read_model(page):
    page.get_by_role("button", name="Read the model").click()
    page.wait_for_selector(".lo-explore[data-model]")


def choose(page, task):
    page.locator(".lo-explore label").get_by_text(task, exact=True).click()


@in_browser
def test_the_page_says_what_the_package_says(opened):
    """Odd words, the sentences to begin with, and texts of every task: ids are equal, labels too but for near ties."""
    known = {text: task for task, text in live.SENTENCES.items()} | dict.fromkeys(ODD, "tweets")
    known |= {" ".join(load_task(name)["test"]["text"][0].split()[:25]): name for name in tasks()}
    said, tokenizer = live.answers(list(known)), AutoTokenizer.from_pretrained(place("minilm"))
    page, same = opened(PAGE), []
    read_model(page)
    for text, task in known.items():
        choose(page, task)
        found = answered(page, text, task=task)
        assert found["ids"] == tokenise([text], tokenizer)[0], text
        for here, there in zip(found["answers"], said[text][task], strict=True):
            assert np.allclose(here, there, atol=ERROR), (text, task, here, there)
            first, second = sorted(there)[:-3:-1]
            same.append(np.argmax(here) == np.argmax(there))
            assert same[-1] or first - second < ERROR, (text, task)
    assert np.mean(same) > 0.95 and len(same) == 3 * len(known)


@in_browser
def test_a_length_of_nought_is_the_base_and_a_longer_one_is_further(opened):
    page = opened(PAGE)
    slider = page.locator(".lo-explore input[type=range]")
    assert slider.is_disabled()
    read_model(page)
    text, far = live.SENTENCES[live.OPENS], []
    for length in (0, 1, 2):
        slider.fill(str(length))
        base, _, merged = answered(page, text, length=length)["answers"]
        far.append(np.abs(np.subtract(base, merged)).max())
    assert far[0] < 1e-6 < far[1] < far[2]


@in_browser
def test_before_the_model_is_read_only_known_sentences_are_answered(opened):
    page = opened(PAGE)
    data = explore.read("live", FOLDER)
    for task in ("tweets", "ng-sci"):
        page.locator(".lo-explore select").select_option(index=list(live.SENTENCES).index(task))
        found = page.locator(".lo-explore").evaluate("b => b.numbers")
        (entry,) = (s for s in data["sentences"] if s["task"] == task)
        assert (found["text"], found["task"], found["answers"]) == (entry["text"], task, entry["answers"][task])
        assert page.locator(".lo-explore textarea").input_value() == entry["text"]
    for text, words in (("something else", "read the model"), ("  ", "No sentence, no answer.")):
        page.locator(".lo-explore textarea").fill(text)
        assert words in page.locator(".lo-say").text_content()
        assert page.locator(".lo-explore").evaluate("b => b.numbers.answers") is None


@in_browser
def test_a_site_without_the_model_says_so(opened):
    page = opened(PAGE, console=False)
    page.route("**/live/layer1.js", lambda route: route.abort())
    page.get_by_role("button", name="Read the model").click()
    page.wait_for_function("document.querySelector('.lo-say').textContent.includes('layer1.js cannot be loaded')")
    assert page.get_by_role("button", name="Read the model").is_enabled()
    page.unroute("**/live/layer1.js")
    read_model(page)  # another try goes on from there
    assert answered(page, "We sold the wheat.")["answers"]


@in_browser
def test_nothing_of_the_model_is_read_before_it_is_asked_for(opened):
    page, asked = opened(PAGE), []
    page.on("request", lambda r: asked.append(r.url))
    page.wait_for_timeout(500)
    read = page.evaluate("performance.getEntriesByType('resource').map(e => e.name)")
    assert not [url for url in [*read, *asked] if "/explore/live/" in url]
    assert any("live.data.js" in url for url in read)
