// The dial of principal angles: first on two planes that a reader tilts, then on two adapters.
(() => {
  "use strict";
  const { html, choice } = explore.kit;
  explore.dial = (box, data) => {
    const parts = {};
    const make = { planes: explore.planes, board: explore.board };
    const show = (key) => {
      const part = key === "board" ? "board" : "planes";
      if (!parts[part]) {
        box.append((parts[part] = html("div", { class: `lo-${part}` })));
        parts[part].show = make[part](parts[part], data);
      }
      for (const name of Object.keys(parts)) parts[name].hidden = name !== part;
      parts[part].show(key);
    };
    const options = [
      { key: 3, label: "planes in space" },
      { key: 4, label: "in four dimensions", spoken: "planes in four dimensions" },
      { key: "board", label: "two real adapters" },
    ];
    box.append(choice("the dial of", options, 3, show));
    show(3);
  };
})();
