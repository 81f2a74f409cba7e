// API calls, and the stream of changes, which reconnects by itself.

const API = "/admin/api";
const TOKEN = "admin-token";

/** A stream that is silent for this long is dead, because the server sends a comment every 10 seconds. */
const SILENCE = 25_000;
const FIRST_WAIT = 500;
const LONGEST_WAIT = 15_000;

export const token = {
  get: () => sessionStorage.getItem(TOKEN),
  set: (value) => sessionStorage.setItem(TOKEN, value),
  forget: () => sessionStorage.removeItem(TOKEN),
};

export class Refused extends Error {
  /** `error` is the gateway's message. It is undefined if something else answered, such as a proxy. */
  constructor(status, error) {
    super(error ?? `the gateway answered ${status}`);
    this.status = status;
    // A proxy in front of the gateway may answer 403 itself, for example while the gateway starts.
    this.isFinal = status === 401 || (status === 403 && error !== undefined);
  }
}

/** Adds the upstream that a call is about. */
export const at = (path, upstream) => `${path}?upstream=${encodeURIComponent(upstream)}`;

export const pathOf = ({ upstream, id }, action) =>
  at(`/keys/${encodeURIComponent(id)}${action ? `/${action}` : ""}`, upstream);

/** Calls the API and returns its response. */
export async function call(method, path, body, type = "application/json") {
  const headers = { "x-gateway-admin": "1" };
  if (body !== undefined) headers["content-type"] = type;
  const response = await send(path, { method, headers, body });
  return response.status === 204 ? null : response.json();
}

async function send(path, options) {
  const headers = { ...options.headers };
  const given = token.get();
  // Other characters can be part of no token, and fetch can't send some of them in a header.
  if (given && !/^[!-~]+$/.test(given)) throw new Refused(401, "the token contains an invalid character");
  if (given) headers.authorization = `Bearer ${given}`;
  const response = await fetch(API + path, { ...options, headers, cache: "no-store" }).catch((error) => {
    throw options.signal?.aborted ? error : new Refused(0, "the gateway can't be reached");
  });
  if (response.ok) return response;
  const answer = await response.json().catch(() => ({}));
  throw new Refused(response.status, answer?.error);
}

/**
 * Follows the event stream until `stop()`.
 *
 * Calls `heard(name, data)` for each event and `state(name, detail)` for each state: "connecting", "live", "waiting"
 * (detail: milliseconds until the next attempt, and the gateway's reason if it gave one) or "refused" (detail: the error). After "refused", only `start()`
 * connects again.
 */
export class Stream {
  #heard;
  #state;
  #wait = FIRST_WAIT;
  #timer;
  #abort;

  constructor(heard, state) {
    this.#heard = heard;
    this.#state = state;
    addEventListener("online", () => this.#hurry());
    document.addEventListener("visibilitychange", () => document.hidden || this.#hurry());
  }

  start() {
    this.stop();
    this.#abort = new AbortController();
    this.#run(this.#abort);
  }

  stop() {
    clearTimeout(this.#timer);
    this.#timer = undefined;
    this.#abort?.abort();
    this.#abort = undefined;
  }

  #hurry() {
    if (this.#timer) this.start();
  }

  async #run(abort) {
    this.#state("connecting");
    let reason;
    try {
      const response = await inTime(send("/events", { signal: abort.signal }), abort);
      await this.#read(response.body, abort);
    } catch (error) {
      if (abort !== this.#abort) return;
      if (error instanceof Refused && error.isFinal) return this.#state("refused", error);
      // Too many wrong tokens, or too many pages.
      if (error instanceof Refused && [429, 503].includes(error.status)) reason = error.message;
    }
    if (abort === this.#abort) this.#again(reason);
  }

  #again(reason) {
    // Jitter, so that not all pages reconnect at once.
    const wait = this.#wait * (0.75 + Math.random() / 2);
    this.#wait = Math.min(this.#wait * 2, LONGEST_WAIT);
    this.#timer = setTimeout(() => this.start(), wait);
    this.#state("waiting", { wait, reason });
  }

  async #read(body, abort) {
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const { value, done } = await inTime(reader.read(), abort);
      if (done) return;
      text += value;
      const events = text.split("\n\n");
      text = events.pop();
      for (const event of events) this.#take(event);
    }
  }

  #take(event) {
    const fields = Object.fromEntries(event.split("\n").map((line) => line.split(/: ?(.*)/s)));
    if (!fields.event) return;
    this.#wait = FIRST_WAIT;
    if (fields.event === "snapshot") this.#state("live");
    this.#heard(fields.event, JSON.parse(fields.data));
  }
}

async function inTime(answer, abort) {
  const timer = setTimeout(() => abort.abort("silence"), SILENCE);
  try {
    return await answer;
  } finally {
    clearTimeout(timer);
  }
}
