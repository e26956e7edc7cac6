// Two texts side by side, word by word: what only one of them has is marked.
"use strict";

const MOST_WORDS = 20000;
const MOST_CHANGES = 1000;

// words, spaces and signs, each a piece of its own
const wordsOf = (text) => text.match(/[\p{L}\p{N}_]+|\s+|[^\s\p{L}\p{N}_]/gu) || [];

// [kind, words of a, words of b] in order; kind: "same" or "other". Myers' O(ND): the shortest list of changes
function differences(a, b) {
  let start = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) start += 1;
  let [endA, endB] = [a.length, b.length];
  while (endA > start && endB > start && a[endA - 1] === b[endB - 1]) [endA, endB] = [endA - 1, endB - 1];
  const middle = changesBetween(a.slice(start, endA), b.slice(start, endB));
  return joined([["same", a.slice(0, start), b.slice(0, start)], ...middle, ["same", a.slice(endA), b.slice(endB)]]);
}

function changesBetween(a, b) {
  if (!a.length || !b.length || a.length + b.length > MOST_WORDS) return [["other", a, b]];
  const trace = [];
  let reach = new Map([[1, 0]]);
  for (let changes = 0; changes <= Math.min(MOST_CHANGES, a.length + b.length); changes += 1) {
    const next = new Map();
    for (let line = -changes; line <= changes; line += 2) {
      const [up, left] = [reach.get(line + 1) ?? -1, reach.get(line - 1) ?? -1];
      let x = line === -changes || (line !== changes && left < up) ? up : left + 1;
      while (x < a.length && x - line < b.length && a[x] === b[x - line]) x += 1;
      next.set(line, x);
      if (x >= a.length && x - line >= b.length) return walkedBack(a, b, [...trace, reach], line);
    }
    trace.push(reach);
    reach = next;
  }
  return [["other", a, b]];
}

function walkedBack(a, b, trace, last) {
  const parts = [];
  let [x, line] = [a.length, last];
  for (let changes = trace.length - 1; changes >= 0; changes -= 1) {
    const reach = trace[changes];
    const [up, left] = [reach.get(line + 1) ?? -1, reach.get(line - 1) ?? -1];
    const down = line === -changes || (line !== changes && left < up);
    const before = down ? line + 1 : line - 1;
    const fromX = reach.get(before) ?? 0;
    const toX = changes === 0 ? 0 : down ? fromX : fromX + 1;
    if (x > toX) parts.push(["same", a.slice(toX, x), b.slice(toX - line, x - line)]);
    if (changes > 0) parts.push(down ? ["other", [], [b[fromX - before]]] : ["other", [a[fromX]], []]);
    [x, line] = [fromX, before];
  }
  return parts.reverse();
}

function joined(parts) {
  const together = [];
  for (const [kind, a, b] of parts) {
    if (!a.length && !b.length) continue;
    const last = together[together.length - 1];
    if (last && last[0] === kind) [last[1], last[2]] = [last[1].concat(a), last[2].concat(b)];
    else together.push([kind, a, b]);
  }
  return together;
}

// two columns: left what a has, right what b has; returns how many words differ
function showDifference(to, left, right) {
  const parts = differences(wordsOf(left.text), wordsOf(right.text));
  let count = 0;
  [left, right].forEach((side, i) => {
    const column = html("div", "difference-side", to);
    html("div", "talk-head", column, side.title);
    const pre = anyWay("", column, "");
    pre.tabIndex = 0;
    for (const part of parts) {
      const text = part[1 + i].join("");
      if (!text) continue;
      if (part[0] === "same") pre.append(text);
      else html(i ? "ins" : "del", "", pre, text);
      if (part[0] === "other") count += part[1 + i].filter((word) => word.trim()).length;
    }
    if (!side.text) pre.append("(nothing)");
  });
  return count;
}
