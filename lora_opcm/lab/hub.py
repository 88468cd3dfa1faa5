"""Tasks from the Hugging Face hub: GLUE pairs, the eight vision tasks of the merging literature, and any other.

Every loader takes a hub name or a folder: one that `datasets` saved, or one with parquet files as the hub
keeps them. Nothing here has been run against the hub. The repositories of the vision tasks and the order of
the classes named here are those of FusionBench's configuration; that SUN397 and Stanford Cars carry their class
names (`ClassLabel`), and the splits of each repository, could not be checked.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Image, load_dataset, load_from_disk

from .tasks import SPLIT_SEED, VALIDATION, Task, hold_out, load_task, split_rows, tasks


def read(path: str, config: str | None = None, split: str | None = None) -> DatasetDict | Dataset:
    """A hub dataset, or a local folder: one that `datasets` saved, or parquet files named for their splits."""
    if Path(path, "dataset_dict.json").exists():
        data = load_from_disk(path)
        return data[split] if split else data
    return load_dataset(path, config, split=split)


def load_named(name: str, sources: str = "") -> Task:
    """A classification task the lab knows by name; `sources/<name>` in place of the hub where that is given.

    Raises
    ------
    ValueError
        For a name that no table has, with the names that exist.
    """
    if name in GLUE:
        columns, sentences = GLUE[name]
        source = {"path": str(Path(sources, name))} if sources else {"path": "nyu-mll/glue", "config": name}
        return load_hub_task(**source, text=columns, sentences=sentences, name=name)
    if name in VISION:
        return load_vision_task(name, sources)
    if name in tasks():
        return load_task(name)
    raise ValueError(f"unknown task {name!r}; the tasks are {', '.join([*tasks(), *GLUE, *VISION])}")


# -- texts ------------------------------------------------------------------------------------------------

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


# -- pictures ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pictures:
    """One vision task: where it is, and the words of its zero-shot head."""

    path: str
    templates: tuple[str, ...]
    names: tuple[str, ...] = ()  # in the order of the labels; empty: as the dataset names them
    config: str | None = None


def load_vision_task(name: str, sources: str = "") -> Task:
    """One of the eight vision tasks; `sources/<name>` in place of the hub where that is given.

    Raises
    ------
    ValueError
        If the splits or columns are not there, or labels and class names do not fit each other.
    """
    recipe = VISION[name]
    path = str(Path(sources, name)) if sources else recipe.path
    data = read(path, None if sources else recipe.config)
    if missing := {"train", "test"} - set(data):
        raise ValueError(f"{path}: expected the splits train and test, {sorted(missing)} is missing")
    for split in ("train", "test"):
        if missing := {"image", "label"} - set(data[split].column_names):
            raise ValueError(
                f"{path}: split {split!r} has columns {data[split].column_names}, not {sorted(missing)}"
            )
    feature = data["train"].features["label"]
    given = tuple(feature.names) if isinstance(feature, ClassLabel) else ()
    names = recipe.names or tuple(" ".join(word.replace("_", " ").split("/")).strip() for word in given)
    if not names:
        raise ValueError(
            f"{path}: the column 'label' is {feature}, without class names, and we have none for {name}"
        )
    if given and len(given) != len(names):
        raise ValueError(f"{path}: the dataset has {len(given)} classes, we name {len(names)}")
    held = min(VALIDATION, len(data["train"]) // 5)
    parts = data["train"].train_test_split(test_size=held, seed=SPLIT_SEED)
    splits = {"train": parts["train"], "validation": parts["test"], "test": data["test"].shuffle(SPLIT_SEED)}
    found = {label for rows in splits.values() for label in rows["label"][:]}
    if not found <= set(range(len(names))):
        raise ValueError(f"{path}: labels reach {max(found)}, we have names for {len(names)} classes")
    keep = ["image", "label"]
    return Task(
        name=name,
        labels=names,
        sentences=tuple(tuple(t.format(n) for t in recipe.templates) for n in names),
        splits=DatasetDict(
            {k: d.select_columns(keep).cast_column("image", Image()) for k, d in splits.items()}
        ),
        column="image",
    )


PHOTO = ("a photo of a {}.", "a picture of the {}.")
AERIAL = ("a satellite image of {}.", "{} seen from above.")
DIGITS = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
# fmt: off
TEXTURES = (
    "banded", "blotchy", "braided", "bubbly", "bumpy", "chequered", "cobwebbed", "cracked", "crosshatched",
    "crystalline", "dotted", "fibrous", "flecked", "freckled", "frilly", "gauzy", "grid", "grooved", "honeycombed",
    "interlaced", "knitted", "lacelike", "lined", "marbled", "matted", "meshed", "paisley", "perforated", "pitted",
    "pleated", "polka-dotted", "porous", "potholed", "scaly", "smeared", "spiralled", "sprinkled", "stained",
    "stratified", "striped", "studded", "swirly", "veined", "waffled", "woven", "wrinkled", "zigzagged",
)
LAND = (
    "fields of annual crops", "forest", "grass and shrubs", "a highway", "an industrial estate", "pasture",
    "an orchard or vineyard", "a residential area", "a river", "a lake or the sea",
)
SCENES = (
    "airplane", "airport", "baseball diamond", "basketball court", "beach", "bridge", "chaparral", "church",
    "circular farmland", "cloud", "commercial area", "dense residential area", "desert", "forest", "freeway",
    "golf course", "ground track field", "harbour", "industrial area", "intersection", "island", "lake", "meadow",
    "medium residential area", "mobile home park", "mountain", "overpass", "palace", "parking lot", "railway",
    "railway station", "rectangular farmland", "river", "roundabout", "runway", "sea ice", "ship", "snowberg",
    "sparse residential area", "stadium", "storage tank", "tennis court", "terrace", "thermal power station",
    "wetland",
)
SIGNS = (  # German traffic signs 0 to 42
    "speed limit 20", "speed limit 30", "speed limit 50", "speed limit 60", "speed limit 70", "speed limit 80",
    "end of speed limit 80", "speed limit 100", "speed limit 120", "no overtaking", "no overtaking by lorries",
    "priority at the next crossing", "priority road", "give way", "stop", "closed to all vehicles", "no lorries",
    "no entry", "danger", "bend to the left", "bend to the right", "double bend", "bumpy road", "slippery road",
    "road narrows on the right", "roadworks", "traffic lights ahead", "pedestrians", "children crossing",
    "cyclists crossing", "ice or snow", "wild animals", "end of all limits", "turn right ahead", "turn left ahead",
    "straight ahead only", "straight ahead or right", "straight ahead or left", "keep right", "keep left",
    "roundabout", "end of no overtaking", "end of no overtaking by lorries",
)
VISION = {
    "sun397": Pictures("tanganke/sun397", PHOTO),
    "stanford_cars": Pictures("tanganke/stanford_cars", ("a photo of a {}.", "a photo of a {}, a car.")),
    "resisc45": Pictures("tanganke/resisc45", AERIAL, SCENES),
    "eurosat": Pictures("tanganke/eurosat", AERIAL, LAND),
    "svhn": Pictures("ufldl-stanford/svhn", ('a photo of the house number "{}".',), DIGITS, "cropped_digits"),
    "gtsrb": Pictures("tanganke/gtsrb", ('a photo of the traffic sign "{}".',), SIGNS),
    "mnist": Pictures("ylecun/mnist", ('the handwritten digit "{}".',), DIGITS),
    "dtd": Pictures("tanganke/dtd", ("a {} texture.", "a photo of something {}."), TEXTURES),
}
# fmt: on
