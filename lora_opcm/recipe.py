"""What a merged adapter was made of: a recipe that another run can repeat and check, and a model card."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from .adapters import CONFIG, WEIGHTS, Adapter, AdapterError, load_adapter, weights_of
from .formats import names_in
from .methods import merge
from .parallel import Progress
from .writing import beside, save_adapter, write_text

RECIPE, CARD = "merge_recipe.json", "README.md"
VERSION = 1  # of the recipe's layout


def digest(path: str | os.PathLike) -> str:
    """sha256 of an adapter: of its .safetensors file, and of its config where it has one.

    Names of folders do not count, so a copy elsewhere has the same digest; so has a folder and the file in it.
    """
    file = weights_of(path)
    config = file.parent / CONFIG
    found = hashlib.sha256()
    for part in [file, *([config] if file.name == WEIGHTS and config.is_file() else [])]:
        with open(part, "rb") as handle:
            found.update(hashlib.file_digest(handle, "sha256").digest())
    return found.hexdigest()


def run(
    adapters: Sequence[Adapter],
    call: Mapping,
    dtype: torch.dtype | None = None,
    dropped: dict[str, float] | None = None,
    progress: Progress | None = None,
) -> Adapter:
    """`merge(adapters, **call)` in a dtype wide enough for an output in `dtype`: rounded once, on writing."""
    if dtype is not None:
        adapters = [replace(a, dtype=torch.promote_types(a.dtype, dtype)) for a in adapters]
    return merge(adapters, dropped=dropped, progress=progress, **call)


def write_merge(
    merged: Adapter,
    output: str | os.PathLike,
    inputs: Sequence[tuple[str, str]],
    call: Mapping,
    dropped: Mapping[str, float],
    format: str | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a merged adapter, its recipe, and a card where it is a folder.

    All is written beside the output first and moved there at the end: a new folder appears whole, by one
    rename; in one that is there, each file is replaced by one.

    Parameters
    ----------
    inputs : sequence of (name, sha256)
    call : dict
        The arguments of `merge`.
    dropped : dict
        Share of ‖ΔW‖² that truncation cut off, per module.

    Raises
    ------
    AdapterError
        As `save_adapter`, and if any of the files exists and `overwrite` is not set.
    """
    output, format = Path(output), format or merged.format
    refuse_existing(output, overwrite, format)
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = beside(output)
    try:
        if format == "peft":
            made = save_adapter(merged, scratch, format, dtype=dtype)
            write_text(made / CARD, card(merged, [name for name, _ in inputs], call))
        else:
            scratch.mkdir()
            made = save_adapter(merged, scratch / output.name, format, dtype=dtype)
        written = {
            "recipe": VERSION,
            "inputs": [{"name": name, "sha256": sha256} for name, sha256 in inputs],
            "merge": dict(call),
            "dropped": {name: share for name, share in dropped.items() if share > 0},
            "format": format,
            "dtype": str(dtype or merged.dtype).removeprefix("torch."),
            "output_sha256": digest(made),
            "versions": {name: version(name) for name in ("lora-opcm", "torch")},
        }
        write_text(recipe_of(made), json.dumps(written, indent=1) + "\n")
        if made == scratch and not output.exists():
            os.rename(scratch, output)
        else:
            target = output if made == scratch else output.parent
            for name in (WEIGHTS, CONFIG, output.name, recipe_of(made).name, CARD):
                if (scratch / name).exists():
                    os.replace(scratch / name, target / name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return output


def refuse_existing(output: Path, overwrite: bool, format: str | None = None) -> None:
    """Raise AdapterError if a merge written to `output` would replace a file; asked before the work, and after.

    Also if the name is none for a `format` that is known: PEFT writes folders, the others .safetensors files.
    """
    if format == "peft" and output.is_file() and overwrite:
        raise AdapterError(f"{output}: a PEFT adapter is a folder, got a file that exists")
    if format not in (None, "peft") and (output.is_dir() or output.suffix != ".safetensors"):
        raise AdapterError(
            f"{output}: a {format} adapter is one file, expected a name ending in .safetensors"
        )
    if output.is_file() or output.suffix == ".safetensors" and not output.is_dir():
        files = [output, recipe_of(output)]
    else:
        files = [output / n for n in (WEIGHTS, "adapter_model.bin", CONFIG, RECIPE, CARD)]
    there = [path for path in files if path.exists()]
    if there and not overwrite:
        raise AdapterError(f"{there[0]}: exists already; --overwrite replaces it")


def recipe_of(output: str | os.PathLike) -> Path:
    """Where the recipe of a merged folder or file is; that of a folder for its weight file, too."""
    output = Path(output)
    if output.is_dir():
        return output / RECIPE
    inside = output.name == WEIGHTS and (output.parent / CONFIG).is_file()
    return output.parent / RECIPE if inside else output.with_suffix(".recipe.json")


def read_recipe(path: str | os.PathLike) -> dict:
    """A recipe that `write_merge` wrote.

    Raises
    ------
    AdapterError
        If the file is no recipe, or one of another version.
    """
    if not Path(path).is_file():
        raise AdapterError(
            f"{path}: expected a merge recipe there, got no file; --recipe names one elsewhere"
        )
    try:
        recipe = json.loads(Path(path).read_text(encoding="utf8"))
        known = recipe["recipe"]
        if known == VERSION:
            parts = (
                recipe["inputs"],
                recipe["merge"],
                recipe["output_sha256"],
                recipe["dtype"],
                recipe["format"],
            )
            if not (all({"name", "sha256"} <= set(i) for i in parts[0]) and isinstance(parts[1], dict)):
                raise ValueError("its inputs lack names or hashes")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise AdapterError(f"{path}: expected a merge recipe: {error!r:.200}") from None
    if known != VERSION:
        raise AdapterError(f"{path}: recipe version {known!r:.40}, expected {VERSION}")
    return recipe


def verify(
    against: str | os.PathLike,
    inputs: Sequence[str | os.PathLike],
    recipe: str | os.PathLike | None = None,
    tolerance: float | None = None,
    progress: Progress | None = None,
) -> dict:
    """Repeat the merge a recipe describes, from the files it names by hash, and compare with what is stored.

    Returns
    -------
    dict
        Whether the file is the one that was written (`unchanged`, by the recipe's hash), the `distance`
        ‖ΔW − ΔW'‖ / ‖ΔW'‖ to the repeated merge over all modules, the `tolerance` it is held to (that of
        `rounding` unless given), the module that differs most, and whether they are the `same`.

    Raises
    ------
    AdapterError
        If there is no recipe, or one of its inputs is not among `inputs`.
    """
    path = Path(recipe) if recipe else recipe_of(against)
    path = path / RECIPE if path.is_dir() else path
    found = read_recipe(path)
    stored = load_adapter(against)
    dtype = getattr(torch, str(found["dtype"]), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise AdapterError(f"{path}: dtype is {found['dtype']!r:.40}, expected a float dtype")
    given = {digest(p): p for p in inputs}
    missing = [str(i["name"]) for i in found["inputs"] if i["sha256"] not in given]
    if missing:
        raise AdapterError(
            f"{path}: no file given has the hash of {', '.join(missing)}; give the {len(found['inputs'])} inputs"
        )
    adapters = [load_adapter(given[i["sha256"]]) for i in found["inputs"]]
    try:
        again = run(adapters, found["merge"], dtype, progress=progress)
    except TypeError as error:
        raise AdapterError(f"{path}: the merge cannot be repeated: {error}") from None
    names = names_in(stored.format, again)
    again = again.with_modules({names[name]: u for name, u in again.modules.items()})
    allowed = 2 * rounding(stored) + 1e-5 if tolerance is None else tolerance
    gap, worst = distance(stored, again)
    return {
        "same": gap <= allowed, "distance": gap, "tolerance": allowed, "module that differs most": worst,
        "unchanged": digest(against) == found["output_sha256"], "sha256 in the recipe": found["output_sha256"],
        "recipe": str(path),
    }  # fmt: skip


def distance(a: Adapter, b: Adapter) -> tuple[float, str]:
    """‖ΔW_a − ΔW_b‖ / ‖ΔW_b‖ over all modules, and the module that adds most; infinite where names differ."""
    odd = sorted(a.modules.keys() ^ b.modules.keys())
    if odd:
        return float("inf"), odd[0]
    gaps = {}
    for name, x in a.modules.items():
        y = b.modules[name]
        if x.shape != y.shape:
            return float("inf"), name
        gaps[name] = (x.to(torch.float64) + -1 * y.to(torch.float64)).norm()
    total = sum(g**2 for g in gaps.values()) ** 0.5
    return (total / b.norm() if total else 0.0), max(gaps, key=gaps.get)


def rounding(adapter: Adapter) -> float:
    """The largest ‖δΔW‖ / ‖ΔW‖ that rounding the factors to the adapter's dtype can have caused, to first order.

    Rounding moves an entry x by at most u|x| + t, with u the unit roundoff of the dtype and t half its smallest
    number; so ‖δB‖ ≤ u‖B‖ + t√(mr), and ‖δΔW‖ ≤ ‖δB‖‖A‖₂ + ‖B‖₂‖δA‖. In the balanced gauge that is at
    most 2u·r^¼ of ‖ΔW‖ for rank r: the reason why a cut to a small rank is also stored more exactly.
    """
    info, total = torch.finfo(adapter.dtype), 0.0
    for update in adapter.modules.values():
        left, right = update.left.double(), update.right.double()
        off = [
            info.eps / 2 * x.norm() + info.smallest_normal * info.eps / 2 * x.numel() ** 0.5
            for x in (left, right)
        ]
        sizes = [torch.linalg.eigvalsh(g)[-1].clamp_min(0).sqrt() for g in (left.mT @ left, right @ right.mT)]
        total += float(off[0] * sizes[1] + sizes[0] * off[1]) ** 2
    norm = adapter.norm()
    return total**0.5 / norm if norm else 0.0


def card(adapter: Adapter, inputs: Sequence[str], call: Mapping) -> str:
    """A model card with the metadata the Hugging Face hub reads, for the folder of a merged PEFT adapter."""
    base = f"base_model: {json.dumps(adapter.base_model)}\n" if adapter.base_model else ""
    options = "\n".join(f"- {k}: {v}" for k, v in call.items() if v is not None)
    names = "\n".join(f"- `{name}`" for name in inputs)
    return (
        f"---\n{base}library_name: peft\ntags: [lora, merge, lora-opcm]\n---\n\n# Merged LoRA adapter\n\nOne adapter out of\n\n"
        f"{names}\n\nmerged by `lora-opcm` with\n\n{options}\n\n`{RECIPE}` names the inputs by hash and says what truncation "
        "dropped; `lora-opcm verify` repeats the merge and compares.\n"
    )  # fmt: skip
