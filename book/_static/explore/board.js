// Two adapters, all modules on a board, one of them on the dial; and what turning lora2 by an element of a group moves.
// The cross-Gram matrices UᵀU′ and VᵀV′ and the two spectra are all that it takes.
(() => {
  "use strict";
  const { html, choice, numbers } = explore.kit;
  const { dot, times, block, squares, singularValues, orthonormal, normal, gaussian } = explore.linear;
  const { needles, measures, told, NAMES, DEGREE } = explore;
  const SIDES = [
    { key: 0, label: "outputs", spoken: "outputs, the left singular vectors" },
    { key: 1, label: "inputs", spoken: "inputs, the right singular vectors" },
  ];
  const GROUPS = {
    none: ["as trained", ""],
    signs: [
      "signs",
      "Some of lora2's singular vectors change sign, on this side only. No φ of any k sees it, and the update is another one.",
    ],
    ok: [
      "O(k)",
      "The k leading vectors of lora2 are mixed among themselves. They span what they spanned, so no angle at this k moves; at fewer directions, and in the update, it shows.",
    ],
    gl: [
      "GL(r)",
      "B becomes BG, and A becomes G⁻¹A. The update stays, and with it every angle; but fewer than r columns of B, or rows of A, are no longer the ones they were.",
    ],
    on: [
      "O(n)",
      "The whole space is turned under lora2. Nothing on this side is left, and the needles stand about where chance puts them.",
    ],
  };

  // [{cross: [UᵀU′, VᵀV′], spectra: [σ, σ′] over their norms}], one a module
  function unpack({ numbers: text }, r, count) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const all = Float64Array.from(new Int16Array(bytes.buffer), (v) => v / 32767);
    const each = 2 * r * r + 2 * r;
    return Array.from({ length: count }, (_, m) => {
      const part = all.subarray(m * each, (m + 1) * each);
      const matrix = (from) =>
        Array.from({ length: r }, (_, i) => Array.from(part.subarray(from + i * r, from + (i + 1) * r)));
      return {
        cross: [matrix(0), matrix(r * r)],
        spectra: [0, r].map((o) => Array.from(part.subarray(2 * r * r + o, 2 * r * r + o + r))),
      };
    });
  }

  // lora2 turned by a random element of a group on one side: the new cross-Gram matrices, and what multiplies its factor
  function turned(group, { cross }, { side, k, n, seed }) {
    const draw = normal(seed),
      r = cross[0].length,
      C = cross[side];
    const identity = Array.from({ length: r }, (_, i) => Array.from({ length: r }, (_, j) => +(i === j)));
    let next = C,
      factor = identity;
    if (group === "signs") {
      const signs = identity.map(() => (draw() < 0 ? -1 : 1));
      next = C.map((row) => row.map((v, j) => v * signs[j]));
    } else if (group === "ok") {
      const Q = orthonormal(gaussian(k, k, draw));
      const whole = identity.map((row, i) => row.map((v, j) => (i < k && j < k ? Q[i][j] : v)));
      next = times(C, whole);
    } else if (group === "gl") {
      const [P, Q] = [0, 1].map(() => orthonormal(gaussian(r, r, draw)));
      const stretch = identity.map(() => Math.exp(draw())); // G = P S Q on the left, G⁻ᵀ = P S⁻¹ Q on the right
      factor = times(
        P.map((row) => row.map((v, j) => v * stretch[j] ** (side ? -1 : 1))),
        Q,
      );
    } else if (group === "on") next = block(orthonormal(gaussian(n, r, draw)), r); // lora1's frame are the first axes
    return { cross: cross.map((M, i) => (i === side ? next : M)), factor };
  }

  // Where needles stand, and four numbers that a turn moves or does not.
  function read({ cross, factor }, { spectra: [s, t] }, side, k) {
    const C = cross[side];
    const angles = singularValues(block(C, k)).map((c) => Math.acos(Math.min(1, c)) * DEGREE);
    const columns = orthonormal(factor.map((row, i) => row.slice(0, k).map((v) => v * Math.sqrt(t[i]))));
    return {
      angles,
      phi: squares(block(C, k)) / k,
      half: k > 1 ? squares(block(C, k / 2)) / (k / 2) : NaN,
      cosine: dot(
        s,
        cross[0].map((row, i) =>
          dot(
            row,
            t.map((x, j) => x * cross[1][i][j]),
          ),
        ),
      ),
      factor: squares(times(C.slice(0, k), columns)) / k,
    };
  }

  function board(box, data) {
    const { pairs, kinds, layers, rank: r, sizes, ks } = data;
    const state = { pair: 0, side: 0, k: 8, at: 3, group: "none", press: 0 };
    const unpacked = [];
    const dial = needles();
    const values = numbers(NAMES);
    const say = html("p", { class: "lo-say" });
    const changed = (key) => (value) => {
      state[key] = value;
      draw();
    };
    const change = (event) => changed("pair")(event.target.selectedIndex);
    const pair = html(
      "select",
      { "aria-label": "adapters", onchange: change },
      ...pairs.map(({ label }) => html("option", {}, label)),
    );

    const cells = sizes.map((_, m) =>
      html("button", { type: "button", class: "lo-cell", tabindex: -1, onclick: () => changed("at")(m) }),
    );
    const grid = html(
      "div",
      { class: "lo-grid", role: "group", "aria-label": "φ over chance in every module" },
      html("span", { class: "lo-kind lo-top" }, "layer"),
    );
    for (let layer = 0; layer < layers; layer++) grid.append(html("span", { class: "lo-top" }, String(layer)));
    kinds.forEach((kind, i) =>
      grid.append(html("span", { class: "lo-kind" }, kind), ...cells.slice(i * layers, (i + 1) * layers)),
    );
    grid.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: layers, ArrowUp: -layers }[event.key];
      if (step === undefined) return;
      event.preventDefault();
      if (state.at + step in cells) changed("at")(state.at + step);
      cells[state.at].focus();
    });
    const total = html("p", { class: "lo-total" });

    const turns = Object.entries(GROUPS).map(([key, [label]]) => {
      const press = () => {
        state.group = key;
        state.press++;
        draw();
      };
      return [key, html("button", { type: "button", onclick: press }, label)];
    });
    const moved = html("table", { class: "lo-moved" });
    const why = html("p", { class: "lo-say" });

    let drawn = {};
    function draw() {
      const { side, k, at, group } = state;
      const modules = (unpacked[state.pair] ??= unpack(pairs[state.pair], r, sizes.length));
      const key = [state.pair, side, group, state.press, group === "ok" && k].join();
      if (key !== drawn.key) drawn = { key, list: [] }; // random spaces of 1536 dimensions take a moment
      const turn = (m) =>
        (drawn.list[m] ??= turned(group, modules[m], { side, k, n: sizes[m][side], seed: 1000 * state.press + m }));
      const all = modules.map((each, m) => (m === at ? null : squares(block(turn(m).cross[side], k)) / k));
      const before = read(turned("none", modules[at], { side, k }), modules[at], side, k);
      const now = read(turn(at), modules[at], side, k);
      all[at] = now.phi;
      cells.forEach((cell, m) => {
        const times = all[m] / (k / sizes[m][side]);
        cell.textContent = times < 9.95 ? times.toFixed(1) : times.toFixed(0);
        cell.style.setProperty("--tint", Math.min(1, Math.max(0, Math.log2(times) / 4)).toFixed(3));
        cell.setAttribute("aria-pressed", m === at);
        cell.setAttribute(
          "aria-label",
          `${kinds[Math.floor(m / layers)]}, layer ${m % layers}: ${cell.textContent} times chance`,
        );
        cell.tabIndex = m === at ? 0 : -1;
      });
      const n = sizes[at][side],
        chance = k / n;
      dial.draw({
        angles: now.angles,
        chance,
        usual: data.chance[`${n},${k}`],
        before: group === "none" ? undefined : before.angles,
      });
      const found = measures(now.angles);
      values.say(told(found, chance, k));
      say.textContent = `${kinds[Math.floor(at / layers)]} of layer ${at % layers}, n = ${n}. Grey: where the needles of random subspaces stand.`;
      const means = [all, sizes.map((size) => k / size[side])].map(
        (list) => list.reduce((a, b) => a + b) / list.length,
      );
      total.textContent = `all ${sizes.length}: mean φ ${means[0].toFixed(3)}, chance ${means[1].toFixed(3)}`;

      turns.forEach(([key, button]) => button.setAttribute("aria-pressed", key === group));
      const letter = "BA"[side];
      const rows = [
        [`φ of the ${k > 1 ? `${k} leading directions` : "leading direction"}`, before.phi, now.phi],
        ...(k > 1 ? [[`φ of the ${k / 2 > 1 ? `${k / 2} leading ones` : "leading one"}`, before.half, now.half]] : []),
        [
          `φ of the first ${k > 1 ? `${k} ` : ""}${side ? "row" : "column"}${k > 1 ? "s" : ""} of ${letter}`,
          before.factor,
          now.factor,
        ],
        ["cosine of the updates", before.cosine, now.cosine],
      ];
      const said = (x) => (x.toFixed(3) === "-0.000" ? "0.000" : x.toFixed(3).replace("-", "−"));
      const still = (x, y) => Math.abs(x - y) < 1e-6;
      moved.replaceChildren(
        html("caption", {}, "What moves"),
        ...rows.map(([name, x, y]) =>
          html(
            "tr",
            { class: still(x, y) ? "" : "lo-changed" },
            html("th", { scope: "row" }, name),
            html("td", {}, said(x)),
            html("td", {}, group === "none" ? "" : still(x, y) ? "stands still" : `→ ${said(y)}`),
          ),
        ),
      );
      why.textContent =
        GROUPS[group][1] || "Press a group: lora2 is turned by a random element of it. Press again for another.";
      box.numbers = { ...found, ...now, chance, all, means, before };
    }

    box.append(
      html(
        "div",
        { class: "lo-controls" },
        html("label", { class: "lo-pick" }, pair),
        choice("side", SIDES, 0, changed("side")),
        choice(
          "k",
          ks.map((key) => ({ key })),
          8,
          changed("k"),
        ),
      ),
      html(
        "div",
        { class: "lo-two-up" },
        html("div", {}, html("p", { class: "lo-total" }, "φ over chance, by kind and layer; press one"), grid, total),
        html("div", {}, dial.drawing),
      ),
      say,
      values.box,
      html(
        "div",
        { class: "lo-turns" },
        html(
          "div",
          { class: "lo-choice", role: "group", "aria-label": "turn lora2 by" },
          html("span", { class: "lo-legend" }, "turn lora2 by"),
          ...turns.map(([, b]) => b),
        ),
        moved,
        why,
      ),
    );
    return draw;
  }
  explore.board = board;
})();
