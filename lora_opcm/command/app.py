"""`lora-opcm`: look into adapters, compare them, merge them, from the command line."""

import json
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import states
from .console import (
    AnyBase,
    AsJson,
    Disjoint,
    Drop,
    Energy,
    Full,
    Inputs,
    OutDType,
    OutFormat,
    Output,
    Overwrite,
    Ragged,
    Rank,
    Source,
    Steps,
    guarded,
    note,
    number_or_word,
    say,
    show,
    torch_dtype,
)

if TYPE_CHECKING:
    import torch

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Look into LoRA adapters, compare them, merge them. The base model is never needed.",
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
    """Look into LoRA adapters, compare them, merge them. The base model is never needed."""


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


def _parse(pairs: list[str] | None, method: str) -> dict[str, Any]:
    """`name=value` options, each value as JSON where it is some."""
    from ..merging.method import method_of
    from ..values import nearest

    found: dict[str, Any] = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        known = [*method_of(method).options, "scale"]
        if not equals or name not in known:
            wrong = f"{method} has no option {name!r}" if equals else "expected name=value"
            raise ValueError(f"--option {pair}: {wrong}; it takes {', '.join(known)}{nearest(name, known)}")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _method_names() -> list[str]:
    from ..merging.method import table

    return [name for name, m in table().items() if not m.data]


@app.command("merge")
def merge_(
    adapters: Inputs,
    output: Output,
    method: Annotated[str, typer.Option(help="see `lora-opcm methods`", autocompletion=_method_names)] = "opcm",
    weights: Annotated[str | None, typer.Option(help="one factor per adapter, such as 0.7,-0.4")] = None,
    alpha: Annotated[float | None, typer.Option(min=0, max=1, help="OPCM's threshold")] = None,
    scale: Annotated[
        str | None,
        typer.Option(
            help="factor of the merged update; norm: the mean norm of the inputs, 2norm: twice that, auto: √T times"
            " it for T inputs, at most twice; the method's own unless given"
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="for methods that draw random masks")] = None,
    option: Annotated[list[str] | None, typer.Option(help="another option of the method, name=value")] = None,
    rank: Rank = None,
    energy: Energy = None,
    dtype: OutDType = None,
    format: OutFormat = None,
    device: Annotated[str | None, typer.Option(help="where large matrices are multiplied, such as cuda")] = None,
    drop: Drop = None,
    full: Full = None,
    disjoint: Disjoint = False,
    any_base: AnyBase = False,
    ragged: Ragged = False,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would happen, write nothing")] = False,
    shard: Annotated[
        str | None, typer.Option(help="merge only part i of n, i/n from 0, into a file for `join`")
    ] = None,
):
    """One adapter out of several. Writes the adapter, a recipe and, for PEFT, a model card.

    Known spellings of one layer are one module, under the name the first adapter gives it.
    """
    from ..files import load_adapter
    from ..merging.merge import checked, merge
    from ..merging.method import method_of
    from ..merging.shards import merge_shard
    from . import recipe

    options = {"alpha": alpha, "scale": number_or_word(scale), "seed": seed} | _parse(option, method)
    options |= {"rank": rank, "energy": energy, "drop": drop, "full": full and full.value}
    options |= {"disjoint": disjoint or None, "any_base": any_base or None, "ragged": ragged or None}
    call: dict[str, Any] = {
        "method": method,
        "scale": method_of(method).scale,
    }  # said in any case: a default may change
    call |= {name: v for name, v in options.items() if v is not None}
    if weights is not None:
        try:
            call["weights"] = [float(w) for w in weights.split(",")]
        except ValueError:
            raise ValueError(f"--weights {weights}: expected numbers with commas between them") from None
    part = None if shard is None else _shard(shard)
    if not dry_run:
        recipe.refuse_existing(output, overwrite, None if part else format)
    if part and (dtype or format):
        raise ValueError("--shard writes a part as it is, without --dtype; --format is an option of `join`")
    if part and not dry_run:
        with Steps() as steps:
            inputs = [(path.name, load_adapter(path).id) for path in steps("hashing", adapters)]
            progress = steps.of(f"merging part {shard}")
            path = merge_shard(adapters, output, part, inputs=inputs, progress=progress, device=device, **call)
        return note(f"wrote {path}: part {shard}; `lora-opcm join` takes all parts")
    with Steps() as steps:
        loaded = [load_adapter(path) for path in steps("reading", adapters)]
        insisted = {name: value for name, value in call.items() if name != "ragged"}
        _, _, matched, _ = checked(loaded, **insisted)
        if dry_run:
            raise typer.Exit(_dry_run(matched, call, output, overwrite, part, format, torch_dtype(dtype)))
        recipe.refuse_existing(output, overwrite, format or loaded[0].format)
        inputs = [(p.name, a.id) for p, a in zip(adapters, steps("hashing", loaded), strict=True)]
        wide = recipe.wide_enough(loaded, torch_dtype(dtype))
        merged = merge(loaded, dtype=wide, device=device, progress=steps.of(f"merging by {method}"), **call)
        path = recipe.write_merge(merged, output, inputs, call, format, torch_dtype(dtype), overwrite)
    _wrote(path, merged)


@app.command("resize")
def resize_(
    adapter: Source,
    output: Output,
    rank: Rank = None,
    energy: Energy = None,
    strength: Annotated[float | None, typer.Option(help="bake this factor into the update, such as 0.8")] = None,
    dtype: OutDType = None,
    format: OutFormat = None,
    drop: Drop = None,
    ragged: Ragged = False,
    overwrite: Overwrite = False,
):
    """One adapter at a lower rank, the nearest there is, or at another strength.

    The same as `merge` of this adapter alone: `merge A --method cat --rank 8 --weights 0.8`.
    """
    if rank is None and energy is None and strength is None:
        raise ValueError("expected what to change: --rank, --energy or --strength")
    weights = None if strength is None else str(strength)
    merge_(
        [adapter], output, "cat", weights, rank=rank, energy=energy, dtype=dtype, format=format, drop=drop,
        ragged=ragged, overwrite=overwrite,
    )  # fmt: skip


def _wrote(path: Path, merged) -> None:
    worst = max(merged.dropped, key=merged.dropped.get, default=None)
    lost = f"; the cut dropped at most {merged.dropped.get(worst, 0):.1%} of a module's squared norm ({worst})"
    by = f" after a factor of {merged.factor:.4g}" * (merged.factor != 1)
    note(
        f"wrote {path}: {len(merged)} modules, norm {merged.norm():.4g}{by}"
        + lost * (merged.dropped.get(worst, 0) > 1e-9)
    )


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ValueError(f"--shard {text}: expected i/n with 0 ≤ i < n, such as 0/3")
    return int(index), int(count)


def _dry_run(
    loaded: list,
    call: dict,
    output: Path,
    overwrite: bool,
    part: tuple | None,
    format: str | None,
    dtype: "torch.dtype | None",
) -> int:
    from ..merging.plan import plan
    from ..values import AUTO, factor, norms
    from . import recipe

    total: dict[str, int] = {}
    for adapter in loaded:
        for name, update in adapter.items():
            total[name] = total.get(name, 0) + update.rank
    say(f"would merge {len(loaded)} adapters, {len(total)} modules, by {call}")
    rank = call.get("rank")
    say(f"summed rank up to {max(total.values())}" + (f", cut to {rank}" if rank else ""))
    if call["scale"] == AUTO:
        sizes = [abs(w) * a.norm() for w, a in zip(call.get("weights", [1.0] * len(loaded)), loaded, strict=True)]
        times = norms(AUTO, sum(map(bool, sizes)))
        say(f"would scale to norm {factor(AUTO, 1.0, sizes):.4g}, {times:.3g} times the mean norm of the adapters")
    planned = plan(loaded, call["method"], rank=rank, dtype=dtype)
    say(
        f"would read {planned.read / 1e6:.3g} MB, hold {planned.peak / 1e6:.3g} MB of tensors, write"
        f" {planned.written / 1e6:.3g} MB, and take about {planned.seconds:.2g} s here"
    )
    try:
        recipe.refuse_existing(output, overwrite, None if part else format or loaded[0].format)
    except ValueError as error:
        say(f"would refuse: {error}")
        return 1
    say(f"would write {output}")
    return 0


@app.command("join")
def join_(
    parts: Annotated[list[Path], typer.Argument(help="files of `merge --shard`, all of one merge")],
    output: Output,
    format: OutFormat = None,
    overwrite: Overwrite = False,
):
    """The parts of a merge as one adapter: the same bytes as a merge in one go."""
    from ..merging.shards import join
    from . import recipe

    recipe.refuse_existing(output, overwrite, format)
    merged, call, inputs = join(parts)
    _wrote(recipe.write_merge(merged, output, inputs, call, format, overwrite=overwrite), merged)


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
    from ..files import dropping, load_adapter, renamed, save_adapter
    from . import recipe

    recipe.refuse_existing(output, overwrite, to)
    (found,) = dropping([load_adapter(adapter)], drop or ())
    if like and found.format == "kohya" and to != "kohya":
        found = renamed(found, load_adapter(like))
    save_adapter(found, output, to, overwrite, torch_dtype(dtype))


@app.command("align")
def align_(
    adapter: Source,
    to: Annotated[Path, typer.Option(help="the adapter to come near to")],
    output: Output,
    overwrite: Overwrite = False,
):
    """The same update with the factors nearest to another adapter's: what a tool that averages factors needs."""
    from ..files import load_adapter, save_adapter
    from ..files.paired import align
    from . import recipe

    recipe.refuse_existing(output, overwrite)
    save_adapter(align(load_adapter(adapter), load_adapter(to)), output, overwrite=overwrite)


for command in (states.add, states.export, states.remove):
    app.command()(command)


def main(arguments: list[str] | None = None) -> None:
    """Entry point; see `console.guarded` for what ends how."""
    guarded(lambda: app(arguments))
