"""What stands beside the figures of the book that a reader takes hold of: `python -m lora_opcm.site.explore` writes it.

Where a page shows NAME.svg and scripts run, `book/_static/explore.js` loads NAME.js and the numbers in NAME.data.js,
a script too, for a browser reads no JSON from a disk. NAME.svg is what NAME.js draws first, and needs chromium.
"""

import base64
import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

import lora_opcm as lo

from ..files.shipped import results
from ..geometry import principal_angles, random_frame
from ..lab.evidence import tables
from ..lab.evidence.tables import Evidence, Row
from . import live
from .figures import METHOD, TASK, colour

FOLDER = Path("book", "_static", "explore")
OPENS = ("ng-comp", "ng-religion")  # of the desk
STEPS = {-2: "½", -1: "1/√2", 0: "1", 1: "√2", 2: "2", 3: "2√2", 4: "4"}  # lengths, in mean norms of the adapters
PAIRS = {  # of adapters that ship, on the dial
    "ng-sci and tweets": ("ng-sci", "tweets"),
    "ng-sci and tweets, one random start": ("same-start-ng-sci", "same-start-tweets"),
    "reuters-r8 and reuters-rare": ("reuters-r8", "reuters-rare"),
}
KINDS = {
    "query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value",
    "attention out": "attention.output.dense", "feed-forward up": "intermediate.dense",
    "feed-forward down": "output.dense",
}  # fmt: skip
KS = (1, 2, 4, 8, 16)
LAYERS = 6


def modules() -> list[str]:
    """The modules of the board, row by row: a kind, then its layers."""
    return [f"encoder.layer.{layer}.{kind}" for kind in KINDS.values() for layer in range(LAYERS)]


def dial() -> dict:
    """For every pair and module UᵀU′, VᵀV′ (r × r) and both spectra over their norms, as 16-bit fractions of one.

    A page has φ, the angles of the k leading directions and the cosine of the updates of these alone. `chance` holds
    the angles between random subspaces, which have no simple formula.
    """
    pairs = []
    for label, names in PAIRS.items():
        a, b = (lo.load_adapter(lo.adapter_path(name)) for name in names)
        numbers = []
        for name in modules():
            (u, s, v), (w, t, x) = (side.modules[name].svd() for side in (a, b))
            numbers += [u.mT @ w, v @ x.mT, s / s.norm(), t / t.norm()]
        flat = torch.cat([n.flatten().double() for n in numbers]).numpy()
        packed = np.round(flat * 32767).astype("<i2")
        pairs.append({"label": label, "names": names, "numbers": base64.b64encode(packed.tobytes()).decode()})
    sizes = [list(a.modules[name].shape) for name in modules()]
    return {
        "pairs": pairs, "kinds": list(KINDS), "layers": LAYERS, "rank": 16, "sizes": sizes, "ks": KS,
        "chance": {f"{n},{k}": chance(n, k) for n in sorted({n for size in sizes for n in size}) for k in KS},
    }  # fmt: skip


def chance(n: int, k: int, draws: int = 300) -> list[float]:
    """Where the needles of random subspaces of k directions of Rⁿ stand, in degrees: by their mean squared cosines."""
    generator = torch.Generator().manual_seed(0)
    fixed = torch.eye(n, dtype=torch.float64)[:, :k]
    drawn = random_frame(n, k, batch=(draws,), generator=generator, dtype=torch.float64)
    angles = torch.stack([principal_angles(fixed, frame) for frame in drawn])
    usual = angles.cos().square().mean(0).sqrt().acos()
    return [round(x, 2) for x in usual.rad2deg().tolist()]


def bench() -> dict:
    """Accuracies in per cent with 95 % intervals, of every method at every scale that all its seeds were tested at."""
    run = tables.published()
    about = {"zero-shot", "own adapter"}
    tasks = list(TASK)
    together = {key: row for key, row in run.bake_off.items() if key[0] not in about}
    bounds = run.bake_off["own adapter", None]
    sets = [{"tasks": tasks, "seeds": len(run.seeds), **_ends(bounds), **_rows(run, together)}]
    for pair in combinations(tasks, 2):
        found = {key: run.row(each) for key, each in run.select("pairs", tasks=pair).items()}
        if found:
            sets.append({"tasks": pair, "seeds": 1, **_ends(next(iter(found.values()))), **_rows(run, found)})
    whole = {label: row for (label, rank), row in run.bake_off.items() if rank is None}
    colours = {name: colour(name) for name in [*TASK, *METHOD]}
    return {"steps": STEPS, "colours": colours, "opens": tables.favourite(whole), "sets": sets}


def desk() -> dict:
    """For every pair how many texts of each task are right, first weights before second, on the grid of weights."""
    table, pairs = results("desk"), []
    for tasks, rows in table.groupby(["first", "second"], sort=False):
        rows = rows.sort_values(["weight of first", "weight of second"])
        right = [rows[f"{which} right"].tolist() for which in ("first", "second")]
        texts = [int(rows[f"texts of {which}"].iloc[0]) for which in ("first", "second")]
        pairs.append({"tasks": tasks, "texts": texts, "right": right})
    weights = sorted(table["weight of first"].unique())
    return {"weights": weights, "colours": {name: colour(name) for name in TASK}, "opens": OPENS, "pairs": pairs}


def _ends(row: Row) -> dict:
    return {"base": _percent(row.zero[:, 0].mean(0)), "own": _percent(row.own[:, 0].mean(0))}


def _rows(run: Evidence, rows: Mapping[tuple, Row]) -> dict:
    """The rows, and for every two of them in order the interval of how much more the first keeps, both as chosen."""
    found = []
    for (label, rank), row in rows.items():
        natural = row.outcomes[0].trial.natural
        each = {"chosen": _entry(row)}
        for step in () if natural else STEPS:
            # The option stays what validation texts chose.
            if at := tables.at_step(run, row.outcomes, step):
                each[str(step)] = _entry(at)
        length = float(np.median(row.ratios))
        found.append({"label": label, "rank": rank, "natural": natural, "length": round(length, 2), "at": each})
    more = [tables.interval(one.draws - other.draws) for one, other in combinations(rows.values(), 2)]
    return {"rows": found, "more": [[round(x, 1) for x in ends] for ends in more]}


def _entry(row: Row) -> dict:
    """The gain kept and the accuracies, each with its interval."""
    draws = tables.over_seeds(row.accuracy)  # (1 + resamples, tasks)
    low, high = np.quantile(draws[1:], [0.025, 0.975], axis=0)
    ends = [row.value, *tables.interval(row.draws)]
    return {"gain": [round(x, 2) for x in ends], "accuracy": [_percent(x) for x in (draws[0], low, high)]}


def _percent(values: Iterable[float]) -> list[float]:
    return [round(100 * float(x), 2) for x in values]


MADE = {"dial": dial, "bench": bench, "desk": desk, "live": live.data}


def write(folder: Path = FOLDER) -> None:
    for name, make in MADE.items():
        text = json.dumps(make(), ensure_ascii=False, separators=(",", ":"))
        folder.joinpath(f"{name}.data.js").write_text(f"explore.data.{name} = {text};\n", "utf8")


def read(name: str, folder: Path = FOLDER) -> dict:
    """What `write` wrote."""
    return json.loads(folder.joinpath(f"{name}.data.js").read_text("utf8").split(" = ", 1)[1].rstrip(";\n"))


def pictures(folder: Path = FOLDER) -> None:
    """NAME.svg, drawn from NAME.js and NAME.data.js."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        raise SystemExit("no chromium found: install Debian's package chromium")
    with sync_playwright() as p, tempfile.TemporaryDirectory() as there:
        browser = p.chromium.launch(executable_path=path, chromium_sandbox=False)
        script = (folder.parent / "explore.js").resolve().as_uri()
        for name in MADE:
            page = browser.new_page(viewport={"width": 760, "height": 900}, reduced_motion="reduce")
            image = f'<meta charset="utf8"><p><img src="./{name}.svg"></p>'
            Path(there, "page.html").write_text(f'<!doctype html>{image}<script src="{script}"></script>', "utf8")
            page.goto(Path(there, "page.html").as_uri())
            box = page.wait_for_selector(".lo-explore[data-ready]")
            page.wait_for_timeout(300)  # until its size is known, and it is drawn
            page.add_script_tag(path=folder / "still.js")
            folder.joinpath(f"{name}.svg").write_text(box.evaluate("box => explore.still(box)"), "utf8")


if __name__ == "__main__":
    write()
    pictures()
