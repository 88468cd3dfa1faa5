"""The commands on states: add, export, remove."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from torch.linalg import LinAlgError

from .adapters import AdapterError, load_adapter
from .console import (
    AsJson,
    Energy,
    Inputs,
    OutDType,
    OutFormat,
    Output,
    Overwrite,
    Rank,
    Steps,
    note,
    show,
    torch_dtype,
)
from .opcm import ContinualMerger
from .options import VARIANTS
from .recipe import refuse_existing
from .state import LOADERS, kind_of
from .sums import SumMerger
from .writing import save_adapter

MERGERS = {"opcm": ContinualMerger, "whitened_sum": SumMerger}
Kind = Enum("Kind", {name: name for name in LOADERS}, type=str)
Variant = Enum("Variant", {name: name for name in VARIANTS}, type=str)
State = Annotated[Path, typer.Argument(help="a state file")]


def add(
    state: Annotated[Path, typer.Argument(help="a state file; made if it does not exist")],
    adapters: Inputs,
    method: Annotated[
        Kind | None, typer.Option(help="for a new state: opcm (default) or whitened_sum")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(min=0, max=1, help="for a new state of opcm, default 0.5")
    ] = None,
    variant: Annotated[Variant | None, typer.Option(help="for a new state of opcm, default paper")] = None,
    power: Annotated[
        float | None, typer.Option(min=0, max=1, help="for a new state of whitened_sum, default 0.5")
    ] = None,
    scale: Annotated[float | None, typer.Option(help="for a new state: factor of the merged update")] = None,
    cap: Annotated[
        int | None,
        typer.Option(min=1, help="for a new state: rank it keeps per module, which bounds its size"),
    ] = None,
    as_json: AsJson = False,
):
    """Take adapters into a continual merge, one after the other.

    The state is saved after each adapter and stays whole if this is interrupted; two processes that add to one
    state wait for each other (beside it lies a lock file, empty and hidden). What a new state is told, it
    keeps: an existing one refuses other options.
    """
    given = {"alpha": alpha, "variant": variant and variant.value, "power": power, "scale": scale, "cap": cap}
    with _locked(state), Steps() as steps:
        merger = _load(state) if state.exists() else _new(method.value if method else "opcm", given)
        if state.exists():
            _refuse_change(state, merger, method and method.value, given)
        for i, path in enumerate(adapters, 1):
            text = f"adding {path.name} ({i} of {len(adapters)})"
            merger.add(load_adapter(path), name=path.name, progress=steps.of(text))
            merger.save(state)
    _table(merger, as_json)


def export(
    state: State,
    output: Output,
    rank: Rank = None,
    energy: Energy = None,
    dtype: OutDType = None,
    format: OutFormat = None,
    overwrite: Overwrite = False,
):
    """Write the merged adapter of a state."""
    refuse_existing(output, overwrite, format and format.value)
    merger = _load(state)
    try:
        merged = merger.adapter(rank=rank, energy=energy)
        path = save_adapter(merged, output, format and format.value, overwrite, torch_dtype(dtype))
    except (ValueError, LinAlgError) as error:
        raise AdapterError(f"{state}: {error}") from error
    note(f"wrote {path}: {len(merged.modules)} modules, norm {merged.norm():.4g}")


def remove(
    state: State,
    adapter: Annotated[Path, typer.Argument(help="the adapter that was added, the file itself")],
    as_json: AsJson = False,
):
    """Take an adapter out of a state again, exactly. Refused where that is impossible.

    A whitened sum without a cap is a sum: what an adapter added is subtracted, and the state is as if it had
    never come. The state knows the hash of its factors and takes no other. A capped sum has lost directions,
    and an OPCM state projected every later adapter against it: both refuse.
    """
    with _locked(state), Steps() as steps:
        merger = _load(state)
        if isinstance(merger, ContinualMerger):
            names = merger.state.names
            known = "" if adapter.name in names else f" (the state holds {', '.join(names)})"
            raise AdapterError(
                f"{state}: cannot remove {adapter.name}{known}: every adapter that came later was projected against"
                " it, and the state keeps only their sum. Merge the others anew with `lora-opcm add`, or keep a"
                " state of --method whitened_sum, which can forget"
            )
        merger.remove(load_adapter(adapter), progress=steps.of(f"removing {adapter.name}"))
        merger.save(state)
    _table(merger, as_json)


@contextmanager
def _locked(state: Path) -> Iterator[None]:
    """One process at a time."""
    from filelock import FileLock, Timeout  # only here: every command waits for what is imported

    if not state.parent.is_dir():
        raise AdapterError(f"{state}: there is no folder {state.parent}")
    lock = FileLock(state.parent / f".{state.name}.lock")
    try:
        lock.acquire(timeout=1)
    except Timeout:
        note(f"{state} is in use by another process; waiting for it")
        lock.acquire(timeout=3600)
    try:
        yield
    finally:
        lock.release()


def _load(state: Path) -> ContinualMerger | SumMerger:
    return MERGERS[kind_of(state)].load(state)


def _new(kind: str, given: dict) -> ContinualMerger | SumMerger:
    options = {name: value for name, value in given.items() if value is not None}
    foreign = {"opcm": ["power"], "whitened_sum": ["alpha", "variant"]}[kind]
    for name in foreign:
        if name in options:
            raise AdapterError(f"--{name} is no option of a state of {kind}")
    if kind == "opcm" and "cap" in options:
        options["rank"] = options.pop("cap")
    return MERGERS[kind](**options)


def _refuse_change(state: Path, merger, kind: str | None, given: dict) -> None:
    """Raise if an option is given that is not what the state was made with."""
    held = {"method": next(k for k, cls in MERGERS.items() if isinstance(merger, cls))}
    held |= vars(merger) | ({"cap": merger.rank} if isinstance(merger, ContinualMerger) else {})
    for name, value in ({"method": kind} | given).items():
        if value is not None and held.get(name) != value:
            raise AdapterError(
                f"{state}: --{name} {value}: the state was made with {held.get(name, 'no such option')}, and an"
                " existing state keeps its options"
            )


def _table(merger: ContinualMerger | SumMerger, as_json: bool) -> None:
    """What a state holds, in the order it came."""
    if isinstance(merger, SumMerger):
        rows, rank = merger.members, max((max(s.S.shape) for s in merger.sums.values()), default=0)
        heads = {"name": "name", "norm": "norm", "sha256": "sha256 of the factors"}
        what = f"whitened_sum, power {merger.power:g}, cap {merger.cap or 'none'}"
    else:
        rows, rank = merger.state.history, max((u.rank for u in merger.state.updates.values()), default=0)
        heads = {"name": "name", "norm": "norm", "lambda": "λ", "cleared": "projected out", "dropped": "cut by the cap",
                 "rank": "rank"}  # fmt: skip
        what = f"opcm, α {merger.alpha:g}, {merger.variant}, cap {merger.rank or 'none'}"
    if as_json:
        return show(rows, True)
    short = [{heads.get(k, k): v[:12] if k == "sha256" else v for k, v in row.items()} for row in rows]
    show(short, False, f"{what}: {len(rows)} taken in, rank up to {rank}; shares are of a squared norm")
