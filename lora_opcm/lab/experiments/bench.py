"""`make bench`: what merging costs, against the dense algorithm, peers, and the floor of reading and writing.

Every part runs in a process of its own, so that its peak memory is its own, and says the load of the machine while it
ran. Two ways that are compared run in turn in one process; of their times the ratio of every round is taken, and the
median of those: other programs slow both. Counts of calls, operations and page faults do not depend on the load.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pandas as pd
import torch
import typer
from safetensors.torch import load_file, save_file

from ... import LowRank, load_adapter, merge, save_adapter
from ...files import Adapter
from ...merging import Core
from ...merging.batch import Batch
from ...merging.rules import opcm, project
from ...streams import ContinualMerger
from .cost import best, counted, in_turn
from .dense import step as dense_step
from .peers import COUNT, RANK, against_peers, updates

app = typer.Typer(add_completion=False)


def emit(found: dict) -> None:
    """Hand the numbers of a part, and the load it ran under, to the process that asked for it."""
    print(json.dumps(found | {"load of the machine": os.getloadavg()[0]}))


def peak() -> float:
    """Peak resident memory of this process in GB, file pages that were mapped included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


@app.command()
def module(size: int = 4096):
    """(a) OPCM of 8 adapters on one square module: core space against the dense algorithm."""
    parts = updates(size, size)
    core_seconds = best(lambda: (lambda c: c.lift(opcm(c)))(Core.of(parts)), 5)
    core_peak = peak()
    merged, delta = parts[0].delta(), parts[1].delta()
    step = best(lambda: dense_step(merged, delta), 1)
    core = Core.of(parts)
    exact = core.lift(core.cores[0] + project(core.cores[1], core.cores[0], 0.5, "paper", core.dtype))[0]
    gap = float((exact.delta() - dense_step(merged, delta)).norm() / exact.norm()) if size <= 1024 else float("nan")
    dense_seconds = step * (COUNT - 1)  # the seven steps cost the same; one is run
    emit({
        "core, s": core_seconds, "dense, s (7 × one step)": dense_seconds,
        "times faster": dense_seconds / core_seconds,
        "core peak, GB": core_peak, "dense peak, GB": peak(), "gap of one step": gap,
    })  # fmt: skip


@app.command()
def work(size: int = 4096):
    """(d) Eight modules of work, in float16 to rank 16, against the copy of their factors: step by step, and where
    adapters lack the modules, have one random start or one frozen factor. On one thread, as every batch is."""
    torch.set_num_threads(1)
    drawn = lambda own=1.0: [updates(size, size, seed=i, own=own) for i in range(COUNT)]  # noqa: E731
    cases = {
        "8 adapters": drawn(), "two lack it": [[*u[:6], u[6].zero(), u[7].zero()] for u in drawn()],
        "one random start": drawn(0.05), "one frozen factor": drawn(0.0),
    }  # fmt: skip
    half = {name: [[u.to(torch.float16) for u in us] for us in modules] for name, modules in cases.items()}
    merges = {name: partial(merge, adapters_of(modules), "opcm", rank=RANK) for name, modules in half.items()}
    eight = half["8 adapters"]
    copy = lambda: [(u.left.clone(), u.right.clone()) for us in eight for u in us]  # noqa: E731
    used, ratios = in_turn({"copy": copy} | merges)
    batch = Batch.of(eight)[0]
    total = opcm(batch)
    steps, _ = in_turn({
        "conversion": lambda: [(u.left.float(), u.right.float()) for us in eight for u in us],
        "bases and Gram matrices": lambda: Batch.of(eight), "projections": lambda: opcm(batch),
        "lift": lambda: batch.lift(total, RANK),
        "one module alone": partial(merge, adapters_of(eight[:1]), "opcm", rank=RANK),
    })  # fmt: skip
    counts = {f"{name}: {k} a module": x / COUNT for name, way in merges.items() for k, x in counted(way).items()}
    emit(used | ratios | {f"step: {name}": x for name, x in steps.items()} | counts)


def adapters_of(modules: list[list[LowRank]]) -> list[Adapter]:
    """Adapters out of the updates of each module."""
    return [Adapter({str(i): of[t] for i, of in enumerate(modules)}) for t in range(len(modules[0]))]


@app.command()
def card(device: str = "cuda", size: int = 4096, modules: int = 16):
    """(g) OPCM of 8 adapters of many square modules, cut to rank 16: on the processor, on a card and back, and there
    by one step of the dense algorithm on one module, in turn."""
    parts = [updates(size, size, seed=i) for i in range(modules)]
    adapters = adapters_of([[u.to(torch.float16) for u in of] for of in parts])
    merged, delta = (u.delta().to(device) for u in parts[0][:2])
    ways = {
        "card": lambda: merge(adapters, "opcm", rank=RANK, device=device),
        "processor": lambda: merge(adapters, "opcm", rank=RANK),
        "one dense step": lambda: dense_step(merged, delta).norm().item(),  # .item() waits for the card
    }
    used, ratios = in_turn(ways, 3)
    there, here = (ways[name]().modules["0"].delta() for name in ("card", "processor"))
    steps = {"dense algorithm / card": modules * (COUNT - 1) * ratios.pop("one dense step / card")}
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else device
    emit(
        {"device": name, "modules": modules, "apart": float((there - here).norm() / here.norm())}
        | used
        | ratios
        | steps
    )


@app.command()
def many(size: int = 4096, count: int = 64):
    """(e) Joint merges of 64 adapters of one module, uncut; and a sum of 5 · size / 16 adapters cut to rank 16."""
    adapters = [Adapter({"w": u.to(torch.float16)}) for u in updates(size, size, count)]
    found = {}
    for method in ("opcm", "tsv", "whitened_sum", "iso_c", "svd"):
        before = time.process_time()
        seconds = best(lambda method=method: merge(adapters, method), 1)
        found |= {f"{method}, s": seconds, f"{method}, s of the processor": time.process_time() - before}
    small = [Adapter({"w": u}) for u in updates(size // 4, size // 4, 5 * size // 64)]
    cut = partial(merge, small, "svd", rank=RANK)
    used, ratios = in_turn({"sketched sum": cut, "exact sum": partial(cut, sketch=False)}, 2)
    emit(found | used | ratios | {"peak, GB": peak()})


@app.command()
def peers(size: int = 1024):
    """(f) Other packages on the same adapters, see `against_peers`."""
    found = {}
    for row in against_peers(size).to_dict("records"):
        found |= {f"{row['ours']}, ms": row["ours, ms"], f"{row['peer']}, ms": row["peer, ms"]}
        found[f"{row['peer']} / {row['ours']}"] = row["times ours"]
    emit(found)


@app.command()
def make(folder: Path):
    """Eight synthetic adapters with the shapes of Llama-2-7B, float16, in PEFT folders."""
    from ..bases.shapes import build, linear_shapes

    shapes = linear_shapes(build("Llama-2-7B"))
    for t in range(COUNT):
        generator = torch.Generator().manual_seed(t)
        modules = {}
        for name, (m, n) in shapes.items():
            left = torch.randn(m, RANK, generator=generator).half()
            modules[name] = LowRank(left, torch.randn(RANK, n, generator=generator).half())
        save_adapter(Adapter(modules, dtype=torch.float16), folder / f"adapter{t}", format="peft")
    emit({})


@app.command()
def floor(folder: Path):
    """Read every input tensor once, write one adapter of the same rank."""

    def run():
        for path in sorted(folder.glob("adapter*/*.safetensors")):
            tensors = {name: t.clone() for name, t in load_file(path).items()}
        save_file(tensors, folder / "floor.safetensors")

    emit({"floor, s": best(run), "peak, GB": peak()})


@app.command()
def disk(folder: Path, method: str = "opcm", rank: int = RANK):
    """(b) Disk to disk: load 8 adapters, merge, write one of the same rank."""

    def run():
        adapters = [load_adapter(path) for path in sorted(folder.glob("adapter*")) if path.is_dir()]
        save_adapter(merge(adapters, method, rank=rank), folder / "merged", overwrite=True)

    seconds = best(run, 3)
    size = sum(p.stat().st_size for p in folder.glob("adapter*/*.safetensors")) / 1e9
    emit({f"{method}, s": seconds, "inputs, GB": size, "peak, GB": peak()})


@app.command()
def growth(size: int = 4096, cap: int = 64):
    """(c) Time against T: all at once, and one at a time with a rank cap."""
    rows = {}
    for count in (2, 4, 8, 16, 32, 64):
        parts = updates(size, size, count)
        joint = best(lambda parts=parts: (lambda c: c.lift(opcm(c)))(Core.of(parts)), 1)
        adapters = [Adapter({"w": u}) for u in parts]
        merger = ContinualMerger(alpha=0.5, rank=cap)
        for a in adapters[:-1]:
            merger.add(a)
        rows[count] = {
            "joint, s": joint,
            "last streamed add, s": best(lambda m=merger, a=adapters[-1]: m.add(a), 1),
        }
    emit(
        {f"T = {count}: {what}": value for count, row in rows.items() for what, value in row.items()}
        | {"peak, GB": peak()}
    )


def run(part: str, *arguments: str) -> dict:
    """One part in a process of its own."""
    command = [sys.executable, "-m", "lora_opcm.lab.experiments.bench", part, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{part} failed:\n{done.stderr}")
    return json.loads(done.stdout)


@app.callback(invoke_without_command=True)
def everything(context: typer.Context, size: int = 4096):
    """All parts, one after the other, as a table."""
    if context.invoked_subcommand:
        return
    rows = []

    def report(title: str, found: dict):
        rows.extend((title, what, x if isinstance(x, str) else f"{x:.3g}") for what, x in found.items())
        print(
            pd.DataFrame(rows[-len(found) :], columns=["part", "what", "value"]).to_string(index=False),
            flush=True,
        )

    with tempfile.TemporaryDirectory() as folder:
        run("make", folder)
        floor_ = run("floor", folder)
        report("floor", floor_)
        merged = run("disk", folder)
        report(
            "8 × Llama-2-7B, disk to disk",
            merged | {"times the floor": merged["opcm, s"] / floor_["floor, s"]},
        )
    report(f"eight modules of work, {size}²", run("work", "--size", str(size)))
    if torch.cuda.is_available():
        report(f"on a card, {size}²", run("card", "--size", str(size)))
    report(f"very many adapters, {size}²", run("many", "--size", str(size)))
    report("peers", run("peers"))
    report(f"growth with T, {size}²", run("growth", "--size", str(size)))
    report(f"one module, {size}²", run("module", "--size", str(size)))


if __name__ == "__main__":
    app()
