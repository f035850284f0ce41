"use strict";

const base = "/core4/api/v1";
const element = (id) => document.getElementById(id);
const REFRESH = 5000;

// Answers the data of a reply, or null if the browser is not signed in.
async function ask(path) {
  const response = await fetch(path, { headers: { Accept: "application/json" } });
  return response.ok ? (await response.json()).data : null;
}

function fill(body, rows) {
  body.replaceChildren(...rows.map((cells) => {
    const row = document.createElement("tr");
    row.append(...cells.map((text) => {
      const cell = document.createElement("td");
      cell.textContent = text;
      return cell;
    }));
    return row;
  }));
}

async function show() {
  const profile = await ask(`${base}/profile`);
  element("signed-out").hidden = Boolean(profile);
  element("signed-in").hidden = !profile;
  if (!profile) return;
  element("user").textContent = profile.name;
  const [counts, workers] = await Promise.all([ask(`${base}/job/count`), ask(`${base}/worker`)]);
  fill(element("counts"), Object.entries(counts ?? {}));
  const alive = (workers ?? []).filter((worker) => ["up", "drain"].includes(worker.state));
  fill(element("workers"), alive.map((worker) => [
    worker.name, worker.state, worker.running, worker.slots, `${worker.beat_age.toFixed(0)} s ago`,
  ]));
  element("no-workers").hidden = alive.length > 0;
}

element("login").addEventListener("submit", async (event) => {
  event.preventDefault();
  const form = event.target;
  const response = await fetch(`${base}/login`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(Object.fromEntries(new FormData(form))),
  });
  element("refused").textContent = response.ok ? "" : (await response.json()).detail;
  if (response.ok) form.reset();
  await show();
});

element("logout").addEventListener("click", async () => {
  await ask(`${base}/logout`);
  await show();
});

for (const place of document.querySelectorAll(".base")) place.textContent = location.origin + base;
ask("/version").then((data) => { element("version").textContent = data ? data.product : ""; });
show();
setInterval(() => { if (!document.hidden && element("signed-out").hidden) show(); }, REFRESH);
