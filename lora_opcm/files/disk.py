"""Files that appear whole or not at all."""

import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ..numerics import finite
from .adapter import DTYPES, AdapterError


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

    write_bytes(path, blocks())


def write_bytes(path: Path, blocks: Iterable) -> None:
    """Write blocks of bytes to a new file, down to the disk."""
    with open(path, "xb") as file:
        for block in blocks:
            file.write(block)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with replacing(path) as temporary:
        write_bytes(temporary, [text.encode()])


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name in the same folder, renamed to `path` at the end; after an error nothing is left of it."""
    temporary = scratch(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def scratch(path: Path) -> Path:
    """A name in the same folder that no other process uses."""
    return path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
