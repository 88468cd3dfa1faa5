"""The eight vision tasks of the merging literature, from the Hugging Face hub or from folders.

Nothing here has been run against the hub. The repositories and the order of the classes named here are those
of FusionBench's configuration; that SUN397 and Stanford Cars carry their class names (`ClassLabel`), and the
splits of each repository, could not be checked.
"""

from dataclasses import dataclass
from pathlib import Path

from datasets import ClassLabel, DatasetDict, Image

from .hub import read
from .task import SPLIT_SEED, VALIDATION, Task


@dataclass(frozen=True)
class Recipe:
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
            raise ValueError(f"{path}: split {split!r} has columns {data[split].column_names}, not {sorted(missing)}")
    feature = data["train"].features["label"]
    given = tuple(feature.names) if isinstance(feature, ClassLabel) else ()
    names = recipe.names or tuple(" ".join(word.replace("_", " ").split("/")).strip() for word in given)
    if not names:
        raise ValueError(f"{path}: the column 'label' is {feature}, without class names, and we have none for {name}")
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
        splits=DatasetDict({k: d.select_columns(keep).cast_column("image", Image()) for k, d in splits.items()}),
        column="image",
    )


PHOTO = ("a photo of a {}.", "a picture of the {}.")
AERIAL = ("a satellite image of {}.", "{} seen from above.")
DIGITS = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
# fmt: off
TEXTURES = (
    "banded", "blotchy", "braided", "bubbly", "bumpy", "chequered", "cobwebbed", "cracked", "crosshatched",
    "crystalline", "dotted", "fibrous", "flecked", "freckled", "frilly", "gauzy", "grid", "grooved",
    "honeycombed", "interlaced", "knitted", "lacelike", "lined", "marbled", "matted", "meshed", "paisley",
    "perforated", "pitted", "pleated", "polka-dotted", "porous", "potholed", "scaly", "smeared",
    "spiralled", "sprinkled", "stained", "stratified", "striped", "studded", "swirly", "veined", "waffled",
    "woven", "wrinkled", "zigzagged",
)
LAND = (
    "fields of annual crops", "forest", "grass and shrubs", "a highway", "an industrial estate", "pasture",
    "an orchard or vineyard", "a residential area", "a river", "a lake or the sea",
)
SCENES = (
    "airplane", "airport", "baseball diamond", "basketball court", "beach", "bridge", "chaparral", "church",
    "circular farmland", "cloud", "commercial area", "dense residential area", "desert", "forest",
    "freeway", "golf course", "ground track field", "harbour", "industrial area", "intersection", "island",
    "lake", "meadow", "medium residential area", "mobile home park", "mountain", "overpass", "palace",
    "parking lot", "railway", "railway station", "rectangular farmland", "river", "roundabout", "runway",
    "sea ice", "ship", "snowberg", "sparse residential area", "stadium", "storage tank", "tennis court",
    "terrace", "thermal power station", "wetland",
)
SIGNS = (  # German traffic signs 0 to 42
    "speed limit 20", "speed limit 30", "speed limit 50", "speed limit 60", "speed limit 70",
    "speed limit 80", "end of speed limit 80", "speed limit 100", "speed limit 120", "no overtaking",
    "no overtaking by lorries", "priority at the next crossing", "priority road", "give way", "stop",
    "closed to all vehicles", "no lorries", "no entry", "danger", "bend to the left", "bend to the right",
    "double bend", "bumpy road", "slippery road", "road narrows on the right", "roadworks",
    "traffic lights ahead", "pedestrians", "children crossing", "cyclists crossing", "ice or snow",
    "wild animals", "end of all limits", "turn right ahead", "turn left ahead", "straight ahead only",
    "straight ahead or right", "straight ahead or left", "keep right", "keep left", "roundabout",
    "end of no overtaking", "end of no overtaking by lorries",
)
VISION = {
    "sun397": Recipe("tanganke/sun397", PHOTO),
    "stanford_cars": Recipe("tanganke/stanford_cars", ("a photo of a {}.", "a photo of a {}, a car.")),
    "resisc45": Recipe("tanganke/resisc45", AERIAL, SCENES),
    "eurosat": Recipe("tanganke/eurosat", AERIAL, LAND),
    "svhn": Recipe("ufldl-stanford/svhn", ('a photo of the house number "{}".',), DIGITS, "cropped_digits"),
    "gtsrb": Recipe("tanganke/gtsrb", ('a photo of the traffic sign "{}".',), SIGNS),
    "mnist": Recipe("ylecun/mnist", ('the handwritten digit "{}".',), DIGITS),
    "dtd": Recipe("tanganke/dtd", ("a {} texture.", "a photo of something {}."), TEXTURES),
}
# fmt: on
