"""`python -m lora_opcm.lab.train FOLDER`: train the adapters of one base and seed that are not there yet.

On many devices: `accelerate launch --config_file profiles/accelerate/many.yaml -m lora_opcm.lab.train …`.
"""

import json
import shutil
import zlib
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from filelock import FileLock

from ..files import AdapterError, load_adapter
from ..files.disk import write_text
from .assets import AssetError, cache_dir
from .bases import family, slug
from .bases.encoder import MINILM
from .evaluation import Evaluator
from .protocol import DEFAULTS, PROTOCOL, Protocol, Record, record_of, save_adapter_half
from .tasks import load_named, load_prompts, tasks
from .training import last_checkpoint, processes, train_adapter


def train(
    folder: Annotated[Path, typer.Argument(help="where the adapters and manifest.json go")],
    task: Annotated[list[str] | None, typer.Option(help="by name; the eight of the book unless given")] = None,
    base: Annotated[str, typer.Option(help="the base model: a hub name or a folder; tells the family")] = MINILM,
    sources: Annotated[str, typer.Option(help="a folder with the data sets; empty: from the hub")] = "",
    seed: int = 0,
    rank: int = 16,
    steps: Annotated[int, typer.Option(help="optimiser steps; 0: as the family's protocol has it")] = 0,
    batch_size: Annotated[int, typer.Option(help="of all processes together; 0: likewise")] = 0,
    device_batch: Annotated[int, typer.Option(help="examples a process takes at once; 0: its share")] = 0,
    quantise: Annotated[str, typer.Option(help="4bit or 8bit: the base of a causal model")] = "",
    report_to: Annotated[str, typer.Option(help="experiment tracker, as in transformers")] = "none",
):
    """Train one LoRA per task, measure it on the whole test set, and keep the manifest up to date.

    Generation tasks are not measured here: their evaluation takes as long as their training.
    """
    kind = family(base)
    given = {"steps": steps, "batch_size": batch_size, "device_batch": device_batch}
    options = DEFAULTS.get(base, DEFAULTS[kind]) | {name: value for name, value in given.items() if value}
    options["evaluate_every"] = min(
        options.get("evaluate_every", PROTOCOL.evaluate_every), options.get("steps", PROTOCOL.steps)
    )
    protocol = Protocol(seed=seed, rank=rank, alpha=2 * rank, base=base, quantise=quantise, **options)
    folder.mkdir(parents=True, exist_ok=True)
    for name in task or tasks():
        if not up_to_date(folder / name, protocol, name, sources):
            train_one(folder, name, protocol, sources, report_to)
        elif processes().is_main_process:
            typer.echo(f"{name}: up to date")


def read_manifest(folder: Path) -> dict[str, Record]:
    """What `folder`/manifest.json says of each adapter; empty where there is none."""
    path = folder / "manifest.json"
    return msgspec.json.decode(path.read_bytes(), type=dict[str, Record]) if path.exists() else {}


def pretty(content: object) -> str:
    return msgspec.json.format(msgspec.json.encode(content), indent=1).decode() + "\n"


def load_task_of(kind: str, name: str, sources: str):
    """The task of that name, of the sort the family learns."""
    return load_prompts(name, sources) if kind == "causal" else load_named(name, sources)


def up_to_date(folder: Path, protocol: Protocol, name: str, sources: str) -> bool:
    """Whether the adapter in `folder` was trained by this protocol on this data."""
    own = folder / "training.json"
    if not (folder / "adapter_model.safetensors").exists():
        return False
    try:
        done = (
            msgspec.json.decode(own.read_bytes(), type=Record) if own.exists() else read_manifest(folder.parent)[name]
        )
    except (msgspec.MsgspecError, UnicodeError, LookupError):  # torn, or of another version of the protocol
        return False
    return done.protocol == protocol and done.data_sha256 == load_task_of(family(protocol.base), name, sources).sha256


def train_one(folder: Path, name: str, protocol: Protocol, sources: str, report_to: str):
    """Train, save and measure one adapter; every process of a distributed run calls it."""
    kind = family(protocol.base)
    data = load_task_of(kind, name, sources)
    # A run is resumed only by the protocol and the data that began it.
    content = zlib.crc32(msgspec.json.encode([protocol, data.sha256]))
    run = cache_dir() / "runs" / f"{slug(protocol.base)}-{name}-seed{protocol.seed}-{content:08x}"
    main = processes().is_main_process
    if main:
        found = last_checkpoint(run)
        count = processes().num_processes
        told = [f"{count} processes"] * (count > 1) + [f"resumed from {Path(found).name}" for found in [found] if found]
        typer.echo(", ".join([f"{name}: training", *told]))
    processes().wait_for_everyone()
    train_adapter(data, run, protocol, report_to=report_to)
    if not main:
        return
    save_adapter_half(run / "best", folder / name, protocol.base)
    history = json.loads((run / "history.json").read_text())
    write_text(folder / name / "history.json", json.dumps(history) + "\n")
    found = {}
    if kind != "causal":
        evaluator = Evaluator([data], base=protocol.base)
        found["zero_shot"] = round(float(evaluator.correct()[name].mean()), 4)
        found["own"] = round(float(evaluator.correct(load_adapter(folder / name))[name].mean()), 4)
    entry = record_of(data, folder / name, protocol, **found)
    write_text(folder / name / "training.json", pretty(entry))
    with FileLock(folder / ".manifest.json.lock"):  # other tasks may train beside this one
        manifest = read_manifest(folder) | {name: entry}
        write_text(folder / "manifest.json", pretty(dict(sorted(manifest.items()))))
    shutil.rmtree(run, ignore_errors=True)  # checkpoints served their purpose
    typer.echo(f"{name}: " + (", ".join(f"{k.replace('_', '-')} {v:.1%}" for k, v in found.items()) or "trained"))


def main():
    try:
        typer.run(train)
    except (AdapterError, AssetError, OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
