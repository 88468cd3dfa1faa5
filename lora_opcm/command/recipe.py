"""What a merged adapter was made of: a recipe that another run can repeat and check."""

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import reduce
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import msgspec
import torch

from ..files import Adapter, AdapterError, dropping, load_adapter, save_adapter, weights_of
from ..files.bundle import DTypeName
from ..files.disk import scratch, write_text
from ..files.joint import spelled_in
from ..files.peft import CONFIG, WEIGHTS
from ..files.table import expect_format, names_in
from ..files.write import one_file
from ..merging.merge import merge
from ..merging.method import table
from ..numerics import rounding
from ..parallel import Progress
from ..values import AUTO
from .card import CARD, RECIPE, card


class Input(msgspec.Struct):
    """One adapter that was merged: its name, and its `Adapter.id`."""

    name: str
    id: str


class Recipe(msgspec.Struct, tag_field="recipe", tag=2):
    """A merge: what went in, how, what its scale came to, and what came out; `recipe` is the version of this layout."""

    inputs: list[Input]
    merge: dict[str, Any]
    dropped: dict[str, float]
    format: str
    dtype: DTypeName
    output_sha256: str
    versions: dict[str, str]
    factor: float | None = None  # one from before it was said
    choice: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET  # what `tune` chose by


class Verdict(msgspec.Struct):
    """What `verify` found.

    Attributes
    ----------
    same : bool
        Whether the stored adapter is the merge, within the tolerance.
    unchanged : bool
        Whether the file has the bytes that were written.
    distance, tolerance : float
        ‖ΔW − ΔW'‖ / ‖ΔW'‖ to the repeated merge over all modules, and what it is held to.
    worst : str
        The module that differs most.
    """

    same: bool
    unchanged: bool
    distance: float
    tolerance: float
    worst: str
    recipe: str
    output_sha256: str


def bytes_hash(path: str | os.PathLike) -> str:
    """sha256 of the bytes of an adapter: of its .safetensors file, and of its config where it has one."""
    file = weights_of(path)
    config = file.parent / CONFIG
    found = hashlib.sha256()
    for part in [file, *([config] if file.name == WEIGHTS and config.is_file() else [])]:
        with open(part, "rb") as handle:
            found.update(hashlib.file_digest(handle, "sha256").digest())
    return found.hexdigest()


def write_merge(
    merged: Adapter,
    output: str | os.PathLike,
    inputs: Sequence[tuple[str, str]],
    call: Mapping[str, Any],
    *,
    overwrite: bool,
    format: str | None = None,
    dtype: torch.dtype | None = None,
    choice: Mapping[str, Any] | None = None,
) -> Path:
    """Write a merged adapter, its recipe, and a card where it is a folder.

    All is written beside the output first and moved there at the end: a new folder appears whole, by one
    rename; in one that is there, each file is replaced by one.

    Parameters
    ----------
    inputs : sequence of (name, id)
    call : dict
        The arguments of `merge`.
    choice : dict, optional
        What they were chosen by.

    Raises
    ------
    AdapterError
        As `save_adapter`, and if any of the files exists and `overwrite` is not set.
    """
    output, format = Path(output), format or merged.format
    output = output if output.name not in ("", "..") else output.resolve()  # which has a name
    refuse_existing(output, overwrite, format)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = scratch(output)
    try:
        if format == "peft":
            made = save_adapter(merged, temporary, format, dtype=dtype)
            write_text(made / CARD, card(merged, [name for name, _ in inputs], call))
        else:
            temporary.mkdir()
            made = save_adapter(merged, temporary / output.name, format, dtype=dtype)
        written = Recipe(
            inputs=[Input(*each) for each in inputs],
            merge=dict(call),
            dropped={name: share for name, share in merged.dropped.items() if share > 0},
            format=format,
            dtype=cast(DTypeName, str(dtype or merged.dtype).removeprefix("torch.")),
            output_sha256=bytes_hash(made),
            versions={name: version(name) for name in ("lora-opcm", "torch")},
            factor=merged.factor,
            choice=dict(choice) if choice else msgspec.UNSET,
        )
        text = msgspec.json.format(msgspec.json.encode(written), indent=1).decode()
        write_text(recipe_of(made), text + "\n")
        if made == temporary and not output.exists():
            os.rename(temporary, output)
        else:
            target = output if made == temporary else output.parent
            for name in (WEIGHTS, CONFIG, output.name, recipe_of(made).name, CARD):
                if (temporary / name).exists():
                    os.replace(temporary / name, target / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return output


def write_alone(
    adapter: Adapter,
    output: Path,
    format: str | None = None,
    overwrite: bool = False,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write an adapter that no recipe makes; recipe and card of a merge that it replaces go."""
    path = save_adapter(adapter, output, format, overwrite, dtype)
    for stale in (recipe_of(path), *([path / CARD] if path.is_dir() and recipe_of(path).exists() else [])):
        stale.unlink(missing_ok=True)
    return path


def refuse_existing(output: Path, overwrite: bool, format: str | None = None) -> None:
    """Raise AdapterError if a merge written to `output` would replace a file; asked before the work, and after.

    Also if there is no such format, or the name is none for it: PEFT writes folders, the others .safetensors files.
    """
    if format is not None:
        expect_format(format, str(output))
    if output.is_symlink() and not output.exists():
        raise AdapterError(f"{output}: a link to what is not there")
    if format == "peft" and output.is_file() and overwrite:
        raise AdapterError(f"{output}: a PEFT adapter is a folder, got a file that exists")
    if format == "peft" and output.suffix == ".safetensors":
        raise AdapterError(one_file(output))
    if format not in (None, "peft") and (output.is_dir() or output.suffix != ".safetensors"):
        raise AdapterError(f"{output}: a {format} adapter is one file, expected a name ending in .safetensors")
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


def read_recipe(path: str | os.PathLike) -> Recipe:
    """A recipe that `write_merge` wrote.

    Raises
    ------
    AdapterError
        If the file is no recipe, or one of another version.
    """
    if not Path(path).is_file():
        raise AdapterError(f"{path}: expected a merge recipe there, got no file; --recipe names one elsewhere")
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=Recipe)
    except (OSError, msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise AdapterError(f"{path}: expected a merge recipe: {error}") from None


def verify(
    against: str | os.PathLike,
    inputs: Sequence[str | os.PathLike],
    recipe: str | os.PathLike | None = None,
    tolerance: float | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Repeat the merge a recipe describes, from the adapters it names by their ids, and compare with what is stored.

    The tolerance is what rounding to the dtype of the file can cause, twice, unless given.

    Raises
    ------
    AdapterError
        If there is no recipe, or one of its inputs is not among `inputs`.
    """
    path = Path(recipe) if recipe else recipe_of(against)
    path = path / RECIPE if path.is_dir() else path
    found, stored = read_recipe(path), load_adapter(against)
    given = {adapter.id: adapter for adapter in map(load_adapter, inputs)}
    if missing := [i.name for i in found.inputs if i.id not in given]:
        raise AdapterError(
            f"{path}: no adapter given has the id of {', '.join(missing)}; give the {len(found.inputs)} inputs"
        )
    adapters = [given[i.id] for i in found.inputs]
    wide = wide_enough(adapters, getattr(torch, found.dtype))
    try:
        again = merge(adapters, progress=progress, dtype=wide, **_old_scale(found.merge) | found.merge)
    except TypeError as error:
        raise AdapterError(f"{path}: the merge cannot be repeated: {error}") from None
    again = spelled_in(again, stored.format, dropping(adapters, found.merge.get("drop", ())))
    names = names_in(stored.format, again)
    again = again.with_modules({names[name]: u for name, u in again.items()})
    allowed = min(2 * relative_rounding(stored) + 1e-5, 0.5) if tolerance is None else tolerance
    gap, worst = distance(stored, again)
    same_bytes = bytes_hash(against) == found.output_sha256
    return Verdict(gap <= allowed, same_bytes, gap, allowed, worst, str(path), found.output_sha256)


def _old_scale(call: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe that says no scale meant: it is from before any method had "auto"."""
    entry = table().get(call.get("method", ""))
    return {"scale": 1.0} if entry and entry.scale == AUTO else {}


def wide_enough(adapters: Sequence[Adapter], dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype to merge in for an output in `dtype`, so that it is rounded once, on writing."""
    return dtype and reduce(torch.promote_types, [a.dtype for a in adapters], dtype)


def distance(a: Adapter, b: Adapter) -> tuple[float, str]:
    """‖ΔW_a − ΔW_b‖ / ‖ΔW_b‖ over all modules, and the module that adds most; infinite where names differ.

    A full tensor counts by itself: its own distance, if that is larger.
    """
    if odd := sorted(a.keys() ^ b.keys()) + sorted(a.saved.keys() ^ b.saved.keys()):
        return float("inf"), odd[0]
    gaps = {}
    for name, x in a.items():
        if x.shape != b[name].shape:
            return float("inf"), name
        y, same = b[name], torch.equal(x.left, b[name].left) and torch.equal(x.right, b[name].right)
        gaps[name] = 0.0 if same else (x.to(torch.float64) + -1 * y.to(torch.float64)).norm()
    total = sum(g**2 for g in gaps.values()) ** 0.5
    norm = b.norm()
    found = [(total and (total / norm if norm else float("inf")), max(gaps, key=gaps.__getitem__))]
    for name, full in a.saved.items():
        one, other = full.double(), b.saved[name].to(full.dtype).double()
        if one.shape != other.shape:
            return float("inf"), name
        found.append((float((one - other).norm() / other.norm()) if not torch.equal(one, other) else 0.0, name))
    return max(found)


def relative_rounding(adapter: Adapter) -> float:
    """The largest ‖δΔW‖ / ‖ΔW‖ that rounding the factors to the adapter's dtype can have caused, see `rounding`."""
    total = sum(rounding(u.left, u.right, adapter.dtype) ** 2 for u in adapter.values())
    norm = adapter.norm()
    return total**0.5 / norm if norm else 0.0
