"""States and parts of merges: tensors, and what is said of them in the header of one .safetensors file.

One schema for every kind of them: `Bundle` says what is around, a `msgspec.Struct` of each kind what is inside.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeVar, cast

import msgspec
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..numerics import finite
from .adapter import DTYPES, Adapter, AdapterError, Kind
from .disk import replacing, write_safetensors

KEY = "lora_opcm_state"
DamagedError = (
    SafetensorError,
    msgspec.MsgspecError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
)
Content = TypeVar("Content", bound=msgspec.Struct)
FLOATS = {str(t).removeprefix("torch."): t for t in DTYPES if t.is_floating_point}


DTypeName = Literal["float64", "float32", "float16", "bfloat16"]


class Like(msgspec.Struct):
    """What is known of the adapters that went in, for the one that comes out."""

    base_model: str | None
    format: str
    config: dict
    kinds: dict[str, Kind]
    metadata: dict[str, str]
    dtype: DTypeName
    source: str


class Head(msgspec.Struct):
    kind: str


class Bundle(Head):
    adapter: Like
    content: msgspec.Raw


def save_bundle(
    path: str | os.PathLike, kind: str, like: Adapter, content: msgspec.Struct, tensors: Mapping[str, Tensor]
) -> Path:
    """Write `tensors`, `content` and the metadata of `like`. A file that was there stays whole until the new one is."""
    about = Like(
        base_model=like.base_model,
        format=like.format,
        config=like.config,
        kinds=like.kinds,
        metadata=like.metadata,
        dtype=cast(DTypeName, str(like.dtype).removeprefix("torch.")),
        source=like.source,
    )
    text = msgspec.json.encode(Bundle(kind, about, msgspec.Raw(msgspec.json.encode(content)))).decode()
    everything = dict(tensors) | {f"saved/{name}": t for name, t in like.saved.items()}
    path = Path(path)
    with replacing(path) as temporary:
        write_safetensors(temporary, {name: (t, t.dtype) for name, t in everything.items()}, {KEY: text}, str(path))
    return path


def kind_of(path: str | os.PathLike) -> str:
    """Which kind of bundle a file is; only its header is read.

    Raises
    ------
    AdapterError
        If the file is none.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return msgspec.json.decode((file.metadata() or {})[KEY], type=Head).kind
    except DamagedError as error:
        raise AdapterError(f"{path}: expected a state written by `save` of a merger: {error}") from None


def load_bundle(
    path: str | os.PathLike, kind: str, content: type[Content]
) -> tuple[Content, dict[str, Tensor], Adapter]:
    """Content, tensors, and an adapter without modules that has the metadata.

    Raises
    ------
    AdapterError
        If the file is no bundle of this kind, or damaged.
    """
    if (found := kind_of(path)) != kind:
        raise AdapterError(f"{path}: a state of kind {found!r:.40}, expected {kind}")
    try:
        with safe_open(path, framework="pt") as file:
            header = msgspec.json.decode(file.metadata()[KEY], type=Bundle)
            # Copies: a file's tensors lie at any address, and on some processors a product's last bits depend on it.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        bad = next((name for name, t in tensors.items() if t.dtype not in DTYPES or not finite(t)), None)
        if bad:
            raise ValueError(f"{bad} holds NaN or Inf, or no numbers")
        inside = msgspec.json.decode(header.content, type=content)
    except DamagedError as error:
        raise damaged(path, error) from None
    said = {name: getattr(header.adapter, name) for name in Like.__struct_fields__}
    saved = {n.removeprefix("saved/"): t for n, t in tensors.items() if n.startswith("saved/")}
    return inside, tensors, Adapter({}, **said | {"dtype": FLOATS[said["dtype"]], "saved": saved})


def damaged(path: str | os.PathLike, error: BaseException) -> AdapterError:
    return AdapterError(f"{path}: a damaged state: {type(error).__name__}: {error}")
