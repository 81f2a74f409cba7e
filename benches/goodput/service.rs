//! The simulated services: their limits and their headers.
//!
//! Every service has two models. Unless the table says otherwise, a service has 10 keys, and limits each key and model
//! by a token bucket of 60 requests per minute with a burst of 10. A refused request costs nothing.
//!
//! | service | limits of a key and model | headers of every response | also in a 429 |
//! |---|---|---|---|
//! | `openai` | as above | `x-ratelimit-{limit,remaining,reset}-requests`; the reset is a duration in ms | `retry-after-ms` |
//! | `anthropic` | as above | `anthropic-ratelimit-requests-{limit,remaining,reset}` and `date`; the reset is a date, rounded up to a second | `retry-after`, rounded up to a second |
//! | `mixed` | 10 to 1,000 requests per minute, log-uniform, burst a sixth of that | as `openai` | as `openai` |
//! | `groups` | 5 groups of 2 keys share a bucket | as `openai` | as `openai` |
//! | `bursts` | as above; all requests of a minute arrive at its start | as `openai` | as `openai` |
//! | `windows` | fixed windows: 60 requests in 60 s, which begin at random | `ratelimit-{limit,remaining,reset}`, rounded up to a second | `retry-after`, rounded up to a second |
//! | `tokens` | 300 requests per minute, burst 50, and 20,000 tokens per minute, burst 10,000. Input counts at the start, output at the end | as `openai`, for requests and for tokens | `retry-after-ms` |
//! | `retry_after` | as `windows` | none | `retry-after`, rounded up to a second |
//! | `silent` | as above | none | nothing |
//! | `lies_zero` | as above | as `openai`, but always 0 remaining and 60 s to the reset | nothing |
//! | `lies_full` | as above | as `openai`, but always full | nothing |
//! | `lies_reset` | as above | as `openai`, but the reset is 10 times as far away | nothing |
//! | `daily` | 200 requests per day, which begins at midnight in Los Angeles | none | nothing |
//! | `many` | 300 keys with 12 requests per minute, burst 3 | as `openai` | as `openai` |
//!
//! A run of `daily` begins at 20:00 on 2026-10-31 and takes 52 hours, so it crosses two midnights. The day between them has
//! 25 hours: clocks are set back at 02:00. A client that lets a day have 24 hours begins the next one an hour too early.

use std::{
    sync::LazyLock,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use clap::ValueEnum;
use fastrand::Rng;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use jiff::civil::{Date, date};

use crate::{
    arrivals::{Job, mean_tokens},
    limit::Limit,
};

pub(crate) const MODELS: usize = 2;

/// The service's wall clock at the start of a run: 2026-01-01T00:00:00Z.
const EPOCH: u64 = 1_767_225_600;

/// The same for `daily`: 2026-10-31T20:00:00-07:00.
const EPOCH_OF_DAILY: u64 = 1_793_502_000;

/// Where the days of `daily` begin at midnight.
pub(crate) const ZONE: &str = "America/Los_Angeles";

/// The requests that `daily` allows a key per day and model.
pub(crate) const PER_DAY: u32 = 200;

/// The midnights of a run of `daily`, in seconds since its start.
static MIDNIGHTS: LazyLock<Vec<f64>> = LazyLock::new(|| {
    let midnight = |day: Date| {
        let at = day.in_tz(ZONE).expect("a zone of the database").timestamp().as_second();
        (at - EPOCH_OF_DAILY as i64) as f64
    };
    [date(2026, 11, 1), date(2026, 11, 2), date(2026, 11, 3)].map(midnight).into()
});

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub(crate) enum ServiceKind {
    #[value(name = "openai")]
    OpenAi,
    Anthropic,
    Mixed,
    Groups,
    Bursts,
    Windows,
    Tokens,
    RetryAfter,
    Silent,
    LiesZero,
    LiesFull,
    LiesReset,
    Daily,
    Many,
}

impl ServiceKind {
    fn keys(self) -> usize {
        if self == Self::Many { 300 } else { 10 }
    }

    /// Returns how long requests arrive.
    pub(crate) fn seconds(self) -> f64 {
        if self == Self::Daily { 52.0 * 60.0 * 60.0 } else { 300.0 }
    }

    /// Returns how long one of the models is in demand before the other one is.
    pub(crate) fn shift(self) -> f64 {
        if self == Self::Daily { 24.0 * 60.0 * 60.0 } else { 30.0 }
    }

    /// Returns the wall clock's time at the start of a run.
    pub(crate) fn epoch(self) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(if self == Self::Daily { EPOCH_OF_DAILY } else { EPOCH })
    }

    /// Returns the number of keys that share a quota.
    fn members(self) -> usize {
        if self == Self::Groups { 2 } else { 1 }
    }

    /// Returns the limits of one model, for one key or one group of keys.
    fn quota(self, per_minute_if_mixed: f64, rng: &mut Rng) -> Quota {
        let requests = match self {
            Self::Windows | Self::RetryAfter => Limit::window(60.0, 60.0, -60.0 * rng.f64()),
            Self::Tokens => Limit::bucket(300.0, 50.0),
            Self::Mixed => Limit::bucket(per_minute_if_mixed, (per_minute_if_mixed / 6.0).round().max(1.0)),
            Self::Daily => Limit::days(PER_DAY.into(), &MIDNIGHTS),
            Self::Many => Limit::bucket(12.0, 3.0),
            _ => Limit::bucket(60.0, 10.0),
        };
        let tokens = (self == Self::Tokens).then(|| Limit::bucket(20_000.0, 10_000.0));
        Quota { requests, tokens }
    }

    /// Returns the headers of a response. `wait` is the time until the service would serve a refused request.
    fn headers(self, quota: &Quota, wait: Option<f64>, now: f64) -> HeaderMap {
        let mut headers = HeaderMap::new();
        let requests = &quota.requests;
        let (limit, remaining, reset) =
            (requests.size() as u64, requests.remaining(now), requests.reset(now));
        match self {
            Self::OpenAi | Self::Mixed | Self::Groups | Self::Bursts | Self::Many | Self::Tokens => {
                openai(&mut headers, "requests", limit, remaining, reset);
                if let Some(tokens) = &quota.tokens {
                    let (limit, remaining) = (tokens.size() as u64, tokens.remaining(now));
                    openai(&mut headers, "tokens", limit, remaining, tokens.reset(now));
                }
                if let Some(wait) = wait {
                    put(&mut headers, "retry-after-ms", milliseconds(wait));
                }
            }
            Self::Anthropic => {
                put(&mut headers, "anthropic-ratelimit-requests-limit", limit);
                put(&mut headers, "anthropic-ratelimit-requests-remaining", remaining);
                put(&mut headers, "anthropic-ratelimit-requests-reset", rfc3339(now + reset));
                put(&mut headers, header::DATE, http_date(now));
                retry_after(&mut headers, wait);
            }
            Self::Windows => {
                put(&mut headers, "ratelimit-limit", limit);
                put(&mut headers, "ratelimit-remaining", remaining);
                put(&mut headers, "ratelimit-reset", reset.ceil());
                retry_after(&mut headers, wait);
            }
            Self::RetryAfter => retry_after(&mut headers, wait),
            Self::Silent | Self::Daily => {}
            Self::LiesZero => openai(&mut headers, "requests", limit, 0, 60.0),
            Self::LiesFull => openai(&mut headers, "requests", limit, limit, 0.0),
            Self::LiesReset => openai(&mut headers, "requests", limit, remaining, 10.0 * reset),
        }
        headers
    }
}

/// The limits of a model, for a key or a group of keys.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Quota {
    requests: Limit,
    tokens: Option<Limit>,
}

impl Quota {
    /// Returns the requests per second that the limits allow.
    pub(crate) fn rate(&self) -> f64 {
        let by_tokens = self.tokens.map_or(f64::INFINITY, |tokens| tokens.rate() / mean_tokens());
        self.requests.rate().min(by_tokens)
    }

    /// Returns the requests that full limits allow at once.
    pub(crate) fn burst(&self) -> f64 {
        let by_tokens = self.tokens.map_or(f64::INFINITY, |tokens| tokens.size() / mean_tokens());
        self.requests.size().min(by_tokens)
    }

    /// Returns the time until the limits allow the request.
    fn wait(&self, job: &Job, now: f64) -> f64 {
        let by_tokens = self.tokens.map_or(0.0, |tokens| tokens.wait(job.input, now));
        self.requests.wait(1.0, now).max(by_tokens)
    }

    /// Returns the first time from `now` on when the limits allow the request.
    pub(crate) fn earliest(&self, job: &Job, mut now: f64) -> f64 {
        loop {
            match self.wait(job, now) {
                0.0 => return now,
                // A little later than the wait, which is rounded.
                wait => now += wait + 1e-9,
            }
        }
    }

    /// Returns the time until the scarcer limit is full: from then on, unused capacity is lost.
    pub(crate) fn time_to_full(&self, now: f64) -> f64 {
        self.tokens.as_ref().unwrap_or(&self.requests).reset(now)
    }

    pub(crate) fn start(&mut self, job: &Job, now: f64) {
        self.requests.take(1.0, now);
        if let Some(tokens) = &mut self.tokens {
            tokens.take(job.input, now);
        }
    }

    pub(crate) fn end(&mut self, job: &Job, now: f64) {
        if let Some(tokens) = &mut self.tokens {
            tokens.take(job.output, now);
        }
    }
}

/// The limits of all keys of a service.
#[derive(Clone, Debug)]
pub(crate) struct Limits {
    kind: ServiceKind,
    /// One entry for each key, or for each group of keys.
    pub(crate) quotas: Vec<[Quota; MODELS]>,
}

impl Limits {
    /// Creates full limits: the same ones each time.
    pub(crate) fn new(kind: ServiceKind) -> Self {
        let mut rng = Rng::with_seed(11);
        let quotas = (0..kind.keys() / kind.members())
            .map(|_| {
                let per_minute_if_mixed = 10.0 * 100_f64.powf(rng.f64());
                [(); MODELS].map(|()| kind.quota(per_minute_if_mixed, &mut rng))
            })
            .collect();
        Self { kind, quotas }
    }

    pub(crate) fn kind(&self) -> ServiceKind {
        self.kind
    }

    pub(crate) fn keys(&self) -> usize {
        self.kind.keys()
    }

    /// Returns the number of keys that share a quota.
    pub(crate) fn members(&self) -> usize {
        self.kind.members()
    }

    pub(crate) fn quota(&self, key: usize, model: usize) -> &Quota {
        &self.quotas[key / self.members()][model]
    }

    fn quota_mut(&mut self, key: usize, model: usize) -> &mut Quota {
        let group = key / self.members();
        &mut self.quotas[group][model]
    }

    /// Returns the requests per second that all limits together allow.
    pub(crate) fn capacity(&self) -> f64 {
        self.quotas.iter().flatten().map(Quota::rate).sum()
    }

    /// Serves or refuses a request.
    pub(crate) fn request(&mut self, key: usize, job: &Job, now: f64) -> (StatusCode, HeaderMap) {
        let kind = self.kind;
        let quota = self.quota_mut(key, job.model);
        let wait = quota.wait(job, now);
        if wait > 0.0 {
            return (StatusCode::TOO_MANY_REQUESTS, kind.headers(quota, Some(wait), now));
        }
        quota.start(job, now);
        (StatusCode::OK, kind.headers(quota, None, now))
    }

    /// Counts the tokens of a response at its end.
    pub(crate) fn end(&mut self, key: usize, job: &Job, now: f64) {
        self.quota_mut(key, job.model).end(job, now);
    }
}

fn put(headers: &mut HeaderMap, name: impl TryInto<HeaderName>, value: impl ToString) {
    let name = name.try_into().unwrap_or_else(|_| panic!("a valid name"));
    headers.insert(name, HeaderValue::try_from(value.to_string()).expect("a valid value"));
}

fn openai(headers: &mut HeaderMap, unit: &str, limit: u64, remaining: u64, reset: f64) {
    put(headers, format!("x-ratelimit-limit-{unit}"), limit);
    put(headers, format!("x-ratelimit-remaining-{unit}"), remaining);
    put(headers, format!("x-ratelimit-reset-{unit}"), go_duration(milliseconds(reset)));
}

fn retry_after(headers: &mut HeaderMap, wait: Option<f64>) {
    if let Some(wait) = wait {
        put(headers, header::RETRY_AFTER, wait.ceil());
    }
}

fn milliseconds(seconds: f64) -> u64 {
    (seconds * 1_000.0).ceil() as u64
}

/// Formats a duration as Go does: `120ms`, `8.64s`, `1m40s`.
fn go_duration(milliseconds: u64) -> String {
    let (minutes, rest) = (milliseconds / 60_000, milliseconds % 60_000);
    match minutes {
        0 if rest < 1_000 => format!("{rest}ms"),
        0 => format!("{}s", rest as f64 / 1_000.0),
        _ => format!("{minutes}m{}s", rest as f64 / 1_000.0),
    }
}

fn rfc3339(at: f64) -> String {
    let seconds = EPOCH + at.ceil() as u64;
    jiff::Timestamp::from_second(seconds as i64).expect("a date").to_string()
}

fn http_date(at: f64) -> String {
    httpdate::fmt_http_date(UNIX_EPOCH + Duration::from_secs(EPOCH + at as u64))
}
