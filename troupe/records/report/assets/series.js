// The figures of charts before they are drawn: pure functions over arrays in which null is a gap. Needs format.js.
"use strict";

// Round numbers that divide [low, high] into about `count` parts.
function roundTicks(low, high, count, whole) {
  const rough = (high - low) / Math.max(1, count);
  if (!(rough > 0)) return [low];
  let step = 10 ** Math.floor(Math.log10(rough));
  for (const factor of [2, 2.5, 2]) if (step < rough) step *= factor;
  if (whole) step = Math.max(1, Math.round(step));
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++) found.push(n * step);
  return found;
}

// 1, 2, 5 of each power of ten; of many powers only the powers, of a part of one as on an even axis.
function logTicks(low, high, count) {
  const powers = Math.log10(high / low);
  if (powers < 1) return roundTicks(low, high, count).filter((value) => value > 0);
  const every = Math.max(1, Math.ceil(powers / (count + 1)));
  const found = [];
  for (let n = Math.floor(Math.log10(low)); n <= Math.log10(high); n++) {
    if (((n % every) + every) % every) continue;
    for (const factor of powers < 2 ? [1, 2, 5] : [1]) found.push(factor * 10 ** n);
  }
  return found.filter((value) => value >= low * 0.999 && value <= high * 1.001);
}

// The exponential moving average, freed of its start: TensorBoard's smoothing, by a weight from 0 to below 1.
function smoothedBy(values, weight) {
  let last = 0;
  let count = 0;
  return values.map((value) => {
    if (!known(value)) return null;
    last = last * weight + (1 - weight) * value;
    count += 1;
    return last / (1 - weight ** count);
  });
}

// Smooth, too, and neither late nor early: the edges of a band, which may jump from one value to another and back.
function evenedBy(values, weight) {
  const slow = (1 + weight) / 2;
  return smoothedBy(smoothedBy(values, slow).reverse(), slow).reverse();
}

function reachOf(lists, low = Infinity, high = -Infinity) {
  for (const list of lists) {
    for (const value of list) {
      if (!known(value)) continue;
      if (value < low) low = value;
      if (value > high) high = value;
    }
  }
  return [low, high];
}

// The place in ascending numbers that is nearest to x.
function nearestPlace(xs, x) {
  let low = 0;
  let high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle;
    else high = middle;
  }
  return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
}

// A chart's lines along an axis: {name, run, colour, x, y, bands, errors, points}, without the points of unknown place,
// and on a logarithmic axis without what is not above 0.
function linesAlong(spec, axis, log) {
  const cleaned = (values) => (log ? values.map((value) => (value > 0 ? value : null)) : values);
  return spec.series.map((one, i) => {
    const xs = one.x[axis] || [];
    const there = xs.every(known) && xs.length === one.y.length ? null : one.y.map((_, at) => at).filter((at) => known(xs[at]));
    const pick = (values) => (there ? there.map((at) => values[at]) : values);
    return {
      ...one,
      colour: one.color || (i % 8) + 1,
      x: pick(xs),
      y: cleaned(pick(one.y)),
      bands: (one.bands || []).map(({ low, high }) => ({ low: cleaned(pick(low)), high: cleaned(pick(high)) })),
      errors: one.errors ? pick(one.errors) : null,
    };
  });
}

const isAscending = (xs) => xs.every((x, i) => i === 0 || x > xs[i - 1]);

// The places of all lines as one ascending list, and what puts a line's values there: undefined where it has no place.
function together(lines) {
  const [first] = lines;
  if (first && isAscending(first.x) && lines.every(({ x }) => x === first.x)) return { xs: first.x, spread: (_, values) => values };
  const xs = [...new Set(lines.flatMap(({ x }) => x))].sort((one, other) => one - other);
  const places = new Map(xs.map((x, at) => [x, at]));
  const spread = ({ x }, values) => {
    const put = new Array(xs.length);
    x.forEach((each, at) => { put[places.get(each)] = values[at]; });
    return put;
  };
  return { xs, spread };
}

// The vertical reach of lines between two places of their axis. A band that is far wider than its line is cut off, so
// that it does not press the line flat.
function verticalReach(lines, from, to, least, log) {
  const within = ({ x }, values) => values.filter((_, at) => x[at] >= from && x[at] <= to);
  let [low, high] = reachOf(lines.map((line) => within(line, line.y)));
  if (low > high) [low, high] = reachOf(lines.map(({ y }) => y));
  if (low > high) return log ? [1, 10] : [0, 1];
  const edges = lines.flatMap((line) => line.bands.flatMap((band) => [within(line, band.low), within(line, band.high)]));
  const room = 1.5 * (high - low || Math.abs(high) || 1);
  const [lowest, highest] = reachOf(edges, low, high);
  [low, high] = log ? [lowest, highest] : [Math.max(lowest, low - room), Math.min(highest, high + room)];
  for (const line of lines) {
    if (!line.errors) continue;
    const ends = (sign) => line.y.map((y, at) => (known(y) && known(line.errors[at]) ? y + sign * line.errors[at] : null));
    [low, high] = reachOf([within(line, ends(-1)), within(line, ends(1))].map((list) => (log ? list.filter((y) => y > 0) : list)), low, high);
  }
  if (log) return low === high ? [low / 2, high * 2] : [low / 1.15, high * 1.15];
  if (known(least)) low = Math.min(low, least);
  if (low === high) {
    const about = Math.abs(low) * 0.1 || 1;
    return [least === low ? low : low - about, high + about];
  }
  const margin = 0.06 * (high - low);
  return [least === low ? low : low - margin, high + margin];
}

// A chart as comma-separated values: a row for each place, lines of other places empty there.
function chartAsCsv(spec) {
  const tables = [...new Set(spec.series.map((one) => one.x))];
  const axes = Object.keys(AXES).filter((axis) => tables.some((table) => table[axis]));
  const columns = [];
  for (const one of spec.series) {
    const name = one.run && one.run !== one.name ? `${one.run}: ${one.name}` : one.name;
    const add = (title, values) => columns.push({ title, table: one.x, values });
    add(name, one.y);
    (one.bands || []).forEach((band, i) => {
      const which = band.name || (one.bands.length > 1 ? `band ${i + 1}` : "band");
      add(`${name} (${which}, low)`, band.low);
      add(`${name} (${which}, high)`, band.high);
    });
    if (one.errors) add(`${name} (error)`, one.errors);
  }
  // what a spreadsheet would take for a formula begins with an apostrophe
  const cell = (text) => `"${(/^[=+\-@\t\r]/.test(text) ? `'${text}` : text).replaceAll('"', '""')}"`;
  const rows = [[...axes.map((axis) => (axis === "time" ? "seconds" : axis)), ...columns.map(({ title }) => cell(title))]];
  for (const table of tables) {
    table.step.forEach((_, at) => {
      const places = axes.map((axis) => (table[axis] && known(table[axis][at]) ? table[axis][at] : ""));
      rows.push([...places, ...columns.map((column) => (column.table === table && known(column.values[at]) ? column.values[at] : ""))]);
    });
  }
  return `${rows.map((row) => row.join(",")).join("\r\n")}\r\n`;
}
