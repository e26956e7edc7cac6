// The live page: what the daemon tells by server-sent events, shown in place. Every text is put in as text, never as
// HTML. Nothing is kept that the daemon does not keep: after a break in the connection it tells everything anew.
"use strict";

(() => {
  const at = (id) => document.getElementById(id);
  const GROUPS = 8;
  const TALKS = 12;
  const MOST_POINTS = 3000;
  const DRAW_MS = 300;
  const TALK_MS = 1500;
  const AGAIN_MS = 5000;
  const REPORTS = / (incidents|spans)$/;

  const CHARTS = [
    { title: "Reward", about: "mean over all completions, and the spread within groups", of: rewardSeries, smooth: true },
    { title: "Loss", of: () => [line("loss")], smooth: true },
    { title: "KL to the reference", of: () => [line("kl")], empty: "not measured (learner.beta is 0)" },
    { title: "Entropy, nats", of: () => [line("entropy")] },
    { title: "Tokens a completion", about: "mean, shortest and longest", of: lengthSeries, format: "number", min: 0 },
    { title: "Tokens a second", of: () => [line("tokens_per_second")], format: "integer", min: 0, smooth: true },
  ];

  let curves = { step: [] };
  let status = null;
  let groups = [];
  let incidents = [];
  let over = null;
  let lost = false;
  let held = false;
  let reading = false;
  let asking = false;
  const peaks = {};
  const charts = [];

  // ---- data

  function addStep(step, figures) {
    const steps = curves.step;
    while (steps.length && steps[steps.length - 1] >= step) for (const name of Object.keys(curves)) curves[name].pop();
    for (const name of Object.keys(figures)) if (!(name in curves)) curves[name] = steps.map(() => null);
    for (const name of Object.keys(curves)) if (name !== "step") curves[name].push(name in figures ? figures[name] : null);
    steps.push(step);
  }

  const column = (name) => curves[name] || [];
  const line = (name, more) => ({ name, x: curves.step, y: column(name), ...more });

  function around(middle, low, high) {
    const ys = column(middle);
    const bound = (i, of) => (ys[i] === null ? null : of(i));
    return { low: ys.map((_, i) => bound(i, low)), high: ys.map((_, i) => bound(i, high)) };
  }

  function rewardSeries() {
    const spread = column("reward_std_within_groups");
    const band = spread.length ? around("reward", (i) => column("reward")[i] - spread[i], (i) => column("reward")[i] + spread[i]) : undefined;
    const parts = Object.keys(curves).filter((name) => name.startsWith("rewards/"));
    const named = (name) => name.slice("rewards/".length, -"/mean".length);
    return [line("reward", { name: "all together", band }), ...(parts.length > 1 ? parts.map((name) => line(name, { name: named(name) })) : [])];
  }

  function lengthSeries() {
    const [low, high] = [column("completions/min_length"), column("completions/max_length")];
    const band = low.length && high.length ? around("completions/mean_length", (i) => low[i], (i) => high[i]) : undefined;
    return [line("completions/mean_length", { name: "mean", band })];
  }

  function newest(name) {
    const values = column(name);
    return values.length ? values[values.length - 1] : null;
  }

  function recentMean(name, count) {
    const values = column(name).slice(-count).filter((value) => value !== null);
    return values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null;
  }

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

  const figure = (value, format = "number") => window.troupeFormat(value, format);
  const whole = (value) => value.toLocaleString("en-US");
  const clock = (unix) => new Date(1000 * unix).toLocaleTimeString([], { hourCycle: "h23" });
  const sum = (counts) => Object.values(counts).reduce((total, count) => total + count, 0);
  const listed = (counts) => Object.entries(counts).map(([name, count]) => `${count} ${name}`).join(", ");

  function say(id, text) {
    const node = at(id);
    if (node.textContent !== text) node.textContent = text;
    if (node.title !== text && text.length > 12) node.title = text;
  }

  function make(tag, className, parent, text) {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    if (parent) parent.append(node);
    return node;
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
    const spread = newest("reward_std_within_groups");
    say("reward", figure(newest("reward")));
    say("reward-more", spread === null ? " " : `± ${figure(spread)} within groups`);
    say("speed", figure(newest("tokens_per_second"), "integer"));
    const length = newest("completions/mean_length");
    say("speed-more", length === null ? " " : `${figure(Math.round(10 * length) / 10)} a completion`);
    const alive = status.groups;
    say("alive", whole(alive.length));
    say("alive-more", alive.length ? `the oldest is ${duration(alive[0].age_s)} old` : " ");
    const count = sum(status.incidents);
    say("mishaps", whole(count));
    say("mishaps-more", count ? listed(status.incidents) : "none");
    const { activity } = status;
    say("now", activity && !over && !lost ? activity.what + activity.detail : "\u00a0");
    at("now").classList.toggle("waits", Boolean(activity && activity.waiting));
    showNotes();
    showActors();
    showQueues();
    showGroups();
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

  // never "nothing" beside a number of incidents
  function calmly(count) {
    if (status.phase === "paused") return "Paused: no step is begun until you resume.";
    if (!count) return "Nothing needs your attention.";
    return `Nothing holds the run up now. Look at ${count === 1 ? "the incident" : `the ${whole(count)} incidents`} below: ${listed(status.incidents)}.`;
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
    for (const reason of status.held) notes.push(["warn", `No step is begun: ${reason}`]);
    for (const [name, reason] of Object.entries(status.rewards_down)) notes.push(["warn", `The reward ${name} is down: ${reason}`]);
    if (Object.keys(status.restarts).length) notes.push(["", `Actors that were made anew: ${Object.entries(status.restarts).map(([name, times]) => `${name} ${times}×`).join(", ")}`]);
    const parent = at("notes");
    const calm = notes.length === 0;
    if (calm) notes.push(["calm", calmly(sum(status.incidents))]);
    fill(parent, notes, (to) => make("p", "note", to), (node, [kind, text]) => {
      node.className = `note ${kind}`;
      if (node.textContent !== text) node.textContent = text;
    });
  }

  function showActors() {
    const build = (to) => {
      const row = make("div", "row", to);
      make("i", "dot", row);
      make("span", "", row);
      make("span", "muted", row);
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
      const row = make("div", "row", to);
      for (const className of columns) {
        const cell = make(className === "meter" ? "div" : "span", className, row);
        if (className === "meter") make("i", "", cell);
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
      const row = make("div", "incident", to);
      for (const name of ["when", "kind", "what"]) make("span", name, row);
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
    const card = make("article", "talk", to);
    const head = make("div", "talk-head", card);
    make("span", "grow", head, `step ${whole(group.step)} · ${group.state} · ${clock(unix)}`);
    const known = group.rewards.filter((reward) => reward !== null);
    const [low, high] = [Math.min(0, ...known), Math.max(...known, 0)];
    const strip = make("span", "strip", head);
    strip.title = `rewards of all ${group.rewards.length}: ${group.rewards.map((reward) => figure(reward)).join(", ")}`;
    for (const reward of group.rewards) {
      const bar = make("i", reward === null ? "none" : "", strip);
      bar.style.height = reward === null ? "4px" : `${high > low ? 2 + (14 * (reward - low)) / (high - low) : 2}px`;
    }
    make("pre", "prompt", card, group.prompt);
    group.samples.forEach((sample, i) => {
      const about = make("div", "talk-head", card);
      make("span", "score", about, figure(sample.reward));
      const alike = new Set(group.samples.map((one) => one.reward)).size === 1;
      const kind = alike ? "all alike" : i ? "worst" : "best";
      const scores = Object.entries(sample.scores).map(([name, score]) => `${name} ${figure(score)}`);
      const parts = [kind, ...(scores.length > 1 ? scores : []), `${sample.tokens} tokens`, sample.finish_reason];
      const words = make("span", "grow", about, parts.join(" · "));
      words.title = [...scores, `${sample.tokens} tokens`, `ended by ${sample.finish_reason}`].join("\n");
      make("pre", "", card, sample.text);
    });
  }

  let talksShown = -1;
  function showTalks() {
    if (held || reading) return;
    const newestFirst = [...groups].reverse();
    const key = newestFirst.length ? newestFirst[0].group.gid : -1;
    if (key === talksShown) return;
    talksShown = key;
    const parts = document.createDocumentFragment();
    for (const one of newestFirst) talk(parts, one);
    at("talks").replaceChildren(parts);
  }

  function drawCharts() {
    CHARTS.forEach((spec, i) => {
      const { of, ...rest } = spec;
      const filled = { ...rest, xLabel: "step", series: of() };
      if (!curves.step.length) filled.empty = "no step yet";
      if (charts[i]) charts[i].update(filled);
      else charts[i] = window.troupeChart(make("figure", "card", at("curves")), filled);
    });
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
    if (dirty.has("curves")) drawCharts();
    if (dirty.has("incidents")) showIncidents();
    if (dirty.has("groups") && talksShown === -1) showTalks();
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

  // ---- buttons

  const QUESTIONS = {
    Drain: "Finish the steps that are begun, save, and end the run? It can be gone on with later.",
    Stop: "End the run now, with a checkpoint of the last completed step? Steps under way are given up.",
  };

  function confirmed(kind) {
    if (!QUESTIONS[kind]) return Promise.resolve(true);
    const dialog = at("confirm");
    at("question").textContent = QUESTIONS[kind];
    at("yes").textContent = kind;
    return new Promise((resolve) => {
      at("yes").onclick = () => dialog.close("yes");
      at("no").onclick = () => dialog.close("no");
      dialog.onclose = () => resolve(dialog.returnValue === "yes");
      dialog.returnValue = "no";
      dialog.showModal();
    });
  }

  async function ask(kind) {
    if (asking || !(await confirmed(kind))) return;
    asking = true;
    touch("status");
    answer(`${kind} …`, false);
    try {
      const response = await fetch("ask", {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ type: kind }),
      });
      const text = await response.text();
      const reply = response.headers.get("Content-Type").startsWith("application/json") ? JSON.parse(text) : { type: "Refused", message: text };
      answer(`${kind}: ${reply.message || "done"}`, reply.type === "Refused");
    } catch (error) {
      answer(`${kind}: no answer (${error.message})`, true);
    } finally {
      asking = false;
      touch("status");
    }
  }

  function answer(text, refused) {
    at("answer").textContent = text;
    at("answer").classList.toggle("refused", refused);
  }

  at("buttons").addEventListener("click", (event) => event.target.dataset.ask && ask(event.target.dataset.ask));
  at("hold").addEventListener("click", () => {
    held = !held;
    at("hold").setAttribute("aria-pressed", String(held));
    at("hold").textContent = held ? "Held" : "Hold";
    showTalks();
  });
  at("talks").addEventListener("pointerenter", (event) => { reading = event.pointerType === "mouse"; });
  at("talks").addEventListener("pointerleave", () => { reading = false; });

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
    for (const [kind, heed] of Object.entries(heeds)) {
      source.addEventListener(kind, (event) => {
        lost = false;
        heed(JSON.parse(event.data));
      });
    }
    source.onerror = () => {
      if (over) return;
      lost = true;
      touch("status");
      if (source.readyState === EventSource.CLOSED) retry = setTimeout(connect, AGAIN_MS); // refused: it gives up itself
    };
  }

  const heeds = {
    about(about) {
      [groups, incidents] = [[], []];
      say("run", about.run);
      say("folder", about.folder);
    },
    curves(table) {
      curves = { step: [], ...table };
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
      const [last] = incidents; // one that happened once more is told anew, with how often
      const again = last && incident.times > 1 && ["actor", "kind", "message"].every((key) => last[key] === incident[key]);
      incidents = [incident, ...incidents.slice(again ? 1 : 0)].slice(0, 64);
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

  connect();
  drawCharts();
})();
