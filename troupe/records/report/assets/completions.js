// The browser of completions: filters, a list that is asked for in pieces, one of them opened, two of them compared. The
// same for the report, which has some of them in itself, and the live page, which asks its server: see `source`.
//
// source: says (what there is, "" for all), rewards (names), folder, grows (whether more may come), and promises: piece(filter, after) → { rows,
// after, total, told }, open(row) → the whole one, tokens(one) → { texts, log_probs, … }; file(filter) → { href, name }.
"use strict";

const A_PIECE = 50;
const MOST_LISTED = 3000;
const A_COURSE = 400;
const TYPING_MS = 250;
const ORDERS = [
  ["newest", "newest first"],
  ["all", "oldest first"],
  ["best", "highest reward"],
  ["worst", "lowest reward"],
  ["longest", "longest"],
  ["shortest", "shortest"],
  ["highest advantage", "highest advantage"],
  ["lowest advantage", "lowest advantage"],
];
const ENDS = ["stop", "length", "repetition", "aborted"];
const STATES = ["trained", "filtered", "stale", "quarantined"];
const NUMBERS = { first_step: "from step", last_step: "to step", row: "prompt row", least: "reward from", most: "reward to" };
const FLAGS = {
  row: "--row", prompt: "--prompt", text: "--text", least: "--min-reward", most: "--max-reward", reward: "--reward",
  finish_reason: "--finish-reason", state: "--state",
};

function troupeCompletions(parent, source) {
  const state = { filter: { choice: "newest" }, rows: [], after: null, asked: 0, at: -1, first: null, keep: { colour: "" }, busy: false };
  const controls = html("form", "filters", parent);
  const status = html("p", "muted small found", parent);
  status.setAttribute("role", "status");
  const course = html("div", "course", parent);
  const columns = html("div", "browse", parent);
  const list = html("div", "listed", columns);
  const opened = html("article", "talk opened", columns);
  const foot = html("p", "muted small", parent);
  list.tabIndex = 0;
  list.setAttribute("role", "listbox");
  list.setAttribute("aria-label", "completions; up and down go from one to the next, Space keeps one to compare with");
  html("p", "muted", opened, "Choose one of the list.");

  // ---- asking

  async function begin() {
    course.hidden = true;
    Object.assign(state, { rows: [], after: null, at: -1, asked: state.asked + 1, busy: false });
    list.replaceChildren();
    list.removeAttribute("aria-activedescendant");
    list.scrollTop = 0;
    showFoot();
    await more();
  }

  async function more() {
    if (state.busy || (state.rows.length && !state.after) || state.rows.length >= MOST_LISTED) return;
    const asked = state.asked;
    state.busy = true;
    try {
      do {
        const piece = await source.piece(state.filter, state.after);
        if (asked !== state.asked) return;
        state.after = piece.after;
        if (piece.total !== null && piece.total !== undefined) state.total = piece.total;
        else if (!state.rows.length) state.total = null;
        add(piece.rows);
        showCourse();
        tell(piece.told);
      } while (state.after && state.rows.length < MOST_LISTED && wantsMore());
    } catch (error) {
      if (asked === state.asked) status.textContent = error.message;
    } finally {
      if (asked === state.asked) state.busy = false;
    }
  }

  // until the list is filled, and of one prompt so many that one sees their course
  const wantsMore = () => list.scrollHeight <= list.clientHeight + 40 || (state.filter.row !== undefined && state.rows.length < A_COURSE);

  function tell(told) {
    const shown = FORMATS.integer(state.rows.length);
    const all = state.total !== null && state.total !== undefined ? `${FORMATS.integer(state.total)} found` : state.after ? `${shown} found so far` : `${shown} found`;
    const parts = [all];
    if (state.after && told) parts.push(told);
    if (state.rows.length >= MOST_LISTED && state.after) parts.push(`the first ${FORMATS.integer(MOST_LISTED)} are listed; look for fewer`);
    if (source.says) parts.push(source.says);
    status.textContent = parts.join(" · ");
    if (!state.rows.length && !state.after) html("p", "muted none", list, "There is no such completion.");
  }

  // ---- the list

  function add(rows) {
    for (const row of rows) {
      const node = html("div", "line", list);
      node.id = `completion-${row.gid}-${row.sample}`;
      node.setAttribute("role", "option");
      node.setAttribute("aria-selected", "false");
      const head = html("span", "line-head", node);
      html("b", "", head, `step ${FORMATS.integer(row.step)}`);
      html("span", "line-reward", head, formatValue(row.reward));
      const facts = [row.row === null ? "" : `row ${row.row}`, `${FORMATS.integer(row.tokens)} tokens`, row.finish_reason === "stop" ? "" : row.finish_reason, row.state === "trained" ? "" : row.state];
      html("span", "muted", head, facts.filter(Boolean).join(" · "));
      const text = html("span", "line-text", node, visible(row.start).replace(/\s+/g, " ") || "(nothing)");
      text.dir = "auto";
      const number = state.rows.push(row) - 1;
      node.addEventListener("click", () => choose(number));
    }
  }

  function choose(number) {
    if (number < 0 || number >= state.rows.length) return;
    const before = list.children[state.at];
    if (before) before.setAttribute("aria-selected", "false");
    state.at = number;
    const node = list.children[number];
    node.setAttribute("aria-selected", "true");
    list.setAttribute("aria-activedescendant", node.id);
    node.scrollIntoView({ block: "nearest" });
    open(state.rows[number]);
    if (number > state.rows.length - 10) more();
  }

  list.addEventListener("scroll", () => {
    if (list.scrollTop + list.clientHeight > list.scrollHeight - 400) more();
  });
  list.addEventListener("keydown", (event) => {
    const page = 10;
    const to = { ArrowDown: state.at + 1, ArrowUp: state.at - 1, Home: 0, End: state.rows.length - 1, PageDown: state.at + page, PageUp: state.at - page }[event.key];
    if (event.key === " " && state.at >= 0) keepOne(state.shown);
    else if (to === undefined) return;
    else choose(Math.max(0, Math.min(state.rows.length - 1, to)));
    event.preventDefault();
  });

  // the rewards of all that are listed, where they are of one prompt
  function showCourse() {
    course.replaceChildren();
    course.hidden = state.filter.row === undefined || state.rows.length < 2;
    if (course.hidden) return;
    const rewards = state.rows.map((row) => row.reward).filter(known);
    const [low, high] = [Math.min(0, ...rewards), Math.max(...rewards, 0)];
    html("span", "muted small", course, `reward of each to row ${state.filter.row}, in this order`);
    state.rows.forEach((row, i) => {
      const bar = html("i", known(row.reward) ? "" : "none", course);
      bar.style.height = `${high > low && known(row.reward) ? 6 + (94 * (row.reward - low)) / (high - low) : 6}%`;
      bar.title = `step ${FORMATS.integer(row.step)}: ${formatValue(row.reward)}`;
      bar.addEventListener("click", () => choose(i));
    });
  }

  // ---- one of them

  async function open(row) {
    state.opening = row;
    let one;
    try {
      one = await source.open(row);
    } catch (error) {
      opened.replaceChildren(error.message);
      return;
    }
    if (state.opening !== row) return;
    state.shown = one;
    show();
  }

  function show() {
    const one = state.shown;
    opened.replaceChildren();
    const buttons = html("div", "buttons", opened);
    if (one.row !== null) button(buttons, "This prompt through the steps", () => set({ row: one.row, choice: "all", first_step: undefined, last_step: undefined }));
    const same = state.first && state.first.gid === one.gid && state.first.sample === one.sample;
    button(buttons, same ? "Kept to compare with" : "Compare with another", () => keepOne(one)).setAttribute("aria-pressed", String(Boolean(same)));
    if (state.first && !same) {
      const kept = html("p", "muted small", opened, `Difference to ${titleOf(state.first)} (reward ${formatValue(state.first.reward)}): `);
      const box = html("div", "difference", opened);
      const side = (each) => ({ title: `${titleOf(each)}, reward ${formatValue(each.reward)}`, text: visible(each.text) });
      const count = showDifference(box, side(state.first), side(one));
      kept.append(count ? `${FORMATS.integer(count)} words differ. ` : "the texts are the same. ");
      button(kept, "No more", () => keepOne(state.first));
    }
    showCompletion(opened, one, source, state.keep);
  }

  function keepOne(one) {
    if (!one) return;
    const same = state.first && state.first.gid === one.gid && state.first.sample === one.sample;
    state.first = same ? null : one;
    for (const node of list.children) node.classList.toggle("kept", state.first !== null && node.id === `completion-${one.gid}-${one.sample}`);
    if (state.shown) show();
  }

  function button(to, text, act) {
    const node = html("button", "button small", to, text);
    node.type = "button";
    node.addEventListener("click", act);
    return node;
  }

  // ---- what is looked for

  const fields = {};
  let typing = null;

  function field(name, label, node) {
    const box = html("label", "", controls, label);
    box.append(node);
    node.setAttribute("aria-label", label);
    fields[name] = node;
    node.addEventListener("input", () => {
      clearTimeout(typing);
      typing = setTimeout(read, TYPING_MS);
    });
  }

  function input(type) {
    const node = document.createElement("input");
    node.type = type;
    if (type === "number") node.step = "any";
    return node;
  }

  function select(options) {
    const node = document.createElement("select");
    for (const [value, text] of options) html("option", "", node, text).value = value;
    return node;
  }

  function read() {
    const filter = {};
    for (const [name, node] of Object.entries(fields)) {
      const text = node.value;
      if (text === "" || !node.checkValidity()) continue;
      filter[name] = name in NUMBERS ? Number(text) : text;
    }
    state.filter = filter;
    begin();
  }

  function set(changes) {
    for (const [name, value] of Object.entries(changes)) fields[name].value = value === undefined ? "" : value;
    clearTimeout(typing);
    read();
  }

  function showFoot() {
    foot.replaceChildren();
    const file = source.file(state.filter);
    const link = html("a", "", foot, "Save these as JSONL");
    link.href = file.href;
    link.download = file.name;
    if (file.made) link.addEventListener("click", () => (link.href = file.made()));
    foot.append(" · as Parquet: ");
    html("code", "", foot, commandOf(source.folder, state.filter));
  }

  for (const name of ["first_step", "last_step", "row"]) {
    const node = input("number");
    [node.min, node.step] = [0, 1];
    field(name, NUMBERS[name], node);
  }
  field("text", "text holds", input("search"));
  field("prompt", "prompt holds", input("search"));
  if (source.rewards.length > 1) field("reward", "reward", select([["", "weighted sum"], ...source.rewards.map((name) => [name, visible(name)])]));
  for (const name of ["least", "most"]) field(name, NUMBERS[name], input("number"));
  field("finish_reason", "ended by", select([["", "any"], ...ENDS.map((name) => [name, name])]));
  field("state", "group", select([["", "any"], ...STATES.map((name) => [name, name])]));
  field("choice", "order", select(ORDERS));
  button(controls, "Clear", () => set(Object.fromEntries(Object.keys(fields).map((name) => [name, name === "choice" ? "newest" : undefined]))));
  if (source.grows) button(controls, "Look again", read);
  controls.addEventListener("submit", (event) => event.preventDefault());
  return begin();
}

// the command that writes the same
function commandOf(folder, filter) {
  const parts = ["troupe inspect", quoted(visible(folder))];
  const [first, last] = [filter.first_step, filter.last_step];
  if (first !== undefined || last !== undefined) parts.push(`--steps ${first ?? ""}:${last ?? ""}`);
  for (const [name, flag] of Object.entries(FLAGS)) if (filter[name] !== undefined) parts.push(flag, quoted(visible(String(filter[name]))));
  return [...parts, "--export FILE.parquet"].join(" ");
}
