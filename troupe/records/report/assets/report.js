// Draws what the report's page holds as data; then the page says how many charts it has drawn (body, data-drawn).
"use strict";

(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  let drawn = 0;
  for (const element of document.querySelectorAll("[data-chart]")) {
    const spec = data.charts[Number(element.dataset.chart)];
    const series = spec.series.map((one) => ({ ...one, x: data.x }));
    troupeChart(element, { ...spec, series, marks: data.marks });
    drawn += 1;
  }
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
