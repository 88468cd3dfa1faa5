"""The tables of the paper, as TeX."""

import findings
import pandas as pd
from latex import between, plain, signed, tabular, told, word

from lora_opcm.lab.evidence import tables
from lora_opcm.lab.evidence.rows import CAPS as ORDERS
from lora_opcm.lab.evidence.rows import RANK
from lora_opcm.lab.evidence.streams import STREAMS

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
        for label in STREAMS[::-1]:
            line = findings.streamed().loc[label, cap]
            difference = signed(line["minus"]), between(line["low"], line["high"], signed)
            orders = rf"{line.orders:.0f} $\times$ {line.seeds:.0f}"
            lines.append((str(cap), label, orders, plain(line["mean"]), plain(line["worst"]), *difference))
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
