//! One span per request, which explains what happened to it: see the [module](super).
//!
//! It is made only if a subscriber wants it; otherwise a request pays for one relaxed load.

use std::time::Duration;

use tracing::{
    Level, Span,
    field::Empty,
    level_filters::{LevelFilter, STATIC_MAX_LEVEL},
    span::EnteredSpan,
};

use super::error::{Error, Refused};
use crate::{
    limit::Traits,
    message::JudgedResponse,
    pool::{KeyPool, Lease},
};

const TARGET: &str = "tower_key_rotation::request";

/// Whether a subscriber wants the spans.
#[inline(always)]
pub(crate) fn is_on() -> bool {
    Level::TRACE <= STATIC_MAX_LEVEL && Level::TRACE <= LevelFilter::current() && is_wanted()
}

/// Apart, so that the usual path is a load and a branch.
#[cold]
fn is_wanted() -> bool {
    tracing::span_enabled!(target: TARGET, Level::TRACE)
}

/// The explanation of one request, if somebody wants it.
pub(crate) struct Trace(Option<Box<Open>>);

struct Open {
    span: Span,
    pool: KeyPool,
    traits: Traits,
    passed_over: Option<String>,
    /// The key that the request's session prefers.
    preferred: Option<String>,
    /// Whether the attempt finds out if a key has room that should have none.
    is_probe: bool,
    attempts: u32,
    waited: Duration,
    /// The key of the last attempt.
    key: Option<String>,
    has_answer: bool,
}

impl Trace {
    /// Begins with a request that wants a key, before its key is picked.
    #[inline(always)]
    pub(crate) fn begin(pool: &KeyPool, traits: Option<&Traits>) -> Self {
        if is_on() { Self::open(pool, traits) } else { Self(None) }
    }

    #[cold]
    fn open(pool: &KeyPool, traits: Option<&Traits>) -> Self {
        let traits = traits.cloned().unwrap_or_default();
        let span = tracing::span!(
            target: TARGET,
            Level::TRACE,
            "request",
            scope = traits.named().scope.as_ref().map(|scope| scope.as_str()),
            waited_ms = Empty,
            attempts = Empty,
            key = Empty,
        );
        let mut open = Open {
            span,
            pool: pool.clone(),
            traits,
            passed_over: None,
            preferred: None,
            is_probe: false,
            attempts: 0,
            waited: Duration::ZERO,
            key: None,
            has_answer: true,
        };
        open.looks();
        Self(Some(Box::new(open)))
    }

    pub(crate) fn none() -> Self {
        Self(None)
    }

    pub(crate) fn is_on(&self) -> bool {
        self.0.is_some()
    }

    pub(crate) fn span(&self) -> Span {
        self.0.as_ref().map_or_else(Span::none, |open| open.span.clone())
    }

    /// Enters the span, where the request goes on.
    pub(crate) fn enter(&self) -> Option<EnteredSpan> {
        self.0.as_ref().map(|open| open.span.clone().entered())
    }

    /// Another key is about to be picked.
    pub(crate) fn picks_again(&mut self) {
        if let Some(open) = &mut self.0 {
            open.looks();
        }
    }

    pub(crate) fn waited(&mut self, time: Duration) {
        if let Some(open) = &mut self.0 {
            open.waited += time;
        }
    }

    /// The request goes out.
    pub(crate) fn sends(&mut self, lease: &Lease) {
        if let Some(open) = &mut self.0 {
            open.attempts += 1;
            open.key = Some(lease.id().to_string());
            open.is_probe = lease.is_probe();
            open.has_answer = false;
        }
    }

    /// An attempt has ended, and its key has been judged.
    pub(crate) fn answered<R: JudgedResponse, E>(&mut self, lease: &Lease, result: &Result<R, Error<E>>) {
        if self.0.is_some() {
            self.says_answer(lease, result.as_ref().ok().map(|response| response.status().as_u16()));
        }
    }

    /// The same for a response that only its status is known of; `None` for an error.
    #[cold]
    pub(crate) fn says_answer(&mut self, lease: &Lease, status: Option<u16>) {
        let Some(open) = &mut self.0 else { return };
        open.has_answer = true;
        let learned = open.pool.engine().known_of(&lease.key, &open.traits);
        tracing::event!(
            target: TARGET,
            parent: &open.span,
            Level::TRACE,
            attempt = open.attempts,
            key = %lease.id(),
            passed_over = open.passed_over,
            preferred = open.preferred,
            probe = Some(true).filter(|_| open.is_probe),
            status,
            learned,
            "{}",
            if status.is_some() { "answered" } else { "failed" }
        );
    }

    /// The request is not sent.
    pub(crate) fn refused(&self, refused: &Refused) {
        if let (Some(open), Refused::NoKeyAvailable(error)) = (&self.0, refused) {
            tracing::event!(
                target: TARGET,
                parent: &open.span,
                Level::TRACE,
                passed_over = open.passed_over,
                %error,
                "not sent"
            );
        }
    }
}

impl Open {
    /// Notes what the next pick passes over.
    fn looks(&mut self) {
        let engine = self.pool.engine();
        self.passed_over = engine.passed_over(&self.traits);
        self.preferred = engine.preferred(&self.traits).map(|key| key.to_string());
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        if !self.has_answer {
            tracing::event!(
                target: TARGET,
                parent: &self.span,
                Level::TRACE,
                attempt = self.attempts,
                key = self.key,
                passed_over = self.passed_over,
                "dropped without an answer"
            );
        }
        self.span.record("waited_ms", self.waited.as_millis() as u64);
        self.span.record("attempts", self.attempts);
        if let Some(key) = &self.key {
            self.span.record("key", key.as_str());
        }
    }
}
