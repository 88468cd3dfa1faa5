"""Numbers, words, tables and references as TeX."""

import re
from collections.abc import Iterable
from pathlib import Path

from pybtex.database import parse_file

WORDS = "none one two three four five six seven eight nine ten eleven twelve".split()
TEX = {"|cosine|": r"$|\cos|$", "α": r"$\alpha$", "φ": r"$\varphi$", "%": r"\%", "&": r"\&", "_": " "}


def plain(value: float, digits: int = 1) -> str:
    return f"{value:.{digits}f}".replace("-", "$-$")


def signed(value: float, digits: int = 1) -> str:
    return f"${value:+.{digits}f}$" if round(value, digits) else plain(0, digits)


def between(low: float, high: float, say=plain) -> str:
    return f"[{say(low)}, {say(high)}]"


def word(count: int) -> str:
    return WORDS[count] if count < len(WORDS) else str(count)


def told(text: str) -> str:
    """Words as TeX."""
    return re.sub("|".join(map(re.escape, TEX)), lambda m: TEX[m[0]], text)


def ascii_(name: str) -> str:
    """The name of a value in letters that TeX takes in a name."""
    return name.replace("α", "alpha").replace("√", "root ")


def listed(names: Iterable[str]) -> str:
    *most, last = names
    return told(f"{', '.join(most)} and {last}" if most else last)


def tabular(columns: str, head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    body = "\n".join(" & ".join(line) + r" \\" for line in lines)
    return (
        f"\\begin{{tabular}}{{@{{}}{columns}@{{}}}}\n\\toprule\n{' & '.join(head)} \\\\\n\\midrule\n{body}\n"
        "\\bottomrule\n\\end{tabular}\n"
    )


def cited(source: str) -> set[str]:
    groups = re.findall(r"\\cite[tp]?\*?(?:\[[^\]]*\])*\{([^}]+)\}", source)
    return {key.strip() for group in groups for key in group.split(",")}


def references(path: Path, keys: Iterable[str]) -> str:
    """Entries of a file of references, with the number of a preprint where plain styles show it."""
    found = parse_file(path)
    for key in set(found.entries) - set(keys):
        del found.entries[key]
    for entry in found.entries.values():
        if "eprint" in entry.fields and "doi" not in entry.fields:
            said = [entry.fields["note"]] if "note" in entry.fields else []
            entry.fields["note"] = ". ".join([*said, f"arXiv:{entry.fields['eprint']}"])
    return found.to_string("bibtex")
