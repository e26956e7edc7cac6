// The live page: what the daemon tells by server-sent events, kept and drawn a few times a second. Nothing is kept that
// the daemon does not keep: after a break in the connection it tells everything anew. Every text is put in as text, never
// as HTML. show.js puts it into the page, buttons.js asks for what the buttons say.
"use strict";

const TALKS = 12;
const MOST_POINTS = 3000;
const DRAW_MS = 300;
const TALK_MS = 1500;
const AGAIN_MS = 5000;

const CHARTS = JSON.parse(at("charts").textContent);

let curves = { step: [] };
let status = null;
let heldOut = [];
let groups = [];
let incidents = [];
let over = null;
let lost = false;
let held = false;
let reading = false;
let asking = false;
const peaks = {};
const places = [];
let heldOutPlace = null;

// ---- data

function addStep(step, figures) {
  const steps = curves.step;
  while (steps.length && steps[steps.length - 1] >= step) for (const name of Object.keys(curves)) curves[name].pop();
  for (const name of Object.keys(figures)) if (!(name in curves)) curves[name] = steps.map(() => null);
  for (const name of Object.keys(curves)) if (name !== "step") curves[name].push(name in figures ? figures[name] : null);
  steps.push(step);
}

const column = (name) => curves[name] || [];

// along what the curves are drawn; a point that stands for several steps has their mean time
function axesOf() {
  let passed = 0;
  const times = column("step_time");
  const time = curves.step.map((step, i) => {
    passed += (known(times[i]) ? times[i] : 0) * (step - (curves.step[i - 1] || 0));
    return passed;
  });
  return { step: curves.step, time, tokens: column("num_tokens") };
}

// the bands about a line: between two metrics, or as wide as another one where the line itself has been
function bandsOf(chart, middle) {
  const measured = chart.bands.map((edges) => edges.map(column)).filter((edges) => edges.every((edge) => edge.length));
  if (measured.length) return measured.map(([low, high]) => ({ low, high }));
  const spread = chart.spread.map(column).find((values) => values.length);
  if (!spread) return [];
  const [least, most] = reachOf([middle]);
  const shifted = (sign) => middle.map((y, i) => (known(y) && known(spread[i]) ? Math.min(most, Math.max(least, y + sign * spread[i])) : null));
  return [{ low: shifted(-1), high: shifted(1) }];
}

function seriesOf(chart, x) {
  const measured = chart.lines.filter(([metric]) => column(metric).length);
  const parts = chart.parts ? Object.keys(curves).filter((metric) => metric.startsWith("rewards/")) : [];
  const lines = measured.length ? measured : chart.lines.slice(0, 1);
  if (parts.length > 1) for (const metric of parts) lines.push([metric, metric.slice("rewards/".length, -"/mean".length)]);
  return lines.map(([metric, name], i) => {
    const y = column(metric);
    return { name, x, y, bands: i ? [] : bandsOf(chart, y), points: metric.startsWith("eval_") }; // few steps have those
  });
}

function newest(name) {
  const values = column(name);
  return values.length ? values[values.length - 1] : null;
}

function recentMean(name, count) {
  const values = column(name).slice(-count).filter((value) => value !== null);
  return values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null;
}

// what was evaluated, where the run was by then
function drawHeldOut(x) {
  heldOutPlace ||= html("figure", "card", null);
  if (!heldOut.length || !places.length) return;
  places[0].after(heldOutPlace);
  const seen = (values, step) => {
    const place = x.step.findLastIndex((known) => known <= step);
    return place < 0 ? 0 : values[place];
  };
  const series = heldOut.map(({ name, figure, step, y, errors }) => {
    const along = (values) => step.map((each) => seen(values, each));
    return { name: `${name} ${figure}`, x: { step, time: along(x.time), tokens: along(x.tokens) }, y, errors, points: true };
  });
  const format = heldOut.every(({ share }) => share) ? "percent" : "number";
  const about = "Rows that are not trained on, with standard errors.";
  const until = { step: x.step.at(-1), time: x.time.at(-1), tokens: x.tokens.at(-1) };
  const min = format === "percent" && heldOut.every(({ y }) => y.length === 1) ? 0 : undefined; // else only its error bar is seen
  troupeChart(heldOutPlace, { key: "held_out", title: "Held-out", about, format, min, until, series });
}

// charts that not every run has are there once something of them is measured
function drawCurves() {
  const x = axesOf();
  CHARTS.forEach((chart, i) => {
    const place = (places[i] ||= html("figure", "card", at("curves")));
    place.hidden = chart.optional && !chart.lines.some(([metric]) => column(metric).length);
    if (place.hidden) return;
    const { key, title, about, format, smooth, least: min } = chart;
    troupeChart(place, { key, title, about, format, smooth, min, empty: curves.step.length ? "" : "comes with the first step", series: seriesOf(chart, x) });
  });
  drawHeldOut(x);
}

// ---- drawing a few times a second, however much comes

const dirty = new Set();
let timer = null;

function touch(what) {
  dirty.add(what);
  if (timer === null) timer = setTimeout(draw, DRAW_MS);
}

function draw() {
  timer = null;
  if (document.hidden) return; // drawn when it is looked at again
  if (dirty.has("curves")) drawCurves();
  if (dirty.has("incidents")) showIncidents();
  if (dirty.has("groups") && !at("talks").childElementCount) showTalks();
  if (dirty.size) showStatus();
  dirty.clear();
}

// nobody looks: a browser has few connections to one server, and the page in front needs one for its buttons
document.addEventListener("visibilitychange", () => {
  if (over) return;
  if (document.hidden) disconnect();
  else connect();
  draw();
});
setInterval(showTalks, TALK_MS);

// ---- what the daemon tells

let source = null;
let retry = null;

function disconnect() {
  clearTimeout(retry);
  if (source) source.close();
}

function connect() {
  disconnect();
  source = new EventSource("events");
  for (const [kind, handle] of Object.entries(handlers)) {
    source.addEventListener(kind, (event) => {
      lost = false;
      handle(JSON.parse(event.data));
    });
  }
  source.onerror = () => {
    if (over) return;
    lost = true;
    touch("status");
    if (source.readyState === EventSource.CLOSED) retry = setTimeout(connect, AGAIN_MS); // refused: it gives up itself
  };
}

const handlers = {
  about(about) {
    [groups, incidents] = [[], []];
    say("run", about.run);
    say("folder", about.folder);
  },
  curves(table) {
    curves = { step: [], ...table };
    touch("curves");
  },
  held_out(sets) {
    heldOut = sets;
    touch("curves");
  },
  step({ step, figures }) {
    addStep(step, figures);
    touch("curves");
    if (curves.step.length > MOST_POINTS) connect(); // the daemon tells them anew, thinned out
  },
  group(group) {
    groups = [...groups, group].slice(-TALKS);
    touch("groups");
  },
  incident(incident) {
    const isSame = (one) => ["actor", "kind", "message"].every((key) => one[key] === incident[key]);
    const again = incident.times > 1 ? incidents.findIndex(isSame) : -1; // once more: told anew, with how often
    incidents = [incident, ...incidents.filter((_, i) => i !== again)].slice(0, 64);
    touch("incidents");
  },
  status(told) {
    status = told;
    if (!incidents.length) touch("incidents");
    touch("status");
  },
  end(end) {
    over = end;
    source.close();
    touch("status");
  },
};

chartTools(at("tools"));
themeSwitch(at("theme"));
connect();
drawCurves();
