"""A link that begins with a capital letter names its page, and then by the title it has."""

import re
from pathlib import Path

import nbformat
import pytest

BOOK = Path(__file__).parents[1] / "book"
PAGES = sorted([*BOOK.rglob("*.ipynb"), *BOOK.rglob("*.md")])
LINK = re.compile(r"\[([^\]\n]+)\]\(([^)#\s]+\.(?:ipynb|md))\)")


def text_of(page):
    if page.suffix == ".md":
        return page.read_text(encoding="utf8")
    return "\n".join(cell.source for cell in nbformat.read(page, 4).cells if cell.cell_type == "markdown")


TITLES = {page: found[1] for page in PAGES if (found := re.search(r"^# (.+)$", text_of(page), re.MULTILINE))}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_pages_are_linked_by_their_titles(page):
    wrong = []
    for text, link in LINK.findall(text_of(page)):
        target = (page.parent / link).resolve()
        assert target.exists(), (text, link)
        if text[0].isupper() and not text.isupper() and text != TITLES[target]:
            wrong.append(f"[{text}]({link}) is {TITLES[target]!r}")
    assert not wrong
