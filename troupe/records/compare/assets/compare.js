// Several runs side by side: draws their charts, shows and hides runs in all of them, and sets answers beside each
// other. Then the page says how many charts it has drawn (body, data-drawn).
"use strict";

(() => {
  const data = JSON.parse(document.getElementById("data").textContent);

  // ---- which runs are shown, in all charts; seeds that a band stands for are hidden at first

  const { values: chosen, choose, listen } = chartSettings;
  const isOff = (run) => chosen.off.includes(run);
  const toggle = (run) => choose({ off: isOff(run) ? chosen.off.filter((one) => one !== run) : [...chosen.off, run] });

  // A run that is hidden is in no legend either, so that many runs leave room for those that are looked at.
  function withShown(spec) {
    return { ...spec, series: spec.series.filter(({ run }) => !isOff(run)), empty: "no run with it is shown" };
  }

  function drawShown() {
    for (const element of document.querySelectorAll("[data-chart]")) {
      const spec = withShown(data.charts[Number(element.dataset.chart)]);
      troupeChart(element, { ...spec, series: spec.series.map((one) => ({ ...one, x: data.axes[one.axes || 0] })) });
    }
  }

  function boxes() {
    const all = [...document.querySelectorAll("input[data-run]")];
    for (const box of all) box.addEventListener("change", () => toggle(box.dataset.run));
    return () => all.forEach((box) => { box.checked = !isOff(box.dataset.run); });
  }

  function switches(bar) {
    const group = html("div", "run-switches", bar);
    const buttons = Object.entries(data.colours).map(([run, colour]) => {
      const button = html("button", "legend-item", group);
      button.type = "button";
      button.title = "Hide or show";
      html("i", `swatch s${colour}`, button);
      html("span", "name", button, run);
      button.addEventListener("click", () => toggle(run));
      return [run, button];
    });
    const banded = () => data.bands.some((run) => !isOff(run)) || !data.within.some((run) => !isOff(run));
    return () => {
      const hidden = banded() ? data.within : data.bands;
      for (const [run, button] of buttons) {
        button.setAttribute("aria-pressed", String(!isOff(run)));
        button.hidden = isOff(run) && hidden.includes(run);
      }
    };
  }

  // The two ways to look at runs of other seeds.
  function seedsSwitch(bar) {
    const group = html("div", "segments");
    bar.querySelector(".segments").after(group);
    group.setAttribute("role", "group");
    group.setAttribute("aria-label", "Seeds");
    const ways = [["Seeds as a band", data.within, data.bands], ["Single runs", data.bands, data.within]];
    const buttons = ways.map(([title, hidden, shown]) => {
      const button = html("button", "segment", group, title);
      button.type = "button";
      button.addEventListener("click", () => {
        const others = chosen.off.filter((run) => !shown.includes(run) && !hidden.includes(run));
        choose({ off: [...others, ...hidden] });
      });
      return button;
    });
    return () => {
      buttons.forEach((button, i) => {
        const [, hidden, shown] = ways[i];
        button.setAttribute("aria-pressed", String(hidden.every(isOff) && !shown.every(isOff)));
      });
    };
  }

  // ---- answers to one prompt, run by run

  function choice(parent, title, options, changed, className) {
    const label = html("label", className, parent, title);
    const select = html("select", "", label);
    options.forEach(([value, text]) => {
      const option = html("option", "", select, text);
      option.value = String(value);
    });
    select.addEventListener("change", changed);
    return select;
  }

  function answers(element) {
    const line = (text) => text.replace(/\s+/g, " ").trim();
    const titles = data.prompts.map(({ source, prompt }, i) => [i, `${source}: ${line(prompt).slice(0, 110)}`]);
    const most = Math.max(...data.prompts.flatMap(({ answers: all }) => all.flat().map(({ samples }) => samples.length)));
    const bar = html("div", "answers-choice", element);
    const prompt = choice(bar, "Prompt", titles, show, "grows");
    const sample = choice(bar, "Sample", Array.from({ length: most }, (_, i) => [i, `${i + 1} of ${most}`]), show);
    const asked = html("pre", "", element);
    const grid = html("div", "answers-grid", element);

    function show() {
      const chosen = data.prompts[Number(prompt.value)];
      asked.textContent = chosen.prompt;
      grid.replaceChildren();
      data.runs.forEach((run, i) => {
        if (isOff(run) && !data.within.includes(run)) return; // a seed is seen where its band is

        const column = html("section", "answers-run", grid);
        const head = html("h3", "", column);
        html("i", `swatch s${data.colours[run]}`, head);
        html("span", "", head, run);
        chosen.answers[i].forEach((one) => answer(column, one, chosen.source, Number(sample.value)));
      });
    }

    show();
    return show;
  }

  function answer(parent, { step, samples }, source, place) {
    const one = samples[place];
    const head = html("div", "answer-head", parent);
    html("b", "", head, `${source === "training" ? "step" : "version"} ${step.toLocaleString("en-US")}`);
    if (!one) {
      html("span", "", head, "no such sample");
      return;
    }
    html("span", "", head, `reward ${formatValue(one.reward, "number")}`);
    html("span", "", head, `${one.tokens.toLocaleString("en-US")} tokens`);
    html("span", "", head, `ended by ${one.ended}`);
    const rewards = samples.map(({ reward }) => reward).filter(known);
    if (rewards.length > 1) {
      const mean = rewards.reduce((sum, reward) => sum + reward, 0) / rewards.length;
      html("span", "", head, `mean of ${rewards.length} shown ${formatValue(mean, "number")}`);
    }
    html("pre", "", parent, one.text || "(nothing)").dir = "auto";
  }

  for (const button of document.querySelectorAll(".theme-switch")) themeSwitch(button);
  chosen.off = [...data.within];
  const drawn = drawCharts({ ...data, charts: data.charts.map(withShown) });
  const shows = [boxes()];
  const bar = document.querySelector(".chart-tools");
  if (bar && data.bands.length) shows.push(seedsSwitch(bar));
  if (bar) shows.push(switches(bar));
  const element = document.getElementById("answers");
  if (element) shows.push(answers(element));
  const showAll = () => shows.forEach((show) => show());
  listen((changes) => {
    if (!("off" in changes)) return;
    drawShown();
    showAll();
  });
  showAll();
  document.body.dataset.drawn = String(drawn);
})();
