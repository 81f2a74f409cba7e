//! What a classifier makes of a response: the wait that its headers or body ask for, and the verdict on its key.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header::RETRY_AFTER};
use proptest::{collection::vec, prelude::*, sample::select};
use tower_key_rotation::classify::{
    ClassifyResponse, Generic, Groq, LlmGateway, ResponseHead, TooManyRequests, Verdict,
};

// ---- hints ----

/// The `Date` of a response that names none: a minute before the dates of the tests below.
const RECEIVED: &str = "Mon, 23 Nov 2026 20:40:02 GMT";

const MINUTE: Option<Duration> = secs(60);

const fn secs(seconds: u64) -> Option<Duration> {
    Some(Duration::from_secs(seconds))
}

const fn millis(milliseconds: u64) -> Option<Duration> {
    Some(Duration::from_millis(milliseconds))
}

fn wait(headers: &HeaderMap) -> Option<Duration> {
    ResponseHead::new(StatusCode::TOO_MANY_REQUESTS, headers).wait()
}

fn hint<V: AsRef<[u8]>>(lines: &[(&'static str, V)]) -> Option<Duration> {
    let mut headers = HeaderMap::new();
    for (name, value) in lines {
        let value = HeaderValue::from_bytes(value.as_ref()).unwrap();
        headers.append(HeaderName::from_bytes(name.as_bytes()).unwrap(), value);
    }
    headers.entry("date").or_insert(HeaderValue::from_static(RECEIVED));
    wait(&headers)
}

fn from_body(body: &[u8]) -> Option<Duration> {
    ResponseHead::new(StatusCode::TOO_MANY_REQUESTS, &HeaderMap::new()).with_body(body).wait()
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
fn only_durations_in_gos_format_are_read() {
    for text in
        ["", "s", "1.5", "3 hours ago", "1h 2m", "3hrs", "1d", "PT1S", "-1s", "01:02:03", "1s ago", "1S"]
    {
        assert_eq!(from_body(error(&format!("{text:?}")).as_bytes()), None, "{text:?}");
    }
}

#[test]
fn dates_without_a_usable_date_header_count_locally() {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let reset = HeaderValue::from(now + 3_600);
    for date in [None, Some("today")] {
        let mut headers =
            HeaderMap::from_iter([(HeaderName::from_static("x-ratelimit-reset"), reset.clone())]);
        headers.extend(date.map(|date| (http::header::DATE, HeaderValue::from_static(date))));
        let wait = wait(&headers).unwrap();
        assert!((secs(3_000).unwrap()..=secs(3_600).unwrap()).contains(&wait), "{wait:?}");
    }
}

/// The names of all headers that hints are read from.
const NAMES: [&str; 29] = [
    "retry-after-ms",
    "x-ms-retry-after-ms",
    "retry-after",
    "x-ratelimit-reset-requests",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-reset-tokens",
    "x-ratelimit-remaining-tokens",
    "anthropic-ratelimit-requests-reset",
    "anthropic-ratelimit-requests-remaining",
    "anthropic-ratelimit-tokens-reset",
    "anthropic-ratelimit-tokens-remaining",
    "anthropic-ratelimit-input-tokens-reset",
    "anthropic-ratelimit-input-tokens-remaining",
    "anthropic-ratelimit-output-tokens-reset",
    "anthropic-ratelimit-output-tokens-remaining",
    "x-ratelimit-requests-reset",
    "x-ratelimit-requests-remaining",
    "x-ratelimit-complexity-reset",
    "x-ratelimit-complexity-remaining",
    "x-ratelimit-reset",
    "x-ratelimit-remaining",
    "x-ratelimit-reset-after",
    "x-ratelimit-next",
    "x-rate-limit-reset",
    "x-rate-limit-remaining",
    "ratelimit-reset",
    "ratelimit-remaining",
    "date",
    "ratelimit",
];

/// Header values: random bytes, or text that gets further into the parsers.
fn value() -> impl Strategy<Value = Vec<u8>> {
    let visible = prop_oneof![Just(b'\t'), 0x20..0x7f_u8, 0x80..=0xff_u8];
    prop_oneof![
        vec(visible, 0..40),
        "-?[0-9]{0,40}[.]?[0-9]{0,40}".prop_map(String::into_bytes),
        "([0-9]{1,20}[.]?[0-9]{0,12}(h|m|s|ms|us|µs|ns)){1,4}".prop_map(String::into_bytes),
        "[+-]?[0-9]{4,6}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(Z|[+-][0-9]{2}:[0-9]{2})"
            .prop_map(String::into_bytes),
        "Mon, [0-9]{2} (Jan|Feb|Nov) [0-9]{4} [0-9]{2}:[0-9]{2}:[0-9]{2} GMT".prop_map(String::into_bytes),
        "a;r=0;t=-?[0-9]{1,17}[.]?[0-9]{0,4}".prop_map(String::into_bytes),
        Just(b"0".to_vec()),
    ]
}

proptest! {
    #[test]
    fn f28_no_headers_panic(lines in vec((select(NAMES.to_vec()), value()), 0..6)) {
        hint(&lines);
    }

    #[test]
    fn f28_no_body_panics(body in vec(any::<u8>(), 0..200)) {
        from_body(&body);
    }

    #[test]
    fn f28_no_retry_info_panics(delay in any::<String>(), number in "[0-9]{1,25}[.]?[0-9]{0,12}s") {
        from_body(error(&serde_json::Value::from(delay).to_string()).as_bytes());
        from_body(error(&serde_json::Value::from(number).to_string()).as_bytes());
    }
}

// ---- the default classifier ----

fn classify(classifier: &TooManyRequests, status: u16, retry_after: Option<&'static str>) -> Verdict {
    with_head(status, retry_after, |head| classifier.classify(head))
}

fn with_head<T>(status: u16, retry_after: Option<&'static str>, look: impl Fn(&ResponseHead<'_>) -> T) -> T {
    let mut headers = HeaderMap::new();
    headers.extend(retry_after.map(|value| (RETRY_AFTER, HeaderValue::from_static(value))));
    look(&ResponseHead::new(StatusCode::from_u16(status).unwrap(), &headers))
}

#[test]
fn a_429_rate_limits_with_the_services_hint() {
    let classifier = TooManyRequests::new();
    assert_eq!(classify(&classifier, 429, None), Verdict::RateLimited { wait: None });
    let wait = Some(Duration::from_secs(30));
    assert_eq!(classify(&classifier, 429, Some("30")), Verdict::RateLimited { wait });
}

#[test]
fn every_other_status_is_ignored() {
    for status in [200, 301, 401, 402, 403, 500, 503] {
        assert_eq!(classify(&TooManyRequests::new(), status, Some("30")), Verdict::Nothing, "{status}");
    }
}

#[test]
fn an_added_status_counts_only_with_a_hint() {
    let classifier = TooManyRequests::new().or_with_a_hint([StatusCode::FORBIDDEN]);
    assert_eq!(classify(&classifier, 403, None), Verdict::Nothing);
    let wait = Some(Duration::from_secs(30));
    assert_eq!(classify(&classifier, 403, Some("30")), Verdict::RateLimited { wait });
}

#[test]
fn only_a_missing_hint_wants_a_body() {
    let classifier = TooManyRequests::new().or_with_a_hint([StatusCode::FORBIDDEN]);
    let wants_body = |status, retry_after| with_head(status, retry_after, |head| classifier.wants_body(head));
    assert!(wants_body(429, None) && wants_body(403, None));
    assert!(!wants_body(429, Some("30")) && !wants_body(403, Some("30")));
    assert!(!wants_body(500, None) && !wants_body(500, Some("30")));
}

// ---- services ----

#[test]
fn only_statuses_that_rules_know_want_a_body() {
    let wanted = |classifier: &dyn ClassifyResponse| -> Vec<u16> {
        let headers = HeaderMap::new();
        let head = |status: &u16| ResponseHead::new(StatusCode::from_u16(*status).unwrap(), &headers);
        (400..600).filter(|status| classifier.wants_body(&head(status))).collect()
    };
    assert_eq!(wanted(&Generic), [401, 402, 403, 429]);
    assert_eq!(wanted(&Groq), [400, 401, 402, 403, 429, 498]);
    assert_eq!(wanted(&LlmGateway::new()), [400, 401, 402, 403, 429, 498, 503, 529]);
}
