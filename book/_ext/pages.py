"""Sphinx extension: what the HTML of a page needs beyond the theme, done once when the page is written.

Tables that pandas wrote, punctuation after formulas, and an error page that finds the site it belongs to.
"""

import re

from bs4 import BeautifulSoup

NUMBER = re.compile(r"[−+-]?\d[\d  ,.]*\s?%?|–|nan|NaN|")
FRAME = re.compile(r'<table [^>]*class="dataframe">.*?</table>', re.S)
# A browser may break a line between a formula and what stands beside it.
FORMULA = r'<span class="math notranslate nohighlight">[^<]*</span>'
BESIDE = re.compile(rf"([(\[„“‘]*)({FORMULA})((?:[.,;:!?)\]…]|[’”]s?|-(?=\w))*)")

# The error page is served for addresses of any depth, and a copy of the site may lie under any prefix. Its links are
# absolute under the published one; this looks from the address upwards for where the site really is.
FIND_SITE = """<script>
(async () => {
  const published = "%s";
  if (location.pathname.startsWith(published)) return;
  const parts = location.pathname.split("/").slice(1, -1);
  for (let depth = parts.length; depth >= 0; depth--) {
    const prefix = ["", ...parts.slice(0, depth), ""].join("/");
    const there = await fetch(prefix + "_static/book.css", { method: "HEAD" }).catch(() => ({}));
    if (!there.ok) continue;
    for (const name of ["href", "src"])
      for (const e of document.querySelectorAll(`[${name}^="${published}"]`))
        e.setAttribute(name, prefix + e.getAttribute(name).slice(published.length));
    return;
  }
})();
</script>"""


def tidy_frame(match):
    """One header row, numbers to the right; `lo-levels` where a row may begin with its second column."""
    soup = BeautifulSoup(match[0], "html.parser")
    table, rows = soup.table, soup.tbody.find_all("tr")
    if table.tbody.find(rowspan=True):
        table["class"] = [*table["class"], "lo-levels"]
    heads = soup.thead.find_all("tr")
    levels = len(rows[0].find_all("th")) if rows else 0
    last = heads[-1].find_all("th")
    if len(heads) > 1 and levels and not any(cell.get_text(strip=True) for cell in last[levels:]):
        heads.pop().extract()
        for above, name in zip(heads[-1].find_all("th"), last[:levels]):
            above.string = name.get_text()
    names = heads[-1].find_all("th")[levels:]
    for name, *column in zip(names, *(row.find_all("td") for row in rows)):
        if all(NUMBER.fullmatch(cell.get_text(strip=True)) for cell in column):
            for cell in [name, *column]:
                cell["class"] = "lo-number"
    return str(table)


def tidy(app, page, template, context, doctree):
    body = FRAME.sub(tidy_frame, context.get("body", ""))
    body = BESIDE.sub(lambda m: f'<span class="lo-unit">{m[0]}</span>' if m[1] or m[3] else m[0], body)
    if page == "404":
        body += FIND_SITE % app.config.notfound_urls_prefix
    context["body"] = body


def setup(app):
    app.connect("html-page-context", tidy)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
