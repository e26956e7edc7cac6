// What the scripts of the report and the live page share: figures as text by the name of a format, and elements.
// A `format` is a name in FORMATS, as records/figures.py gives it to every chart; records/text.py is the same in Python.
"use strict";

const at = (id) => document.getElementById(id);
const known = Number.isFinite;
const FORMATS = {
  number: plain,
  integer: (v) => Math.round(v).toLocaleString("en-US"),
  percent: (v) => `${trim((100 * v).toFixed(Math.abs(v) < 0.0995 ? 2 : 1))} %`,
  seconds,
  gigabytes,
  scientific: (v) => (v === 0 ? "0" : v.toExponential(2).replace("e-", "e−").replace("e+", "e")),
};

function trim(text) {
  return text.includes(".") ? text.replace(/\.?0+$/, "") : text;
}

function plain(v) {
  const size = Math.abs(v);
  if (size === 0) return "0";
  if (size >= 1e9 || size < 1e-4) return v.toExponential(2).replace("e+", "e").replaceAll("-", "−");
  if (size >= 1e6) return `${trim((v / 1e6).toFixed(2))} M`.replace("-", "−");
  if (size >= 1000) return Math.round(v).toLocaleString("en-US").replace("-", "−");
  return trim(v.toPrecision(4)).replace("-", "−");
}

function seconds(v) {
  const size = Math.abs(v);
  if (size === 0) return "0 s";
  if (size < 1) return `${trim((1000 * v).toPrecision(3))} ms`;
  if (size < 120) return `${trim(v.toPrecision(3))} s`;
  if (size < 7200) return `${Math.floor(v / 60)} min ${Math.floor(v % 60)} s`;
  return `${Math.floor(v / 3600)} h ${Math.floor((v % 3600) / 60)} min`;
}

function gigabytes(v) {
  if (v === 0) return "0";
  return Math.abs(v) < 1 ? `${trim((1000 * v).toPrecision(3))} MB` : `${trim(v.toPrecision(3))} GB`;
}

// Along what charts are drawn: the word of an axis, a place on it as text, and a tick, of which the first has the word.
// unit: what its ticks are round numbers of; least: where it begins, else with the first value.
const AXES = {
  step: { title: "Step", told: (v) => `step ${plain(v)}`, tick: plain, unit: () => 1, whole: true },
  time: { title: "Time", told: (v) => `after ${seconds(v)}`, tick: timeTick, unit: timeUnit, least: 0 },
  tokens: { title: "Tokens", told: (v) => `${compact(v)} tokens`, tick: compact, unit: () => 1, whole: true, least: 0 },
};
const UNITS = { 1: "s", 60: "min", 3600: "h", 86400: "d" };

function timeUnit(longest) {
  return [86400, 3600, 60].find((unit) => longest >= 3 * unit) || 1;
}

function timeTick(v, unit) {
  return v === 0 ? "0" : `${trim((v / unit).toFixed(2))} ${UNITS[unit]}`;
}

function compact(v) {
  return new Intl.NumberFormat("en-US", { notation: "compact", maximumSignificantDigits: 4 }).format(v);
}

function formatValue(value, format) {
  return known(value) ? (FORMATS[format] || plain)(value) : "–";
}

// a text as a shell takes it for one word
function quoted(text) {
  return /^[\w./:=+-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
}

function html(tag, className, parent, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}
