// The completions that a page has in itself, as a source of the browser: see completions.js.
// data: { rows: whole ones, prompts, says, rewards, folder }
"use strict";

function embeddedCompletions(data) {
  for (const one of data.rows) if (one.prompt_number !== undefined) one.prompt = data.prompts[one.prompt_number];
  const looked = (one, filter) => (filter.reward ? one.scores[filter.reward] : one.reward);
  const values = {
    all: (one) => one.step,
    best: looked,
    worst: looked,
    longest: (one) => one.tokens,
    shortest: (one) => one.tokens,
    "highest advantage": (one) => one.advantage,
    "lowest advantage": (one) => one.advantage,
  };
  const falls = ["newest", "best", "longest", "highest advantage"];
  const found = (filter) => {
    const value = values[filter.choice] || values.all;
    const has = (text, part) => part === undefined || text.toLowerCase().includes(part.toLowerCase());
    const held = data.rows.filter((one) => {
      const reward = looked(one, filter);
      return (
        known(value(one, filter)) && (filter.first_step === undefined || one.step >= filter.first_step) &&
        (filter.last_step === undefined || one.step <= filter.last_step) && (filter.row === undefined || one.row === filter.row) &&
        (filter.finish_reason === undefined || one.finish_reason === filter.finish_reason) && (filter.state === undefined || one.state === filter.state) &&
        (filter.least === undefined || (known(reward) && reward >= filter.least)) && (filter.most === undefined || (known(reward) && reward <= filter.most)) &&
        has(one.text, filter.text) && has(one.prompt, filter.prompt)
      );
    });
    const sign = falls.includes(filter.choice) ? -1 : 1;
    const between = (a, b) => a.gid.length - b.gid.length || (a.gid < b.gid ? -1 : Number(a.gid > b.gid)); // numbers as text
    return held.sort((a, b) => sign * (value(a, filter) - value(b, filter)) || between(a, b) || a.sample - b.sample);
  };
  const lined = (one) => ({ ...one, start: few(one.text, 240) });
  const asRow = ({ prompt, text, reward, advantage, scores, step, row, gid, sample, tokens, finish_reason, state, columns, left_out }) =>
    JSON.stringify({ prompt, completion: text, reward, advantage, scores, step, row, gid, sample, tokens, finish_reason, state, columns, left_out });
  return {
    ...data,
    piece: async (filter, after) => {
      const all = found(filter);
      const start = after || 0;
      const next = start + A_PIECE;
      return { rows: all.slice(start, next).map(lined), after: next < all.length ? next : null, total: all.length };
    },
    open: async (row) => data.rows.find((one) => one.gid === row.gid && one.sample === row.sample),
    tokens: async (one) => one.of_tokens,
    file: (filter) => ({
      href: "#", name: "completions.jsonl",
      made: () => URL.createObjectURL(new Blob(found(filter).map((one) => `${asRow(one)}\n`), { type: "application/jsonl" })),
    }),
  };
}
