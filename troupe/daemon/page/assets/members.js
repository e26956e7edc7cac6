// Members of a run (workers, processes, engines, ranks) on the live page; in words as records/members.py has them.
"use strict";

const PLURALS = { process: "processes", worker: "workers", engine: "engines", rank: "ranks" };
const GONE = ["silent", "lost", "refused", "ended"];
const DOTS = { working: "k-busy", starting: "k-idle", idle: "k-idle", waiting: "k-wait", silent: "k-warn", lost: "k-bad", refused: "k-bad", ended: "k-idle" };

function crowdOf(members) {
  const here = members.filter(({ state }) => !GONE.includes(state));
  const rates = here.map((one) => one.tokens_per_second).filter((rate) => rate !== null);
  const told = [here.length ? `${here.filter(({ state }) => state === "working").length} of ${here.length} at work` : "none is here"];
  if (rates.length) told.push(`${whole(Math.round(rates.reduce((all, rate) => all + rate, 0)))} tokens/s`);
  if (here.length < members.length) told.push(`${members.length - here.length} gone`);
  return told.join(", ");
}

function doingOf({ state, leases, detail }) {
  const named = leases.slice(0, 3).join(", ") + (leases.length > 3 ? ` and ${leases.length - 3} more` : "");
  const text = state === "working" && leases.length ? `working on ${named}` : state;
  return detail ? `${text}: ${detail}` : text;
}

function factsOfMember({ version, last_beat_s: beat, device, state, offers }) {
  const facts = version === null || GONE.includes(state) ? [] : [`version ${whole(version)}`];
  if (beat !== null && (beat >= 5 || GONE.includes(state))) facts.push(`heard of ${figure(beat, "seconds")} ago`);
  if (offers.join() !== "generate") facts.push(`offers ${offers.join(", ")}`);
  return [...facts, ...(device ? [device] : [])].join(" · ");
}

function showMembers() {
  const { members } = status;
  const isCrowd = members.length > 1 || members.some(({ kind }) => kind !== "process");
  at("crowd").hidden = !isCrowd;
  if (!isCrowd) return;
  const kinds = new Set(members.map(({ kind }) => kind));
  const title = PLURALS[kinds.size === 1 ? members[0].kind : "worker"];
  set(at("crowd-title"), title[0].toUpperCase() + title.slice(1));
  set(at("crowd-sum"), crowdOf(members));
  const build = (to) => {
    const row = html("div", "row", to);
    for (const name of ["dot", "", "doing", "figure", "muted facts"]) html(name === "dot" ? "i" : "span", name, row);
    return row;
  };
  fill(at("members"), members, build, (row, member) => {
    row.children[0].className = `dot ${DOTS[member.state] || "k-idle"}`;
    set(row.children[1], member.name);
    set(row.children[2], doingOf(member));
    const speed = member.tokens_per_second;
    set(row.children[3], speed === null || GONE.includes(member.state) ? "" : `${whole(Math.round(speed))} tokens/s`);
    set(row.children[4], factsOfMember(member));
  });
}
