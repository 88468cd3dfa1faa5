"""The numbers and references of the paper, as TeX; its tables are `exhibits`.

A value has a name, such as `TSV/gain`; the paper says it with `\\val{TSV/gain}`, and TeX stops at a name that is not
here.
"""

from collections.abc import Mapping
from pathlib import Path

import findings
import numpy as np
import pandas as pd
from exhibits import CAPS, TABLES
from latex import ascii_, between, cited, listed, plain, references, signed, told, word
from scipy.stats import norm

from lora_opcm.files.shipped import results
from lora_opcm.lab import travel
from lora_opcm.lab.evidence import growth, streams, tables
from lora_opcm.lab.evidence.rows import RANK

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "book" / "paper" / "main.tex"


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


def of_joint() -> dict[str, str]:
    """One adapter that was trained on all tasks together."""
    (outcomes,) = findings.run().select("bake_off", label="one LoRA on all tasks").values()
    row = findings.run().row(outcomes)
    return {
        "joint/gain": plain(row.value), "joint/interval": between(*tables.interval(row.draws)),
        "joint seeds": word(len(outcomes)),
    }  # fmt: skip


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
    swept = {
        each[0].trial.options[0]["alpha"]: findings.run().row(each) for each in findings.run().select("alpha").values()
    }
    for name, alpha in (("nought", 0.0), ("half", 0.5), ("one", 1.0)):
        found[f"alpha {name}/lost"] = plain(swept[0.75].value - swept[alpha].value)
    for name, frames in (("alpha", findings.knob("OPCM", "alpha")), ("power", findings.powers())):
        for rank, frame in frames.items():
            means = frame.mean()
            at = " at 16" if rank else ""
            found |= {f"{name}{at}/best": f"{means.idxmax():g}", f"{name}{at}/range": plain(means.max() - means.min())}
    return found


def of_streams() -> dict[str, str]:
    run, found = findings.run(), {"middle cap": str(CAPS[1]), "largest cap": str(CAPS[-1])}
    for cap in CAPS:
        found |= {f"lead {cap}/gain": plain(streams.reference(run, cap))}
        for label in streams.STREAMS:
            line, key = findings.streamed().loc[label, cap], f"stream {label} {cap}"
            found |= {f"{key}/{name}": plain(line[name]) for name in ("mean", "worst", "best")}
            found |= {
                f"{key}/minus": signed(line["minus"]), f"{key}/within": str(int(line["within"])),
                f"{key}/minus interval": between(line["low"], line["high"], signed),
                f"orders {cap}": word(int(line["orders"])), f"stream seeds {cap}": word(int(line["seeds"])),
                f"all orders {cap}": word(int(line["orders"] * line["seeds"])),
            }  # fmt: skip
    observed, real = streams.spread(run, "sequential whitening", RANK)
    found |= {"spread": plain(observed), "spread without noise": plain(real), "margin": word(int(tables.MARGIN))}
    capped = streams.orders(run)["sequential whitening", RANK, run.seeds[0]][0]
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
        **{f"control/{labels}": plain(times) for labels, times in findings.control().items()},
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


def of_growth() -> dict[str, str]:
    """Two to twenty small tasks: what is kept, the length, the rule without data."""
    run, curves, bend = growth.published(), findings.growth_curves(), 8  # beyond which no growth was seen
    found = {"growth bend": word(bend)}
    for label, curve in curves.items():
        for name, span in (("early", {"last": bend}), ("late", {"first": bend})):
            by, *ends = growth.trend(run, label, **span)
            found[f"growth {label}/{name}"] = plain(by, 2)
            found[f"growth {label}/{name} interval"] = between(*ends, lambda x: plain(x, 2))
        found[f"growth {label}/of last"] = plain(curve.gain.iloc[-1])
    ruled = pd.concat({label: curve.lost for label, curve in curves.items()})
    last = next(iter(curves.values())).index[-1]
    sizes = max(max(o.sizes["test"]) for o in run.outcomes)
    return found | {
        "growth last": word(int(last)), "growth texts": str(sizes), "growth best": told(next(iter(curves))),
        "growth methods": word(len(curves)), "growth best/of last": plain(next(iter(curves.values())).gain.iloc[-1]),
        "growth rule/worst": told(f"{ruled.idxmax()[0]} of {word(int(ruled.idxmax()[1]))}"),
        "growth rule/most": plain(ruled.max()),
    }  # fmt: skip


def of_travel() -> dict[str, str]:
    """On other bases: agreement in the order of the methods, and in the length of the merged update."""
    bases, named = findings.bases(), {"mpnet": "mpnet", "SmolLM2, exact": "puzzles", "SmolLM2, texts": "smol"}
    labels, found = travel.common(bases), {}
    for row in travel.agreement(bases).itertuples():
        if row.one == "MiniLM" and row.other in named:
            found |= {f"{named[row.other]} order/rho": plain(row.value, 2)}
            found |= {f"{named[row.other]} order/interval": between(row.low, row.high, lambda x: plain(x, 2))}
    lengths, rules = travel.lengths(bases), travel.ruled(bases).set_index(["base", "method"]).value
    rule, smol = rules["mpnet"], bases["SmolLM2, texts"]
    apart = travel.agreement(bases).set_index(["one", "other"]).loc["SmolLM2, texts", "SmolLM2, likelihood"]
    first = max(labels, key=lambda label: smol[label].gain[0])
    sizes = findings.second().bake_off["TSV", None].outcomes[0].sizes["test"]
    found |= {f"mpnet {label}/gain": plain(bases["mpnet"][label].gain[0]) for label in labels}
    return found | {
        "travelled": word(len(labels)), "mpnet texts": str(max(sizes)),
        "mpnet same": word(int((lengths["mpnet"] == lengths["MiniLM"]).sum())),
        "ahead everywhere": listed(travel.ahead_everywhere(bases)),
        "puzzles shorter": word(int((lengths["SmolLM2, likelihood"] < lengths["MiniLM"]).sum())),
        "mpnet rule/worst": told(rule.idxmax()), "mpnet rule/most": plain(rule.max()),
        "smol best": told(first), "smol best/gain": plain(smol[first].gain[0]),
        "smol task arithmetic/gain": plain(smol[travel.PLAIN].gain[0]),
        "smol rule/most": plain(rules["SmolLM2, texts"][["TSV", "sequential whitening", "whitened sum", "OPCM"]].max()),
        "smol same": word(int((lengths["SmolLM2, texts"] == lengths["MiniLM"]).sum())).capitalize(),
        "smol puzzles/rho": signed(apart.value, 2),
        "smol puzzles/interval": between(apart.low, apart.high, lambda x: signed(x, 2)),
    }  # fmt: skip


def values() -> dict[str, str]:
    return (
        of_rows()
        | of_joint()
        | of_growth()
        | of_travel()
        | of_scales()
        | of_streams()
        | of_puzzles()
        | of_overlaps()
        | of_protocol()
    )


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
