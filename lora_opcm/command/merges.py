"""`lora-opcm merge`, `resize` and `join`: one adapter out of several."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import (
    AnyBase,
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
    note,
    number_or_word,
    say,
    torch_dtype,
    wrote,
)

if TYPE_CHECKING:
    import torch

    from ..files import Adapter

FAR = 3  # times the norm by the rule, or a part of it: what is warned of


def parse(pairs: list[str] | None, method: str) -> dict[str, Any]:
    """`name=value` options, each value as JSON where it is some."""
    from ..merging.method import method_of
    from ..values import nearest

    if method_of(method).data:
        raise ValueError(
            f"{method} needs Gram matrices of what goes into every layer, which no command has: lora_opcm.merge takes"
            " them; --method actmat guesses them from the adapters"
        )
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


def method_names() -> list[str]:
    from ..merging.method import table

    return [name for name, m in table().items() if not m.data]


def merge_(
    adapters: Inputs,
    output: Output,
    method: Annotated[str, typer.Option(help="see `lora-opcm methods`", autocompletion=method_names)] = "opcm",
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
    processes: Annotated[
        int, typer.Option(min=1, help="that merge side by side, to the same bytes; for machines of many cores")
    ] = 1,
):
    """One adapter out of several. Writes the adapter, a recipe and, for PEFT, a model card.

    Known spellings of one layer are one module, under the name the first adapter gives it.
    """
    from ..files import load_adapter
    from ..merging.merge import checked
    from ..merging.method import method_of
    from ..merging.shards import merge_shard
    from . import recipe

    options: dict[str, Any] = {"alpha": alpha, "scale": number_or_word(scale), "seed": seed}
    others = parse(option, method)
    if twice := [name for name in others if options.get(name) is not None]:
        raise ValueError(f"--option {twice[0]}=… and --{twice[0]}: expected one of them")
    options |= others
    options |= {"rank": rank, "energy": energy, "drop": drop, "full": full and full.value}
    options |= {"disjoint": disjoint or None, "any_base": any_base or None, "ragged": ragged or None}
    call: dict[str, Any] = {"method": method, "scale": method_of(method).scale}  # said in any case: it may change
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
    if processes > 1 and (part or device):
        raise ValueError("--processes share the cores of one machine: leave out --shard and --device")
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
    merged_into(output, adapters, loaded, call, format, dtype, overwrite, device, processes=processes)


def merged_into(
    output: Path,
    adapters: list[Path],
    loaded: "list[Adapter]",
    call: dict[str, Any],
    format: str | None = None,
    dtype: OutDType = None,
    overwrite: bool = False,
    device: str | None = None,
    choice: dict[str, Any] | None = None,
    processes: int = 1,
) -> None:
    """Merge adapters by `call`, write what comes out with its recipe, and say so."""
    from ..files import dropping
    from ..files.joint import spelled_in
    from ..merging.merge import merge
    from ..merging.method import method_of
    from ..merging.shards import merge_apart
    from ..values import AUTO
    from . import recipe

    with Steps() as steps:
        inputs = [(p.name, a.id) for p, a in zip(adapters, steps("hashing", loaded), strict=True)]
        wide = recipe.wide_enough(loaded, torch_dtype(dtype))
        progress = steps.of(f"merging by {call['method']}")
        if processes == 1:
            merged = merge(loaded, dtype=wide, device=device, progress=progress, **call)
        else:
            merged = merge_apart(adapters, processes=processes, dtype=wide, progress=progress, **call)
        merged = spelled_in(merged, format or merged.format, dropping(loaded, call.get("drop") or ()))
        path = recipe.write_merge(
            merged, output, inputs, call, overwrite=overwrite, format=format, dtype=torch_dtype(dtype), choice=choice
        )
    wrote(path, merged)
    if merged.saved and any(w != 1 for w in call.get("weights", ())):
        note(f"warning: weights are of updates; full tensors ({min(merged.saved)}, …) are not multiplied")
    given = call["scale"] != AUTO and method_of(call["method"]).scale == AUTO
    if given and (rule := _by_rule(call, loaded)) and not 1 / FAR < (times := merged.norm() / rule) < FAR:
        note(f"warning: that is {times:.3g} times the norm that --scale auto gives, {rule:.4g}")


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


def _sizes(call: dict, loaded: list) -> list[float]:
    """Norms of the adapters, each weighted."""
    return [abs(w) * a.norm() for w, a in zip(call.get("weights", [1.0] * len(loaded)), loaded, strict=True)]


def _by_rule(call: dict, loaded: list) -> float:
    """The norm that the scale "auto" gives; 0 of adapters that are zero."""
    from ..values import AUTO, factor

    sizes = _sizes(call, loaded)
    return factor(AUTO, 1.0, sizes) if any(sizes) else 0.0


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
    from ..values import AUTO, norms
    from . import recipe

    total: dict[str, int] = {}
    for adapter in loaded:
        for name, update in adapter.items():
            total[name] = total.get(name, 0) + update.rank
    say(f"would merge {len(loaded)} adapters, {len(total)} modules, by {call}")
    rank = call.get("rank")
    say(f"summed rank up to {max(total.values())}" + (f", cut to {rank}" if rank else ""))
    if call["scale"] == AUTO:
        times = norms(AUTO, sum(map(bool, _sizes(call, loaded))))
        say(f"would scale to norm {_by_rule(call, loaded):.4g}, {times:.3g} times the mean norm of the adapters")
    planned = plan(loaded, call["method"], rank=rank, dtype=dtype)
    say(
        f"would read {planned.read / 1e6:.3g} MB, hold {planned.peak / 1e6:.3g} MB of tensors, write"
        f" {planned.written / 1e6:.3g} MB, and take about {planned.seconds:.2g} s here"
    )
    if planned.sketched:
        say(f"would sketch {planned.sketched} modules, sums of more columns than their layers have rows")
    try:
        recipe.refuse_existing(output, overwrite, None if part else format or loaded[0].format)
    except ValueError as error:
        say(f"would refuse: {error}")
        return 1
    say(f"would write {output}")
    return 0


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
    wrote(recipe.write_merge(merged, output, inputs, call, overwrite=overwrite, format=format), merged)
