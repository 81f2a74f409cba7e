//! Hints: the wait that a limited response asks for.
//!
//! Every function is pure: headers or body in, wait out. The caller decides whether the response is limited,
//! and applies the pool's limits to the hint.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::HeaderMap;
use jiff::fmt::friendly::SpanParser;
use serde_json::Value;
use sfv::{BareItem, Dictionary, Item, List, ListEntry, Parser};

/// Reads a header's value; the second argument is the current time, counted from the epoch.
type Reader = fn(&str, Duration) -> Option<Duration>;

/// Headers with an explicit wait, most precise first. An explicit wait outranks every window.
const WAITS: [(&str, Reader); 3] = [
    // OpenAI and Azure OpenAI.
    ("retry-after-ms", milliseconds),
    ("x-ms-retry-after-ms", milliseconds),
    // RFC 9110 §10.2.3.
    ("retry-after", retry_after),
];

/// Reset and remaining headers of services that report several windows at once.
///
/// The response doesn't say which window the request exceeded, so only a window with nothing remaining counts.
#[rustfmt::skip] // One row per line.
const SEVERAL: [(&str, &str); 8] = [
    // OpenAI, Groq: platform.openai.com/docs/guides/rate-limits.
    ("x-ratelimit-reset-requests", "x-ratelimit-remaining-requests"),
    ("x-ratelimit-reset-tokens", "x-ratelimit-remaining-tokens"),
    // Anthropic: docs.anthropic.com/en/api/rate-limits.
    ("anthropic-ratelimit-requests-reset", "anthropic-ratelimit-requests-remaining"),
    ("anthropic-ratelimit-tokens-reset", "anthropic-ratelimit-tokens-remaining"),
    ("anthropic-ratelimit-input-tokens-reset", "anthropic-ratelimit-input-tokens-remaining"),
    ("anthropic-ratelimit-output-tokens-reset", "anthropic-ratelimit-output-tokens-remaining"),
    // Linear: linear.app/developers/rate-limiting.
    ("x-ratelimit-requests-reset", "x-ratelimit-requests-remaining"),
    ("x-ratelimit-complexity-reset", "x-ratelimit-complexity-remaining"),
];

/// Reset and remaining headers of services with one window.
///
/// A limited request must have exceeded that window, so the window counts unless something remains.
const SINGLE: [(&str, &str); 5] = [
    // GitHub, Vimeo and many others.
    ("x-ratelimit-reset", "x-ratelimit-remaining"),
    // Discord: discord.com/developers/docs/topics/rate-limits.
    ("x-ratelimit-reset-after", "x-ratelimit-remaining"),
    // Akamai: techdocs.akamai.com/adaptive-media-delivery/reference/rate-limiting.
    ("x-ratelimit-next", "x-ratelimit-remaining"),
    // X: docs.x.com/x-api/fundamentals/rate-limits.
    ("x-rate-limit-reset", "x-rate-limit-remaining"),
    // draft-ietf-httpapi-ratelimit-headers-06 and earlier.
    ("ratelimit-reset", "ratelimit-remaining"),
];

/// A rate-limit window as a response describes it.
struct Window {
    /// The time until the window resets.
    wait: Duration,
    /// Whether nothing remains; `None` if the service doesn't say.
    exhausted: Option<bool>,
}

/// Returns the wait that the headers ask for.
///
/// Absolute dates are compared with the response's `Date` header, since the service's clock wins. Without a
/// usable `Date`, they are compared with the local clock.
pub(crate) fn from_headers(headers: &HeaderMap) -> Option<Duration> {
    let now = now(headers);
    explicit_at(headers, now).or_else(|| from_windows(headers, now))
}

/// Returns the wait that the headers name, if they name one.
pub(super) fn explicit(headers: &HeaderMap) -> Option<Duration> {
    explicit_at(headers, now(headers))
}

fn explicit_at(headers: &HeaderMap, now: Duration) -> Option<Duration> {
    WAITS.iter().find_map(|&(name, read)| first(headers, name, |value| read(value, now)))
}

/// The time of the response, counted from the epoch.
pub(super) fn now(headers: &HeaderMap) -> Duration {
    // A local clock before the epoch counts as the epoch: the caller caps the wait.
    first(headers, "date", http_date)
        .unwrap_or_else(|| SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
}

/// Returns the wait of a `google.rpc.RetryInfo` in a JSON error body (AIP-193).
///
/// Gemini's streaming endpoint wraps its error in an array. A truncated or non-JSON body has no hint.
pub(crate) fn from_body(body: &[u8]) -> Option<Duration> {
    let body: Value = serde_json::from_slice(body).ok()?;
    let errors = match &body {
        Value::Array(errors) => errors.as_slice(),
        error => std::slice::from_ref(error),
    };
    errors
        .iter()
        .filter_map(|error| error.pointer("/error/details")?.as_array())
        .flatten()
        .filter_map(retry_info)
        .max()
}

fn retry_info(detail: &Value) -> Option<Duration> {
    let kind = detail.get("@type")?.as_str()?;
    let delay = detail.get("retryDelay")?.as_str()?;
    if kind.ends_with("google.rpc.RetryInfo") { duration(delay.trim()) } else { None }
}

/// Returns the latest reset among the windows of which the headers say that nothing remains.
pub(super) fn from_exhausted_windows(headers: &HeaderMap) -> Option<Duration> {
    let (single, several) = windows(headers, now(headers));
    latest_exhausted(single.iter().chain(&several))
}

/// Returns the latest reset among the exhausted windows.
///
/// If no window says what remains, the latest reset among the `SINGLE` windows counts.
fn from_windows(headers: &HeaderMap, now: Duration) -> Option<Duration> {
    let (single, several) = windows(headers, now);
    let all = || single.iter().chain(&several);
    if all().all(|window| window.exhausted.is_none()) {
        return single.iter().map(|window| window.wait).max();
    }
    latest_exhausted(all())
}

fn latest_exhausted<'a>(windows: impl Iterator<Item = &'a Window>) -> Option<Duration> {
    windows.filter(|window| window.exhausted == Some(true)).map(|window| window.wait).max()
}

/// Returns the `SINGLE` windows, and all others.
fn windows(headers: &HeaderMap, now: Duration) -> (Vec<Window>, Vec<Window>) {
    let read = |&(reset_name, remaining_name): &(&str, &str)| {
        Some(Window {
            wait: first(headers, reset_name, |value| reset(value, now))?,
            exhausted: first(headers, remaining_name, seconds).map(|left| left.is_zero()),
        })
    };
    let single: Vec<Window> = SINGLE.iter().filter_map(read).collect();
    let mut several: Vec<Window> = SEVERAL.iter().filter_map(read).collect();
    several.extend(values(headers, "ratelimit").flat_map(structured));
    (single, several)
}

/// Reads the windows of one `RateLimit` line.
///
/// Each line is parsed alone, so that a malformed line doesn't hide the others.
fn structured(line: &str) -> Vec<Window> {
    // draft-ietf-httpapi-ratelimit-headers-08 and later: a list of `"policy";r=0;t=50`.
    if let Ok(list) = Parser::new(line).parse::<List>() {
        return list
            .iter()
            .filter_map(item)
            .filter_map(|Item { params, .. }| window(params.get("t"), params.get("r")))
            .collect();
    }
    // -07: the dictionary `limit=100, remaining=0, reset=50`.
    let Ok(dictionary) = Parser::new(line).parse::<Dictionary>() else {
        return Vec::new();
    };
    let value = |key| Some(&item(dictionary.get(key)?)?.bare_item);
    window(value("reset"), value("remaining")).into_iter().collect()
}

pub(super) fn item(entry: &ListEntry) -> Option<&Item> {
    match entry {
        ListEntry::Item(item) => Some(item),
        ListEntry::InnerList(_) => None,
    }
}

fn window(reset: Option<&BareItem>, remaining: Option<&BareItem>) -> Option<Window> {
    Some(Window {
        wait: item_seconds(reset?)?,
        exhausted: remaining.and_then(item_seconds).map(|left| left.is_zero()),
    })
}

pub(super) fn item_seconds(item: &BareItem) -> Option<Duration> {
    let number = match item {
        // At most 15 digits, which an f64 holds exactly.
        BareItem::Integer(number) => i64::from(*number) as f64,
        BareItem::Decimal(number) => f64::from(*number),
        _ => return None,
    };
    Duration::try_from_secs_f64(number).ok()
}

/// Returns a header's lines that are UTF-8, trimmed.
pub(super) fn values<'a>(headers: &'a HeaderMap, name: &str) -> impl Iterator<Item = &'a str> {
    headers.get_all(name).iter().filter_map(|value| Some(std::str::from_utf8(value.as_bytes()).ok()?.trim()))
}

/// Returns the first line of a header that `read` accepts.
fn first<T>(headers: &HeaderMap, name: &str, read: impl Fn(&str) -> Option<T>) -> Option<T> {
    values(headers, name).find_map(read)
}

/// Reads a `Retry-After`: seconds or a date as in RFC 9110, and also a fraction, which some services send.
fn retry_after(value: &str, now: Duration) -> Option<Duration> {
    seconds(value).or_else(|| http_date(value)?.checked_sub(now))
}

/// Reads a window's reset in any format that services use: a number, a duration or a date.
pub(super) fn reset(value: &str, now: Duration) -> Option<Duration> {
    number_or_timestamp(value, now)
        .or_else(|| duration(value))
        .or_else(|| http_date(value).or_else(|| rfc3339(value))?.checked_sub(now))
}

/// Reads seconds from now, seconds since the epoch or milliseconds since the epoch, by magnitude.
///
/// As dates, 10⁹ seconds and 10¹² milliseconds both lie in 2001.
fn number_or_timestamp(value: &str, now: Duration) -> Option<Duration> {
    let number = seconds(value)?;
    match number.as_secs() {
        0..1_000_000_000 => Some(number),
        1_000_000_000..1_000_000_000_000 => number.checked_sub(now),
        _ => (number / 1000).checked_sub(now),
    }
}

fn milliseconds(value: &str, _now: Duration) -> Option<Duration> {
    Some(seconds(value)? / 1000)
}

/// Reads `30` and `1.5`, but no sign, exponent, `inf` or `NaN`, which `f64` would accept.
fn seconds(value: &str) -> Option<Duration> {
    if !value.bytes().all(|b| b.is_ascii_digit() || b == b'.') {
        return None;
    }
    // Only a fraction is parsed as a float: large whole numbers would lose digits.
    if let Ok(number) = value.parse() {
        return Some(Duration::from_secs(number));
    }
    Duration::try_from_secs_f64(value.parse().ok()?).ok()
}

/// Reads a duration as Go and protobuf print it: `6m0s`, `120ms`, `0.5s`.
///
/// The check of characters rejects `3 hours ago` and `01:02:03`, which jiff would accept.
fn duration(value: &str) -> Option<Duration> {
    let go = |c: char| c.is_ascii_digit() || ".hmsuµn".contains(c);
    if !value.chars().all(go) {
        return None;
    }
    SpanParser::new().parse_unsigned_duration(value).ok()
}

/// Reads an HTTP date (RFC 9110 §5.6.7, all three formats), counted from the epoch.
pub(super) fn http_date(value: &str) -> Option<Duration> {
    let date = httpdate::parse_http_date(value).ok()?;
    date.duration_since(UNIX_EPOCH).ok()
}

/// Reads an RFC 3339 timestamp, counted from the epoch.
pub(super) fn rfc3339(value: &str) -> Option<Duration> {
    let timestamp: jiff::Timestamp = value.parse().ok()?;
    timestamp.as_duration().try_into().ok()
}
