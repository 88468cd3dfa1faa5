"""Outcomes: for every trial, which texts every candidate scale classifies rightly.

While a run goes on they are lines of JSON, appended; published, one compressed file of the same lines, in which every
row of bits stands as its difference to a reference: most texts come out alike under most merges.
"""

import base64
import json
import lzma
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from .choice import Candidate, chosen


@dataclass(frozen=True)
class Trial:
    """One way to merge one set of adapters.

    Attributes
    ----------
    part, label : str
        The experiment it belongs to, and the name of the row.
    method : str
        Of the table of methods; "" for the base model, "own" for each task with its own adapter.
    options : tuple of dict
        What the one knob of the method may be, in the words of `merge`.
    rank : int or None
        What the result is cut to.
    seed : int
        Of training.
    tasks : tuple of str
        Merged and evaluated, in this order.
    recipe : str
        How the adapters were trained, see `recipes`.
    steps : tuple of candidates or None
        The scales tried on test texts, as `choice.ratio` has them; None: validation texts choose.
    natural : bool
        Whether the scale is the method's own, and nothing is chosen.
    cap : int or None
        If given, adapters come one at a time, and what is kept between two is one adapter of this rank.
    """

    part: str
    label: str
    method: str
    tasks: tuple[str, ...]
    options: tuple[dict, ...] = ({},)
    rank: int | None = None
    seed: int = 1
    recipe: str = "published"
    steps: tuple[Candidate, ...] | None = None
    natural: bool = False
    cap: int | None = None

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def key(self) -> str:
        """What tells trials apart."""
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What came of a trial.

    Attributes
    ----------
    norms : list of float
        Per options, of the merged adapter before it is scaled; `mean` is that of its parts.
    validation, test : dict of candidate → bool array, shape=[texts]
        Texts of the tasks one after the other.
    sizes : dict of split → texts of each task
    about : dict
        Seconds of each merge, ranks, and what else was measured.
    """

    trial: Trial
    norms: list[float]
    mean: float
    validation: dict[Candidate, np.ndarray]
    test: dict[Candidate, np.ndarray]
    sizes: dict[str, list[int]]
    about: dict = field(default_factory=dict)

    @cached_property
    def picked(self) -> list[Candidate]:
        """The candidate that validation texts choose, and those that each resample of them chooses."""
        if not self.validation:
            return [next(iter(self.test))]
        about = self.trial.tasks, self.sizes["validation"]
        picked = chosen(self.validation, *about)
        if all(c in self.test for c in picked):
            return picked
        # What a resample alone chose may not have been tested; the best that was stands for it.
        tested = chosen({c: bits for c, bits in self.validation.items() if c in self.test}, *about)
        return [c if c in self.test else other for c, other in zip(picked, tested, strict=True)]

    def first(self, count: int) -> "Outcome":
        """The same with at most so many test texts of each task, the first ones; validation texts choose as before."""
        parts = np.split(np.arange(sum(self.sizes["test"])), np.cumsum(self.sizes["test"])[:-1])
        kept, sizes = np.concatenate([part[:count] for part in parts]), [len(part[:count]) for part in parts]
        test = {candidate: bits[kept] for candidate, bits in self.test.items()}
        return replace(self, test=test, sizes=self.sizes | {"test": sizes})

    def line(self) -> str:
        """As one line of JSON."""
        bits = {
            split: [[*c, base64.b85encode(np.packbits(b).tobytes()).decode()] for c, b in getattr(self, split).items()]
            for split in ("validation", "test")
        }
        rest = {"trial": asdict(self.trial), "norms": self.norms, "mean": self.mean, "sizes": self.sizes}
        return json.dumps(rest | {"about": self.about} | bits)

    @classmethod
    def of_line(cls, line: str) -> "Outcome":
        found = json.loads(line)
        trial = _frozen(found.pop("trial"))
        for split in ("validation", "test"):
            count = sum(found["sizes"][split])
            found[split] = {
                (i, k): np.unpackbits(np.frombuffer(base64.b85decode(text), np.uint8), count=count).astype(bool)
                for i, k, text in found[split]
            }
        return cls(Trial(**trial), **found)


def _frozen(trial: dict) -> dict:
    """Fields of a trial as they were before JSON made lists of tuples."""
    deep = lambda v: tuple(map(deep, v)) if isinstance(v, list) else v  # noqa: E731
    return {k: deep(v) for k, v in trial.items()}


def read_lines(path: Path | str) -> Iterator[Outcome]:
    """The outcomes of a run that may still go on; a last line cut short is left out."""
    if Path(path).exists():
        for line in Path(path).read_text().splitlines():
            try:
                yield Outcome.of_line(line)
            except ValueError:  # the run was cut while it wrote
                return


def cut(path: Path) -> None:
    """Remove a last line that was cut short: what is appended would only make it longer."""
    if path.exists():
        with open(path, "r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def write(path: Path | str, outcomes: Iterable[Outcome], about: Mapping) -> Path:
    """Publish outcomes: `about` says by what protocol, commit and device."""
    lines, streams, known = [], [], {}
    for outcome in outcomes:
        line = json.loads(outcome.line())
        for split in ("validation", "test"):
            rows = getattr(outcome, split)
            line[split] = [list(c) for c in rows]
            for bits in rows.values():
                packed = np.packbits(bits)
                same = split, outcome.trial.tasks, len(packed)  # another run may have taken fewer texts
                streams.append((packed ^ known.get(same, np.zeros_like(packed))).tobytes())
                known[same] = packed
        lines.append(line)
    head = json.dumps({"about": dict(about), "outcomes": lines}).encode()
    blob = len(head).to_bytes(8, "little") + head + b"".join(streams)
    path = Path(path)
    path.write_bytes(lzma.compress(blob, preset=9 | lzma.PRESET_EXTREME))
    return path


def read(path: Path | str) -> tuple[dict, list[Outcome]]:
    """What `write` wrote: about the run, and its outcomes."""
    blob = lzma.decompress(Path(path).read_bytes())
    end = 8 + int.from_bytes(blob[:8], "little")
    head, start, known, found = json.loads(blob[8:end]), end, {}, []
    for line in head["outcomes"]:
        trial = _frozen(line.pop("trial"))
        for split in ("validation", "test"):
            count = sum(line["sizes"][split])
            length, rows = -(-count // 8), {}
            for i, k in line[split]:
                packed = np.frombuffer(blob, np.uint8, length, start)
                start += length
                same = split, trial["tasks"], length
                packed = known[same] = packed ^ known.get(same, np.zeros_like(packed))
                rows[i, k] = np.unpackbits(packed, count=count).astype(bool)
            line[split] = rows
        found.append(Outcome(Trial(**trial), **line))
    return head["about"], found
