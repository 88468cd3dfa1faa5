"""`lora-opcm`: look into adapters, compare them, merge them, from the command line."""

import json
import sys
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
import typer
from filelock import FileLock
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors import SafetensorError

from . import recipe
from .adapters import Adapter, AdapterError, load_adapter
from .methods import REGISTRY, merge
from .opcm import VARIANTS, ContinualMerger
from .similarity import align, similarity
from .writing import save_adapter

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Look into LoRA adapters, compare them, merge them.",
)
# Piped tables are not squeezed into 80 columns.
out, err = Console(width=None if sys.stdout.isatty() else 150), Console(stderr=True, soft_wrap=True)

Method = Enum("Method", {name: name for name, m in REGISTRY.items() if not m.data}, type=str)
Variant = Enum("Variant", {name: name for name in VARIANTS}, type=str)
Format = Enum("Format", {"peft": "peft", "kohya": "kohya"}, type=str)
DType = Enum("DType", {n: n for n in ("float64", "float32", "float16", "bfloat16")}, type=str)

Inputs = Annotated[list[Path], typer.Argument(help="PEFT folders or .safetensors files")]
Output = Annotated[
    Path, typer.Option("--output", "-o", help="a folder for PEFT, a .safetensors file for kohya")
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace an output that exists")]
Rank = Annotated[int | None, typer.Option(min=1, help="cut the result to this rank per module")]


def working(text: str) -> Progress:
    """A spinner with the time, on stderr, gone when done."""
    bar = Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=err, transient=True
    )
    bar.add_task(text)
    return bar


def show(rows: list[dict], as_json: bool, title: str = "") -> None:
    """A list of records as a table, or as JSON."""
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table(title=title, title_justify="left")
    for name in rows[0] if rows else ():
        table.add_column(
            name,
            justify="left" if isinstance(rows[0][name], str) else "right",
            no_wrap=isinstance(rows[0][name], str),
        )
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    out.print(table)


@app.command()
def inspect(
    adapter: Annotated[Path, typer.Argument(help="a PEFT folder or a .safetensors file")],
    as_json: AsJson = False,
):
    """What is in an adapter: format, base model, modules, ranks, scales, spectra, anything odd."""
    found = load_adapter(adapter)
    rows, odd = [], []
    with working(f"decomposing {len(found.modules)} modules"):
        for name, update in found.modules.items():
            s = update.svd()[1].double()
            energy = s.square()
            rows.append({
                "module": name, "shape": f"{update.shape[0]}×{update.shape[1]}", "rank": update.rank,
                "scale": float(getattr(update, "scale", 1.0)), "‖ΔW‖": float(s.norm()), "σ₁": float(s[0]) if len(s) else 0.0,
                "effective rank": float(s.sum() ** 2 / energy.sum()) if len(s) else 0.0,
                "energy in 4": float(energy[:4].sum() / energy.sum()) if len(s) else 0.0,
            })  # fmt: skip
            if not len(s):
                odd.append(f"{name} is zero")
            elif len(s) < update.rank:
                odd.append(f"{name} has rank {len(s)}, stored as {update.rank}")
    odd += [f"{name} is stored in full ({tuple(t.shape)}), not as factors" for name, t in found.saved.items()]
    summary = {
        "source": str(adapter), "format": found.format, "base model": found.base_model or "not named", "dtype": str(found.dtype).removeprefix("torch."),
        "modules": len(rows), "numbers stored": sum(u.left.numel() + u.right.numel() for u in found.modules.values()),
        "norm": round(found.norm(), 4), "odd": odd,
    }  # fmt: skip
    if as_json:
        print(json.dumps(summary | {"table": rows}, indent=1))
        return
    show(rows, False)
    for key, value in summary.items():
        out.print(
            f"[bold]{key}[/]: {'nothing' if value == [] else '; '.join(value) if key == 'odd' else value}",
            highlight=False,
        )


@app.command()
def compare(
    adapters: Inputs,
    k: Annotated[int, typer.Option(min=1, help="leading directions compared")] = 8,
    html: Annotated[
        Path | None, typer.Option(help="write an interactive report, one file that needs no network")
    ] = None,
    as_json: AsJson = False,
):
    """How adapters overlap, pair by pair: φ of outputs and inputs beside what chance gives, and the cosine."""
    if len(adapters) < 2:
        raise AdapterError(f"expected two adapters or more, got {len(adapters)}")
    loaded = [load_adapter(path) for path in adapters]
    tables = {}
    with working("comparing"):
        for i, a in enumerate(loaded):
            for j in range(i):
                tables[j, i] = similarity(loaded[j], a, k=k, l=k)
    rows = [
        {
            "pair": f"{adapters[i].name} + {adapters[j].name}", "modules": len(t), "cosine": float(t.cosine.mean()),
            "φ outputs": float(t.phi_left.mean()), "× chance": float((t.phi_left / t.null_left).mean()),
            "φ inputs": float(t.phi_right.mean()), "× chance ": float((t.phi_right / t.null_right).mean()),
            "smallest angle, °": float(torch.tensor(t[["angle_left", "angle_right"]].min().min()).rad2deg()),
        }
        for (i, j), t in tables.items()
    ]  # fmt: skip
    show(
        rows,
        as_json,
        f"leading {k} directions, means over modules; 1 × chance is what unrelated adapters show",
    )
    if html:
        from .report import write_report

        write_report(html, [p.name for p in adapters], tables, k)
        err.print(f"report: {html}")


def _parse(values: list[str] | None) -> dict:
    """`name=value` options of a method; values are JSON where they can be."""
    found = {}
    for item in values or []:
        name, equals, value = item.partition("=")
        if not equals:
            raise AdapterError(f"--option {item}: expected name=value")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


@app.command("merge")
def merge_(
    adapters: Inputs,
    output: Output,
    method: Annotated[Method, typer.Option(help="see `lora-opcm methods`")] = Method.opcm,
    weights: Annotated[str | None, typer.Option(help="one factor per adapter, such as 0.7,-0.4")] = None,
    alpha: Annotated[float | None, typer.Option(min=0, max=1, help="OPCM's threshold")] = None,
    scale: Annotated[float | None, typer.Option(help="factor of the merged update")] = None,
    seed: Annotated[int | None, typer.Option(help="for methods that draw random masks")] = None,
    option: Annotated[list[str] | None, typer.Option(help="another option of the method, name=value")] = None,
    rank: Rank = None,
    energy: Annotated[
        float | None, typer.Option(help="cut each module to this share of its squared norm")
    ] = None,
    dtype: Annotated[
        DType | None, typer.Option(help="of the output; the widest of the inputs unless given")
    ] = None,
    format: Annotated[
        Format | None, typer.Option(help="of the output; that of the inputs unless given")
    ] = None,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would happen, write nothing")] = False,
):
    """One adapter out of several; the base model is not needed. Writes the adapter, a card and a recipe."""
    call = {"method": method.value} | {
        k: v for k, v in {"alpha": alpha, "scale": scale, "seed": seed}.items() if v is not None
    }
    call |= _parse(option)
    if weights is not None:
        try:
            call["weights"] = [float(w) for w in weights.split(",")]
        except ValueError:
            raise AdapterError(f"--weights {weights}: expected numbers with commas between them") from None
    call |= {k: v for k, v in {"rank": rank, "energy": energy}.items() if v is not None}
    loaded = [load_adapter(path) for path in adapters]
    if dry_run:
        modules = {
            n: max(a.modules[n].rank for a in loaded if n in a.modules) for a in loaded for n in a.modules
        }
        total = {n: sum(a.modules[n].rank for a in loaded if n in a.modules) for n in modules}
        out.print(f"would merge {len(loaded)} adapters, {len(modules)} modules, by {call}", highlight=False)
        out.print(
            f"summed rank up to {max(total.values())}" + (f", cut to {rank}" if rank else ""), highlight=False
        )
        out.print(f"would write {output}" + (" (exists already)" if output.exists() else ""), highlight=False)
        raise typer.Exit(int(output.exists() and not overwrite))
    _refuse_existing(output, overwrite)
    dropped: dict[str, float] = {}
    with working(f"merging {len(loaded)} adapters by {method.value}"):
        merged = merge(loaded, dropped=dropped, **call)
        path = save_adapter(
            merged, output, format and format.value, overwrite, dtype and getattr(torch, dtype.value)
        )
    versions = {name: version(name) for name in ("lora-opcm", "torch")}
    recipe.write_recipe(adapters, path, call, dropped, versions)
    if path.is_dir():
        recipe.write_card(path, merged, adapters, call)
    worst = max(dropped, key=dropped.get)
    err.print(
        f"{path}: {len(merged.modules)} modules, norm {merged.norm():.4g}; truncation dropped at most {dropped[worst]:.1%} of a module's squared norm",
        highlight=False,
    )


def _refuse_existing(output: Path, overwrite: bool) -> None:
    """Before the work, not after it."""
    if output.exists() and not overwrite and (output.is_file() or any(output.glob("adapter_*"))):
        raise AdapterError(f"{output}: exists already; --overwrite replaces it")


@app.command()
def methods(as_json: AsJson = False):
    """The merge methods and what is true of each."""
    rows = [
        {"method": m.name, "sees": "one at a time" if m.continual else "all at once", "order matters": str(m.ordered),
         "options": ", ".join(m.options), "source": m.source}
        for m in REGISTRY.values() if not m.data
    ]  # fmt: skip
    show(rows, as_json)


@app.command()
def add(
    state: Annotated[Path, typer.Argument(help="a state file; made if it does not exist")],
    adapters: Inputs,
    alpha: Annotated[float, typer.Option(min=0, max=1, help="for a new state")] = 0.5,
    variant: Annotated[Variant, typer.Option(help="for a new state")] = Variant.paper,
    cap: Annotated[int | None, typer.Option(min=1, help="for a new state: rank it keeps per module")] = None,
):
    """Take adapters into a continual merge (OPCM), one after the other. The state stays whole if this is interrupted."""
    with FileLock(f"{state}.lock", timeout=600), working("adding") as bar:
        merger = (
            ContinualMerger.load(state)
            if state.exists()
            else ContinualMerger(alpha=alpha, variant=variant.value, rank=cap)
        )
        for path in adapters:
            bar.update(bar.task_ids[0], description=f"adding {path.name}")
            merger.add(load_adapter(path), name=path.name)
            merger.save(state)
    show(merger.state.history, False)


@app.command()
def export(
    state: Path, output: Output, rank: Rank = None, format: Format | None = None, overwrite: Overwrite = False
):
    """Write the merged adapter of a state."""
    _refuse_existing(output, overwrite)
    save_adapter(ContinualMerger.load(state).adapter(rank=rank), output, format and format.value, overwrite)


@app.command()
def remove(state: Path, name: str):
    """Refused: an OPCM state cannot forget one adapter exactly."""
    names = ContinualMerger.load(state).state.names
    known = "" if name in names else f" (the state holds {', '.join(names)}, not {name})"
    raise AdapterError(
        f"{state}: cannot remove {name}{known}: every adapter that came later was projected against it, and the state"
        " keeps only their sum. Merge the others anew with `lora-opcm add`"
    )


@app.command()
def convert(
    adapter: Path,
    output: Output,
    to: Format = Format.kohya,
    dtype: DType | None = None,
    overwrite: Overwrite = False,
):
    """Write an adapter in another format."""
    save_adapter(load_adapter(adapter), output, to.value, overwrite, dtype and getattr(torch, dtype.value))


@app.command("align")
def align_(
    adapter: Path,
    to: Annotated[Path, typer.Option(help="the adapter to come near to")],
    output: Output,
    overwrite: Overwrite = False,
):
    """The same update with the factors nearest to another adapter's: what a tool that averages factors needs."""
    _refuse_existing(output, overwrite)
    save_adapter(align(load_adapter(adapter), load_adapter(to)), output, overwrite=overwrite)


@app.command()
def verify(
    adapters: Inputs,
    against: Annotated[Path, typer.Option(help="the merged adapter")],
    tolerance: float = 1e-3,
):
    """Repeat the merge of a recipe and compare. Exit code 1 if the result is another one."""
    path = against if against.is_dir() else against.with_suffix(".recipe.json")
    found = recipe.read_recipe(path)
    stored = load_adapter(against)
    with working("merging again"):
        again = recipe.repeat(found, adapters)
        gap = _distance(stored, again)
    same = recipe.digest(against) == found["output_sha256"]
    out.print(
        f"file unchanged since the merge: {same}; relative distance to the repeated merge {gap:.1e}",
        highlight=False,
    )
    raise typer.Exit(int(gap > tolerance))


def _distance(a: Adapter, b: Adapter) -> float:
    if len(a.modules) != len(b.modules):
        return float("inf")
    pairs = (
        zip(a.modules.values(), b.modules.values())
        if set(a.modules) != set(b.modules)
        else ((u, b.modules[n]) for n, u in a.modules.items())
    )
    gap = sum((x.to(torch.float64) + -1 * y.to(torch.float64)).norm() ** 2 for x, y in pairs)
    return (gap / max(b.norm() ** 2, 1e-300)) ** 0.5


def main() -> None:
    """Entry point: what a user can mend is one line on stderr and exit code 2."""
    try:
        app()
    except (AdapterError, ValueError, OSError, SafetensorError) as error:
        err.print(f"error: {error}", style="red", highlight=False, markup=False)
        sys.exit(2)
    except KeyboardInterrupt:
        err.print("interrupted; what was there before is unchanged")
        sys.exit(130)


if __name__ == "__main__":
    main()
