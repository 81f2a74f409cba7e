//! What a pool looks like at one moment.

use std::time::Duration;

use super::{KeyPool, key::Key};
use crate::{key::KeyId, limit::Status, sync::atomic::Ordering::Relaxed};

/// The totals of a pool, and each key: see [`KeyPool::stats`].
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
    /// Marks that the store does not have yet.
    pub marks_waiting: usize,
    /// What the store holds that can't be used as a key. Each was logged once, with the reason.
    pub unreadable: usize,
    /// Each key, in the order in which they are picked.
    pub keys: Vec<KeyStats>,
}

/// One key: see [`KeyPool::stats`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct KeyStats {
    /// Its public name.
    pub id: KeyId,
    /// What it is good for.
    pub status: Status,
    /// How long it still rests; `None` where it doesn't, or not for a time of its own. Serialized in
    /// seconds, with a fraction.
    #[cfg_attr(feature = "serde", serde(rename = "time_left_seconds", serialize_with = "seconds"))]
    pub time_left: Option<Duration>,
    /// Requests that were sent with it.
    pub requests: u64,
    /// Responses that spoke against it: 429s, and whatever else the classifier counts.
    pub limited: u64,
    /// How often it came back by itself after a rest.
    pub recovered: u64,
    /// What [`KeyPool::record_usage`] credited to it.
    pub tokens: u64,
    /// The last response that spoke against it, as its HTTP status.
    pub last_reason: Option<u16>,
}

impl KeyPool {
    /// The totals, and each key. Takes a time that grows with the number of keys; requests don't notice.
    ///
    /// ```
    /// use tower_key_rotation::{KeyPool, Status};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let pool = KeyPool::builder().key("alpha", "sk-1").build()?;
    /// let stats = pool.stats();
    /// assert_eq!((stats.healthy, stats.rate_limited), (1, 0));
    /// assert_eq!(stats.keys[0].id.as_str(), "alpha");
    /// assert_eq!(stats.keys[0].status, Status::Healthy);
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn stats(&self) -> PoolStats {
        let mut keys = Vec::with_capacity(self.len());
        let totals = self.look_at_each(|key, now| {
            let key = key_stats(key, now);
            let status = key.status;
            keys.push(key);
            status
        });
        PoolStats { keys, ..totals }
    }

    /// The same without each key.
    #[cfg(feature = "metrics")]
    pub(crate) fn totals(&self) -> PoolStats {
        self.look_at_each(|key, now| key.state.load().status(now))
    }

    fn look_at_each(&self, mut status: impl FnMut(&Key, u64) -> Status) -> PoolStats {
        let snapshot = self.inner.snapshot.load();
        let now = self.now();
        // So that a key which is said to be healthy is also said to have come back.
        self.return_all_expired(&snapshot, now);
        let mut totals = PoolStats {
            marks_waiting: snapshot.count_unwritten(),
            unreadable: self.inner.persistence.complaints.count(),
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
}

fn key_stats(key: &Key, now: u64) -> KeyStats {
    let state = key.state.load();
    let counts = &key.counts;
    KeyStats {
        id: key.id.clone(),
        status: state.status(now),
        time_left: state.rest(now).and_then(|(_, left)| left),
        requests: counts.requests.sum(),
        limited: counts.limited.load(Relaxed),
        recovered: counts.recovered.load(Relaxed),
        tokens: counts.tokens.sum(),
        last_reason: key.last_status(),
    }
}

#[cfg(feature = "serde")]
fn seconds<S: serde::Serializer>(time: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
    serde::Serialize::serialize(&time.map(|time| time.as_secs_f64()), serializer)
}

#[cfg(all(test, feature = "serde"))]
mod tests {
    use super::*;

    #[test]
    fn they_serialize_by_names_that_say_the_unit_and_without_a_secret() {
        let pool = KeyPool::builder().key("alpha", "sk-canary").build().unwrap();
        let shown = serde_json::to_value(pool.stats()).unwrap();
        assert_eq!(
            shown,
            serde_json::json!({
                "healthy": 1, "rate_limited": 0, "exhausted": 0, "revoked": 0, "disabled": 0,
                "marks_waiting": 0, "unreadable": 0,
                "keys": [{
                    "id": "alpha", "status": "healthy", "time_left_seconds": null, "requests": 0, "limited": 0,
                    "recovered": 0, "tokens": 0, "last_reason": null,
                }],
            })
        );
    }
}
