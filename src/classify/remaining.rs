//! The remainder of a service's budgets, as the headers of a response report it.
//!
//! Pure: headers in, budgets out. The pool may call this for every response, so one pass over the headers finds all
//! lines: a lookup for each name costs more. Only the structured fields of the IETF drafts allocate.

use std::{
    cell::LazyCell,
    hash::{DefaultHasher, Hasher},
    time::Duration,
};

use http::{HeaderMap, HeaderValue, header::DATE};
use sfv::{BareItem, Dictionary, Item, List, Parser};

use super::{
    formats::{decimal, duration, http_date, rfc3339},
    hint,
};
use crate::limit::{Kind, Left, Remaining};

/// The longest name of an organisation, in bytes. Those in use have less than 40.
const LONGEST_NAME: usize = 128;

const SECOND: Duration = Duration::from_secs(1);
const MILLISECOND: Duration = Duration::from_millis(1);

/// Returns the state of the budgets of requests and tokens.
///
/// A budget needs a limit, a remainder and a reset. If one of them is missing or malformed, or the remainder exceeds
/// the limit, the budget is `None`. If several families report a budget, the first in the order of this function
/// counts.
///
/// A reset that is a date is compared with the response's `Date`. Without a usable `Date` the reset is ignored: the
/// local clock may differ from the service's clock by more than the reset.
pub(crate) fn remaining(headers: &HeaderMap) -> Remaining {
    let Some(found) = Found::new(headers) else { return Remaining::default() };
    let date = LazyCell::new(|| http_date(headers.get(DATE)?.as_bytes()));
    let read = |lines: Lines<'_>, kind| lines.read(&|| *date, kind);
    let bucket = |lines| read(lines, Some(Kind::Bucket));
    let discord = Lines { reset: found.reset_after, ..found.x_ratelimit };
    Remaining {
        requests: bucket(found.requests)
            .or_else(|| bucket(found.anthropic_requests))
            .or_else(|| read(discord, Some(Kind::Window)))
            .or_else(|| read(found.x_ratelimit, None))
            .or_else(|| read(found.x_rate_limit, None))
            .or_else(|| read(found.ratelimit, Some(Kind::Window)))
            .or_else(|| found.structured.and_then(|_| structured(headers))),
        tokens: bucket(found.tokens)
            .or_else(|| found.anthropic_tokens.into_iter().filter_map(bucket).reduce(scarcer)),
        organisation: found.organisation.map_or(0, hashed),
    }
}

/// A hash of a name; 0 if there is none, or an impossible one.
fn hashed(name: &HeaderValue) -> u64 {
    let name = name.as_bytes();
    if name.is_empty() || name.len() > LONGEST_NAME {
        return 0;
    }
    let mut hasher = DefaultHasher::new();
    hasher.write(name);
    hasher.finish().max(1)
}

/// The lines of one budget.
#[derive(Clone, Copy, Default)]
struct Lines<'a> {
    limit: Option<&'a HeaderValue>,
    remaining: Option<&'a HeaderValue>,
    reset: Option<&'a HeaderValue>,
}

/// The lines of all families. If a response repeats a header, the first line counts.
#[derive(Default)]
struct Found<'a> {
    /// OpenAI, Azure OpenAI, Groq: platform.openai.com/docs/guides/rate-limits.
    requests: Lines<'a>,
    tokens: Lines<'a>,
    /// Anthropic: docs.anthropic.com/en/api/rate-limits.
    anthropic_requests: Lines<'a>,
    /// All tokens, input tokens, output tokens.
    anthropic_tokens: [Lines<'a>; 3],
    /// GitHub and many others: docs.github.com/en/rest/using-the-rest-api/rate-limits-for-the-rest-api.
    x_ratelimit: Lines<'a>,
    /// Discord's more precise reset of `x_ratelimit`: discord.com/developers/docs/topics/rate-limits.
    reset_after: Option<&'a HeaderValue>,
    /// X: docs.x.com/x-api/fundamentals/rate-limits.
    x_rate_limit: Lines<'a>,
    /// draft-ietf-httpapi-ratelimit-headers-06 and earlier.
    ratelimit: Lines<'a>,
    /// `RateLimit` of draft-ietf-httpapi-ratelimit-headers-07 and later.
    structured: Option<&'a HeaderValue>,
    /// Anthropic and OpenAI name the organisation whose budgets these are.
    organisation: Option<&'a HeaderValue>,
}

impl<'a> Found<'a> {
    /// Collects the lines; `None` if there are none.
    fn new(headers: &'a HeaderMap) -> Option<Self> {
        let mut found = None;
        for (name, value) in headers {
            let name = name.as_str();
            // Most names end here, which is cheaper than `line`.
            if matches!(
                name.as_bytes(),
                [b'x', b'-', b'r', ..] | [b'a', b'n', ..] | [b'r', b'a', ..] | [b'o', b'p', ..]
            ) && let Some(line) = found.get_or_insert_with(Self::default).line(name)
            {
                line.get_or_insert(value);
            }
        }
        found
    }

    /// Returns the place of the line with this name. Compares parts of the name: to compare it with each known name in turn
    /// would take longer than all the rest.
    fn line(&mut self, name: &str) -> Option<&mut Option<&'a HeaderValue>> {
        let (lines, field) = if let Some(rest) = name.strip_prefix("x-ratelimit-") {
            if let Some(field) = rest.strip_suffix("-requests") {
                (&mut self.requests, field)
            } else if let Some(field) = rest.strip_suffix("-tokens") {
                (&mut self.tokens, field)
            } else if rest == "reset-after" {
                return Some(&mut self.reset_after);
            } else {
                (&mut self.x_ratelimit, rest)
            }
        } else if let Some(rest) = name.strip_prefix("anthropic-ratelimit-") {
            if let Some(field) = rest.strip_prefix("requests-") {
                (&mut self.anthropic_requests, field)
            } else if let Some(field) = rest.strip_prefix("tokens-") {
                (&mut self.anthropic_tokens[0], field)
            } else if let Some(field) = rest.strip_prefix("input-tokens-") {
                (&mut self.anthropic_tokens[1], field)
            } else {
                (&mut self.anthropic_tokens[2], rest.strip_prefix("output-tokens-")?)
            }
        } else if let Some(field) = name.strip_prefix("x-rate-limit-") {
            (&mut self.x_rate_limit, field)
        } else if let Some(field) = name.strip_prefix("ratelimit-") {
            (&mut self.ratelimit, field)
        } else {
            return match name {
                "ratelimit" => Some(&mut self.structured),
                "anthropic-organization-id" | "openai-organization" => Some(&mut self.organisation),
                _ => None,
            };
        };
        match field {
            "limit" => Some(&mut lines.limit),
            "remaining" => Some(&mut lines.remaining),
            "reset" => Some(&mut lines.reset),
            _ => None,
        }
    }
}

impl Lines<'_> {
    /// Reads the budget. If its `kind` is unknown and the reset is a date, the budget is a window.
    fn read(self, date: &dyn Fn() -> Option<Duration>, kind: Option<Kind>) -> Option<Left> {
        // The earliest drafts append the policies to the limit: `10, 10;w=1, 50;w=60`.
        let (limit, b"" | [b',', ..]) = decimal(self.limit?.as_bytes())? else { return None };
        let (remaining, b"") = decimal(self.remaining?.as_bytes())? else { return None };
        left(limit, remaining, Reset::read(self.reset?.as_bytes(), date)?, kind)
    }
}

struct Reset {
    wait: Duration,
    resolution: Duration,
    is_date: bool,
}

impl Reset {
    /// Reads `30`, `64.57`, seconds or milliseconds since the epoch, `6m0s`, or an RFC 3339 timestamp.
    fn read(text: &[u8], date: &dyn Fn() -> Option<Duration>) -> Option<Self> {
        let after = |wait, resolution| Some(Self { wait, resolution, is_date: false });
        let (number, rest) = decimal(text)?;
        match (number.as_secs(), rest) {
            // By magnitude, as in `hint`: 10⁹ seconds and 10¹² milliseconds both lie in 2001.
            (0..1_000_000_000, b"") => after(number, if text.contains(&b'.') { MILLISECOND } else { SECOND }),
            (1_000_000_000..1_000_000_000_000, b"") => Self::at(number, date()?),
            (_, b"") => Self::at(number / 1000, date()?),
            (_, [b'-', ..]) => Self::at(rfc3339(text)?, date()?),
            _ => after(duration(text)?, MILLISECOND),
        }
    }

    /// Returns the reset at a date. `Date` has whole seconds, so a more precise reset gains nothing.
    fn at(reset: Duration, date: Duration) -> Option<Self> {
        // By rounding, a reset that is due may seem a second late. An older one is stale.
        let wait = reset.saturating_add(SECOND).checked_sub(date)?.saturating_sub(SECOND);
        Some(Self { wait, resolution: SECOND, is_date: true })
    }
}

/// Returns the budget if its numbers make sense. As in `hint`, a number is a duration in seconds.
fn left(limit: Duration, remaining: Duration, reset: Reset, kind: Option<Kind>) -> Option<Left> {
    let Reset { wait, resolution, is_date } = reset;
    let kind = kind.or(is_date.then_some(Kind::Window));
    let (limit, remaining) = (limit.as_secs_f64(), remaining.as_secs_f64());
    Some(Left { limit, remaining, reset: wait, resolution, kind }).filter(Left::is_possible)
}

/// Returns the budget with the smaller part remaining; the first if they are equal.
fn scarcer(first: Left, second: Left) -> Left {
    if second.remaining * first.limit < first.remaining * second.limit { second } else { first }
}

/// Reads `RateLimit`. Of several policies, the scarcest counts.
fn structured(headers: &HeaderMap) -> Option<Left> {
    // Draft 8 and later: `"default";r=50;t=30`, with the limit `q` in `RateLimit-Policy`.
    let lists = |name| -> Vec<List> {
        hint::values(headers, name).filter_map(|line| Parser::new(line).parse().ok()).collect()
    };
    let (limits, policies) = (lists("ratelimit"), lists("ratelimit-policy"));
    let of_policy = |Item { bare_item: name, params }: &Item| {
        let policy =
            policies.iter().flatten().filter_map(hint::item).find(|policy| policy.bare_item == *name)?;
        // A policy may also limit bytes, or concurrent requests.
        let is_requests = |unit: &BareItem| unit.as_string().is_some_and(|unit| unit.as_str() == "requests");
        if !policy.params.get("qu").is_none_or(is_requests) {
            return None;
        }
        items(policy.params.get("q"), params.get("r"), params.get("t"), None)
    };
    // Draft 7: `limit=100, remaining=50, reset=50`.
    let of_dictionary = |line| {
        let line: Dictionary = Parser::new(line).parse().ok()?;
        let value = |key| Some(&hint::item(line.get(key)?)?.bare_item);
        items(value("limit"), value("remaining"), value("reset"), Some(Kind::Window))
    };
    let scarcest = limits.iter().flatten().filter_map(hint::item).filter_map(of_policy).reduce(scarcer);
    scarcest.or_else(|| hint::values(headers, "ratelimit").find_map(of_dictionary))
}

type Value<'a> = Option<&'a BareItem>;

fn items(limit: Value<'_>, remaining: Value<'_>, reset: Value<'_>, kind: Option<Kind>) -> Option<Left> {
    let reset = Reset { wait: hint::item_seconds(reset?)?, resolution: SECOND, is_date: false };
    left(hint::item_seconds(limit?)?, hint::item_seconds(remaining?)?, reset, kind)
}

#[cfg(test)]
mod tests {
    use http::HeaderName;
    use proptest::{collection::vec, prelude::*, sample::select};

    use super::*;

    const BUCKET: Option<Kind> = Some(Kind::Bucket);
    const WINDOW: Option<Kind> = Some(Kind::Window);

    /// A service or draft, its documentation, a response, and the budgets of requests and tokens.
    type Row = (&'static str, &'static str, &'static str, Option<Left>, Option<Left>);

    #[rustfmt::skip] // One response and its budgets per row.
    fn services() -> Vec<Row> {
        vec![
            ("OpenAI", "platform.openai.com/docs/guides/rate-limits",
             "x-ratelimit-limit-requests: 60
              x-ratelimit-limit-tokens: 150000
              x-ratelimit-remaining-requests: 59
              x-ratelimit-remaining-tokens: 149984
              x-ratelimit-reset-requests: 1s
              x-ratelimit-reset-tokens: 6m0s",
             some(60, 59, 1_000, MILLISECOND, BUCKET), some(150_000, 149_984, 360_000, MILLISECOND, BUCKET)),
            ("OpenAI, milliseconds; requests per day", "platform.openai.com/docs/guides/rate-limits",
             "x-ratelimit-limit-requests: 10000
              x-ratelimit-limit-tokens: 200000
              x-ratelimit-remaining-requests: 9999
              x-ratelimit-remaining-tokens: 199943
              x-ratelimit-reset-requests: 8.64s
              x-ratelimit-reset-tokens: 17ms",
             some(10_000, 9_999, 8_640, MILLISECOND, BUCKET), some(200_000, 199_943, 17, MILLISECOND, BUCKET)),
            ("Groq", "console.groq.com/docs/rate-limits",
             "x-ratelimit-limit-requests: 14400
              x-ratelimit-limit-tokens: 18000
              x-ratelimit-remaining-requests: 14370
              x-ratelimit-remaining-tokens: 17997
              x-ratelimit-reset-requests: 2m59.56s
              x-ratelimit-reset-tokens: 7.66s",
             some(14_400, 14_370, 179_560, MILLISECOND, BUCKET), some(18_000, 17_997, 7_660, MILLISECOND, BUCKET)),
            ("OpenAI's names with whole seconds, tokens without a reset", "undocumented; OpenAI-compatible services",
             "x-ratelimit-limit-requests: 60
              x-ratelimit-remaining-requests: 59
              x-ratelimit-reset-requests: 10
              x-ratelimit-limit-tokens: 60000
              x-ratelimit-remaining-tokens: 59000",
             some(60, 59, 10_000, SECOND, BUCKET), None),
            ("Anthropic, input tokens scarcest", "docs.anthropic.com/en/api/rate-limits",
             "date: Mon, 23 Nov 2026 20:41:00 GMT
              anthropic-ratelimit-requests-limit: 50
              anthropic-ratelimit-requests-remaining: 49
              anthropic-ratelimit-requests-reset: 2026-11-23T20:41:02Z
              anthropic-ratelimit-tokens-limit: 48000
              anthropic-ratelimit-tokens-remaining: 30000
              anthropic-ratelimit-tokens-reset: 2026-11-23T20:41:23Z
              anthropic-ratelimit-input-tokens-limit: 40000
              anthropic-ratelimit-input-tokens-remaining: 22000
              anthropic-ratelimit-input-tokens-reset: 2026-11-23T20:41:27Z
              anthropic-ratelimit-output-tokens-limit: 8000
              anthropic-ratelimit-output-tokens-remaining: 8000
              anthropic-ratelimit-output-tokens-reset: 2026-11-23T20:41:00Z",
             some(50, 49, 2_000, SECOND, BUCKET), some(40_000, 22_000, 27_000, SECOND, BUCKET)),
            ("Anthropic, a full bucket's reset seems late", "docs.anthropic.com/en/api/rate-limits",
             "date: Mon, 23 Nov 2026 20:41:01 GMT
              anthropic-ratelimit-output-tokens-limit: 8000
              anthropic-ratelimit-output-tokens-remaining: 8000
              anthropic-ratelimit-output-tokens-reset: 2026-11-23T20:41:00Z",
             None, some(8_000, 8_000, 0, SECOND, BUCKET)),
            ("GitHub", "docs.github.com/en/rest/using-the-rest-api/rate-limits-for-the-rest-api",
             "date: Mon, 23 Nov 2026 20:41:00 GMT
              x-ratelimit-limit: 5000
              x-ratelimit-remaining: 4987
              x-ratelimit-used: 13
              x-ratelimit-resource: core
              x-ratelimit-reset: 1795467660",
             some(5_000, 4_987, 1_200_000, SECOND, WINDOW), None),
            ("milliseconds since the epoch", "undocumented; `hint` accepts them, too",
             "date: Mon, 23 Nov 2026 20:41:00 GMT
              x-ratelimit-limit: 20
              x-ratelimit-remaining: 3
              x-ratelimit-reset: 1795466520500",
             some(20, 3, 60_500, SECOND, WINDOW), None),
            ("GitHub's names with seconds", "datatracker.ietf.org/doc/draft-polli-ratelimit-headers",
             "x-ratelimit-limit: 100
              x-ratelimit-remaining: 99
              x-ratelimit-reset: 60",
             some(100, 99, 60_000, SECOND, None), None),
            ("X", "docs.x.com/x-api/fundamentals/rate-limits",
             "date: Mon, 23 Nov 2026 20:41:00 GMT
              x-rate-limit-limit: 900
              x-rate-limit-remaining: 899
              x-rate-limit-reset: 1795467360",
             some(900, 899, 900_000, SECOND, WINDOW), None),
            ("Discord", "discord.com/developers/docs/topics/rate-limits",
             "x-ratelimit-limit: 5
              x-ratelimit-remaining: 0
              x-ratelimit-reset: 1470173023
              x-ratelimit-reset-after: 64.57
              x-ratelimit-bucket: abcd1234",
             some(5, 0, 64_570, MILLISECOND, WINDOW), None),
            ("draft 6", "datatracker.ietf.org/doc/draft-ietf-httpapi-ratelimit-headers/06",
             "ratelimit-limit: 100
              ratelimit-remaining: 50
              ratelimit-reset: 50",
             some(100, 50, 50_000, SECOND, WINDOW), None),
            ("draft 5, with policies", "datatracker.ietf.org/doc/draft-ietf-httpapi-ratelimit-headers/05",
             "ratelimit-limit: 10, 10;w=1, 50;w=60
              ratelimit-remaining: 9
              ratelimit-reset: 1",
             some(10, 9, 1_000, SECOND, WINDOW), None),
            ("GitLab, a date", "docs.gitlab.com/administration/settings/user_and_ip_rate_limits",
             "date: Mon, 23 Nov 2026 20:41:00 GMT
              ratelimit-limit: 60
              ratelimit-observed: 67
              ratelimit-remaining: 0
              ratelimit-reset: 1795466490",
             some(60, 0, 30_000, SECOND, WINDOW), None),
            ("draft 7", "datatracker.ietf.org/doc/draft-ietf-httpapi-ratelimit-headers/07",
             "ratelimit: limit=100, remaining=50, reset=50
              ratelimit-policy: 100;w=60",
             some(100, 50, 50_000, SECOND, WINDOW), None),
            ("draft 8", "datatracker.ietf.org/doc/draft-ietf-httpapi-ratelimit-headers/08",
             r#"ratelimit: "default";r=50;t=30
                ratelimit-policy: "default";q=100;w=60"#,
             some(100, 50, 30_000, SECOND, None), None),
            ("draft 10, several policies", "datatracker.ietf.org/doc/draft-ietf-httpapi-ratelimit-headers/10",
             r#"ratelimit: "burst";r=90;t=1, "bytes";r=1;t=60
                ratelimit: "daily";r=200;t=36000, "unknown";r=0;t=5
                ratelimit-policy: "burst";q=100;w=1, "daily";q=1000;w=86400;qu="requests"
                ratelimit-policy: "bytes";q=65535;qu="content-bytes";w=60"#,
             some(1_000, 200, 36_000_000, SECOND, None), None),
            ("no limits", "",
             "date: Mon, 23 Nov 2026 20:41:00 GMT
              retry-after: 30",
             None, None),
        ]
    }

    /// Headers that say nothing of a budget, because a line is missing, malformed or contradicts another.
    const UNUSABLE: &[&str] = &[
        // No reset, no remainder, no limit.
        "x-ratelimit-limit: 5 | x-ratelimit-remaining: 4",
        "x-ratelimit-limit: 5 | x-ratelimit-reset: 4",
        "x-ratelimit-remaining: 5 | x-ratelimit-reset: 4",
        // Limits.
        "x-ratelimit-limit: 0 | x-ratelimit-remaining: 0 | x-ratelimit-reset: 1",
        "x-ratelimit-limit: 4 | x-ratelimit-remaining: 5 | x-ratelimit-reset: 1",
        "x-ratelimit-limit: -5 | x-ratelimit-remaining: 4 | x-ratelimit-reset: 1",
        "x-ratelimit-limit: NaN | x-ratelimit-remaining: 4 | x-ratelimit-reset: 1",
        "x-ratelimit-limit: inf | x-ratelimit-remaining: 4 | x-ratelimit-reset: 1",
        "x-ratelimit-limit: 1e9 | x-ratelimit-remaining: 4 | x-ratelimit-reset: 1",
        "x-ratelimit-limit: 99999999999999999999 | x-ratelimit-remaining: 4 | x-ratelimit-reset: 1",
        "x-ratelimit-limit: unlimited | x-ratelimit-remaining: 4 | x-ratelimit-reset: 1",
        "x-ratelimit-limit:  | x-ratelimit-remaining: 4 | x-ratelimit-reset: 1",
        // Remainders.
        "x-ratelimit-limit: 5 | x-ratelimit-remaining: -1 | x-ratelimit-reset: 1",
        "x-ratelimit-limit: 5 | x-ratelimit-remaining: NaN | x-ratelimit-reset: 1",
        "x-ratelimit-limit: 5, 50 | x-ratelimit-remaining: 4, 49 | x-ratelimit-reset: 1",
        "x-ratelimit-limit: 5 | x-ratelimit-remaining: 4. | x-ratelimit-reset: 1",
        // Resets.
        "x-ratelimit-limit: 5 | x-ratelimit-remaining: 4 | x-ratelimit-reset: -1",
        "x-ratelimit-limit: 5 | x-ratelimit-remaining: 4 | x-ratelimit-reset: NaN",
        "x-ratelimit-limit: 5 | x-ratelimit-remaining: 4 | x-ratelimit-reset: soon",
        "x-ratelimit-limit: 5 | x-ratelimit-remaining: 4 | x-ratelimit-reset: 1d",
        "x-ratelimit-limit: 5 | x-ratelimit-remaining: 4 | x-ratelimit-reset: 1m1",
        "x-ratelimit-limit: 5 | x-ratelimit-remaining: 4 | x-ratelimit-reset: 99999999999999999999",
        "x-ratelimit-limit: 5 | x-ratelimit-remaining: 4 | x-ratelimit-reset: 9999999999999999999h",
        // Dates: without `Date`, with a malformed `Date`, two seconds ago, not a date.
        "x-ratelimit-limit: 5 | x-ratelimit-remaining: 4 | x-ratelimit-reset: 1795466460",
        "date: today | x-ratelimit-limit: 5 | x-ratelimit-remaining: 4 | x-ratelimit-reset: 1795466460",
        "date: Mon, 23 Nov 2026 20:41:02 GMT | x-ratelimit-limit: 5 | x-ratelimit-remaining: 4 | x-ratelimit-reset: 1795466460",
        "date: Mon, 23 Nov 2026 20:41:02 GMT | x-ratelimit-limit: 5 | x-ratelimit-remaining: 4 | x-ratelimit-reset: 2026-13-23T20:41:10Z",
        // The drafts.
        r#"ratelimit: "a";r=5;t=1"#,
        r#"ratelimit: "a";r=5;t=1 | ratelimit-policy: "b";q=10;w=1"#,
        r#"ratelimit: "a";r=5;t=1 | ratelimit-policy: "a";w=1"#,
        r#"ratelimit: "a";r=5 | ratelimit-policy: "a";q=10;w=1"#,
        r#"ratelimit: "a";r=-5;t=1 | ratelimit-policy: "a";q=10;w=1"#,
        r#"ratelimit: "a";r=11;t=1 | ratelimit-policy: "a";q=10;w=1"#,
        r#"ratelimit: "a";r=5;t=1 | ratelimit-policy: "a";q=10;w=1;qu="concurrent-requests""#,
        "ratelimit: limit=100, remaining=50",
        "ratelimit: limit=0, remaining=0, reset=1",
        "ratelimit: ;;",
    ];

    fn some(
        limit: u32,
        remaining: u32,
        millis: u64,
        resolution: Duration,
        kind: Option<Kind>,
    ) -> Option<Left> {
        let (limit, remaining) = (limit.into(), remaining.into());
        Some(Left { limit, remaining, reset: Duration::from_millis(millis), resolution, kind })
    }

    fn headers<'a>(lines: impl IntoIterator<Item = &'a str>) -> HeaderMap {
        let header = |line: &str| {
            let (name, value) = line.split_once(':').expect("a header");
            let name: HeaderName = name.trim().parse().expect("a name");
            (name, HeaderValue::from_str(value.trim()).expect("a value"))
        };
        lines.into_iter().map(header).collect()
    }

    #[test]
    fn every_service_is_read_as_documented() {
        for (service, source, lines, requests, tokens) in services() {
            let read = remaining(&headers(lines.lines()));
            assert_eq!(read, Remaining { requests, tokens, ..read }, "{service}: {source}");
        }
    }

    #[test]
    fn unusable_lines_leave_a_budget_unknown() {
        for lines in UNUSABLE {
            assert_eq!(remaining(&headers(lines.split('|'))), Remaining::default(), "{lines}");
        }
    }

    #[test]
    fn an_unusable_family_does_not_hide_another() {
        let read = remaining(&headers([
            "x-ratelimit-limit-requests: none",
            "x-ratelimit-remaining-requests: 1",
            "x-ratelimit-reset-requests: 1s",
            "x-ratelimit-limit: 100",
            "x-ratelimit-remaining: 98.5",
            "x-ratelimit-reset-after: soon",
            "x-ratelimit-reset: 0.5",
            "x-ratelimit-limit: 7",
        ]));
        let left = Left { remaining: 98.5, ..some(100, 0, 500, MILLISECOND, None).expect("a budget") };
        assert_eq!(read, Remaining { requests: Some(left), ..Remaining::default() });
    }

    #[cfg(not(any(schedules = "loom", schedules = "shuttle")))]
    #[test]
    fn only_structured_fields_allocate() {
        for (service, _, lines, ..) in services() {
            let headers = headers(lines.lines());
            let counted = allocation_counter::measure(|| _ = std::hint::black_box(remaining(&headers)));
            assert_eq!(counted.count_total > 0, headers.contains_key("ratelimit"), "{service}");
        }
    }

    /// A header of any family, with a value that is likely to be almost right.
    fn line() -> impl Strategy<Value = (HeaderName, HeaderValue)> {
        let lines = services().into_iter().flat_map(|(_, _, lines, ..)| lines.lines());
        let known: Vec<_> =
            headers(lines).into_iter().filter_map(|(name, value)| Some((name?, value))).collect();
        let value = prop_oneof![
            2 => select(known.clone()).prop_map(|(_, value)| value.as_bytes().to_vec()),
            2 => "[0-9]{0,25}[-.:;=,TZhmsµn\"]{0,2}[0-9]{0,25}[-.:;=,TZhmsµn\"]{0,2}".prop_map(String::into_bytes),
            1 => vec(any::<u8>(), 0..40),
        ];
        let value = value.prop_filter_map("no header value", |value| HeaderValue::from_bytes(&value).ok());
        (select(known), value).prop_map(|((name, _), value)| (name, value))
    }

    proptest! {
        #[test]
        fn arbitrary_values_never_panic(lines in vec(line(), 0..40)) {
            let mut headers = HeaderMap::new();
            for (name, value) in lines {
                headers.append(name, value);
            }
            let Remaining { requests, tokens, .. } = remaining(&headers);
            for left in [requests, tokens].into_iter().flatten() {
                prop_assert!(left.limit.is_finite() && left.limit > 0.0, "{left:?}");
                prop_assert!((0.0..=left.limit).contains(&left.remaining), "{left:?}");
            }
        }
    }

    #[test]
    fn organisations_are_told_apart_by_names_of_bounded_length() {
        let named = |header: &'static str, name: &str| {
            let headers = HeaderMap::from_iter([(HeaderName::from_static(header), name.parse().unwrap())]);
            remaining(&headers).organisation
        };
        let (anthropic, openai) = ("anthropic-organization-id", "openai-organization");
        assert!(named(anthropic, "org-1") != 0 && named(anthropic, "org-1") == named(openai, "org-1"));
        assert_ne!(named(openai, "org-1"), named(openai, "org-2"));
        assert_ne!(named(openai, &"a".repeat(LONGEST_NAME)), 0);
        let none =
            [named(openai, ""), named(openai, &"a".repeat(LONGEST_NAME + 1)), named("openai-model", "a")];
        assert_eq!(none, [0; 3]);
    }
}
