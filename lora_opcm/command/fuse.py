"""`lora-opcm fuse`: a model with an adapter in it."""

from pathlib import Path
from typing import Annotated

import typer

from .console import Drop, Source, Steps, note


def fuse_(
    adapter: Source,
    base: Annotated[Path, typer.Option(help="the model: a folder with .safetensors files, or one such file")],
    output: Annotated[Path, typer.Option("--output", "-o", help="what is made, a folder or a file as the base is")],
    drop: Drop = None,
):
    """A full model: the base with the adapter's updates added, for tools that take no adapter.

    Files have the names, keys and dtypes of the base; config and tokenizer are copied. The base is read and written a
    block of rows at a time and never is in memory. To leave it as it is, load the adapter beside it.
    """
    from ..files import dropping, fuse, load_adapter

    (found,) = dropping([load_adapter(adapter)], drop or ())
    with Steps() as steps:
        changed, total = fuse(found, base, output, steps.of("writing"))
    note(f"wrote {output}: {changed} of {total} tensors changed")
