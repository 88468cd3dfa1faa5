// How much of each of two adapters goes into their sum: a puck on a map of what the worse-off task loses.
(() => {
  "use strict";
  const { html, svg, choice, grip, text } = explore.kit;
  const CELLS = 20, // of the map, on a side
    MOST = 15, // points lost at which the map is palest
    BAND = 2.5; // points of one shade
  const LEFT = 46,
    TOP = 12,
    SIDE = 336, // of the map, in its drawing
    KEY = 236; // of the shades
  const RECIPES = [
    ["mean", 1 / 2, 1 / 2],
    ["sum / √2", Math.SQRT1_2, Math.SQRT1_2],
    ["sum", 1, 1],
  ];

  explore.desk = (box, { weights, colours, opens, pairs }) => {
    const most = weights.at(-1),
      count = weights.length;
    const names = [...new Set(pairs.flatMap(({ tasks }) => tasks))];
    const state = { first: opens[0], second: opens[1], at: [Math.SQRT1_2, Math.SQRT1_2], shows: "worse" };
    const find = () => pairs.find(({ tasks }) => tasks.includes(state.first) && tasks.includes(state.second));

    // The share of right texts of task t at any weights, straight between the points of the grid.
    function accuracy(t, [x, y]) {
      const { tasks, right, texts } = find();
      const turned = tasks[0] !== state.first;
      const place = (w) => Math.min(count - 1 - 1e-9, (w / most) * (count - 1));
      const [u, v] = (turned ? [y, x] : [x, y]).map(place);
      const [i, j] = [Math.floor(u), Math.floor(v)];
      const k = turned ? 1 - t : t,
        cell = (a, b) => right[k][a * count + b];
      const low = (1 - v + j) * cell(i, j) + (v - j) * cell(i, j + 1),
        high = (1 - v + j) * cell(i + 1, j) + (v - j) * cell(i + 1, j + 1);
      return ((1 - u + i) * low + (u - i) * high) / texts[k];
    }
    const own = (t) => accuracy(t, t ? [0, 1] : [1, 0]);
    const lost = (t, at) => 100 * (own(t) - accuracy(t, at));
    const shown = (at) => (state.shows === "worse" ? Math.max(lost(0, at), lost(1, at)) : lost(+state.shows, at));
    const few = () => Math.min(...find().texts);
    const error = (p) => 196 * Math.sqrt((p * (1 - p)) / few()); // half of a 95 % interval, in points

    const shade = (points) => Math.max(0, 1 - (Math.floor(Math.max(0, points) / BAND) * BAND) / MOST);

    const px = (w) => LEFT + (SIDE * w) / most,
      py = (w) => TOP + SIDE - (SIDE * w) / most;
    const map = svg("svg", { viewBox: "0 0 400 436", class: "lo-map", role: "img" });
    const size = SIDE / CELLS;
    const cells = Array.from({ length: CELLS * CELLS }, (_, k) => {
      const i = k % CELLS,
        j = Math.floor(k / CELLS);
      const cell = svg("rect", {
        x: LEFT + i * size,
        y: TOP + j * size,
        width: size,
        height: size,
        class: "lo-shade",
      });
      cell.at = [((i + 0.5) * most) / CELLS, ((CELLS - j - 0.5) * most) / CELLS];
      return cell;
    });
    map.append(svg("rect", { x: LEFT, y: TOP, width: SIDE, height: SIDE, class: "lo-trough" }), ...cells);
    for (const w of [0, 0.5, 1, 1.5, 2])
      map.append(
        text([px(w), TOP + SIDE + 18], String(w), "lo-small"),
        text([LEFT - 8, py(w) + 4], String(w), "lo-small", "end"),
      );
    const across = text([px(most / 2), TOP + SIDE + 40], "", "lo-strong lo-one-word");
    const up = svg("text", {
      class: "lo-strong lo-two-word",
      "text-anchor": "middle",
      transform: `translate(12 ${py(most / 2)}) rotate(-90)`,
    });
    const points = svg("g");
    map.append(across, up, points);
    for (let band = 0; band <= MOST; band += BAND) {
      const x = LEFT + (KEY * band) / (MOST + BAND),
        width = (KEY * BAND) / (MOST + BAND);
      const key = svg("rect", { x, y: TOP + SIDE + 56, width, height: 10, class: "lo-shade" });
      key.style.fillOpacity = shade(band);
      map.append(key);
      if (band % 5 === 0) map.append(text([x, TOP + SIDE + 82], String(band), "lo-small", "start"));
    }
    map.append(text([LEFT + KEY + 10, TOP + SIDE + 66], "points lost", "lo-small", "start"));
    const puck = grip(map, "lo-puck", { "aria-hidden": "true" }, ({ x, y }) =>
      go({
        at: [((x - LEFT) / SIDE) * most, ((TOP + SIDE - y) / SIDE) * most].map((w) => Math.max(0, Math.min(most, w))),
      }),
    );

    const bars = svg("svg", { viewBox: "0 0 400 250", class: "lo-mixed", role: "img" });
    const say = html("p", { class: "lo-say" });
    const sliders = [0, 1].map((t) => {
      const input = html("input", {
        type: "range",
        min: 0,
        max: most,
        step: 0.05,
        oninput: () => go({ at: state.at.map((w, i) => (i === t ? +input.value : w)) }),
      });
      return input;
    });
    const labels = sliders.map((input) => html("label", { class: "lo-pick lo-weight" }, html("span"), input));

    const top = html("div", { class: "lo-controls" });
    function controls() {
      const select = (label, key, other) => {
        const found = html("select", {
          onchange: (event) => {
            const chosen = event.target.value;
            go(chosen === state[other] ? { [key]: chosen, [other]: state[key] } : { [key]: chosen });
          },
        });
        for (const name of names) found.append(html("option", { value: name, selected: name === state[key] }, name));
        return html("label", { class: "lo-pick" }, label, found);
      };
      const options = [
        { key: "worse", label: "the worse-off task" },
        { key: "0", label: state.first },
        { key: "1", label: state.second },
      ];
      const held = document.activeElement,
        place = [...top.querySelectorAll("select, input")].indexOf(held);
      top.replaceChildren(
        html("div", { class: "lo-picks" }, select("mix", "first", "second"), select("with", "second", "first")),
        choice("colour: points lost by", options, state.shows, (key) => go({ shows: key })),
      );
      if (place >= 0) top.querySelectorAll("select, input")[place]?.focus();
    }

    function go(change) {
      Object.assign(state, change);
      if (!change.at) {
        controls();
        paint();
      }
      draw();
    }

    // The map, and the familiar recipes on it.
    function paint() {
      for (const cell of cells) {
        cell.style.fillOpacity = shade(shown(cell.at));
      }
      across.textContent = `weight of ${state.first}`;
      up.textContent = `weight of ${state.second}`;
      points.replaceChildren(
        ...RECIPES.flatMap(([name, x, y]) => [
          svg("circle", { cx: px(x), cy: py(y), r: 4, class: "lo-mark" }),
          text([px(x) + 9, py(y) + 4], name, "lo-haloed", "start"),
        ]),
        ...[
          [1, 0],
          [0, 1],
        ].flatMap(([x, y]) => [
          svg("circle", { cx: px(x), cy: py(y), r: 4, class: "lo-mark" }),
          text([px(x) + 9, py(y) + (x ? -8 : 4)], "alone", "lo-haloed", "start"),
        ]),
      );
    }

    function draw() {
      puck.to([px(state.at[0]), py(state.at[1])]);
      const tasks = [state.first, state.second];
      const now = tasks.map((_, t) => accuracy(t, state.at));
      const scale = (v) => 8 + (384 * (100 * v - 20)) / 80;
      bars.replaceChildren(
        ...[20, 40, 60, 80, 100].map((v) => text([scale(v / 100), 240], v === 100 ? "100 %" : String(v), "lo-small", v === 100 ? "end" : "middle")),
        ...tasks.flatMap((task, t) => {
          const y = 62 + 100 * t,
            [base, best] = [accuracy(t, [0, 0]), own(t)],
            half = error(now[t]) / 100;
          const mark = (v, words, anchor) => [
            svg("rect", { x: scale(v) - 1, y: y - 9, width: 2, height: 18, class: "lo-own" }),
            text([scale(v), y + 26], words, "lo-small", anchor),
          ];
          return [
            text([8, y - 28], task, "lo-strong", "start"),
            text([392, y - 28], `${(100 * now[t]).toFixed(0)} % right`, "lo-strong", "end"),
            svg("rect", { x: 8, y: y - 4, width: 384, height: 8, class: "lo-track" }),
            ...mark(base, "base", "end"),
            ...mark(best, "alone", "start"),
            svg("rect", {
              x: scale(now[t] - half),
              y: y - 1,
              width: scale(Math.min(1, now[t] + half)) - scale(now[t] - half),
              height: 2,
              class: "lo-range",
            }),
            svg("circle", { cx: scale(now[t]), cy: y, r: 8, class: "lo-dot", fill: colours[task] }),
          ];
        }),
      );
      labels.forEach((label, t) => {
        label.firstChild.textContent = `${state.at[t].toFixed(2)} × ${tasks[t]}`;
        sliders[t].value = state.at[t];
      });
      const losses = [0, 1].map((t) => lost(t, state.at)),
        worse = losses[1] > losses[0] ? 1 : 0;
      const points = (x) => `${x < 0 ? "−" : ""}${Math.abs(x).toFixed(1)}`;
      say.textContent =
        `${state.at[0].toFixed(2)} × ${tasks[0]} + ${state.at[1].toFixed(2)} × ${tasks[1]}: ${tasks[0]} loses ` +
        `${points(losses[0])} points against its adapter alone, ${tasks[1]} ${points(losses[1])}; the worse off is ` +
        `${tasks[worse]}. Of ${few()} texts a task, so an accuracy here is good to ±${error(now[worse]).toFixed(0)} points: ` +
        `neighbouring shades are not told apart.`;
      map.setAttribute("aria-label", `Points of accuracy that are lost, for every two weights. ${say.textContent}`);
      bars.setAttribute("aria-label", tasks.map((task, t) => `${task} ${(100 * now[t]).toFixed(0)} % right`).join(", "));
      box.numbers = { tasks, at: state.at, accuracy: now, lost: losses };
    }

    box.append(top, html("div", { class: "lo-two-up" }, map, html("div", {}, bars, ...labels)), say);
    controls();
    paint();
    draw();
  };
})();
