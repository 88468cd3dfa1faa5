"""`python -m lora_opcm.lab.generation.run OUT --deadline SECONDS`: a language model's puzzles, in one go.

Trains an adapter for each puzzle, merges them by every method and at two ranks, looks for the best scale on
validation questions, and marks the test questions there and at the two scales beside it. OUT/outcomes.jsonl is whole
after every line, and the same command goes on where it was stopped. Scales are in units: 1 gives a merged adapter the
mean norm of its parts.
"""

import json
import math
import multiprocessing
import os
import tarfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

# What takes long to import is imported when it is needed: every process of the pool reads this file.

START = (0, 1, 2, 3)  # exponents of √2
LIMITS = (-6, 10)
SPLITS = ("validation", "test")
PIECE = 15 * 2**20  # bytes of a part of a tar file
SMALL = {"train": 64, "validation": 6, "test": 6}
BEGUN = time.monotonic()


def say(text: str) -> None:
    print(f"{time.monotonic() - BEGUN:6.1f} s  {text}", flush=True)


def generation(
    out: Annotated[Path, typer.Argument(help="where outcomes.jsonl goes")],
    deadline: Annotated[float, typer.Option(help="seconds after which nothing new is begun")] = 500,
    seed: Annotated[list[int] | None, typer.Option(help="of training, in order of importance")] = None,
    base: Annotated[str, typer.Option(help="a causal model, by name or folder")] = "smollm2",
    folder: Annotated[Path, typer.Option(help="for adapters and merges")] = Path("_build/generation"),
    workers: Annotated[int, typer.Option(help="processes that merge; 0: as many as there are cores, less one")] = 0,
    pairs: Annotated[bool, typer.Option(help="whether pairs are merged too")] = True,
    puzzle: Annotated[list[str] | None, typer.Option(help="by name; all nine unless given")] = None,
    small: Annotated[bool, typer.Option(help="a rehearsal: two puzzles, few questions, few methods")] = False,
):
    """Train, merge, choose scales, mark."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lora_opcm.lab.generation.merges"])
    cores = len(os.sched_getaffinity(0))
    pool = ProcessPoolExecutor(workers or max(1, cores - 1), mp_context=context)
    try:
        run = Run(out, folder, base, deadline, pool, puzzle, small)
        run.all(seed or [0, 1], pairs)
    finally:
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:  # a merge that nobody waits for
            process.terminate()
    say("done")


class Run:
    """One run: the model, its questions, and the results file."""

    def __init__(self, out: Path, folder: Path, base: str, deadline: float, pool, names: list[str] | None, small: bool):
        from . import merges, outcomes
        from .marking import Marker
        from .model import Weights, load_model
        from .puzzles import load_puzzle, puzzles

        self.merges, self.outcomes = merges, outcomes
        self.folder, self.named, self.deadline, self.pool, self.small = folder, base, deadline, pool, small
        pool.submit(merges.ready)
        names = names or (puzzles()[4::4] if small else puzzles())
        self.data = {name: load_puzzle(name) for name in names}
        if small:
            self.data = {t: {s: rows[: SMALL[s]] for s, rows in d.items()} for t, d in self.data.items()}
        say("puzzles are there")
        self.model, self.tokenizer = load_model(base)
        say(f"base {base} is loaded: {self.model.dtype}, {self.model.device}")
        self.marker = Marker(self.model, self.tokenizer, {(t, s): d[s] for t, d in self.data.items() for s in SPLITS})
        self.weights = Weights(self.model)
        sizes = {split: {task: len(d[split]) for task, d in self.data.items()} for split in SPLITS}
        header = {"base": base, "tasks": list(self.data), "sizes": sizes, "device": device(), "versions": versions()}
        self.file = outcomes.Outcomes(out / "outcomes.jsonl", header)
        say("questions are encoded")

    def left(self) -> float:
        return self.deadline - (time.monotonic() - BEGUN)

    def all(self, seeds: list[int], pairs: bool) -> None:
        """Every seed: while its adapters are merged, the next one is trained."""
        self.base()
        rows, paired, longest = [], [], 0.0
        for seed in seeds:
            if longest and self.left() < 3 * longest:
                say(f"no time for seed {seed}")
                break
            begun = time.monotonic()
            folders = self.train(seed)
            if len(folders) < len(self.data):
                say(f"no time for all of seed {seed}")
                break
            longest = time.monotonic() - begun
            found = self.merges.rows(folders, self.folder, seed)
            if self.small:
                found = [job for job in found if job.method in ("cat", "iso_c")]
            self.mark(rows)
            rows = self.submit(found)
            if pairs:
                paired += self.submit(self.merges.pairs(folders, self.folder, seed))
        self.mark(rows)
        self.mark(paired)

    def submit(self, jobs: list) -> list[tuple]:
        return [(self.pool.submit(self.merges.run, job), job) for job in jobs if not self.file.has(job.line)]

    def mark(self, waiting: list[tuple]) -> None:
        """Mark merges as they get ready, the first ones first."""
        jobs = dict(waiting)
        while jobs and self.left() > 0:
            done, _ = wait(jobs, timeout=self.left(), return_when=FIRST_COMPLETED)
            if not done:
                break
            future = next(f for f in jobs if f in done)
            job = jobs.pop(future)
            try:
                self.row(job, future.result())
            except Exception:  # one method's failure is no reason to lose the others
                say(f"{job.method} {job.options} rank {job.rank} failed\n{traceback.format_exc()}")
        if jobs:
            say(f"no time for {len(jobs)} merges")

    # -- steps ------------------------------------------------------------------------------------------------

    def base(self) -> None:
        line = {"kind": "base", "tasks": list(self.data)}
        if not self.file.has(line):
            self.write(line, {s: self.marker.mark((t, s) for t in self.data) for s in SPLITS})

    def train(self, seed: int) -> dict[str, Path]:
        """The folders of one seed's adapters, trained and marked on their own puzzles."""
        import torch

        from ...files import load_adapter, save_adapter
        from ...files.disk import write_text
        from .tuning import Recipe, tune

        recipe = Recipe(seed=seed, **({"batch_size": 8, "epochs": 1} if self.small else {}))
        root = self.folder / f"seed{seed}"
        told = {task: json.dumps(self.training(task, asdict(recipe))) for task in self.data}
        notes = {task: root / task / "training.json" for task in self.data}
        missing = [t for t, note in notes.items() if not note.exists() or note.read_text() != told[t]]
        # A card is best asked for all at once. A processor is not: what one by one has saved, nothing takes away.
        for tasks in [missing] if self.model.device.type != "cpu" else [[task] for task in missing]:
            if not tasks or self.left() <= 0:
                break
            say(f"seed {seed}: training {', '.join(tasks)}")
            rows = {task: self.data[task]["train"] for task in tasks}
            for task, adapter in tune(self.model, self.tokenizer, rows, recipe, say).items():
                notes[task].unlink(missing_ok=True)
                save_adapter(adapter, root / task, overwrite=True, dtype=torch.float16)
                write_text(notes[task], told[task])
        folders = {t: root / t for t, note in notes.items() if note.exists() and note.read_text() == told[t]}
        if missing and folders:
            pack(root, self.folder / f"adapters-seed{seed}.tar")
        say(f"seed {seed}: {len(folders)} adapters are there")
        for task, place in folders.items():
            line = {"kind": "own", "seed": seed, "tasks": [task]}
            if self.file.has(line):
                continue
            adapter = load_adapter(place)
            with self.weights.plus(self.weights.deltas(adapter)):
                found = {s: self.marker.mark([(task, s)]) for s in SPLITS}
            self.write(line | {"norm": adapter.norm()}, found)
        return folders

    def training(self, task: str, recipe: dict) -> dict:
        """What an adapter depends on."""
        from .puzzles import puzzle_file

        data = {"puzzle": puzzle_file(task).name, "questions": len(self.data[task]["train"])}
        return {"base": self.named, "dtype": str(self.model.dtype)} | data | recipe

    def row(self, job, done) -> None:
        """Choose the scale of a merge, or try a pair's, and mark the test."""
        tasks = job.about["tasks"]
        deltas = self.weights.deltas(self.merges.result(job))
        Path(job.file).unlink()
        unit = done.mean_norm / done.norm if done.norm else 1.0

        def mark(split: str) -> Callable[[float], dict]:
            def at(scale: float) -> dict:
                with self.weights.plus(deltas, scale):
                    return self.marker.mark((task, split) for task in tasks)

            return at

        line = job.line | {"unit": unit, "norm": done.norm, "mean_norm": done.mean_norm}
        line |= {"seconds": round(done.seconds, 2)}
        line |= {"warning": done.warning} if done.warning else {}
        if job.about["kind"] == "pair":
            scales = (0.5, math.sqrt(0.5), 1.0) if job.method == "cat" else (unit, unit * math.sqrt(2), 2 * unit)
            at = mark("test")
            self.write(line, {"test": {scale: at(scale) for scale in scales}})
            return
        tried = search(lambda k: mark("validation")(unit * 2 ** (k / 2)), self.outcomes.score)
        best = max(tried, key=lambda k: self.outcomes.score(tried[k]))
        test = {k: mark("test")(unit * 2 ** (k / 2)) for k in (best - 1, best, best + 1)}
        named = [{unit * 2 ** (k / 2): marks for k, marks in sorted(of.items())} for of in (tried, test)]
        self.write(line | {"scale": unit * 2 ** (best / 2), "units": 2 ** (best / 2)}, dict(zip(SPLITS, named)))

    def write(self, line: dict, found: dict) -> None:
        """One line; marks are of one model, or by scale."""
        told = []
        for split, marks in found.items():
            by_scale = marks if isinstance(next(iter(marks)), float) else {1.0: marks}
            line[split] = [{"scale": scale, **self.outcomes.packed(of)} for scale, of in by_scale.items()]
            of = by_scale.get(line.get("scale"), next(iter(by_scale.values())))
            told.append(f"{split} {self.outcomes.accuracy(of):.3f} ({self.outcomes.score(of):.3f})")
        self.file.add(line)
        what = [line[key] for key in ("kind", "seed", "method", "options", "rank", "units") if key in line]
        what += line["tasks"] if len(line["tasks"]) < 3 else []
        say(" ".join(map(str, [*what, *told])))


def device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers")}


def search(mark: Callable[[int], dict], score: Callable[[dict], float]) -> dict[int, dict]:
    """Marks by exponent: those of `START`, and more beyond the best as long as it is the first or the last."""
    tried = {k: mark(k) for k in START}
    while True:
        best = max(tried, key=lambda k: score(tried[k]))
        beyond = {min(tried): best - 1, max(tried): best + 1}.get(best)
        if beyond is None or not LIMITS[0] <= beyond <= LIMITS[1]:
            return tried
        tried[beyond] = mark(beyond)


def pack(folder: Path, file: Path) -> list[Path]:
    """The folder as a tar file, in pieces: `cat file.* | tar x` unpacks them."""
    with tarfile.open(file, "w") as archive:
        archive.add(folder, folder.name)
    data = file.read_bytes()
    file.unlink()
    pieces = [data[k : k + PIECE] for k in range(0, len(data), PIECE)]
    names = [file.with_name(f"{file.name}.{i}") for i in range(len(pieces))]
    for name, piece in zip(names, pieces):
        name.write_bytes(piece)
    return names


if __name__ == "__main__":
    typer.run(generation)
