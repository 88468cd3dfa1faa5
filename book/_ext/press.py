"""The book on paper: `make pdf` prints the built site, `make figures` the pictures of README, link previews and paper.

The browser that tests the site prints it, so that a page looks on paper as it does on the screen.
"""

import functools
import http.server
import io
import threading
from contextlib import contextmanager
from html import escape
from pathlib import Path
from urllib.parse import unquote

import typer
import yaml
from chromium import launched
from pypdf import PdfReader, PdfWriter
from pypdf.generic import ArrayObject, NameObject

from lora_opcm.lab.evidence.tables import headline
from lora_opcm.site import figures

ROOT = Path(__file__).parents[2]
MARGIN = {"top": "20mm", "bottom": "20mm", "left": "18mm", "right": "18mm"}
SCALE = 0.72  # of a page as the screen shows it
PRINT = """
.bd-sidebar-primary, .bd-sidebar-secondary, .bd-header, .bd-header-article, .prev-next-footer,
.bd-footer, .bd-footer-content,
button.copybtn, button.toggle-button, .headerlink,
.pst-scroll-pixel-helper, #pst-back-to-top, .modebar, .sphinx-bs, #jb-print-toc,
.lo-figure .updatemenu-container, .lo-figure .slider-container, details.hide.above-input { display: none !important }
.bd-main, .bd-content, .bd-article-container, .bd-page-width { max-width: 100% !important; width: 100% !important;
  padding: 0 !important; margin: 0 !important }
.bd-article { padding: 0 !important }
.lo-figure, .bd-article tr, .proof, .admonition, .cell_input, .cell_output, div.highlight { break-inside: avoid }
.lo-figure, .proof-title, .cell_input { break-after: avoid } .lo-caption { break-before: avoid }
.bd-article pre, .bd-article pre span { white-space: pre-wrap !important; overflow-wrap: anywhere }
div.cell_output .output.text_html, .pst-scrollable-table-container { overflow: visible !important }
.bd-article table { font-size: 0.82em; max-width: 100% }
.bd-article th, .bd-article td { white-space: normal !important }
#jb-print-docs-body h1 { font-size: 2.2rem !important; text-align: left !important; margin: 0 0 1rem }
details.toggle-details, details { display: block }
"""
app = typer.Typer(add_completion=False)


@contextmanager
def browser_page(folder: Path):
    """A page of a headless browser and the address under which it sees `folder`."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, launched() as browser:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield (
            browser.new_page(viewport={"width": 900, "height": 1200}),
            f"http://127.0.0.1:{server.server_port}",
        )
        server.shutdown()


def contents() -> list[tuple[str, list[str]]]:
    """(part, pages) in the order of the table of contents."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    parts = [(p["caption"], [c["file"] for c in p["chapters"]]) for p in toc["parts"]]
    return [("", [toc["root"]]), *parts]


def print_page(page, address: str) -> tuple[str, bytes]:
    """Title and PDF of one page, with every figure drawn and every formula set."""
    page.goto(address, wait_until="networkidle")
    page.emulate_media(media="print", color_scheme="light")
    page.add_style_tag(content=PRINT)
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    page.wait_for_function(
        "() => [...document.querySelectorAll('.lo-figure')].every(f => f.dataset.drawn)", timeout=120_000
    )
    page.wait_for_function("() => [...document.querySelectorAll('.math')].every(m => m.querySelector('mjx-container'))")
    title = page.locator("h1").first.evaluate(
        "h => h.firstChild.textContent + (h.querySelector('.section-number')?.nextSibling?.textContent ?? '')"
    )
    return " ".join(title.split()), page.pdf(format="A4", margin=MARGIN, print_background=True, scale=SCALE)


def stamp(page, writer: PdfWriter, titles: list[str]) -> None:
    """Number the pages of `writer`, with the chapter's title beside the number."""
    feet = "".join(
        f"<section><span>{escape(title)}</span><span>{number}</span></section>"
        for number, title in enumerate(titles, 1)
    )
    page.set_content(
        "<style>@page{margin:0} body{margin:0;font:8.5pt system-ui;color:#555}"
        " section{height:297mm;box-sizing:border-box;"
        "padding:284mm 18mm 0;display:flex;justify-content:space-between;break-after:page;overflow:hidden}"
        f"</style>{feet}"
    )
    overlay = PdfReader(io.BytesIO(page.pdf(format="A4", margin=dict.fromkeys(MARGIN, "0"))))
    for sheet, foot in zip(writer.pages, overlay.pages):
        sheet.merge_page(foot)
        sheet.compress_content_streams()


def link(writer: PdfWriter, address: str, starts: dict[str, int]) -> None:
    """Links between pages of the site become links within the file."""
    for sheet in writer.pages:
        for note in sheet.get("/Annots", ()):
            note = note.get_object()
            uri = str(note.get("/A", {}).get("/URI", ""))
            start = starts.get(uri.removeprefix(address).partition("#")[0].strip("/"))
            if uri.startswith(address) and start is not None:
                del note["/A"]
                target = writer.pages[start].indirect_reference
                note[NameObject("/Dest")] = ArrayObject([target, NameObject("/Fit")])


@app.command()
def pdf(site: Path = ROOT / "_build" / "site", output: Path = ROOT / "_build" / "book.pdf"):
    """All pages of the built site in one file, with contents and bookmarks."""
    chapters = []  # (part, title, PDF)
    with browser_page(site) as (page, address):
        for part, files in contents():
            for file in files:
                chapters.append((part, *print_page(page, f"{address}/{file}.html")))
                print(f"{chapters[-1][1]}", flush=True)
        readers = [PdfReader(io.BytesIO(data)) for _, _, data in chapters]
        for front in (1, 2):  # the contents push the pages they name; a second pass knows by how many
            rows, number, last = [], front + 1, ""
            for (part, title, _), reader in zip(chapters, readers):
                if part != last:
                    rows.append(f"<tr><th colspan=2>{escape(part)}</th></tr>")
                    last = part
                rows.append(f"<tr><td>{escape(title)}</td><td>{number}</td></tr>")
                number += len(reader.pages)
            page.set_content(
                "<style>body{font:11pt system-ui}th{text-align:left;padding-top:1em}"
                "td:last-child{text-align:right;padding-left:2em}</style>"
                f"<h1>{escape(chapters[0][1])}</h1><h2>Contents</h2><table>{''.join(rows)}</table>"
            )
            table = PdfReader(io.BytesIO(page.pdf(format="A4", margin=MARGIN)))
            if len(table.pages) == front:
                break
        writer = PdfWriter()
        writer.append(table, outline_item="Contents")
        parents, starts, feet = {}, {}, ["Contents"] * len(table.pages)
        for (part, title, _), reader, file in zip(chapters, readers, [f for _, fs in contents() for f in fs]):
            start = starts[f"{file}.html"] = len(writer.pages)
            writer.append(reader, import_outline=False)
            if part and part not in parents:
                parents[part] = writer.add_outline_item(title=part, page_number=start)
            writer.add_outline_item(title=title, page_number=start, parent=parents.get(part))
            feet += [title] * len(reader.pages)
        link(writer, address, starts)
        stamp(page, writer, feet)
    writer.add_metadata({"/Title": chapters[0][1]})
    writer.compress_identical_objects()
    writer.write(output)
    print(f"{output}: {len(writer.pages)} pages")


def drawn(page, address: str, scratch: Path, figure) -> str:
    """A figure as SVG, at its own size; `page` keeps showing it."""
    scratch.write_text(figure.to_html(include_plotlyjs=True))
    page.goto(f"{address}/{scratch.name}")
    page.wait_for_selector(".main-svg .trace, .main-svg .points", state="attached")  # a level line has no height
    size = {"format": "svg", "width": figure.layout.width, "height": figure.layout.height}
    uri = page.evaluate("size => Plotly.toImage(document.querySelector('.plotly-graph-div'), size)", size)
    return unquote(uri.split(",", 1)[1])


def printed(page, svg: str, width: int, height: int) -> bytes:
    """A picture as one page of PDF, its lines and letters kept as such."""
    page.set_content(f"<style>body {{ margin: 0 }} svg {{ display: block }}</style>{svg}")
    return page.pdf(width=f"{width}px", height=f"{height}px", print_background=True, page_ranges="1")


@app.command("figures")
def pictures(target: Path = ROOT / "book" / "_static"):
    """bake_off.svg and .png from the published outcomes."""
    rows = headline()[["gain", "low", "high"]].div(100).rename(columns={"gain": "value"}).reset_index()
    figure = figures.comparison(rows.assign(task="mean", metric="recovered gain"))
    figure.update_layout(width=720, height=430, paper_bgcolor="white", plot_bgcolor="white")
    scratch = ROOT / "_build" / "still.html"
    scratch.parent.mkdir(exist_ok=True)
    with browser_page(scratch.parent) as (page, address):
        (target / "bake_off.svg").write_text(drawn(page, address, scratch, figure))
        page.set_viewport_size({"width": 720, "height": 430})
        page.locator(".plotly-graph-div").screenshot(path=target / "bake_off.png")


@app.command("panels")
def panels(target: Path = ROOT / "_build" / "paper"):
    """The panels of the paper as SVG and PDF, its numbers, tables and references as TeX."""
    import paper
    from panels import PANELS

    paper.main(target)
    scratch = target / "still.html"
    with browser_page(target) as (page, address):
        for name, make in PANELS.items():
            figure = make()
            svg = drawn(page, address, scratch, figure)
            (target / f"{name}.svg").write_text(svg)
            (target / f"{name}.pdf").write_bytes(printed(page, svg, figure.layout.width, figure.layout.height))
    scratch.unlink()


if __name__ == "__main__":
    app()
