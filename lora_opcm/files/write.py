"""Writing adapters, whole or not at all."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from . import kohya, peft
from .adapter import DTYPES, FACTOR_DTYPES, Adapter, AdapterError
from .disk import replacing, scratch, write_bytes, write_safetensors
from .experts import stacked
from .format import folded, size_of
from .names import respelled
from .peft import CONFIG, WEIGHTS
from .refusals import and_more
from .table import formats, names_in


def save_adapter(
    adapter: Adapter,
    path: str | os.PathLike,
    format: str | None = None,
    overwrite: bool = False,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write an adapter that other tools load, and return its path.

    Updates that were not touched since loading (`Stored`) are written bit for bit, with the scale they came
    with; all others with scale 1 (α = r) in the adapter's dtype. In another format the scales are folded into the
    factors, so that who reads tensors only is right, too; not in kohya's, whose α is a tensor. Everything goes to
    temporary names beside the output and is renamed at the end, the config last: what was there stays whole until then.

    Parameters
    ----------
    path : path
        A folder for "peft", a .safetensors file for "kohya" and "diffusers".
    format : {"peft", "kohya", "diffusers"}, optional
        The adapter's own unless given. PEFT and diffusers names can become kohya names, and PEFT names those
        of diffusers, for UNets and CLIP text encoders (`kohya.names`); no other change of format is
        defined without the base model, see `renamed`.
    overwrite : bool
        Whether an adapter that is there may be replaced.
    dtype : torch.dtype, optional
        float64, float32, float16 or bfloat16 for all factors, instead of the adapter's.

    Raises
    ------
    AdapterError
        If the output exists, the format cannot hold the adapter, it is empty, or a value is not finite in the
        dtype asked for.
    OSError
        If the disk cannot take it; nothing is left behind.
    """
    path, format = Path(path), format or adapter.format
    if dtype is not None and DTYPES.get(dtype) not in FACTOR_DTYPES:
        raise AdapterError(f"{path}: dtype is {dtype}, expected float64, float32, float16 or bfloat16")
    if not adapter.modules:
        raise AdapterError(f"{path}: an empty adapter: no module to write")
    if format == "peft" == adapter.format:
        return _save_folder(adapter, path, overwrite, dtype)
    names = names_in(format, adapter)
    if path.suffix != ".safetensors":
        raise AdapterError(f"{path}: a {format} adapter is one file, expected a name ending in .safetensors")
    if path.is_dir() or (path.exists() and not overwrite):
        raise AdapterError(f"{path}: exists already, and overwriting is not asked for (overwrite=True)")
    odd = [n for n, kind in adapter.kinds.items() if n in adapter and kind.name in ("embedding", "expert")]
    odd += list(adapter.saved)
    if odd:
        raise AdapterError(
            f"{adapter.source}: {odd[0]} is an embedding, an expert or a full tensor, which {format} cannot hold"
        )
    if format not in (adapter.format, "kohya"):
        adapter = folded(adapter)
    tensors, metadata = formats()[format].contents(adapter, names, dtype)
    if format == "kohya":
        metadata = kohya.titled(metadata, path.stem)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        write_safetensors(temporary, tensors, metadata, str(path))
    return path


def one_file(path: Path) -> str:
    """What is wrong with the name of a file for a PEFT adapter."""
    return (
        f"{path}: a PEFT adapter is a folder, got the name of a file; name a folder, or ask for --format kohya or"
        " diffusers (format=), which are one file"
    )


def renamed(adapter: Adapter, like: Adapter) -> Adapter:
    """An adapter of kohya names under the names, the format and the configuration of another of the same model.

    Its scales are folded into the factors. Underscores cannot be turned into dots without knowing the names: `like`
    knows them.

    Raises
    ------
    AdapterError
        If `like` lacks a module, or has names that kohya does not know.
    """
    dotted = {short: name for name, short in names_in("kohya", like).items()}
    others = respelled(like.modules, [name for name in adapter.modules if name not in dotted])  # other spellings
    dotted |= {name: found for name, found in others.items() if found in like}
    missing = [name for name in adapter.modules if name not in dotted]
    if missing:
        raise AdapterError(
            f"{adapter.source}: {missing[0]}{and_more(missing)}: {like.source} has no such module, expected an"
            " adapter of the same model on all of these modules"
        )
    modules = {dotted[name]: update for name, update in folded(adapter).items()}
    kinds = {dotted[name]: kind for name, kind in adapter.kinds.items()}
    new = like.with_modules(modules)
    return replace(new, kinds=kinds, dtype=adapter.dtype, saved={}, source=adapter.source)


def _save_folder(adapter: Adapter, folder: Path, overwrite: bool, dtype: torch.dtype | None) -> Path:
    if folder.suffix == ".safetensors":
        raise AdapterError(one_file(folder))
    if folder.is_file():
        raise AdapterError(f"{folder}: a PEFT adapter is a folder, got a file that exists")
    found = [name for name in (CONFIG, WEIGHTS, "adapter_model.bin") if (folder / name).exists()]
    if found and not overwrite:
        raise AdapterError(f"{folder}: {found[0]} exists already, and overwriting is not asked for (overwrite=True)")
    whole, parameters = stacked(adapter)
    sizes = {n: size_of(u) for n, u in whole.items() if n in adapter} | parameters
    config = peft.config_for(sizes, adapter.config, adapter.base_model, parameters)
    text = json.dumps(config, indent=2, sort_keys=True).encode()
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A new folder appears by one rename. In one that is there, each file does, the config last; between the
    # two, a reader that finds factors of one save and ranks of another refuses them.
    fresh = not folder.exists()
    target = scratch(folder) if fresh else folder
    target.mkdir(exist_ok=not fresh)
    files = {WEIGHTS: scratch(target / WEIGHTS), CONFIG: scratch(target / CONFIG)}
    try:
        write_safetensors(files[WEIGHTS], *peft.contents(whole, names_in("peft", whole), dtype), str(folder))
        write_bytes(files[CONFIG], [text])
        for name, temporary in files.items():
            os.replace(temporary, target / name)
        if fresh:
            os.rename(target, folder)
    finally:
        for temporary in files.values():
            temporary.unlink(missing_ok=True)
        if fresh and target.exists():
            shutil.rmtree(target)
    return folder
