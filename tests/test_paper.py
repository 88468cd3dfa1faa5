"""The paper says no number that its results files do not: names of values, words about them, references, the PDF."""

import json
import lzma
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lora_opcm.lab import travel
from lora_opcm.lab.evidence import streams, tables
from lora_opcm.lab.generation import tables as generation

pytestmark = pytest.mark.xdist_group("paper")  # the values are worked out once
ROOT = Path(__file__).parent.parent
SOURCE = (ROOT / "book" / "paper" / "main.tex").read_text(encoding="utf8")
BODY = SOURCE.split(r"\begin{document}")[1]
NAMES = (
    "SmolLM2-135M-Instruct",
    "all-MiniLM-L6-v2",
    "all-mpnet-base-v2",
    "Reuters-21578",
    "20 Newsgroups",
    "Llama-2-7B",
    r"95\,\%",
)
COUNTS = "four five six seven eight nine ten eleven twelve twenty thirty fifty hundred thousand million".split()
MATH = r"\\begin\{(equation|align)\}.*?\\end\{\1\}|\\\[.*?\\\]|(?<!\\)\$.*?(?<!\\)\$"
# What carries no statement: comments, layout, keys, names of files, optional arguments of commands.
SILENT = [
    r"(?<!\\)%.*",
    r"\\(label|ref|eqref|cite[tp]?|input|includegraphics|bibliography(style)?)\*?(\[[^\]]*\])*\{[^}]*\}",
    r"\\setlength\{[^}]*\}\{[^}]*\}",
    r"\\val\{[^}]*\}",
    r"\\(begin|end)\{(?!equation|align)[^}]*\}(\[[tbhp]+\])?",
]


def typed(text: str) -> list[str]:
    """Numbers typed by hand: in prose any digit and any count in words, in formulas all but single digits."""
    for pattern in SILENT:
        text = re.sub(pattern, " ", text)
    for name in NAMES:
        text = text.replace(name, " ")
    formulas = [m[0] for m in re.finditer(MATH, text, re.S)]
    prose = re.sub(MATH, " ", text, flags=re.S)
    found = [n for formula in formulas for n in re.findall(r"\d+[.,]\d+|\d{2,}", formula)]
    found += re.findall(r"\d[\d.,]*", prose)
    return found + re.findall(rf"\b({'|'.join(COUNTS)})\b", prose, re.I)


@pytest.fixture(scope="module")
def paper():
    sys.path.insert(0, str(ROOT / "book" / "_ext"))
    import paper

    yield paper
    sys.path.remove(str(ROOT / "book" / "_ext"))


@pytest.fixture(scope="module")
def values(paper):
    return paper.values()


def test_no_number_is_typed():
    assert typed(BODY) == []


@pytest.mark.parametrize(
    "sentence, found",
    [
        (r"keeps 78\,\% of the gain", ["78"]),
        (r"keeps $78.4$ points", ["78.4"]),
        (r"rank $r = 16$", ["16"]),
        (r"of eight adapters", ["eight"]),
        (r"\[ x = 1.5 \]", ["1.5"]),
        (r"\val{TSV at 16/gain}\,\% by Llama-2-7B \cite{hu2022lora}, at $\sqrt2$ % 78", []),
    ],
)
def test_a_typed_number_is_seen(sentence, found):
    assert typed(sentence) == found


@pytest.mark.slow
def test_every_value_that_is_said_has_a_name_and_a_text(paper, values):
    said = {" ".join(name.split()) for name in re.findall(r"\\val\{([^}#]+)\}", BODY)}
    known = {paper.ascii_(name): text for name, text in values.items()}
    assert len(said) > 80
    assert said <= set(known), f"no such value: {said - set(known)}"
    assert all(known[name] and "nan" not in known[name] for name in said)


def test_every_citation_is_in_the_references_of_the_book(paper):
    entries = (ROOT / "book" / "references.bib").read_text(encoding="utf8")
    keys = set(re.findall(r"^@\w+\{([^,\s]+),", entries, re.M))
    import exhibits

    cited = paper.cited(SOURCE) | {key for key in exhibits.CITED.values() if key}
    assert len(cited) > 30 and cited <= keys, f"no entry: {cited - keys}"
    kept = paper.references(ROOT / "book" / "references.bib", cited)
    assert set(re.findall(r"^@\w+\{([^,\s]+),", kept, re.M)) == cited
    assert "arXiv:2412.00081" in kept


@pytest.mark.slow
def test_tables_and_panels_that_the_paper_shows_are_made(paper):
    import panels

    assert set(re.findall(r"\\input\{table_(\w+)\}", BODY)) == set(paper.TABLES)
    assert set(re.findall(r"\\includegraphics\[[^]]*\]\{(\w+)\}", BODY)) == set(panels.PANELS)
    for name, make in paper.TABLES.items():
        widths = {line.count("&") for line in make().splitlines() if "&" in line and "multicolumn" not in line}
        assert len(widths) == 1, name


def by_hand(method: str, options: dict | None = None) -> float:
    """Recovered gain in per cent from the bits themselves: means over tasks and seeds, then the ratio."""

    def accuracy(name, seed, **where):
        each = [
            o for o in tables.published().outcomes
            if (o.trial.part, o.trial.seed, o.trial.recipe, o.trial.rank) == ("bake_off", seed, "published", None)
            and o.trial.label == name
        ]  # fmt: skip
        (outcome,) = each
        bits = outcome.test[outcome.picked[0]]
        return np.mean([part.mean() for part in np.split(bits, np.cumsum(outcome.sizes["test"])[:-1])])

    seeds = (1, 2, 3, 4, 5)
    kept, zero, own = (np.mean([accuracy(n, s) for s in seeds]) for n in (method, "zero-shot", "own adapter"))
    return 100 * (kept - zero) / (own - zero)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["TSV", "OPCM as published", "mean"])
def test_a_gain_is_that_of_the_outcomes(values, method):
    assert values[f"{method}/gain"] == f"{by_hand(method):.1f}"


@pytest.mark.slow
def test_the_guess_is_that_of_the_marks(values):
    with lzma.open(ROOT / "data" / "results" / generation.FILE, "rt") as file:
        header, *lines = map(json.loads, file)
    run = generation.Run()  # reads the marks, which are packed
    share = {
        name: np.mean([of["test"]["right"].reshape(len(header["tasks"]), -1).mean(1)])
        for name, of in (("guess", run.commonest), ("base", run.base), ("own", run.own))
    }
    assert values["guess/gain"] == f"{100 * (share['guess'] - share['base']) / (share['own'] - share['base']):.1f}"
    assert values["puzzles"] == "nine" and len(header["tasks"]) == 9


@pytest.mark.slow
def test_what_the_paper_says_in_words_holds(paper):
    """Sentences without a number that other results would make false."""
    import findings

    stream = findings.streamed().loc["sequential whitening"]
    assert all(stream.minus[cap] > -tables.MARGIN for cap in (16, 32, 64))  # on average
    assert [cap for cap in (16, 32, 64) if stream.low[cap] > -tables.MARGIN] == [64]  # surely
    assert sorted(np.sign(streams.minus(findings.run(), "sequential whitening", 32)[:, 0])) == [-1, 1]
    every = stream.orders * stream.seeds
    assert 0 < stream.within[16] < every[16] == 60
    assert every[32] - stream.within[32] == 1 and every[64] == stream.within[64]  # all orders but one, and all
    bases, (joint,) = findings.bases(), findings.run().select("bake_off", label="one LoRA on all tasks").values()
    assert findings.run().row(joint).value > 99  # the tasks have room in one adapter
    lengths = travel.lengths(bases)
    assert (lengths["SmolLM2, texts"] >= lengths["MiniLM"]).all()  # the others a longer one
    for rank in findings.RANKS:  # no merge of nine is ahead of the guess
        assert (findings.puzzles(rank)["over the commonest low"] <= 0).all()
    assert (findings.puzzles(None)["over the commonest high"] < 0).mean() > 0.5  # and most are behind it
    small = tables.summary(findings.ranked(16), "OPCM").drop(
        "OPCM"
    )  # what is not told apart at the rank of one adapter
    near = set(small.index[(small["minus low"] <= 0) & (small["minus high"] >= 0)])
    whitened = {f"{name}{cap}" for name in ("whitened sum", "output whitening") for cap in ("", ", cap 16")}
    assert tables.favourite(findings.ranked(16)) == "OPCM"
    assert near == {"TSV", "DOP", "sequential whitening"} | whitened, near
    leaders = ("sequential whitening", "TSV", "whitened sum", "OPCM", "Iso-C")
    assert all(70 < findings.ranked(None)[label].value < 80 for label in leaders)  # about three quarters
    costs = {
        label: findings.at_rule(2, label, None).value - findings.ranked(None)[label].value for label in findings.MAIN
    }
    assert min(costs, key=costs.get) == "Iso-C" and costs["task arithmetic"] < -1 and costs["whitened sum"] < 0
    at_rank = [findings.at_rule(2, "OPCM", 16).value, findings.ranked(16)["OPCM"].value]
    assert at_rank[0] > at_rank[1]
    scales = findings.puzzles(None).scale
    assert (scales < 1).mean() > 0.5  # likelihood asks for less than one mean norm in most rows
    assert all(low < 0 < high for _, low, high in findings.predictors().values())


def test_without_tex_the_target_says_what_to_install(tmp_path):
    makefile = (ROOT / "Makefile").read_text()
    recipe = re.search(r"^paper:.*\n((?:\t.*\n)+)", makefile, re.M)[1]
    check = recipe.split("\n\t@$(MAKE)")[0].replace("\t@", "").replace("\\\n", "")
    for tool in ("echo", "sh"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    done = subprocess.run(["/bin/bash", "-c", check], env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == "no TeX found: install Debian's packages latexmk and texlive-latex-recommended\n"


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("latexmk") and shutil.which("pdflatex")), reason="no TeX here")
def test_the_paper_compiles_without_a_complaint(paper, values, tmp_path):
    """Panels are drawn by a browser; blank sheets of their size stand for them here."""
    import panels
    from pypdf import PdfReader, PdfWriter

    paper.write(tmp_path, values, {name: make() for name, make in paper.TABLES.items()})
    for name, make in panels.PANELS.items():
        blank, layout = PdfWriter(), make().layout
        blank.add_blank_page(0.75 * layout.width, 0.75 * layout.height)
        blank.write(tmp_path / f"{name}.pdf")
    shutil.copy(ROOT / "book" / "paper" / "main.tex", tmp_path)
    command = "latexmk -pdf -silent -halt-on-error -interaction=nonstopmode main.tex"
    done = subprocess.run(command.split(), cwd=tmp_path, capture_output=True, text=True)
    log = (tmp_path / "main.log").read_text(errors="replace")
    assert done.returncode == 0, log[-3000:]
    assert not re.findall(r"^(?:Overfull|LaTeX Warning|Package natbib Warning).*", log, re.M)
    assert 8 <= len(PdfReader(tmp_path / "main.pdf").pages) <= 10
