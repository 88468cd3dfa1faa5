"""`python tools/release.py`: build wheel and sdist, install the wheel from nothing, and try it.

Refused while the repository's address or the version's date is a placeholder. What is built lies in `_build/dist`.
"""

import os
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path
from time import perf_counter

from address import PLACEHOLDER, ROOT, address

LIMIT = 25_000_000  # bytes of each file
SECONDS = 2  # of `import lora_opcm`
SHIPPED = ("lora_opcm/py.typed", "lora_opcm/_data/adapters/manifest.json", "lora_opcm/_data/results/outcomes.xz")


def version(root: Path = ROOT) -> str:
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]


def placeholders(root: Path = ROOT) -> list[str]:
    """What must be real before anybody sees it."""
    found = []
    if address(root) == PLACEHOLDER:
        found.append("the repository's address is a placeholder: make address URL=https://github.com/OWNER/NAME")
    date = re.search(r"^date-released: (.*)$", (root / "CITATION.cff").read_text(), re.M)[1]
    heading = f"## {version(root)} ({date})"
    if heading not in (root / "CHANGELOG.md").read_text(encoding="utf8").splitlines():
        found.append(f"CHANGELOG.md has no heading '{heading}', with the date of CITATION.cff")
    return found


def build(target: Path) -> tuple[Path, Path]:
    """Wheel and sdist; the wheel is made of the sdist, so that nothing is missing there."""
    subprocess.run([sys.executable, "-m", "build", "--outdir", target, ROOT], check=True, stdout=subprocess.DEVNULL)
    return target / f"lora_opcm-{version()}-py3-none-any.whl", target / f"lora_opcm-{version()}.tar.gz"


def check_files(wheel: Path, sdist: Path) -> None:
    """Sizes, and that the wheel has what the chapters read and nothing else."""
    for path in (wheel, sdist):
        assert path.stat().st_size < LIMIT, f"{path.name} has {path.stat().st_size:,} bytes, at most {LIMIT:,}"
    names = set(zipfile.ZipFile(wheel).namelist())
    adapters = {f"lora_opcm/_data/{p.relative_to(ROOT / 'data')}" for p in (ROOT / "data/adapters").glob("*/*.*")}
    missing = ({*SHIPPED} | adapters) - names
    assert not missing, f"{wheel.name} has no {sorted(missing)}"
    stray = [name for name in names if not re.match(rf"lora_opcm/|lora_opcm-{re.escape(version())}\.dist-info/", name)]
    assert not stray, f"{wheel.name} has {stray}"


def try_out(python: Path, folder: Path) -> float:
    """Merge two shipped adapters as a stranger would; seconds of `import lora_opcm`, the better of two."""
    command = python.with_name("lora-opcm")
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # not the checkout

    def run(*words: str | Path) -> str:
        return subprocess.run(words, cwd=folder, env=bare, check=True, capture_output=True, text=True).stdout.strip()

    assert version() in run(command, "--version")
    shipped = Path(run(python, "-c", "import lora_opcm; print(lora_opcm.data_dir())"))
    assert "_data" in shipped.parts, f"the adapters are read from {shipped}, not from the wheel"
    one, two = (shipped / "adapters" / name for name in ("ng-sci", "tweets"))
    run(command, "merge", one, two, "-o", "merged", "--method", "tsv", "--rank", "16")
    run(command, "verify", one, two, "--against", "merged")
    clock = "import time; start = time.perf_counter(); import lora_opcm; print(time.perf_counter() - start)"
    seconds = min(float(run(python, "-c", clock)) for _ in range(2))
    assert seconds < SECONDS, f"import lora_opcm takes {seconds:.1f} s, at most {SECONDS}"
    return seconds


def install(wheel: Path, folder: Path) -> Path:
    """The interpreter of a new environment with the wheel and what it needs, in the versions of `constraints.txt`."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--constraint", ROOT / "constraints.txt", wheel], check=True)
    return folder / "bin" / "python"


def main() -> None:
    if found := placeholders():
        raise SystemExit("\n".join(f"error: {line}" for line in found))
    wheel, sdist = build(ROOT / "_build" / "dist")
    check_files(wheel, sdist)
    with tempfile.TemporaryDirectory() as scratch:
        start = perf_counter()
        python = install(wheel, Path(scratch, "venv"))
        print(f"installed in {perf_counter() - start:.0f} s")
        print(f"import lora_opcm: {try_out(python, Path(scratch)):.2f} s")
    for path in (wheel, sdist):
        print(f"{path.stat().st_size / 1e6:5.1f} MB  {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
