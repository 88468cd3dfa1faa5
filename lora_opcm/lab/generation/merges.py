"""Merges of adapters in processes of their own, and what is merged."""

import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ...files import load_adapter
from ...lowrank import LowRank
from ...merging.merge import merge


@dataclass(frozen=True)
class Job:
    """One merge: adapters by folder, a method with its options, a rank, and where the result goes."""

    folders: tuple[str, ...]
    method: str
    rank: int | None
    file: str
    options: dict = field(default_factory=dict)
    about: dict = field(default_factory=dict)  # told again in the results

    @property
    def line(self) -> dict:
        """What the results say of it before it is marked."""
        return self.about | {"method": self.method, "options": self.options, "rank": self.rank}


@dataclass(frozen=True)
class Done:
    """Of a merge at scale 1: its norm, the mean norm of its parts, the time it took and what it warned of."""

    norm: float
    mean_norm: float
    seconds: float
    warning: str


# The scale grid does the scaling, so that task arithmetic and the plain sum are one row.
METHODS = (
    ("cat", {}),
    ("whitened_sum", {"power": 0.5}),
    ("iso_c", {}),
    ("tsv", {}),
    ("opcm", {"alpha": 0.5}),
    ("whitened_sum", {"power": 0.0}),
    ("whitened_sum", {"power": 1.0}),
    ("whitening", {}),
    ("ties", {"density": 0.2}),
    ("opcm", {"alpha": 0.75}),
    ("iso_cts", {}),
    ("knots_ties", {}),
    ("core_ties", {}),
    ("whitened_sum", {"power": 0.5, "cap": 16}),
)
RANKS = (None, 16)
# Of a pair, the mean is the sum at scale .5.
PAIRED = (("cat", {}), ("whitened_sum", {"power": 0.5}), ("opcm", {"alpha": 0.5}))


def rows(folders: dict[str, Path], scratch: Path, seed: int) -> list[Job]:
    """All methods at all ranks, for the adapters of one seed by task."""
    return [
        Job(
            tuple(map(str, folders.values())),
            method,
            rank,
            str(scratch / f"row-{seed}-{i}-{rank}.safetensors"),
            options,
            {"kind": "row", "seed": seed, "tasks": list(folders)},
        )
        for rank in RANKS
        for i, (method, options) in enumerate(METHODS)
        if rank is None or "cap" not in options  # which has that rank already
    ]


def pairs(folders: dict[str, Path], scratch: Path, seed: int) -> list[Job]:
    """The pairs of a seed's adapters, by few methods."""
    names = list(folders)
    return [
        Job(
            (str(folders[one]), str(folders[other])),
            method,
            None,
            str(scratch / f"pair-{seed}-{one}-{other}-{method}.safetensors"),
            options,
            {"kind": "pair", "seed": seed, "tasks": [one, other]},
        )
        for i, one in enumerate(names)
        for other in names[i + 1 :]
        for method, options in PAIRED
    ]


def run(job: Job) -> Done:
    """Merge, in one thread, and write the factors in float32."""
    torch.set_num_threads(1)
    begun = time.perf_counter()
    adapters = [load_adapter(folder) for folder in job.folders]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        merged = merge(adapters, job.method, rank=job.rank, scale=1.0, dtype=torch.float32, ragged=True, **job.options)
    seconds = time.perf_counter() - begun
    sides = {f"{name}/{side}": getattr(u, side) for name, u in merged.items() for side in ("left", "right")}
    save_file({name: x.contiguous() for name, x in sides.items()}, job.file)
    mean = sum(a.norm() for a in adapters) / len(adapters)
    return Done(merged.norm(), mean, seconds, str(told[0].message) if told else "")


def result(job: Job) -> dict[str, LowRank]:
    """The factors that `run` wrote."""
    tensors = load_file(job.file)
    names = dict.fromkeys(name.rsplit("/", 1)[0] for name in tensors)
    return {name: LowRank(tensors[f"{name}/left"], tensors[f"{name}/right"]) for name in names}


def ready() -> None:
    """Nothing: what a process is asked first, so that it has imported everything when work comes."""
