"""A base model with an adapter's updates added: read, changed and written a block of rows at a time."""

import json
import math
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike, rename
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..lowrank import LowRank
from ..numerics import finite, full_precision
from ..parallel import Progress
from .adapter import DTYPES, FACTOR_DTYPES, LINEAR, Adapter, AdapterError
from .disk import replacing, scratch, write_bytes
from .names import canonical, layers
from .parts import INDEX, PART, named
from .peft import EMBEDDINGS, parse_config
from .placed import placed
from .refusals import PICKLES, and_more

BLOCK = 2**20  # numbers of the base that are held at once
ENDS = ".weight"
WEIGHTS_OF_OTHERS = {*PICKLES, ".safetensors", ".h5", ".msgpack", ".gguf", ".onnx", ".ot"}
HEADS = ("CausalLM", "LMHeadModel", "ConditionalGeneration", "MaskedLM", "PreTraining")


@dataclass(frozen=True)
class Place:
    """A tensor of the base: its file, its dtype by safetensors' name, its shape, where its bytes lie in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Change:
    """What becomes of a weight: `full` instead of it, and products added to its rows from some row on, as it lies."""

    full: Tensor | None = None
    pieces: Mapping[int, LowRank] = field(default_factory=dict)

    def columns(self, shape: tuple[int, ...]) -> int:
        """Of the matrix that the weight is: all dimensions but the first, or the last one of many experts."""
        return next(iter(self.pieces.values())).shape[1] if self.pieces else math.prod(shape[1:])

    def rows(self, old: Tensor, first: int) -> Tensor:
        """Rows from `first` on, changed; computed in float32 or better, and rounded once."""
        last, work = first + len(old), torch.promote_types(old.dtype, torch.float32)
        new = old if self.full is None else self.full.reshape(-1, old.shape[1])[first:last]
        new = new.to(work, copy=bool(self.pieces))
        for start, u in self.pieces.items():
            top, end = max(first, start), min(last, start + u.shape[0])
            if top < end:
                new[top - first : end - first].addmm_(u.left[top - start : end - start].to(work), u.right.to(work))
        return new.to(old.dtype)


@full_precision()
def fuse(
    adapter: Adapter,
    base: str | PathLike,
    output: str | PathLike,
    progress: Progress | None = None,
) -> tuple[int, int]:
    """Write a base model with the adapter added, in files of the same names, sizes, keys and dtypes.

    Config, tokenizer and index of a folder are copied, weights in other formats are not. Of the base no more than a
    block of rows is in memory. Names are those of the adapter, or known spellings of them (`names.canonical`).

    Parameters
    ----------
    base, output : path
        A folder of one model with .safetensors files, or one such file; and what is written, which must not exist.
    progress : callable, optional
        Wrapped around the tensors as they are done, as in `merge`.

    Returns
    -------
    changed, all : int
        How many tensors.

    Raises
    ------
    AdapterError
        If the base lacks a module or has it in another shape or as no float, ties a weight that would have to change to
        another one, or lies the other way than `fan_in_fan_out` says; for experts whose place shapes do not tell (see
        `placed`); if the output exists.
    OSError
        If the disk cannot take it; nothing is left behind.
    """
    base, output = Path(base), Path(output)
    files, copied = _files(base)
    if output.exists():
        raise AdapterError(f"{output}: exists already, expected the name of a model to be made")
    if base.is_file() and output.suffix != ".safetensors":
        raise AdapterError(f"{output}: the base is one file, expected a name ending in .safetensors")
    places: dict[str, Place] = {}
    for file in files:
        if both := sorted(places.keys() & (own := _places(file)).keys()):
            raise AdapterError(f"{file}: {both[0]}{and_more(both)} is in {places[both[0]].file.name}, too")
        places |= own
    changes = _changes(adapter, places, base)
    keys = iter(progress(list(places), total=len(places)) if progress else places)
    output.parent.mkdir(parents=True, exist_ok=True)
    if base.is_file():
        with replacing(output) as temporary:
            write_bytes(temporary, _blocks(base, places, changes, keys))
    else:
        target = scratch(output)
        target.mkdir()
        try:
            for file in files:
                write_bytes(target / file.name, _blocks(file, places, changes, keys))
            for file in copied:
                shutil.copyfile(file, target / file.name)
            rename(target, output)
        finally:
            shutil.rmtree(target, ignore_errors=True)
    for _ in keys:  # ends the progress
        pass
    return len(changes), len(places)


def _files(base: Path) -> tuple[list[Path], list[Path]]:
    """The files that hold the weights, and those to copy."""
    if PART.search(base.name):
        raise AdapterError(f"{base}: one part of a model in several files; give the folder")
    if base.is_file() and base.suffix == ".safetensors":
        return [base], []
    if not base.is_dir():
        raise AdapterError(f"{base}: expected a folder of a model, or a .safetensors file")
    there = sorted(p for p in base.iterdir() if p.is_file() and not p.name.startswith("."))
    indices = [p for p in there if p.name.endswith(INDEX)]
    whole = [p for p in there if p.suffix == ".safetensors" and not PART.search(p.name)]
    if len(indices) + len(whole) != 1:
        found = [p.name for p in (*indices, *whole)]
        inside = [f"{p.parent.name}/" for p in sorted(base.glob("*/config.json"))]
        hint = f"; there are {', '.join(found or inside)}: name one" if found or inside else ""
        raise AdapterError(f"{base}: expected the weights of one model in .safetensors files{hint}")
    copied = [p for p in there if p.suffix.lower() not in WEIGHTS_OF_OTHERS and p.name != "README.md"]
    copied = [p for p in copied if not p.name.endswith(".index.json") or p in indices]
    return whole or [base / name for name in named(indices[0])], copied


def _places(file: Path) -> dict[str, Place]:
    try:
        with safe_open(file, framework="pt"):  # which checks all of the header
            pass
        with open(file, "rb") as handle:
            size = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(size))
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{file}: not a readable safetensors file (truncated?): {error}") from error
    header.pop("__metadata__", None)
    return {
        key: Place(file, x["dtype"], tuple(x["shape"]), *(8 + size + at for at in x["data_offsets"]))
        for key, x in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    }


def _blocks(file: Path, places: Mapping[str, Place], changes: Mapping[str, Change], keys: Iterator[str]) -> Iterator:
    """The bytes of the file with the changes; takes from `keys` as many as the file has."""
    own = {key: place for key, place in places.items() if place.file == file}
    with open(file, "rb") as handle:
        yield handle.read(min(place.start for place in own.values()) if own else -1)
        for key, place in own.items():
            next(keys)
            if key not in changes:
                for at in range(place.start, place.end, 4 * BLOCK):
                    yield handle.read(min(4 * BLOCK, place.end - at))
                continue
            dtype = next(t for t, name in DTYPES.items() if name == place.dtype)
            width = changes[key].columns(place.shape)
            step, height = max(1, BLOCK // max(1, width)), math.prod(place.shape) // max(1, width)
            for first in range(0, height, step):
                count = min(step, height - first)
                raw = bytearray(handle.read(count * width * dtype.itemsize))
                new = changes[key].rows(torch.frombuffer(raw, dtype=dtype).reshape(count, width), first)
                if not finite(new):
                    raise AdapterError(f"{file}: {key} with the update is not finite in {dtype}")
                yield new.contiguous().reshape(-1).view(torch.uint8).numpy()


# -- what changes ----------------------------------------------------------------------------------------------


def _changes(adapter: Adapter, places: Mapping[str, Place], base: Path) -> dict[str, Change]:
    where = f"{adapter.source} on {base}"
    keys = _keys(adapter, places, where)
    changes = {keys[n]: Change(full=t) for n, t in adapter.saved.items()}
    for name, tensor in adapter.saved.items():
        if tuple(tensor.shape) != places[keys[name]].shape:
            raise AdapterError(f"{where}: {name} is {tuple(tensor.shape)}, in the base {places[keys[name]].shape}")
    pieces = placed(adapter, {key: place.shape for key, place in places.items()}, where)
    turned = _turned(places)
    for name in (name for name in adapter if name in keys):
        if keys[name] in pieces:
            raise AdapterError(f"{where}: {name}: an update of {keys[name]}, which has one of its expert, too")
        pieces[keys[name]] = {0: _fit(adapter, name, places[keys[name]], turned.get(_last(keys[name])), where)}
    changes |= {key: Change(changes.get(key, Change()).full, found) for key, found in pieces.items()}
    for key in changes:
        if places[key].dtype not in FACTOR_DTYPES:
            raise AdapterError(
                f"{where}: {key} is {places[key].dtype} (quantised?) in the base, expected one of"
                f" {', '.join(FACTOR_DTYPES)}"
            )
    embeddings = [key for key in changes if _last(key) in EMBEDDINGS - {"wpe"}]
    if embeddings and _tied(base, places):
        raise AdapterError(
            f"{where}: {embeddings[0]}: the base ties its output to its embeddings (tie_word_embeddings), so that a"
            " change of one would be one of both; --drop leaves the module out"
        )
    return changes


def _keys(adapter: Adapter, places: Mapping[str, Place], where: str) -> dict[str, str]:
    """Names of modules and full tensors → keys of the base."""
    spelled = {
        layer: f"{n}{ENDS}" for n, layer in layers([k.removesuffix(ENDS) for k in places if k.endswith(ENDS)]).items()
    }
    full = {n: n.replace(".base_layer.", ".") for n in adapter.saved}
    plain = [name for name in adapter if adapter.kinds.get(name, LINEAR).name != "expert"]
    found = {}
    for name, key in ({n: f"{n}{ENDS}" for n in plain} | full).items():
        module = key.removesuffix(ENDS)
        found[name] = key if key in places else spelled.get(canonical(module), "")
    if missing := [name for name, key in found.items() if not key]:
        tied = " (tied to the embeddings?)" if missing[0].rpartition(".")[2] in EMBEDDINGS else ""
        raise AdapterError(
            f"{where}: {missing[0]}{and_more(missing)}: not in the base{tied}, expected the model the adapter is of;"
            " --drop leaves modules out by name"
        )
    first: dict[str, str] = {}
    for name in plain:
        if (twin := first.setdefault(found[name], name)) != name:
            raise AdapterError(f"{where}: {twin} and {name} are one layer of the base, {found[name]}")
    if moved := [name for name in plain if found[name] != name + ENDS]:
        warnings.warn(
            f"{where}: {moved[0]}{and_more(moved)} under the base's names: {found[moved[0]].removesuffix(ENDS)}",
            stacklevel=4,
        )
    return found


def _last(key: str) -> str:
    return key.removesuffix(ENDS).rpartition(".")[2]


def _turned(places: Mapping[str, Place]) -> dict[str, bool]:
    """Last parts of names → whether such weights lie (in, out), as GPT-2's do: a bias has the length of the outputs.

    peft goes by the layer, too, since an adapter has one `fan_in_fan_out` for layers of both kinds.
    """
    found: dict[str, set[bool]] = {}
    for key, place in places.items():
        bias = places.get(key.removesuffix(ENDS) + ".bias") if key.endswith(ENDS) else None
        if bias and len(place.shape) == 2 and place.shape[0] != place.shape[1] and len(bias.shape) == 1:
            found.setdefault(_last(key), set()).add(bias.shape[0] == place.shape[1])
    return {name: both.pop() for name, both in found.items() if len(both) == 1}


def _fit(adapter: Adapter, name: str, place: Place, turned: bool | None, where: str) -> LowRank:
    """The update as the base's weight lies: rows × all other dimensions; `turned` is what the base says of that."""
    update, kind, shape = adapter[name], adapter.kinds.get(name, LINEAR), place.shape
    m, n = update.shape
    rows = (shape[0], math.prod(shape[1:])) if shape else ()
    if turned is None or kind != LINEAR:
        turned = adapter.transposed(name) and (kind != LINEAR or m == n or rows != (m, n))
    if rows != ((n, m) if turned else (m, n)):
        lies = f"; fan_in_fan_out is {adapter.transposed(name)}, which a layer that lies the other way contradicts" * (
            rows == ((m, n) if turned else (n, m)) and kind == LINEAR
        )
        raise AdapterError(f"{where}: {name} is an update ({m}, {n}), {place.file.name} has it as {shape}{lies}")
    return LowRank(update.right.mT, update.left.mT) if turned else update


def _tied(base: Path, places: Mapping[str, Place]) -> bool:
    """Whether loading the base makes its output weight that of its embeddings."""
    path = (base if base.is_dir() else base.parent) / "config.json"
    if not path.is_file():
        return False
    config = parse_config(path.read_bytes(), str(path))
    names = config.get("architectures") or ["?LMHeadModel"]
    if not str(names[0]).endswith(HEADS):
        return False
    said = [c["tie_word_embeddings"] for c in (config, config.get("text_config") or {}) if "tie_word_embeddings" in c]
    return bool(said[0]) if said else not any(re.search(r"(^|\.)(lm_head|embed_out)\.weight$", key) for key in places)
