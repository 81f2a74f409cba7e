//! Duration of a key's rest after a response. An input is the response:
//!
//! ```text
//! 429 exact 120 86400 1 3600 1
//! retry-after: 30
//!
//! {"error": "slow down"}
//! ```
//!
//! The pool's settings follow the status: `exact` for exact hints, then in seconds `cooldown`, `exhausted_for`, both
//! `hint_limits`, and the time of the pool's clock.

use std::{convert::Infallible, future::ready, time::Duration};

use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Request, Response, StatusCode,
    header::{DATE, RETRY_AFTER},
};
use http_body_util::{BodyExt, Full};
use tower::{Layer, ServiceExt, service_fn};
use tower_key_rotation::{
    KeyPool, KeyRotationLayer, Status,
    classify::{ClassifyResponse, LlmGateway, ResponseHead, TooManyRequests, Verdict},
    clock::ManualClock,
};

use crate::{now, text};

/// The latest deadline that fits into a key's word: 139 years on the pool's clock.
const LAST_DEADLINE: Duration = Duration::from_millis((1 << 42) - 2);

struct Rules {
    exact: bool,
    cooldown: Duration,
    exhausted_for: Duration,
    least: Duration,
    most: Duration,
    clock: Duration,
}

pub fn check(input: &[u8]) {
    let (head, body) = text::divided(input);
    let mut lines = text::lines(head);
    let Some((status, rules)) = lines.next().and_then(first_line) else { return };
    let mut headers = text::headers(lines);

    let _by_the_local_clock = ResponseHead::new(status, &headers).with_body(body).wait();
    // With a `Date`, the hint does not depend on the local clock. A `Date` in the input comes first and wins.
    headers.append(DATE, HeaderValue::from_static("Mon, 23 Nov 2026 20:40:02 GMT"));

    let head = ResponseHead::new(status, &headers);
    let with_body = head.with_body(body);
    for head in [head, with_body] {
        assert_eq!(head.wait(), head.wait());
        if let Some(wait) = plain_wait(&headers) {
            assert_eq!(head.wait(), Some(wait));
        }
        assert_as_documented(&head);
    }
    rules.assert_rest(&headers, &with_body);
}

fn first_line(line: &[u8]) -> Option<(StatusCode, Rules)> {
    let mut words = std::str::from_utf8(line).ok()?.split(' ').peekable();
    let status = words.next()?.parse().ok()?;
    let exact = words.next_if_eq(&"exact").is_some();
    let mut seconds = words.map_while(|word| word.parse().ok());
    let mut next_or = |usual| Duration::from_secs(seconds.next().unwrap_or(usual));
    let rules = Rules {
        exact,
        cooldown: next_or(120),
        exhausted_for: next_or(24 * 60 * 60),
        least: next_or(1),
        most: next_or(60 * 60),
        // A deadline of zero would mean a healthy key.
        clock: next_or(1).max(Duration::from_nanos(1)),
    };
    Some((status, rules))
}

/// Returns the wait of the highest-ranking header, if its value is plain digits or a date.
fn plain_wait(headers: &HeaderMap) -> Option<Duration> {
    let ranked = ["retry-after-ms", "x-ms-retry-after-ms", RETRY_AFTER.as_str()];
    let (name, value) = ranked.iter().find_map(|name| Some((*name, headers.get(*name)?)))?;
    let value = value.to_str().ok()?;
    if value.bytes().all(|byte| byte.is_ascii_digit()) {
        let number = value.parse().ok()?;
        return Some(if name == RETRY_AFTER {
            Duration::from_secs(number)
        } else {
            Duration::from_millis(number)
        });
    }
    let date = |text: &str| httpdate::parse_http_date(text).ok();
    let received = date(headers.get(DATE)?.to_str().ok()?)?;
    if name == RETRY_AFTER { date(value)?.duration_since(received).ok() } else { None }
}

/// Asserts that both classifiers agree with the tables in their documentation.
fn assert_as_documented(head: &ResponseHead<'_>) {
    let limited = Verdict::RateLimited { wait: head.wait() };
    let has_body = head.body().is_some_and(|body| !body.is_empty());
    let status = head.status().as_u16();

    let verdict = TooManyRequests::new().classify(head);
    assert_eq!(verdict, if status == 429 { limited } else { Verdict::Nothing });

    let verdict = TooManyRequests::new().or_with_a_hint([StatusCode::SERVICE_UNAVAILABLE]).classify(head);
    let counts = status == 429 || (status == 503 && head.wait().is_some());
    assert_eq!(verdict, if counts { limited } else { Verdict::Nothing });

    // Without a body, no words count. A refusal with a wait never takes the key out.
    let verdict = LlmGateway::new().classify(head);
    let takes_out =
        matches!(verdict, Verdict::Revoked | Verdict::Exhausted { .. } | Verdict::ScopeExhausted { .. });
    let is_documented = match status {
        401..=403 if head.wait().is_none() => has_body || !takes_out,
        401..=403 => !plain_wait(head.headers()).is_some_and(|_| takes_out),
        429 => has_body || verdict == limited,
        400 | 498 | 503 | 529 => has_body || verdict == Verdict::Nothing,
        _ => verdict == Verdict::Nothing,
    };
    assert!(is_documented, "{status}: {verdict:?}");
}

impl Rules {
    fn pool(&self) -> KeyPool {
        let clock = ManualClock::new();
        clock.advance(self.clock);
        let builder = KeyPool::builder()
            .key("alpha", "sk-1")
            .clock(clock)
            .cooldown(self.cooldown)
            .exhausted_for(self.exhausted_for)
            .hint_limits(self.least, self.most);
        let builder = if self.exact { builder.exact_hints() } else { builder };
        builder.build().unwrap()
    }

    /// Sends a request that gets this response, and checks the key's state afterwards.
    fn assert_rest(&self, headers: &HeaderMap, head: &ResponseHead<'_>) {
        let body = Bytes::copy_from_slice(head.body().unwrap_or_default());
        let mut answer = Response::new(Full::new(body.clone()));
        *answer.status_mut() = head.status();
        *answer.headers_mut() = headers.clone();
        let client = service_fn(move |_: Request<()>| ready(Ok::<_, Infallible>(answer.clone())));
        let request = || Request::get("https://api.example.com").body(()).unwrap();

        let pool = self.pool();
        let layer = KeyRotationLayer::new(&pool);
        now(layer.layer(client.clone()).oneshot(request())).unwrap();
        self.assert_rests_after(
            TooManyRequests::new().classify(&ResponseHead::new(head.status(), headers)),
            &pool,
        );

        let pool = self.pool();
        let layer = KeyRotationLayer::new(&pool).classify(LlmGateway::new()).read_error_bodies(usize::MAX);
        let response = now(layer.layer(client).oneshot(request())).unwrap();
        self.assert_rests_after(LlmGateway::new().classify(head), &pool);
        assert_eq!(response.status(), head.status());
        assert_eq!(response.headers(), headers);
        assert_eq!(now(response.into_body().collect()).unwrap().to_bytes(), body);
    }

    fn assert_rests_after(&self, verdict: Verdict, pool: &KeyPool) {
        let key = &pool.stats().keys[0];
        let (status, by_default, wait) = match verdict {
            Verdict::RateLimited { wait } => (Status::RateLimited, self.cooldown, wait),
            Verdict::Exhausted { wait } => (Status::Exhausted, self.exhausted_for, wait),
            Verdict::ScopeExhausted { wait } => (Status::Exhausted, self.exhausted_for, wait),
            // Whose refusal it is shows another key's answer. There is none here.
            Verdict::Refused => return,
            Verdict::Revoked => return assert_eq!((key.status, key.time_left), (Status::Revoked, None)),
            _ => return assert_eq!((key.status, key.time_left), (Status::Healthy, None)),
        };
        // If the limits cross, `most` wins. Only after a 429, and with exact hints, may `most` be shorter than the rest
        // without a hint. The time of a quota's reset is always exact.
        let is_quota = status == Status::Exhausted;
        let most = if self.exact && !is_quota { self.most } else { self.most.max(by_default) };
        let is_exact = self.exact || is_quota;
        let least = if is_exact { self.least.min(most) } else { self.least.clamp(by_default, most) };
        let rest = wait.map_or(by_default, |wait| wait.clamp(least, most));
        let rest = if rest.is_zero() { rest } else { self.deadline(rest).saturating_sub(self.clock) };
        let status = if rest.is_zero() { Status::Healthy } else { status };
        assert_eq!((key.status, key.time_left.unwrap_or_default()), (status, rest), "after {verdict:?}");
    }
    /// Deadlines are whole milliseconds, rounded up.
    fn deadline(&self, rest: Duration) -> Duration {
        let millis =
            self.clock.saturating_add(rest).saturating_add(Duration::from_nanos(999_999)).as_millis();
        Duration::from_millis(u64::try_from(millis).unwrap_or(u64::MAX)).min(LAST_DEADLINE)
    }
}
