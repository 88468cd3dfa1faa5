"""The browser that prints the book and tests its site: an installed one, else Playwright's own.

`python book/_ext/chromium.py` downloads Playwright's where there is none, or says in one line what to install.
"""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# WebGL is drawn by software, all else without it: composed by it, pages take a third more of the processor.
FLAGS = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--disable-gpu-compositing",
         "--disable-gpu-rasterization", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
MISSING = "no browser: install Debian's package chromium, or any chromium or chrome"


def starts(path: str) -> bool:
    """Whether there is a browser, and not a stub or one whose libraries are missing."""
    try:
        return subprocess.run([path, "--version"], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def find() -> str | None:
    """Path of an installed chromium or chrome, else of Playwright's, else None."""
    for path in filter(None, map(shutil.which, NAMES)):
        if starts(path):
            return path
    from playwright.sync_api import sync_playwright  # here: tests without a browser read MISSING, too

    with sync_playwright() as p:
        own = p.chromium.executable_path
    return own if starts(own) else None


def get() -> str | None:
    """As `find`, after Playwright's download where there was none."""
    if path := find():
        return path
    print("Downloading a browser", flush=True)
    subprocess.run([sys.executable, "-m", "playwright", "install", "chromium", "--no-shell"], capture_output=True)
    return find()


@contextmanager
def launched() -> Iterator["Browser"]:
    """A headless browser.

    Raises
    ------
    FileNotFoundError
        If there is none, with what to install.
    """
    from playwright.sync_api import sync_playwright

    path = find()
    if path is None:
        raise FileNotFoundError(MISSING)
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=FLAGS, chromium_sandbox=False)
        yield browser
        browser.close()


if __name__ == "__main__":
    raise SystemExit(None if get() else MISSING)
