"""Text tasks from the Hugging Face hub: three of GLUE, and any other.

Every loader takes a hub name or a folder: one that `datasets` saved, or one with parquet files as the hub
keeps them. Nothing here has been run against the hub.
"""

from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from .task import SPLIT_SEED, Task, hold_out, split_rows


def read(path: str, config: str | None = None, split: str | None = None) -> DatasetDict | Dataset:
    """A hub dataset, or a folder: one that `datasets` saved, or parquet files named for their splits."""
    if Path(path, "dataset_dict.json").exists():
        data = load_from_disk(path)
        return data[split] if split else data
    return load_dataset(path, config, split=split)


GLUE = {  # name -> columns, a sentence for each label
    "sst2": ("sentence", ["A bad review.", "A good review."]),
    "mrpc": (
        ("sentence1", "sentence2"),
        ["Two sentences that mean different things.", "Two sentences that mean the same."],
    ),
    "rte": (
        ("sentence1", "sentence2"),
        ["The first sentence implies the second.", "The first sentence does not imply the second."],
    ),
}


def load_hub_task(
    path: str,
    *,
    config: str | None = None,
    text: str | tuple[str, str] = "text",
    label: str = "label",
    sentences: dict[int, str] | list[str],
    name: str | None = None,
) -> Task:
    """A text task from a hub dataset (GLUE and the like), or from a folder that `datasets` reads.

    `text` is a column, or two for pair tasks (joined by " [SEP] "). `sentences` gives each label its
    sentence. Without a validation split a fifth of train is held out; without labelled test rows
    (GLUE hides them) the validation split becomes the test split.

    Raises
    ------
    ValueError
        If a column is missing, a label has no sentence, or nothing labelled is there to train on.
    """
    data = read(path, config)
    columns = (text,) if isinstance(text, str) else tuple(text)

    def rows(split: str) -> list[tuple[int, str]]:
        missing = [c for c in (*columns, label) if c not in data[split].column_names]
        if missing:
            raise ValueError(f"{path}: split {split!r} has columns {data[split].column_names}, not {missing}")
        return [(r[label], " [SEP] ".join(r[c] for c in columns)) for r in data[split] if r[label] >= 0]

    found = {split: rows(split) for split in data}
    if not found.get("train"):
        raise ValueError(f"{path}: expected a labelled 'train' split, found {sorted(data)}")
    rng = np.random.default_rng(SPLIT_SEED)
    if found.get("test"):
        train, test = found["train"] + found.get("validation", []), found["test"]
    elif found.get("validation"):
        train, test = found["train"], found["validation"]
    else:
        train, test = hold_out(found["train"], len(found["train"]) // 5, rng)
    ids = sorted({c for c, _ in train})
    sentences = dict(enumerate(sentences)) if isinstance(sentences, list) else sentences
    if set(ids) - set(sentences):
        raise ValueError(f"{path}: labels {sorted(set(ids) - set(sentences))} have no sentence")
    index = {c: i for i, c in enumerate(sorted(sentences))}
    splits = split_rows(train, test, rng)
    return Task(
        name=name or "-".join(filter(None, (Path(path).name, config))),
        labels=tuple(str(c) for c in sorted(sentences)),
        sentences=tuple(sentences[c] for c in sorted(sentences)),
        splits=DatasetDict(
            {
                split: Dataset.from_dict({"text": [t for _, t in r], "label": [index[c] for c, _ in r]})
                for split, r in splits.items()
            }
        ),
    )
