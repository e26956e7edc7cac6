// What the live page shows of the state that live.js keeps.
"use strict";

const GROUPS = 8;
const FINDINGS = 3;
const HELD_OUT = 2;
const REPORTS = / (incidents|spans)$/;

// ---- words

function duration(seconds) {
  let minutes = Math.floor(Math.round(seconds) / 60);
  const rest = Math.round(seconds) % 60;
  let hours = Math.floor(minutes / 60);
  minutes %= 60;
  const days = Math.floor(hours / 24);
  hours %= 24;
  if (days) return `${days} d ${hours} h`;
  if (hours) return `${hours} h ${String(minutes).padStart(2, "0")} min`;
  return minutes ? `${minutes} min ${String(rest).padStart(2, "0")} s` : `${rest} s`;
}

const figure = (value, format = "number") => formatValue(value, format);
const whole = FORMATS.integer;
const clock = (unix) => new Date(1000 * unix).toLocaleTimeString([], { hourCycle: "h23" });
const sum = (counts) => Object.values(counts).reduce((total, count) => total + count, 0);
const listed = (counts) => Object.entries(counts).map(([name, count]) => `${count} ${name}`).join(", ");

function say(id, text) {
  const node = at(id);
  if (node.textContent !== text) node.textContent = text;
  if (node.title !== text && text.length > 12) node.title = text;
}

// as many rows as there are items; those that are there are used again
function fill(parent, items, build, show) {
  while (parent.childElementCount > items.length) parent.lastElementChild.remove();
  items.forEach((item, i) => {
    const row = parent.children[i] || build(parent);
    show(row, item);
  });
}

function set(node, text) {
  if (node.textContent !== text) node.textContent = text;
  if (node.title !== text) node.title = text;
}

// ---- what is shown

const SILENT = "The daemon does not answer, or has too many pages open; this page tries again. If it was started anew, open its new address.";
const BADGES = { running: "busy", paused: "warn", held: "warn", draining: "warn", stopping: "warn", restarting: "bad", failed: "bad", ended: "good" };

function showStatus() {
  const phase = over ? (over.well ? "ended" : "failed") : lost ? "no answer" : status ? status.phase : "connecting";
  const badge = at("phase");
  set(badge, phase);
  badge.className = `badge ${lost && !over ? "bad" : BADGES[phase] || ""}`;
  document.body.classList.toggle("gone", lost || Boolean(over));
  showButtons(phase);
  if (!status) {
    if (over || lost) set(at("calm"), over ? over.message : SILENT);
    return;
  }
  const { step, total_steps: total } = status;
  document.title = total ? `${whole(step)}/${whole(total)} ${phase} · ${at("run").textContent}` : `${phase} · ${at("run").textContent}`;
  at("progress").style.width = total ? `${(100 * step) / total}%` : "0";
  say("step", total ? `${whole(step)} / ${whole(total)}` : "–");
  say("step-more", total ? `${Math.floor((100 * step) / total)} %` : " ");
  const pace = recentMean("step_time", 20) || status.metrics.step_time || null;
  const left = pace !== null && total ? (total - step) * pace : null;
  say("left", phase === "ended" || left === 0 ? "none" : left === null ? "–" : duration(left));
  say("left-more", pace === null ? " " : `${figure(pace, "seconds")} a step`);
  const first = column("reward").find(known);
  say("reward", figure(newest("reward")));
  say("reward-more", known(first) ? `from ${figure(first)}` : " ");
  say("speed", figure(newest("tokens_per_second"), "integer"));
  const length = newest("completions/mean_length");
  say("speed-more", length === null ? " " : `${figure(Math.round(10 * length) / 10)} a completion`);
  const alive = status.groups;
  say("alive", whole(alive.length));
  say("alive-more", alive.length ? `the oldest is ${duration(alive[0].age_s)} old` : " ");
  const count = sum(status.incidents);
  say("mishaps", whole(count));
  say("mishaps-more", count ? listed(status.incidents) : "none");
  showHeldOut();
  const { activity } = status;
  say("now", activity && !over && !lost ? activity.what + activity.detail : "\u00a0");
  at("now").classList.toggle("waits", Boolean(activity && activity.waiting));
  showNotes();
  showActors();
  showQueues();
  showGroups();
  showMembers();
}

// a tile for each of the first sets
function showHeldOut() {
  heldOut.slice(0, HELD_OUT).forEach(({ name, figure: measure, share, step, y }, i) => {
    const tile = at(`held-out-${i}`);
    const format = share ? "percent" : "number";
    tile.hidden = false;
    set(tile.children[0], `${name} ${measure}`);
    const since = y.length > 1 ? `from ${figure(y[0], format)}` : step[0] ? `at step ${whole(step[0])}` : "untrained";
    set(tile.children[1], figure(y[y.length - 1], format));
    set(tile.children[2], since);
  });
}

function showButtons(phase) {
  const goes = status && !over && !lost && !asking;
  const can = {
    Pause: ["running", "held", "starting", "restarting"],
    Resume: ["paused"],
    Step: ["paused"],
    Checkpoint: ["running", "paused", "held", "draining"],
    Drain: ["running", "paused", "held", "starting", "restarting"],
    Stop: ["running", "paused", "held", "starting", "restarting", "draining"],
  };
  for (const button of at("buttons").children) button.disabled = !goes || !can[button.dataset.ask].includes(phase);
}

// never "nothing" beside an incident: some are the daemon's own, which the run does not count
function calmly() {
  if (status.phase === "paused") return "Paused: no step is begun until you resume.";
  const kinds = { ...status.incidents };
  for (const { kind, times } of incidents) if (!(kind in status.incidents)) kinds[kind] = (kinds[kind] || 0) + (times || 1);
  const count = sum(kinds);
  if (!count) return "Nothing needs your attention.";
  const waits = status.activity && status.activity.waiting; // said above
  return `${waits ? "" : "Nothing holds the run up now. "}Look at ${count === 1 ? "the incident" : `the ${whole(count)} incidents`} below: ${listed(kinds)}.`;
}

// as records/diagnosis/words.py tells it
function diagnosed({ title, evidence, since, remedy }) {
  const command = remedy.replace(/^--set (?=learner\.lr=)/, () => `troupe set ${quoted(at("folder").textContent)} `);
  return `Diagnosis: ${title}: ${evidence} (since step ${whole(since)}); try ${command}`;
}

function showNotes() {
  const notes = [];
  if (over) notes.push([over.well ? "" : "bad", over.message]);
  else if (lost) notes.push(["bad", `${SILENT} What you see is from before.`]);
  if (!over && status.restarting) {
    const { attempt, limit, next_try_s: wait, reason } = status.restarting;
    const goesOn = status.phase !== "restarting" && status.phase !== "starting";
    const when = goesOn ? "goes on" : wait ? `in ${Math.ceil(wait)} s` : "is under way";
    notes.push([goesOn ? "warn" : "bad", `Start ${attempt} of ${limit} after a failure ${when}: ${reason}`]);
  }
  if (!over && status.notice) notes.push(["warn", status.notice]);
  const down = Object.entries(status.rewards_down).map(([name, reason]) => ({ name, reason, sign: `reward ${name} is down` }));
  const holds = ({ sign }) => status.held.some((reason) => reason.startsWith(sign));
  for (const reason of status.held) if (!down.some(({ sign }) => reason.startsWith(sign))) notes.push(["warn", `No step is begun: ${reason}`]);
  for (const one of down) notes.push(["warn", `The ${one.sign}${holds(one) ? ", so no step is begun" : ""}: ${one.reason}`]);
  for (const finding of status.findings.slice(0, FINDINGS)) notes.push(["warn", diagnosed(finding)]);
  if (status.findings.length > FINDINGS) notes.push(["warn", `Diagnosis: ${status.findings.length - FINDINGS} more`]);
  if (Object.keys(status.restarts).length) notes.push(["", `Actors that were made anew: ${Object.entries(status.restarts).map(([name, times]) => `${name} ${times}×`).join(", ")}`]);
  const parent = at("notes");
  const calm = notes.length === 0;
  if (calm) notes.push(["calm", calmly()]);
  fill(parent, notes, (to) => html("p", "note", to), (node, [kind, text]) => {
    node.className = `note ${kind}`;
    if (node.textContent !== text) node.textContent = text;
  });
}

function showActors() {
  const build = (to) => {
    const row = html("div", "row", to);
    html("i", "dot", row);
    html("span", "", row);
    html("span", "muted", row);
    return row;
  };
  fill(at("actors"), Object.entries(status.doing), build, (row, [name, what]) => {
    row.children[0].className = `dot ${what.startsWith("waits") || what === "nothing told" ? "k-wait" : "k-busy"}`;
    set(row.children[1], name);
    set(row.children[2], what);
  });
}

function meterRow(columns) {
  return (to) => {
    const row = html("div", "row", to);
    for (const className of columns) {
      const cell = html(className === "meter" ? "div" : "span", className, row);
      if (className === "meter") html("i", "", cell);
    }
    return row;
  };
}

function showQueues() {
  const waiting = Object.entries(status.queues);
  const reports = waiting.filter(([name]) => REPORTS.test(name));
  say("reports", `${reports.length} channels of reports: ${whole(reports.reduce((all, [, depth]) => all + depth, 0))}`);
  showDepths(at("queues"), waiting.filter(([name]) => !REPORTS.test(name)));
  showDepths(at("report-queues"), reports);
}

function showDepths(parent, depths) {
  fill(parent, depths, meterRow(["", "meter", "figure"]), (row, [name, depth]) => {
    peaks[name] = Math.max(peaks[name] || 8, depth);
    set(row.children[0], name);
    row.children[1].firstChild.style.width = `${(100 * depth) / peaks[name]}%`;
    set(row.children[2], whole(depth));
  });
}

function showGroups() {
  const alive = status.groups;
  const oldest = alive.length ? alive[0].age_s : 1;
  fill(at("groups"), alive.slice(0, GROUPS), meterRow(["", "muted", "meter", "figure muted"]), (row, group) => {
    const { step, place, attempt } = group.slot;
    set(row.children[0], `step ${whole(step + 1)}, place ${place + 1}${attempt ? `, try ${attempt + 1}` : ""}`);
    set(row.children[1], group.waiting ? `for ${group.owner}` : group.owner);
    row.children[2].firstChild.style.width = `${oldest ? (100 * group.age_s) / oldest : 0}%`;
    set(row.children[3], group.age_s < 60 ? `${group.age_s.toFixed(1)} s` : duration(group.age_s));
  });
}

function showIncidents() {
  if (!incidents.length) {
    const none = at("incidents").querySelector("p");
    const count = status ? sum(status.incidents) : 0;
    if (none) set(none, count ? `${whole(count)} before this daemon began: troupe inspect tells of them.` : "None so far.");
    return;
  }
  const build = (to) => {
    const row = html("div", "incident", to);
    for (const name of ["when", "kind", "what"]) html("span", name, row);
    return row;
  };
  const parent = at("incidents");
  if (!parent.querySelector(".incident")) parent.replaceChildren();
  fill(parent, incidents, build, (row, incident) => {
    set(row.children[0], clock(incident.at));
    set(row.children[1], incident.kind);
    const times = incident.times > 1 ? ` (${whole(incident.times)} times)` : "";
    set(row.children[2], `${incident.actor}: ${incident.message}${times}`);
  });
}

function talk(to, { group, at: unix }) {
  const card = html("article", "talk", to);
  const head = html("div", "talk-head", card);
  html("span", "grow", head, `step ${whole(group.step)} · ${group.state} · ${clock(unix)}`);
  const known = group.rewards.filter((reward) => reward !== null);
  const [low, high] = [Math.min(0, ...known), Math.max(...known, 0)];
  const strip = html("span", "strip", head);
  strip.title = `rewards of all ${group.rewards.length}: ${group.rewards.map((reward) => figure(reward)).join(", ")}`;
  for (const reward of group.rewards) {
    const bar = html("i", reward === null ? "none" : "", strip);
    bar.style.height = reward === null ? "4px" : `${high > low ? 2 + (14 * (reward - low)) / (high - low) : 2}px`;
  }
  if (!group.samples.some((sample) => sample.said.length)) html("pre", "prompt", card, group.prompt);
  group.samples.forEach((sample, i) => {
    const about = html("div", "talk-head", card);
    html("span", "score", about, figure(sample.reward));
    const alike = new Set(group.samples.map((one) => one.reward)).size === 1;
    const kind = alike ? "all alike" : i ? "worst" : "best";
    const scores = Object.entries(sample.scores).map(([name, score]) => `${name} ${figure(score)}`);
    const read = sample.read ? [`${whole(sample.read)} read`] : [];
    const parts = [kind, ...(scores.length > 1 ? scores : []), `${sample.tokens} tokens`, ...read, sample.finish_reason];
    const words = html("span", "grow", about, parts.join(" · "));
    words.title = [...scores, `${sample.tokens} tokens`, `ended by ${sample.finish_reason}`].join("\n");
    if (sample.said.length) conversation(card, sample.said);
    else html("pre", "", card, sample.text);
  });
}

// cards that are there stay as they are, with what is unfolded in them
function showTalks() {
  if (held || reading) return;
  const parent = at("talks");
  const keyOf = ({ group, at: unix }) => `${group.gid} ${unix}`;
  const wanted = new Set(groups.map(keyOf));
  for (const card of [...parent.children]) if (!wanted.has(card.dataset.key)) card.remove();
  const there = new Set([...parent.children].map((card) => card.dataset.key));
  for (const one of groups.filter((group) => !there.has(keyOf(group)))) {
    const parts = document.createDocumentFragment();
    talk(parts, one);
    parts.firstChild.dataset.key = keyOf(one);
    parent.prepend(parts);
  }
}
