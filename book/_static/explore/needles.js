// The dial: a needle a principal angle, from lora1 lying at 0°. Below it, to the scale of the radius, what φ adds up:
// the squared cosine of every needle, over their count.
(() => {
  "use strict";
  const { svg, path } = explore.kit;
  const X = 34,
    Y = 322,
    R = 300,
    TOP = 346,
    HIGH = 16;
  const DEGREE = 180 / Math.PI;
  const at = (degrees, radius = R) => [
    X + radius * Math.cos(degrees / DEGREE),
    Y - radius * Math.sin(degrees / DEGREE),
  ];
  const text = ([x, y], words, look, anchor = "middle") =>
    svg("text", { x, y, class: look, "text-anchor": anchor }, words);

  function needles() {
    const scale = svg("g"),
      marks = svg("g"),
      hands = svg("g"),
      sums = svg("g", { class: "lo-sums" }),
      names = svg("g");
    const drawing = svg("svg", { viewBox: "0 0 400 404", role: "img" }, scale, marks, hands, sums, names);
    scale.append(
      svg("path", {
        d: path(
          Array.from({ length: 91 }, (_, a) => at(a)),
          false,
        ),
        class: "lo-rule",
      }),
    );
    for (let a = 15; a < 90; a += 15)
      scale.append(svg("path", { d: path([at(a, R - 5), at(a, R)], false), class: "lo-rule" }));
    scale.append(svg("rect", { x: X, y: TOP, width: R, height: HIGH, class: "lo-trough" }));
    scale.append(
      text([X - 8, TOP + 13], "φ", "lo-strong", "end"),
      svg("path", { d: path([at(0, 0), at(0)], false), class: "lo-one lo-thick" }),
    );

    const pool = [];
    const needle = (i) =>
      (pool[i] ??= (() => {
        const turning = (look, radius) =>
          svg("path", {
            d: path(
              [
                [X, Y],
                [X + radius, Y],
              ],
              false,
            ),
            class: look,
          });
        const found = {
          ghost: turning("lo-ghost", R * 0.97),
          three: turning("lo-three lo-dash", R * 0.6),
          two: svg(
            "g",
            { class: "lo-two" },
            turning("lo-thick", R * 0.97),
            svg("circle", { cx: X + R * 0.97, cy: Y, r: 4.5 }),
          ),
          sum: svg("rect", { y: TOP, height: HIGH, class: "lo-part" }),
        };
        hands.append(found.ghost, found.three, found.two);
        sums.append(found.sum);
        return found;
      })());
    const turn = (e, degrees) => (e.style.transform = `rotate(${-degrees}deg)`);

    // angles and `before` in degrees; `chance` is the expectation of φ, `usual` where random needles stand
    function draw({ angles, chance, usual = [], before }) {
      const few = angles.length <= 2;
      angles.forEach((_, i) => needle(i));
      let sum = 0;
      pool.forEach((each, i) => {
        for (const e of Object.values(each)) e.style.display = i < angles.length ? "" : "none";
        if (i >= angles.length) return;
        turn(each.two, angles[i]);
        turn(each.three, angles[i] / 2);
        turn(each.ghost, before?.[i] ?? 0);
        if (!before) each.ghost.style.display = "none";
        const width = (R * Math.cos(angles[i] / DEGREE) ** 2) / angles.length;
        Object.assign(each.sum.style, { x: `${X + sum}px`, width: `${Math.max(0, width - (few ? 1.5 : 0.5))}px` });
        sum += width;
      });
      marks.replaceChildren(
        ...usual.map((a) => svg("path", { d: path([at(a, R * 0.9), at(a, R)], false), class: "lo-chance" })),
      );
      if (few)
        angles.forEach((a) => {
          const [x, y] = at(a, R * 0.97);
          if (a > 1)
            marks.append(
              svg("path", {
                d: path(
                  [
                    [x, y],
                    [x, Y],
                  ],
                  false,
                ),
                class: "lo-drop",
              }),
            );
        });

      const labels = [];
      const shown = few ? angles.map((a, i) => ({ a, words: `θ${"₁₂"[i]} = ${Math.round(a)}°` })) : [];
      if (shown.length === 2 && Math.abs(shown[0].a - shown[1].a) < 5)
        shown.splice(0, 2, { a: angles[1], words: `θ₁, θ₂ = ${Math.round(angles[1])}°` });
      for (const { a, words } of shown) {
        const [x, y] = at(a, R + 8);
        labels.push(
          text([a < 12 ? Math.min(x, 392) : x, a < 12 ? y - 8 : y + 2], words, "lo-strong", a < 12 ? "end" : "start"),
        );
      }
      labels.push(text([X + R + 8, Y + 5], "lora1", "lo-strong lo-one-word", "start"));
      const [x3, y3] = at(Math.max(...angles) / 2, R * 0.6 + 6);
      labels.push(text([x3, y3 + 4], Math.max(...angles) > 12 ? "lora3" : "", "lo-strong lo-three-word", "start"));
      if (!few)
        labels.push(
          text(
            at(Math.min(...angles), R + 8).map((v) => v + 2),
            "lora2",
            "lo-strong lo-two-word",
            "start",
          ),
        );
      for (const a of [30, 60, 90])
        if (![...shown.map((each) => each.a), few ? -90 : Math.min(...angles)].some((b) => Math.abs(b - a) < 9))
          labels.push(
            text(
              at(a, R + 18).map((v, i) => v + 4 * i),
              `${a}°`,
              "lo-small",
            ),
          );
      const phi = sum / R,
        edge = X + R * chance;
      const right = chance < 0.72;
      labels.push(
        svg("path", {
          d: path(
            [
              [edge, TOP - 5],
              [edge, TOP + HIGH + 6],
            ],
            false,
          ),
          class: "lo-mark",
        }),
        text(
          [edge + (right ? 5 : -5), TOP + HIGH + 18],
          `chance ${chance.toFixed(3)}`,
          "lo-small",
          right ? "start" : "end",
        ),
        text([X + R + 8, TOP + 13], phi.toFixed(3), "lo-strong", "start"),
      );
      names.replaceChildren(...labels);
      const spoken = angles.map((a) => `${Math.round(a)}°`).join(", ");
      drawing.setAttribute(
        "aria-label",
        `${angles.length === 1 ? "One needle" : `${angles.length} needles`}: ${spoken}; φ ${phi.toFixed(3)}, by chance ${chance.toFixed(3)}`,
      );
    }
    return { drawing, draw, tip: (degrees) => at(degrees, R * 0.97) };
  }

  // What the package computes of the same angles: lora3, the mean of two subspaces, halves them.
  function measures(angles) {
    const k = angles.length,
      mean = (f) => angles.reduce((sum, a) => sum + f(a / DEGREE), 0) / k;
    return {
      phi: mean((a) => Math.cos(a) ** 2),
      chordal: Math.sqrt(k * mean((a) => Math.sin(a) ** 2)),
      third: mean((a) => Math.cos(a / 2) ** 2),
    };
  }
  const NAMES = ["φ of lora1 and lora2", "times chance", "chordal distance", "φ of lora3 and either"];
  const told = ({ phi, chordal, third }, chance, k) => [
    [phi.toFixed(3)],
    [(phi / chance).toFixed(phi < 2 * chance ? 2 : 1), ` × ${chance.toFixed(3)}`],
    [chordal.toFixed(2), ` of ${Math.sqrt(k).toFixed(2)}`],
    [third.toFixed(3)],
  ];

  Object.assign(explore, { needles, measures, told, NAMES, DEGREE });
})();
