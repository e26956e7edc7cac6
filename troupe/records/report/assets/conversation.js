// An episode as people read it: who said what, calls of tools and thoughts folded. The report's template builds the same.
"use strict";

const ROLES = ["system", "user", "assistant", "tool"];

// what is told of a turn, as facts_of in conversations.py
function factsOf(one) {
  const facts = one.row ? [`new row after ${FORMATS.integer(one.row)} tokens`] : [];
  if (one.turn) facts.push(`${FORMATS.integer(one.tokens || 0)} tokens`);
  if (one.read) facts.push(`${FORMATS.integer(one.read)} read`);
  if (one.seconds) facts.push(formatValue(one.seconds, "seconds"));
  if (one.reward !== undefined && one.reward !== null) facts.push(`reward ${formatValue(one.reward)}`);
  return facts;
}

function anyWay(className, to, text) {
  const node = html("pre", className, to, text);
  node.dir = "auto";
  return node;
}

function folded(to, title, text) {
  const details = html("details", "", to);
  html("summary", "", details, title);
  anyWay("", details, text);
}

function call(to, { name, arguments: given, result, error, seconds }) {
  const details = html("details", "call", to);
  const summary = html("summary", "", details);
  html("code", "", summary, `${name} ${given}`);
  if (seconds) html("span", "", summary, formatValue(seconds, "seconds"));
  if (error) html("span", "failed", summary, "failed");
  anyWay("", details, given);
  if (error) html("p", "failed", details, error);
  if (result) anyWay("", details, result);
}

function conversation(to, said) {
  const box = html("div", "conversation", to);
  box.tabIndex = 0;
  box.setAttribute("role", "group");
  box.setAttribute("aria-label", "conversation");
  for (const one of said) {
    const part = html("div", `said ${ROLES.includes(one.role) ? one.role : "other"}`, box);
    const head = html("div", "said-head", part);
    html("b", "", head, one.turn ? `turn ${one.turn}` : one.role);
    for (const fact of factsOf(one)) html("span", "", head, fact);
    if (one.thoughts) folded(part, "thoughts", one.thoughts);
    if (one.role === "system" && one.text.length > 240) folded(part, `${one.text.slice(0, 60)} …`, one.text);
    else if (one.text || !(one.calls || one.thoughts || one.failed)) anyWay("", part, one.text || "(nothing)");
    for (const each of one.calls || []) call(part, each);
    if (one.failed) html("p", "failed", part, `failed: ${one.failed}`);
    if (one.info) folded(part, "info", one.info);
  }
}
