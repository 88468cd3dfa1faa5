"""The tree for Colab of the built site: nothing Colab cannot read, nothing lost, and it runs from the site alone."""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup
from conftest import SITE
from markdown_it import MarkdownIt
from mdit_py_plugins.colon_fence import colon_fence_plugin
from mdit_py_plugins.dollarmath import dollarmath_plugin

pytestmark = pytest.mark.browser
ROOT = Path(__file__).parent.parent
ADDRESS = yaml.safe_load((ROOT / "_config.yml").read_text())["sphinx"]["config"]["ogp_site_url"].rstrip("/") + "/"
NOTEBOOKS = sorted(
    str(p.relative_to(ROOT)) for p in (ROOT / "book").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts
)
RAW = re.compile(
    r"""^\s*>?\s*[:`]{3,}\s*\{   # a directive
    | ^\s*:::+\s*$               # its end
    | ^\s*>?\s*:(?:label|class|name):
    | \{[\w:+-]+\}`              # a role
    | \$\$\s*\([\w:-]+\)\s*$     # the label of a formula
    | ^\([\w:-]+\)=\s*$          # a target
    | ^\+\+\+ | ^%\s""",
    re.M | re.X,
)


@pytest.fixture(params=NOTEBOOKS)
def pair(request):
    """(what the site was built from, its copy for Colab)"""
    assert (SITE / "colab").exists(), "the site is not built: run `make book`"
    source = SITE.parent / "source" / request.param
    return nbformat.read(source, 4), nbformat.read(SITE / "colab" / request.param, 4)


def _prose(notebook):
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            yield cell.source
        else:
            yield from (o.data["text/markdown"] for o in cell.outputs if "text/markdown" in o.get("data", {}))


def _leaves(tokens, parse):
    for token in tokens:
        inside = parse(token.content) if token.type == "colon_fence" else token.children
        yield from _leaves(inside, parse) if inside else [token]


def _formulas(notebook, *plugins):
    """As a reader of Markdown that knows `plugins` and dollars finds them, in order."""
    reader = MarkdownIt("commonmark").enable("table").use(dollarmath_plugin)
    for plugin in plugins:
        reader.use(plugin)
    tokens = [t for text in _prose(notebook) for t in _leaves(reader.parse(text), reader.parse)]
    return [(t.type, " ".join(t.content.split())) for t in tokens if t.type.startswith("math")]


def test_no_markup_is_left_that_colab_would_show(pair):
    assert [found for text in _prose(pair[1]) for found in RAW.findall(re.sub(r"`[^`\n]+`", "", text))] == []


def test_formulas_are_what_they_were(pair):
    assert _formulas(pair[0], colon_fence_plugin) == _formulas(pair[1])


def test_code_and_outputs_are_what_they_were(pair):
    cells, copies = ([c for c in notebook.cells if c.cell_type == "code"] for notebook in pair)
    assert [c.id for c in cells] == [c.id for c in copies]
    nbformat.validate(pair[1])
    for cell, copy in zip(cells[1:], copies[1:]):
        folded = bool({"hide-input", "hide-cell", "remove-cell"} & set(cell.metadata.get("tags", [])))
        assert copy.source.startswith("#@title ") == (copy.metadata.get("cellView") == "form") == folded
        assert copy.source.removeprefix(copy.source.partition("\n")[0] + "\n" if folded else "") == cell.source
        assert len(copy.outputs) == sum(o.get("name") != "stderr" for o in cell.outputs)
        assert not [o for o in copy.outputs if any("plotly" in kind for kind in o.get("data", {}))]


def test_links_lead_into_the_site(pair):
    reader, broken, count = MarkdownIt("commonmark").enable("table"), [], 0
    links = [t.attrs.get("href") for x in _prose(pair[1]) for t in _all(reader.parse(x)) if t.type == "link_open"]
    for cell in pair[1].cells:
        links += re.findall(re.escape(ADDRESS) + r"""[^\s"'<>)]*""", cell.source)
        for output in cell.get("outputs", []):
            links += re.findall(r"""(?:src|href)="([^"]+)""", output.get("data", {}).get("text/html", ""))
    for link in links:
        if not link.startswith(ADDRESS):
            broken += [link] if not urlsplit(link).scheme else []
            continue
        path, _, anchor = unquote(link.removeprefix(ADDRESS)).partition("#")
        there, count = SITE / (path or "index.html"), count + 1
        if not there.is_file() or anchor and not BeautifulSoup(there.read_text("utf8"), "html.parser").find(id=anchor):
            broken.append(link)
    assert broken == [] and count > 3


def _all(tokens):
    for token in tokens:
        yield token
        yield from _all(token.children or [])


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_figures_of_the_copy_draw_themselves(name, context, server):
    """Each in a frame of its own, with the script of the site, its text in the colour that the frame has."""
    outputs = [o for c in nbformat.read(SITE / "colab" / name, 4).cells for o in c.get("outputs", [])]
    shown = [o.data["text/html"] for o in outputs if "plotly" in o.get("data", {}).get("text/html", "")]
    page, troubles = context().new_page(), []
    page.on("pageerror", lambda e: troubles.append(str(e)))
    inked = "all => all.every(text => getComputedStyle(text).fill === 'rgb(1, 2, 3)')"
    for html in shown:
        page.set_content(f'<body style="color: rgb(1, 2, 3)">{html.replace(ADDRESS, f"{server}/")}', wait_until="load")
        page.wait_for_selector(".trace path, .points path, .heatmaplayer image, .gl-container canvas", state="attached")
        assert page.eval_on_selector_all(".xtick text, .ytick text, .legendtext", inked)
    assert troubles == []


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_notebook_page_opens_on_colab(name):
    page = BeautifulSoup((SITE / name).with_suffix(".html").read_text("utf8"), "html.parser")
    links = [a["href"] for a in page.find_all("a", href=re.compile(r"^https://colab\."))]
    (address,) = {unquote(urlsplit(link).fragment.removeprefix("fileId=")) for link in links}
    assert (SITE / address.removeprefix(ADDRESS)) == SITE / "colab" / name
    assert any(a.get_text() == "Open in Colab" for a in page.find_all("a"))


@pytest.fixture(scope="session")
def python(tmp_path_factory, request):
    """Of a virtual environment that can run a notebook and knows nothing of the package, and its variables.

    At night it is empty; by day it finds other packages where the tests do, as most of them are there on Colab.
    """
    folder = tmp_path_factory.mktemp("colab")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    if "not nightly" in request.config.option.markexpr:
        inside, others = Path(sysconfig.get_path("purelib")), folder / "others"
        others.mkdir()
        for path in inside.iterdir():
            if "lora_opcm" not in path.name:
                (others / path.name).symlink_to(path)
        Path(folder, "venv", inside.relative_to(sys.prefix), "others.pth").write_text(f"{others}\n")
    pins = {
        "PIP_CONSTRAINT": str(ROOT / "constraints.txt"),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_NO_COMPILE": "1",
    }
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")} | pins
    subprocess.run([python, "-m", "pip", "install", "-q", "ipykernel", "nbclient"], check=True, env=environment)
    return python, environment


PLAY = """
import sys, nbformat
from importlib.metadata import distribution
from nbclient import NotebookClient
NotebookClient(nbformat.read(sys.argv[1], 4), timeout=900, kernel_name="python3").execute()
print(distribution("lora-opcm").read_text("direct_url.json"))
"""
ALWAYS = ["book/similarity.ipynb"]
# These need models that no test fetches.
GPU = [f"book/experiments/{name}.ipynb" for name in ("classic", "vision", "planned")]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.xdist_group("colab")  # one environment for all
@pytest.mark.parametrize(
    "name",
    ALWAYS + [pytest.param(n, marks=pytest.mark.nightly) for n in NOTEBOOKS if n not in ALWAYS + GPU],
)
def test_notebook_runs_alone_as_on_colab(name, python, server, tmp_path):
    """From an empty folder, with the package that this copy of the site serves."""
    played = (SITE / "colab" / name).read_text(encoding="utf8").replace(ADDRESS, f"{server}/")
    (tmp_path / "played.ipynb").write_text(played, encoding="utf8")
    done = subprocess.run(
        [python[0], "-c", PLAY, "played.ipynb"], cwd=tmp_path, capture_output=True, text=True, env=python[1]
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{server}/_static/wheels/" in done.stdout
