// Keys for plotly's sliders, menus, buttons and scenes.
window.loKeys = (() => {
  "use strict";

  // plotly's controls know a mouse and a finger only. Over each lies a native one for keyboards and screen readers,
  // unseen but for its ring when it has the focus; a mouse and a finger go through it.
  const addKey = (box, over, label, tag, props = {}) => {
    const [place, key] = [document.createElement("span"), document.createElement(tag)];
    place.className = "lo-key";
    place.over = over;
    key.setAttribute("aria-label", label);
    place.append(Object.assign(key, props));
    box.append(place);
    return key;
  };
  const addRange = (box, over, label, count, at, say, move) => {
    const key = addKey(box, over, label, "input", { type: "range", max: count - 1 });
    key.parentElement.sync = () => {
      key.value = at();
      key.setAttribute("aria-valuetext", say(at()));
    };
    key.oninput = () => move(Number(key.value));
    return key;
  };

  const letKeys = (box, Plotly) => {
    const one = (name, i = 0) => box.querySelectorAll(name)[i];
    const active = (control, i) => box._fullLayout[control][i].active;
    const press = async (control, i, { method, args }, j) => {
      await Plotly.relayout(box, `${control}[${i}].active`, j);
      await Plotly[method](box, ...args).catch(() => {}); // a second play ends the first
      if (control === "updatemenus") box.emit("plotly_buttonclicked", { active: j });
    };
    const { updatemenus = [], sliders = [] } = box._fullLayout;
    updatemenus.forEach(({ type, buttons, showactive }, i) => {
      const header = () => one(".updatemenu-header-group", i);
      if (type === "dropdown") {
        const key = addKey(box, () => header().querySelector(".updatemenu-header"), "shown", "select");
        key.append(...buttons.map(({ label }) => new Option(label)));
        key.onchange = () => press("updatemenus", i, buttons[key.selectedIndex], key.selectedIndex);
        key.parentElement.sync = () => (key.selectedIndex = active("updatemenus", i));
      } else {
        buttons.forEach((button, j) => {
          const name = button.label.replace("▶ ", "").replace("❚❚", "pause");
          const key = addKey(box, () => header().querySelectorAll(".updatemenu-button")[j], name, "button");
          key.onclick = () => press("updatemenus", i, button, j);
          if (showactive) key.parentElement.sync = () => (key.ariaPressed = active("updatemenus", i) === j);
        });
      }
    });
    sliders.forEach(({ steps, currentvalue: { prefix } }, i) => {
      const name = (prefix ?? "").replace(/[\s=:]+$/, "") || "step";
      const move = (j) => press("sliders", i, steps[j], j);
      const at = () => active("sliders", i);
      addRange(box, () => one(".slider-group", i), name, steps.length, at, (j) => steps[j].label, move);
    });
    const canvas = () => one(".gl-container canvas");
    if (!canvas()) return;
    const space = addKey(box, canvas, "turned by the arrow keys", "div", { tabIndex: 0 });
    space.setAttribute("role", "application");
    space.onkeydown = (event) => {
      const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
      if (!by) return;
      event.preventDefault();
      const { x, y, z } = box._fullLayout.scene.camera.eye;
      const far = Math.hypot(x, y, z);
      const around = Math.atan2(y, x) + by[0] / 6;
      const high = Math.max(-1.5, Math.min(1.5, Math.asin(z / far) + by[1] / 6));
      const flat = far * Math.cos(high);
      const eye = { x: flat * Math.cos(around), y: flat * Math.sin(around), z: far * Math.sin(high) };
      Plotly.relayout(box, { "scene.camera.eye": eye });
    };
  };

  return { addRange, letKeys };
})();
