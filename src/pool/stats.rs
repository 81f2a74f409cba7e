//! What a pool looks like at one moment.

use std::{sync::Arc, time::Duration};

use super::{engine::Engine, key::Key, scoped::Scoped};
#[cfg(feature = "metrics")]
use crate::meter::ScopeNow;
use crate::{
    key::KeyId,
    limit::{KnownBy, RestCause, Resting, Scope, Status, Unit},
    sync::atomic::Ordering::Relaxed,
};

/// The totals of a pool, and each key: see [`KeyPool::stats`](crate::KeyPool::stats).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct PoolStats {
    /// Keys that are picked.
    pub healthy: usize,
    /// Keys that rest because the service limits them.
    pub rate_limited: usize,
    /// Keys that rest because their quota is used up.
    pub exhausted: usize,
    /// Keys that the service no longer accepts.
    pub revoked: usize,
    /// Keys that requests pass over, since nobody knows yet why the service refused a request with them.
    pub suspected: usize,
    /// Keys that an operator took out of service.
    pub disabled: usize,
    /// Keys with marks that the store does not have yet.
    pub marks_waiting: usize,
    /// Entries of the store that can't be used as a key. Each was logged once, with the reason.
    pub unreadable: usize,
    /// Requests that were sent without a key: to a host that gets none, or without a host. Each host was logged
    /// once, with the reason.
    pub unkeyed: u64,
    /// Requests that have waited for a key.
    pub waited: u64,
    /// How long they have waited together. Serialized in seconds, with a fraction.
    #[cfg_attr(feature = "serde", serde(rename = "waited_for_seconds", serialize_with = "total_seconds"))]
    pub waited_for: Duration,
    /// Limited responses in a pool that is paced or has quotas: those that pacing failed to avoid, and those by which it
    /// finds limits. The number to watch: near 0 if the service's headers are good.
    pub limited_despite_pacing: u64,
    /// Each key, in the order in which they are picked.
    pub keys: Vec<KeyStats>,
}

/// One key: see [`KeyPool::stats`](crate::KeyPool::stats).
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct KeyStats {
    /// Its public name.
    pub id: KeyId,
    /// Whether it is picked, and if not, why.
    pub status: Status,
    /// Who says that it is not picked; `None` if it is.
    pub cause: Option<RestCause>,
    /// How long it still rests; `None` if it doesn't, or until a reset. For a suspected key, the time to its next trial.
    /// Serialized in seconds, with a fraction.
    #[cfg_attr(feature = "serde", serde(rename = "time_left_seconds", serialize_with = "seconds"))]
    pub time_left: Option<Duration>,
    /// The scopes of the key that rest because a response or the store says so, for 5 seconds or more. Shorter waits, and
    /// budgets that are used up, are in [`KeyPool::explain`](crate::KeyPool::explain).
    pub scopes: Vec<ScopeStats>,
    /// Requests that were sent with it.
    pub requests: u64,
    /// Responses that counted against it: 429s, and whatever else the classifier counts.
    pub limited: u64,
    /// How often it came back by itself after a rest.
    pub recovered: u64,
    /// What [`KeyPool::record_usage`](crate::KeyPool::record_usage) credited to it.
    pub tokens: u64,
    /// The HTTP status of the last response that counted against it.
    pub last_reason: Option<u16>,
}

/// A rest of one scope of a key: see [`KeyStats::scopes`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct ScopeStats {
    /// The scope; `(none)` for requests without a scope.
    pub scope: Scope,
    /// Why it rests.
    pub status: Status,
    /// How long it still rests; `None` until a reset. Serialized in seconds, with a fraction.
    #[cfg_attr(feature = "serde", serde(rename = "time_left_seconds", serialize_with = "seconds"))]
    pub time_left: Option<Duration>,
}

/// One scope that requests use: see [`KeyPool::scopes`](crate::KeyPool::scopes).
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct ScopeTotals {
    /// The scope; `None` for requests without one.
    pub scope: Option<Scope>,
    /// Requests that wait for a key.
    pub waiting: usize,
    /// Requests that have no answer yet, of keys with a limit.
    pub in_flight: u64,
    /// What all limits of known budgets still allow together, in requests. `None` if no such budget is known.
    pub requests_left: Option<f64>,
    /// The same in tokens.
    pub tokens_left: Option<f64>,
    /// Limits, of a key or a quota group, that are known from quotas alone.
    pub known_by_quota: usize,
    /// Limits that the service's headers say.
    pub known_by_headers: usize,
    /// Limits that are found by refusals.
    pub known_by_refusals: usize,
    /// Limits whose headers contradicted the service's answers, and are ignored.
    pub distrusted: usize,
    /// Limits of which nothing is known yet.
    pub unknown: usize,
    /// As [`PoolStats::limited_despite_pacing`], since the scope is in use.
    pub limited_despite_pacing: u64,
}

impl Engine {
    /// The scopes that requests use.
    pub(crate) fn scopes(&self) -> Vec<ScopeTotals> {
        let mut totals = Vec::new();
        self.snapshot().scopes.each(|scoped| totals.push(ScopeTotals::of(scoped)));
        totals.sort_by(|one, other| one.scope.cmp(&other.scope));
        totals
    }
}

impl ScopeTotals {
    fn of(scoped: &Scoped) -> Self {
        let mut totals = Self {
            scope: scoped.common.scope().cloned(),
            waiting: scoped.common.waiting.count(),
            in_flight: 0,
            requests_left: None,
            tokens_left: None,
            known_by_quota: 0,
            known_by_headers: 0,
            known_by_refusals: 0,
            distrusted: 0,
            unknown: 0,
            limited_despite_pacing: scoped.common.refused(),
        };
        let now = scoped.now();
        for limit in scoped.limits() {
            totals.in_flight += u64::from(limit.in_flight());
            *match limit.known_by() {
                Some(KnownBy::Quota) => &mut totals.known_by_quota,
                Some(KnownBy::Headers) => &mut totals.known_by_headers,
                Some(KnownBy::Refusals) => &mut totals.known_by_refusals,
                Some(KnownBy::Distrusted) => &mut totals.distrusted,
                None => &mut totals.unknown,
            } += 1;
            let budgets = limit.budgets(now);
            for (unit, sum) in
                [(Unit::Requests, &mut totals.requests_left), (Unit::Tokens, &mut totals.tokens_left)]
            {
                // Of a learned budget and a quota, the smaller one counts.
                let left =
                    budgets.iter().filter(|(_, budget)| budget.unit == unit).map(|(_, budget)| budget.left);
                if let Some(left) = left.reduce(f64::min) {
                    *sum = Some(sum.unwrap_or(0.0) + left.max(0.0));
                }
            }
        }
        totals
    }

    /// As it is recorded.
    #[cfg(feature = "metrics")]
    pub(super) fn now(&self) -> ScopeNow {
        ScopeNow {
            waiting: self.waiting,
            left: [self.requests_left, self.tokens_left].map(Option::unwrap_or_default),
            limits: [self.known_by_quota, self.known_by_headers, self.known_by_refusals, self.distrusted],
        }
    }
}

impl Engine {
    /// The totals, and each key.
    pub(crate) fn stats(&self, unreadable: usize) -> PoolStats {
        let mut keys = Vec::with_capacity(self.snapshot().keys().len());
        let totals = self.look_at_each(unreadable, |key, now| {
            let key = self.key_stats(key, now);
            let status = key.status;
            keys.push(key);
            status
        });
        PoolStats { keys, ..totals }
    }

    /// The totals alone.
    #[cfg(feature = "metrics")]
    pub(crate) fn totals(&self, unreadable: usize) -> PoolStats {
        self.look_at_each(unreadable, |key, now| key.status(now))
    }

    fn look_at_each(
        &self,
        unreadable: usize,
        mut status: impl FnMut(&Arc<Key>, Duration) -> Status,
    ) -> PoolStats {
        // First, so that a key which is shown as healthy is also counted as recovered.
        self.return_all_expired();
        let snapshot = self.snapshot();
        let now = self.config.clock.now();
        let meter = &self.config.meter;
        let (waited, waited_for) = meter.waits();
        let mut totals = PoolStats {
            marks_waiting: snapshot.count_pending(),
            unreadable,
            unkeyed: meter.unkeyed.count(),
            waited,
            waited_for,
            limited_despite_pacing: meter.refused(),
            ..PoolStats::default()
        };
        for key in snapshot.keys() {
            *match status(key, now) {
                Status::Healthy => &mut totals.healthy,
                Status::RateLimited => &mut totals.rate_limited,
                Status::Exhausted => &mut totals.exhausted,
                Status::Revoked => &mut totals.revoked,
                Status::Suspected => &mut totals.suspected,
                Status::Disabled => &mut totals.disabled,
            } += 1;
        }
        totals
    }

    fn key_stats(&self, key: &Arc<Key>, now: Duration) -> KeyStats {
        let status = key.status(now);
        let counts = &key.counts;
        KeyStats {
            id: key.id.clone(),
            status,
            cause: key.cause(now),
            time_left: match status {
                Status::Suspected => self.next_trial_of(key),
                _ => key.state.load().time_left(now),
            },
            scopes: self.scopes_of(key).into_iter().map(scope_stats).collect(),
            requests: counts.requests.sum(),
            limited: counts.limited.load(Relaxed),
            recovered: counts.recovered.load(Relaxed),
            tokens: counts.tokens.sum(),
            last_reason: key.last_status(),
        }
    }
}

fn scope_stats((scope, Resting { until, reason }): (Scope, Resting)) -> ScopeStats {
    ScopeStats { scope, status: reason.status(), time_left: until.left() }
}

#[cfg(feature = "serde")]
pub(super) fn seconds<S: serde::Serializer>(
    time: &Option<Duration>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serde::Serialize::serialize(&time.map(|time| time.as_secs_f64()), serializer)
}

#[cfg(feature = "serde")]
fn total_seconds<S: serde::Serializer>(time: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(time.as_secs_f64())
}
