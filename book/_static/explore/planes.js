// Two planes: lora1 is the floor, lora2 is pulled off it by its tips, and its shadow falls on the floor. The half axes
// of the shadow are the cosines of the principal angles, in three dimensions and in four, so the shadow is exact where
// the drawing of a fourth direction can only be a projection.
(() => {
  "use strict";
  const { html, svg, handle, path, numbers } = explore.kit;
  const { needles, measures, told, NAMES, DEGREE } = explore;
  const AT = [200, 212],
    SIZE = 150;
  const AXES = [
    [0.44, 0.42],
    [0.93, -0.16],
    [0, -1],
    [-0.75, 0.6],
  ]; // of four directions, on the page
  const place = (v) => [0, 1].map((i) => AT[i] + SIZE * v.reduce((sum, x, j) => sum + x * AXES[j][i], 0));
  const mix = (a, u, b, v) => u.map((x, i) => a * x + b * v[i]);
  const E = [0, 1, 2, 3].map((i) => [0, 1, 2, 3].map((j) => +(i === j)));
  // The rim of a disc, or the half of it on the side of ±v.
  const ring = (u, v, from = 0, to = 360) =>
    Array.from({ length: (to - from) / 5 + 1 }, (_, i) => (from + 5 * i) / DEGREE).map((a) =>
      place(mix(Math.cos(a), u, Math.sin(a), v)),
    );
  // The tips of a plane at these angles: the first lifts into the fourth direction, the second into the third.
  const tip = (i, angle) => mix(Math.cos(angle / DEGREE), E[i], Math.sin(angle / DEGREE), E[3 - i]);

  function planes(box) {
    const state = { n: 3, angles: [0, 60] };
    const back = svg("g"),
      front = svg("g"),
      words = svg("g");
    const scene = svg("svg", { viewBox: "0 0 400 390", role: "group", "aria-label": "two planes" }, back, front, words);
    const dial = needles();
    const values = numbers(NAMES);
    const say = html("p", { class: "lo-say" });
    const tilt = (i) => (angle) => {
      state.angles[i] = angle;
      draw();
    };
    const common = { min: 0, max: 90, step: 1, look: "lo-two" };
    const grips = [0, 1].map((i) => [
      handle(scene, {
        ...common,
        label: i ? "tilt of lora2" : "tilt of lora2 into a fourth dimension",
        at: (angle) => place(tip(i, angle)),
        said: (angle) => `${angle}°, φ ${measures(state.angles).phi.toFixed(3)}`,
        changed: tilt(i),
      }),
      handle(dial.drawing, { ...common, at: dial.tip, changed: tilt(i), spoken: false }),
    ]);

    function draw() {
      const { n, angles } = state;
      const v = angles.map((angle, i) => tip(i, angle)),
        half = angles.map((angle, i) => tip(i, angle / 2));
      const foot = angles.map((angle, i) => mix(Math.cos(angle / DEGREE), E[i], 0, E[i]));
      const chance = 2 / n,
        fair = Math.sqrt(chance);
      const line = (points, look) => svg("path", { d: path(points.map(place), false), class: look });
      const disc = (u, w, look, ...half) => svg("path", { d: path(ring(u, w, ...half), !half.length), class: look });
      const arc = (i) =>
        svg("path", {
          d: path(
            Array.from({ length: 46 }, (_, j) => place(tip(i, 2 * j))),
            false,
          ),
          class: "lo-rule",
        });
      back.replaceChildren(
        ...(n === 4 ? [arc(0)] : []),
        arc(1),
        disc(...half, "lo-three lo-plane lo-dash", 180, 360),
        disc(...v, "lo-two lo-plane", 180, 360), // what is under the floor
        disc(E[0], E[1], "lo-one lo-plane"),
        disc(...foot, "lo-shadow"),
        disc(mix(fair, E[0], 0, E[0]), mix(fair, E[1], 0, E[1]), "lo-fair"),
      );
      front.replaceChildren(
        disc(...half, "lo-three lo-plane lo-dash", 0, 180),
        disc(...v, "lo-two lo-plane", 0, 180),
        line([v[1], foot[1]], "lo-drop"),
        ...(n === 4 ? [line([v[0], foot[0]], "lo-drop")] : [line([E[0].map((x) => -x), E[0]], "lo-shared")]),
      );
      const label = (point, dx, dy, text, look, anchor = "start") =>
        svg("text", { x: point[0] + dx, y: point[1] + dy, class: look, "text-anchor": anchor }, text);
      words.replaceChildren(
        label(place(v[1]), 17, 5, "lora2", "lo-strong lo-two-word"),
        label(place(mix(-0.32, E[0], -0.95, E[1])), -6, -6, "lora1", "lo-strong lo-one-word", "end"),
        label(place(half[1]), 9, 5, angles[1] > 24 ? "lora3" : "", "lo-strong lo-three-word"),
        label(place(mix(0.1, E[0], -0.6, foot[1])), 0, 4, angles[1] < 75 ? "shadow" : "", "lo-small", "middle"),
        label(place(mix(0.75 * fair, E[0], 0.66 * fair, E[1])), 6, 5, "chance", "lo-small"),
        n === 3
          ? label(place(E[0]), 4, 20, "shared line, θ₁ = 0°", "lo-small")
          : label(place(v[0]), 0, 28, "into a fourth direction", "lo-small", "middle"),
      );
      grips[0].forEach(({ g }) => (g.style.display = n === 4 ? "" : "none"));
      grips.forEach((both, i) => both.forEach((grip) => grip.set(angles[i])));
      const sorted = [...angles].sort((a, b) => a - b);
      dial.draw({ angles: sorted, chance });
      const found = measures(sorted);
      values.say(told(found, chance, 2));
      say.textContent =
        n === 3
          ? "Two planes in space share a line, so one needle stays at 0°, and φ never falls below ½. Chance is ⅔."
          : "In four dimensions both needles are free, and φ can fall to 0. Chance is ½.";
      box.numbers = { ...found, angles: sorted, chance };
    }

    box.append(
      html("div", { class: "lo-two-up" }, html("div", {}, scene), html("div", {}, dial.drawing)),
      values.box,
      say,
    );
    return (n) => {
      state.n = n;
      state.angles[0] = n === 3 ? 0 : 35;
      draw();
    };
  }
  explore.planes = planes;
})();
