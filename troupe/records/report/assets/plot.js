// A chart as uPlot draws it, with what lies under and over its lines. Needs uPlot, format.js, settings.js and series.js.
// A state is what charts.js keeps of a chart; prepare gives it what is drawn: lines, xs, data and bands.
"use strict";

const chartPlot = (() => {
  const { values: chosen } = chartSettings;
  const FAINT = 0.28;

  // ---- colours: the page's own, as whoever draws on a canvas needs them

  let palette = null;

  function colour(name, alpha = 1) {
    if (!palette) {
      palette = new Map();
      palette.probe = html("i", "hidden", document.body);
    }
    if (!palette.has(name)) {
      palette.probe.style.color = `var(--${name})`;
      palette.set(name, getComputedStyle(palette.probe).color.match(/[\d.]+/g).slice(0, 3));
    }
    return `rgba(${palette.get(name).join(",")},${alpha})`;
  }

  function forgetColours() {
    if (palette) palette.probe.remove();
    palette = null;
  }

  // ---- what is drawn

  const isLog = (state) => chosen.log.includes(state.spec.key);
  const isShown = (state, line) => !state.off.has(line.name) && !(line.run && chosen.off.includes(line.run));
  const isSmooth = (state, line) => state.spec.smooth && !line.points && chosen.smoothing > 0 && line.y.length > 2;

  function prepare(state) {
    state.lines = linesAlong(state.spec, chosen.axis, isLog(state));
    const { xs, spread } = together(state.lines);
    state.xs = xs;
    const raw = state.lines.map((line) => spread(line, line.y));
    const smooth = state.lines.map((line) => {
      return isSmooth(state, line) ? spread(line, smoothedBy(line.y, chosen.smoothing)) : xs.map(() => null);
    });
    state.data = [xs, ...raw, ...smooth];
    state.bands = state.lines.map((line) => {
      const even = (values) => (isSmooth(state, line) ? evenedBy(values, chosen.smoothing) : values);
      return line.bands.map(({ low, high }) => ({ low: even(low), high: even(high) }));
    });
  }

  const shownLines = (state) => state.lines.filter((line) => isShown(state, line));

  function horizontalReach(state) {
    return chosen.view ? [chosen.view.min, chosen.view.max] : wholeReach(state);
  }

  function wholeReach({ xs, spec }) {
    if (!xs.length) return [0, 1];
    const first = Math.min(xs[0], AXES[chosen.axis].least ?? Infinity);
    const last = Math.max(xs[xs.length - 1], (spec.until && spec.until[chosen.axis]) || -Infinity);
    return first === last ? [first - 0.5, last + 0.5] : [first, last];
  }

  const sizeOf = (state) => ({ width: state.box.clientWidth || 320, height: state.box.clientHeight || 168 });

  // ---- what uPlot is told

  function options(state, does) {
    const count = state.lines.length;
    let own = state.lines;
    const lineOf = (i) => {
      if (state.lines.length === count) own = state.lines; // else another plot is there, and this one draws once more
      return own[(i - 1) % count];
    };
    const stroke = (plot, i) => {
      const line = lineOf(i);
      return colour(`series-${line.colour}`, i <= count && isSmooth(state, line) ? FAINT : 1);
    };
    const one = (i) => {
      const line = lineOf(i);
      const points = i <= count && line.points ? { show: true, size: 6, fill: stroke } : { show: dotsOf };
      return { stroke, width: 1.6, dash: line.dashed ? [6, 4] : undefined, points, spanGaps: Boolean(line.points && !line.errors), show: isShown(state, line) };
    };
    const axis = { stroke: () => colour("muted"), font: `11px ${getComputedStyle(document.body).fontFamily}`, ticks: { show: false } };
    return {
      ...sizeOf(state),
      padding: [8, 10, 0, 0],
      legend: { show: false },
      scales: {
        x: { time: false, range: () => horizontalReach(state) },
        y: { distr: isLog(state) ? 3 : 1, range: () => verticalReach(shownLines(state), ...horizontalReach(state), state.spec.min, isLog(state)) },
      },
      series: [{}, ...Array.from({ length: 2 * count }, (_, i) => one(i + 1))],
      axes: [
        { ...axis, size: 20, grid: { show: false }, splits: (plot) => ticksAlong(plot), values: (plot, ticks) => ticks.map(() => "") },
        {
          ...axis,
          gap: 6,
          grid: { stroke: () => colour("grid"), width: 1 },
          size: (plot, texts) => 12 + 6.3 * Math.max(2, ...(texts || []).map((text) => text.length)),
          splits: (plot, at, low, high) => (isLog(state) ? logTicks : roundTicks)(low, high, plot.height > 220 ? 6 : 4),
          values: (plot, ticks) => ticks.map((value) => formatValue(Math.abs(value) < 1e-12 * plot.scales.y.max ? 0 : value, state.spec.format)),
        },
      ],
      cursor: {
        y: false,
        drag: { x: true, y: false, setScale: false, dist: 4 },
        bind: { dblclick: () => () => { does.reset(); return null; } },
        dataIdx: (plot, i, near) => (i ? knownNear(plot.data[i], near) : near),
        move: (plot, left, top) => [snapped(plot, left), top],
        points: { size: 8, width: 1.5, stroke: () => colour("surface"), fill: (plot, i) => colour(`series-${lineOf(i).colour}`), show: (plot, i) => (i <= count ? html("i", "chart-dot") : null) },
      },
      hooks: {
        drawAxes: [(plot) => { wordsAlong(plot); under(state, plot); }],
        draw: [(plot) => errorBars(state, plot)],
        setCursor: [does.moved],
        setSelect: [does.selected],
      },
    };
  }

  // a value with a gap at either side would be no line
  function dotsOf(plot, i) {
    const values = plot.data[i];
    return values.length < 2 || values.filter(known).length < 2;
  }

  // of values in which undefined says that a line has no place there, the nearest place that it has
  function knownNear(values, near) {
    if (near === null || values[near] !== undefined) return near;
    for (let away = 1; away < values.length; away++) {
      if (values[near - away] !== undefined) return near - away;
      if (values[near + away] !== undefined) return near + away;
    }
    return near;
  }

  function snapped(plot, left) {
    const xs = plot.data[0];
    return left < 0 || !xs.length ? left : plot.valToPos(xs[nearestPlace(xs, plot.posToVal(left, "x"))], "x");
  }

  // the first place, and round ones that leave room for its words
  function ticksAlong(plot) {
    const { min, max } = plot.scales.x;
    const xs = plot.data[0];
    const axis = AXES[chosen.axis];
    const first = Math.max(min, Math.min(xs[0], axis.least ?? Infinity));
    const unit = axis.unit(max);
    const room = plot.bbox.width / devicePixelRatio;
    const wide = Math.max(56, 7 * axis.tick(max, unit).length + 20);
    const ticks = roundTicks(first / unit, max / unit, Math.max(2, room / wide), axis.whole).map((tick) => tick * unit);
    const clear = first + ((8 * firstTick(first, unit).length + 18) / room) * (max - min);
    return [first, ...ticks.filter((tick) => tick > clear && tick <= max)];
  }

  const firstTick = (place, unit) => `${AXES[chosen.axis].title.toLowerCase()} ${AXES[chosen.axis].tick(place, unit)}`;

  function wordsAlong(plot) {
    const { ctx, bbox } = plot;
    const ratio = devicePixelRatio;
    const axis = AXES[chosen.axis];
    const unit = axis.unit(plot.scales.x.max);
    ctx.save();
    ctx.fillStyle = colour("muted");
    ctx.font = `${11 * ratio}px ${getComputedStyle(document.body).fontFamily}`;
    ctx.textBaseline = "top";
    ticksAlong(plot).forEach((tick, i) => {
      const x = plot.valToPos(tick, "x", true);
      const text = i ? axis.tick(tick, unit) : firstTick(tick, unit);
      const half = ctx.measureText(text).width / 2;
      ctx.textAlign = "center";
      ctx.fillText(text, Math.min(Math.max(x, bbox.left + half), bbox.left + bbox.width - half + 8 * ratio), bbox.top + bbox.height + 6 * ratio);
    });
    ctx.restore();
  }

  // what lies under the lines: marks and bands
  function under(state, plot) {
    const { ctx, bbox } = plot;
    const X = (x) => plot.valToPos(x, "x", true);
    const Y = (y) => plot.valToPos(y, "y", true);
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    state.lines.forEach((line, i) => {
      if (!isShown(state, line)) return;
      ctx.fillStyle = colour(`series-${line.colour}`, 0.13);
      for (const { low, high } of state.bands[i]) fillBand(ctx, line.x, low, high, X, Y);
    });
    ctx.strokeStyle = colour("warn", 0.8);
    ctx.lineWidth = devicePixelRatio;
    ctx.setLineDash([2 * devicePixelRatio, 4 * devicePixelRatio]);
    for (const mark of state.spec.marks || []) {
      if (!known(mark[chosen.axis])) continue;
      ctx.beginPath();
      ctx.moveTo(X(mark[chosen.axis]), bbox.top);
      ctx.lineTo(X(mark[chosen.axis]), bbox.top + bbox.height);
      ctx.stroke();
    }
    ctx.restore();
  }

  function fillBand(ctx, xs, low, high, X, Y) {
    let run = [];
    const close = () => {
      if (run.length) {
        ctx.beginPath();
        for (const at of run) ctx.lineTo(X(xs[at]), Y(high[at]));
        for (const at of run.reverse()) ctx.lineTo(X(xs[at]), Y(low[at]));
        ctx.fill();
      }
      run = [];
    };
    xs.forEach((_, at) => (known(low[at]) && known(high[at]) ? run.push(at) : close()));
    close();
  }

  function errorBars(state, plot) {
    const { ctx } = plot;
    const foot = 3 * devicePixelRatio;
    ctx.save();
    ctx.lineWidth = 1.3 * devicePixelRatio;
    for (const line of state.lines) {
      if (!line.errors || !isShown(state, line)) continue;
      ctx.strokeStyle = colour(`series-${line.colour}`);
      line.x.forEach((each, at) => {
        if (!known(line.y[at]) || !known(line.errors[at]) || each < plot.scales.x.min || each > plot.scales.x.max) return;
        const x = plot.valToPos(each, "x", true);
        const least = isLog(state) ? plot.scales.y.min : -Infinity;
        const [low, high] = [-1, 1].map((sign) => plot.valToPos(Math.max(least, line.y[at] + sign * line.errors[at]), "y", true));
        ctx.beginPath();
        for (const y of [low, high]) { ctx.moveTo(x - foot, y); ctx.lineTo(x + foot, y); }
        ctx.moveTo(x, low);
        ctx.lineTo(x, high);
        ctx.stroke();
      });
    }
    ctx.restore();
  }

  const plotted = (state, does) => new uPlot(options(state, does), state.data, state.box);

  return { isLog, isShown, prepare, colour, forgetColours, horizontalReach, wholeReach, sizeOf, plotted };
})();
