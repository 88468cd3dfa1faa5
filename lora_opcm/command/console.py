"""What the commands share: tables, progress, and how mistakes and interruptions end.

Nothing here or in `app` and `states` imports torch before a command runs, so that `--help` answers at once.
"""

import json
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors import SafetensorError

if TYPE_CHECKING:
    import torch

    from ..files import Adapter

# Piped tables are not squeezed into 80 columns.
out, err = Console(width=None if sys.stdout.isatty() else 150), Console(stderr=True, soft_wrap=True)


class Steps:
    """A progress bar on stderr: only on a terminal, only for what lasts over a second, gone when done.

    ``steps("reading", items)`` gives the items one by one; ``steps.of("merging")`` is a `progress` for the
    functions of the package.
    """

    def __enter__(self) -> "Steps":
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        self._bar = Progress(*columns, console=err, transient=True)
        self._timer = threading.Timer(1, self._bar.start) if err.is_terminal else None
        if self._timer:
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer.join()
            self._bar.stop()

    def __call__(self, text: str, items: Iterable, total: int | None = None) -> Iterator:
        task = self._bar.add_task(text, total=len(items) if total is None and isinstance(items, Sized) else total)
        for item in items:
            yield item
            self._bar.advance(task)
        self._bar.remove_task(task)

    def of(self, text: str) -> Callable[..., Iterator]:
        return partial(self, text)


def show(rows: list[dict], as_json: bool, title: str = "") -> None:
    """A list of records as a table, or as JSON."""
    if as_json:
        print(json.dumps([{k: None if v != v else v for k, v in row.items()} for row in rows], indent=1))  # no NaN
        return
    if title:
        say(title)
    table = Table()
    for name in rows[0] if rows else ():
        text = isinstance(rows[0][name], str)
        table.add_column(name, justify="left" if text else "right", overflow="fold")
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    out.print(table, markup=False)


def say(text: str) -> None:
    """A line of result on stdout, as it is."""
    out.print(text, highlight=False, markup=False, soft_wrap=True)


def note(text: str) -> None:
    """A line beside the result, on stderr."""
    err.print(text, highlight=False, markup=False)


def wrote(path: Path, merged: "Adapter") -> None:
    """What was written: how much, and what a factor and a cut made of it."""
    worst = max(merged.dropped, key=lambda name: merged.dropped[name], default="")
    share = merged.dropped.get(worst, 0.0)
    lost = f"; the cut dropped at most {share:.1%} of a module's squared norm ({worst})"
    by = f" after a factor of {merged.factor:.4g}" * (merged.factor != 1)
    note(f"wrote {path}: {len(merged)} modules, norm {merged.norm():.4g}{by}" + lost * (share > 1e-9))


def guarded(run: Callable[[], None]) -> None:
    """Run a command. What a user can mend is one line on stderr and exit code 2; an interruption is 130.

    A SIGTERM ends as Ctrl-C does, so that temporary files go.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    said: set[str] = set()  # a remark on the inputs comes again from every process that reads them

    def show(message: Warning | str, *_: object, **__: object) -> None:
        if str(message) not in said:
            said.add(str(message))
            note(f"warning: {message}")

    warned, warnings.showwarning = warnings.showwarning, show
    try:
        run()
    except (ValueError, OSError, SafetensorError, OverflowError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and type(error).__name__ != "_LinAlgError":  # torch's, not imported here
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        err.print(f"error: {text}", style="red", highlight=False, markup=False)
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit) as end:  # typer makes the first an exit by 130
        if isinstance(end, KeyboardInterrupt) or end.code == 130:
            note("interrupted; nothing is half written")
            sys.exit(130)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        warnings.showwarning = warned


# -- options that several commands take ----------------------------------------------------------------------


class DType(StrEnum):
    """The dtypes that factors are written in."""

    float64 = "float64"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class FullTensors(StrEnum):
    """What becomes of full tensors that differ."""

    first = "first"
    drop = "drop"
    mean = "mean"


Source = Annotated[Path, typer.Argument(help="a PEFT folder or a .safetensors file")]
Inputs = Annotated[list[Path], typer.Argument(help="PEFT folders or .safetensors files")]
Output = Annotated[
    Path,
    typer.Option("--output", "-o", help="a folder for PEFT, a .safetensors file for kohya and diffusers"),
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace an output that exists")]
Rank = Annotated[int | None, typer.Option(min=1, help="cut the result to this rank per module")]
Energy = Annotated[float | None, typer.Option(min=0, max=1, help="cut each module to this share of its squared norm")]
OutDType = Annotated[DType | None, typer.Option("--dtype", help="of the output; the widest of the inputs unless given")]
OutFormat = Annotated[
    str | None,
    typer.Option("--format", help="of the output, peft, kohya or diffusers; that of the inputs unless given"),
]

Disjoint = Annotated[bool, typer.Option("--disjoint", help="merge adapters that have no module in common, too")]
AnyBase = Annotated[bool, typer.Option("--any-base", help="take base models of different names for one")]
Ragged = Annotated[
    bool, typer.Option("--ragged", help="leave each module its own rank; zeros bring all to the largest otherwise")
]
Drop = Annotated[
    list[str] | None,
    typer.Option("--drop", help="leave out the modules this pattern matches, such as 'lora_te*'; may be given again"),
]

Full = Annotated[
    FullTensors | None,
    typer.Option(
        "--full",
        help="trained heads and embeddings in full (modules_to_save) that differ: take those of the first adapter that"
        " has them, drop all, or take their mean; refused unless given",
    ),
]


def torch_dtype(dtype: DType | None) -> "torch.dtype | None":
    import torch

    return getattr(torch, dtype.value) if dtype else None


def number_or_word(text: str | None) -> float | str | None:
    """What `--scale` says: a number, or a word such as norm."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text
