"""Sphinx extension: the notebooks as Colab shows them, in `colab/` of the site, and the buttons that open them there.

Colab knows no MyST, no tags and no plotly MIME type. Its copy of a notebook says the same in what it does know:
quotes for theorems, `<details>` for answers, links to the site for references, forms for folded cells, HTML for
figures. The setup cell installs the wheel that the site serves, so the site is all that has to be published. Its
address is the one the configuration has for link previews, `ogp_site_url`.
"""

import posixpath
from itertools import pairwise
from pathlib import Path
from urllib.parse import quote, urljoin, urlsplit

import nbformat
import plotly.io as pio
from docutils import nodes
from docutils.parsers.rst import Directive, directives
from markdown_it.renderer import RendererHTML
from myst_parser.config.main import MdParserConfig
from myst_parser.parsers.directives import parse_directive_text
from myst_parser.parsers.mdit import create_md_parser
from offline import PLOTLY_MIME, alternative, chapter, rounded, script
from sphinx.addnodes import pending_xref
from sphinx.util.nodes import split_explicit_title

from lora_opcm.command.drawing import CONFIG

OPEN = "https://colab.research.google.com/#fileId="  # any address that serves to other hosts, as GitHub's pages do
INK = """const box = document.getElementById("{plot_id}");  // text as the page has it, light or dark
const menus = (box.layout.updatemenus ?? []).map((menu, i) => [`updatemenus[${i}].font.color`, "#222"]);
Plotly.relayout(box, {"font.color": getComputedStyle(box).color, ...Object.fromEntries(menus)});"""
TITLED = ("admonition", "dropdown", "tab-item")  # by their argument, others by what they are
CONTAINERS = (*TITLED, "exercise", "solution", "note", "tip", "hint", "warning", "important")


class Block(Directive):
    """Any directive: an argument that may hold spaces, options, a body."""

    optional_arguments, final_argument_whitespace, has_content = 1, True, True
    option_spec = {"label": directives.unchanged, "class": directives.unchanged}


class Page:
    """Markdown of one page of the book, in words that Colab understands."""

    def __init__(self, app, name: str):
        self.app, self.env, self.name = app, app.env, name
        self.site = app.config.ogp_site_url.rstrip("/") + "/"
        self.address = self.site + app.builder.get_target_uri(name)
        extensions = set(app.config.myst_enable_extensions)
        self.parse = create_md_parser(MdParserConfig(enable_extensions=extensions), RendererHTML).parse

    def url(self, href: str) -> str:
        """Where a link of this page leads on the site; an address with a host stays."""
        parts = urlsplit(href)
        if parts.scheme:
            return href
        path = posixpath.normpath(posixpath.join(posixpath.dirname(self.name), parts.path))
        target = posixpath.splitext(path)[0]
        if not parts.path:
            page = self.address
        elif target in self.env.found_docs:
            page = urljoin(self.site, self.app.builder.get_target_uri(target))
        elif path in self.env.images:
            page = f"{self.site}_images/{self.env.images[path][1]}"
        else:
            raise ValueError(f"{self.name} links to {href}, which is neither a page nor a picture of the book")
        return page + (f"#{parts.fragment}" if parts.fragment else "")

    def resolved(self, name: str, text: str):
        """What Sphinx makes of a role: a citation or a cross reference."""
        domain, _, kind = name.rpartition(":")
        explicit, title, target = split_explicit_title(text)
        wanted = {"refdoc": self.name, "reftype": kind, "reftarget": target, "refexplicit": explicit}
        node = pending_xref("", nodes.inline(text=title), refdomain=domain, **wanted)
        found = self.env.get_domain(domain or ("math" if kind == "eq" else "std")).resolve_xref(
            self.env, self.name, self.app.builder, kind, target, node, nodes.inline(text=title)
        )
        if found is None:
            raise ValueError(f"{self.name}: nothing in the book answers to {{{name}}}`{text}`")
        return found

    def linked(self, node) -> str:
        """The text of a node, with its links."""
        if isinstance(node, nodes.reference):
            return f"[{node.astext()}]({urljoin(self.address, node.get('refuri') or '#' + node['refid'])})"
        return "".join(map(self.linked, node.children)) if node.children else node.astext()

    def inline(self, tokens, source: str) -> str:
        """`source` with its roles and links replaced, those inside directives too."""
        for token in tokens:
            if token.type == "myst_role":
                name = token.meta["name"]
                source = source.replace(f"{{{name}}}`{token.content}`", self.linked(self.resolved(name, token.content)))
            elif href := token.attrs.get("href") or token.attrs.get("src"):
                source = source.replace(f"]({href})", f"]({self.url(href)})")
            inside = self.parse(token.content) if _directive(token) else token.children
            source = self.inline(inside or [], source)
        return source

    def markdown(self, source: str) -> str:
        return self.blocks(self.inline(self.parse(source), source))

    def blocks(self, source: str) -> str:
        """`source` with its directives replaced, and the numbers of its equations written."""
        lines, done, at = source.splitlines(), [], 0
        for token in self.parse(source):
            if _directive(token):
                first, last = token.map
                done += [*lines[at:first], *self.directive(token).splitlines()]
                at = last
            elif token.type == "math_block_label":
                first, last = token.map
                number = self.resolved("eq", token.info).astext().strip("()")
                done += [*lines[at:first], f"$$ {token.content.strip()} \\tag{{{number}}} $$"]
                at = last
        return "\n".join(done + lines[at:])

    def directive(self, token) -> str:
        name, _, argument = token.info.strip().removeprefix("{").partition("}")
        block = parse_directive_text(Block, argument.strip(), token.content, validate_options=False)
        title, kind = " ".join(block.arguments), name.removeprefix("prf:")
        body = "\n".join(block.body).strip("\n")
        if kind == "code-block":
            return f"```{title}\n{body}\n```"
        if kind == "tab-set":
            return self.blocks(body)
        if name not in CONTAINERS and kind == name:
            return f"[What stands here is drawn on the page of the book]({self.address})."
        if kind == "solution":
            head, title = f"Solution of {self.numbered('exercise', title)}", ""
        elif kind in TITLED:
            head, title = title, ""
        else:
            head = self.numbered(kind, block.options.get("label", ""))
        head += f" ({title})" if title else ""
        body = self.blocks(body)
        if kind == "dropdown" or "dropdown" in block.options.get("class", ""):
            return f"<details>\n<summary><b>{head}</b></summary>\n\n{body}\n\n</details>"
        quoted = f"**{head}.**\n\n{self.one_line(body)}" + ("\n\n∎" if kind == "proof" else "")
        return "\n".join(f"> {line}".rstrip() for line in quoted.splitlines())

    def numbered(self, kind: str, label: str) -> str:
        for numbers in self.env.toc_fignumbers.get(self.name, {}).values():
            if number := numbers.get(nodes.make_id(label)) or numbers.get(label):
                return f"{kind.capitalize()} {'.'.join(map(str, number))}"
        return kind.capitalize()

    def one_line(self, source: str) -> str:
        """Displayed formulas on one line each: in a quote, the mark of a second line would become part of it."""
        lines = source.splitlines()
        for token in reversed(self.parse(source)):
            if token.type == "math_block":
                first, last = token.map
                lines[first:last] = [" ".join(lines[first:last])]
        return "\n".join(lines)


def _directive(token) -> bool:
    return token.type in ("colon_fence", "fence") and token.info.startswith("{")


class Copy:
    """The notebook of one page for Colab. Cells that the page folds or hides become forms with a name."""

    def __init__(self, page: Page, wheel: str):
        self.page, self.wheel = page, wheel
        self.figures, self.caption, self.answer = 0, "", ""

    def notebook(self, source: nbformat.NotebookNode) -> nbformat.NotebookNode:
        """The title before the setup cell, everything else in its order."""
        setup, title, *rest = source.cells
        head, _, text = title.source.partition("\n")
        link = f"*[This page of the book]({self.page.address}), as a notebook to run and to change.*"
        title.source = f"{head}\n\n{link}\n{text}"
        setup.source = self.installing(setup.source)
        cells = [title, setup, *rest]
        copy = nbformat.v4.new_notebook(
            cells=[self.text(c) if c.cell_type == "markdown" else self.code(c, n) for c, n in pairwise([*cells, None])],
            metadata={key: source.metadata[key] for key in ("kernelspec", "language_info")},
        )
        copy.metadata["colab"] = {"provenance": [], "toc_visible": True}
        return copy

    def installing(self, code: str) -> str:
        repository = f'"git+{self.page.app.config.html_theme_options["repository_url"]}"'
        if repository not in code:
            raise ValueError(f"{self.page.name}: the first cell does not install {repository}")
        return code.replace(repository, f'"{self.wheel}"')

    def text(self, cell):
        solutions = [t for t in self.page.parse(cell.source) if t.info.startswith("{solution}")]
        self.answer = self.page.numbered("exercise", solutions[-1].info.split()[-1]) if solutions else ""
        caption, self.caption = self.caption, ""
        return nbformat.v4.new_markdown_cell(caption + self.page.markdown(cell.source), id=cell.id)

    def code(self, cell, following):
        tags = set(cell.metadata.get("tags", []))
        name = self.name(cell, tags, following)
        outputs = [self.output(o, f"{cell.id}-{i}") for i, o in enumerate(cell.outputs) if o.get("name") != "stderr"]
        copy = nbformat.v4.new_code_cell(cell.source, id=cell.id, execution_count=cell.execution_count, outputs=outputs)
        if tags & {"hide-input", "hide-cell", "remove-cell"}:
            copy.source = f"#@title {name}\n{cell.source}"
            copy.metadata["cellView"] = "form"
        if "hide-cell" in tags and outputs:
            copy.metadata |= {"collapsed": True, "jupyter": {"outputs_hidden": True}}
        return copy

    def name(self, cell, tags, following) -> str:
        """What a folded cell is for."""
        kinds = {kind for output in cell.outputs for kind in output.get("data", {})}
        if PLOTLY_MIME in kinds and _captions(self.page.parse(following.source) if following else []):
            self.figures += 1
            figure = f"Figure {chapter(self.page.env, self.page.name)}{self.figures}"
            self.caption = f"**{figure}.** "
            return f"Code of {figure}"
        if title := cell.metadata.get("mystnb", {}).get("code_prompt_show"):
            return title
        if "remove-cell" in tags:
            names = {"parameters": "Parameters", "injected-parameters": "Parameters of this run"}
            return next((names[tag] for tag in tags & set(names)), "Setup")
        if self.answer:
            return f"Solution of {self.answer}, in code"
        if cell.source.startswith(("import ", "from ")) and not cell.outputs:
            return "Imports"
        shown = {"text/html": "the table", "text/markdown": "the text"}
        return next((f"Code of {what}" for kind, what in shown.items() if kind in kinds), "Code")

    def output(self, output, name: str):
        data = output.get("data", {})
        if PLOTLY_MIME in data:
            figure = rounded(data[PLOTLY_MIME])
            drawn = pio.to_html(
                figure,
                config=CONFIG,
                include_plotlyjs=f"{self.page.site}_static/{script(figure)}",
                full_html=False,
                div_id=name,
                post_script=INK,
                auto_play=False,
                validate=False,
            )
            return nbformat.v4.new_output("display_data", {"text/html": drawn, "text/plain": alternative(figure)})
        if "text/markdown" in data:
            data["text/markdown"] = self.page.markdown(data["text/markdown"])
        return output


def _captions(tokens) -> bool:
    return len(tokens) > 1 and bool(tokens[1].children) and tokens[1].children[0].type == "em_open"


def _notebook(app, name: str) -> Path | None:
    path = Path(app.env.doc2path(name)) if name in app.env.found_docs else Path()
    return path if path.suffix == ".ipynb" else None


def write(app, error):
    """The tree, once the site stands: a copy links to numbers and anchors that are known only then."""
    if error or app.builder.format != "html":
        return
    wheels = [p.name for p in Path(app.outdir, "_static", "wheels").glob("*.whl")]
    if len(wheels) != 1:
        raise ValueError(f"_static/wheels holds {wheels}, expected the package's wheel, which the Makefile puts there")
    for name in sorted(app.env.found_docs):
        if source := _notebook(app, name):
            page = Page(app, name)
            copy = Copy(page, f"{page.site}_static/wheels/{wheels[0]}").notebook(nbformat.read(source, 4))
            target = Path(app.outdir, "colab", f"{name}.ipynb")
            target.parent.mkdir(parents=True, exist_ok=True)
            nbformat.write(copy, target)


def add_buttons(app, name, template, context, doctree):
    """Beside the title, in place of the theme's own link to a repository, and for who uploads the file by hand."""
    if not _notebook(app, name):
        return
    copy = f"colab/{name}.ipynb"
    address = OPEN + quote(urljoin(app.config.ogp_site_url, copy), safe="/")
    for button in [b for group in context.get("header_buttons", []) for b in group.get("buttons", [])]:
        if button.get("text") == "Colab":
            button["url"] = address
        elif button.get("label") == "download-source-button":
            button["url"] = context["pathto"](copy, 1)
    ink = "--bs-btn-color: var(--pst-color-link); --bs-btn-border-color: var(--pst-color-link)"  # seen in the dark, too
    button = f'<a class="btn btn-sm btn-outline-primary float-end ms-3 d-print-none" style="{ink}" href="{address}">'
    context["body"] = f"{button}Open in Colab</a>\n{context.get('body', '')}"


def setup(app):
    app.connect("html-page-context", add_buttons, priority=900)
    app.connect("build-finished", write, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
