// The completions that the page's server has, as a source of the browser: see completions.js.
"use strict";

function servedCompletions(about) {
  const query = (filter, more = {}) => new URLSearchParams(Object.entries({ ...filter, ...more }).filter(([, value]) => value !== undefined && value !== null));
  const ask = async (path, values) => {
    let response;
    try {
      response = await fetch(`${path}?${values}`);
    } catch {
      throw new Error("The daemon does not answer.");
    }
    if (!response.ok) throw new Error((await response.text()).trim());
    return response.json();
  };
  return {
    says: "", grows: true, ...about,
    piece: (filter, after) => ask("completions", query(filter, { after })),
    open: ({ gid, sample }) => ask("completion", query({ gid, sample })),
    tokens: ({ gid, sample }) => ask("tokens", query({ gid, sample })),
    file: (filter) => ({ href: `completions.jsonl?${query(filter)}`, name: "completions.jsonl" }),
  };
}

// asked for when it is opened first: nobody waits for a store that he does not look into
at("past").addEventListener("toggle", async () => {
  const place = at("completions");
  if (!at("past").open || place.childElementCount) return;
  place.textContent = "reading the store …";
  try {
    const response = await fetch("about");
    if (!response.ok) throw new Error((await response.text()).trim());
    const about = await response.json();
    place.replaceChildren();
    troupeCompletions(place, servedCompletions(about));
  } catch (error) {
    place.textContent = error.message; // no element: opened once more, it is asked for once more
  }
});
