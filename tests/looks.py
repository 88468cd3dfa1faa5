"""What the formulas, tables and figures of an open page do on its screen, phone or desktop."""

from conftest import swipe, themes

CONTROLS = ".slider-container, .updatemenu-container"  # what a finger on a figure is meant for
RANGES = """b => JSON.stringify(["xaxis", "yaxis"].map(key => b._fullLayout[key]).map(
    axis => axis?.autorange ? "what the data need" : axis?.range))"""
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
CUT_WORDS = """box => {
    const size = (e) => e.getBoundingClientRect(), meet = (a, b) =>
        Math.min(a.right, b.right) - Math.max(a.left, b.left) > 2 &&
        Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 2;
    const all = [...box.querySelectorAll("svg text")].filter(t => size(t).width && !t.closest(".hoverlayer"));
    const menus = [...box.querySelectorAll(".updatemenu-item-rect")].map(size);
    const names = all.filter(t => t.closest(".legend"));
    return all.filter(t => {
        const at = size(t), whole = size(box);
        return at.left < whole.left - 1 || at.right > whole.right + 1
            || at.top < whole.top - 1 || at.bottom > whole.bottom + 1
            || !t.closest(".updatemenu-container") && menus.some(menu => meet(menu, at))
            || t.closest(".annotation") && names.some(name => meet(size(name), at));
    }).map(t => t.textContent);
}"""
INKS = """box => {
    const pen = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    const seen = (colour) => {
        pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1);
        return `rgb(${pen.getImageData(0, 0, 1, 1).data.slice(0, 3).join()})`;
    };
    const ground = seen(getComputedStyle(document.body).backgroundColor);
    const ink = (text) => seen(getComputedStyle(text).fill);
    return [...box.querySelectorAll(".annotation-text")].map(text => [text.textContent, ink(text), ground]);
}"""
TABLES = """async () => {
    const next = () => new Promise(done => {
        requestAnimationFrame(() => setTimeout(done, 60)); setTimeout(done, 1000);
    });
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


def unset_formulas(page):
    """Text with a dollar sign outside code: a formula that Markdown did not take for one."""
    return page.evaluate("""() => {
        const found = [], text = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
        while (text.nextNode()) {
            const node = text.currentNode;
            if (node.data.includes("$") && !node.parentElement.closest("code, pre, script, style, svg, .math"))
                found.push(node.data.trim());
        }
        return found;
    }""")


def cut_formulas(page):
    """Displayed formulas that do not open at their left end, and formulas in lines that their lines cut."""
    return page.evaluate(CUT_FORMULAS) + page.evaluate(CUT_IN_LINES)


def tables(page):
    """Each table: "fits"; "shown": it fades at the side that goes on, and its first column stays; or what fails."""
    # A folded answer has no width: open all.
    page.evaluate("() => document.querySelectorAll('details').forEach(d => d.open = true)")
    return page.evaluate(TABLES)


def figures(page):
    """The figures of a page, one after the other, each drawn and in the middle of the screen."""
    boxes = page.locator(".lo-figure")
    for i in range(boxes.count()):
        boxes.nth(i).evaluate("box => box.scrollIntoView({block: 'center', behavior: 'instant'})")
        page.wait_for_function("i => document.querySelectorAll('.lo-figure')[i].dataset.drawn", arg=i)
        yield boxes.nth(i)


def thumbed(page, tally):
    """What a thumb does on a figure beside scrolling the page: where it is stuck, or zooms, or meets a mode bar."""
    found = []
    for i, box in enumerate(figures(page)):
        if box.locator(".modebar-btn").count():  # on a touch screen it is always there
            found.append((i, "covered"))
        before = box.evaluate(RANGES)
        for across, down in [(0.5, 0.5), [(0.2, 0.35), (0.8, 0.65), (0.02, 0.5)][i % 3]]:
            box.evaluate("box => box.scrollIntoView({block: 'center', behavior: 'instant'})")
            at = box.bounding_box()
            x, y = at["x"] + across * at["width"], at["y"] + down * at["height"]
            if page.evaluate(f"([x, y]) => !document.elementFromPoint(x, y)?.closest('{CONTROLS}')", [x, y]):
                tally["swipes"] += 1
                if swipe(page, x, y) < 80:
                    found.append((i, across, down))
        if box.evaluate(RANGES) != before:
            found.append((i, "zoomed"))
    return found


def menus(page, tally):
    """Menus of figures, opened in both themes, that one sees through or cannot read: their ground and ink."""
    found = []
    for theme in themes(page) if page.locator(".updatemenu-container").count() else ():
        for box in figures(page):
            headers, items = box.locator(".updatemenu-header").all(), box.locator(".updatemenu-item-rect")
            if items.count() == len(headers):  # a header is an item; a menu may stay open from one theme to the next
                for header in headers:
                    header.click()
            assert items.count() > len(headers) or not headers
            for item in items.all():
                tally["menu items"] += 1
                ground, ink, opacity = item.evaluate("""r => [getComputedStyle(r).fill,
                    getComputedStyle(r.parentElement.querySelector("text")).fill, getComputedStyle(r).fillOpacity]""")
                if opacity != "1" or _alpha(ground) != 1 or _contrast(ground, ink) < 4.5:
                    found.append((theme, ground, ink, opacity))
    return found


def cut_words(page):
    """Words of figures that an edge cuts, a menu covers, or that stand on a name of the legend."""
    return [words for box in figures(page) for words in box.evaluate(CUT_WORDS)]


def faint(page):
    """Labels in figures that one can hardly read on the page, in either theme."""
    labels = page.locator(".annotation-text").count()
    inks = [
        (theme, *ink)
        for theme in (themes(page) if labels else ())
        for box in figures(page)
        for ink in box.evaluate(INKS)
    ]
    return [(theme, words) for theme, words, ink, ground in inks if _contrast(ink, ground) < 4.5]


def _numbers(colour):
    return [float(n) for n in colour[colour.index("(") + 1 : -1].replace("/", ",").split(",")]


def _alpha(colour):
    return (*_numbers(colour), 1.0)[3]


def _contrast(one, other):
    """As WCAG has it."""

    def luminance(colour):
        parts = [c / 255 for c in _numbers(colour)[:3]]
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)
