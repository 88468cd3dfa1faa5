"""`lora-opcm`: look into adapters, compare them, merge them, from the command line."""

import json
from enum import Enum
from itertools import combinations
from pathlib import Path
from typing import Annotated

import typer

from . import recipe, streams
from .adapters import AdapterError, load_adapter
from .console import (
    AsJson,
    Energy,
    Format,
    Inputs,
    OutDType,
    OutFormat,
    Output,
    Overwrite,
    Rank,
    Source,
    Steps,
    guarded,
    note,
    say,
    show,
    torch_dtype,
)  # fmt: skip
from .lowrank import LowRank
from .methods import REGISTRY, checked
from .parallel import parallel_map
from .plan import plan
from .shards import join, merge_shard
from .similarity import align, similarity
from .writing import renamed, save_adapter

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Look into LoRA adapters, compare them, merge them. The base model is never needed.",
    epilog="Exit codes: 0 done; 1 the answer is no (verify, merge --dry-run); 2 refused, with the reason; 130 interrupted.",
)
Method = Enum("Method", {name: name for name, m in REGISTRY.items() if not m.data}, type=str)


@app.command()
def inspect(adapter: Source, as_json: AsJson = False):
    """What is in an adapter: format, base model, modules, ranks, scales, spectra, anything odd."""
    found = load_adapter(adapter)
    with Steps() as steps:
        rows = parallel_map(lambda item: _row(*item), found.modules.items(), steps.of("decomposing"))
    odd = [f"{row['module']} is zero" for row in rows if not row["spectrum"]]
    odd += [
        f"{row['module']} has rank {len(row['spectrum'])}, stored as {row['rank']}"
        for row in rows
        if 0 < len(row["spectrum"]) < row["rank"]
    ]
    odd += [f"{name} is stored in full ({tuple(t.shape)}), not as factors" for name, t in found.saved.items()]
    summary = {
        "source": found.source, "format": found.format, "base model": found.base_model or "not named", "dtype": str(found.dtype).removeprefix("torch."),
        "modules": len(rows), "numbers stored": sum(u.left.numel() + u.right.numel() for u in found.modules.values()),
        "norm": round(found.norm(), 4), "odd": odd,
    }  # fmt: skip
    if as_json:
        print(json.dumps(summary | {"table": rows}, indent=1))
        return
    show([{k: v for k, v in row.items() if k != "spectrum"} for row in rows], False)
    for key, value in summary.items():
        say(f"{key}: {'; '.join(value) or 'nothing' if key == 'odd' else value}")


def _row(name: str, update: LowRank) -> dict:
    s = update.svd()[1].double()
    energy = s.square()
    total = max(float(energy.sum()), 1e-300)
    return {
        "module": name, "shape": f"{update.shape[0]}×{update.shape[1]}", "rank": update.rank,
        "scale": float(getattr(update, "scale", 1.0)), "‖ΔW‖": float(s.norm()), "σ₁": float(s[0]) if len(s) else 0.0,
        "effective rank": float(s.sum() ** 2) / total, "energy in 4": float(energy[:4].sum()) / total,
        "spectrum": s.tolist(),
    }  # fmt: skip


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
        raise AdapterError(f"expected two adapters or more, got {len(adapters)}")
    if html and html.exists() and not overwrite:
        raise AdapterError(f"{html}: exists already; --overwrite replaces it")
    names, l = [p.name for p in adapters], l or k
    with Steps() as steps:
        loaded = [load_adapter(path) for path in steps("reading", adapters)]
        tables = {
            (i, j): similarity(loaded[i], loaded[j], k, l, steps.of(f"comparing {names[i]} + {names[j]}"))
            for i, j in combinations(range(len(loaded)), 2)
        }
    rows = []
    for (i, j), t in tables.items():
        pair = f"{names[i]} + {names[j]}"
        for module, part in t.groupby(level=0, sort=False) if modules else [("", t)]:
            mean = part.mean()
            rows.append({"pair": pair} | ({"module": module} if modules else {"modules": len(t)}) | {
                "cosine": float(mean.cosine),
                "φ outputs": float(mean.phi_left), "× chance": float((part.phi_left / part.null_left).mean()),
                "φ inputs": float(mean.phi_right), "× chance ": float((part.phi_right / part.null_right).mean()),
                "smallest angle, °": float(part[["angle_left", "angle_right"]].min().min() * 57.29577951308232),
            })  # fmt: skip
    size = (
        f"leading {k} directions" if k == l else f"leading {k} directions of the first and {l} of the second"
    )
    means = "" if modules else ", means over modules"
    show(rows, as_json, f"{size}{means}; 1 × chance is what unrelated adapters show")
    if html:
        from .report import write_report

        write_report(html, names, tables, k, l)
        note(f"report: {html}")


def _parse(values: list[str] | None, method: str) -> dict:
    """`name=value` options of a method; values are JSON where they can be."""
    found = {}
    for item in values or []:
        name, equals, value = item.partition("=")
        if not equals:
            raise AdapterError(f"--option {item}: expected name=value")
        if name not in REGISTRY[method].options:
            known = ", ".join(REGISTRY[method].options) or "none"
            raise AdapterError(f"--option {item}: {method} has no option {name!r}; it takes {known}")
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
    energy: Energy = None,
    dtype: OutDType = None,
    format: OutFormat = None,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would happen, write nothing")] = False,
    shard: Annotated[
        str | None, typer.Option(help="merge only part i of n, i/n from 0, into a file for `join`")
    ] = None,
):
    """One adapter out of several. Writes the adapter, a recipe and, for PEFT, a model card."""
    options = (
        {"alpha": alpha, "scale": scale, "seed": seed}
        | _parse(option, method.value)
        | {"rank": rank, "energy": energy}
    )
    call = {"method": method.value} | {name: v for name, v in options.items() if v is not None}
    if weights is not None:
        try:
            call["weights"] = [float(w) for w in weights.split(",")]
        except ValueError:
            raise AdapterError(f"--weights {weights}: expected numbers with commas between them") from None
    part = None if shard is None else _shard(shard)
    if not dry_run:
        recipe.refuse_existing(output, overwrite, None if part else format and format.value)
    if part and (dtype or format):
        raise AdapterError("--shard writes a part as it is, without --dtype; --format is an option of `join`")
    if part and not dry_run:
        with Steps() as steps:
            hashes = [(path.name, recipe.digest(path)) for path in steps("hashing", adapters)]
            progress = steps.of(f"merging part {shard}")
            path = merge_shard(adapters, output, part, hashes=hashes, progress=progress, **call)
        return note(f"wrote {path}: part {shard}; `lora-opcm join` takes all parts")
    dropped: dict[str, float] = {}
    with Steps() as steps:
        loaded = [load_adapter(path) for path in steps("reading", adapters)]
        checked(loaded, **call)
        if dry_run:
            raise typer.Exit(_dry_run(loaded, call, output, overwrite, part, format and format.value))
        recipe.refuse_existing(output, overwrite, format.value if format else loaded[0].format)
        inputs = [(path.name, recipe.digest(path)) for path in steps("hashing", adapters)]
        merged = recipe.run(loaded, call, torch_dtype(dtype), dropped, steps.of(f"merging by {method.value}"))
        path = recipe.write_merge(
            merged, output, inputs, call, dropped, format and format.value, torch_dtype(dtype), overwrite
        )
    worst = max(dropped, key=dropped.get)
    lost = f"; the cut dropped at most {dropped[worst]:.1%} of a module's squared norm ({worst})"
    note(
        f"wrote {path}: {len(merged.modules)} modules, norm {merged.norm():.4g}"
        + lost * (dropped[worst] > 1e-9)
    )


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise AdapterError(f"--shard {text}: expected i/n with 0 ≤ i < n, such as 0/3")
    return int(index), int(count)


def _dry_run(
    loaded: list, call: dict, output: Path, overwrite: bool, part: tuple | None, format: str | None
) -> int:
    total: dict[str, int] = {}
    for adapter in loaded:
        for name, update in adapter.modules.items():
            total[name] = total.get(name, 0) + update.rank
    say(f"would merge {len(loaded)} adapters, {len(total)} modules, by {call}")
    rank = call.get("rank")
    say(f"summed rank up to {max(total.values())}" + (f", cut to {rank}" if rank else ""))
    planned = plan(loaded, call["method"], rank=rank)
    say(
        f"would read {planned.read / 1e6:.3g} MB, hold {planned.peak / 1e6:.3g} MB of tensors, write"
        f" {planned.written / 1e6:.3g} MB, and take about {planned.seconds:.2g} s here"
    )
    try:
        recipe.refuse_existing(output, overwrite, None if part else format or loaded[0].format)
    except AdapterError as error:
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
    recipe.refuse_existing(output, overwrite, format and format.value)
    merged, call, dropped, inputs = join(parts)
    path = recipe.write_merge(
        merged, output, inputs, call, dropped, format and format.value, overwrite=overwrite
    )
    note(f"wrote {path}: {len(merged.modules)} modules, norm {merged.norm():.4g}")


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
    """Repeat the merge of a recipe and compare. Exit code 1 if the result is another one.

    The inputs are told by their hashes, in any order. The tolerance allows for what rounding the factors to
    the dtype of the file can do, twice (here and there another direction may be rounded): about 4u·r^¼ for
    rank r, with u = 0.0005 in float16 and 0.004 in bfloat16; and 1e-5 for arithmetic. A cut between two
    singular values that are nearly equal may fall otherwise on another machine: that is a larger distance,
    and --tolerance is for it.
    """
    with Steps() as steps:
        found = recipe.verify(against, adapters, recipe_file, tolerance, steps.of("merging again"))
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        say(
            f"file unchanged since the merge: {found['unchanged']} (recipe: sha256 {found['sha256 in the recipe']})"
        )
        say(
            f"relative distance to the repeated merge {found['distance']:.1e}, tolerance {found['tolerance']:.1e}: "
            + ("the same" if found["same"] else f"another one, most in {found['module that differs most']}")
        )
    raise typer.Exit(int(not found["same"]))


@app.command()
def convert(
    adapter: Source,
    output: Output,
    to: Format = Format.kohya,
    like: Annotated[
        Path | None, typer.Option(help="from kohya: an adapter of the same model, for the dots in the names")
    ] = None,
    dtype: OutDType = None,
    overwrite: Overwrite = False,
):
    """Write an adapter in another format, with the same numbers.

    Kohya names have underscores for dots, which cannot be undone: to leave kohya, --like gives the names and
    the configuration of an adapter of the same model. Kohya has names for UNets and CLIP text encoders only.
    """
    recipe.refuse_existing(output, overwrite, to.value)
    found = load_adapter(adapter)
    if like and found.format == "kohya" and to.value != "kohya":
        found = renamed(found, load_adapter(like))
    save_adapter(found, output, to.value, overwrite, torch_dtype(dtype))


@app.command("align")
def align_(
    adapter: Source,
    to: Annotated[Path, typer.Option(help="the adapter to come near to")],
    output: Output,
    overwrite: Overwrite = False,
):
    """The same update with the factors nearest to another adapter's: what a tool that averages factors needs."""
    recipe.refuse_existing(output, overwrite)
    save_adapter(align(load_adapter(adapter), load_adapter(to)), output, overwrite=overwrite)


for command in (streams.add, streams.export, streams.remove):
    app.command()(command)


def main(arguments: list[str] | None = None) -> None:
    """Entry point; see `console.guarded` for what ends how."""
    guarded(lambda: app(arguments))


if __name__ == "__main__":
    main()
