// The table. It contains only the rows of the current page.

import { CAUSES, STATUSES, canReset } from "/admin/keys.js";
import { describe, describeAt, draw } from "/admin/timeline.js";
import { ago, left, number } from "/admin/words.js";

const NONE = "–";

export class Table {
  #body = document.getElementById("rows");
  #template = document.getElementById("row").content.firstElementChild;
  #axis = document.querySelector("th.c-timeline");
  #rows = new Map();
  #canHover = matchMedia("(hover: hover)");
  #keys;

  /** Calls `act(action, key)` when a button of a row is pressed. */
  constructor(keys, act) {
    this.#keys = keys;
    this.#body.addEventListener("click", ({ target }) => {
      const button = target.closest("button[data-action]");
      if (!button || button.ariaDisabled === "true") return;
      const key = keys.get(button.closest("tr").dataset.name);
      if (key) act(actionOf(button.dataset.action, key), key);
    });
    this.#body.addEventListener("pointermove", ({ target, clientX }) => this.#explain(target.closest("svg.timeline"), clientX));
  }

  /** Whether rows must keep their places, because the user is about to press a button in one. */
  get isHeld() {
    const pressed = ".c-actions:hover";
    return Boolean(this.#body.querySelector((this.#canHover.matches ? `${pressed}, ` : "") + ".c-actions :focus-visible"));
  }

  /** Shows these keys, in this order. */
  show(keys, now) {
    const before = this.#rows;
    this.#rows = new Map(keys.map((key) => [key.name, before.get(key.name) ?? this.#row(key)]));
    for (const [name, row] of before) if (!this.#rows.has(name)) row.remove();
    let place = this.#body.firstElementChild;
    for (const row of this.#rows.values()) {
      if (row === place) place = place.nextElementSibling;
      else this.#body.insertBefore(row, place);
    }
    this.update(now, true);
  }

  /** The names of the keys that are shown. */
  get shown() {
    return [...this.#rows.keys()];
  }

  /** Updates the cells that change with time, and optionally the timelines. */
  update(now, timelines) {
    const width = this.#widthOfTimelines();
    for (const [name, row] of this.#rows) {
      const key = this.#keys.get(name);
      if (!key) continue;
      fill(row, key, now);
      if (timelines) this.#draw(row.querySelector("svg.timeline"), key, now, width);
    }
  }

  #draw(svg, key, now, width) {
    draw(svg, key, now, this.#keys.historyKept, width);
    const words = `The last 15 minutes of ${key.id}: ${describe(key, now, this.#keys.historyKept)}`;
    if (svg.ariaLabel !== words) svg.ariaLabel = words;
  }

  /** All timelines have the same width. */
  #widthOfTimelines() {
    return this.#body.querySelector("svg.timeline")?.clientWidth || this.#axis.clientWidth;
  }

  #explain(svg, x) {
    const key = svg && this.#keys.get(svg.closest("tr").dataset.name);
    if (!key) return;
    const { left, width } = svg.getBoundingClientRect();
    svg.firstElementChild.textContent = describeAt(key, performance.now(), this.#keys.historyKept, (x - left) / width);
  }

  #row({ name, upstream, id }) {
    const row = this.#template.cloneNode(true);
    row.dataset.name = name;
    row.dataset.key = id;
    const cell = row.querySelector(".name");
    cell.textContent = id;
    cell.title = id;
    put(row.querySelector(".upstream"), upstream);
    label(row.querySelector("[data-action=reset]"), `Reset ${id}`);
    label(row.querySelector("[data-action=remove]"), `Remove ${id}`);
    return row;
  }
}

const actionOf = (name, key) => (name !== "toggle" ? name : key.status === "disabled" ? "enable" : "disable");

function label(button, text) {
  button.ariaLabel = text;
  button.title = text;
}

function fill(row, key, now) {
  if (row.dataset.status !== key.status) {
    row.dataset.status = key.status;
    const shape = row.querySelector("svg.shape");
    shape.setAttribute("class", `shape ${key.status}`);
    shape.firstElementChild.setAttribute("href", `#${key.status}`);
    put(row.querySelector(".c-status span"), STATUSES[key.status]);
    row.querySelector("[data-action=reset]").ariaDisabled = String(!canReset(key.status));
    label(row.querySelector("[data-action=toggle]"), `${key.status === "disabled" ? "Enable" : "Disable"} ${key.id}`);
  }
  const cell = (name, text) => put(row.querySelector(`.c-${name}`), text);
  cell("secret", key.maskedSecret);
  cell("left", key.returnsAt === null ? NONE : left(key.returnsAt - now));
  cell("reason", key.lastReason ?? NONE);
  const cause = CAUSES[key.cause] ?? "";
  const status = row.querySelector(".c-status");
  if (status.title !== cause) status.title = cause;
  cell("requests", number(key.requests));
  cell("tokens", number(key.tokens));
  cell("limited", number(key.limited));
  cell("used", key.usedAt === null ? NONE : ago(now - key.usedAt));
}

/** Writes only a changed text, to avoid a new layout. */
function put(element, text) {
  const words = String(text);
  if (element.textContent === words) return;
  element.textContent = words;
  element.classList.toggle("none", words === NONE);
}
