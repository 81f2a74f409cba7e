// The last 15 minutes of one key, as one SVG path per status.

import { STATUSES } from "/admin/keys.js";
import { ago, count } from "/admin/words.js";

/** Top and height of each status. A healthy key is a thin line. */
const BANDS = { healthy: [9, 2], rate_limited: [2, 16], exhausted: [2, 16], revoked: [2, 16], suspected: [6, 8], disabled: [7, 6] };

/** Minimum width, so that short spans stay visible. */
const NARROWEST = 1.5;

export function draw(svg, key, now, kept, width) {
  const paths = Object.fromEntries(Object.keys(STATUSES).map((status) => [status, ""]));
  for (const { status, from, to } of spans(key, now, kept)) {
    const [top, height] = BANDS[status];
    const x = (1 - (now - from) / kept) * width;
    const wide = Math.max(((to - from) / kept) * width, NARROWEST);
    paths[status] += `M${x.toFixed(1)} ${top}h${wide.toFixed(1)}v${height}h${-wide.toFixed(1)}z`;
  }
  for (const status in paths) {
    const path = svg.querySelector(`.t-${status}`);
    if (path.getAttribute("d") !== paths[status]) path.setAttribute("d", paths[status]);
  }
}

/** Describes the timeline in words. */
export function describe(key, now, kept) {
  const all = spans(key, now, kept);
  const rests = all.filter(({ status }) => ["rate_limited", "exhausted", "suspected"].includes(status));
  if (all.every(({ status }) => status === "healthy")) return "Always healthy";
  const resting = rests.reduce((sum, { from, to }) => sum + to - from, 0);
  return rests.length ? `${count(rests.length, "rest")}, ${ago(resting)} in all` : STATUSES[key.status];
}

/** Describes the span at a place between 0 (15 minutes ago) and 1 (now). */
export function describeAt(key, now, kept, place) {
  const at = now - (1 - place) * kept;
  const span = spans(key, now, kept).find(({ from, to }) => from <= at && at <= to);
  if (!span) return "";
  const ended = span.to === now ? "until now" : `until ${ago(now - span.to)} ago`;
  return `${STATUSES[span.status]} for ${ago(span.to - span.from)}, ${ended}`;
}

function spans(key, now, kept) {
  const ends = key.history.slice(1).map(({ at }) => at);
  return key.history
    .map(({ status, at }, index) => ({ status, from: Math.max(at, now - kept), to: ends[index] ?? now }))
    .filter(({ from, to }) => to >= from);
}
