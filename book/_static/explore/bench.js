// The merge bench: a method, a rank, a length and a set of adapters, and how far between the base model and its own
// adapter every task comes. Only what was measured can be chosen, and what was shown before stays as a ring.
(() => {
  "use strict";
  const { html, svg, choice } = explore.kit;
  const ROW = 34,
    HEAD = 92,
    LEFT = 86,
    DOT = 6.5,
    FLOOR = 30;
  const RANKS = [
    { key: null, label: "as it comes" },
    { key: 16, label: "16" },
  ];
  const percent = (x) => `${x.toFixed(0)} %`;

  explore.bench = (box, { steps, colours, opens, sets }) => {
    const PLAIN = "task arithmetic";
    const state = { set: 0, label: opens, rank: null, at: "chosen" };
    let before = { ...state, label: PLAIN },
      width = 0;
    const everyTask = sets[0].tasks;
    const find = ({ set, label, rank }) => sets[set].rows.find((row) => row.label === label && row.rank === rank);

    // What is asked for, or the nearest thing to it that was measured.
    function go(change) {
      const next = { ...state, ...change };
      if (!find(next)) next.rank = sets[next.set].rows.find((row) => row.label === next.label)?.rank;
      if (!find(next)) Object.assign(next, { label: PLAIN, rank: null });
      if (!(next.at in find(next).at)) next.at = "chosen";
      before = next.set === state.set ? { ...state } : { set: next.set, label: PLAIN, rank: null, at: "chosen" };
      Object.assign(state, next);
      controls();
      draw();
    }

    const top = html("div", { class: "lo-controls" });
    const drawing = svg("svg", { role: "img", class: "lo-bench" });
    const say = html("p", { class: "lo-say" });
    const select = (label, options, value, changed) => {
      const found = html("select", { onchange: (event) => changed(event.target.value) });
      for (const [key, text, off] of options)
        found.append(html("option", { value: key, selected: key === value, disabled: off }, text));
      return html("label", { class: "lo-pick" }, label, found);
    };

    function controls() {
      const held = document.activeElement,
        place = [...top.querySelectorAll("select, input")].indexOf(held);
      const { rows, tasks } = sets[state.set],
        row = find(state);
      const gain = (label) =>
        rows.find((r) => r.label === label && r.rank === state.rank) ?? rows.find((r) => r.label === label);
      const labels = [...new Set(rows.map((r) => r.label))].sort(
        (a, b) => gain(b).at.chosen.gain[0] - gain(a).at.chosen.gain[0],
      );
      const options = labels.map((label) => [label, `${label}, ${percent(gain(label).at.chosen.gain[0])}`]);
      const ranks = RANKS.filter(({ key }) => rows.some((r) => r.label === state.label && r.rank === key));
      const lengths = Object.keys(row.at).sort((a, b) => (a === "chosen" ? -1 : b === "chosen" ? 1 : a - b));
      const words = (key) =>
        key !== "chosen" ? steps[key] : row.natural ? "the method's own" : "chosen on validation";
      const pairs = sets.slice(1).map((set) => set.tasks);
      const pick = (i) => (task) => {
        const other = tasks[1 - i] === task ? tasks[i] : tasks[1 - i];
        go({ set: 1 + pairs.findIndex((pair) => pair.includes(task) && pair.includes(other)) });
      };
      const every = everyTask.map((task) => [task, task]);
      const chooser = (word, i) => select(word, every, tasks[i], pick(i));
      const two = state.set > 0;
      const many = [
        { key: 0, label: "all eight" },
        { key: 1, label: "two of them" },
      ];
      const start = 1 + pairs.findIndex((pair) => pair.includes("ng-sci") && pair.includes("tweets"));
      const parts = [
        choice("adapters", many, two ? 1 : 0, (key) => go({ set: key && start })),
        ...(two ? [html("div", { class: "lo-picks" }, ...["merge", "and"].map(chooser))] : []),
        select("method", options, state.label, (label) => go({ label })),
        ...(ranks.length > 1 ? [choice("rank", ranks, state.rank, (rank) => go({ rank }))] : []),
        choice(
          "length",
          lengths.map((key) => ({ key, label: words(key) })),
          state.at,
          (at) => go({ at }),
        ),
      ];
      top.replaceChildren(...parts);
      if (place >= 0) {
        const same = [...top.querySelectorAll("select, input")];
        (same.find((e) => e.value === held.value && e.type === held.type) ?? same[place])?.focus();
      }
    }

    // Marks are made once, and only move.
    const mark = (tag, look) => drawing.appendChild(svg(tag, { class: look }));
    const line = () =>
      Object.fromEntries(
        ["track", "base", "own", "bar", "range"]
          .map((name) => [name, mark("rect", `lo-${name}`)])
          .concat([
            ["was", mark("circle", "lo-was")],
            ["dot", mark("circle", "lo-dot")],
            ["name", mark("text", "lo-name")],
            ["now", mark("text", "lo-strong")],
            ["old", mark("text", "lo-small")],
          ]),
      );
    const field = svg("g");
    drawing.append(field);
    const head = line();
    const lines = everyTask.map(line);
    const notes = svg("g");
    drawing.append(notes);
    const set = (e, values) => {
      for (const [key, value] of Object.entries(values))
        e.style[key] = typeof value === "number" ? `${value}px` : value;
    };
    const note = (x, y, words, look = "lo-small", anchor = "middle") =>
      svg("text", { x, y, class: look, "text-anchor": anchor }, words);
    const across = (a, b) => ({ x: Math.min(a, b), width: Math.abs(b - a) });

    function place(l, y, { x, now, was, low, high, base, own, colour, said, name }) {
      const off = now === undefined;
      for (const [key, e] of Object.entries(l))
        if (!["track", "base", "own", "name"].includes(key))
          e.style.display = off || (key === "was" && was === undefined) ? "none" : "";
      set(l.track, { ...across(x(base), x(own)), y: y - 4, height: 8 });
      for (const [e, at] of [
        [l.base, base],
        [l.own, own],
      ])
        set(e, { x: x(at) - 1, width: 2, y: y - 8, height: 16 });
      l.name.textContent = name;
      set(l.name, { translate: `0 ${y + 4}px`, opacity: off ? 0.55 : 1 });
      if (off) return;
      set(l.bar, { ...across(x(base), x(now)), y: y - 4, height: 8, fill: colour });
      set(l.range, { ...across(x(low), x(high)), y: y - 1, height: 2 });
      set(l.dot, { cx: x(now), cy: y, r: DOT, fill: colour });
      set(l.was, { cx: was === undefined ? 0 : x(was), cy: y, r: DOT });
      for (const [e, words, right] of [
        [l.now, said[0], 46],
        [l.old, said[1], 0],
      ]) {
        e.textContent = words;
        e.setAttribute("text-anchor", "end");
        set(e, { translate: `${width - right}px ${y + 4}px` });
      }
    }

    const called = ({ label, rank, at }, row) =>
      label +
      (rank ? `, rank ${rank}` : "") +
      (at === "chosen" ? "" : `, length ${steps[at]}`) +
      (row.natural ? ", its own length" : "");

    // Compared text by text, which says more than two intervals beside each other.
    function difference(row, old) {
      const { rows, more } = sets[state.set];
      if (row === old || state.at !== "chosen" || before.at !== "chosen") return "";
      const [i, j] = [row, old].map((r) => rows.indexOf(r)).sort((a, b) => a - b);
      const [low, high] = more[(i * (2 * rows.length - i - 1)) / 2 + j - i - 1]; // of the earlier row over the later
      const [from, to] = rows[i] === row ? [low, high] : [-high, -low];
      const told = from > 0 || to < 0 ? "" : ", so the two are not told apart";
      const signed = (x) => (x < 0 ? "−" : "+") + Math.abs(x).toFixed(1);
      return ` Difference in points ${signed(row.at.chosen.gain[0] - old.at.chosen.gain[0])} [${signed(from)}, ${signed(to)}]${told}.`;
    }

    function draw() {
      const { tasks, base, own, seeds, rows } = sets[state.set];
      const row = find(state),
        entry = row.at[state.at],
        old = find(before),
        was = old.at[before.at];
      const same = row === old && state.at === before.at;
      const wide = Math.max(120, width - LEFT - 92);
      const kept = (v) => LEFT + (wide * Math.max(-5, Math.min(115, v))) / 115,
        right = (v) => LEFT + (wide * (v - FLOOR)) / (100 - FLOOR);
      const height = HEAD + ROW * everyTask.length + 22;
      drawing.setAttribute("viewBox", `0 0 ${width} ${height}`);
      drawing.style.height = `${height}px`;
      const [gain, low, high] = entry.gain;
      const colour = colours[state.label] ?? "#8a8a8a";
      place(head, 40, {
        x: kept,
        now: gain,
        was: same ? undefined : was.gain[0],
        low,
        high,
        base: 0,
        own: 100,
        colour,
        name: "gain kept",
        said: [percent(gain), same ? "" : percent(was.gain[0])],
      });
      const others = rows.filter((r) => r.rank === state.rank).map((r) => kept(r.at.chosen.gain[0]));
      field.replaceChildren(
        ...others.map((x) => svg("rect", { x: x - 0.75, y: 27, width: 1.5, height: 5, class: "lo-other" })),
      );
      everyTask.forEach((task, i) => {
        const j = tasks.indexOf(task),
          y = HEAD + ROW * i + 12,
          whole = sets[0];
        const ends = j < 0 ? { base: whole.base[i], own: whole.own[i] } : { base: base[j], own: own[j] };
        const [now, least, most] = j < 0 ? [] : entry.accuracy.map((list) => list[j]);
        const then = j < 0 || same ? undefined : was.accuracy[0][j];
        place(lines[i], y, {
          x: right,
          now,
          was: then,
          low: least,
          high: most,
          ...ends,
          colour: colours[task],
          name: task,
          said: j < 0 ? [] : [percent(now), same ? "" : percent(then)],
        });
      });
      const gains = own.map((v, j) => v - base[j]),
        widest = gains.indexOf(Math.max(...gains));
      const above = HEAD + ROW * everyTask.indexOf(tasks[widest]);
      const bottom = HEAD + ROW * everyTask.length + 14;
      notes.replaceChildren(
        note(width - 46, 14, "now", "lo-small", "end"),
        note(width, 14, same ? "" : "was", "lo-small", "end"),
        note(Math.min(kept(gain), width - 110), 18, state.label, "lo-strong", gain > 55 ? "end" : "start"),
        ...(same
          ? []
          : [
              note(
                kept(was.gain[0]),
                62,
                before.label === state.label ? "before" : before.label,
                "lo-small",
                was.gain[0] > 55 ? "end" : "start",
              ),
            ]),
        note(right(base[widest]), above, "base", "lo-small", "start"),
        note(right(own[widest]), above, "own adapter", "lo-small", "end"),
        ...(!same && (was.gain[0] > 85 || was.gain[0] < 40)
          ? []
          : [note(kept(0), 62, "0"), note(kept(100), 62, "100 %")]),
        ...[FLOOR, 50, 70, 90].map((v) => note(right(v), bottom, v === 90 ? "90 %" : String(v))),
        note(0, bottom, "accuracy", "lo-small", "start"),
      );
      const interval = ([value, from, to]) => `${percent(value)} [${from.toFixed(0)}, ${to.toFixed(0)}]`;
      const length =
        row.at[state.at] === row.at.chosen && !row.natural
          ? ` at ${row.length.toFixed(1)} mean norms of the adapters`
          : "";
      const text =
        `By ${called(state, row)}${length}, ${interval(entry.gain)} of what ${tasks.length === 2 ? "the two" : "eight"} adapters gain is kept` +
        (same ? "." : `; before, by ${called(before, old)}, ${interval(was.gain)}.${difference(row, old)}`);
      say.textContent = `${text} Lines and brackets: 95 % intervals over texts${seeds > 1 ? ` and ${seeds} training seeds` : ", of one training seed"}; small strokes: the other methods.`;
      drawing.setAttribute(
        "aria-label",
        `${text} Accuracy: ${tasks.map((task, j) => `${task} ${percent(entry.accuracy[0][j])}`).join(", ")}`,
      );
      box.numbers = { ...state, gain: entry.gain, accuracy: entry.accuracy, tasks };
    }

    box.append(top, drawing, say);
    controls();
    const fit = () => {
      if (Math.round(box.clientWidth) === width) return;
      width = Math.round(box.clientWidth);
      draw();
    };
    fit(); // at once: what calls this says next that the figure is ready
    new ResizeObserver(fit).observe(box);
  };
})();
