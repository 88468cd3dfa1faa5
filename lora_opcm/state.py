"""State files of streams: tensors, and JSON in the header of one .safetensors file, whole or not at all."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .adapters import DTYPES, Adapter, AdapterError, Kind
from .lowrank import LowRank, finite
from .writing import replacing, write_safetensors

KEY = "lora_opcm_state"
LOADERS = {"opcm": "ContinualMerger", "whitened_sum": "SumMerger"}  # kind of state -> the class that reads it
Merger = TypeVar("Merger")


def save_state(
    path: str | os.PathLike, kind: str, like: Adapter | None, header: Mapping, tensors: Mapping[str, Tensor]
) -> Path:
    """Write a state of one kind: `tensors`, what JSON `header` says, and the metadata of `like` for exports.

    A file that was there stays whole until the new one is.

    Raises
    ------
    ValueError
        If there is no adapter yet.
    """
    if like is None:
        raise ValueError("nothing was added yet: there is no state to save")
    text = json.dumps(dict(header) | {
        "kind": kind,
        "adapter": {
            "base_model": like.base_model, "format": like.format, "config": like.config,
            "kinds": {name: asdict(kind) for name, kind in like.kinds.items()}, "metadata": like.metadata,
            "dtype": str(like.dtype).removeprefix("torch."), "source": like.source,
        },
    })  # fmt: skip
    everything = dict(tensors) | {f"saved/{name}": t for name, t in like.saved.items()}
    path = Path(path)
    with replacing(path) as temporary:
        write_safetensors(
            temporary, {name: (t, t.dtype) for name, t in everything.items()}, {KEY: text}, str(path)
        )
    return path


def kind_of(path: str | os.PathLike, *others: str) -> str:
    """Which kind of state a file holds, a key of `LOADERS` or one of `others`; only its header is read.

    Raises
    ------
    AdapterError
        If the file is no state.
    """
    try:
        with safe_open(path, framework="pt") as file:
            kind = json.loads((file.metadata() or {})[KEY])["kind"]
    except (SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise AdapterError(f"{path}: expected a state written by `save` of a merger: {error}") from None
    if not isinstance(kind, str) or kind not in {*LOADERS, *others}:
        raise AdapterError(f"{path}: a state of kind {kind!r:.40}, expected one of {', '.join(LOADERS)}")
    return kind


def load_state(path: str | os.PathLike, kind: str, build: Callable[..., Merger]) -> Merger:
    """What `build(header, tensors, like)` makes of the state in a file.

    Raises
    ------
    AdapterError
        If the file is no state, one of another kind, or damaged.
    """
    found = kind_of(path, kind)
    if found != kind:
        raise AdapterError(f"{path}: a state of {found}, expected {kind}: {LOADERS[found]}.load reads it")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()[KEY])
            # Copies: a file's tensors lie at any address, and on some processors a product's last bits depend on it.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        bad = next((name for name, t in tensors.items() if t.dtype not in DTYPES or not finite(t)), None)
        if bad:
            raise ValueError(f"{bad} holds NaN or Inf, or no numbers")
        like = header["adapter"]
        kinds = {
            n: Kind(str(k["name"]), tuple(int(i) for i in k["kernel"])) for n, k in like["kinds"].items()
        }
        dtypes = {str(t).removeprefix("torch."): t for t in DTYPES if t.is_floating_point}
        words = [like["source"], like["base_model"] or "", *like["metadata"], *like["metadata"].values()]
        known = like["format"] in ("peft", "kohya", "diffusers") and isinstance(like["config"], dict)
        if not (known and all(isinstance(word, str) for word in words)):
            raise ValueError("what it says of its adapters is not of the right types")
        saved = {n.removeprefix("saved/"): t for n, t in tensors.items() if n.startswith("saved/")}
        like |= {"kinds": kinds, "dtype": dtypes[like["dtype"]], "saved": saved}
        return build(header, tensors, Adapter({}, **like))
    except (SafetensorError, LookupError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise AdapterError(f"{path}: a damaged state: {type(error).__name__}: {error}") from None


def factors(tensors: Mapping[str, Tensor], name: str) -> LowRank:
    """The update of module `name` among the tensors of a state."""
    return LowRank(tensors[f"left/{name}"], tensors[f"right/{name}"])
