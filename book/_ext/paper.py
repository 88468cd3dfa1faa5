"""The numbers, tables and references of the paper, as TeX.

A value has a name, such as `TSV/gain`; the paper says it with `\\val{TSV/gain}`, and TeX stops at a name that is not
here.
"""

from collections.abc import Mapping
from pathlib import Path

import findings
import numpy as np
import pandas as pd
from latex import ascii_, between, cited, listed, plain, references, signed, tabular, told, word
from scipy.stats import norm

from lora_opcm.files.shipped import results
from lora_opcm.lab.evidence import tables
from lora_opcm.lab.evidence.rows import CAPS as ORDERS
from lora_opcm.lab.evidence.rows import RANK

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "book" / "paper" / "main.tex"
CAPS = tuple(ORDERS)
CITED = {  # the sources of rows, where a table has room for them
    "whitened sum": "", "sequential whitening": "", "output whitening": "", "input whitening": "",
    "TSV": "gargiulo2025task", "OPCM": "tang2025merging", "OPCM, FusionBench": "tang2024fusionbench",
    "OPCM as published": "tang2025merging", "DOP": "yang2025continual", "Iso-C": "marczak2025task",
    "Iso-CTS": "marczak2025task", "core TIES": "panariello2025accurate", "KnOTS-TIES": "stoica2025model",
    "WUDI": "cheng2025whoever", "ACTMat": "abdelhameed2026model", "SVC": "li2026shared", "Pico": "tang2026crowded",
    "subspace boosting": "skorobogat2025subspace", "MagMax": "marczak2024magmax", "TIES": "yadav2023ties",
    "DARE": "yu2024language", "DARE-TIES": "yu2024language", "RegMean, with texts": "jin2023dataless",
    "task arithmetic": "ilharco2023editing", "mean": "wortsman2022model", "compress then merge": "he2026compress",
    "quotient mean": "dasilva2026generalizing",
}  # fmt: skip


# -- values --------------------------------------------------------------------------------------------------


def of_rows() -> dict[str, str]:
    """Gains of the bake-off, and differences to the row that validation texts like best."""
    found = {}
    for rank in findings.RANKS:
        rows = findings.ranked(rank)
        best = tables.favourite(rows)
        table = tables.summary(rows, best)
        others, at = table.drop(best), " at 16" if rank else ""
        for label, line in table.iterrows():
            found |= {
                f"{label}{at}/gain": plain(line.gain), f"{label}{at}/interval": between(line.low, line.high),
                f"{label}{at}/tasks": between(line["tasks low"], line["tasks high"], lambda x: plain(x, 0)),
                f"{label}{at}/minus": signed(line.minus),
                f"{label}{at}/minus interval": between(line["minus low"], line["minus high"], signed),
            }  # fmt: skip
        found |= {
            f"favourite{at}": told(best), f"rows{at}": str(len(table)), f"others{at}": str(len(others)),
            f"worse{at}": str((others["minus high"] < 0).sum()),
            f"worse over tasks{at}": str((others["minus tasks high"] < 0).sum()),
            f"not told apart{at}": listed(others.index[(others["minus low"] <= 0) & (others["minus high"] >= 0)]),
        }  # fmt: skip
    lost = {
        label: row.value - findings.ranked(RANK)[label].value
        for label, row in findings.ranked(None).items()
        if label in findings.MAIN
    }
    return found | {f"{label}/lost to the cut": plain(value) for label, value in lost.items()}


def of_scales() -> dict[str, str]:
    found = {}
    for label in findings.MAIN:
        for rank, at in ((None, ""), (RANK, " at 16")):
            found |= {
                f"{label}{at}/at {n}": plain(r.value)
                for k, n in findings.STEPS.items()
                if (r := findings.at_rule(k, label, rank))
            }
    for label, row in findings.pair_rows().items():
        found |= {
            f"pair {label}/gain": plain(row.value), f"pair {label}/interval": between(*tables.interval(row.draws)),
            f"pair {label}/worst": plain(row.by_seed.min()),
        }  # fmt: skip
    costs = {
        label: signed(findings.at_rule(2, label, None).value - findings.ranked(None)[label].value)
        for label in findings.MAIN
    }
    found |= {f"{label}/rule minus chosen": cost for label, cost in costs.items()}
    found["rule is chosen"] = listed(label for label, cost in costs.items() if cost == signed(0))
    curved = [[findings.at_rule(k, label, None).value for k in findings.STEPS] for label in findings.MAIN]
    found["scale range"] = plain(np.median([max(c) - min(c) for c in curved]))
    few = findings.few_texts()
    found |= {"few texts": str(int(few.texts)), "few/lost": plain(few.lost), "few/worst": plain(few.worst)}
    for name, frames in (("alpha", findings.knob("OPCM", "alpha")), ("power", findings.powers())):
        for rank, frame in frames.items():
            means = frame.mean()
            at = " at 16" if rank else ""
            found |= {f"{name}{at}/best": f"{means.idxmax():g}", f"{name}{at}/range": plain(means.max() - means.min())}
    return found


def of_streams() -> dict[str, str]:
    first = findings.run().seeds[0]
    found = {"first seed": str(first), "larger caps": listed(map(str, CAPS[1:]))}
    for cap in CAPS:
        label, row = findings.lead(cap)
        found |= {f"lead {cap}": told(label), f"lead {cap}/gain": plain(row.value)}
        for label in findings.STREAMS:
            line, key = findings.stream(label, cap), f"stream {label} {cap}"
            found |= {f"{key}/{name}": plain(line[name]) for name in ("mean", "worst", "best")}
            found |= {
                f"{key}/minus": signed(line["minus"]), f"{key}/within": str(line["within"]),
                f"{key}/minus interval": between(line["minus low"], line["minus high"], signed),
                f"orders {cap}": word(line["orders"]),
            }  # fmt: skip
    observed, real = findings.spread("sequential whitening", RANK)
    found |= {"spread": plain(observed), "spread without noise": plain(real), "margin": word(int(tables.MARGIN))}
    for seed in findings.run().seeds[1:]:
        kept, best = findings.carried(seed)
        found |= {
            f"carried {seed}/mean": plain(np.mean(kept)), f"carried {seed}/worst": plain(min(kept)),
            f"carried {seed}/best at hand": plain(best), "carried orders": word(len(kept)),
        }  # fmt: skip
    capped = findings.run().row(findings.run().select("stream", [first])["sequential whitening", RANK][:1])
    for name, row in (("one adapter", capped), ("three sums", findings.ranked(None)["whitened sum"])):
        found[f"{name}/MB"] = plain(findings.state(row)[1] / 1e6)
    return found


def of_puzzles() -> dict[str, str]:
    run, found = findings.puzzle_run(), {}
    named = {"base": run.base, "own": run.own, "guess": run.commonest}
    found |= {f"puzzles {n}": plain(100 * run.weights["test"][0] @ of["test"]["right"]) for n, of in named.items()}
    value, low, high = findings.guess()
    found |= {"guess/gain": plain(value), "guess/interval": between(low, high)}
    for rank in findings.RANKS:
        table, at = findings.puzzles(rank), " at 16" if rank else ""
        first = table.iloc[0]
        for label, line in table.iterrows():
            found[f"puzzles {label}{at}/exact"] = plain(100 * line.exact)
            found[f"puzzles {label}{at}/interval"] = between(100 * line["exact low"], 100 * line["exact high"])
        lead_ = [100 * first[f"over the commonest{end}"] for end in ("", " low", " high")]
        found |= {
            f"puzzles best{at}": told(table.index[0]),
            f"puzzles best{at}/likelihood": plain(100 * first.likelihood, 0),
            f"puzzles likelihood{at}": f"{100 * table.likelihood.min():.0f} to {100 * table.likelihood.max():.0f}",
            f"puzzles rows{at}": word(len(table)),
            f"puzzles best{at}/over tasks": between(100 * first["over tasks low"], 100 * first["over tasks high"]),
            f"puzzles best{at}/lead": plain(lead_[0]), f"puzzles best{at}/lead interval": between(*lead_[1:], signed),
        }  # fmt: skip
    common = run.by_task(run.commonest["test"]["right"])
    easy = tuple(task for task, share in zip(run.tasks, common) if share >= 0.05)
    for at, without in (("", ()), (" hard", easy)):
        for label, (value, low, high) in findings.pairs_at_rule(without).items():
            found |= {f"puzzle pairs{at} {label}/gain": plain(value)}
            found |= {f"puzzle pairs{at} {label}/interval": between(low, high)}
    drawn = [pair for pair in run.pairs if pair.label == "OPCM, α = 0.5"]
    tried = [marks["right"] for row in run.rows for marks in row.marks["test"].values()]  # every row, rank and scale
    leads = [100 * run.weights["test"][0] @ (right - run.commonest["test"]["right"]) for right in tried]
    return found | {
        "puzzles largest lead": plain(max(leads)), "puzzles": word(len(run.tasks)), "puzzles easy": word(len(easy)),
        "puzzles hard": word(len(run.tasks) - len(easy)), "puzzle questions": str(run.sizes["test"][0]),
        "puzzle pairs": str(len(drawn)), "puzzle pairs of": str(len(run.tasks) * (len(run.tasks) - 1) // 2),
    }  # fmt: skip


def of_overlaps() -> dict[str, str]:
    found, rho = findings.overlaps(), findings.predictors()
    top = max(rho, key=lambda name: abs(rho[name][0]))
    by_module = found.groupby("module")["ratio left"].mean()
    return {
        "cosine/median": plain(found.cosine.abs().median(), 3),
        "cosine/times": plain(found["ratio cosine"].median() / norm.ppf(0.75)),
        "outputs/times": plain(found["ratio left"].median()), "inputs/times": plain(found["ratio right"].median()),
        "overlap directions": word(int(found.k.iloc[0])), "modules": str(found.module.nunique()),
        "outputs/largest": plain(by_module.max()), "outputs/largest module": by_module.idxmax().replace("encoder.", ""),
        "overlap seeds": word(found.seed.nunique()),
        "predictors": word(len(rho)), "predictor": told(top), "predictor/rho": plain(rho[top][0], 2),
        "predictor/interval": between(*rho[top][1:], lambda x: plain(x, 2)),
    }  # fmt: skip


def of_protocol() -> dict[str, str]:
    row = findings.ranked(None)["TSV"]
    sizes, cost = row.outcomes[0].sizes, results("cost")
    whole = cost[(cost.what == "exact") & (cost.model == "Llama-2-7B") & (cost["T"] == 8)].iloc[0]
    zero, own = (100 * x[:, 0].mean() for x in (row.zero, row.own))
    return {
        "tasks": word(row.accuracy.shape[2]), "seeds": word(len(findings.run().seeds)), "rank": str(RANK),
        "pairs": str(len(findings.pair_rows()["mean"].outcomes)), "test texts": f"{sum(sizes['test']):,}",
        "validation texts": f"{sum(sizes['validation']):,}",
        "zero-shot": plain(zero), "own": plain(own), "cost/seconds": plain(whole.seconds),
        "cost/threads": word(int(whole.threads)), "cost/adapters": word(int(whole["T"])),
    }  # fmt: skip


def values() -> dict[str, str]:
    return of_rows() | of_scales() | of_streams() | of_puzzles() | of_overlaps() | of_protocol()


# -- tables --------------------------------------------------------------------------------------------------


def bake_off_table() -> str:
    whole, cut = (
        tables.summary(findings.ranked(rank), tables.favourite(findings.ranked(rank))) for rank in findings.RANKS
    )
    lines = []
    for label, line in whole.iterrows():
        source = f"~\\citep{{{CITED[label]}}}" if CITED.get(label) else ""
        at_16 = cut.loc[label] if label in cut.index and "cap" not in label else None
        small = ("--", "") if at_16 is None else (plain(at_16.gain), between(at_16.low, at_16.high))
        kept = "texts" if "texts" in label else findings.state(findings.ranked(None)[label])[0]
        lines.append(
            (told(label) + source, kept, plain(line.gain), between(line.low, line.high),
             between(line["tasks low"], line["tasks high"], lambda x: plain(x, 0)), *small)
        )  # fmt: skip
    head = ("method", "kept between two", "gain", "interval", "over tasks", f"rank {RANK}", "interval")
    return tabular("llrlrrl", head, lines)


def scale_table() -> str:
    pairs, lines, all_ = findings.pair_rows(), [], word(len(findings.run().outcomes[0].trial.tasks))
    for label in sorted(findings.MAIN, key=lambda label: -findings.ranked(None)[label].value):
        two = ["--", "--"]
        if label in pairs:
            rule = tables.at_step(findings.run(), pairs[label].outcomes, 1)
            two = [plain(rule.value), plain(pairs[label].value)]
        eight = [plain(findings.at_rule(k, label, None).value) for k in findings.STEPS]
        small = [plain(findings.at_rule(2, label, RANK).value), plain(findings.ranked(RANK)[label].value)]
        lines.append((label, *two, *eight, plain(findings.ranked(None)[label].value), *small))
    head = (r"method", r"$\sqrt2$", "chosen", "1", r"$\sqrt2$", "2", r"$2\sqrt2$", "chosen", "2", "chosen")
    groups = (
        r"& \multicolumn{2}{c}{two adapters} & "
        rf"\multicolumn{{5}}{{c}}{{{all_} adapters}} & \multicolumn{{2}}{{c}}{{{all_}, rank {RANK}}} \\"
        "\n\\cmidrule(lr){2-3}\\cmidrule(lr){4-8}\\cmidrule(l){9-10}\n"
    )
    return tabular("l" + "r" * 9, head, lines).replace("\\toprule\n", "\\toprule\n" + groups)


def stream_table() -> str:
    lines = []
    for cap in CAPS:
        for label in findings.STREAMS[::-1]:
            line = findings.stream(label, cap)
            difference = signed(line["minus"]), between(line["minus low"], line["minus high"], signed)
            lines.append((str(cap), label, str(line["orders"]), plain(line["mean"]), plain(line["worst"]), *difference))
        lines[-1] = (*lines[-1][:-1], lines[-1][-1] + (r" \\ \addlinespace[2pt]" if cap < CAPS[-1] else ""))
    text = tabular("rlrrrrl", ("kept", "method", "orders", "mean", "worst", "minus best", "interval"), lines)
    return text.replace(r"\addlinespace[2pt] \\", r"\addlinespace[2pt]")


def puzzle_table() -> str:
    whole, cut = findings.puzzles(None), findings.puzzles(RANK)

    def cells(line: pd.Series | None) -> list[str]:
        if line is None:
            return ["--"] * 4
        span = [between(100 * line[f"{k} low"], 100 * line[f"{k} high"]) for k in ("exact",)]
        return [plain(100 * line.exact), *span, plain(100 * line.likelihood), plain(line.scale, 2)]

    labels = [*whole.index, *(label for label in cut.index if label not in whole.index)]
    get = lambda table, label: table.loc[label] if label in table.index else None  # noqa: E731
    lines = [(told(label), *cells(get(whole, label)), *cells(get(cut, label))) for label in labels]
    head = ("method", *("exact", "interval", "likelihood", "scale") * 2)
    groups = (
        r"& \multicolumn{4}{c}{rank as it comes} & "
        rf"\multicolumn{{4}}{{c}}{{rank {RANK}}} \\"
        "\n\\cmidrule(lr){2-5}\\cmidrule(l){6-9}\n"
    )
    return tabular("lrlrrrlrr", head, lines).replace("\\toprule\n", "\\toprule\n" + groups)


TABLES = {"bake_off": bake_off_table, "scales": scale_table, "streams": stream_table, "puzzles": puzzle_table}


# -- all of it -----------------------------------------------------------------------------------------------


def write(folder: Path, numbers: Mapping[str, str], made: Mapping[str, str]) -> None:
    """numbers.tex, a file for each table, and the references that the paper and its tables cite."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"\\setval{{{ascii_(name)}}}{{{value}}}" for name, value in sorted(numbers.items())]
    (folder / "numbers.tex").write_text("\n".join(lines) + "\n")
    for name, text in made.items():
        (folder / f"table_{name}.tex").write_text(text)
    keys = cited(SOURCE.read_text() + "".join(made.values()))
    (folder / "references.bib").write_text(references(ROOT / "book" / "references.bib", keys))


def main(folder: Path = ROOT / "_build" / "paper") -> None:
    write(folder, values(), {name: make() for name, make in TABLES.items()})


if __name__ == "__main__":
    main()
