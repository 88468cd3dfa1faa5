"""`python -m lora_opcm.lab.generation.publish RUN OUT --commit HASH --date DAY`: outcomes, small enough to ship.

Likelihoods are rounded to 1/32, which no mean over hundreds of questions notices. One line is added: which questions
the commonest answer of the training questions gets right, whatever is asked.
"""

import base64
import json
import lzma
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from ...files.disk import replacing
from .outcomes import text
from .puzzles import load_puzzle

STEP = 1 / 32
PROTOCOL = 2
FILTER = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0}
SPLITS = ("validation", "test")


def publish(
    run: Annotated[Path, typer.Argument(help="outcomes.jsonl of a run")],
    out: Annotated[Path, typer.Argument(help="the file to write, .jsonl.xz")],
    commit: Annotated[str, typer.Option(help="of the code that ran")],
    date: Annotated[str, typer.Option(help="when it ran")],
):
    """Compress, and say by what protocol, when and by which commit."""
    header, *lines = map(json.loads, run.read_text().splitlines())
    header |= {"protocol": PROTOCOL, "commit": commit, "date": date, "rounded to": STEP}
    for line in lines:
        for split in SPLITS:
            for entry in line.get(split, []):
                entry["likelihood"] = rounded(entry["likelihood"])
    data = "".join(json.dumps(line) + "\n" for line in [header, *lines, commonest(header["tasks"])])
    with replacing(out) as scratch:
        scratch.write_bytes(lzma.compress(data.encode(), filters=[FILTER]))


def rounded(packed: str) -> str:
    """Likelihoods as a file holds them, to the nearest multiple of `STEP`."""
    values = np.frombuffer(base64.b64decode(packed), "<f2").astype(float)
    return text((np.round(values / STEP) * STEP).astype("<f2"))


def commonest(tasks: Sequence[str]) -> dict:
    """The line of who says the commonest answer of a task's training questions every time."""
    right: dict[str, list[bool]] = {split: [] for split in SPLITS}
    for task in tasks:
        rows = load_puzzle(task)
        ((answer, _),) = Counter(answer for _, answer in rows["train"]).most_common(1)
        for split in SPLITS:
            right[split] += [expected == answer for _, expected in rows[split]]
    marks = {split: [{"scale": 1.0, "right": text(np.packbits(found))}] for split, found in right.items()}
    return {"kind": "commonest", "tasks": list(tasks)} | marks


if __name__ == "__main__":
    typer.run(publish)
