// Line charts, for the report and the live page: uPlot draws, this says what. Needs uPlot, format.js, settings.js,
// series.js, plot.js and save.js.
//
//   const chart = troupeChart(element, {
//     key: "reward", title: "Reward", about: "…", format: "number",
//     series: [{ name: "mean", x: { step: [1, 2, 3], time: [2.5, 5, 7.5] }, y: [0.1, null, 0.3],
//                bands: [{ low: […], high: […] }] }],
//   });
//   chart.update({ … });          // other data; `troupeChart(element, …)` again does the same
//
// Missing values are null: lines have gaps there. Every text is put in as text, never as HTML. Besides the above a spec
// may have: smooth (the page's smoothing acts on it), min (the y axis reaches at least there), until ({ step, time,
// tokens }: so does the x axis), empty (what is said where nothing is measured) and marks ([{ step, time, tokens,
// label }], dashed verticals); a series run (its button hides that run in all charts), color (1 to 8), dashed, points
// (a dot at each value) and errors (half widths of bars).
"use strict";

(() => {
  const states = new WeakMap();
  const charts = new Set();
  const { values: chosen, choose } = chartSettings;
  const { isLog, isShown, prepare, colour, forgetColours, horizontalReach, wholeReach, sizeOf, plotted } = chartPlot;
  let aloud = null;

  // ---- one chart

  function build(element) {
    element.classList.add("chart");
    element.replaceChildren();
    const caption = html("figcaption", "", element);
    const state = { element, off: new Set(), size: null, cursor: null, plot: null };
    state.title = html("span", "chart-title", caption);
    state.at = html("span", "chart-at", caption);
    state.value = html("span", "chart-value", caption);
    chartMenu(state, caption, { toggleLog: () => toggleLog(state), enlarge: () => enlarge(state), colour });
    state.box = html("div", "chart-plot", element);
    state.box.tabIndex = 0;
    state.box.setAttribute("role", "application");
    state.box.setAttribute("aria-roledescription", "chart");
    state.box.addEventListener("keydown", (event) => press(state, event));
    state.box.addEventListener("blur", () => showCursor(null));
    state.box.addEventListener("pointermove", (event) => touchAt(state, event));
    state.legend = html("div", "legend", element);
    if (typeof ResizeObserver === "function") {
      new ResizeObserver(() => {
        const { width, height } = sizeOf(state);
        if (state.plot && (width !== state.size.width || height !== state.size.height)) resize(state);
      }).observe(state.box);
    }
    states.set(element, state);
    return state;
  }

  function draw(state) {
    if (state.plot) state.plot.destroy();
    state.plot = null;
    state.box.replaceChildren();
    prepare(state);
    showTitle(state);
    const empty = whyEmpty(state);
    if (empty) html("div", "chart-empty", state.box, empty);
    else state.plot = plotted(state, { moved: (plot) => moved(state, plot), selected, reset: () => choose({ view: null }) });
    state.size = sizeOf(state);
    readOut(state);
  }

  function whyEmpty(state) {
    const { spec, lines } = state;
    if (!spec.series.some((one) => one.y.some(known))) return spec.empty || "nothing yet";
    if (!lines.some((line) => line.x.length)) return `nothing is known along ${AXES[chosen.axis].title.toLowerCase()}`;
    return lines.some((line) => line.y.some(known)) ? "" : "nothing above 0 for a logarithmic axis";
  }

  // the same chart with other figures: what is drawn stays until the new is there
  function redraw(state) {
    const lines = state.lines.length;
    const scale = isLog(state) ? 3 : 1;
    if (!state.plot || state.spec.series.length !== lines || state.plot.scales.y.distr !== scale) return draw(state);
    prepare(state);
    showTitle(state);
    if (whyEmpty(state)) return draw(state);
    quietly(() => state.plot.batch(() => state.plot.setData(state.data, true)));
    place(state);
    return readOut(state);
  }

  function resize(state) {
    state.size = sizeOf(state);
    quietly(() => state.plot.batch(() => state.plot.setSize(state.size)));
    place(state);
  }

  function showTitle(state) {
    const { title, about } = state.spec;
    state.title.textContent = title || "";
    state.title.title = about || title || "";
    state.box.setAttribute("aria-label", `${title}. Arrow keys move along it, plus and minus zoom, Escape shows all.`);
  }

  // ---- where the reader looks: the same place in all charts

  let quiet = false;

  // what uPlot does to the cursor by itself moves no other chart's
  function quietly(act) {
    quiet = true;
    act();
    quiet = false;
  }

  function moved(state, plot) {
    if (quiet) return;
    const { left } = plot.cursor;
    showCursor(left === null || left < 0 ? null : plot.posToVal(left, "x"));
  }

  function place({ plot, cursor }) {
    if (plot) quietly(() => plot.setCursor({ left: cursor === null ? -10 : plot.valToPos(cursor, "x"), top: cursor === null ? -10 : 4 }));
  }

  function showCursor(x) {
    for (const state of connected()) {
      state.cursor = x;
      place(state);
      readOut(state);
    }
  }

  function* connected() {
    for (const state of charts) {
      if (state.element.isConnected) yield state;
      else charts.delete(state);
    }
  }

  // figures at the cursor, else the newest
  function readOut(state) {
    const { spec, cursor, lines } = state;
    const away = cursor === null;
    const at = away || !state.xs.length ? null : state.xs[nearestPlace(state.xs, cursor)];
    const texts = lines.map((line) => {
      const place = away ? line.y.findLastIndex(known) : line.x.length ? nearestPlace(line.x, cursor) : -1;
      const text = formatValue(line.y[place], spec.format);
      return line.errors && known(line.errors[place]) ? `${text} ± ${formatValue(line.errors[place], spec.format)}` : text;
    });
    const mark = at === null ? null : (spec.marks || []).find((one) => known(one[chosen.axis]) && state.xs[nearestPlace(state.xs, one[chosen.axis])] === at);
    state.at.textContent = at === null ? "" : `${mark ? `${mark.label.split(",")[0]} · ` : ""}${AXES[chosen.axis].told(at)}`;
    state.told = `${spec.title}, ${state.at.textContent || "newest"}: ${lines.map((line, i) => (lines.length > 1 ? `${line.name} ${texts[i]}` : texts[i])).join(", ")}`;
    const single = lines.length === 1 && !lines[0].run;
    state.value.textContent = single ? texts[0] : "";
    showLegend(state, single ? [] : lines, texts);
  }

  function showLegend(state, lines, texts) {
    while (state.legend.childElementCount > lines.length) state.legend.lastElementChild.remove();
    lines.forEach((line, i) => {
      const item = state.legend.children[i] || legendItem(state, i);
      item.children[0].className = `swatch s${line.colour}`;
      item.children[1].textContent = line.name;
      item.children[2].textContent = texts[i];
      item.setAttribute("aria-pressed", String(isShown(state, line)));
    });
  }

  function legendItem(state, i) {
    const item = html("button", "legend-item", state.legend);
    item.type = "button";
    item.title = "Hide or show";
    html("i", "swatch", item);
    html("span", "name", item);
    html("b", "", item);
    item.addEventListener("click", () => hide(state, state.lines[i]));
    return item;
  }

  function hide(state, { name, run }) {
    if (run) {
      choose({ off: chosen.off.includes(run) ? chosen.off.filter((one) => one !== run) : [...chosen.off, run] });
      return;
    }
    if (!state.off.delete(name)) state.off.add(name);
    draw(state);
  }

  // ---- what the reader does

  function selected(plot) {
    const { left, width } = plot.select;
    if (width < 4) return;
    const [min, max] = [plot.posToVal(left, "x"), plot.posToVal(left + width, "x")];
    plot.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    choose({ view: { min, max } });
  }

  function touchAt(state, event) {
    if (event.pointerType !== "touch" || !state.plot) return;
    const left = event.clientX - state.plot.over.getBoundingClientRect().left;
    showCursor(state.plot.posToVal(Math.min(Math.max(left, 0), state.plot.over.clientWidth), "x"));
  }

  function zoomBy(state, factor) {
    const [min, max] = horizontalReach(state);
    const middle = known(state.cursor) ? state.cursor : (min + max) / 2;
    const [first, last] = wholeReach(state);
    const view = { min: Math.max(first, middle - (middle - min) * factor), max: Math.min(last, middle + (max - middle) * factor) };
    choose({ view: view.min <= first && view.max >= last ? null : view });
  }

  function step(state, by) {
    const [min, max] = horizontalReach(state);
    const xs = state.xs.filter((x) => x >= min && x <= max);
    if (!xs.length) return;
    const now = known(state.cursor) ? nearestPlace(xs, state.cursor) : by < 0 ? xs.length : -1;
    showCursor(xs[Math.min(xs.length - 1, Math.max(0, now + by))]);
    sayAloud(state.told);
  }

  function press(state, event) {
    if (!state.plot || event.ctrlKey || event.metaKey || event.altKey) return;
    const far = event.shiftKey ? 10 : 1;
    const keys = {
      ArrowLeft: () => step(state, -far),
      ArrowRight: () => step(state, far),
      Home: () => step(state, -Infinity),
      End: () => step(state, Infinity),
      "+": () => zoomBy(state, 0.5),
      "=": () => zoomBy(state, 0.5),
      "-": () => zoomBy(state, 2),
      l: () => toggleLog(state),
      Escape: () => { showCursor(null); choose({ view: null }); },
    };
    if (!keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  }

  function sayAloud(text) {
    if (!aloud) {
      aloud = html("p", "aloud", document.body);
      aloud.setAttribute("aria-live", "polite");
    }
    aloud.textContent = text;
  }

  function toggleLog(state) {
    const { key } = state.spec;
    choose({ log: isLog(state) ? chosen.log.filter((one) => one !== key) : [...chosen.log, key] });
  }

  function enlarge(state) {
    state.element.classList.toggle("large");
    if (state.plot) resize(state);
  }

  // ---- all charts

  // those before the reader at once, the others when there is time: a slider waits for what is seen only
  let next = 0;

  function drawStale(all) {
    const { innerHeight: height } = window;
    for (const state of connected()) {
      if (!state.stale) continue;
      const { top, bottom } = state.element.getBoundingClientRect();
      if (!all && (bottom < 0 || top > height)) continue;
      const how = state.stale;
      state.stale = null;
      how(state);
      if (all === "one") return;
    }
  }

  function drawRest() {
    drawStale("one");
    next = [...connected()].some(({ stale }) => stale) ? setTimeout(drawRest) : 0;
  }

  function drawAll(how) {
    for (const state of connected()) state.stale = state.stale === draw ? draw : how;
    clearTimeout(next);
    cancelAnimationFrame(next);
    next = requestAnimationFrame(() => {
      drawStale(false);
      next = setTimeout(drawRest, 40);
    });
  }

  chartSettings.listen((changes) => {
    if ("theme" in changes) forgetColours();
    drawAll("smoothing" in changes || "view" in changes ? redraw : draw);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { forgetColours(); drawAll(draw); });
  addEventListener("scroll", () => drawStale(false), { passive: true });
  // paper is light
  function drawForPaper(theme) {
    if (theme) document.documentElement.dataset.theme = theme;
    else chartSettings.choose({});
    forgetColours();
    drawAll(draw);
    drawStale(true);
  }
  addEventListener("beforeprint", () => drawForPaper("light"));
  addEventListener("afterprint", () => drawForPaper(""));

  function troupeChart(element, spec) {
    const state = states.get(element) || build(element);
    charts.add(state);
    element.troupeChart = state;
    const update = (other) => {
      const first = !state.spec;
      state.spec = { key: "", ...other, series: other.series || [] };
      if (first) draw(state);
      else redraw(state);
    };
    update(spec);
    return { update };
  }

  window.troupeChart = troupeChart;
})();

// Every element with data-chart="N" gets the chart N of the data, as records/report/page.py puts it beside the page, and
// an element .chart-tools the bar for all of them. Returns how many were drawn.
function drawCharts(data) {
  const elements = document.querySelectorAll("[data-chart]");
  const there = Object.keys(AXES).filter((axis) => data.axes.some((table) => table[axis] && table[axis].some(known)));
  if (!there.includes(chartSettings.values.axis)) chartSettings.values.axis = "step";
  for (const bar of document.querySelectorAll(".chart-tools")) chartTools(bar, there);
  for (const element of elements) {
    const spec = data.charts[Number(element.dataset.chart)];
    const series = spec.series.map((one) => ({ ...one, x: data.axes[one.axes || 0] }));
    troupeChart(element, { ...spec, series, marks: data.marks });
  }
  return elements.length;
}
