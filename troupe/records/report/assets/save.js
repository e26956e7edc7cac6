// The menu of a chart: a logarithmic axis, a larger chart, and the chart as a file. Needs format.js and series.js.
"use strict";

function saveFile(name, blob) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

const fileName = ({ key, title }, ending) => `${(key || title || "chart").replace(/[^\w.-]+/g, "_").slice(0, 80)}.${ending}`;

// the drawing with its title above and its legend below
function chartAsPicture({ plot, spec, lines }, colour) {
  const drawn = plot.ctx.canvas;
  const ratio = devicePixelRatio;
  const [margin, head, row] = [14 * ratio, 34 * ratio, 20 * ratio];
  const named = lines.length > 1 ? lines : [];
  const canvas = document.createElement("canvas");
  const family = getComputedStyle(document.body).fontFamily;
  canvas.width = drawn.width + 2 * margin;
  canvas.height = head + drawn.height + row * named.length + margin;
  const ctx = canvas.getContext("2d");
  ctx.fillStyle = colour("surface");
  ctx.fillRect(0, 0, canvas.width, canvas.height);
  ctx.fillStyle = colour("text");
  ctx.font = `600 ${14 * ratio}px ${family}`;
  ctx.fillText(spec.title, margin, 23 * ratio);
  ctx.drawImage(drawn, margin, head);
  ctx.font = `${12 * ratio}px ${family}`;
  named.forEach((line, i) => {
    const y = head + drawn.height + row * (i + 0.7);
    ctx.fillStyle = colour(`series-${line.colour}`);
    ctx.fillRect(margin, y - 9 * ratio, 10 * ratio, 10 * ratio);
    ctx.fillStyle = colour("muted");
    ctx.fillText(line.name, margin + 17 * ratio, y);
  });
  return canvas;
}

// `does`: toggleLog and enlarge, and the page's colours.
function chartMenu(state, parent, does) {
  const menu = html("details", "chart-menu", parent);
  const summary = html("summary", "", menu, "⋯");
  const list = html("div", "chart-menu-list", menu);
  const entries = {
    "Logarithmic axis": does.toggleLog,
    Larger: does.enlarge,
    "Save as PNG": () => state.plot && chartAsPicture(state, does.colour).toBlob((blob) => saveFile(fileName(state.spec, "png"), blob)),
    "Save as CSV": () => saveFile(fileName(state.spec, "csv"), new Blob([chartAsCsv(state.spec)], { type: "text/csv" })),
  };
  for (const [title, act] of Object.entries(entries)) {
    const button = html("button", "chart-menu-entry", list, title);
    button.type = "button";
    button.addEventListener("click", () => {
      menu.open = false;
      summary.focus({ preventScroll: true });
      act();
    });
  }
  menu.addEventListener("toggle", () => {
    if (!menu.open) return;
    list.children[0].setAttribute("aria-pressed", String(chartSettings.values.log.includes(state.spec.key)));
    list.children[1].textContent = state.element.classList.contains("large") ? "Smaller" : "Larger";
  });
  summary.setAttribute("aria-label", "More about this chart");
  menu.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    menu.open = false;
    summary.focus();
  });
  document.addEventListener("pointerdown", (event) => { if (menu.open && !menu.contains(event.target)) menu.open = false; });
}
