"""`lora-opcm`: look into adapters, compare them, merge them, from the command line."""

import json
from itertools import combinations
from pathlib import Path
from typing import Annotated

import typer

from . import fuse, merges, states, tune
from .console import (
    AsJson,
    Drop,
    Inputs,
    OutDType,
    Output,
    Overwrite,
    Source,
    Steps,
    guarded,
    note,
    say,
    show,
    torch_dtype,
)

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Look into LoRA adapters, compare them, merge them. Only `tune` and `fuse` ask for the base model.",
    epilog="Exit codes: 0 done; 1 the answer is no (verify, merge --dry-run); 2 refused, with the reason; 3 the same"
    " merge in other bytes (verify); 130 interrupted.",
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"lora-opcm {version('lora-opcm')}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
):
    """Look into LoRA adapters, compare them, merge them. Only `tune` and `fuse` ask for the base model."""


@app.command()
def inspect(adapter: Source, as_json: AsJson = False):
    """What is in an adapter: format, base model, modules, ranks, scales, spectra, anything odd."""
    from ..files import load_adapter
    from .tables import inspected

    with Steps() as steps:
        rows, summary = inspected(load_adapter(adapter), steps.of("decomposing"))
    if as_json:
        print(json.dumps(summary | {"table": rows}, indent=1))
        return
    show([{k: v for k, v in row.items() if k != "spectrum"} for row in rows], False)
    for key, value in summary.items():
        shown = f"{value:.5g}" if key == "norm" else value
        say(f"{key}: {'; '.join(value) or 'nothing' if key == 'odd' else shown}")


@app.command()
def compare(
    adapters: Inputs,
    k: Annotated[int, typer.Option("--k", min=1, help="leading directions of the first of a pair")] = 8,
    l: Annotated[int | None, typer.Option("--l", min=1, help="of the second; k unless given")] = None,
    modules: Annotated[bool, typer.Option("--modules", help="one row for each module of each pair")] = False,
    html: Annotated[
        Path | None, typer.Option(help="write an interactive report, one file that needs no network")
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
):
    """How adapters overlap, pair by pair: φ of outputs and inputs beside what chance gives, and the cosine."""
    if len(adapters) < 2:
        raise ValueError(f"expected two adapters or more, got {len(adapters)}")
    if html and html.exists() and not overwrite:
        raise ValueError(f"{html}: exists already; --overwrite replaces it")
    from ..files import load_adapter, matched
    from ..geometry import similarity
    from .tables import against_chance, compared

    names, l = [p.name for p in adapters], l or k
    with Steps() as steps:
        loaded = matched([load_adapter(path) for path in steps("reading", adapters)])
        tables = {
            (i, j): similarity(loaded[i], loaded[j], k, l, steps.of(f"comparing {names[i]} + {names[j]}"))
            for i, j in combinations(range(len(loaded)), 2)
        }
    size = f"leading {k} directions" if k == l else f"leading {k} directions of the first and {l} of the second"
    means = "" if modules else ", means over modules"
    spread = "" if modules else ", z counts standard deviations from it"
    rows = compared(names, tables, modules, [len(adapter) for adapter in loaded])
    show(rows, as_json, f"{size}{means}; 1 × chance is what unrelated adapters show{spread}")
    if not (modules or as_json):
        for line in against_chance(names, tables):
            say(line)
    if html:
        from .report import write_report

        write_report(html, names, tables, k, l)
        note(f"wrote {html}")


app.command("merge")(merges.merge_)
app.command("resize")(merges.resize_)
app.command("join")(merges.join_)
app.command("tune")(tune.tune_)
app.command("fuse")(fuse.fuse_)


@app.command()
def methods(as_json: AsJson = False):
    """The merge methods, what each does, and what is true of it."""
    from ..merging.method import table

    rows = [
        {"method": m.name, "does": m.summary, "keeps": m.keeps, "order matters": str(m.ordered),
         "scale": str(m.scale), "options": ", ".join(m.options), "source": m.source}
        for m in table().values() if not m.data
    ]  # fmt: skip
    show(rows, as_json)


@app.command()
def verify(
    adapters: Inputs,
    against: Annotated[Path, typer.Option(help="the merged adapter, a folder or a file")],
    recipe_file: Annotated[
        Path | None, typer.Option("--recipe", help="its recipe; the one beside it unless given")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(min=0, help="largest relative distance; derived unless given")
    ] = None,
    as_json: AsJson = False,
):
    """Repeat the merge of a recipe and compare. Exit code 1 for another merge, 3 for the same in other bytes.

    The inputs are told by the hashes of their numbers, in any order. The tolerance allows for what rounding the
    factors to the dtype of the file can do, twice (here and there another direction may be rounded): about 4u·r^¼
    for rank r, with u = 0.0005 in float16 and 0.004 in bfloat16; and 1e-5 for arithmetic. A cut between two
    singular values that are nearly equal may fall otherwise on another machine: that is a larger distance,
    and --tolerance is for it.
    """
    import msgspec

    from . import recipe

    with Steps() as steps:
        found = recipe.verify(against, adapters, recipe_file, tolerance, steps.of("merging again"))
    if as_json:
        print(json.dumps(msgspec.to_builtins(found), indent=1))
    else:
        say(f"file unchanged since the merge: {found.unchanged} (recipe: sha256 {found.output_sha256})")
        verdict = f"another one, most in {found.worst}"
        if found.same:
            verdict = "the same" if found.unchanged else "the same within the tolerance, in other bytes"
        say(f"relative distance to the repeated merge {found.distance:.1e}, tolerance {found.tolerance:.1e}: {verdict}")
    raise typer.Exit((0 if found.unchanged else 3) if found.same else 1)


@app.command()
def convert(
    adapter: Source,
    output: Output,
    to: Annotated[str, typer.Option(help="peft, kohya or diffusers")] = "kohya",
    like: Annotated[
        Path | None, typer.Option(help="from kohya: an adapter of the same model, for the dots in the names")
    ] = None,
    dtype: OutDType = None,
    drop: Drop = None,
    overwrite: Overwrite = False,
):
    """Write an adapter in another format, with the same numbers.

    Kohya names have underscores for dots, which cannot be undone: to leave kohya, --like gives the names and
    the configuration of an adapter of the same model. Kohya has names for UNets and CLIP text encoders only.
    """
    from ..files import dropping, load_adapter, renamed
    from . import recipe

    recipe.refuse_existing(output, overwrite, to)
    (found,) = dropping([load_adapter(adapter)], drop or ())
    if like and found.format == "kohya" and to != "kohya":
        found = renamed(found, load_adapter(like))
    note(f"wrote {recipe.write_alone(found, output, to, overwrite, torch_dtype(dtype))}: {len(found)} modules")


@app.command("align")
def align_(
    adapter: Source,
    to: Annotated[Path, typer.Option(help="the adapter to come near to")],
    output: Output,
    overwrite: Overwrite = False,
):
    """The same update with the factors nearest to another adapter's: what a tool that averages factors needs."""
    from ..files import load_adapter
    from ..files.paired import align
    from . import recipe

    recipe.refuse_existing(output, overwrite)
    found = align(load_adapter(adapter), load_adapter(to))
    note(f"wrote {recipe.write_alone(found, output, overwrite=overwrite)}: {len(found)} modules")


for command in (states.add, states.export, states.remove):
    app.command()(command)


def main(arguments: list[str] | None = None) -> None:
    """Entry point; see `console.guarded` for what ends how."""
    guarded(lambda: app(arguments))
