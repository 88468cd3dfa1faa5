"""The pages on runs: when each experiment ran, how long, on what, and what never ran.

    python book/_ext/status.py EXECUTED BOOK      fills log.md of a copy of the book, hides parameters
    python book/_ext/status.py record EXECUTED    appends the runs of `make publish` to data/runs.csv

A run is what papermill wrote into the executed notebook, and the machine that reads it right after.
"""

import os
import platform
import sys
from pathlib import Path

import nbformat
import pandas as pd
import yaml

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "data" / "runs.csv"
MARK = "<!-- filled when the site is built -->"
COLUMNS = ["experiment", "profile", "started", "seconds", "machine", "version", "parameters"]


def machine() -> str:
    """Cores and architecture; the graphics card, if torch can use one."""
    import torch

    gpu = f", {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else ""
    return f"{os.cpu_count()} × {platform.machine()}, {platform.system()}{gpu}"


def executed(folder: Path) -> pd.DataFrame:
    """One row an executed notebook; one that was executed once and is no page any more is left out."""
    from lora_opcm import __version__

    rows = []
    for path in sorted(path for path in folder.glob("*.ipynb") if path.stem in _experiments()):
        run = nbformat.read(path, 4).metadata.papermill
        given = {k: v for k, v in run.parameters.items() if k not in ("profile", "results", "trained", "adapters")}
        rows.append(
            {
                "experiment": path.stem,
                "profile": run.parameters.get("profile", ""),
                "started": run.start_time[:16],
                "seconds": round(run.duration),
                "machine": machine(),
                "version": __version__,
                "parameters": ", ".join(f"{k} = {v}" for k, v in given.items()),
            }
        )
    return pd.DataFrame(rows, columns=COLUMNS)


def recorded(records: Path = RECORDS) -> pd.DataFrame:
    """The runs whose tables were published; of tables from before records were kept, what they say themselves."""
    rows = pd.read_csv(records, keep_default_na=False) if records.exists() else pd.DataFrame(columns=COLUMNS)
    old = []
    for path in sorted((ROOT / "data" / "results").glob("*.csv")):
        table = pd.read_csv(path)
        profile, version = table.profile[0], table.version[0]
        if path.stem in _experiments() and (path.stem, profile) not in set(zip(rows.experiment, rows.profile)):
            said = {k: sorted(table[k].dropna().unique()) for k in ("texts", "seeds", "seed") if k in table}
            said = {k: "+".join(f"{v:g}" if k == "texts" else str(v) for v in found) for k, found in said.items()}
            parameters = ", ".join(f"{k} = {v}" for k, v in said.items() if v.count("+") < 3)
            old.append([path.stem, profile, "", "", "", version, parameters])
    return pd.concat([rows, pd.DataFrame(old, columns=COLUMNS)], ignore_index=True)


def record(folder: Path, records: Path = RECORDS) -> None:
    """Append what is new in `folder`; a run is known by its experiment, profile and start."""
    known = pd.read_csv(records, keep_default_na=False) if records.exists() else pd.DataFrame(columns=COLUMNS)
    rows = pd.concat([known, executed(folder)]).drop_duplicates(["experiment", "profile", "started"])
    rows.sort_values(["started", "experiment"]).to_csv(records, index=False, lineterminator="\n")


def _experiments() -> dict[str, list[str]]:
    """Experiment → profiles it belongs to."""
    profiles = yaml.safe_load((ROOT / "book" / "experiments" / "profiles.yaml").read_text())
    found: dict[str, list[str]] = {}
    for profile, content in profiles.items():
        for name in content["notebooks"]:
            found.setdefault(name, []).append(profile)
    return found


def link(name: str) -> str:
    return f"[{name.replace('_', ' ')}](experiments/{name}.ipynb)"


def where(row) -> str:
    """When and on what, in words."""
    when = row.started.replace("T", " ") + " UTC" if row.started else "date not recorded"
    return f"{when}, {row.machine or 'machine not recorded'}"


def cells(runs: pd.DataFrame) -> pd.DataFrame:
    """Experiment × profile: the last run on each machine, "not run", or "–" where the profile has no such cell."""
    experiments = _experiments()
    profiles = list(dict.fromkeys(p for own in experiments.values() for p in own))

    def cell(name: str, profile: str) -> str:
        found = runs[(runs.experiment == name) & (runs.profile == profile)]
        last = found.sort_values("started").drop_duplicates("machine", keep="last")
        return "; ".join(map(where, last.itertuples())) or ("not run" if profile in experiments[name] else "–")

    return pd.DataFrame([{"experiment": link(name)} | {p: cell(name, p) for p in profiles} for name in experiments])


def log(runs: pd.DataFrame) -> str:
    """One entry a run, the last day first."""
    lines = []
    for day, entries in sorted(runs.groupby(runs.started.str[:10]), reverse=True):
        lines.append(f"\n### {day or 'Before records were kept'}\n")
        for row in entries.itertuples():
            took = f", {row.seconds} s on {row.machine}" if row.machine else ""
            wrote = ROOT / "data" / "results" / f"{row.experiment}.csv"
            table = pd.read_csv(wrote, usecols=["profile"]) if wrote.exists() else None
            shown = table is not None and row.profile == table.profile[0]
            said = "" if row.parameters.startswith("protocol 2") else "; no published table"  # but outcomes of texts
            table = f"; `{wrote.name}`, {len(table)} rows" if shown else said
            settings = f": {row.parameters}" if row.parameters else ""
            lines.append(
                f"- {link(row.experiment)}, profile `{row.profile}`, version {row.version}{took}{settings}{table}."
            )
    return "\n".join(lines) + "\n"


def markdown(table: pd.DataFrame) -> str:
    lines = ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    return "\n".join(
        lines + ["| " + " | ".join(str(v).replace("|", "\\|") for v in row) + " |" for row in table.values]
    )


def fill(page: Path, text: str) -> None:
    page.write_text(page.read_text().partition(MARK)[0] + text)


def hide_parameters(folder: Path) -> None:
    """What papermill was told stands on the page of the log; on its own page it would come before the first picture."""
    for path in folder.glob("*.ipynb"):
        notebook = nbformat.read(path, 4)
        for cell in notebook.cells:
            if "injected-parameters" in (tags := cell.metadata.get("tags", [])):
                cell.metadata["tags"] = [*tags, "remove-cell"]
        nbformat.write(notebook, path)


if __name__ == "__main__":
    if sys.argv[1] == "record":
        record(Path(sys.argv[2]))
    else:
        here, book = executed(Path(sys.argv[1])), Path(sys.argv[2])
        runs = pd.concat([here, recorded()], ignore_index=True)
        shown = here.assign(experiment=here.experiment.map(link), started=here.started.str.replace("T", " "))
        where_run = f"### When this site was built\n\n{markdown(shown)}\n\n### On record\n\n{markdown(cells(runs))}\n"
        fill(book / "log.md", where_run + log(runs))
        hide_parameters(book / "experiments")
