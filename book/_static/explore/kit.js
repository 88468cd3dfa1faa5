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

  // A point of a drawing that moves along a path: `at(value)` says where it stands. Only the handle takes a finger to
  // itself, so the page scrolls from anywhere else. One that repeats another is not spoken and takes no focus.
  function handle(drawing, { label, min, max, step, at, said, changed, look, spoken = true }) {
    const grip = svg("circle", { r: 24, class: "lo-grip" });
    const slider = { tabindex: 0, role: "slider", "aria-label": label, "aria-valuemin": min, "aria-valuemax": max };
    const g = svg(
      "g",
      { class: `lo-handle ${look}`, ...(spoken ? slider : { "aria-hidden": "true" }) },
      grip,
      svg("circle", { r: 9 }),
    );
    drawing.append(g);
    let value = min;
    const clip = (v) => Math.min(max, Math.max(min, v));
    const nearest = (event) => {
      const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(drawing.getScreenCTM().inverse());
      let best = [Infinity, value];
      for (let v = min; v <= max; v += step) {
        const [x, y] = at(v);
        const away = Math.hypot(x - point.x, y - point.y);
        if (away < best[0]) best = [away, v];
      }
      return best[1];
    };
    const move = (event) => g.hasPointerCapture(event.pointerId) && changed(nearest(event));
    g.addEventListener("pointerdown", (event) => {
      g.setPointerCapture(event.pointerId);
      if (spoken) g.focus({ preventScroll: true });
      event.preventDefault();
    });
    g.addEventListener("pointermove", move);
    g.addEventListener("touchstart", (event) => event.preventDefault(), { passive: false }); // touch-action is not for shapes
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
        const [x, y] = at(value);
        g.setAttribute("transform", `translate(${x.toFixed(2)} ${y.toFixed(2)})`);
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

  explore.kit = { html, svg, choice, handle, line, shape, text, numbers };
})();
