// Where a page shows the picture explore/NAME.svg and scripts run, a figure to take hold of stands in its place once it
// comes near the screen; on paper, and without scripts, the picture stays.
// Plain scripts that hang on `explore`, not modules: from a disk a browser loads no module, and reads no data either.
window.explore = { data: {} };
(() => {
  "use strict";
  const folder = document.currentScript.src.replace(/explore\.js.*/, "explore/");
  const NEEDS = { dial: ["linear.js", "needles.js", "planes.js", "board.js"], bench: [], desk: [], live: ["bert.js"] };
  const loading = {};
  const load = (file) =>
    (loading[file] ??= new Promise((done, fail) => {
      const tag = document.createElement(file.endsWith(".css") ? "link" : "script");
      tag.onload = done;
      tag.onerror = () => {
        delete loading[file]; // it may be asked for again
        fail(Error(`${file} cannot be loaded`));
      };
      if (tag.tagName === "LINK") Object.assign(tag, { rel: "stylesheet", href: folder + file });
      else Object.assign(tag, { src: folder + file, async: false }); // in the order asked for
      document.head.append(tag);
    }));

  window.explore.load = load;

  async function wake(still, name) {
    await Promise.all(["explore.css", "kit.js", `${name}.data.js`, ...NEEDS[name], `${name}.js`].map(load));
    const box = document.createElement("div");
    box.className = "lo-explore";
    box.setAttribute("role", "group");
    box.setAttribute("aria-label", still.alt);
    const block = still.closest("p, figure, a") ?? still;
    block.before(box);
    block.classList.add("lo-still");
    block.nextElementSibling?.classList.add("lo-said");
    explore[name](box, explore.data[name]);
    box.dataset.ready = "true";
  }

  const start = () => {
    const names = new Map();
    for (const name of Object.keys(NEEDS))
      document.querySelectorAll(`img[src$="/${name}.svg"]`).forEach((still) => names.set(still, name));
    const seen = new IntersectionObserver(
      (entries) => {
        for (const { isIntersecting, target } of entries) {
          if (!isIntersecting) continue;
          seen.unobserve(target);
          wake(target, names.get(target));
        }
      },
      { rootMargin: "600px" },
    );
    names.forEach((_, still) => seen.observe(still));
  };
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
})();
