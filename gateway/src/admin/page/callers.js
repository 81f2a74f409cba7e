// The table of the callers. It asks for their usage every few seconds while the page is visible.

import { call } from "/admin/server.js";
import { number } from "/admin/words.js";

const INTERVAL = 5_000;
const NONE = "–";

const element = (id) => document.getElementById(id);

/** Keeps the table up to date while `isShown()`. */
export function startCallers(isShown) {
  const update = async () => {
    if (document.hidden || !isShown()) return;
    // The stream of keys says what is wrong with the connection.
    const callers = await call("GET", "/callers").catch(() => null);
    if (callers) show(callers);
  };
  setInterval(update, INTERVAL);
  return update;
}

function show(callers) {
  // Without tokens, one caller stands for all: the totals of the keys say the same.
  element("callers").hidden = callers.length === 1 && callers[0].name === "anyone";
  element("caller-rows").replaceChildren(...callers.map(row));
}

function row(caller) {
  const row = document.createElement("tr");
  const cells = [
    caller.name,
    number(caller.requests),
    limit(caller.requests_left, caller.requests_per_minute),
    number(caller.tokens),
    limit(caller.tokens_left, caller.tokens_per_minute),
    limit(caller.in_flight, caller.max_in_flight, true),
    number(caller.over_limit),
  ];
  for (const [place, text] of cells.entries()) {
    const cell = row.insertCell();
    cell.textContent = text;
    cell.className = place ? "n" : "name";
  }
  return row;
}

/** What is left of a limit, or is in use. */
function limit(value, most, isUse = false) {
  if (most === null) return isUse ? number(value) : NONE;
  return `${number(value)} of ${number(most)}`;
}
