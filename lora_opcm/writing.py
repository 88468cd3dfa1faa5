"""Writing adapters: PEFT folders, kohya and diffusers files, whole or not at all."""

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from . import configs, formats
from .adapters import CONFIG, DTYPES, FACTOR_DTYPES, WEIGHTS, Adapter, Stored
from .formats import LINEAR, AdapterError
from .lowrank import LowRank, finite


def save_adapter(
    adapter: Adapter,
    path: str | os.PathLike,
    format: str | None = None,
    overwrite: bool = False,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write an adapter that other tools load, and return its path.

    Updates that were not touched since loading (`Stored`) are written bit for bit, with the scale they came
    with; all others with scale 1 (α = r) in the adapter's dtype. Everything goes to temporary names beside
    the output and is renamed at the end, the config last: what was there stays whole until then.

    Parameters
    ----------
    path : path
        A folder for "peft", a .safetensors file for "kohya" and "diffusers".
    format : {"peft", "kohya", "diffusers"}, optional
        The adapter's own unless given. PEFT and diffusers names can become kohya names, and PEFT names those
        of diffusers, for UNets and CLIP text encoders (`formats.kohya_names`); no other change of format is
        defined without the base model, see `renamed`. The scales of a diffusers file stand in its header.
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
    names = formats.names_in(format, adapter)
    if path.suffix != ".safetensors":
        raise AdapterError(f"{path}: a {format} adapter is one file, expected a name ending in .safetensors")
    if path.is_dir() or (path.exists() and not overwrite):
        raise AdapterError(f"{path}: exists already, and overwriting is not asked for (overwrite=True)")
    odd = [n for n, kind in adapter.kinds.items() if kind.name == "embedding"] + list(adapter.saved)
    if odd:
        raise AdapterError(
            f"{adapter.source}: {odd[0]} is an embedding or a full tensor, which {format} cannot hold"
        )
    contents = (_kohya_contents if format == "kohya" else _diffusers_contents)(adapter, names, dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        write_safetensors(temporary, *contents, str(path))
    return path


def renamed(adapter: Adapter, like: Adapter) -> Adapter:
    """An adapter of kohya names under the names, the format and the configuration of another of the same model.

    Underscores cannot be turned into dots without knowing the names: `like` knows them.

    Raises
    ------
    AdapterError
        If `like` lacks a module, or has names that kohya does not know.
    """
    dotted = {short: name for name, short in formats.names_in("kohya", like).items()}
    missing = [name for name in adapter.modules if name not in dotted]
    if missing:
        raise AdapterError(
            f"{adapter.source}: {missing[0]}{formats._more(missing)}: {like.source} has no such module, expected an"
            " adapter of the same model on all of these modules"
        )
    modules = {dotted[name]: update for name, update in adapter.modules.items()}
    kinds = {dotted[name]: kind for name, kind in adapter.kinds.items()}
    new = like.with_modules(modules)
    return replace(new, kinds=kinds, dtype=adapter.dtype, saved={}, source=adapter.source)


def _save_folder(adapter: Adapter, folder: Path, overwrite: bool, dtype: torch.dtype | None) -> Path:
    if folder.is_file():
        raise AdapterError(f"{folder}: a PEFT adapter is a folder, got a file that exists")
    found = [name for name in (CONFIG, WEIGHTS, "adapter_model.bin") if (folder / name).exists()]
    if found and not overwrite:
        raise AdapterError(
            f"{folder}: {found[0]} exists already, and overwriting is not asked for (overwrite=True)"
        )
    sizes = {name: _size(update) for name, update in adapter.modules.items()}
    config = configs.config_for(sizes, adapter.config, adapter.base_model)
    text = json.dumps(config, indent=2, sort_keys=True).encode()
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A new folder appears by one rename. In one that is there, each file does, the config last; between the
    # two, a reader that finds factors of one save and ranks of another refuses them.
    fresh = not folder.exists()
    target = beside(folder) if fresh else folder
    target.mkdir(exist_ok=not fresh)
    files = {WEIGHTS: beside(target / WEIGHTS), CONFIG: beside(target / CONFIG)}
    try:
        write_safetensors(files[WEIGHTS], *_peft_contents(adapter, dtype), str(folder))
        _write(files[CONFIG], [text])
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


# key -> (tensor, dtype to write it in); metadata of the header
Contents = tuple[dict[str, tuple[Tensor, torch.dtype]], dict[str, str]]


def _peft_contents(adapter: Adapter, dtype: torch.dtype | None) -> Contents:
    tensors = {}
    for name in adapter.modules:
        up, down = _factors(adapter, name, dtype)
        ends = ".lora_B.weight", ".lora_A.weight"
        if adapter.kinds.get(name, LINEAR).name == "embedding":
            ends = ".lora_embedding_B", ".lora_embedding_A"
        tensors[formats.PEFT_PREFIX + name + ends[0]] = up
        tensors[formats.PEFT_PREFIX + name + ends[1]] = down
    for name, tensor in adapter.saved.items():
        tensors[formats.PEFT_PREFIX + name] = tensor, tensor.dtype
    return tensors, {"format": "pt"} | adapter.metadata


def _kohya_contents(adapter: Adapter, names: Mapping[str, str], dtype: torch.dtype | None) -> Contents:
    tensors, metadata = {}, adapter.metadata if adapter.format == "kohya" else {}
    for name, update in adapter.modules.items():
        new = names[name]
        tensors[f"{new}.lora_up.weight"], tensors[f"{new}.lora_down.weight"] = _factors(adapter, name, dtype)
        rank, scale = _size(update)
        if getattr(update, "alpha", None) is not None:
            tensors[f"{new}.alpha"] = update.alpha, update.alpha.dtype
        elif not (isinstance(update, Stored) and adapter.format == "kohya"):
            # Always float32: bfloat16 cannot hold a rank of 257.
            tensors[f"{new}.alpha"] = torch.tensor(float(scale * rank)), torch.float32
    if not all(isinstance(u, Stored) for u in adapter.modules.values()):
        metadata = configs.kohya_header(metadata, [_size(u)[0] for u in adapter.modules.values()])
    return tensors, metadata


def _diffusers_contents(adapter: Adapter, names: Mapping[str, str], dtype: torch.dtype | None) -> Contents:
    tensors, sizes = {}, {}
    for name, update in adapter.modules.items():
        up, down = _factors(adapter, name, dtype)
        tensors[f"{names[name]}.lora_B.weight"], tensors[f"{names[name]}.lora_A.weight"] = up, down
        sizes[names[name]] = _size(update)
    config = adapter.config if adapter.format == "peft" else {}
    header = configs.diffusers_header(sizes, adapter.metadata, config, adapter.base_model, adapter.source)
    return tensors, {"format": "pt"} | adapter.metadata | header


def _size(update: LowRank) -> tuple[int, float]:
    """(rank, scale) in a file. An update that is zero has no direction left, but no loader takes rank 0."""
    return max(update.rank, 1), getattr(update, "scale", 1.0)


def _factors(adapter: Adapter, name: str, dtype: torch.dtype | None):
    """(up, its dtype) and (down, its dtype), in the shapes of a file."""
    update, kernel = adapter.modules[name], adapter.kinds.get(name, LINEAR).kernel
    if isinstance(update, Stored):
        return (update.up, dtype or update.up.dtype), (update.down, dtype or update.down.dtype)
    up, down = update.left, update.right
    if not update.rank:
        up, down = up.new_zeros(up.shape[0], 1), down.new_zeros(1, down.shape[1])
    if kernel:
        up, down = up.reshape(*up.shape, *[1] * len(kernel)), down.reshape(down.shape[0], -1, *kernel)
    return (up, dtype or adapter.dtype), (down, dtype or adapter.dtype)


def write_safetensors(
    path: Path, tensors: Mapping[str, tuple[Tensor, torch.dtype]], metadata: dict, where: str
) -> None:
    """Write tensors, each cast to its dtype on the way: nothing is held twice. Same input, same bytes.

    Raises
    ------
    AdapterError
        If a value is not finite in its dtype; the message says `where`.
    """
    # Widest first keeps every tensor aligned, as safetensors itself does.
    order = sorted(tensors, key=lambda k: (-tensors[k][1].itemsize, k))
    header: dict = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for key in order:
        tensor, dtype = tensors[key]
        start, end = end, end + tensor.numel() * dtype.itemsize
        header[key] = {"dtype": DTYPES[dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def blocks():
        yield len(text).to_bytes(8, "little") + text
        for key in order:
            tensor, dtype = tensors[key]
            cast = tensor.detach().to("cpu", dtype).contiguous()
            if not finite(cast):
                raise AdapterError(f"{where}: {key} is not finite in {dtype}, expected a wider dtype")
            yield cast.reshape(-1).view(torch.uint8).numpy()

    _write(path, blocks())


def _write(path: Path, blocks: Iterable) -> None:
    with open(path, "xb") as file:
        for block in blocks:
            file.write(block)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with replacing(path) as temporary:
        _write(temporary, [text.encode()])


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name in the same folder, renamed to `path` at the end; after an error nothing is left of it."""
    temporary = beside(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def beside(path: Path) -> Path:
    """A name in the same folder that no other process uses."""
    return path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
