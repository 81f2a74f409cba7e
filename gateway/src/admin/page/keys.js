// The state of the keys, with search, filter and sorting.

export const STATUSES = {
  healthy: "Healthy",
  rate_limited: "Rate limited",
  exhausted: "Exhausted",
  revoked: "Revoked",
  suspected: "Suspected",
  disabled: "Disabled",
};

const GROUPS = {
  resting: ["rate_limited", "exhausted", "suspected"],
  out_of_service: ["revoked", "disabled"],
};

/** Sort order of statuses, most urgent first. */
const URGENCY = ["revoked", "exhausted", "rate_limited", "suspected", "disabled", "healthy"];

/** Sort values. A key without a value sorts last. */
const VALUES = {
  id: () => 0,
  status: (key) => URGENCY.indexOf(key.status),
  left: (key) => key.returnsAt ?? Infinity,
  requests: (key) => key.requests,
  tokens: (key) => key.tokens,
  limited: (key) => key.limited,
  used: (key) => key.usedAt ?? -Infinity,
};

/** Who says that a key is unavailable. */
export const CAUSES = {
  service: "Said by the service",
  guessed: "The time is a guess",
  suspected: "It may be the request's fault",
  confirmed: "Another key served the request",
  operator: "An operator disabled it",
  store: "Known from the store",
};

const collator = new Intl.Collator("en", { numeric: true });

/** Names a key among those of all upstreams. An upstream's name has no slash. */
export const nameOf = ({ upstream, id }) => `${upstream}/${id}`;

/** Whether a key of this status can be reset. */
export const canReset = (status) => status !== "healthy" && status !== "disabled";

export class Keys {
  historyKept = 15 * 60_000;
  upstreams = [];
  #keys = new Map();
  #ranked = true;

  /** Applies an event of the stream. */
  hear(name, data, now) {
    if (name === "snapshot") {
      this.#keys.clear();
      this.historyKept = data.history_ms;
      this.upstreams = data.upstreams;
    } else {
      for (const removed of data.removed) this.#keys.delete(nameOf(removed));
    }
    for (const shown of data.keys) this.#take(shown, now);
  }

  #take(shown, now) {
    const name = nameOf(shown);
    let key = this.#keys.get(name);
    if (!key || shown.history) {
      const { upstream, id } = shown;
      key = { name, upstream, id, lower: id.toLowerCase(), rank: key?.rank };
      this.#keys.set(name, key);
      if (!this.upstreams.includes(upstream)) this.upstreams.push(upstream);
      this.#ranked &&= key.rank !== undefined;
    }
    if ("masked_secret" in shown) key.maskedSecret = shown.masked_secret;
    if ("time_left_ms" in shown) key.returnsAt = later(now, shown.time_left_ms);
    if ("cause" in shown) key.cause = shown.cause;
    if ("last_reason" in shown) key.lastReason = shown.last_reason;
    if ("last_used_ms_ago" in shown) key.usedAt = later(now, shown.last_used_ms_ago, -1);
    for (const count of ["requests", "limited", "recovered", "tokens"]) key[count] = shown[count] ?? key[count];
    if (shown.history) {
      key.history = shown.history.map(({ status, ms_ago }) => ({ status, at: now - ms_ago }));
    } else if (shown.status) {
      key.history.push({ status: shown.status, at: now });
    }
    key.status = shown.status ?? key.status;
  }

  get(name) {
    return this.#keys.get(name);
  }

  get size() {
    return this.#keys.size;
  }

  /** Returns keys per status and group, total requests and tokens, and the time when the first key returns. */
  totals() {
    const totals = { total: this.#keys.size, requests: 0, tokens: 0, returnsAt: Infinity };
    for (const status in STATUSES) totals[status] = 0;
    for (const key of this.#keys.values()) {
      totals[key.status] += 1;
      totals.requests += key.requests;
      totals.tokens += key.tokens;
      if (GROUPS.resting.includes(key.status)) totals.returnsAt = Math.min(totals.returnsAt, key.returnsAt ?? Infinity);
    }
    for (const group in GROUPS) totals[group] = GROUPS[group].reduce((sum, status) => sum + totals[status], 0);
    return totals;
  }

  /** Returns the matching keys in order. */
  find({ search, upstream, group, sort, descending }) {
    this.#rank();
    const wanted = search.toLowerCase();
    const statuses = group ? (GROUPS[group] ?? [group]) : null;
    const found = [];
    for (const key of this.#keys.values()) {
      if (statuses && !statuses.includes(key.status)) continue;
      if (upstream && key.upstream !== upstream) continue;
      if (key.lower.includes(wanted) || key.maskedSecret.toLowerCase().includes(wanted)) found.push(key);
    }
    const value = VALUES[sort];
    const sign = descending ? -1 : 1;
    return found.sort((a, b) => {
      const [one, other] = [value(a), value(b)];
      return one === other ? (sort === "id" ? sign : 1) * (a.rank - b.rank) : sign * (one < other ? -1 : 1);
    });
  }

  /** Ranks all ids once, because their comparison is slow. */
  #rank() {
    if (this.#ranked) return;
    [...this.#keys.values()].sort((a, b) => collator.compare(a.id, b.id) || collator.compare(a.upstream, b.upstream)).forEach((key, rank) => (key.rank = rank));
    this.#ranked = true;
  }
}

const later = (now, ms, sign = 1) => (ms === null ? null : now + sign * ms);
