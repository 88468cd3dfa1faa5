// A sentence, asked of MiniLM as it is, of a task's own adapter, and of one adapter merged from all eight. The sentences
// to begin with were answered beforehand; any other is answered here, once the model has been read.
(() => {
  "use strict";
  const { html, svg, choice, text, numbers } = explore.kit;
  const ROW = 30,
    LEFT = 176,
    WIDE = 200,
    LONGEST = 4; // mean norms
  const WHO = ["MiniLM as it is", "with its own adapter", "with one adapter of all eight"];
  const LOOKS = ["lo-base", "lo-its", "lo-three"];
  const percent = (p) => `${(100 * p).toFixed(0)} %`;
  const top = (shares) => shares.indexOf(Math.max(...shares));

  explore.packs = {};
  explore.live = (box, { tasks, sentences, opens, length, layers, scale }) => {
    const parts = ["words", ...Array.from({ length: layers }, (_, i) => `layer${i}`), "merged"];
    const state = { text: sentences[opens].text, task: sentences[opens].task, length };
    let model, merged, shown;
    const packs = [], // of the model, until it is whole
      owns = {}, // adapters of tasks, once read
      asked = new Map(); // embeddings of the present sentence
    let turn = 0;

    const fetch = async (name) => {
      await explore.load(`live/${name}.js`);
      const pack = explore.packs[name];
      delete explore.packs[name]; // text, three times as large
      return pack;
    };
    const own = (task) => (owns[task] ??= fetch(task).then(explore.bert.adapter));

    const field = html("textarea", { rows: 3, maxlength: 600, spellcheck: "false" });
    field.value = state.text;
    const examples = html("select", { "aria-label": "a sentence to begin with", onchange: () => pick(sentences[examples.value]) });
    sentences.forEach(({ task }, i) => examples.append(html("option", { value: i }, `a sentence for ${task}`)));
    examples.append(html("option", { value: "", disabled: true, hidden: true }, "a sentence of yours"));
    examples.value = opens;
    const bar = html("progress", { max: parts.length, value: 0, "aria-label": "how much of the model has been read" });
    bar.hidden = true;
    const button = html("button", { type: "button", onclick: read }, "Read the model to type your own (32 MB)");
    const asking = html("div");
    const slider = html("input", { type: "range", min: 0, max: LONGEST, step: 0.05, disabled: true });
    slider.value = length;
    const long = html("label", { class: "lo-pick lo-weight" }, html("span"), slider);
    const words = numbers(WHO.map((who, i) => html("span", { class: `lo-key ${LOOKS[i]}` }, who)));
    const drawing = svg("svg", { role: "img", class: "lo-live" });
    const say = html("p", { class: "lo-say", "aria-live": "polite" });

    field.addEventListener("input", () => {
      state.text = field.value;
      examples.value = sentences.findIndex((s) => s.text === state.text);
      if (examples.selectedIndex < 0) examples.value = "";
      go(250);
    });
    slider.addEventListener("input", () => {
      state.length = Number(slider.value);
      go(0);
    });

    function pick({ text: words, task }) {
      Object.assign(state, { text: (field.value = words), task });
      controls();
      go(0);
    }

    async function read() {
      button.disabled = true;
      bar.hidden = false;
      try {
        for (const name of parts.slice(packs.length)) {
          packs.push(await fetch(name));
          bar.value = packs.length;
          await new Promise((done) => setTimeout(done)); // the bar is drawn
        }
        merged = explore.bert.adapter(packs.pop());
        model = explore.bert.model(packs.shift(), packs);
        button.remove();
        slider.disabled = false;
        box.dataset.model = "true";
        go(0);
      } catch (error) {
        button.disabled = false;
        say.textContent = `${error.message}: the model comes with the built site.`;
      }
      bar.hidden = true;
    }

    // Waits for the hand to rest, asks what was not asked yet, and gives up where something else is asked meanwhile.
    async function go(rest) {
      const mine = ++turn,
        { text: words, task, length: size } = state,
        still = () => mine === turn;
      const known = sentences.find((s) => s.text === words);
      label();
      if (known && size === length && !model) return draw(known.answers[task]);
      if (!model || !words.trim()) return draw(undefined);
      await new Promise((done) => setTimeout(done, rest));
      if (!still()) return undefined;
      const start = performance.now();
      const { modules, head } = await own(task);
      if (asked.words !== words) (asked.clear(), (asked.words = words));
      const ids = model.pieces(words),
        found = [];
      for (const [key, adapter, much] of [
        ["base", undefined, 0],
        [task, { modules }, 1],
        [`merged ${size}`, merged, size / length],
      ]) {
        const z = asked.get(key) ?? (still() ? await model.embed(ids, adapter, much, still) : undefined);
        if (!z || !still()) return undefined;
        asked.set(key, z);
        found.push(explore.bert.probabilities(z, head, scale));
      }
      return draw(found, performance.now() - start, ids);
    }

    function controls() {
      const options = tasks.map(({ name }) => ({ key: name }));
      asking.replaceChildren(choice("labels of", options, state.task, (task) => ((state.task = task), go(0))));
    }
    function label() {
      const times = `${state.length.toFixed(2)} mean norms`;
      long.firstChild.textContent = `length of the merged: ${times}`;
      slider.setAttribute("aria-valuetext", times);
    }

    function draw(answers, time, ids) {
      const { labels, colour } = tasks.find(({ name }) => name === state.task);
      const high = ROW * labels.length + 8;
      drawing.setAttribute("viewBox", `0 0 430 ${high}`);
      box.style.setProperty("--its", colour);
      drawing.replaceChildren(
        ...labels.flatMap((name, row) => {
          const y = ROW * row + 6,
            best = answers && answers.some((shares) => top(shares) === row);
          return [
            text([LEFT - 8, y + 13], name, best ? "lo-strong" : "", "end"),
            svg("rect", { x: LEFT, y, width: WIDE, height: 18, class: "lo-track" }),
            ...(answers ?? []).map((shares, i) =>
              svg("rect", { x: LEFT, y: y + 6 * i, width: WIDE * shares[row], height: 6, class: LOOKS[i] }),
            ),
            ...(answers ? [text([LEFT + WIDE + 8, y + 13], percent(answers[2][row]), "lo-three-word", "start")] : []),
          ];
        }),
      );
      words.say(WHO.map((_, i) => (answers ? [labels[top(answers[i])], ` ${percent(Math.max(...answers[i]))}`] : ["–"])));
      const tops = answers?.map((shares) => labels[top(shares)]);
      say.textContent = !state.text.trim()
        ? "No sentence, no answer."
        : !answers
        ? "This sentence was not answered beforehand: read the model, and it is answered here. What you type stays in this page."
        : `The merged adapter and the task's own ${tops[1] === tops[2] ? "give one answer" : "disagree"}; ` +
          `MiniLM alone ${tops[0] === tops[1] ? "answers like the own adapter" : `says ${tops[0]}`}.` +
          (time === undefined ? "" : ` ${ids.length} pieces of words, ${(time / 1000).toFixed(2)} s.`);
      const spoken = answers ? WHO.map((who, i) => `${who}: ${tops[i]} ${percent(Math.max(...answers[i]))}`).join("; ") : "";
      drawing.setAttribute("aria-label", `Probabilities of the labels of ${state.task}. ${spoken}`);
      shown = { text: state.text, task: state.task, length: state.length, answers, live: time !== undefined };
      box.numbers = ids ? { ...shown, ids } : shown;
    }

    const typed = html("label", { class: "lo-typed" }, "sentence", field);
    const left = html("div", {}, html("div", { class: "lo-pick" }, examples), typed, button, bar, asking, long, words.box);
    box.append(html("div", { class: "lo-two-up" }, left, drawing), say);
    controls();
    go(0);
  };
})();
