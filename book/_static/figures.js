// Draws each .lo-figure with plotly when it comes near the screen, in the page's colours.
(() => {
  "use strict";
  const script = document.currentScript.src.replace(/figures\.js.*/, "plotly.min.js");
  let loading;
  const plotly = () =>
    (loading ??= new Promise((done, fail) => {
      const tag = document.createElement("script");
      tag.src = script;
      tag.onload = () => done(window.Plotly);
      tag.onerror = fail;
      document.head.append(tag);
    }));

  const colours = () => {
    const style = getComputedStyle(document.documentElement);
    const read = (name, other) => style.getPropertyValue(name).trim() || other;
    return {
      ink: read("--pst-color-text-base", "#222"),
      line: read("--pst-color-border", "#ccc"),
      paper: read("--pst-color-background", "#fff"),
    };
  };

  // Only what a theme changes; everything else belongs to the figure.
  const themed = (layout) => {
    const { ink, line, paper } = colours();
    const next = { "font.color": ink, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)" };
    next["hoverlabel.bgcolor"] = paper;
    next["hoverlabel.font.color"] = ink;
    for (const key of Object.keys(layout)) {
      if (/^[xy]axis\d*$/.test(key)) {
        next[`${key}.gridcolor`] = line;
        next[`${key}.linecolor`] = line;
        next[`${key}.zerolinecolor`] = line;
      }
    }
    return next;
  };

  async function draw(box) {
    const data = box.querySelector("script");
    if (!data) return;
    const figure = JSON.parse(data.textContent);
    data.remove();
    const Plotly = await plotly();
    const layout = { ...figure.layout, autosize: true };
    delete layout.width;
    const config = { responsive: true, displaylogo: false, displayModeBar: "hover", ...figure.config };
    await Plotly.newPlot(box, { data: figure.data, layout, frames: figure.frames, config });
    const narrow = box.clientWidth < 480 ? { "font.size": 11, "yaxis.tickfont.size": 10 } : {};
    await Plotly.relayout(box, { ...themed(box._fullLayout), ...narrow });
    box.dataset.drawn = "true";
  }

  const start = () => {
    const boxes = document.querySelectorAll(".lo-figure");
    const seen = new IntersectionObserver(
      (entries) => {
        for (const entry of entries) {
          if (!entry.isIntersecting) continue;
          seen.unobserve(entry.target);
          draw(entry.target);
        }
      },
      { rootMargin: "600px" },
    );
    boxes.forEach((box) => seen.observe(box));
    window.addEventListener("beforeprint", () => boxes.forEach(draw));
    new MutationObserver(() => {
      document.querySelectorAll(".lo-figure[data-drawn]").forEach((box) => {
        window.Plotly.relayout(box, themed(box._fullLayout));
      });
    }).observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });
  };
  // A formula in the text that is wider than its paragraph becomes a line of its own, which scrolls.
  const fitFormulas = () => {
    const inline = [...document.querySelectorAll("mjx-container:not([display])")];
    inline.forEach((m) => m.classList.remove("lo-wide"));
    const wide = inline.filter((m) => {
      const block = m.closest("p, li, td, dd, blockquote");
      return block && m.getBoundingClientRect().width > block.clientWidth;
    });
    wide.forEach((m) => m.classList.add("lo-wide"));
  };
  window.addEventListener("load", async () => {
    await window.MathJax?.startup?.promise;
    fitFormulas();
    let width = window.innerWidth;
    window.addEventListener("resize", () => {
      if (window.innerWidth === width) return;
      width = window.innerWidth;
      fitFormulas();
    });
  });
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
})();
