"""The notebooks for Colab: a small book that has every kind of thing, and what each becomes there."""

import re
import sys
from pathlib import Path

import nbformat
import numpy as np
import plotly
import plotly.graph_objects as go
import pytest
from bs4 import BeautifulSoup

pytestmark = pytest.mark.xdist_group("pages")  # translated once
ROOT = Path(__file__).parent.parent
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
x = 1 + 1
```
:::

:::{admonition} Mind this
:class: warning
A remark.
:::

:::{dropdown} More
Folded.
:::

````{tab-set}
```{tab-item} Terminal
Type it.
```
````

```{code-block} console
:linenos:
$ lora-opcm
```

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
x = 1 + 1
```

</details>

> **Mind this.**
>
> A remark.

<details>
<summary><b>More</b></summary>

Folded.

</details>

> **Terminal.**
>
> Type it.

```console
$ lora-opcm
```

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
