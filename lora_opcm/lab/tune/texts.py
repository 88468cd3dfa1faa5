"""The texts that a merge is chosen by: one small file a task."""

import csv
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np

from ..tasks.task import SPLIT_SEED

COLUMNS = (("prompt", "completion"), ("text", "label"))


@dataclass(frozen=True)
class Texts:
    """What one task asks, and the right answers.

    Attributes
    ----------
    questions, answers : tuple of str
        Prompts and completions, or texts and the labels they have.
    labels : tuple of str
        All labels of the file, sorted; none of completions.
    total : int
        How many texts the file has, of which these are a sample.
    """

    name: str
    sha256: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    labels: tuple[str, ...]
    total: int

    def __len__(self) -> int:
        return len(self.questions)


def read_texts(path: Path, limit: int | None = None) -> Texts:
    """A .jsonl or .csv file with columns `prompt` and `completion`, or `text` and `label`; others are passed over.

    Of more than `limit` texts a random sample is taken, the same one every time: files are often sorted.

    Raises
    ------
    ValueError
        If the file has another ending, no texts, not the columns, something else than text in them, or one label only.
    """
    if path.suffix not in READERS:
        raise ValueError(f"{path}: expected a file that ends in {' or '.join(READERS)}, with one text a line")
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        with open(path, encoding="utf-8-sig", newline="") as handle:  # spreadsheets begin with a byte order mark
            rows = list(READERS[path.suffix](handle))
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}: {error}") from None
    if not rows:
        raise ValueError(f"{path}: no text in it, expected at least one line with {_wanted()}")
    columns = next((pair for pair in COLUMNS if set(pair) <= rows[0][1].keys()), None)
    if columns is None:
        raise ValueError(f"{path}: has the columns {', '.join(map(str, rows[0][1]))}, expected {_wanted()}")
    pairs = [tuple(_text(path, line, row, name) for name in columns) for line, row in rows]
    labels = sorted({answer for _, answer in pairs}) if columns == COLUMNS[1] else []
    if len(labels) == 1:
        raise ValueError(f"{path}: every label is {labels[0]!r}, expected two labels or more to choose between")
    picked = sorted(np.random.default_rng(SPLIT_SEED).permutation(len(pairs))[:limit])
    questions, answers = zip(*(pairs[i] for i in picked))
    return Texts(path.name, sha256, questions, answers, tuple(labels), len(pairs))


def _wanted() -> str:
    return " or ".join(f"{one!r} and {other!r}" for one, other in COLUMNS)


def _jsonl(handle: TextIO) -> Iterator[tuple[int, dict]]:
    for line, text in enumerate(handle, 1):
        if text.strip():
            try:
                row = json.loads(text)
            except ValueError as error:
                raise ValueError(f"line {line} is no JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"line {line}: expected an object with {_wanted()}, got {text.strip()[:40]}")
            yield line, row


def _csv(handle: TextIO) -> Iterator[tuple[int, dict]]:
    reader = csv.DictReader(handle, strict=True)
    for row in reader:
        yield reader.line_num, row


READERS = {".jsonl": _jsonl, ".csv": _csv}


def _text(path: Path, line: int, row: dict, name: str) -> str:
    found = row.get(name)
    if name == "label" and isinstance(found, int) and not isinstance(found, bool):
        return str(found)
    if not isinstance(found, str):
        raise ValueError(f"{path}: line {line}: expected a text as {name!r}, got {json.dumps(found)[:60]}")
    if not found.strip():
        raise ValueError(f"{path}: line {line}: {name!r} is empty")
    return found
