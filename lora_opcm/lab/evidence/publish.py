"""`python -m lora_opcm.lab.evidence.publish FILE …`: outcomes of a run into data/results, to be counted again."""

import subprocess
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Annotated

import typer

from ... import __version__
from ..tasks import load_task
from .outcomes import Outcome, read, read_lines, write
from .tables import FILE

PROTOCOL = 2


def main(
    files: Annotated[
        list[Path], typer.Argument(help="outcomes.jsonl, or a published file; of a trial, the first counts")
    ],
    to: Annotated[Path, typer.Option(help="the file to write")] = Path("data/results", FILE),
    commit: Annotated[str, typer.Option(help="that ran; the present one unless given")] = "",
):
    """Write one compressed file of all outcomes, each with the commit that it came of."""
    commit = commit or subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    found: dict[str, Outcome] = {}
    for file in files:
        before, outcomes = read(file) if file.suffix == ".xz" else ({"commit": commit}, read_lines(file))
        for outcome in outcomes:
            outcome.about.setdefault("commit", before.get("commit"))
            found.setdefault(outcome.trial.key, outcome)
    names = dict.fromkeys(task for outcome in found.values() for task in outcome.trial.tasks)
    about = {
        "protocol": PROTOCOL,
        "commits": Counter(outcome.about["commit"] for outcome in found.values()),
        "version": __version__,
        "date": date.today().isoformat(),
        "devices": Counter(outcome.about.get("device", "") for outcome in found.values()),
        "texts": {name: load_task(name).sha256 for name in names},
    }
    path = write(to, found.values(), about)
    typer.echo(f"{path}: {len(found)} trials, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    typer.run(main)
