"""What the formulas and tables of an open page do on its screen, phone or desktop."""

CUT_FORMULAS = """() => [...document.querySelectorAll("div.math")].filter(box => {
    const left = box.querySelector("mjx-math").getBoundingClientRect().left;
    for (let e = box.querySelector("mjx-container"); !e.matches(".bd-article"); e = e.parentElement) {
        if (left < e.getBoundingClientRect().left - 1) return true;
    }
}).map(box => box.textContent)"""
CUT_IN_LINES = """() => [...document.querySelectorAll("mjx-container:not([display])")].filter(m => {
    const block = m.closest("p, li, td, dd, blockquote");
    return block && m.getBoundingClientRect().right > block.getBoundingClientRect().right + 1
        && !block.closest(".pst-scrollable-table-container") && !m.closest(".lo-wide");
}).map(m => m.parentElement.textContent)"""
TABLES = """async () => {
    const next = () => new Promise(done => requestAnimationFrame(() => setTimeout(done, 60)));
    window.dispatchEvent(new Event("resize")); await next();
    const found = [];
    for (const table of document.querySelectorAll(".bd-article table")) {
        const box = table.closest(".text_html, .pst-scrollable-table-container");
        if (!box) continue;  // an index
        const spans = table.querySelector("tbody [rowspan]");  // there, only some rows have the first column
        if (table.getBoundingClientRect().width <= box.clientWidth + 1) { found.push("fits"); continue; }
        const faded = () => getComputedStyle(box).maskImage;
        const start = faded(), cell = table.rows[spans ? 0 : table.rows.length - 1].cells[0];
        box.scrollLeft = 60; await next();
        const stays = Math.abs(cell.getBoundingClientRect().left - box.getBoundingClientRect().left) < 2;
        const ground = getComputedStyle(cell).backgroundColor;
        box.scrollLeft = 1e5; await next();
        const narrow = cell.getBoundingClientRect().width < 0.6 * box.clientWidth;
        const solid = !ground.startsWith("rgba");
        const good = start !== "none" && faded() === "none" && stays && solid && narrow;
        found.push(good ? "shown" : `${table.rows[0].textContent.trim().replace(/\\s+/g, " ")}: fade ${start} ` +
            `at the end ${faded()}, stays ${stays}, solid ${solid}, narrow ${narrow}`);
        box.scrollLeft = 0;
    }
    return found;
}"""


def typeset(page):
    """Waits until every formula of the page is set; the errors of those that cannot be."""
    page.wait_for_function("() => [...document.querySelectorAll('.math')].every(m => m.querySelector('mjx-math'))")
    return page.locator("mjx-merror, [data-mjx-error]").all_text_contents()


def cut_formulas(page):
    """Displayed formulas that do not open at their left end, and formulas in lines that their lines cut."""
    return page.evaluate(CUT_FORMULAS) + page.evaluate(CUT_IN_LINES)


def tables(page):
    """Each table: "fits"; "shown": it fades at the side that goes on, and its first column stays; or what fails."""
    # A folded answer has no width: open all.
    page.evaluate("() => document.querySelectorAll('details').forEach(d => d.open = true)")
    return page.evaluate(TABLES)
