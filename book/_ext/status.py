"""The status page: when each experiment ran, how long, with what. `python book/_ext/status.py EXECUTED PAGE`."""

import sys
from pathlib import Path

import nbformat
import pandas as pd

ROOT = Path(__file__).parents[2]


def status(executed: Path) -> pd.DataFrame:
    """One row an executed notebook, from what papermill wrote into it, and the published table beside it."""
    rows = []
    for path in sorted(executed.glob("*.ipynb")):
        run = nbformat.read(path, 4).metadata.papermill
        table = ROOT / "data" / "results" / f"{path.stem}.csv"
        published = pd.read_csv(table, nrows=1).profile[0] if table.exists() else "not yet"
        rows.append(
            {
                "experiment": f"[{path.stem.replace('_', ' ')}](experiments/{path.stem}.ipynb)",
                "profile": run.parameters.get("profile", ""),
                "ran": run.start_time[:16].replace("T", " ") + " UTC",
                "seconds": round(run.duration),
                "parameters": ", ".join(
                    f"{k} = {v}"
                    for k, v in run.parameters.items()
                    if k not in ("profile", "results", "trained")
                ),
                "published table": published,
            }
        )
    return pd.DataFrame(rows)


def markdown(table: pd.DataFrame) -> str:
    lines = ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    return "\n".join(
        lines + ["| " + " | ".join(str(v).replace("|", "\\|") for v in row) + " |" for row in table.values]
    )


if __name__ == "__main__":
    page = Path(sys.argv[2])
    head = page.read_text().partition("<!-- filled when the site is built -->")[0]
    page.write_text(head + markdown(status(Path(sys.argv[1]))) + "\n")
