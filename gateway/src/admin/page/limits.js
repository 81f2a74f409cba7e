// The table of the scopes and their limits, and the explanation of one. It asks every few seconds while the page is visible.

import { at, call } from "/admin/server.js";
import { count, number } from "/admin/words.js";

const INTERVAL = 5_000;
const NONE = "–";

/** Rows of an explanation. */
const LISTED = 200;

const element = (id) => document.getElementById(id);

/** Keeps the table up to date while `isShown()`. */
export function startLimits(isShown) {
  const dialog = element("explanation");
  dialog.querySelector("[data-close]").addEventListener("click", () => dialog.close());
  const update = async () => {
    if (document.hidden || !isShown()) return;
    // The stream of keys says what is wrong with the connection.
    const scopes = await call("GET", "/scopes").catch(() => null);
    if (scopes) show(scopes);
  };
  setInterval(update, INTERVAL);
  return update;
}

function show(scopes) {
  element("limits").hidden = scopes.length === 0;
  const rows = element("limit-rows");
  // A button keeps its focus if its row stays.
  const before = new Map([...rows.rows].map((row) => [row.dataset.name, row]));
  rows.replaceChildren(...scopes.map((scope) => update(before.get(nameOf(scope)) ?? empty(scope), scope)));
}

const nameOf = ({ upstream, scope }) => JSON.stringify([upstream, scope]);

function empty(scope) {
  const row = document.createElement("tr");
  row.dataset.name = nameOf(scope);
  const name = row.insertCell();
  name.className = "name";
  const button = document.createElement("button");
  button.type = "button";
  button.className = "link";
  button.title = "Which key is next, and why no other";
  button.textContent = scope.scope ?? "requests without a model";
  button.addEventListener("click", () => explain(scope));
  name.append(button);
  for (let place = 1; place < 8; place += 1) row.insertCell().className = place === 1 || place === 6 ? "" : "n";
  row.cells[1].classList.add("only-several");
  return row;
}

function update(row, scope) {
  const texts = [
    scope.upstream,
    number(scope.waiting),
    number(scope.in_flight),
    scope.requests_left === null ? NONE : number(Math.max(0, Math.floor(scope.requests_left))),
    scope.tokens_left === null ? NONE : number(Math.max(0, Math.floor(scope.tokens_left))),
    knownBy(scope),
    number(scope.limited_despite_pacing),
  ];
  for (const [place, text] of texts.entries()) {
    const cell = row.cells[place + 1];
    if (cell.textContent !== text) cell.textContent = text;
  }
  return row;
}

/** How sure the numbers are. */
function knownBy(scope) {
  const known = [
    [scope.known_by_headers, "by headers"],
    [scope.known_by_refusals, "by 429s"],
    [scope.known_by_quota, "by quota"],
    [scope.distrusted, "headers ignored"],
    [scope.unknown, "not yet"],
  ];
  return known.filter(([keys]) => keys).map(([keys, how]) => `${number(keys)} ${how}`).join(", ") || NONE;
}

async function explain({ upstream, scope }) {
  const named = scope === null ? "" : `&scope=${encodeURIComponent(scope)}`;
  const explained = await call("GET", at("/explain", upstream) + named).catch(() => null);
  if (!explained) return;
  element("explained-scope").textContent = scope ?? "Requests without a model";
  const opens = explained.opens_in_seconds;
  const next = explained.next ?? (opens === null ? "none, and no key comes back by itself" : `none for ${time(opens)}`);
  element("explained-next").textContent = `Next key: ${next}. ${count(explained.waiting, "request")} waiting.`;
  element("explained-keys").replaceChildren(...explained.keys.slice(0, LISTED).map(line));
  const more = explained.keys.length - LISTED;
  element("explained-more").textContent = more > 0 ? `And ${count(more, "more key")}.` : "";
  element("explanation").showModal();
}

function line(key) {
  const line = document.createElement("li");
  const name = document.createElement("span");
  name.className = "name";
  name.textContent = key.id;
  const reason = document.createElement("span");
  const lasts = key.passed_over && key.opens_in_seconds ? `, ${time(key.opens_in_seconds)}` : "";
  reason.textContent = key.passed_over ? `${why(key.passed_over)}${lasts}` : "Has room";
  const budgets = document.createElement("span");
  budgets.className = "soft";
  budgets.textContent = key.budgets.map(budget).join(", ");
  line.append(name, reason, budgets);
  return line;
}

function why(reason) {
  switch (reason.why) {
    case "disabled": return "Disabled";
    case "resting": return `Rests: ${reason.status.replace("_", " ")}`;
    case "suspected": return "Suspected";
    case "resting_in_scope": return "Rests for this model";
    case "budget": return `Only ${budget(reason)}`;
    case "in_flight": return `${number(reason.in_flight)} of ${number(reason.most)} in flight`;
    case "lower_tier": return "A tier before it has room";
    default: return reason.why.replaceAll("_", " ");
  }
}

const budget = ({ unit, left, limit }) => `${number(Math.floor(left))} of ${number(Math.round(limit))} ${unit} left`;

const time = (seconds) => (seconds < 100 ? `${seconds.toFixed(1)} s` : `${number(Math.ceil(seconds / 60))} min`);
