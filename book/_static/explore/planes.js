// Two planes: lora1 is the floor, lora2 is pulled off it by its tips, and its shadow falls on the floor. The half axes
// of the shadow are the cosines of the principal angles, in three dimensions and in four, so the shadow is exact where
// the drawing of a fourth direction can only be a projection.
(() => {
  "use strict";
  const { html, svg, handle, line, shape, text, numbers } = explore.kit;
  const { needles, measures, told, NAMES, DEGREE } = explore;
  const [AT, SIZE] = [[200, 212], 150]; // the middle of the floor, and its radius
  const AXES = [
    [0.44, 0.42],
    [0.93, -0.16],
    [0, -1],
    [-0.75, 0.6],
  ]; // four directions, on the page
  const place = (v) => [0, 1].map((i) => AT[i] + SIZE * v.reduce((sum, x, j) => sum + x * AXES[j][i], 0));
  const mix = (a, u, b, v) => u.map((x, i) => a * x + b * v[i]);
  const times = (a, u) => u.map((x) => a * x);
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
    const [back, front, words] = [0, 1, 2].map(() => svg("g"));
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
      const v = angles.map((angle, i) => tip(i, angle));
      const mean = angles.map((angle, i) => tip(i, angle / 2));
      const foot = angles.map((angle, i) => times(Math.cos(angle / DEGREE), E[i]));
      const chance = 2 / n;
      const fair = [0, 1].map((i) => times(Math.sqrt(chance), E[i]));
      const disc = ([u, w], look) => shape(ring(u, w), look);
      const half = ([u, w], look, from) => line(ring(u, w, from, from + 180), look);
      const stroke = (ends, look) => line(ends.map(place), look);
      const arc = (i) =>
        line(
          Array.from({ length: 46 }, (_, j) => place(tip(i, 2 * j))),
          "lo-rule",
        );
      back.replaceChildren(
        ...(n === 4 ? [arc(0)] : []),
        arc(1),
        half(mean, "lo-three lo-plane lo-dash", 180), // what is under the floor
        half(v, "lo-two lo-plane", 180),
        disc(E, "lo-one lo-plane"),
        disc(foot, "lo-shadow"),
        disc(fair, "lo-fair"),
      );
      front.replaceChildren(
        half(mean, "lo-three lo-plane lo-dash", 0),
        half(v, "lo-two lo-plane", 0),
        stroke([v[1], foot[1]], "lo-drop"),
        n === 4 ? stroke([v[0], foot[0]], "lo-drop") : stroke([times(-1, E[0]), E[0]], "lo-shared"),
      );
      const label = (at, across, down, words, look, anchor = "start") =>
        text(
          place(at).map((x, i) => x + [across, down][i]),
          words,
          look,
          anchor,
        );
      words.replaceChildren(
        label(v[1], 17, 5, "lora2", "lo-strong lo-two-word"),
        label(mix(-0.32, E[0], -0.95, E[1]), -6, -6, "lora1", "lo-strong lo-one-word", "end"),
        label(mean[1], 9, 5, angles[1] > 24 ? "lora3" : "", "lo-strong lo-three-word"),
        label(mix(0.1, E[0], -0.6, foot[1]), 0, 4, angles[1] < 75 ? "shadow" : "", "lo-small", "middle"),
        label(mix(0.75, fair[0], 0.66, fair[1]), 6, 5, "chance", "lo-small"),
        n === 3
          ? label(E[0], 4, 20, "shared line, θ₁ = 0°", "lo-small")
          : label(v[0], 0, 28, "into a fourth direction", "lo-small", "middle"),
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
