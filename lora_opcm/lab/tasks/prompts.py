"""Generation tasks: the prompts and completions that language models are tuned on.

Their evaluation is left to lm-evaluation-harness (`experiments.harness`); the prompts here repeat those of
the harness's tasks, so that what is trained is what is asked.
"""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

from datasets import Dataset, DatasetDict

from .hub import read
from .task import SPLIT_SEED, VALIDATION

TRAIN = 20_000  # examples a task is tuned on at most


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
# Nothing here has been run against the hub: repositories and columns are those of the harness's own configs,
# but for rajpurkar/squad and EdinburghNLP/xsum, which could not be checked.
PROMPTED = {
    "squad": Recipe(
        "rajpurkar/squad", "{context}\n\nQuestion: {question}\nAnswer:", " {answers[text][0]}", "exact_match",
        overrides={
            "dataset_path": "rajpurkar/squad", "validation_split": "validation",
            "output_type": "generate_until",
            "doc_to_text": "{{context}}\n\nQuestion: {{question}}\nAnswer:",
            "doc_to_target": Function(f"{__name__}.answers"),
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 32, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "ignore_case": True, "ignore_punctuation": True}],
        },
    ),
    "xsum": Recipe(
        "EdinburghNLP/xsum", SUMMARY.format("document"), " {summary}", "rouge1", "cnn_dailymail_abisee",
        {
            "dataset_path": "EdinburghNLP/xsum", "dataset_name": None,
            "process_docs": Function(f"{__name__}.as_news"),
        },
    ),
    "cnn_dailymail": Recipe(
        "abisee/cnn_dailymail", SUMMARY.format("article"), " {highlights}", "rouge1", "cnn_dailymail_abisee",
        config="3.0.0",
    ),
    "wmt16": Recipe(
        "wmt/wmt16", "Romanian phrase: {translation[ro]}\nEnglish phrase:", " {translation[en]}", "chrf",
        "wmt16-ro-en", config="ro-en",
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
    """A generation task by name, from the hub or from the folder `sources/<name>`.

    What comes from a folder is evaluated on that folder too.

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
