//! What a pool looks like at one moment.

use std::{sync::Arc, time::Duration};

use super::{engine::Engine, key::Key};
use crate::{
    key::KeyId,
    limit::{Resting, Scope, Status},
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
    /// Keys that an operator took out of service.
    pub disabled: usize,
    /// Keys with marks that the store does not have yet.
    pub marks_waiting: usize,
    /// Entries of the store that can't be used as a key. Each was logged once, with the reason.
    pub unreadable: usize,
    /// Requests that were sent without a key: to a host that gets none, or without a host. Each host was logged
    /// once, with the reason.
    pub unkeyed: u64,
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
    /// How long it still rests; `None` if it doesn't, or until a reset. Serialized in seconds, with a fraction.
    #[cfg_attr(feature = "serde", serde(rename = "time_left_seconds", serialize_with = "seconds"))]
    pub time_left: Option<Duration>,
    /// The scopes of the key that rest.
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
    /// The scope.
    pub scope: Scope,
    /// Why it rests.
    pub status: Status,
    /// How long it still rests; `None` until a reset. Serialized in seconds, with a fraction.
    #[cfg_attr(feature = "serde", serde(rename = "time_left_seconds", serialize_with = "seconds"))]
    pub time_left: Option<Duration>,
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
        self.look_at_each(unreadable, |key, now| key.state.load().status(now))
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
        let mut totals = PoolStats {
            marks_waiting: snapshot.count_pending(),
            unreadable,
            unkeyed: self.config.meter.unkeyed.count(),
            ..PoolStats::default()
        };
        for key in snapshot.keys() {
            *match status(key, now) {
                Status::Healthy => &mut totals.healthy,
                Status::RateLimited => &mut totals.rate_limited,
                Status::Exhausted => &mut totals.exhausted,
                Status::Revoked => &mut totals.revoked,
                Status::Disabled => &mut totals.disabled,
            } += 1;
        }
        totals
    }

    fn key_stats(&self, key: &Arc<Key>, now: Duration) -> KeyStats {
        let state = key.state.load();
        let counts = &key.counts;
        KeyStats {
            id: key.id.clone(),
            status: state.status(now),
            time_left: state.time_left(now),
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
fn seconds<S: serde::Serializer>(time: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
    serde::Serialize::serialize(&time.map(|time| time.as_secs_f64()), serializer)
}
