"""The commands on states: add, export, remove."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import (
    AnyBase,
    AsJson,
    Disjoint,
    Energy,
    FullTensors,
    Inputs,
    OutDType,
    OutFormat,
    Output,
    Overwrite,
    Ragged,
    Rank,
    Steps,
    note,
    number_or_word,
    show,
    torch_dtype,
    wrote,
)

if TYPE_CHECKING:
    from ..streams import Stream


class Variant(StrEnum):
    """The two readings of OPCM's projection."""

    paper = "paper"
    fusionbench = "fusionbench"


class Sides(StrEnum):
    """What a whitened sum whitens: outputs and inputs, or one of them."""

    both = "both"
    left = "left"
    right = "right"


StateFull = Annotated[
    FullTensors | None,
    typer.Option(
        "--full",
        help="trained heads and embeddings in full (modules_to_save) that differ: keep those of the first adapter that"
        " has them, or drop all; a mean needs all adapters at once, as `merge` has them; refused unless given",
    ),
]
State = Annotated[Path, typer.Argument(help="a state file")]
HEADS = {"name": "name", "norm": "norm", "lambda": "λ", "cleared": "projected out", "dropped": "cut by the cap",
         "rank": "rank"}  # fmt: skip


def add(
    state: Annotated[Path, typer.Argument(help="a state file; made if it does not exist")],
    adapters: Inputs,
    method: Annotated[
        str | None, typer.Option(help="for a new state: opcm (default), whitening, whitened_sum or lora_opcm")
    ] = None,
    alpha: Annotated[float | None, typer.Option(min=0, max=1, help="for a new state of opcm, default 0.5")] = None,
    variant: Annotated[Variant | None, typer.Option(help="for a new state of opcm, default paper")] = None,
    power: Annotated[
        float | None, typer.Option(min=0, max=1, help="for a new state of whitened_sum, default 0.5")
    ] = None,
    sides: Annotated[
        Sides | None, typer.Option(help="for a new state of whitened_sum: outputs (left), inputs (right) or both")
    ] = None,
    scale: Annotated[
        str | None, typer.Option(help="for a new state: factor of the merged update, or auto, norm, 2norm, …")
    ] = None,
    cap: Annotated[
        int | None,
        typer.Option(min=1, help="for a new state: rank it keeps per module, which bounds its size"),
    ] = None,
    disjoint: Disjoint = False,
    any_base: AnyBase = False,
    full: StateFull = None,
    as_json: AsJson = False,
):
    """Take adapters into a continual merge, one after the other.

    The state is saved after each adapter and stays whole if this is interrupted; two processes that add to one
    state wait for each other (beside it lies a lock file, empty and hidden). What a new state is told, it
    keeps: an existing one refuses other options.
    """
    from ..files import AdapterError, load_adapter
    from ..streams import load_stream

    given = {"alpha": alpha, "variant": variant and variant.value, "power": power,
             "sides": sides and sides.value, "scale": number_or_word(scale), "cap": cap}  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    with _locked(state), Steps() as steps:
        if state.exists():
            stream = load_stream(state)
            _refuse_change(state, stream, method, given)
        else:
            stream = _new(method or "opcm", given)
        done: list[str] = []
        try:
            for i, path in enumerate(adapters, 1):
                text = f"adding {path.name} ({i} of {len(adapters)})"
                stream.add(load_adapter(path), path.name, steps.of(text), disjoint, any_base, full and full.value)
                stream.save(state)
                done.append(str(path))
        except BaseException as error:
            said = f"in {state} already, not to be added again: {', '.join(done)}"
            if done and isinstance(error, ValueError):
                raise AdapterError(f"{error}; {said}") from error
            if done:
                note(said)
            raise
    _table(stream, as_json)


def export(
    state: State,
    output: Output,
    rank: Rank = None,
    energy: Energy = None,
    dtype: OutDType = None,
    format: OutFormat = None,
    ragged: Ragged = False,
    overwrite: Overwrite = False,
):
    """Write the merged adapter of a state."""
    from torch.linalg import LinAlgError

    from ..files import AdapterError
    from ..streams import load_stream
    from .recipe import refuse_existing, write_alone

    refuse_existing(output, overwrite, format)
    stream = load_stream(state)
    try:
        refuse_existing(output, overwrite, format or (None if stream.like is None else stream.like.format))
        merged = stream.adapter(rank=rank, energy=energy, ragged=ragged, dtype=torch_dtype(dtype))
        path = write_alone(merged, output, format, overwrite)
    except (ValueError, LinAlgError) as error:
        raise AdapterError(f"{state}: {error}") from error
    wrote(path, merged)


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
    from ..files import AdapterError, load_adapter
    from ..streams import load_stream

    with _locked(state), Steps() as steps:
        stream = load_stream(state)
        try:
            stream.remove(load_adapter(adapter), progress=steps.of(f"removing {adapter.name}"))
        except ValueError as error:
            raise AdapterError(f"{state}: {error}") from error
        stream.save(state)
    _table(stream, as_json)


@contextmanager
def _locked(state: Path) -> Iterator[None]:
    """One process at a time."""
    from filelock import FileLock, Timeout  # only here: every command waits for what is imported

    if not state.parent.is_dir():
        raise ValueError(f"{state}: there is no folder {state.parent}")
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


def _named(kind: "type[Stream]", option: str) -> str:
    """The command line's cap is a stream's rank where that is what it calls it."""
    return "rank" if option == "cap" and "cap" not in kind.defaults() else option


def _new(method: str, given: dict[str, Any]) -> "Stream":
    from ..streams import streams
    from ..values import nearest

    kinds = streams()
    if method not in kinds:
        raise ValueError(f"--method {method}: expected one of {', '.join(kinds)}{nearest(method, kinds)}")
    options = {_named(kinds[method], name): value for name, value in given.items()}
    if foreign := options.keys() - kinds[method].defaults().keys():
        raise ValueError(f"--{min(foreign)} is no option of a state of {method}")
    return kinds[method](**options)


def _refuse_change(state: Path, stream: "Stream", method: str | None, given: dict[str, Any]) -> None:
    """Raise if an option is given that is not what the state was made with."""
    held = {"method": stream.kind} | stream.options
    for name, value in ({"method": method} if method else {}).items() | given.items():
        key = _named(type(stream), name)
        if held.get(key) != value:
            raise ValueError(
                f"{state}: --{name} {value}: the state was made with {held.get(key, 'no such option')}, and an"
                " existing state keeps its options"
            )


def _table(stream: "Stream", as_json: bool) -> None:
    """What a state holds, in the order it came."""
    rows = stream.state.history
    if as_json:
        return show(rows, True)
    shown = {"cap" if name == "rank" else name: value for name, value in stream.options.items()}
    options = ", ".join(
        f"{name} {value or 'none'}" if name == "cap" else f"{name} {value}" for name, value in shown.items()
    )
    shares = "; shares are of a squared norm" if any("cleared" in row for row in rows) else ""
    title = f"{stream.kind}, {options}: {len(rows)} taken in{shares}"
    show([{HEADS.get(k, k): v for k, v in row.items()} for row in rows], False, title)
