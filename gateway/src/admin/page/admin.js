// Assembles the page: sign-in, view and actions.

import { startCallers } from "/admin/callers.js";
import { adding, importing, removing, sentence } from "/admin/dialogs.js";
import { Keys } from "/admin/keys.js";
import { startLimits } from "/admin/limits.js";
import { at, call, pathOf, Stream, token } from "/admin/server.js";
import { Table } from "/admin/table.js";
import { startTheme } from "/admin/theme.js";
import { count, left, number, rounded } from "/admin/words.js";

const PER_PAGE = 50;

/** Update interval of countdowns; timelines update every fourth time. */
const TICK = 250;

const element = (id) => document.getElementById(id);

const keys = new Keys();
const view = { search: "", upstream: "", group: "", sort: "id", descending: false, page: 0 };
const table = new Table(keys, act);
const stream = new Stream(heard, connection);

// ---- view ----

let isScheduled = false;

/** Schedules one update of the view for the next frame. */
function schedule() {
  if (isScheduled) return;
  isScheduled = true;
  requestAnimationFrame(() => {
    isScheduled = false;
    show();
  });
}

function show() {
  const now = performance.now();
  showTotals(now);
  showUpstreams();
  if (table.isHeld && table.shown.every((name) => keys.get(name))) return table.update(now, true);
  const found = keys.find(view);
  const pages = Math.max(1, Math.ceil(found.length / PER_PAGE));
  view.page = Math.min(view.page, pages - 1);
  const first = view.page * PER_PAGE;
  const shown = found.slice(first, first + PER_PAGE);
  table.show(shown, now);
  element("range").textContent = found.length
    ? `${number(first + 1)}–${number(first + shown.length)} of ${number(found.length)}`
    : "";
  element("previous").disabled = view.page === 0;
  element("next").disabled = view.page === pages - 1;
  element("nothing").hidden = found.length > 0;
  element("nothing").textContent = keys.size ? "No key matches." : "There are no keys yet. Add or import some.";
}

function showTotals(now) {
  const totals = keys.totals();
  const notes = {
    total: `${rounded(totals.requests)} requests, ${rounded(totals.tokens)} tokens`,
    healthy: totals.total ? `${Math.floor((100 * totals.healthy) / totals.total)} %` : "",
    resting: totals.returnsAt < Infinity ? `First back in ${left(totals.returnsAt - now)}` : "",
    out_of_service: ["revoked", "disabled"].filter((s) => totals[s]).map((s) => `${number(totals[s])} ${s}`).join(", "),
  };
  for (const name in notes) {
    document.querySelector(`[data-count=${name}]`).textContent = number(totals[name]);
    document.querySelector(`[data-note=${name}]`).textContent = notes[name];
  }
  element("reset-resting").disabled = totals.resting === 0;
}

/** Offers the upstreams to choose from, if there are several. */
function showUpstreams() {
  const names = keys.upstreams;
  document.body.dataset.upstreams = names.length > 1 ? "several" : "one";
  for (const [id, before] of [["upstream", [""]], ["add-upstream", []], ["import-upstream", []]]) {
    const select = element(id);
    const values = [...before, ...names];
    if (values.join("/") === [...select.options].map(({ value }) => value).join("/")) continue;
    const chosen = select.value;
    select.replaceChildren(...values.map((name) => new Option(name || "Every upstream", name)));
    select.value = values.includes(chosen) ? chosen : values[0];
  }
}

let ticks = 0;
setInterval(() => {
  ticks += 1;
  if (document.hidden || element("overview").hidden) return;
  const now = performance.now();
  table.update(now, ticks % 4 === 0);
  showTotals(now);
}, TICK);

function heard(name, data) {
  keys.hear(name, data, performance.now());
  schedule();
}

// ---- the connection ----

let countdown;

const CONNECTION = {
  connecting: () => "Connecting",
  live: () => "Live",
  waiting: ({ reason }) => (reason ? `Not connected: ${reason}. Next attempt` : "Connection lost, reconnecting"),
  refused: () => "Not signed in",
};

function connection(state, detail) {
  clearInterval(countdown);
  element("connection-wait").textContent = "";
  element("connect-now").hidden = state !== "waiting";
  // During a reconnect, the connection still counts as lost.
  const isLost = state === "connecting" && document.body.dataset.stale !== undefined;
  if (!isLost) {
    element("connection").dataset.state = state;
    element("connection-text").textContent = CONNECTION[state](detail);
  }
  if (state === "live") {
    delete document.body.dataset.stale;
    signedIn(true);
    updateCallers();
    updateLimits();
  } else if (state === "waiting") {
    document.body.dataset.stale = "";
    countDown(performance.now() + detail.wait);
  } else if (state === "refused") {
    refused(detail);
  }
}

function countDown(until) {
  const say = () => {
    const seconds = Math.max(0, Math.ceil((until - performance.now()) / 1000));
    element("connection-wait").textContent = `in ${seconds} s`;
  };
  say();
  countdown = setInterval(say, TICK);
}

// ---- sign-in ----

function signedIn(yes) {
  element("sign-in").hidden = yes;
  element("overview").hidden = !yes;
  element("sign-out").hidden = !yes || !token.get();
  for (const id of ["add-key", "import-keys", "reset-resting"]) element(id).hidden = !yes;
}

function refused(error) {
  for (const dialog of document.querySelectorAll("dialog[open]")) dialog.close();
  const given = token.get();
  token.forget();
  signedIn(false);
  element("token-error").textContent =
    error.status !== 401 ? sentence(error.message) : given ? "That is not the admin token." : "";
  element("token").value = "";
  element("token").focus();
}

element("sign-in-form").addEventListener("submit", (event) => {
  event.preventDefault();
  token.set(element("token").value.trim());
  stream.start();
});

element("sign-out").addEventListener("click", () => {
  token.forget();
  stream.start();
});

// ---- actions ----

let forgetting = {};

/** Announces an outcome, also to screen readers. */
function announce(text, isFailure = false) {
  const place = element(isFailure ? "failed" : "done");
  place.textContent = text;
  clearTimeout(forgetting[place.id]);
  forgetting[place.id] = setTimeout(() => (place.textContent = ""), isFailure ? 12_000 : 5_000);
}

const askToRemove = removing(announce);
element("add-key").addEventListener("click", adding(announce));
element("import-keys").addEventListener("click", importing(announce));

const DONE = { reset: "was reset", disable: "is out of service", enable: "is back in service" };

async function act(action, key) {
  if (action === "remove") return askToRemove(key);
  try {
    await call("POST", pathOf(key, action));
    announce(`${key.id} ${DONE[action]}.`);
  } catch (error) {
    announce(`${key.id}: ${error.message}.`, true);
  }
}

element("reset-resting").addEventListener("click", async () => {
  try {
    const upstreams = view.upstream ? [view.upstream] : keys.upstreams;
    const answers = await Promise.all(upstreams.map((upstream) => call("POST", at("/keys:reset", upstream))));
    const [reset, failed] = ["reset", "failed"].map((what) => answers.flatMap((answer) => answer[what]));
    if (failed.length) announce(`${count(failed.length, "key")} could not be reset. ${sentence(failed[0].error)}`, true);
    announce(`${count(reset.length, "key")} ${reset.length === 1 ? "was" : "were"} reset.`);
  } catch (error) {
    announce(sentence(error.message), true);
  }
});

// ---- search, filter and sorting ----

function look(changes) {
  Object.assign(view, { page: 0 }, changes);
  for (const card of document.querySelectorAll(".card")) card.ariaPressed = String(card.dataset.group === view.group);
  for (const heading of document.querySelectorAll("th[data-sort]")) {
    const isIt = heading.dataset.sort === view.sort;
    heading.ariaSort = isIt ? (view.descending ? "descending" : "ascending") : null;
  }
  element("status").value = view.group;
  element("sort").value = view.sort;
  schedule();
}

/** Numbers sort in descending order first. */
const beginsDescending = (sort) => !["id", "status", "left"].includes(sort);

element("search").addEventListener("input", ({ target }) => look({ search: target.value.trim() }));
element("upstream").addEventListener("change", ({ target }) => look({ upstream: target.value }));
element("status").addEventListener("change", ({ target }) => look({ group: target.value }));
element("sort").addEventListener("change", ({ target }) =>
  look({ sort: target.value, descending: beginsDescending(target.value) }));
element("previous").addEventListener("click", () => look({ page: view.page - 1 }));
element("next").addEventListener("click", () => look({ page: view.page + 1 }));
element("connect-now").addEventListener("click", () => stream.start());
for (const card of document.querySelectorAll(".card")) {
  card.addEventListener("click", () => look({ group: card.dataset.group === view.group ? "" : card.dataset.group }));
}
for (const heading of document.querySelectorAll("th[data-sort]")) {
  const { sort } = heading.dataset;
  heading.firstElementChild.addEventListener("click", () =>
    look({ sort, descending: view.sort === sort ? !view.descending : beginsDescending(sort) }));
}
addEventListener("keydown", (event) => {
  const isTyping = event.target.closest?.("input, textarea, select, dialog");
  if (event.key !== "/" || isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  element("search").focus();
});

startTheme(element("theme-switch"));
const isShown = () => !element("overview").hidden;
const updateCallers = startCallers(isShown);
const updateLimits = startLimits(isShown);
look({});
stream.start();
