"""Causal language models: bases in 4 or 8 bits where bitsandbytes is, and the prompts they are tuned on.

An adapter is tuned on prompt and completion, with the loss on the completion alone. Its evaluation is left to
lm-evaluation-harness (`harness`); the prompts here repeat those of the harness's tasks, so that what is trained
is what is asked.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from datasets import Dataset, DatasetDict
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from .assets import AssetError
from .hub import read
from .tasks import SPLIT_SEED, VALIDATION

# Every linear layer of a Llama, Mistral or Qwen block.
LLAMA_LINEAR = r"model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
MAX_LENGTH = 1024  # tokens of prompt and completion; a longer prompt loses its beginning
TRAIN = 20_000  # examples a task is tuned on at most
IGNORED = -100  # the label torch's cross entropy skips


@dataclass(frozen=True)
class Prompts:
    """A generation task: `train` and `validation` with columns `prompt` and `completion`, and its evaluation.

    `harness` names a task of lm-evaluation-harness ("" for none), `config` is what its config is overridden
    with. `metric` is the one of its metrics we report, `keep` the filter it is taken from.
    """

    name: str
    splits: DatasetDict
    harness: str
    config: dict
    metric: str
    keep: str = "none"

    def __getitem__(self, split: str) -> Dataset:
        return self.splits[split]

    @cached_property
    def sha256(self) -> str:
        """Hash of every prompt and completion in order."""
        digest = hashlib.sha256()
        for split in ("train", "validation"):
            for row in self.splits[split]:
                digest.update(f"{split}\t{row['prompt']}\t{row['completion']}\n".encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Recipe:
    """Where the training rows of a task are, as format strings over their columns, and its evaluation."""

    path: str
    prompt: str
    completion: str
    metric: str
    harness: str = ""
    overrides: dict = field(default_factory=dict)
    config: str | None = None
    keep: str = "none"


class Function(str):
    """The full name of a function that the config of a harness task refers to."""


def as_news(rows: Dataset) -> Dataset:
    """XSum with the columns of CNN/DailyMail."""
    return rows.rename_columns({"document": "article", "summary": "highlights"})


def answers(row: dict) -> list[str]:
    """All accepted answers to a question of SQuAD."""
    return row["answers"]["text"]


SUMMARY = "Summarize the following article:\n\n{{{}}}\n\nSummary:"
# Tasks of the harness are used as they are. It has no plain SQuAD 1.1 and no XSum without a further library:
# the first is a config of ours with its exact match, the second its CNN/DailyMail task with another data set.
# Nothing here has been run against the hub: repositories and columns are those of the harness's own configs, but
# for rajpurkar/squad and EdinburghNLP/xsum, which could not be checked.
PROMPTED = {
    "squad": Recipe(
        "rajpurkar/squad", "{context}\n\nQuestion: {question}\nAnswer:", " {answers[text][0]}", "exact_match",
        overrides={
            "dataset_path": "rajpurkar/squad", "validation_split": "validation", "output_type": "generate_until",
            "doc_to_text": "{{context}}\n\nQuestion: {{question}}\nAnswer:", "doc_to_target": Function(f"{__name__}.answers"),
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 32, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "ignore_case": True, "ignore_punctuation": True}],
        },
    ),
    "xsum": Recipe(
        "EdinburghNLP/xsum", SUMMARY.format("document"), " {summary}", "rouge1", "cnn_dailymail_abisee",
        {"dataset_path": "EdinburghNLP/xsum", "dataset_name": None, "process_docs": Function(f"{__name__}.as_news")},
    ),
    "cnn_dailymail": Recipe(
        "abisee/cnn_dailymail", SUMMARY.format("article"), " {highlights}", "rouge1", "cnn_dailymail_abisee", config="3.0.0",
    ),
    "wmt16": Recipe(
        "wmt/wmt16", "Romanian phrase: {translation[ro]}\nEnglish phrase:", " {translation[en]}", "chrf", "wmt16-ro-en",
        config="ro-en",
    ),
    "gsm8k": Recipe(
        "openai/gsm8k", "Question: {question}\nAnswer:", " {answer}", "exact_match", "gsm8k", config="main",
        keep="flexible-extract",
    ),
    # HumanEval has nothing to train on; MBPP, small functions from one sentence, stands in.
    "humaneval": Recipe(
        "google-research-datasets/mbpp", '"""{text}"""\n', "{code}", "pass@1", "humaneval", config="full",
        keep="create_test",
    ),
}  # fmt: skip


def load_prompts(name: str, sources: str = "") -> Prompts:
    """A generation task by name, from the hub or from the folder `sources/<name>`, which is then evaluated on too.

    Raises
    ------
    ValueError
        For an unknown name, or rows without the columns the prompt needs.
    """
    if name not in PROMPTED:
        raise ValueError(f"unknown task {name!r}; the tasks are {', '.join(PROMPTED)}")
    recipe = PROMPTED[name]
    path = f"{sources}/{name}" if sources else recipe.path
    rows = read(path, None if sources else recipe.config, split="train")
    rows = rows.shuffle(SPLIT_SEED).select(range(min(TRAIN + VALIDATION, len(rows))))

    def fill(row: dict) -> dict:
        return {"prompt": recipe.prompt.format(**row), "completion": recipe.completion.format(**row)}

    try:
        rows = rows.map(fill, remove_columns=rows.column_names)
    except (KeyError, IndexError) as error:
        raise ValueError(f"{path}: has columns {rows.column_names}, the prompt asks for {error}") from None
    held = min(VALIDATION, len(rows) // 5)
    splits = {"train": rows.select(range(held, len(rows))), "validation": rows.select(range(held))}
    local = {"dataset_path": path, "dataset_name": None} if sources else {}
    config = recipe.overrides | local
    return Prompts(name, DatasetDict(splits), recipe.harness, config, recipe.metric, recipe.keep)


class Causal:
    """A causal language model as a base; `bases` says what the methods are for."""

    family, task_type, targets, workers = "causal", "CAUSAL_LM", LLAMA_LINEAR, 0

    def __init__(self, name: str, quantise: str = ""):
        self.name = name
        cuda = torch.cuda.is_available()
        options = {"dtype": torch.bfloat16 if cuda and torch.cuda.is_bf16_supported() else torch.float32}
        if quantise:
            options |= {"quantization_config": quantisation(quantise, options["dtype"])}
        try:
            self.model = AutoModelForCausalLM.from_pretrained(name, **options).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise AssetError(
                f"cannot load the language model {name!r}: {str(error).strip().splitlines()[0]}"
            ) from None
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token  # masked wherever it stands

    def encode(self, task: Prompts, split: str, limit: int | None = None) -> list[tuple[list[int], int]]:
        """(ids, how many of them are the prompt) of each example; a long prompt is cut at its beginning."""
        rows = task[split][:limit]
        found = []
        for prompt, completion in zip(rows["prompt"], rows["completion"]):
            asked = self.tokenizer(prompt)["input_ids"]
            told = self.tokenizer(completion, add_special_tokens=False)["input_ids"]
            told = [*told[: MAX_LENGTH - 1], self.tokenizer.eos_token_id]
            asked = asked[max(0, len(asked) + len(told) - MAX_LENGTH) :]
            found.append((asked + told, len(asked)))
        return found

    def collate(self, features: list[tuple[list[int], int]]) -> dict[str, Tensor]:
        """Right-padded `input_ids`, `attention_mask` and `labels`, shape=[b, longest]; prompts have no label."""
        longest = max(len(ids) for ids, _ in features)
        ids = torch.full((len(features), longest), self.tokenizer.pad_token_id)
        labels = torch.full((len(features), longest), IGNORED)
        mask = torch.zeros(len(features), longest, dtype=torch.long)
        for i, (tokens, asked) in enumerate(features):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            labels[i, asked : len(tokens)] = torch.tensor(tokens[asked:])
            mask[i, : len(tokens)] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def quantisation(quantise: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """The bitsandbytes config of "4bit" (NF4, products in `dtype`) or "8bit".

    Raises
    ------
    ValueError
        For another word.
    AssetError
        If bitsandbytes is not installed, or 4 bits are asked for without a GPU.
    """
    kinds: dict[str, Callable] = {
        "4bit": lambda: BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        ),
        "8bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
    }
    if quantise not in kinds:
        raise ValueError(f"quantise is {quantise!r}, expected '', '4bit' or '8bit'")
    if not is_bitsandbytes_available():
        raise AssetError(f"quantise={quantise!r} needs bitsandbytes: pip install 'lora-opcm[llm]'")
    if quantise == "4bit" and not torch.cuda.is_available():
        # On CPUs bitsandbytes 0.50 packs the weights at their first use; an adapter that peft attaches to a
        # model after that gives wrong answers, and so does the model from then on.
        raise AssetError("quantise='4bit' needs a GPU; on CPUs use '8bit'")
    return kinds[quantise]()
