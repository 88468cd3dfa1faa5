"""How the adapters of the published run are trained, and where they lie: folder/<recipe>/seed<n>/<task>."""

import os
import shutil
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import msgspec
import torch

from ...files import Adapter, adapter_path, load_adapter
from ...files.disk import write_text
from ..bases.causal import LLAMA_LINEAR
from ..bases.encoder import MINILM
from ..protocol import DEFAULTS, Protocol, record_of, save_adapter_half
from ..tasks import joint_task, load_task, tasks
from ..training import train_adapter

QUERY_VALUE = r"encoder\.layer\.\d+\.attention\.self\.(query|value)"
UNEVEN = "uneven"  # every other adapter trained four times as long, so that norms differ
BOOK = "book"  # the adapters that ship with the package: seed 0, trained by the first protocol

RECIPES = {
    "published": {},
    "rank 4": {"rank": 4, "alpha": 8},
    "rank 64": {"rank": 64, "alpha": 128},
    "q and v": {"target_modules": QUERY_VALUE},
    "400 steps": {"steps": 400, "evaluate_every": 100},
    "one start": {"one_start": True},
    "joint": {"steps": 800, "evaluate_every": 200},  # one adapter for all eight tasks
    "mpnet": {"base": "mpnet"} | DEFAULTS["mpnet"],  # another encoder, five times as large
    "smollm2": {"base": "smollm2", "target_modules": LLAMA_LINEAR, "bfloat16": True},  # the label is its next token
    "shuffled labels": {"shuffled": True, "patience": 100},
}

Wanted = tuple[str, int, str]  # recipe, seed, task


def protocol(recipe: str, seed: int) -> Protocol:
    """By what the adapters of a recipe are trained; validation texts choose nothing in it."""
    return Protocol(seed=seed, checkpoint="train", **RECIPES[recipe])


def base(recipe: str) -> str:
    """The model that adapters of a recipe adapt."""
    return RECIPES.get(recipe, {}).get("base", MINILM)


def source(recipe: str, task: str) -> str:
    """The recipe that trained the adapter of a task."""
    if recipe != UNEVEN:
        return recipe
    return "400 steps" if tasks().index(task) % 2 else "published"


def place(folder: Path | str, recipe: str, seed: int, task: str) -> Path:
    """The folder of one adapter."""
    recipe = source(recipe, task)
    return adapter_path(task) if recipe == BOOK else Path(folder, recipe.replace(" ", "-"), f"seed{seed}", task)


def there(folder: Path | str, recipe: str, seed: int, task: str) -> bool:
    """Whether an adapter was trained to its end: its record is written last."""
    path = place(folder, recipe, seed, task)
    return recipe == BOOK or (path / "training.json").exists()


@cache
def adapter(folder: Path | str, recipe: str, seed: int, task: str) -> Adapter:
    """One adapter, read once."""
    return load_adapter(place(folder, recipe, seed, task))


def train_missing(folder: Path | str, wanted: Iterable[Wanted], workers: int = 1, deadline: float = float("inf")):
    """Train what is not there yet, in the order given; on a GPU several at once, each too small to fill it.

    `deadline` is a `time.monotonic()` after which none is begun.
    """
    wanted = [one for one in wanted if not there(folder, *one)]
    if not wanted:
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_prepare) as pool:
        jobs = {pool.submit(_train, folder, *one, deadline): one for one in wanted}
        for i, job in enumerate(as_completed(jobs), 1):
            seconds = job.result()
            print(f"trained {i} of {len(jobs)}: {jobs[job]}, {seconds:.1f} s", flush=True)


def _prepare():
    if torch.cuda.is_available():
        torch.set_num_threads(1)


def _train(folder, recipe: str, seed: int, task: str, deadline: float) -> float:
    start = time.monotonic()
    if start > deadline:
        return 0.0
    target = place(folder, recipe, seed, task)
    scratch = Path(folder, "runs", f"{recipe.replace(' ', '-')}-{seed}-{task}-{os.getpid()}")
    data, how = joint_task() if recipe == "joint" else load_task(task), protocol(recipe, seed)
    train_adapter(data, scratch, how, quiet=True)
    save_adapter_half(scratch / "best", target, how.base)
    shutil.copy(scratch / "history.json", target / "history.json")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    record = msgspec.structs.replace(record_of(data, target, how), device=device)
    write_text(target / "training.json", msgspec.json.format(msgspec.json.encode(record), indent=1).decode() + "\n")
    shutil.rmtree(scratch, ignore_errors=True)
    return time.monotonic() - start
