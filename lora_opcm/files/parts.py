"""The tensors of an adapter, in one .safetensors file or in the files of an index."""

import re
import warnings
from collections.abc import Callable, KeysView
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from .adapter import AdapterError
from .peft import read_config
from .refusals import and_more

INDEX = ".safetensors.index.json"
PART = re.compile(r"-\d{5}-of-(?!00001)\d{5}\.safetensors$")
# Of attention processors, before diffusers had layers of peft; under a text encoder's names where it has no processor.
PROCESSOR = re.compile(
    r"(?:(\.processor)?\.(?:to_(q|k|v|out)|(add_[kv]_proj))_lora)(?=\.(?:(?:down|up)\.weight|alpha)$)"
)
NAMED = re.compile(r"(?<=\.lora_[AB])\.([^.]+)(?=\.weight$)|(?<=\.lora_embedding_[AB])\.([^.]+)$")


@dataclass
class Tensors:
    """Key → tensor, read when asked for; `metadata` is that of the header."""

    places: dict[str, tuple[Any, str]]  # key -> the file it is in, its key there
    metadata: dict[str, str]

    def keys(self) -> KeysView[str]:
        return self.places.keys()

    def __getitem__(self, key: str) -> Tensor:
        file, there = self.places[key]
        return file.get_tensor(there)

    def shape(self, key: str) -> list[int]:
        file, there = self.places[key]
        return file.get_slice(there).get_shape()

    def dtype(self, key: str) -> str:
        """Its name in safetensors."""
        file, there = self.places[key]
        return file.get_slice(there).get_dtype()


def opened(path: Path, stack: ExitStack) -> Tensors:
    """The tensors of a .safetensors file, or of all files that an index names, which `stack` closes.

    A name of the adapter inside the keys (`lora_A.default.weight`) is left out of them, and keys of attention
    processors (`attn1.processor.to_q_lora.down.weight`) become those of the layers.

    Raises
    ------
    AdapterError
        For one part of several without the others, an index that names files elsewhere or other keys than they hold,
        or keys of two adapters.
    """
    if PART.search(path.name):
        raise AdapterError(
            f"{path}: one part of an adapter in several files; expected all of them and their index (…{INDEX}) in one"
            " folder, and its name"
        )
    if path.name.endswith(INDEX):
        files = {name: stack.enter_context(safe_open(path.parent / name, framework="pt")) for name in named(path)}
        _refuse_other_keys(path, files)
    else:
        files = {path.name: stack.enter_context(safe_open(path, framework="pt"))}
    places = {key: (file, key) for file in files.values() for key in file.keys()}  # noqa: SIM118
    metadata = {k: v for file in reversed(files.values()) for k, v in (file.metadata() or {}).items()}
    return Tensors(_layers(_plain(places, str(path)), str(path)), metadata)


def named(index: Path) -> list[str]:
    """The files an index names, all beside it."""
    parts = _weight_map(index).values()
    for name in parts:
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise AdapterError(f"{index}: {name!r:.80} is named, expected .safetensors files beside it")
        if not (index.parent / name).is_file():
            raise AdapterError(f"{index}: {name:.80} is missing beside it")
    return sorted(set(parts))


def _weight_map(index: Path) -> dict:
    found = read_config(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise AdapterError(f"{index}: weight_map is {found!r:.80}, expected the file of every tensor")
    return found


def _refuse_other_keys(index: Path, files: dict[str, Any]) -> None:
    there = {(key, name) for name, file in files.items() for key in file.keys()}  # noqa: SIM118
    if odd := sorted(there ^ set(_weight_map(index).items())):
        key, name = odd[0]
        raise AdapterError(
            f"{index}: {key:.200} of {name}{and_more(odd)}: in the index or in the file only, expected both"
        )


def _plain(places: dict[str, tuple[Any, str]], where: str) -> dict[str, tuple[Any, str]]:
    """Keys without the name of an adapter inside."""
    named = {key: found for key in places if (found := NAMED.search(key))}
    adapters = sorted({found[1] or found[2] for found in named.values()})
    if len(adapters) > 1:
        raise AdapterError(f"{where}: keys of {len(adapters)} adapters, {', '.join(adapters[:5]):.80}; expected one")
    if not named:
        return places
    warnings.warn(f"{where}: keys name the adapter {adapters[0]!r:.80}, read without it", stacklevel=2)
    return _renamed(places, lambda key: NAMED.sub("", key), where)


def _layers(places: dict[str, tuple[Any, str]], where: str) -> dict[str, tuple[Any, str]]:
    """Keys of attention processors as those of their layers, as diffusers maps them."""
    old = [key for key in places if PROCESSOR.search(key)]
    if not old:
        return places
    warnings.warn(
        f"{where}: {old[0]}{and_more(old)}: attention-processor keys of an old diffusers, read as {_layer(old[0])}",
        stacklevel=2,
    )
    return _renamed(places, _layer, where)


def _layer(key: str) -> str:
    found = PROCESSOR.search(key)
    if not found:
        return key
    name = found[3] or f"to_{found[2]}"
    if not found[1] and ".self_attn." in key:  # of a CLIP text encoder
        name = f"{found[2]}_proj"
    elif name == "to_out":
        name = "to_out.0"
    return f"{key[: found.start()]}.{name}{'' if key.endswith('.alpha') else '.lora'}{key[found.end() :]}"


def _renamed(places: dict[str, tuple[Any, str]], new: Callable[[str], str], where: str) -> dict[str, tuple[Any, str]]:
    found: dict[str, tuple[Any, str]] = {}
    for key, place in places.items():
        if new(key) in found:
            raise AdapterError(f"{where}: {key:.200} and {found[new(key)][1]:.200} name one module twice")
        found[new(key)] = place
    return found
