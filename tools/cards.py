"""`python tools/cards.py`: write the model card of every shipped adapter from what its files say.

Settings and accuracies come from `adapter_config.json` and `manifest.json`, classes from the task. Nothing is typed
here but sentences.
"""

import hashlib
import json
from pathlib import Path

from lora_opcm.lab.protocol import Record
from lora_opcm.lab.tasks.texts import TASKS
from lora_opcm.lab.train import read_manifest

DATA = Path(__file__).parents[1] / "data"
NAMES = {
    "ng": "posts of 20 Newsgroups",
    "reuters": "stories of Reuters-21578",
    "tweets": "tweets of the election of 2016",
}
VARIANTS = {
    "qv": "It serves the chapter on similarity, which compares ranks and seeds; its accuracy was not measured.",
    "same-start": "The adapters `same-start-…` were trained from one random initial A, and serve the chapters that ask"
    " what adapters share for that reason alone; their accuracies were not measured.",
}


def task_of(name: str) -> str:
    """The task an adapter was trained on: its folder's name, without what makes it special."""
    return name.removeprefix("same-start-").split("-qv-")[0]


def accuracy(entry: Record) -> str:
    """What the manifest says of an adapter of the eight."""
    return (
        f"On all texts of the test part it is right in {entry.own:.1%}, the base model without it in"
        f" {entry.zero_shot:.1%}."
    ).replace("%", " %")


def training(entry: Record) -> str:
    protocol, versions = entry.protocol, ", ".join(f"{name} {number}" for name, number in entry.versions.items())
    return (
        f"Trained for {protocol.steps} steps of {protocol.batch_size} texts with AdamW at a learning rate of"
        f" {protocol.learning_rate:g} (cosine), seed {protocol.seed}; the checkpoint best on validation texts, in"
        f" float16. Made with {versions}, on data of sha256 `{entry.data_sha256}`."
    )


def card(folder: Path, entry: Record | None) -> str:
    """The model card of the adapter in `folder`, with what the manifest says of it."""
    config = json.loads((folder / "adapter_config.json").read_text())
    task, base = task_of(folder.name), config["base_model_name_or_path"]
    recipe = TASKS[task]
    variant = next((text for mark, text in VARIANTS.items() if mark in folder.name), "")
    texts = next(text for start, text in NAMES.items() if task.startswith(start))
    sha256 = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    paragraphs = [
        f"---\nbase_model: {base}\nlibrary_name: peft\nlicense: mit\ntags: [lora, text-classification]\n---",
        f"# {folder.name}",
        f"A LoRA of rank {config['r']} (α = {config['lora_alpha']}) on {base.split('/')[-1]}, for {texts} in"
        f" {len(recipe.classes)} classes: {', '.join(recipe.classes.values())}. A text gets the class whose sentence"
        f" (“{recipe.template.format('…').rstrip('.')}”) has the nearest embedding, the mean over tokens, normalised.",
        variant or accuracy(entry),
        *([training(entry)] if entry else []),
        "```python\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModel\n\n"
        f'base = AutoModel.from_pretrained("{base}")\n'
        f'model = PeftModel.from_pretrained(base, "{folder.name}")\n'
        "```",
        "Made to study merging, not to be used: its texts are old and English, and a text of another class still gets"
        " one of these.",
        f"Layers: `{config['target_modules']}`. Weights: sha256 `{sha256}`. Licence: MIT, the base model's is"
        " Apache-2.0; the texts are not part of it, and where they come from stands in `data/README.md` of the"
        " repository.",
    ]
    return "\n\n".join(paragraphs) + "\n"


def cards(data: Path = DATA) -> dict[Path, str]:
    """The card of each adapter in `data`, by where it belongs."""
    manifest = read_manifest(data / "adapters")
    folders = sorted(path.parent for path in (data / "adapters").glob("*/adapter_config.json"))
    return {folder / "README.md": card(folder, manifest.get(folder.name)) for folder in folders}


if __name__ == "__main__":
    for path, text in cards().items():
        path.write_text(text, encoding="utf8")
