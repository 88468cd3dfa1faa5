"""What a merged adapter was made of: a recipe that another run can repeat and check, and a model card."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from .adapters import CONFIG, Adapter, AdapterError, load_adapter
from .methods import merge
from .writing import write_text

RECIPE, CARD = "merge_recipe.json", "README.md"
VERSION = 1  # of the recipe's layout


def digest(path: str | os.PathLike) -> str:
    """sha256 of an adapter: of its .safetensors file, and of its config where it has one.

    Names of folders do not count, so a copy elsewhere has the same digest.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise AdapterError(f"{path}: no .safetensors file to hash")
    found = hashlib.sha256()
    for file in [*files, *([path / CONFIG] if (path / CONFIG).is_file() else [])]:
        with open(file, "rb") as handle:
            found.update(hashlib.file_digest(handle, "sha256").digest())
    return found.hexdigest()


def write_recipe(
    inputs: Sequence[str | os.PathLike],
    output: Path,
    call: Mapping,
    dropped: Mapping[str, float],
    versions: Mapping,
) -> Path:
    """Write the recipe of a merge, beside a file or into a folder, whole or not at all.

    `call` holds the arguments of `merge`; `dropped` the share of ‖ΔW‖² that truncation cut off, per module.
    """
    output = Path(output)
    recipe = {
        "recipe": VERSION,
        "inputs": [{"name": Path(p).name, "sha256": digest(p)} for p in inputs],
        "merge": dict(call),
        "dropped": {name: share for name, share in dropped.items() if share > 0},
        "output_sha256": digest(output),
        "versions": dict(versions),
    }
    path = output / RECIPE if output.is_dir() else output.with_suffix(".recipe.json")
    write_text(path, json.dumps(recipe, indent=1) + "\n")
    return path


def read_recipe(path: str | os.PathLike) -> dict:
    """A recipe that `write_recipe` wrote.

    Raises
    ------
    AdapterError
        If the file is no recipe, or one of another version.
    """
    path = Path(path)
    path = path / RECIPE if path.is_dir() else path
    try:
        recipe = json.loads(path.read_text())
        known = recipe["recipe"] == VERSION and {"inputs", "merge"} <= set(recipe)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{path}: expected a merge recipe: {error}") from None
    if not known:
        raise AdapterError(f"{path}: recipe version {recipe['recipe']}, expected {VERSION}")
    return recipe


def repeat(recipe: Mapping, inputs: Sequence[str | os.PathLike]) -> Adapter:
    """The merge a recipe describes, done again from the files it names by hash, in the recipe's order.

    Raises
    ------
    AdapterError
        If one of the recipe's inputs is not among `inputs`.
    """
    found = {digest(p): p for p in inputs}
    missing = [i["name"] for i in recipe["inputs"] if i["sha256"] not in found]
    if missing:
        raise AdapterError(
            f"no file given has the hash of {', '.join(missing)}; give the {len(recipe['inputs'])} inputs"
        )
    return merge([load_adapter(found[i["sha256"]]) for i in recipe["inputs"]], **recipe["merge"])


def write_card(output: Path, adapter: Adapter, inputs: Sequence[str | os.PathLike], call: Mapping) -> Path:
    """A model card with the metadata the Hugging Face hub reads, in the folder of a merged PEFT adapter."""
    base = f"base_model: {adapter.base_model}\n" if adapter.base_model else ""
    options = "\n".join(f"- {k}: {v}" for k, v in call.items() if v is not None)
    names = "\n".join(f"- `{Path(p).name}`" for p in inputs)
    text = (
        f"---\n{base}library_name: peft\ntags: [lora, merge, lora-opcm]\n---\n\n# Merged LoRA adapter\n\nOne adapter out of\n\n"
        f"{names}\n\nmerged by `lora-opcm` with\n\n{options}\n\n`{RECIPE}` names the inputs by hash and says what truncation "
        "dropped; `lora-opcm verify` repeats the merge and compares.\n"
    )  # fmt: skip
    path = output / CARD
    write_text(path, text)
    return path
