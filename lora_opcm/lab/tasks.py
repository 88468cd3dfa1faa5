"""Classification tasks, and the eight that need only the Python package index; more are in `hub`.

A task is texts, integer labels, and a sentence for each label; the sentences become the frozen head, so
no task has weights of its own and merging adapters needs no head surgery.
"""

import csv
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from datasets import Dataset, DatasetDict, Image

from .assets import DATA, fetch

SPLIT_SEED = 0  # fixes which texts are train, validation and test; training seeds never touch it
VALIDATION = 400  # texts held out of training, at most a fifth of it


@dataclass(frozen=True)
class Task:
    """One task: `train`, `validation` and `test` with columns `text` or `image` and `label`, and label sentences.

    `sentences` are the words of the frozen head: one sentence a label or, for images, several that are averaged.
    """

    name: str
    labels: tuple[str, ...]
    sentences: tuple[str | tuple[str, ...], ...]
    splits: DatasetDict
    column: str = "text"

    def __getitem__(self, split: str) -> Dataset:
        return self.splits[split]

    @cached_property
    def sha256(self) -> str:
        """Hash of every text (or image file) and label in order, to tell one version of the data from another."""
        digest = hashlib.sha256()
        for split in ("train", "validation", "test"):
            rows = self.splits[split]
            if self.column == "image":
                rows = rows.cast_column("image", Image(decode=False))
                rows = ({"label": row["label"], "image": row["image"]["bytes"].hex()} for row in rows)
            for row in rows:
                digest.update(f"{split}\t{row['label']}\t{row[self.column]}\n".encode())
        return digest.hexdigest()


def tasks() -> tuple[str, ...]:
    """Names of the eight tasks of the protocol, in the order the book lists them."""
    return tuple(TASKS)


@cache
def load_task(name: str) -> Task:
    """One of the eight tasks by name.

    Raises
    ------
    ValueError
        For an unknown name, with the names that exist.
    AssetError
        If the texts cannot be fetched or fail their hash.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; the tasks are {', '.join(TASKS)}")
    recipe = TASKS[name]
    train, test = recipe.read(tuple(recipe.classes))
    labels = tuple(recipe.classes)
    rng = np.random.default_rng(SPLIT_SEED)
    splits = split_rows(train, test, rng)
    index = {label: i for i, label in enumerate(labels)}
    return Task(
        name=name,
        labels=labels,
        sentences=tuple(recipe.template.format(words) for words in recipe.classes.values()),
        splits=DatasetDict(
            {
                split: Dataset.from_dict({"text": [t for _, t in rows], "label": [index[c] for c, _ in rows]})
                for split, rows in splits.items()
            }
        ),
    )


def hold_out(rows, count, rng):
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


# -- the eight tasks --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    read: Callable  # classes -> (train rows, test rows)
    template: str
    classes: dict[str, str]  # label in the file -> words in the template


def _rows(file: str, label: str = "Category", text: str = "Text") -> list[dict]:
    """Rows of an Orange .tab file: three header lines (names, types, roles), then tab-separated CSV."""
    with open(fetch(DATA) / file, encoding="utf8", newline="") as handle:
        reader = csv.reader(handle, delimiter="\t")
        names, _, _ = next(reader), next(reader), next(reader)
        rows = [dict(zip(names, row)) for row in reader if len(row) == len(names)]
    return [row | {"label": row[label], "text": row[text]} for row in rows if row[text].strip()]


def _published(stem: str) -> Callable:
    def read(classes):
        files = (f"{stem}-train.tab", f"{stem}-test.tab")
        return tuple([(r["label"], r["text"]) for r in _rows(f) if r["label"] in classes] for f in files)

    return read


def _tweets(classes):
    """The file has no published split: originals only (a retweet's author wrote nothing), 20 % for test."""
    rows = _rows("election-tweets-2016.tab", label="Author", text="Content")
    rows = [(r["label"], r["text"]) for r in rows if r["Is retweet"] == "False" and r["label"] in classes]
    rows = list(dict.fromkeys(rows))
    return hold_out(rows, len(rows) // 5, np.random.default_rng(SPLIT_SEED))


NEWS, WIRE = "A newsgroup post about {}.", "A newswire story about {}."

TASKS = {
    "ng-comp": Recipe(_published("20newsgroups"), NEWS, {
        "comp.graphics": "computer graphics",
        "comp.os.ms-windows.misc": "Microsoft Windows",
        "comp.sys.ibm.pc.hardware": "IBM PC hardware",
        "comp.sys.mac.hardware": "Apple Macintosh hardware",
        "comp.windows.x": "the X Window System",
    }),
    "ng-rec": Recipe(_published("20newsgroups"), NEWS, {
        "rec.autos": "cars",
        "rec.motorcycles": "motorcycles",
        "rec.sport.baseball": "baseball",
        "rec.sport.hockey": "ice hockey",
    }),
    "ng-sci": Recipe(_published("20newsgroups"), NEWS, {
        "sci.crypt": "cryptography",
        "sci.electronics": "electronics",
        "sci.med": "medicine",
        "sci.space": "space flight",
    }),
    "ng-politics": Recipe(_published("20newsgroups"), NEWS, {
        "talk.politics.guns": "guns and gun control",
        "talk.politics.mideast": "politics of the Middle East",
        "talk.politics.misc": "American politics",
    }),
    "ng-religion": Recipe(_published("20newsgroups"), NEWS, {
        "alt.atheism": "atheism",
        "soc.religion.christian": "Christian faith",
        "talk.religion.misc": "religion in general",
    }),
    "reuters-r8": Recipe(_published("reuters-r8"), WIRE, {
        "acq": "mergers and acquisitions",
        "crude": "crude oil",
        "earn": "corporate earnings",
        "grain": "grain",
        "interest": "interest rates",
        "money-fx": "foreign exchange",
        "ship": "shipping",
        "trade": "international trade",
    }),
    "reuters-rare": Recipe(_published("reuters-r52"), WIRE, {
        "alum": "aluminium",
        "bop": "the balance of payments",
        "cocoa": "cocoa",
        "coffee": "coffee",
        "copper": "copper",
        "cpi": "consumer prices",
        "gnp": "gross national product",
        "gold": "gold",
        "ipi": "industrial production",
        "iron-steel": "iron and steel",
        "jobs": "employment",
        "money-supply": "money supply",
        "nat-gas": "natural gas",
        "reserves": "foreign reserves",
        "rubber": "rubber",
        "sugar": "sugar",
    }),
    "tweets": Recipe(_tweets, "A tweet written by {}.", {
        "HillaryClinton": "Hillary Clinton",
        "realDonaldTrump": "Donald Trump",
    }),
}  # fmt: skip
