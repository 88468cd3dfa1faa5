"""What each question got, in one file of JSON lines that is whole after every line, and goes on where it stopped.

The first line names tasks, splits and sizes. Others hold, for one model, `right` (bits) and `likelihood` (float16,
mean log likelihood per token of the answer) of the questions of its `tasks` in order, in base64. Published, the file
is compressed (`publish`).
"""

import base64
import json
import lzma
from pathlib import Path

import numpy as np

from ...files.disk import write_text

Marks = dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]


NAMES = ("kind", "seed", "method", "options", "rank", "tasks")  # which say what was marked


class Outcomes:
    """Appends lines to a file, after those that a run of the same header has left there.

    Raises
    ------
    ValueError
        If the file is of another header, with what differs.
    """

    def __init__(self, path: Path, header: dict):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        first, lines = json.dumps(header), []
        if path.exists():
            # What follows the last end of a line was being written when the run was stopped.
            found, *lines = (path.read_text().rpartition("\n")[0] or first).split("\n")
            there = json.loads(found)
            if other := [k for k in header | there if there.get(k) != json.loads(first).get(k)]:
                raise ValueError(f"{path} is of a run with other {', '.join(other)}: begin in another folder")
        write_text(path, "".join(f"{line}\n" for line in (first, *lines)))
        self.known = {_name(json.loads(line)) for line in lines}

    def has(self, line: dict) -> bool:
        """Whether there is a line of that `NAMES`."""
        return _name(line) in self.known

    def add(self, line: dict) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        self.known.add(_name(line))


def _name(line: dict) -> str:
    return json.dumps([line.get(key) for key in NAMES])


def packed(marks: Marks) -> dict[str, str]:
    """The marks of one split, task after task, as text."""
    right = np.concatenate([right for right, _ in marks.values()])
    score = np.concatenate([score for _, score in marks.values()])
    score = np.nan_to_num(score, nan=-6e4, neginf=-6e4).clip(-6e4)
    return {"right": text(np.packbits(right)), "likelihood": text(score.astype("<f2"))}


def score(marks: Marks) -> float:
    """Mean over tasks of the mean log likelihood; what scales are chosen by."""
    found = float(np.mean([score.mean(dtype=float) for _, score in marks.values()]))
    return found if np.isfinite(found) else -np.inf


def accuracy(marks: Marks) -> float:
    """Mean over tasks of the share of exact answers."""
    return float(np.mean([right.mean() for right, _ in marks.values()]))


def text(array: np.ndarray) -> str:
    """The bytes of an array in base64."""
    return base64.b64encode(array.tobytes()).decode()


def read(path: Path) -> tuple[dict, list[dict]]:
    """Header and lines; in these each evaluation has `right` and `likelihood` as task → array, shape=[questions].

    A last line that was cut short is left out. A name that ends in .xz is a published file.
    """
    data = Path(path).read_bytes()
    content = (lzma.decompress(data) if Path(path).suffix == ".xz" else data).decode()
    header, *lines = content.splitlines(keepends=True)
    header = json.loads(header)
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    for line in found:
        for split in ("validation", "test"):
            for entry in line.get(split, []):
                sizes = [header["sizes"][split][task] for task in line["tasks"]]
                right = np.frombuffer(base64.b64decode(entry["right"]), np.uint8)
                marks = {"right": np.unpackbits(right, count=sum(sizes)).astype(bool)}
                if "likelihood" in entry:  # answers without a model have none
                    likelihood = np.frombuffer(base64.b64decode(entry["likelihood"]), "<f2")
                    marks["likelihood"] = likelihood.astype(np.float32)
                for name, flat in marks.items():
                    entry[name] = dict(zip(line["tasks"], np.split(flat, np.cumsum(sizes)[:-1])))
    return header, found
