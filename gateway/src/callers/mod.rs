//! The callers of the gateway: who they are, by their tokens, what they may use, and what they have used.

mod limits;
mod named;
mod token;

use std::{cell::Cell, sync::Arc};

use axum::http::{HeaderName, header::AUTHORIZATION, request::Parts};

pub(crate) use self::{
    limits::{CallerLimits, OverLimit},
    named::{NamedCaller, UnderWay},
    token::Token,
};
use crate::{
    config::CallerConfig,
    guesses::{Denied, Guesses},
};

/// Headers in which clients send their API key.
// Not a constant, of which each use would be a copy.
pub(crate) static CREDENTIALS: [HeaderName; 4] = [
    AUTHORIZATION,
    HeaderName::from_static("x-api-key"),
    HeaderName::from_static("api-key"),
    HeaderName::from_static("x-goog-api-key"),
];

/// The name under which requests without a token count.
const ANYONE: &str = "anyone";

pub(crate) struct Callers {
    /// Those with a token. If there are none, only this machine may call.
    named: Vec<Arc<NamedCaller>>,
    anyone: Arc<NamedCaller>,
}

impl Callers {
    /// Callers that were there before keep their usage, and what is left of limits that are the same.
    pub(crate) fn new(callers: Vec<CallerConfig>, before: Option<&Self>) -> Self {
        let of = |caller: CallerConfig| {
            let same = before.and_then(|before| before.all().find(|old| old.name() == caller.name));
            Arc::new(NamedCaller::new(caller, same.map(|same| &**same)))
        };
        Self {
            named: callers.into_iter().map(of).collect(),
            anyone: of(CallerConfig::unlimited(ANYONE, None)),
        }
    }

    /// Whether no token is set, so that only this machine may call.
    pub(crate) fn are_all_here(&self) -> bool {
        self.named.is_empty()
    }

    /// Whether there are callers to tell apart.
    pub(crate) fn are_several(&self) -> bool {
        self.named.len() > 1
    }

    /// Finds the caller of a request by its token. Without any tokens, everyone is the same caller.
    pub(crate) fn admit(&self, guesses: &Guesses, head: &Parts) -> Result<Arc<NamedCaller>, Denied> {
        if self.named.is_empty() {
            return Ok(self.anyone.clone());
        }
        let given = CREDENTIALS.iter().flat_map(|name| head.headers.get_all(name));
        let given = given.filter_map(|value| value.to_str().ok()).map(without_scheme);
        let found = Cell::new(None);
        guesses.check(head, given, |given| {
            let caller = self.with_token(given);
            found.set(found.get().or(caller));
            caller.is_some()
        })?;
        found.get().cloned().ok_or(Denied::Wrong)
    }

    /// Compares with every token, so that the response time does not reveal which one matches.
    fn with_token(&self, given: &str) -> Option<&Arc<NamedCaller>> {
        self.named
            .iter()
            .fold(None, |found, caller| if caller.has_token(given) { Some(caller) } else { found })
    }

    /// Returns the callers, as the admin shows them: those with a token, or the one that stands for all.
    pub(crate) fn shown(&self) -> &[Arc<NamedCaller>] {
        if self.named.is_empty() { std::slice::from_ref(&self.anyone) } else { &self.named }
    }

    fn all(&self) -> impl Iterator<Item = &Arc<NamedCaller>> {
        self.named.iter().chain([&self.anyone])
    }
}

fn without_scheme(value: &str) -> &str {
    match value.split_once(' ') {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => token.trim_start(),
        _ => value,
    }
}
