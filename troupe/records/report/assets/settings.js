// What the reader chooses for all charts of a page, and for its light. Kept in this browser where it allows that.
"use strict";

// chartSettings.values: smoothing 0 to 0.99; axis "step", "time" or "tokens"; theme "", "light" or "dark"; log: keys of
// the charts with a logarithmic axis. view: {min, max} on the axis, null where all is shown; off: runs that are hidden.
// Neither of the last two is kept.
const chartSettings = (() => {
  const KEY = "troupe-charts";
  const values = { smoothing: 0.6, axis: "step", theme: "", log: [], view: null, off: [] };
  const listeners = new Set();

  function isSound(name, value) {
    if (name === "smoothing") return known(value) && value >= 0 && value <= 0.99;
    if (name === "axis") return Object.hasOwn(AXES, value);
    if (name === "theme") return ["", "light", "dark"].includes(value);
    return name === "log" && Array.isArray(value) && value.every((key) => typeof key === "string");
  }

  try {
    const kept = JSON.parse(localStorage.getItem(KEY)) || {};
    for (const [name, value] of Object.entries(kept)) if (isSound(name, value)) values[name] = value;
  } catch { /* a page from a file, or a browser that keeps nothing */ }

  function choose(changes) {
    if ("axis" in changes && changes.axis !== values.axis) values.view = null; // what was zoomed to has another unit
    Object.assign(values, changes);
    const { smoothing, axis, theme, log } = values;
    try {
      localStorage.setItem(KEY, JSON.stringify({ smoothing, axis, theme, log }));
    } catch { /* kept for this page only */ }
    shine();
    for (const listener of listeners) listener(changes);
  }

  function shine() {
    if (values.theme) document.documentElement.dataset.theme = values.theme;
    else delete document.documentElement.dataset.theme;
  }

  shine();
  return { values, choose, listen: (listener) => listeners.add(listener) };
})();

// The button that makes the page light, dark, or as the system is.
function themeSwitch(button) {
  const names = { "": "as the system", light: "light", dark: "dark" };
  const show = () => {
    const name = names[chartSettings.values.theme];
    button.textContent = { "": "◐", light: "☀", dark: "☾" }[chartSettings.values.theme];
    button.title = `Colours: ${name}`;
    button.setAttribute("aria-label", `Colours: ${name}; press for others`);
  };
  button.addEventListener("click", () => {
    const order = Object.keys(names);
    chartSettings.choose({ theme: order[(order.indexOf(chartSettings.values.theme) + 1) % order.length] });
  });
  chartSettings.listen(show);
  show();
}

// The bar above the charts: how smooth, along what, all of it again. `there`: the axes that the data has.
function chartTools(element, there = Object.keys(AXES)) {
  element.classList.add("chart-tools");
  element.replaceChildren();
  const smooth = html("label", "tool", element, "Smoothing ");
  const slider = html("input", "", smooth);
  Object.assign(slider, { type: "range", min: "0", max: "0.99", step: "0.01", className: "smoothing" });
  const figure = html("output", "", smooth);
  slider.addEventListener("input", () => chartSettings.choose({ smoothing: Number(slider.value) }));
  const axes = html("div", "segments", element);
  axes.setAttribute("role", "group");
  axes.setAttribute("aria-label", "Along");
  const buttons = there.map((axis) => {
    const button = html("button", "segment", axes, AXES[axis].title);
    button.type = "button";
    button.dataset.axis = axis;
    button.addEventListener("click", () => chartSettings.choose({ axis }));
    return button;
  });
  axes.hidden = there.length < 2;
  const reset = html("button", "button small reset", element, "Whole run");
  reset.type = "button";
  reset.title = "Show all again (double click or Esc in a chart). Drag in a chart to look closer.";
  reset.addEventListener("click", () => chartSettings.choose({ view: null }));
  const show = () => {
    const { smoothing, axis, view } = chartSettings.values;
    slider.value = String(smoothing);
    figure.textContent = smoothing.toFixed(2);
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.axis === axis));
    reset.disabled = view === null;
  };
  chartSettings.listen(show);
  show();
}
