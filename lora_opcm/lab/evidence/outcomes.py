"""Outcomes: for every trial, which texts every candidate scale classifies rightly.

While a run goes on they are lines of JSON, appended; published, one compressed file of the same lines, in which every
row of bits stands as its difference to a reference: most texts come out alike under most merges.
"""

import base64
import json
import lzma
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
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
    steps : tuple of int or None
        The scales tried on test texts, as `choice.ratio` has them; None: validation texts choose.
    natural : bool
        Whether the scale is the method's own, and nothing is chosen.
    cap : int or None
        If given, adapters come one at a time, and what is kept between two is one adapter of this rank.
    factors : tuple of float
        What each adapter is multiplied by first; empty: nothing.
    """

    part: str
    label: str
    method: str
    tasks: tuple[str, ...]
    options: tuple[dict, ...] = ({},)
    rank: int | None = None
    seed: int = 1
    recipe: str = "published"
    steps: tuple[int, ...] | None = None
    natural: bool = False
    cap: int | None = None
    factors: tuple[float, ...] = ()

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
        """The candidate that validation texts choose, and those that each resample of them chooses.

        Resamples choose among what was tried on test texts; every other candidate wins in none, but for ties.
        """
        if not self.validation:
            return [next(iter(self.test))]
        sizes = self.sizes["validation"]
        tried = {c: right for c, right in self.validation.items() if c in self.test}
        return [chosen(self.validation, sizes)[0], *chosen(tried, sizes)[1:]]

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
        trial = {k: tuple(v) if isinstance(v, list) else v for k, v in found.pop("trial").items()}
        for split in ("validation", "test"):
            count = sum(found["sizes"][split])
            found[split] = {
                (i, k): np.unpackbits(np.frombuffer(base64.b85decode(text), np.uint8), count=count).astype(bool)
                for i, k, text in found[split]
            }
        return cls(Trial(**trial), **found)


def read_lines(path: Path | str) -> Iterator[Outcome]:
    """The outcomes of a run that may still go on; a last line cut short is left out."""
    if Path(path).exists():
        for line in Path(path).read_text().splitlines():
            try:
                yield Outcome.of_line(line)
            except ValueError:  # the run was cut while it wrote
                return


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
                before = known.get((split, outcome.trial.tasks), np.zeros_like(packed))
                streams.append((packed ^ before).tobytes())
                known[split, outcome.trial.tasks] = packed
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
        trial = {k: tuple(v) if isinstance(v, list) else v for k, v in line.pop("trial").items()}
        for split in ("validation", "test"):
            count = sum(line["sizes"][split])
            length, rows = -(-count // 8), {}
            for i, k in line[split]:
                packed = np.frombuffer(blob, np.uint8, length, start)
                start += length
                packed = packed ^ known.get((split, trial["tasks"]), np.zeros_like(packed))
                known[split, trial["tasks"]] = packed
                rows[i, k] = np.unpackbits(packed, count=count).astype(bool)
            line[split] = rows
        found.append(Outcome(Trial(**trial), **line))
    return head["about"], found
