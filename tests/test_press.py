"""The book on paper, opened and read: `make pdf` prints what this looks at."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from unicodedata import normalize

import pytest
from conftest import SITE, site_pages
from pypdf import PdfReader

ROOT = Path(__file__).parent.parent
LIMIT = 15_000_000  # bytes
pytestmark = [pytest.mark.nightly, pytest.mark.browser]


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    assert SITE.exists(), "the site is not built: run `make book`"
    path = tmp_path_factory.mktemp("press") / "book.pdf"
    command = [sys.executable, ROOT / "book/_ext/press.py", "pdf", "--site", SITE, "--output", path]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return path


@pytest.fixture(scope="module")
def sheets(printed):
    """Pages of the PDF, and the text of each."""
    pages = PdfReader(printed).pages
    return [(page, page.extract_text()) for page in pages]


CAPTION = re.compile(r"Figure ((?:\d+\.)?\d+)\. ")


def words(text):
    """Of three letters or more; ligatures are letters."""
    return set(re.findall(r"[^\W\d_]{3,}", normalize("NFKC", re.sub("<[^>]*>", " ", text))))


def texts(figure):
    """What is written in a figure: titles, names, annotations."""
    if isinstance(figure, list):
        for value in figure:
            yield from texts(value)
    elif isinstance(figure, dict):
        for key, value in figure.items():
            if key in ("text", "name") and isinstance(value, str):
                yield value
            elif key not in ("meta", "customdata", "updatemenus", "sliders", "template"):
                yield from texts(value)


def figures():
    """Of the site: the page, the number, and the words that stand in the figure and not in its caption."""
    from bs4 import BeautifulSoup

    for name in site_pages("lo-caption"):
        soup = BeautifulSoup((SITE / name).read_text(encoding="utf8"), "html.parser")
        drawn = None
        for element in soup.select(".lo-figure, .lo-caption"):
            if "lo-figure" in element["class"]:
                drawn = json.loads(element.script.string)
            else:
                text = element.get_text()
                inside = (words(each) for part in ("data", "layout") for each in texts(drawn[part]))
                yield name, CAPTION.match(text)[1], set().union(*inside) - words(text)


def test_it_is_small_enough_to_send(printed):
    assert printed.stat().st_size < LIMIT


def test_every_character_has_a_glyph(sheets):
    """A character that no font has is printed as glyph 0, an empty box, and read back as NUL."""
    for number, (_, text) in enumerate(sheets, 1):
        lost = [text[max(0, i - 20) : i + 20] for i, c in enumerate(text) if c in "\0\ufffd"]
        assert not lost, f"page {number}: {lost}"
        assert len(text.split()) > 4, f"page {number} is empty"


def test_every_figure_of_the_site_is_drawn(sheets):
    """A caption whose figure is missing has none of the figure's words beside it."""
    beside = {}
    for _, text in sheets:
        for number in CAPTION.findall(text):
            beside.setdefault(number, []).append(words(text))
    expected = list(figures())
    assert Counter(number for _, number, _ in expected) == {number: len(found) for number, found in beside.items()}
    told = [(name, number, own) for name, number, own in expected if own]
    assert len(told) > 50
    for name, number, own in told:
        seen = max(len(own & found) for found in beside[number])
        assert seen >= 0.6 * len(own), f"{name}, figure {number}: of {sorted(own)} only {seen} are on the page"


def test_every_chapter_has_a_bookmark_that_leads_to_it(printed):
    reader = PdfReader(printed)
    chapters = [one for part in reader.outline if isinstance(part, list) for one in part]
    assert len(chapters) > 30
    for chapter in chapters:
        first = reader.pages[reader.get_destination_page_number(chapter)].extract_text()
        assert words(chapter.title) <= words(first), chapter.title
