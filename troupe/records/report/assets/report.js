// Draws what the report's page holds as data; then the page says how many charts it has drawn (body, data-drawn).
"use strict";

(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  for (const button of document.querySelectorAll(".theme-switch")) themeSwitch(button);
  let drawn = drawCharts(data);
  for (const element of document.querySelectorAll("[data-bars]")) {
    const rows = data.bars[element.dataset.bars];
    const sums = rows.map((row) => row.parts.reduce((sum, part) => sum + (part.value || 0), 0));
    const shares = element.dataset.bars === "actors";
    troupeBars(element, { rows, total: shares ? 1 : Math.max(...sums), format: shares ? "percent" : "seconds" });
    drawn += 1;
  }
  if (at("completions")) troupeCompletions(at("completions"), embeddedCompletions(data.completions));
  document.body.dataset.drawn = String(drawn);
})();
