// The dial: a needle a principal angle, from lora1 lying at 0°. Below it, to the scale of the radius, what φ adds up:
// the squared cosine of every needle, over their count.
(() => {
  "use strict";
  const { svg, line, text } = explore.kit;
  const [X, Y, R] = [34, 322, 300]; // the hinge, and the length of a needle
  const [TOP, HIGH] = [346, 16]; // of the bar
  const DEGREE = 180 / Math.PI;
  const at = (degrees, radius = R) => [
    X + radius * Math.cos(degrees / DEGREE),
    Y - radius * Math.sin(degrees / DEGREE),
  ];
  const moved = ([x, y], across, down) => [x + across, y + down];

  function needles() {
    const [scale, marks, hands, sums, names] = Array.from({ length: 5 }, () => svg("g"));
    const drawing = svg("svg", { viewBox: "0 0 400 404", role: "img" }, scale, marks, hands, sums, names);
    const arc = Array.from({ length: 91 }, (_, a) => at(a));
    scale.append(line(arc, "lo-rule"));
    for (let a = 15; a < 90; a += 15) scale.append(line([at(a, R - 5), at(a)], "lo-rule"));
    scale.append(svg("rect", { x: X, y: TOP, width: R, height: HIGH, class: "lo-trough" }));
    scale.append(text([X - 8, TOP + 13], "φ", "lo-strong", "end"), line([at(0, 0), at(0)], "lo-one lo-thick"));

    const pool = [];
    const needle = (i) =>
      (pool[i] ??= (() => {
        const lying = (radius, look) => line([at(0, 0), at(0, radius)], look);
        const [cx, cy] = at(0, R * 0.97);
        const found = {
          ghost: lying(R * 0.97, "lo-ghost"),
          three: lying(R * 0.6, "lo-three lo-dash"),
          two: svg("g", { class: "lo-two" }, lying(R * 0.97, "lo-thick"), svg("circle", { cx, cy, r: 4.5 })),
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
      marks.replaceChildren(...usual.map((a) => line([at(a, R * 0.9), at(a)], "lo-chance")));
      if (few)
        marks.append(
          ...angles
            .map((a) => at(a, R * 0.97))
            .map(([x, y]) =>
              line(
                [
                  [x, y],
                  [x, Y],
                ],
                "lo-drop",
              ),
            ),
        );

      const most = Math.max(...angles);
      const least = Math.min(...angles);
      const shown = few ? angles.map((a, i) => [a, `θ${"₁₂"[i]} = ${Math.round(a)}°`]) : [[least, "lora2"]];
      if (shown.length === 2 && most - least < 5) shown.splice(0, 2, [most, `θ₁, θ₂ = ${Math.round(most)}°`]);
      const labels = shown.map(([a, words]) => {
        const flat = few && a < 12; // beside the end of the arc there is no room
        const look = few ? "lo-strong" : "lo-strong lo-two-word";
        return text(moved(at(a, R + 8), flat ? 16 : 0, flat ? -8 : 2), words, look, flat ? "end" : "start");
      });
      labels.push(text(moved(at(0), 8, 5), "lora1", "lo-strong lo-one-word", "start"));
      if (most > 12)
        labels.push(text(moved(at(most / 2, R * 0.6 + 6), 0, 4), "lora3", "lo-strong lo-three-word", "start"));
      for (const a of [30, 60, 90])
        if (!shown.some(([other]) => Math.abs(other - a) < 9))
          labels.push(text(moved(at(a, R + 18), 0, 4), `${a}°`, "lo-small"));

      const phi = sum / R;
      const edge = X + R * chance;
      const room = chance < 0.72;
      const mark = line(
        [
          [edge, TOP - 5],
          [edge, TOP + HIGH + 6],
        ],
        "lo-mark",
      );
      const by = text(
        [edge + (room ? 5 : -5), TOP + HIGH + 18],
        `chance ${chance.toFixed(3)}`,
        "lo-small",
        room ? "start" : "end",
      );
      names.replaceChildren(...labels, mark, by, text([X + R + 8, TOP + 13], phi.toFixed(3), "lo-strong", "start"));
      const spoken = angles.map((a) => `${Math.round(a)}°`).join(", ");
      const label = `Needles at ${spoken}; φ ${phi.toFixed(3)}, by chance ${chance.toFixed(3)}`;
      drawing.setAttribute("aria-label", label);
    }
    return { drawing, draw, tip: (degrees) => at(degrees, R * 0.97) };
  }

  // What the package computes of the same angles: lora3, the mean of two subspaces, halves them.
  function measures(angles) {
    const k = angles.length;
    const mean = (f) => angles.reduce((sum, a) => sum + f(a / DEGREE), 0) / k;
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
