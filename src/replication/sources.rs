//! Follows a source of keys: reads it when it has changed, before a secret expires, and when a request asks for it.

use std::{future::Future, sync::Arc, time::Duration};

use tokio::sync::watch;

use super::log::Chain;
use crate::{
    clock::Clock,
    pool::{KeyPool, Source, Taken},
};

/// The shortest time from one read to the next that nobody asked for.
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);

/// The time until a read is repeated that failed, or was not taken over; it doubles up to the longest.
const AFTER_A_FAILURE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Runs until `stop` says so, or its sender is gone. It never stops while keys are taken over.
pub(super) async fn follow_source(pool: KeyPool, source: Arc<Source>, mut stop: watch::Receiver<()>) {
    let _one_at_a_time = tokio::select! {
        biased;
        _ = stop.changed() => return,
        following = source.following.lock() => following,
    };
    let _followed = source.is_followed();
    let mut following = Following { clock: pool.clock().clone(), pool, source: source.clone(), failures: 0 };
    let mut retry_at = None;
    loop {
        tokio::select! {
            biased;
            _ = stop.changed() => return,
            () = following.until_due(retry_at) => {}
        }
        let read = tokio::select! {
            biased;
            _ = stop.changed() => return,
            read = following.expiring(source.read(&*following.clock)) => read,
        };
        retry_at = match read {
            Ok(read) => {
                let taken = following.expiring(following.pool.take_over(&source, &read)).await;
                following.take(&taken)
            }
            Err(error) => following.fail(Chain(&error).to_string()),
        };
        source.answer();
    }
}

struct Following {
    clock: Arc<dyn Clock>,
    pool: KeyPool,
    source: Arc<Source>,
    failures: u32,
}

impl Following {
    /// Completes when the source is to be read. Keys leave the pool meanwhile when their secrets expire.
    async fn until_due(&self, retry_at: Option<Duration>) {
        let earliest = self.clock.now().saturating_add(SHORTEST_PAUSE);
        // After a failure, the time for a renewal has passed.
        let due = retry_at.or_else(|| self.source.renew_at());
        let changed = async {
            self.source.changed().await;
            self.clock.sleep_until(earliest).await;
        };
        let waiting = async {
            tokio::select! {
                biased;
                () = self.source.asked() => {}
                () = changed => {}
                () = self.sleep_until(due) => {}
            }
        };
        self.expiring(waiting).await;
    }

    /// Waits for a future, and takes keys out of the pool meanwhile when their secrets expire.
    async fn expiring<T>(&self, future: impl Future<Output = T>) -> T {
        let mut future = std::pin::pin!(future);
        loop {
            tokio::select! {
                biased;
                output = &mut future => return output,
                () = self.sleep_until(self.source.expires_at()) => {
                    for key in self.pool.engine().expire(&self.source) {
                        tracing::warn!(source = %self.source.name(), %key, "the key's secret has expired, and the key leaves the pool until the source has another one");
                    }
                }
            }
        }
    }

    async fn sleep_until(&self, deadline: Option<Duration>) {
        match deadline {
            Some(deadline) => self.clock.sleep_until(deadline).await,
            None => std::future::pending().await,
        }
    }

    /// Says what was taken over. Returns when to read again, whether or not anything changes until then.
    fn take(&mut self, taken: &Taken) -> Option<Duration> {
        let source = self.source.clone();
        let name = source.name();
        for rejected in self.source.note_rejected(&taken.rejected) {
            tracing::warn!(source = %name, "key rejected: {rejected}");
        }
        let Taken { added, replaced, renewed, removed, .. } = *taken;
        if added + replaced + renewed + removed > 0 {
            tracing::info!(source = %name, added, replaced, renewed, removed, "keys of a source taken over");
        }
        if taken.failures.is_empty() {
            self.failures = 0;
            if self.source.note_error(None) {
                tracing::info!(source = %name, "the source can be used again");
            }
            return None;
        }
        let failures = taken.failures.join("; ");
        let retry_at = self.fail(failures);
        retry_at.filter(|_| taken.has_store_failed || self.source.renew_at().is_some())
    }

    /// Logs a failure once, until another one comes or none. Returns when to read again.
    fn fail(&mut self, error: String) -> Option<Duration> {
        let error: String = error.chars().take(400).collect();
        if self.source.note_error(Some(error.clone())) {
            tracing::warn!(source = %self.source.name(), error, "the source could not be used, and its keys stay as they are");
        }
        let pause = AFTER_A_FAILURE.saturating_mul(1 << self.failures.min(6)).min(LONGEST_PAUSE);
        self.failures += 1;
        // Half to all of it, at random.
        let pause = pause / 2 + pause.mul_f64(fastrand::f64() / 2.0);
        Some(self.clock.now().saturating_add(pause))
    }
}
