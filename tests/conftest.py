import functools
import gc
import http.server
import os
import re
import threading
from collections import Counter
from pathlib import Path
from urllib.parse import unquote, urlsplit

import chromium
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GEOMSTATS_BACKEND", "numpy")

SITE = Path(__file__).parent.parent / "_build" / "site"
DESKTOP = {"viewport": {"width": 1440, "height": 900}}
SITE_TALLY = pytest.StashKey()  # Counter of what the tests of the site looked at, in this process


@pytest.fixture
def one_thread():
    """Torch with one thread, and after it with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


def _alone(context):
    """Formulas and other figures stay out: they take seconds, and have tests of their own."""

    def page(route):
        text = (SITE / unquote(urlsplit(route.request.url).path)[1:]).read_text(encoding="utf8")
        route.fulfill(body=re.sub(r'<script type="application/json">.*?</script>', "", text), content_type="text/html")

    context.route("http://**/*.html", page)
    context.route("http://**/mathjax/**", lambda route: route.fulfill(body="", content_type="text/javascript"))


@pytest.fixture
def opened(context, server):
    """Opens a page with a figure to take hold of; it is awake and in the middle of the screen."""
    troubles, requests = [], []

    def opened(name, device=DESKTOP, base=server, console=True, **options):
        window = context(**device, **options)
        _alone(window)
        page = window.new_page()
        page.on("console", lambda m: troubles.append(m.text) if console and m.type == "error" else None)
        page.on("pageerror", lambda e: troubles.append(str(e)))
        page.on("request", lambda r: requests.append(r.url))
        page.goto(f"{base}/{name}", wait_until="load")
        stills = ", ".join(f"img[src$='/{p.name}']" for p in (SITE / "_static" / "explore").glob("*.svg"))
        page.locator(stills).first.evaluate("still => still.scrollIntoView({block: 'center', behavior: 'instant'})")
        page.wait_for_selector(".lo-explore[data-ready]")  # it wakes near the screen
        page.locator(".lo-explore").evaluate("b => b.scrollIntoView({block: 'center', behavior: 'instant'})")
        return page

    yield opened
    assert troubles == []
    assert [u for u in requests if not u.startswith((server, "data:", "blob:", "file:"))] == []


@pytest.fixture(scope="module")
def tally(request):
    """What the tests of the site looked at; printed at the end."""
    return request.config.stash[SITE_TALLY]


def pytest_configure(config):
    config.stash[SITE_TALLY] = Counter()


@pytest.hookimpl(trylast=True)  # after the order was drawn
def pytest_collection_modifyitems(items):
    """Long tests come first, so that no worker begins one when the others are done."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish():
    """What lives to the end, libraries and five thousand tests, is not looked through again by each collection."""
    gc.freeze()


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


RESTS = """() => new Promise(done => {
    let last = NaN, still = 0;
    const look = () => {
        still = scrollY === last ? still + 1 : 0;
        last = scrollY;
        still < 6 ? requestAnimationFrame(look) : done();
    };
    look();
})"""


def swipe(page, x, y, up=160):
    """How far the page went after a finger went up, once it has come to rest."""
    touch, before = page.context.new_cdp_session(page), page.evaluate("window.scrollY")
    touch.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [{"x": x, "y": y}]})
    for step in range(1, 9):
        point = {"x": x, "y": y - up * step / 8}
        touch.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": [point]})
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    page.evaluate(RESTS)  # a page goes on for half a second after a finger, and a click meanwhile may miss
    return page.evaluate("window.scrollY") - before


# Colours of buttons and links pass over into the other theme's, on a busy machine long after they were told to, and
# never where the browser leaves out what is off the screen.
PASSED = "() => document.getAnimations().forEach(a => a instanceof CSSTransition && a.finish())"


def themes(page):
    """The page in light, then in dark, each once its figures and all else have taken the colours."""
    for theme in ("light", "dark"):
        page.evaluate("t => document.documentElement.dataset.theme = t", theme)
        page.wait_for_timeout(400)
        page.evaluate(PASSED)
        yield theme
