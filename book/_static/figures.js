// Draws each .lo-figure with plotly when it comes near the screen, in the page's colours.
(() => {
  "use strict";
  const { addRange, letKeys } = window.loKeys;
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

  // A click on a point, or Enter, shows all points as differences to it, and another takes that back, to what the
  // button shows that was pressed last. `ends` has the interval of each point minus every later one, of all traces one
  // after the other.
  const letPin = (box, Plotly, ends) => {
    const points = box._fullData.flatMap(({ x, y, name, error_x: { array, arrayminus } }, curveNumber) =>
      Array.from(x, (value, i) => ({
        curveNumber, pointNumber: i, y: y[i], name: `${y[i]}, ${name}`,
        value, low: value - arrayminus[i], high: value + array[i],
      })),
    );
    const lit = (active) => box.layout.updatemenus && { "updatemenus[0].active": active };
    const show = (places, title) => {
      const each = (number) => box.data.map((_, k) => places.filter((_, i) => points[i].curveNumber === k).map(number));
      const bars = { "error_x.array": each(([v, , b]) => b - v), "error_x.arrayminus": each(([v, a]) => v - a) };
      return [{ x: each(([v]) => v), ...bars }, { "xaxis.title.text": title }];
    };
    const whole = points.map(({ value, low, high }) => [value, low, high]);
    const views = box.layout.updatemenus?.[0].buttons ?? [{ args: show(whole, box.layout.xaxis.title.text) }];
    let [pin, view] = [null, box.layout.updatemenus?.[0].active ?? 0];
    const between = (i, j) => {
      if (i === j) return [0, 0];
      const [a, b] = [Math.min(i, j), Math.max(i, j)];
      const [low, high] = ends[(a * (2 * points.length - a - 1)) / 2 + b - a - 1];
      return i < j ? [low, high] : [-high, -low];
    };
    const minus = ({ value }, i) => [value - pin.value, ...between(i, points.indexOf(pin))];
    const press = (point) => {
      pin = point === pin ? null : point;
      const [places, layout] = pin ? show(points.map(minus), `points more or less than ${pin.name}`) : views[view].args;
      Plotly.update(box, places, { ...layout, ...lit(pin ? -1 : view) });
    };
    box.on("plotly_buttonclicked", ({ active }) => ([pin, view] = [null, active]));
    box.on("plotly_click", ({ points: [{ curveNumber: k, pointNumber: i }] }) =>
      press(points.find(({ curveNumber, pointNumber }) => curveNumber === k && pointNumber === i)),
    );

    const { yaxis } = box._fullLayout;
    const rows = [...points].sort((a, b) => yaxis.d2p(b.y) - yaxis.d2p(a.y)); // from below
    let row = rows.length - 1;
    const dot = () => {
      const { curveNumber, pointNumber } = rows[row];
      return box.querySelectorAll(".scatterlayer .trace")[curveNumber].querySelectorAll(".point")[pointNumber];
    };
    const say = () => {
      const { curveNumber, pointNumber, name } = rows[row];
      return `${name}: ${box._fullData[curveNumber].x[pointNumber].toFixed(1)}${rows[row] === pin ? ", pinned" : ""}`;
    };
    const tell = () => Plotly.Fx.hover(box, [rows[row]]);
    const key = addRange(box, dot, "point, Enter pins it", rows.length, () => row, say, (to) => {
      row = to;
      settle(box, Plotly);
      tell();
    });
    key.onfocus = tell;
    key.onblur = () => Plotly.Fx.unhover(box);
    key.onkeydown = (event) => {
      if (event.key === "Enter") press(rows[row]);
    };
  };

  // A title below an axis that is too long for one line gets more of them.
  const pen = document.createElement("canvas").getContext("2d");
  const fitTitles = (box) => {
    const next = {};
    for (const [key, { title }] of Object.entries(box.layout)) {
      if (!/^xaxis\d*$/.test(key) || !title?.text) continue;
      const { _offset, _length, title: drawn } = box._fullLayout[key];
      const middle = _offset + _length / 2;
      const room = 2 * Math.min(middle, box._fullLayout.width - middle) - 4;
      pen.font = `${drawn.font.size}px ${drawn.font.family}`;
      const lines = title.text.split(/<br>| /).reduce(([line, ...above], word) => {
        const longer = `${line} ${word}`.trim();
        return line && pen.measureText(longer).width > room ? [word, line, ...above] : [longer, ...above];
      }, [""]);
      const text = lines.reverse().join("<br>");
      if (text !== title.text) next[`${key}.title.text`] = text;
    }
    return next;
  };

  // What follows every drawing: titles that fit, words whose colour can be read, keys over what they stand for.
  const settle = async (box, Plotly) => {
    if (box.settling) return;
    box.settling = true;
    const titles = fitTitles(box);
    if (Object.keys(titles).length) await Plotly.relayout(box, titles);
    for (const { style, dataset } of box.querySelectorAll(".annotation-text")) {
      style.fill = `color-mix(in srgb, ${(dataset.own ??= style.fill)} 55%, var(--pst-color-text-base))`;
    }
    const from = box.getBoundingClientRect();
    for (const place of box.querySelectorAll(".lo-key")) {
      const { left, top, width, height } = place.over().getBoundingClientRect();
      place.style.cssText = `left:${left - from.left}px;top:${top - from.top}px;width:${width}px;height:${height}px`;
      place.sync?.();
    }
    box.settling = false;
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
    letKeys(box, Plotly);
    if (figure.layout.meta?.pins) letPin(box, Plotly, figure.layout.meta.pins);
    const redrawn = ["afterplot", "relayout", "restyle", "update", "sliderchange", "animatingframe"];
    redrawn.forEach((kind) => box.on(`plotly_${kind}`, () => settle(box, Plotly)));
    await settle(box, Plotly);
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

  // A table, formula or output wider than its column fades at the side that goes on; a figure fits, once it is redrawn.
  const WIDE = ".text_html:not(:has(.lo-figure)), .pst-scrollable-table-container, div.math, .lo-wide, .bd-article pre";
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
