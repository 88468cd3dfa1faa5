"""The notebooks for Colab: nothing of them is left that Colab cannot read, and they run from the site alone."""

import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import numpy as np
import plotly
import plotly.graph_objects as go
import pytest
import yaml
from bs4 import BeautifulSoup
from conftest import SITE
from markdown_it import MarkdownIt
from mdit_py_plugins.colon_fence import colon_fence_plugin
from mdit_py_plugins.dollarmath import dollarmath_plugin

ROOT = Path(__file__).parent.parent
ADDRESS = yaml.safe_load((ROOT / "_config.yml").read_text())["sphinx"]["config"]["ogp_site_url"]
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

BOOK = {
    "index.md": "# Root\n\n```{toctree}\n:numbered:\none\ntwo\n```\n",
    "two.md": "# Two\n\n(there)=\n## A place\n\n```{bibliography}\n```\n",
    "book.bib": "@book{gauss1809theoria, author = {Carl Gauss}, title = {Theoria motus}, publisher = {Perthes},"
    " address = {Hamburg}, year = {1809}}",
}
TEXT = """
A citation {cite:p}`gauss1809theoria`, [a link](two.md#a-place), [another](https://a.test/x.ipynb), {ref}`there`,
{prf:ref}`thm-a` and {eq}`eq-b`; code `{kept}` stays.

::::{prf:theorem} With $a_1$
:label: thm-a

Let $a_1$, by {cite:t}`gauss1809theoria`:

$$
a_1 = b_1 \\\\
{} + c
$$

1. and a list
::::

:::{prf:proof}
See [two](two.md).
:::

$$ x = y $$ (eq-b)

:::{exercise}
:label: ex-a
Prove it.
:::

:::{solution} ex-a
:class: dropdown

```python
assert True
```
:::

:::{admonition} Mind this
:class: warning
A remark.
:::

:::{dropdown} More
Folded.
:::

```{raw} html
<i>an explorable</i>
```
"""
SHOWN = """
A citation [[Gauss, 1809]({site}two.html#id2)], [a link]({site}two.html#a-place), [another](https://a.test/x.ipynb), \
[A place]({site}two.html#there),
[Theorem 1.1]({site}one.html#thm-a) and [(1.1)]({site}one.html#equation-eq-b); code `{{kept}}` stays.

> **Theorem 1.1 (With $a_1$).**
>
> Let $a_1$, by Gauss [[1809]({site}two.html#id2)]:
>
> $$ a_1 = b_1 \\\\ {{}} + c $$
>
> 1. and a list

> **Proof.**
>
> See [two]({site}two.html).
>
> ∎

$$ x = y \\tag{{1.1}} $$

> **Exercise 1.1.**
>
> Prove it.

<details>
<summary><b>Solution of Exercise 1.1</b></summary>

```python
assert True
```

</details>

> **Mind this.**
>
> A remark.

<details>
<summary><b>More</b></summary>

Folded.

</details>

[What stands here is drawn on the page of the book]({site}one.html)."""


def _cells():
    new, out = nbformat.v4.new_code_cell, nbformat.v4.new_output
    figure = go.Figure(go.Scatter(y=[1 / 3, 2.0])).update_layout(meta={"alt": "two points"}).to_dict()
    drawn = out("display_data", {"application/vnd.plotly.v1+json": figure})
    told = out("display_data", {"text/markdown": "See [two](two.md)."})
    troubles = out("stream", name="stderr", text="a warning")
    install = 'source = "git+https://github.com/someone/something"'
    return [
        new(install, metadata={"tags": ["remove-cell"]}),
        nbformat.v4.new_markdown_cell("# One\n\n> A thesis."),
        nbformat.v4.new_markdown_cell(TEXT),
        new("1 + 1", metadata={"tags": ["hide-cell"]}, outputs=[out("stream", text="2\n")]),
        new("plain()", outputs=[troubles, told]),
        new("draw()", metadata={"tags": ["hide-input"]}, outputs=[drawn]),
        nbformat.v4.new_markdown_cell("*What to see.* And on."),
        new("import os", metadata={"tags": ["hide-input"]}),
    ]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A book of one notebook that has every kind of thing, built; its copy for Colab and its page."""
    from sphinx.application import Sphinx

    source, out = tmp_path_factory.mktemp("small"), tmp_path_factory.mktemp("built")
    for name, text in BOOK.items():
        (source / name).write_text(text)
    about = {"kernelspec": {"name": "python3", "display_name": "Python"}, "language_info": {"name": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=_cells(), metadata=about), source / "one.ipynb")
    (source / "static" / "wheels").mkdir(parents=True)
    (source / "static" / "wheels" / "small-1.0-py3-none-any.whl").write_bytes(b"")
    sys.path.insert(0, str(ROOT / "book" / "_ext"))
    settings = {
        "extensions": ["myst_nb", "sphinx_proof", "sphinx_exercise", "sphinx_design", "sphinxcontrib.bibtex",
                       "sphinxext.opengraph", "offline", "colab"],
        "html_theme": "sphinx_book_theme", "html_static_path": ["static"], "numfig": True,
        "html_theme_options": {"repository_url": "https://github.com/someone/something",
                               "launch_buttons": {"colab_url": "https://colab.test"}},
        "myst_enable_extensions": ["colon_fence", "dollarmath"], "nb_execution_mode": "off",
        "bibtex_bibfiles": ["book.bib"], "bibtex_reference_style": "author_year", "myst_heading_anchors": 2,
        "ogp_site_url": "https://book.test/deep/", "ogp_social_cards": {"enable": False},
    }  # fmt: skip
    app = Sphinx(source, None, out, out / ".doctrees", "html", confoverrides=settings, status=None, warningiserror=True)
    app.build()
    return nbformat.read(out / "colab" / "one.ipynb", 4), (out / "one.html").read_text(encoding="utf8")


def test_every_directive_and_role_has_a_form_in_colab(small):
    assert small[0].cells[2].source == SHOWN.format(site="https://book.test/deep/")


def test_folded_cells_are_named_forms_and_figures_are_drawn(small):
    title, first, _, answer, plain, drawing, caption, imports = small[0].cells
    assert title.source.startswith("# One\n\n*[This page of the book](https://book.test/deep/one.html)")
    assert first.source.splitlines() == [
        "#@title Setup",
        'source = "https://book.test/deep/_static/wheels/small-1.0-py3-none-any.whl"',
    ]
    assert answer.source == "#@title Solution of Exercise 1.1, in code\n1 + 1"
    assert answer.metadata == {"cellView": "form", "collapsed": True, "jupyter": {"outputs_hidden": True}}
    assert plain.source == "plain()" and plain.metadata == {}
    assert [o.data["text/markdown"] for o in plain.outputs] == ["See [two](https://book.test/deep/two.html)."]
    assert drawing.source == "#@title Code of Figure 1.1\ndraw()" and drawing.metadata == {"cellView": "form"}
    (shown,) = drawing.outputs
    assert shown.data["text/plain"] == "two points"
    assert 'src="https://book.test/deep/_static/plotly-cartesian.min.js"' in shown.data["text/html"]
    assert '"y":[0.33333,2.0]' in shown.data["text/html"]
    assert caption.source == "**Figure 1.1.** *What to see.* And on."
    assert imports.source == "#@title Imports\nimport os"


def test_page_opens_its_copy(small):
    links = {a.get_text(strip=True): a["href"] for a in BeautifulSoup(small[1], "html.parser").find_all("a", href=True)}
    opened = "https://colab.research.google.com/#fileId=https%3A//book.test/deep/colab/one.ipynb"
    assert links["Open in Colab"] == links["Colab"] == opened
    assert links[".ipynb"] == "colab/one.ipynb"


def test_figures_say_what_a_screen_shows():
    from offline import rounded, script

    wide = [[1 / 3, -2e9 / 7], [1234567.0, float("nan")]]
    encoded = go.Figure(go.Heatmap(z=np.array(wide))).to_plotly_json()["data"][0]["z"]
    assert rounded({"z": encoded, "name": "a", "n": 1234567}) == {
        "z": [[0.33333, -285710000.0], [1234567.0, None]],
        "name": "a",
        "n": 1234567,
    }
    assert script({"data": [{}, {"type": "heatmap"}]}) == "plotly-cartesian.min.js"
    assert script({"data": [{}, {"type": "scatter3d"}]}) == "plotly.min.js"


def test_both_copies_of_plotly_are_of_one_version():
    whole = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    flat = ROOT / "book" / "_static" / "plotly-cartesian.min.js"
    versions = {re.search(r"plotly\.js .*?v([\d.]+)", path.read_text("utf8")[:200])[1] for path in (whole, flat)}
    assert len(versions) == 1, f"{versions}: {flat.name} is npm's plotly.js-cartesian-dist-min of the other's version"


def test_a_link_to_nowhere_stops_the_build(small):
    import colab

    page = object.__new__(colab.Page)
    page.name, page.address = "book/one", "https://book.test/book/one.html"
    page.env = type("Env", (), {"found_docs": {"book/one"}, "images": {}})
    with pytest.raises(ValueError, match="book/one links to three.ipynb"):
        page.url("three.ipynb")
    assert page.url("#here") == "https://book.test/book/one.html#here"


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


@pytest.mark.browser
def test_no_markup_is_left_that_colab_would_show(pair):
    assert [found for text in _prose(pair[1]) for found in RAW.findall(re.sub(r"`[^`\n]+`", "", text))] == []


@pytest.mark.browser
def test_formulas_are_what_they_were(pair):
    assert _formulas(pair[0], colon_fence_plugin) == _formulas(pair[1])


@pytest.mark.browser
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


@pytest.mark.browser
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


@pytest.mark.browser
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_figures_of_the_copy_draw_themselves(name, browser, server):
    """Each in a frame of its own, with the script of the site."""
    outputs = [o for c in nbformat.read(SITE / "colab" / name, 4).cells for o in c.get("outputs", [])]
    shown = [o.data["text/html"] for o in outputs if "plotly" in o.get("data", {}).get("text/html", "")]
    page, troubles = browser.new_page(), []
    page.on("pageerror", lambda e: troubles.append(str(e)))
    for html in shown:
        page.set_content(html.replace(ADDRESS, f"{server}/"), wait_until="load")
        page.wait_for_selector(".trace path, .points path, .heatmaplayer image, .gl-container canvas", state="attached")
    page.close()
    assert troubles == []


@pytest.mark.browser
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_notebook_page_opens_on_colab(name):
    page = BeautifulSoup((SITE / name).with_suffix(".html").read_text("utf8"), "html.parser")
    links = [a["href"] for a in page.find_all("a", href=re.compile(r"^https://colab\."))]
    (address,) = {unquote(urlsplit(link).fragment.removeprefix("fileId=")) for link in links}
    assert (SITE / address.removeprefix(ADDRESS)) == SITE / "colab" / name
    assert any(a.get_text() == "Open in Colab" for a in page.find_all("a"))


@pytest.fixture(scope="session")
def python(tmp_path_factory):
    """Of an empty virtual environment that can run a notebook and knows nothing of the package, and its variables."""
    folder = tmp_path_factory.mktemp("colab")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    pins = {"PIP_CONSTRAINT": str(ROOT / "constraints.txt"), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
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
ALWAYS = [f"book/{name}.ipynb" for name in ("low_rank_updates", "grassmannian", "experiments/orthogonality")]
GPU = [
    f"book/experiments/{name}.ipynb" for name in ("classic", "vision", "planned")
]  # need models that no test fetches


@pytest.mark.slow
@pytest.mark.browser
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
