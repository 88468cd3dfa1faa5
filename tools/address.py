"""`python tools/address.py https://github.com/OWNER/NAME`: move the repository's address, everywhere it is needed.

It stands in `pyproject.toml`. Pages opened on Colab, links, the site's own address and the container image are made
of it, and are rewritten with it.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACEHOLDER = "lora-opcm", "lora-opcm"  # owner and name under which the book was written; nobody's


def address(root: Path = ROOT) -> tuple[str, str]:
    """Owner and name of the repository, as `pyproject.toml` has them."""
    return parse(tomllib.loads((root / "pyproject.toml").read_text())["project"]["urls"]["Repository"])


def parse(url: str) -> tuple[str, str]:
    """Owner and name of `https://github.com/OWNER/NAME`.

    Raises
    ------
    ValueError
        For any other address: the buttons of the pages (Colab, Binder) and the site are GitHub's.
    """
    found = re.fullmatch(r"https://github\.com/([\w-]+)/([\w.-]+?)(?:\.git)?/?", url)
    if not found:
        raise ValueError(f"expected https://github.com/OWNER/NAME, got {url!r}")
    return found[1], found[2]


def forms(owner: str, name: str) -> list[str]:
    """What is written of an address, in the files of the project."""
    return [
        f"github.com/{owner}/{name}",
        f"{owner.lower()}.github.io/{name}/",
        f"notfound_urls_prefix: /{name}/",
        f"ghcr.io/{owner.lower()}/{name.lower()}",
    ]


def move(url: str, root: Path = ROOT) -> list[Path]:
    """Rewrite the tracked files of `root`; those that changed."""
    old, new = address(root), parse(url)
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True).stdout
    changed = []
    for path in (root / name for name in listed.split("\0") if name):
        data = moved = path.read_bytes()
        for before, after in zip(forms(*old), forms(*new), strict=True):
            # Whole names only: a repository whose name begins like ours is another one.
            moved = re.sub(re.escape(before.encode()) + rb"(?![\w-]|\.(?!git\b)\w)", after.encode(), moved)
        if moved != data:
            path.write_bytes(moved)
            changed.append(path.relative_to(root))
    return changed


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: make address URL=https://github.com/OWNER/NAME")
    try:
        print(f"{len(move(sys.argv[1]))} files")
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
