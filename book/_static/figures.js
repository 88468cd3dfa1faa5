// Draws each .lo-figure with plotly when it comes near the screen, in the page's colours.
(() => {
  "use strict";
  const here = document.currentScript.src.replace(/figures\.js.*/, "");
  let loading;
  const plotly = () =>
    (loading ??= new Promise((done, fail) => {
      const tag = document.createElement("script");
      const whole = document.querySelector('[data-script="plotly.min.js"]'); // one figure of the page needs all of it
      tag.src = here + (whole ?? document.querySelector("[data-script]")).dataset.script;
      tag.onload = () => done(window.Plotly);
      tag.onerror = fail;
      document.head.append(tag);
    }));

  const colours = () => {
    const style = getComputedStyle(document.documentElement);
    const read = (name, other) => style.getPropertyValue(name).trim() || other;
    return {
      ink: read("--pst-color-text-base", "#222"),
      line: read("--pst-color-border", "#ccc"),
      paper: read("--pst-color-background", "#fff"),
    };
  };

  // Only what a theme changes; everything else belongs to the figure.
  const themed = (layout) => {
    const { ink, line, paper } = colours();
    const next = { "font.color": ink, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)" };
    next["hoverlabel.bgcolor"] = paper;
    next["hoverlabel.font.color"] = ink;
    (layout.updatemenus ?? []).forEach((menu, i) => {
      next[`updatemenus[${i}].bgcolor`] = paper;
      next[`updatemenus[${i}].bordercolor`] = line;
    });
    for (const key of Object.keys(layout)) {
      if (/^[xy]axis\d*$/.test(key)) {
        next[`${key}.gridcolor`] = line;
        next[`${key}.linecolor`] = line;
        next[`${key}.zerolinecolor`] = line;
      }
    }
    return next;
  };

  // The page scrolls wherever a finger lands: nothing zooms, whatever a figure itself says.
  const still = (layout) => {
    const template = layout.template?.layout ?? {};
    const axes = Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key));
    const fixed = Object.fromEntries(axes.map((key) => [key, { ...layout[key], fixedrange: true }]));
    const rest = Object.fromEntries(
      ["xaxis", "yaxis"].map((key) => [key, { ...template[key], fixedrange: true }]), // of axes the figure does not name
    );
    return {
      ...layout,
      ...fixed,
      dragmode: false,
      template: { ...layout.template, layout: { ...template, ...rest } },
      ...(layout.scene && { scene: { dragmode: "turntable", ...layout.scene } }), // a mouse turns it
    };
  };

  // plotly keeps every touch to itself, in space and on polar axes even without a drag mode. So touches reach only its
  // controls, and a scene once its button was pressed; a tap still gives the click that shows a point's values.
  const CONTROLS = ".slider-container, .updatemenu-container";
  const letScroll = (box) => {
    for (const kind of ["touchstart", "touchmove"]) {
      box.addEventListener(
        kind,
        (event) => {
          const held = box.classList.contains("lo-held") && event.target.closest(".gl-container");
          if (!held && !event.target.closest(CONTROLS)) event.stopPropagation();
        },
        { capture: true, passive: true },
      );
    }
    if (!box.querySelector(".gl-container canvas")) return;
    const button = document.createElement("button");
    button.className = "lo-turn";
    const say = (held) => {
      button.textContent = held ? "done turning" : "turn with a finger";
      button.setAttribute("aria-pressed", held);
    };
    button.addEventListener("click", () => say(box.classList.toggle("lo-held")));
    say(false);
    box.after(button);
  };

  // A legend in place of names at the ends of lines, for which a narrow page has no room.
  const named = (layout) => {
    Object.assign(layout, { annotations: [], showlegend: true, margin: { ...layout.margin, r: 20 } });
    for (const { args } of layout.sliders.flatMap(({ steps }) => steps)) args.length = 1;
  };

  // A click on a point shows all points as differences to it, and another click takes that back. `ends` has the
  // interval of each point minus every later one, of all traces one after the other.
  const letPin = (box, Plotly, ends) => {
    const whole = box._fullData.map(({ x, error_x }) => ({
      x: Array.from(x),
      array: Array.from(error_x.array),
      minus: Array.from(error_x.arrayminus),
    }));
    const starts = whole.map((_, i) => whole.slice(0, i).reduce((sum, { x }) => sum + x.length, 0));
    const values = whole.flatMap(({ x }) => x);
    const title = box.layout.xaxis.title.text;
    let pin = null;
    const between = (i, j) => {
      if (i === j) return [0, 0];
      const [a, b] = [Math.min(i, j), Math.max(i, j)];
      const [low, high] = ends[(a * (2 * values.length - a - 1)) / 2 + b - a - 1];
      return i < j ? [low, high] : [-high, -low];
    };
    const minus = ({ x }, k) => {
      const found = x.map((value, i) => [value - values[pin], ...between(starts[k] + i, pin)]);
      return { x: found.map(([v]) => v), array: found.map(([v, , b]) => b - v), minus: found.map(([v, a]) => v - a) };
    };
    box.on("plotly_buttonclicked", () => (pin = null));
    box.on("plotly_click", ({ points: [point] }) => {
      const at = starts[point.curveNumber] + point.pointIndex;
      pin = at === pin ? null : at;
      const now = pin === null ? whole : whole.map(minus);
      const each = (key) => now.map((trace) => trace[key]);
      Plotly.update(
        box,
        { x: each("x"), "error_x.array": each("array"), "error_x.arrayminus": each("minus") },
        { "xaxis.title.text": pin === null ? title : `points more or less than ${point.y}, ${point.data.name}` },
      );
    });
  };

  async function draw(box) {
    const data = box.querySelector("script");
    if (!data) return;
    const figure = JSON.parse(data.textContent);
    data.remove();
    const Plotly = await plotly();
    const layout = { ...still(figure.layout), autosize: true };
    delete layout.width;
    if (layout.meta?.ends && box.clientWidth < 480) named(layout);
    const hands = { displayModeBar: false, doubleClick: "reset", scrollZoom: false };
    const config = { responsive: true, ...figure.config, ...hands };
    await Plotly.newPlot(box, { data: figure.data, layout, frames: figure.frames, config });
    const narrow = box.clientWidth < 480 ? { "font.size": 11, "yaxis.tickfont.size": 10 } : {};
    await Plotly.relayout(box, { ...themed(box._fullLayout), ...narrow });
    letScroll(box);
    if (figure.layout.meta?.pins) letPin(box, Plotly, figure.layout.meta.pins);
    box.dataset.drawn = "true";
  }

  const start = () => {
    const boxes = document.querySelectorAll(".lo-figure");
    const seen = new IntersectionObserver(
      (entries) => {
        for (const entry of entries) {
          if (!entry.isIntersecting) continue;
          seen.unobserve(entry.target);
          draw(entry.target);
        }
      },
      { rootMargin: "600px" },
    );
    boxes.forEach((box) => seen.observe(box));
    window.addEventListener("beforeprint", () => boxes.forEach(draw));
    new MutationObserver(() => {
      document.querySelectorAll(".lo-figure[data-drawn]").forEach((box) => {
        window.Plotly.relayout(box, themed(box._fullLayout));
      });
    }).observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });
  };
  // A formula in the text that is wider than its paragraph becomes a line of its own, which scrolls;
  // in a table the column grows, for the table scrolls.
  const fitFormulas = () => {
    const inline = [...document.querySelectorAll("mjx-container:not([display])")];
    const units = inline.map((m) => m.closest(".lo-unit") ?? m); // with its full stop
    units.forEach((unit) => unit.classList.remove("lo-wide", "lo-more"));
    const wide = units.filter((unit) => {
      const block = unit.closest("p, li, td, dd, blockquote");
      return block && !unit.closest("td, th") && unit.getBoundingClientRect().width > block.clientWidth;
    });
    wide.forEach((unit) => unit.classList.add("lo-wide"));
    wide.forEach(fade);
  };

  // A table or formula wider than its column fades at the side that goes on.
  const WIDE = ".text_html, .pst-scrollable-table-container, div.math, .lo-wide";
  const fade = (box) =>
    box.classList.toggle("lo-more", box.scrollLeft + box.clientWidth < box.scrollWidth - 1);
  const watchWide = () => {
    // Sizes change with the window, and when a folded answer opens.
    const sized = new ResizeObserver((entries) => entries.forEach((entry) => fade(entry.target)));
    document.querySelectorAll(WIDE).forEach((box) => sized.observe(box));
    const moved = (event) => event.target.matches?.(WIDE) && fade(event.target);
    document.addEventListener("scroll", moved, { capture: true, passive: true });
  };

  window.addEventListener("load", async () => {
    await window.MathJax?.startup?.promise;
    fitFormulas();
    watchWide();
    let width = window.innerWidth;
    window.addEventListener("resize", () => {
      if (window.innerWidth === width) return;
      width = window.innerWidth;
      fitFormulas();
    });
  });
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
})();
