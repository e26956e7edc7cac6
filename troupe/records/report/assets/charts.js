// Line charts as SVG, for the report and the live page. Needs format.js.
//
//   const chart = troupeChart(element, {
//     title: "Reward", xLabel: "step", format: "number",
//     series: [{ name: "mean", x: [1, 2, 3], y: [0.1, null, 0.3], band: { low: [...], high: [...] } }],
//   });
//   chart.update({ ... });          // other data; `troupeChart(element, ...)` again does the same
//
// Missing values are null: lines have gaps there. Every text is put in as text, never as HTML. Besides the above, a
// spec may have: smooth (draw a moving mean over the pale line), min (the y axis reaches at least there), and marks
// ([{ x, label }], dashed verticals). Charts with the same xLabel show the same x under the pointer.
"use strict";

(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const states = new WeakMap();
  const charts = new Set();

  function svg(tag, attributes, parent) {
    const node = document.createElementNS(SVG, tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (parent) parent.append(node);
    return node;
  }

  // round numbers that divide [low, high] into about `count` parts
  function ticks(low, high, count, whole) {
    const rough = (high - low) / Math.max(1, count);
    let step = 10 ** Math.floor(Math.log10(rough));
    for (const factor of [2, 2.5, 2]) if (step < rough) step *= factor;
    if (whole) step = Math.max(1, Math.round(step));
    const found = [];
    for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++) found.push(n * step);
    return found;
  }

  function reach(lists, low = Infinity, high = -Infinity) {
    for (const list of lists) {
      for (const value of list) {
        if (!known(value)) continue;
        if (value < low) low = value;
        if (value > high) high = value;
      }
    }
    return [low, high];
  }

  function verticalReach(spec) {
    let [low, high] = reach(spec.series.map((one) => one.y));
    if (low > high) return [0, 1];
    const bands = spec.series.filter((one) => one.band);
    if (bands.length) {
      // a band may be far wider than its line: it must not press the line flat
      const room = 1.5 * (high - low || Math.abs(high) || 1);
      const [bandLow, bandHigh] = reach(bands.flatMap((one) => [one.band.low, one.band.high]), low, high);
      [low, high] = [Math.max(bandLow, low - room), Math.min(bandHigh, high + room)];
    }
    if (known(spec.min)) low = Math.min(low, spec.min);
    if (low === high) {
      const room = Math.abs(low) * 0.1 || 1;
      return [spec.min === low ? low : low - room, high + room];
    }
    const room = 0.06 * (high - low);
    return [spec.min === low ? low : low - room, high + room];
  }

  // moving mean over a window of about a twentieth of the points; gaps stay gaps
  function smoothed(values) {
    const half = Math.max(1, Math.round(values.length / 40));
    let sum = 0;
    let count = 0;
    const take = (value, sign) => {
      if (!known(value)) return;
      sum += sign * value;
      count += sign;
    };
    for (let i = 0; i < Math.min(half, values.length); i++) take(values[i], 1);
    return values.map((value, i) => {
      if (i + half < values.length) take(values[i + half], 1);
      if (i - half - 1 >= 0) take(values[i - half - 1], -1);
      return known(value) && count ? sum / count : null;
    });
  }

  // the points between gaps as one path; a point by itself becomes a dot, thanks to the round line cap
  function linePath(xs, ys, toX, toY) {
    let path = "";
    let open = false;
    xs.forEach((x, i) => {
      if (!known(ys[i])) {
        open = false;
        return;
      }
      const point = `${toX(x).toFixed(1)} ${toY(ys[i]).toFixed(1)}`;
      path += open ? `L${point}` : `M${point}h0`;
      open = true;
    });
    return path;
  }

  function bandPath(xs, low, high, toX, toY) {
    let path = "";
    let run = [];
    const close = () => {
      if (run.length) {
        const up = run.map((i) => `${toX(xs[i]).toFixed(1)} ${toY(high[i]).toFixed(1)}`);
        const down = run.reverse().map((i) => `${toX(xs[i]).toFixed(1)} ${toY(low[i]).toFixed(1)}`);
        path += `M${up.join("L")}L${down.join("L")}Z`;
      }
      run = [];
    };
    xs.forEach((_, i) => (known(low[i]) && known(high[i]) ? run.push(i) : close()));
    close();
    return path;
  }

  function nearest(xs, x) {
    let low = 0;
    let high = xs.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] < x) low = middle;
      else high = middle;
    }
    return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
  }

  function lastKnown(values) {
    for (let i = values.length - 1; i >= 0; i--) if (known(values[i])) return i;
    return -1;
  }

  function build(element) {
    element.classList.add("chart");
    element.replaceChildren();
    const caption = html("figcaption", "", element);
    const state = { element, cursor: null, width: 0 };
    state.title = html("span", "chart-title", caption);
    state.at = html("span", "chart-at", caption);
    state.value = html("span", "chart-value", caption);
    state.plot = html("div", "chart-plot", element);
    state.legend = html("div", "legend", element);
    state.plot.addEventListener("pointermove", (event) => pointAt(state, event));
    state.plot.addEventListener("pointerdown", (event) => pointAt(state, event));
    state.plot.addEventListener("pointerleave", () => showCursor(state.spec.xLabel, null));
    if (typeof ResizeObserver === "function") {
      state.observer = new ResizeObserver(() => {
        if (state.plot.clientWidth !== state.width) draw(state);
      });
      state.observer.observe(state.plot);
    }
    states.set(element, state);
    charts.add(state);
    return state;
  }

  function pointAt(state, event) {
    if (!state.fromX) return;
    showCursor(state.spec.xLabel, state.fromX(event.clientX - state.plot.getBoundingClientRect().left));
  }

  function showCursor(xLabel, x) {
    for (const state of charts) {
      if (!state.element.isConnected) charts.delete(state);
      else if (state.spec.xLabel === xLabel) {
        state.cursor = x;
        readOut(state);
      }
    }
  }

  function draw(state) {
    const spec = state.spec;
    const width = state.plot.clientWidth || 320;
    const height = state.plot.clientHeight || 168;
    state.width = state.plot.clientWidth;
    state.plot.replaceChildren();
    state.fromX = null;
    const [firstX, lastX] = reach(spec.series.map((one) => one.x));
    if (!spec.series.some((one) => one.y.some(known))) {
      html("div", "chart-empty", state.plot, spec.empty || "nothing yet");
      readOut(state);
      return;
    }
    const [low, high] = verticalReach(spec);
    const yTicks = ticks(low, high, height > 220 ? 5 : 3, false);
    const labels = yTicks.map((value) => formatValue(Math.abs(value) < 1e-12 * (high - low) ? 0 : value, spec.format));
    const left = 10 + 6.3 * Math.max(...labels.map((label) => label.length), 2);
    const inner = { x: left, y: 6, width: Math.max(10, width - left - 8), height: height - 26 };
    const span = lastX - firstX || 1;
    const toX = (x) => (lastX === firstX ? inner.width / 2 : ((x - firstX) / span) * inner.width);
    const toY = (y) => inner.height - ((y - low) / (high - low)) * inner.height;
    state.fromX = (pixel) => firstX + ((pixel - inner.x) / inner.width) * (lastX - firstX);
    state.inner = inner;
    state.toX = toX;
    state.toY = toY;

    const root = svg("svg", { width, height, role: "img" }, state.plot);
    svg("title", {}, root).textContent = spec.title || "";
    yTicks.forEach((value, i) => {
      const y = inner.y + toY(value);
      svg("line", { class: "gridline", x1: inner.x, x2: inner.x + inner.width, y1: y, y2: y }, root);
      svg("text", { class: "axis", x: inner.x - 7, y: y + 4, "text-anchor": "end" }, root).textContent = labels[i];
    });
    const room = Math.max(62, 9 * plain(lastX).length + 14); // for one label
    const xTicks = lastX === firstX ? [firstX] : ticks(firstX, lastX, Math.max(2, inner.width / room), true);
    for (const value of xTicks) {
      const x = inner.x + toX(value);
      const end = x > inner.x + inner.width - 14 ? "end" : "middle";
      const at = { class: "axis", x: end === "end" ? inner.x + inner.width : x, y: height - 4, "text-anchor": end };
      svg("text", at, root).textContent = plain(value);
    }
    const area = svg("svg", { x: inner.x, y: inner.y, width: inner.width, height: inner.height }, root);
    for (const mark of spec.marks || []) {
      const line = svg("line", { class: "mark", x1: toX(mark.x), x2: toX(mark.x), y1: 0, y2: inner.height }, area);
      svg("title", {}, line).textContent = mark.label || "";
    }
    spec.series.forEach((one, i) => {
      const group = svg("g", { class: `s${(i % 8) + 1}` }, area);
      if (one.band) svg("path", { class: "band", d: bandPath(one.x, one.band.low, one.band.high, toX, toY) }, group);
      const smooth = spec.smooth && one.y.length >= 40;
      const path = { class: smooth ? "line raw" : "line", d: linePath(one.x, one.y, toX, toY) };
      svg("path", path, group);
      if (smooth) svg("path", { class: "line", d: linePath(one.x, smoothed(one.y), toX, toY) }, group);
    });
    state.over = svg("g", { transform: `translate(${inner.x} ${inner.y})` }, root);
    readOut(state);
  }

  // figures under the pointer, else the newest
  function readOut(state) {
    const { spec, cursor } = state;
    const first = spec.series.find((one) => one.x.length);
    const places = spec.series.map((one) => {
      if (!one.x.length) return -1;
      return cursor === null ? lastKnown(one.y) : nearest(one.x, cursor);
    });
    const texts = spec.series.map((one, i) => (places[i] < 0 ? "–" : formatValue(one.y[places[i]], spec.format)));
    state.title.textContent = spec.title || "";
    state.title.title = spec.about || spec.title || "";
    const at = first && cursor !== null ? first.x[nearest(first.x, cursor)] : null;
    state.at.textContent = at === null ? "" : `${spec.xLabel} ${plain(at)}`;
    const single = spec.series.length === 1;
    state.value.textContent = single ? texts[0] : "";
    if (state.legend.childElementCount !== (single ? 0 : spec.series.length)) state.legend.replaceChildren();
    if (!single) {
      spec.series.forEach((one, i) => {
        const item = state.legend.children[i] || html("span", "legend-item", state.legend);
        if (!item.childElementCount) {
          html("i", "", item);
          html("span", "name", item);
          html("b", "", item);
        }
        item.children[0].className = `swatch s${(i % 8) + 1}`;
        item.children[1].textContent = one.name;
        item.children[2].textContent = texts[i];
      });
    }
    if (!state.fromX || !state.over) return;
    state.over.replaceChildren();
    if (at === null) return;
    const x = state.toX(at);
    svg("line", { class: "cursor", x1: x, x2: x, y1: 0, y2: state.inner.height }, state.over);
    spec.series.forEach((one, i) => {
      if (places[i] < 0 || !known(one.y[places[i]])) return;
      const group = svg("g", { class: `s${(i % 8) + 1}` }, state.over);
      svg("circle", { class: "dot", cx: state.toX(one.x[places[i]]), cy: state.toY(one.y[places[i]]), r: 4 }, group);
    });
  }

  function troupeChart(element, spec) {
    const state = states.get(element) || build(element);
    charts.add(state);
    const update = (other) => {
      state.spec = { xLabel: "step", ...other, series: other.series || [] };
      draw(state);
    };
    update(spec);
    return { update };
  }

  window.troupeChart = troupeChart;
})();
