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
/// usable `Date`, they are compared with `received`, the local time of arrival.
pub(crate) fn from_headers(headers: &HeaderMap, received: SystemTime) -> Option<Duration> {
    // A local clock before the epoch counts as the epoch: the caller caps the wait.
    let now = first(headers, "date", http_date)
        .unwrap_or_else(|| received.duration_since(UNIX_EPOCH).unwrap_or_default());
    WAITS
        .iter()
        .find_map(|&(name, read)| first(headers, name, |value| read(value, now)))
        .or_else(|| from_windows(headers, now))
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

/// Returns the latest reset among the exhausted windows.
///
/// If no window says what remains, the latest reset among the `SINGLE` windows counts.
fn from_windows(headers: &HeaderMap, now: Duration) -> Option<Duration> {
    let read = |&(reset_name, remaining_name): &(&str, &str)| {
        Some(Window {
            wait: first(headers, reset_name, |value| reset(value, now))?,
            exhausted: first(headers, remaining_name, seconds).map(|left| left.is_zero()),
        })
    };
    let single: Vec<Window> = SINGLE.iter().filter_map(read).collect();
    let mut several: Vec<Window> = SEVERAL.iter().filter_map(read).collect();
    several.extend(values(headers, "ratelimit").flat_map(structured));

    let all = || single.iter().chain(&several);
    if all().all(|window| window.exhausted.is_none()) {
        return single.iter().map(|window| window.wait).max();
    }
    all().filter(|window| window.exhausted == Some(true)).map(|window| window.wait).max()
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

fn item(entry: &ListEntry) -> Option<&Item> {
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

fn item_seconds(item: &BareItem) -> Option<Duration> {
    let number = match item {
        // At most 15 digits, which an f64 holds exactly.
        BareItem::Integer(number) => i64::from(*number) as f64,
        BareItem::Decimal(number) => f64::from(*number),
        _ => return None,
    };
    Duration::try_from_secs_f64(number).ok()
}

/// Returns a header's lines that are UTF-8, trimmed.
fn values<'a>(headers: &'a HeaderMap, name: &str) -> impl Iterator<Item = &'a str> {
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
fn reset(value: &str, now: Duration) -> Option<Duration> {
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
fn http_date(value: &str) -> Option<Duration> {
    let date = httpdate::parse_http_date(value).ok()?;
    date.duration_since(UNIX_EPOCH).ok()
}

/// Reads an RFC 3339 timestamp, counted from the epoch.
fn rfc3339(value: &str) -> Option<Duration> {
    let timestamp: jiff::Timestamp = value.parse().ok()?;
    timestamp.as_duration().try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::{HeaderName, HeaderValue};
    use proptest::{collection::vec, prelude::*, sample::select};

    /// 2026-11-23T20:40:02Z, a minute before the dates of the tests below.
    const RECEIVED: u64 = 1_795_466_402;

    const MINUTE: Option<Duration> = secs(60);

    const fn secs(seconds: u64) -> Option<Duration> {
        Some(Duration::from_secs(seconds))
    }

    const fn millis(milliseconds: u64) -> Option<Duration> {
        Some(Duration::from_millis(milliseconds))
    }

    fn hint<V: AsRef<[u8]>>(lines: &[(&'static str, V)]) -> Option<Duration> {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            let value = HeaderValue::from_bytes(value.as_ref()).unwrap();
            headers.append(HeaderName::from_bytes(name.as_bytes()).unwrap(), value);
        }
        from_headers(&headers, UNIX_EPOCH + Duration::from_secs(RECEIVED))
    }

    macro_rules! headers {
        ($($name:ident: $($header:literal: $value:literal),* => $hint:expr;)*) => {$(
            #[test]
            fn $name() {
                assert_eq!(hint::<&str>(&[$(($header, $value)),*]), $hint);
            }
        )*};
    }

    macro_rules! bodies {
        ($($name:ident: $body:expr => $hint:expr;)*) => {$(
            #[test]
            fn $name() {
                assert_eq!(from_body($body.as_ref()), $hint);
            }
        )*};
    }

    // Retry-After, RFC 9110 §10.2.3.
    headers! {
        no_headers_are_no_hint: => None;
        retry_after_is_in_seconds: "Retry-After": "30" => secs(30);
        retry_after_takes_a_fraction: "retry-after": "1.5" => millis(1500);
        retry_after_takes_an_imf_date: "retry-after": "Mon, 23 Nov 2026 20:41:02 GMT" => MINUTE;
        retry_after_takes_an_rfc_850_date: "retry-after": "Monday, 23-Nov-26 20:41:02 GMT" => MINUTE;
        retry_after_takes_an_asctime_date: "retry-after": "Mon Nov 23 20:41:02 2026" => MINUTE;
        retry_after_may_be_padded: "retry-after": " \t30 " => secs(30);
        retry_after_of_zero_is_a_wait_of_zero: "retry-after": "0" => secs(0);
        retry_after_of_this_moment_is_a_wait_of_zero: "retry-after": "Mon, 23 Nov 2026 20:40:02 GMT" => secs(0);
        retry_after_in_the_past_is_no_hint: "retry-after": "Mon, 23 Nov 2026 20:40:01 GMT" => None;
        retry_after_with_text_is_no_hint: "retry-after": "3 hours ago" => None;
        retry_after_without_a_value_is_no_hint: "retry-after": "" => None;
        retry_after_with_only_a_decimal_point_is_no_hint: "retry-after": "." => None;
        retry_after_below_zero_is_no_hint: "retry-after": "-30" => None;
        retry_after_with_a_plus_is_no_hint: "retry-after": "+30" => None;
        retry_after_with_an_exponent_is_no_hint: "retry-after": "1e3" => None;
        retry_after_of_nan_is_no_hint: "retry-after": "NaN" => None;
        retry_after_of_infinity_is_no_hint: "retry-after": "inf" => None;
        a_huge_retry_after_is_not_capped_here: "retry-after": "18446744073709551615" => secs(u64::MAX);
        retry_after_that_overflows_is_no_hint: "retry-after": "18446744073709551616" => None;
        the_first_usable_of_several_lines_counts: "retry-after": "soon", "retry-after": "30", "retry-after": "40" => secs(30);
    }

    // retry-after-ms, OpenAI and Azure OpenAI.
    headers! {
        retry_after_ms_is_in_milliseconds: "retry-after-ms": "1250" => millis(1250);
        x_ms_retry_after_ms_is_in_milliseconds: "x-ms-retry-after-ms": "1250" => millis(1250);
        retry_after_ms_takes_a_fraction: "retry-after-ms": "0.5" => Some(Duration::from_micros(500));
        retry_after_ms_of_zero_is_a_wait_of_zero: "retry-after-ms": "0" => secs(0);
        retry_after_ms_outranks_x_ms_retry_after_ms: "x-ms-retry-after-ms": "2", "retry-after-ms": "1" => millis(1);
        x_ms_retry_after_ms_outranks_retry_after: "retry-after": "2", "x-ms-retry-after-ms": "1250" => millis(1250);
        a_malformed_retry_after_ms_does_not_hide_retry_after: "retry-after-ms": "-1", "retry-after": "2" => secs(2);
        a_malformed_retry_after_does_not_hide_a_window: "retry-after": "soon", "ratelimit-reset": "50" => secs(50);
        retry_after_outranks_a_later_window: "retry-after": "2", "ratelimit-remaining": "0", "ratelimit-reset": "50" => secs(2);
        retry_after_of_zero_outranks_a_window: "retry-after": "0", "ratelimit-remaining": "0", "ratelimit-reset": "50" => secs(0);
    }

    // The service's own clock.
    headers! {
        a_date_counts_from_the_services_clock: "date": "Mon, 23 Nov 2026 20:41:00 GMT", "retry-after": "Mon, 23 Nov 2026 20:41:02 GMT" => secs(2);
        unix_seconds_count_from_the_services_clock: "date": "Mon, 23 Nov 2026 20:41:00 GMT", "x-ratelimit-reset": "1795466462" => secs(2);
        a_malformed_date_leaves_the_local_clock: "date": "today", "x-ratelimit-reset": "1795466462" => MINUTE;
        seconds_from_now_need_no_clock: "date": "Mon, 23 Nov 2026 20:41:00 GMT", "x-ratelimit-reset": "60" => MINUTE;
    }

    // x-ratelimit-reset-…, OpenAI and Groq.
    headers! {
        openai_seconds: "x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1s" => secs(1);
        openai_minutes: "x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "6m0s" => secs(360);
        openai_milliseconds: "x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "120ms" => millis(120);
        openai_hours: "x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1h2m3s" => secs(3723);
        openai_seconds_with_a_fraction: "x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "8.64s" => millis(8640);
        openai_minutes_with_a_fraction: "x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "2m59.56s" => millis(179_560);
        openai_microseconds: "x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "7µs" => Some(Duration::from_micros(7));
        openai_plain_number: "x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "7" => secs(7);
        only_the_exhausted_dimension_counts: "x-ratelimit-remaining-requests": "5", "x-ratelimit-reset-requests": "6m0s", "x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "1s" => secs(1);
        of_two_exhausted_dimensions_the_later_counts: "x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "6m0s", "x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "1s" => secs(360);
        no_exhausted_dimension_is_no_hint: "x-ratelimit-remaining-requests": "5", "x-ratelimit-reset-requests": "6m0s" => None;
        dimensions_without_remaining_are_no_hint: "x-ratelimit-reset-requests": "6m0s", "x-ratelimit-reset-tokens": "1s" => None;
        a_remaining_of_zero_may_be_a_decimal: "x-ratelimit-remaining-tokens": "0.0", "x-ratelimit-reset-tokens": "1s" => secs(1);
        a_remaining_below_zero_is_ignored: "x-ratelimit-remaining-tokens": "-1", "x-ratelimit-reset-tokens": "1s" => None;
        a_malformed_dimension_does_not_hide_the_other: "x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "soon", "x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "1s" => secs(1);
    }

    #[test]
    fn only_durations_in_gos_format_are_read() {
        for text in
            ["", "s", "1.5", "3 hours ago", "1h 2m", "3hrs", "1d", "PT1S", "-1s", "01:02:03", "1s ago", "1S"]
        {
            assert_eq!(duration(text), None, "{text:?}");
        }
    }

    // anthropic-ratelimit-…
    headers! {
        anthropic_requests: "anthropic-ratelimit-requests-remaining": "0", "anthropic-ratelimit-requests-reset": "2026-11-23T20:41:02Z" => MINUTE;
        anthropic_tokens: "anthropic-ratelimit-tokens-remaining": "0", "anthropic-ratelimit-tokens-reset": "2026-11-23T20:41:02Z" => MINUTE;
        anthropic_input_tokens: "anthropic-ratelimit-input-tokens-remaining": "0", "anthropic-ratelimit-input-tokens-reset": "2026-11-23T20:41:02Z" => MINUTE;
        anthropic_output_tokens: "anthropic-ratelimit-output-tokens-remaining": "0", "anthropic-ratelimit-output-tokens-reset": "2026-11-23T20:41:02Z" => MINUTE;
        anthropic_with_an_offset: "anthropic-ratelimit-tokens-remaining": "0", "anthropic-ratelimit-tokens-reset": "2026-11-23T21:41:02.5+01:00" => millis(60_500);
        anthropic_in_the_past: "anthropic-ratelimit-tokens-remaining": "0", "anthropic-ratelimit-tokens-reset": "2026-11-23T20:40:01Z" => None;
        anthropic_before_the_epoch: "anthropic-ratelimit-tokens-remaining": "0", "anthropic-ratelimit-tokens-reset": "-009999-01-02T00:00:00Z" => None;
        anthropic_with_tokens_left: "anthropic-ratelimit-tokens-remaining": "9", "anthropic-ratelimit-tokens-reset": "2026-11-23T20:41:02Z" => None;
        anthropic_without_remaining: "anthropic-ratelimit-tokens-reset": "2026-11-23T20:41:02Z" => None;
    }

    // Linear.
    headers! {
        linear_requests: "x-ratelimit-requests-remaining": "0", "x-ratelimit-requests-reset": "1795466462000" => MINUTE;
        linear_complexity: "x-ratelimit-complexity-remaining": "0", "x-ratelimit-complexity-reset": "1795466462000" => MINUTE;
    }

    // x-ratelimit-reset and similar headers.
    headers! {
        x_ratelimit_reset_in_unix_seconds: "x-ratelimit-reset": "1795466462" => MINUTE;
        x_ratelimit_reset_in_unix_seconds_with_a_fraction: "x-ratelimit-reset": "1795466462.5" => millis(60_500);
        x_ratelimit_reset_in_unix_milliseconds: "x-ratelimit-reset": "1795466462500" => millis(60_500);
        x_ratelimit_reset_in_seconds_from_now: "x-ratelimit-reset": "60" => MINUTE;
        x_ratelimit_reset_as_a_duration: "x-ratelimit-reset": "1m0s" => MINUTE;
        x_ratelimit_reset_as_an_http_date: "x-ratelimit-reset": "Mon, 23 Nov 2026 20:41:02 GMT" => MINUTE;
        x_ratelimit_reset_just_too_small_to_be_a_date: "x-ratelimit-reset": "999999999" => secs(999_999_999);
        x_ratelimit_reset_just_large_enough_to_be_a_date: "x-ratelimit-reset": "1000000000" => None;
        x_ratelimit_reset_in_the_past_is_no_hint: "x-ratelimit-reset": "1795466401" => None;
        x_ratelimit_reset_that_overflows_is_no_hint: "x-ratelimit-reset": "99999999999999999999" => None;
        x_ratelimit_reset_with_nothing_remaining: "x-ratelimit-remaining": "0", "x-ratelimit-reset": "60" => MINUTE;
        x_ratelimit_reset_with_something_remaining_is_no_hint: "x-ratelimit-remaining": "1", "x-ratelimit-reset": "60" => None;
        x_ratelimit_reset_with_a_malformed_remaining: "x-ratelimit-remaining": "few", "x-ratelimit-reset": "60" => MINUTE;
        x_rate_limit_reset_in_unix_seconds: "x-rate-limit-remaining": "0", "x-rate-limit-reset": "1795466462" => MINUTE;
        x_rate_limit_reset_without_remaining: "x-rate-limit-reset": "1795466462" => MINUTE;
        x_rate_limit_reset_with_something_remaining: "x-rate-limit-remaining": "1", "x-rate-limit-reset": "1795466462" => None;
        x_ratelimit_reset_after: "x-ratelimit-reset-after": "64.57" => millis(64_570);
        x_ratelimit_reset_after_with_something_remaining: "x-ratelimit-remaining": "1", "x-ratelimit-reset-after": "64.57" => None;
        x_ratelimit_next: "x-ratelimit-remaining": "0", "x-ratelimit-next": "2026-11-23T20:41:02Z" => MINUTE;
        ratelimit_reset: "RateLimit-Reset": "50" => secs(50);
        ratelimit_reset_with_something_remaining: "ratelimit-remaining": "1", "ratelimit-reset": "50" => None;
        ratelimit_reset_in_unix_seconds: "ratelimit-remaining": "0", "ratelimit-reset": "1795466462" => MINUTE;
        of_two_exhausted_single_windows_the_later_counts: "x-ratelimit-remaining": "0", "x-ratelimit-reset": "60", "ratelimit-remaining": "0", "ratelimit-reset": "50" => MINUTE;
        a_single_window_without_remaining_yields_to_one_with_it: "x-ratelimit-reset": "60", "ratelimit-remaining": "0", "ratelimit-reset": "50" => secs(50);
        a_single_window_without_remaining_yields_to_a_family: "x-ratelimit-reset": "60", "x-ratelimit-remaining-tokens": "5", "x-ratelimit-reset-tokens": "1s" => None;
        a_family_without_remaining_does_not_hide_a_single_window: "x-ratelimit-reset": "60", "x-ratelimit-reset-tokens": "6m0s" => MINUTE;
        a_window_with_a_malformed_reset_is_ignored: "x-ratelimit-reset": "60", "ratelimit-remaining": "0", "ratelimit-reset": "soon" => MINUTE;
    }

    // RateLimit, draft-ietf-httpapi-ratelimit-headers.
    headers! {
        ratelimit: "RateLimit": r#""default";r=0;t=50"# => secs(50);
        ratelimit_with_a_token: "ratelimit": "default;r=0;t=50" => secs(50);
        ratelimit_with_a_decimal: "ratelimit": r#""default";r=0;t=0.5"# => millis(500);
        ratelimit_with_a_partition_key: "ratelimit": r#""default";r=0;t=50;pk=:QUJD:"# => secs(50);
        ratelimit_with_something_remaining: "ratelimit": r#""default";r=1;t=50"# => None;
        ratelimit_without_remaining: "ratelimit": r#""default";t=50"# => None;
        ratelimit_without_reset: "ratelimit": r#""default";r=0"# => None;
        ratelimit_below_zero: "ratelimit": r#""default";r=0;t=-1"# => None;
        ratelimit_that_overflows: "ratelimit": r#""default";r=0;t=9999999999999999"# => None;
        ratelimit_with_two_exhausted_windows: "ratelimit": r#""burst";r=0;t=5, "day";r=0;t=50"# => secs(50);
        ratelimit_with_one_exhausted_window: "ratelimit": r#""burst";r=0;t=5, "day";r=9;t=50"# => secs(5);
        ratelimit_on_two_lines: "ratelimit": r#""burst";r=0;t=5"#, "ratelimit": r#""day";r=0;t=50"# => secs(50);
        a_malformed_ratelimit_line_does_not_hide_another: "ratelimit": "\"", "ratelimit": r#""day";r=0;t=50"# => secs(50);
        ratelimit_as_a_dictionary: "ratelimit": "limit=100, remaining=0, reset=50" => secs(50);
        ratelimit_as_a_dictionary_with_something_remaining: "ratelimit": "limit=100, remaining=1, reset=50" => None;
        ratelimit_as_a_dictionary_without_remaining: "ratelimit": "limit=100, reset=50" => None;
        ratelimit_with_inner_lists: "ratelimit": "(a b);r=0;t=50" => None;
    }

    fn error(retry_delay: &str) -> String {
        format!(
            r#"{{"error":{{"code":429,"details":[
                {{"@type":"type.googleapis.com/google.rpc.QuotaFailure"}},
                {{"@type":"type.googleapis.com/google.rpc.RetryInfo","retryDelay":{retry_delay}}}
            ]}}}}"#
        )
    }

    // google.rpc.RetryInfo, AIP-193.
    bodies! {
        retry_info_in_seconds: error(r#""34s""#) => secs(34);
        retry_info_with_a_fraction: error(r#""0.5s""#) => millis(500);
        retry_info_with_nanoseconds: error(r#""34.074824224s""#) => Some(Duration::new(34, 74_824_224));
        retry_info_of_zero: error(r#""0s""#) => secs(0);
        retry_info_in_an_array: format!("[{}]", error(r#""34s""#)) => secs(34);
        the_longest_of_several_retry_infos_counts: format!("[{},{}]", error(r#""34s""#), error(r#""35s""#)) => secs(35);
        a_malformed_retry_info_does_not_hide_another: format!("[1,{},{}]", error("1"), error(r#""35s""#)) => secs(35);
        retry_info_below_zero_is_no_hint: error(r#""-1s""#) => None;
        retry_info_with_text_is_no_hint: error(r#""soon""#) => None;
        retry_info_that_overflows_is_no_hint: error(r#""99999999999999999999s""#) => None;
        a_delay_of_another_type_is_no_hint: r#"{"error":{"details":[{"@type":"google.rpc.ErrorInfo","retryDelay":"1s"}]}}"# => None;
        a_body_without_details_is_no_hint: r#"{"error":{"message":"slow down"}}"# => None;
        a_truncated_body_is_no_hint: error(r#""34s""#).trim_end_matches('}') => None;
        a_body_of_text_is_no_hint: "slow down" => None;
        an_empty_body_is_no_hint: "" => None;
        a_deeply_nested_body_is_no_hint: "[".repeat(100_000) => None;
    }

    #[test]
    fn a_clock_before_the_epoch_counts_as_epoch() {
        let headers = HeaderMap::from_iter([(
            http::header::RETRY_AFTER,
            "Thu, 01 Jan 1970 00:00:07 GMT".parse().unwrap(),
        )]);
        assert_eq!(from_headers(&headers, UNIX_EPOCH - Duration::from_secs(1)), secs(7));
    }

    /// The name of any header that this module reads.
    fn name() -> impl Strategy<Value = &'static str> {
        let rows = SEVERAL.iter().chain(&SINGLE).flat_map(|row| [row.0, row.1]);
        let names = WAITS.iter().map(|wait| wait.0).chain(rows);
        select(names.chain(["date", "ratelimit"]).collect::<Vec<_>>())
    }

    /// Header values: random bytes, or text that gets further into the parsers.
    fn value() -> impl Strategy<Value = Vec<u8>> {
        let visible = prop_oneof![Just(b'\t'), 0x20..0x7f_u8, 0x80..=0xff_u8];
        prop_oneof![
            vec(visible, 0..40),
            "-?[0-9]{0,40}[.]?[0-9]{0,40}".prop_map(String::into_bytes),
            "([0-9]{1,20}[.]?[0-9]{0,12}(h|m|s|ms|us|µs|ns)){1,4}".prop_map(String::into_bytes),
            "[+-]?[0-9]{4,6}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(Z|[+-][0-9]{2}:[0-9]{2})"
                .prop_map(String::into_bytes),
            "Mon, [0-9]{2} (Jan|Feb|Nov) [0-9]{4} [0-9]{2}:[0-9]{2}:[0-9]{2} GMT"
                .prop_map(String::into_bytes),
            "a;r=0;t=-?[0-9]{1,17}[.]?[0-9]{0,4}".prop_map(String::into_bytes),
            Just(b"0".to_vec()),
        ]
    }

    proptest! {
        #[test]
        fn f28_no_headers_panic(lines in vec((name(), value()), 0..6)) {
            hint(&lines);
        }

        #[test]
        fn f28_no_body_panics(body in vec(any::<u8>(), 0..200)) {
            from_body(&body);
        }

        #[test]
        fn f28_no_retry_info_panics(delay in any::<String>(), number in "[0-9]{1,25}[.]?[0-9]{0,12}s") {
            from_body(error(&Value::from(delay).to_string()).as_bytes());
            from_body(error(&Value::from(number).to_string()).as_bytes());
        }
    }
}
