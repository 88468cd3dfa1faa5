"""A classification task: its examples, how they are split, and the words of its frozen head.

A task is texts or images, integer labels, and a sentence for each label; the sentences become the frozen
head, so no task has weights of its own and merging adapters needs no head surgery.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property

from datasets import Dataset, DatasetDict, Image

SPLIT_SEED = 0  # fixes which texts are train, validation and test; training seeds never touch it
VALIDATION = 400  # texts held out of training, at most a fifth of it


@dataclass(frozen=True)
class Task:
    """One task: splits `train`, `validation` and `test` with columns `text` or `image` and `label`.

    `sentences` are the words of the frozen head: one sentence a label or, for images, several that are
    averaged. Of several tasks in one, `groups` has for every label the task it belongs to.
    """

    name: str
    labels: tuple[str, ...]
    sentences: tuple[str | tuple[str, ...], ...]
    splits: DatasetDict
    column: str = "text"
    groups: tuple[int, ...] | None = None

    def __getitem__(self, split: str) -> Dataset:
        return self.splits[split]

    @cached_property
    def sha256(self) -> str:
        """Hash of every text (or image file) and label in order: tells versions of the data apart."""
        digest = hashlib.sha256()
        for split in ("train", "validation", "test"):
            rows = self.splits[split]
            if self.column == "image":
                rows = rows.cast_column("image", Image(decode=False))
                rows = ({"label": row["label"], "image": row["image"]["bytes"].hex()} for row in rows)
            for row in rows:
                digest.update(f"{split}\t{row['label']}\t{row[self.column]}\n".encode())
        return digest.hexdigest()


def hold_out(rows, count, rng) -> tuple[list, list]:
    """Shuffled rows without `count` of them, and those."""
    order = rng.permutation(len(rows))
    return [rows[i] for i in order[count:]], [rows[i] for i in order[:count]]


def split_rows(train, test, rng) -> dict[str, list]:
    """Shuffle, drop training texts that stand in the test set too, and hold out the validation texts."""
    seen = {text for _, text in test}
    train = [row for row in dict.fromkeys(train) if row[1] not in seen]
    train, validation = hold_out(train, min(VALIDATION, len(train) // 5), rng)
    trained = {text for _, text in train}  # a few texts stand under two labels, hence in two rows
    validation = [row for row in validation if row[1] not in trained]
    test, _ = hold_out(test, 0, rng)
    return {"train": train, "validation": validation, "test": test}
