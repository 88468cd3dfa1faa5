"""`lora-opcm tune`: one adapter out of several, method and length chosen by what a model loses on a few texts."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import AnyBase, AsJson, Drop, Inputs, OutDType, Output, Overwrite, Rank, Steps, note, say, show
from .merges import merge_, merged_into, method_names, parse

if TYPE_CHECKING:
    from ..files import Adapter
    from ..lab.tune.choose import Choice

METHODS = ("tsv", "whitened_sum", "task_arithmetic", "opcm")
HEADLESS = (None, "CAUSAL_LM", "FEATURE_EXTRACTION")  # what peft calls the tasks that train no head


def tune_(
    adapters: Inputs,
    output: Output,
    base: Annotated[
        str | None, typer.Option(help="the model they adapt: a folder, a hub name, minilm, mpnet or smollm2")
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="texts of one adapter, .jsonl or .csv; given once for each adapter, in their order"),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help=f"a method to try, with options as in opcm:alpha=0.75; may be given again; {', '.join(METHODS)}"
            " unless given",
            autocompletion=method_names,
        ),
    ] = None,
    texts: Annotated[int, typer.Option(min=2, help="how many texts of a file are looked at, a random sample")] = 100,
    chat: Annotated[bool, typer.Option("--chat", help="put each prompt in the chat template of the base")] = False,
    rank: Rank = None,
    dtype: OutDType = None,
    drop: Drop = None,
    any_base: AnyBase = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
):
    """One adapter out of several: method and length chosen by loss on a few texts of each, without training.

    A file has the columns `prompt` and `completion`, or `text` and `label`, of texts that no adapter was trained on.
    Labels are words: a language model is asked how likely each is after the text, a sentence encoder how near its
    embedding is to that of the text. Tasks count alike, each by the share that is kept of the way from the loss of the
    base to that of its own adapter. Without --base nothing is measured: the length is that of `merge --scale auto`.
    """
    candidates = {text: _candidate(text) for text in method or METHODS}
    if len(adapters) < 2:
        raise ValueError(f"expected two adapters or more, got {len(adapters)}")
    if base is None:
        return _unmeasured(
            *next(iter(candidates.values())),
            adapters=adapters, output=output, rank=rank, dtype=dtype, drop=drop, any_base=any_base, overwrite=overwrite,
        )  # fmt: skip
    from ..files import load_adapter
    from ..merging.merge import checked
    from . import recipe

    recipe.refuse_existing(output, overwrite, "peft")
    common: dict[str, Any] = {"rank": rank, "drop": drop, "any_base": any_base}
    common = {name: value for name, value in common.items() if value}
    with Steps() as steps, _extra():
        files = _paired(adapters, data or [], texts)
        loaded = [load_adapter(path) for path in steps("reading", adapters)]
        _refuse_headed(loaded, drop)
        _, _, matched, _ = checked(loaded, METHODS[0], **common)
        rest = {name: value for name, value in common.items() if name != "drop"}  # which is done
        found = _measured(matched, base, files, chat, candidates, steps, rest)
    chosen, norms = candidates[found.best[0]], found.record()["norms"]
    record = {"base": Path(base).absolute().name if Path(base).is_dir() else base} | found.record()
    call: dict[str, Any] = {"method": chosen[0], "scale": f"{norms!r}norm"} | chosen[1] | common
    merged_into(output, adapters, loaded, call, dtype=dtype, overwrite=overwrite, choice=record)
    if as_json:
        print(json.dumps(record, indent=1))
    else:
        _tell(found, adapters)


def _candidate(text: str) -> tuple[str, dict[str, Any]]:
    """Method and options of `opcm:alpha=0.75`."""
    from ..merging.method import method_of

    name, _, rest = text.partition(":")
    entry, options = method_of(name), parse(rest.split(",") if rest else None, name)
    if "scale" in options:
        raise ValueError(f"--method {text}: the scale is what is chosen")
    entry.check(**options)
    return name, options


def _unmeasured(name: str, options: dict[str, Any], **rest: Any) -> None:
    """The rule that needs no model: `merge --scale auto`."""
    from ..values import AUTO, norms

    merge_(method=name, scale=AUTO, option=[f"{k}={json.dumps(v)}" for k, v in options.items()], **rest)
    times = norms(AUTO, len(rest["adapters"]))
    note(f"nothing was measured, without --base: {name} at {times:.3g} mean norms, a rule that needs no data")


@contextmanager
def _extra() -> Iterator[None]:
    """What a base needs may not be installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--base needs {error.name}, which is not installed: pip install 'lora-opcm[lab]'; without --base nothing"
            " is measured"
        ) from None


def _paired(adapters: Sequence[Path], data: Sequence[Path], limit: int) -> list:
    """The texts of each adapter."""
    from ..lab.tune.texts import READERS, read_texts

    if odd := [path for path in adapters if path.suffix in READERS]:
        raise ValueError(f"{odd[0]}: expected an adapter there; give texts by --data, once for each file")
    if len(data) != len(adapters):
        raise ValueError(
            f"expected --data {len(adapters)} times, once for each adapter and in their order, got it {len(data)} times"
        )
    return [read_texts(path, limit) for path in data]


def _refuse_headed(loaded: "Sequence[Adapter]", drop: Sequence[str] | None) -> None:
    from ..files import dropping

    for adapter in dropping(loaded, drop or ()):
        if adapter.format != "peft":
            raise ValueError(
                f"{adapter.source}: a {adapter.format} adapter, expected one in PEFT's format, of a language model or a"
                " sentence encoder; without --base, any is merged"
            )
        task = adapter.config.get("task_type")
        if task not in HEADLESS or adapter.saved:
            what = f"holds {next(iter(adapter.saved))} in full" if adapter.saved else f"is for {task}"
            raise ValueError(
                f"{adapter.source}: {what}, expected low-rank updates alone, of a causal language model or a sentence"
                " encoder: what was trained in full for one task cannot be that of another, too"
            )


def _measured(
    matched: "Sequence[Adapter]",
    base: str,
    files: list,
    chat: bool,
    candidates: dict[str, tuple[str, dict[str, Any]]],
    steps: Steps,
    common: dict[str, Any],
) -> "Choice":
    from ..lab.assets import AssetError
    from ..lab.tune.choose import choose
    from ..lab.tune.losses import judge

    try:
        live = judge(base, files, chat)
    except AssetError as error:
        raise ValueError(str(error)) from None
    return choose(matched, live, candidates, steps.of, **common)


def _tell(found: "Choice", adapters: Sequence[Path]) -> None:
    """What was chosen, from what, and how sure that is."""
    rows = found.tasks()
    table = [{"adapter": path.name} | row | {"kept": f"{row['kept']:.0%}"} for path, row in zip(adapters, rows)]
    show(table, False, "loss of the base, of each own adapter and of the merge; the share of the way that is kept")
    curves = found.curves()
    lengths = sorted({length for curve in curves.values() for length in curve})
    best = found.best[0], found.record()["norms"]
    grid = []
    for name, curve in curves.items():
        kept = {f"{x:.3g}": f"{curve[x]:.0%}" + " ←" * ((name, x) == best) if x in curve else "" for x in lengths}
        grid.append({"method": name} | kept)
    show(grid, False, "share that is kept, by length in mean norms of the adapters")
    again, number = found.again, sum(row["number"] for row in rows)
    say(
        f"{best[0]} at {best[1]:.3g} mean norms keeps {found.kept(found.tried[found.best]):.0%} of what the adapters"
        f" gain, 95 % interval [{again.low:.0%}, {again.high:.0%}]"
    )
    say(
        f"{number} texts chose it. Drawn again, {again.method:.0%} of draws choose this method, {again.length:.0%} this"
        f" length too. A choice by so many costs about {100 * again.cost:.1f} points of the share, and makes it look"
        f" {100 * again.flattery:.1f} points better than it is"
    )
