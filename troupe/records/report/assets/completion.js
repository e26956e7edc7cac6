// One completion: what is known of it, its text or conversation, and its tokens in colours.
"use strict";

const MOST_TOKENS = 20000;
const COLOURS = {
  log_probs: { name: "log-prob", series: 2, about: "from likely to unlikely: −5 nats", of: (v) => [2, -v / 5] },
  entropies: { name: "entropy", series: 4, about: "from sure to undecided: 3 nats", of: (v) => [4, v / 3] },
  ratios: {
    name: "importance ratio",
    series: 3,
    other: 2,
    about: "from less likely to likelier to who learned from it, by half",
    of: (v) => [v > 1 ? 3 : 2, v > 0 ? Math.abs(Math.log(v)) / Math.log(1.5) : 1],
  },
  advantage: { name: "advantage", series: 3, other: 2, about: "from −2 to 2", of: (v) => [v > 0 ? 3 : 2, Math.abs(v) / 2] },
};

// what would act, or turn a line around, as its escape; lines and tabs stay. `harmless` in Python is the same
function visible(text) {
  return text.replace(/[\p{Cc}\p{Co}\p{Cs}\u061c\u200e\u200f\u202a-\u202e\u2028\u2029\u2066-\u2069\ufeff]/gu, (char) => {
    if (char === "\n" || char === "\t") return char;
    const code = char.codePointAt(0);
    return code < 256 ? `\\x${code.toString(16).padStart(2, "0")}` : `\\u${code.toString(16).padStart(4, "0")}`;
  });
}

function visibleIn(value) {
  if (typeof value === "string") return visible(value);
  if (Array.isArray(value)) return value.map(visibleIn);
  if (!value || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([name, part]) => [name, visibleIn(part)]));
}

const few = (text, most) => (text.length > most ? `${text.slice(0, most)} …` : text);
const titleOf = (one) => `step ${FORMATS.integer(one.step)}, group ${one.gid}, sample ${one.sample}`;

function factsOfCompletion(one) {
  const facts = [`${FORMATS.integer(one.tokens)} tokens`, `ended by ${one.finish_reason}`];
  if (one.row !== null) facts.unshift(`row ${one.row}`);
  if (one.advantage !== null) facts.push(`advantage ${formatValue(one.advantage)}`);
  if (one.state !== "trained") facts.push(one.state);
  const scores = Object.entries(one.scores || {});
  if (scores.length > 1 || (scores.length && scores[0][1] !== one.reward)) facts.push(...scores.map(([name, score]) => `${visible(name)} ${formatValue(score)}`));
  if (one.policy) facts.push(one.policy);
  return facts;
}

// the completion in `parent`; `source` gives its tokens when they are asked for; `keep.colour`: what they are coloured by
function showCompletion(parent, one, source, keep) {
  const head = html("div", "talk-head", parent);
  html("span", "badge", head, titleOf(one));
  html("span", "score", head, `reward ${formatValue(one.reward)}`);
  for (const fact of factsOfCompletion(one)) html("span", "", head, fact);
  const columns = Object.entries(one.columns || {});
  if (columns.length) {
    const list = html("dl", "list columns", parent);
    for (const [name, value] of columns) {
      html("dt", "", list, visible(name));
      html("dd", "", list, visible(value));
    }
  }
  if (one.said && one.said.length) {
    conversation(parent, visibleIn(one.said));
    if (one.text) folded(parent, "as it was sampled", visible(one.text));
  } else {
    anyWay("prompt", parent, visible(one.prompt));
  }
  const colours = (one.colours || []).filter((name) => name in COLOURS);
  if (one.advantage !== null) colours.push("advantage");
  const bar = html("div", "colour-bar", parent);
  const body = html("div", "", parent);
  const chosen = colours.includes(keep.colour) ? keep.colour : "";
  colourChoice(bar, colours, chosen, (name) => {
    keep.colour = name;
    paint(body, one, source, name);
  });
  paint(body, one, source, chosen);
}

function colourChoice(bar, colours, chosen, choose) {
  const label = html("label", "", bar, "Colour tokens by ");
  const select = html("select", "", label);
  for (const name of ["", ...colours]) {
    const option = html("option", "", select, name ? COLOURS[name].name : "nothing");
    option.value = name;
  }
  select.value = chosen;
  select.disabled = !colours.length;
  const lacking = ["log_probs", "entropies", "ratios"].filter((name) => !colours.includes(name));
  if (lacking.length) {
    const told = lacking.map((name) => COLOURS[name].name).join(", ");
    bar.title = `not stored: ${told}; see metrics.store_log_probs and metrics.store_token_figures`;
  }
  select.addEventListener("change", () => choose(select.value));
}

async function paint(body, one, source, name) {
  body.replaceChildren();
  const acted = one.said && one.said.length;
  if (!name) {
    if (!acted) plainText(body, one);
    return;
  }
  if (name === "advantage") {
    const pre = anyWay("", body, visible(one.text) || "(nothing)");
    tint(pre, "advantage", one.advantage);
    html("p", "muted small", body, `advantage ${formatValue(one.advantage)}: ${COLOURS.advantage.about}`);
    return;
  }
  const told = html("p", "muted small", body, "reading its tokens …");
  let tokens;
  try {
    tokens = await source.tokens(one);
  } catch (error) {
    told.textContent = `${error.message}`;
    return;
  }
  if (!body.isConnected || told.parentNode !== body) return;
  told.remove();
  tokenText(body, tokens, name, one);
}

function plainText(body, one) {
  anyWay("", body, (visible(one.text) || "(nothing)") + (one.left_out ? ` … ${FORMATS.integer(one.left_out)} more characters` : ""));
}

function tint(node, name, value) {
  if (!known(value)) return;
  node.style.backgroundColor = shade(...COLOURS[name].of(value));
}

function shade(series, share) {
  return `color-mix(in srgb, var(--series-${series}) ${Math.round(70 * Math.min(1, Math.max(0, share)))}%, transparent)`;
}

// tokens one by one; arrow keys go from one to the next, and what is known of it is read out
function tokenText(body, tokens, name, one) {
  const pre = anyWay("tokens", body, "");
  pre.tabIndex = 0;
  pre.setAttribute("aria-label", "tokens; left and right go from one to the next");
  const scale = html("p", "scale muted small", body);
  const { series, other, about } = COLOURS[name];
  for (const share of other ? [1, 0.67, 0.33] : []) html("i", "", scale).style.backgroundColor = shade(other, share);
  for (const share of [0, 0.33, 0.67, 1]) html("i", "", scale).style.backgroundColor = shade(series, share);
  html("span", "", scale, about);
  const readout = html("p", "readout small", body, "Point at a token, or go from one to the next with the arrow keys.");
  readout.setAttribute("role", "status");
  const nodes = tokens.texts.slice(0, MOST_TOKENS).map((text, i) => {
    const node = html("span", "token", pre, visible(text));
    const read = (tokens.read || []).some(([start, stop]) => start <= i && i < stop);
    if (read) node.classList.add("read");
    else tint(node, name, tokens[name][i]);
    return node;
  });
  if (tokens.texts.length > nodes.length) html("p", "muted small", body, `${FORMATS.integer(tokens.texts.length - nodes.length)} more tokens`);
  let current = -1;
  const point = (i) => {
    if (i < 0 || i >= nodes.length) return;
    if (nodes[current]) nodes[current].classList.remove("at");
    current = i;
    nodes[i].classList.add("at");
    const values = Object.keys(COLOURS).filter((each) => tokens[each]).map((each) => `${COLOURS[each].name} ${formatValue(tokens[each][i])}`);
    readout.textContent = `token ${i + 1} of ${nodes.length}, ${JSON.stringify(visible(tokens.texts[i]))}: ${values.join(" · ")}`;
  };
  pre.addEventListener("mousemove", (event) => {
    const i = nodes.indexOf(event.target);
    if (i >= 0 && i !== current) point(i);
  });
  pre.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    point(Math.min(nodes.length - 1, Math.max(0, current + by)));
    nodes[current].scrollIntoView({ block: "nearest" });
  });
}
