// What the figures share: elements, a choice of one, a handle that a finger, a mouse or arrow keys move.
(() => {
  "use strict";
  const fill = (e, attributes, children) => {
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) e.addEventListener(key.slice(2), value);
      else if (value !== undefined && value !== false) e.setAttribute(key, value === true ? "" : value);
    }
    e.append(...children.filter((c) => c !== undefined));
    return e;
  };
  const html = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
  const svg = (tag, attributes = {}, ...children) =>
    fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

  // One of a few, in sight; a browser's own radio buttons, so arrow keys work.
  let count = 0;
  function choice(legend, options, value, changed) {
    const name = `lo-choice-${count++}`;
    const box = html("fieldset", { class: "lo-choice" }, html("legend", {}, legend));
    for (const { key, label = String(key), spoken } of options) {
      const input = html("input", {
        type: "radio",
        name,
        value: key,
        "aria-label": spoken,
        onchange: () => changed(key),
      });
      input.checked = key === value;
      box.append(html("label", {}, input, html("span", {}, label)));
    }
    return box;
  }

  // What a finger or a mouse drags in a drawing: `moved` is told the point. Only it takes a finger to itself, so the
  // page scrolls from anywhere else.
  function grip(drawing, look, attributes, moved) {
    const g = svg(
      "g",
      { class: `lo-handle ${look}`, ...attributes },
      svg("circle", { r: 24, class: "lo-grip" }),
      svg("circle", { r: 9 }),
    );
    drawing.append(g);
    g.addEventListener("pointerdown", (event) => {
      g.setPointerCapture(event.pointerId);
      if (g.hasAttribute("tabindex")) g.focus({ preventScroll: true });
      event.preventDefault();
    });
    g.addEventListener("pointermove", (event) => {
      if (!g.hasPointerCapture(event.pointerId)) return;
      moved(new DOMPoint(event.clientX, event.clientY).matrixTransform(drawing.getScreenCTM().inverse()));
    });
    g.addEventListener("touchstart", (event) => event.preventDefault(), { passive: false }); // touch-action is not for shapes
    return { g, to: ([x, y]) => g.setAttribute("transform", `translate(${x.toFixed(2)} ${y.toFixed(2)})`) };
  }

  // A point of a drawing that moves along a path: `at(value)` says where it stands. One that repeats another is not
  // spoken and takes no focus.
  function handle(drawing, { label, min, max, step, at, said, changed, look, spoken = true }) {
    let value = min;
    const clip = (v) => Math.min(max, Math.max(min, v));
    const nearest = (point) => {
      let best = [Infinity, value];
      for (let v = min; v <= max; v += step) {
        const [x, y] = at(v);
        const away = Math.hypot(x - point.x, y - point.y);
        if (away < best[0]) best = [away, v];
      }
      return best[1];
    };
    const slider = { tabindex: 0, role: "slider", "aria-label": label, "aria-valuemin": min, "aria-valuemax": max };
    const { g, to } = grip(drawing, look, spoken ? slider : { "aria-hidden": "true" }, (p) => changed(nearest(p)));
    const moves = {
      ArrowRight: 1,
      ArrowUp: 1,
      ArrowLeft: -1,
      ArrowDown: -1,
      PageUp: 15,
      PageDown: -15,
      Home: -1e9,
      End: 1e9,
    };
    g.addEventListener("keydown", (event) => {
      if (!(event.key in moves)) return;
      event.preventDefault();
      changed(clip(value + moves[event.key]));
    });
    return {
      g,
      set(next) {
        value = next;
        to(at(value));
        if (spoken) (g.setAttribute("aria-valuenow", value), g.setAttribute("aria-valuetext", said(value)));
      },
    };
  }

  const outline = (points) => "M" + points.map((p) => p.map((x) => x.toFixed(2)).join(" ")).join("L");
  const line = (points, look) => svg("path", { d: outline(points), class: look });
  const shape = (points, look) => svg("path", { d: outline(points) + "Z", class: look });
  const text = ([x, y], words, look, anchor = "middle") =>
    svg("text", { x, y, class: look, "text-anchor": anchor }, words);

  // Numbers with their names, in a row.
  function numbers(names) {
    const values = names.map((name) => [html("dt", {}, name), html("dd")]);
    const box = html("dl", { class: "lo-numbers" }, ...values.map(([dt, dd]) => html("div", {}, dt, dd)));
    return {
      box,
      say: (texts) =>
        texts.forEach(([big, small = ""], i) => values[i][1].replaceChildren(big, html("small", {}, small))),
    };
  }

  explore.kit = { html, svg, choice, grip, handle, line, shape, text, numbers };
})();
