// The buttons of the live page.
"use strict";

const QUESTIONS = {
  Drain: "Finish the steps that are begun, save, and end the run? It can be gone on with later.",
  Stop: "End the run now, with a checkpoint of the last completed step? Steps under way are given up.",
};

function confirmed(kind) {
  if (!QUESTIONS[kind]) return Promise.resolve(true);
  const dialog = at("confirm");
  at("question").textContent = QUESTIONS[kind];
  at("yes").textContent = kind;
  return new Promise((resolve) => {
    at("yes").onclick = () => dialog.close("yes");
    at("no").onclick = () => dialog.close("no");
    dialog.onclose = () => resolve(dialog.returnValue === "yes");
    dialog.returnValue = "no";
    dialog.showModal();
  });
}

async function ask(kind) {
  if (asking || !(await confirmed(kind))) return;
  asking = true;
  touch("status");
  answer(`${kind} …`, false);
  try {
    const response = await fetch("ask", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ type: kind }),
    });
    const text = await response.text();
    const reply = response.headers.get("Content-Type").startsWith("application/json") ? JSON.parse(text) : { type: "Refused", message: text };
    answer(`${kind}: ${reply.message || "done"}`, reply.type === "Refused");
  } catch (error) {
    answer(`${kind}: no answer (${error.message})`, true);
  } finally {
    asking = false;
    touch("status");
  }
}

function answer(text, refused) {
  at("answer").textContent = text;
  at("answer").classList.toggle("refused", refused);
}

at("buttons").addEventListener("click", (event) => event.target.dataset.ask && ask(event.target.dataset.ask));
at("hold").addEventListener("click", () => {
  held = !held;
  at("hold").setAttribute("aria-pressed", String(held));
  at("hold").textContent = held ? "Held" : "Hold";
  showTalks();
});
at("talks").addEventListener("pointerenter", (event) => { reading = event.pointerType === "mouse"; });
at("talks").addEventListener("pointerleave", () => { reading = false; });
