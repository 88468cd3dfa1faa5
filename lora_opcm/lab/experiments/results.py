"""Results files: tidy CSV, one row a measurement, with what is needed to trace each number."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ... import __version__
from ...files.disk import replacing
from ...files.shipped import results as published


def save_results(rows: pd.DataFrame, folder: Path | str, name: str, **run) -> Path:
    """Write `rows`, the columns of `run` (profile, seed, …) and the package version to folder/name.csv."""
    path = Path(folder, f"{name}.csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as scratch:
        rows.assign(**run, version=__version__).round(5).to_csv(scratch, index=False, lineterminator="\n")
    return path


def beside(name: str, rows: pd.DataFrame | None, profile: str) -> pd.DataFrame | None:
    """The table a page talks about: in the quick profile the published one, if there is one, else `rows`."""
    if profile != "quick":
        return rows
    try:
        return published(name)
    except FileNotFoundError:
        return rows


def provenance(shown: pd.DataFrame, rows: pd.DataFrame, what: str) -> str:
    """One sentence for the page: whose numbers `beside` gave it."""
    if shown is rows:
        return (
            f"Tables and figures on this page are from this build's own run ({what});"
            " no published run is shown beside it."
        )
    return "Tables and figures on this page are from the published run that the log has; it classifies no text."


def comparison(rows: pd.DataFrame, metrics: Sequence[str] = ("accuracy", "recovered gain")) -> pd.DataFrame:
    """One row a method, in file order: means over tasks of `metrics` in per cent, with 95 % intervals."""
    rows = rows[rows.task == "mean"]
    table = pd.DataFrame(index=pd.Index(rows.method.unique(), name="method"))
    for metric in metrics:
        part = rows[rows.metric == metric].set_index("method")
        table[f"{metric} %"] = [f"{100 * part.value[m]:.1f}" for m in table.index]
        table[f"95 % interval of {metric}"] = [
            f"{100 * part.low[m]:.1f} to {100 * part.high[m]:.1f}" for m in table.index
        ]
    return table


def cell(name: str, metric: str, **where) -> str:
    """One mean over tasks of a published table, in per cent with its 95 % interval.

    `where` says what columns hold in its row. "not run" where there is no such table, or no such row in it.
    """
    try:
        rows = published(name)
    except FileNotFoundError:
        return "not run"
    rows = rows[(rows.task == "mean") & (rows.metric == metric)]
    for column, value in where.items():
        rows = rows[rows[column] == value]
    if not len(rows):
        return "not run"
    value, low, high = (100 * rows[["value", "low", "high"]].iloc[0]).round(1)
    return f"{value} [{low}, {high}]"
