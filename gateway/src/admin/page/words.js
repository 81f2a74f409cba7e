// Formats of numbers and times.

const grouped = new Intl.NumberFormat("en");
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });

/** Formats a number with all digits if they fit. */
export const number = (value) => (value < 10_000_000 ? grouped : compact).format(value);

/** Formats a number with few digits. */
export const rounded = (value) => (value < 10_000 ? grouped : compact).format(value);

export const count = (value, one, several = `${one}s`) => `${number(value)} ${value === 1 ? one : several}`;

/** Formats a time left: 1:42, 2 h 05, 3 d 4 h. */
export function left(ms) {
  const seconds = Math.max(0, Math.ceil(ms / 1000));
  const [hours, minutes] = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60];
  if (hours >= 48) return `${Math.floor(hours / 24)} d ${hours % 24} h`;
  return hours ? `${hours} h ${two(minutes)}` : `${minutes}:${two(seconds % 60)}`;
}

/** Formats a time passed: 5 s, 12 min, 3 h, 2 d. */
export function ago(ms) {
  const seconds = Math.max(0, Math.floor(ms / 1000));
  if (seconds < 60) return `${seconds} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  return seconds < 172_800 ? `${Math.floor(seconds / 3600)} h` : `${Math.floor(seconds / 86_400)} d`;
}

const two = (value) => String(value).padStart(2, "0");
