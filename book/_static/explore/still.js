// The drawings of a figure side by side in one SVG, each mark with the style that the page gives it. Only
// `python -m lora_opcm.site.explore` loads this, to make NAME.svg.
(() => {
  "use strict";
  const PLACE = ["x", "y", "cx", "cy", "r", "width", "height"]; // where a script moves them, they are styles
  const MOVES = ["transform", "translate", "opacity"];
  const INK = [
    "fill",
    "fill-opacity",
    "stroke",
    "stroke-width",
    "stroke-dasharray",
    "stroke-linecap",
    "paint-order",
    "text-anchor",
    "font-weight",
    "font-size",
  ];
  const USUAL = ["none", "auto", "normal", "400", "butt", "start"];
  const SHAPES = "path, rect, circle, text";

  function plain(drawing) {
    const copy = drawing.cloneNode(true);
    const twins = [...copy.querySelectorAll("*")];
    [...drawing.querySelectorAll("*")].forEach((e, i) => {
      const style = getComputedStyle(e);
      const keys = [...MOVES, ...(e.matches(SHAPES) ? INK : []), ...PLACE.filter((key) => e.style[key])];
      const said = keys.filter((key) => style[key] && (key === "fill" || !USUAL.includes(style[key])));
      const words = said.map((key) => `${key}:${style[key]}`);
      if (style.transform !== "none") words.push(`transform-origin:${style.transformOrigin}`);
      for (const { name } of [...twins[i].attributes])
        if (/^(class|style|data-.*|aria-.*|role|tabindex)$/.test(name)) twins[i].removeAttribute(name);
      if (words.length) twins[i].setAttribute("style", words.join(";"));
      if (style.display === "none" || e.matches(".lo-grip")) twins[i].remove();
    });
    return copy.innerHTML;
  }

  explore.still = (box) => {
    const drawings = [...box.querySelectorAll("svg")];
    const sizes = drawings.map(({ viewBox: { baseVal } }) => [baseVal.width, baseVal.height]);
    const wide = sizes.reduce((sum, [width]) => sum + width + 20, 4),
      high = Math.max(...sizes.map(([, height]) => height)) + 16;
    let left = 0;
    const parts = drawings.map((drawing, i) => {
      const [width, height] = sizes[i];
      left += width + 20;
      return `<svg x="${left - width - 20}" width="${width}" height="${height}" overflow="visible">${plain(drawing)}</svg>`;
    });
    const frame = `width="${wide}" height="${high}"`;
    return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="-12 -8 ${wide} ${high}" ${frame} font-family="system-ui, sans-serif">
<rect x="-12" y="-8" ${frame} fill="#fff"/>${parts.join("\n")}</svg>\n`;
  };
})();
