// Stacked bars of plain elements, for the report. Needs format.js.
"use strict";

// troupeBars(element, { rows: [{ name, note, parts: [{ name, value, kind }] }], total, format }): one bar a row, its
// parts beside each other. kind: "busy", "wait", "idle" or 1 to 8 (a colour). total: the value of a full bar.
function troupeBars(element, spec) {
  element.classList.add("bars");
  element.replaceChildren();
  const kinds = new Map();
  for (const row of spec.rows) {
    const line = html("div", "bars-row", element);
    html("div", "bars-name", line, row.name).title = row.name;
    const track = html("div", "bars-track", line);
    html("div", "bars-note", line, row.note || "");
    const total = spec.total || row.parts.reduce((sum, part) => sum + (part.value || 0), 0) || 1;
    row.parts.forEach((part, i) => {
      if (!known(part.value) || part.value <= 0) return;
      const kind = part.kind || (i % 8) + 1;
      const className = typeof kind === "number" ? `s${kind}` : `k-${kind}`;
      const bar = html("i", className, track);
      bar.style.width = `${(100 * part.value) / total}%`;
      bar.title = `${row.name}: ${part.name} ${formatValue(part.value, spec.format)}`;
      kinds.set(part.name, className);
    });
  }
  const legend = html("div", "legend", element);
  for (const [name, className] of kinds) {
    const item = html("span", "legend-item", legend);
    html("i", `swatch ${className}`, item);
    html("span", "name", item, name);
  }
}
