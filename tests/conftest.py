import functools
import http.server
import os
import threading
from collections import Counter
from pathlib import Path

import chromium
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GEOMSTATS_BACKEND", "numpy")

SITE = Path(__file__).parent.parent / "_build" / "site"
SITE_TALLY = pytest.StashKey()  # Counter of what the tests of the site looked at, in this process


def site_pages(*with_any):
    """Pages of the built site that a reader is led to; with words, those that hold one of them."""
    if not SITE.exists():
        return ["site is not built: run make book"]
    apart = {"search.html", "genindex.html", "index.html", "404.html"}
    pages = [p for p in SITE.rglob("*.html") if "_static" not in p.relative_to(SITE).parts and p.name not in apart]
    if with_any:
        pages = [p for p in pages if any(word in p.read_text(encoding="utf8") for word in with_any)]
    return sorted(str(p.relative_to(SITE)) for p in pages)


@pytest.fixture(scope="module")
def server():
    assert (SITE / "index.html").exists(), "the site is not built: run `make book`"

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=str(SITE))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


@pytest.fixture(scope="module")
def browser():
    try:
        with chromium.launched() as browser:
            yield browser
    except FileNotFoundError:
        pytest.skip(chromium.MISSING)


@pytest.fixture
def context(browser):
    """Opens windows of the browser, which wait as long as a loaded machine needs."""
    opened = []

    def context(**options):
        opened.append(browser.new_context(**options))
        opened[-1].set_default_timeout(120_000)  # ms
        return opened[-1]

    yield context
    for context in opened:
        context.close()


@pytest.fixture(scope="module")
def tally(request):
    """What the tests of the site looked at; printed at the end."""
    return request.config.stash[SITE_TALLY]


def pytest_configure(config):
    config.stash[SITE_TALLY] = Counter()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    node.config.stash[SITE_TALLY].update(getattr(node, "workeroutput", {}).get("site", {}))


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["site"] = dict(session.config.stash[SITE_TALLY])
    elif without_browser(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def without_browser(config) -> int:
    """How many tests were skipped for want of a browser: such a run is not green."""
    skipped = config.pluginmanager.get_plugin("terminalreporter").stats.get("skipped", [])
    return sum(chromium.MISSING in str(report.longrepr) for report in skipped)


def pytest_terminal_summary(terminalreporter, config):
    if count := without_browser(config):
        terminalreporter.write_line(f"{count} browser tests did not run: {chromium.MISSING}", red=True)
    if tally := config.stash[SITE_TALLY]:
        terminalreporter.write_line("site: " + ", ".join(f"{n} {what}" for what, n in sorted(tally.items())))


@pytest.fixture(params=[torch.float32, torch.float64], ids=["f32", "f64"])
def dtype(request):
    return request.param


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def swipe(page, x, y, up=160):
    """How far the page went after a finger went up."""
    touch, before = page.context.new_cdp_session(page), page.evaluate("window.scrollY")
    touch.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [{"x": x, "y": y}]})
    for step in range(1, 9):
        point = {"x": x, "y": y - up * step / 8}
        touch.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": [point]})
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return page.evaluate("window.scrollY") - before
