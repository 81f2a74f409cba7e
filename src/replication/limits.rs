//! Exchanges messages with the other processes about the limits of the keys, once a second.

use std::{pin::pin, time::Duration};

use tokio::sync::watch;

use super::{link::Link, log::Chain};
use crate::{
    limit::nanos,
    pool::{KeyPool, Lender},
    store::{StoreError, StoreFuture},
};

/// The mean time between two messages.
const BETWEEN: Duration = Duration::from_secs(1);

/// How soon a pool that was idle notices requests.
const IDLE: Duration = Duration::from_millis(250);

/// Runs until `stop` says so, or its sender is gone. Ends at once if the pool learns no limits, or the store keeps no
/// messages.
///
/// No request waits for any of this, and none fails if the store does.
pub(super) async fn share_limits(pool: KeyPool, mut stop: watch::Receiver<()>) {
    let Some(link) = pool.link().filter(|_| pool.engine().learns()) else { return };
    // A pool has one voice, however many handles it has.
    let _turn = tokio::select! {
        _ = stop.changed() => return,
        turn = link.sharing.lock() => turn,
    };
    let mut exchange =
        Exchange { pool: &pool, link, lender: Lender::new(), last: Vec::new(), is_failing: false };
    let clock = pool.clock();
    let mut pause = Duration::ZERO;
    let is_told = loop {
        tokio::select! {
            biased;
            told = stop.changed() => break told.is_ok(),
            () = clock.sleep_until(clock.now().saturating_add(pause)) => {}
        }
        if exchange.lender.is_idle(pool.engine()) {
            pause = IDLE;
            continue;
        }
        let began = clock.now();
        tokio::select! {
            biased;
            told = stop.changed() => break told.is_ok(),
            keeps_messages = exchange.make() => if !keeps_messages { return },
        }
        // With jitter, so that processes which start together do not come together.
        let between = BETWEEN.mul_f64(0.9 + 0.2 * fastrand::f64());
        pause = between.saturating_sub(clock.now().saturating_sub(began));
    };
    // If this is lost, the others notice within seconds.
    if let Some(message) = exchange.lender.farewell(pool.engine()).filter(|_| is_told) {
        let _ = link.store.publish(exchange.lender.me(), message).await;
    }
}

struct Exchange<'a> {
    pool: &'a KeyPool,
    link: &'a Link,
    lender: Lender,
    /// The newest message.
    last: Vec<u8>,
    is_failing: bool,
}

impl Exchange<'_> {
    /// Reads the others' messages, and publishes one. Returns whether the store keeps messages.
    async fn make(&mut self) -> bool {
        let made = self.try_to_make().await;
        // Once an outage, not once a second.
        let was_failing = std::mem::replace(&mut self.is_failing, made.is_err());
        if let Err(error) = &made {
            self.lender.store_failed(self.pool.engine());
            if !was_failing {
                tracing::warn!(error = %Chain(error), "limits are not shared with other processes meanwhile");
            }
        }
        made.unwrap_or(true)
    }

    async fn try_to_make(&mut self) -> Result<bool, StoreError> {
        let (store, me) = (&self.link.store, self.lender.me());
        if self.is_failing && !self.last.is_empty() {
            // Whoever cannot be heard must not act on what it hears.
            let again = store.publish(me, self.last.clone());
            self.answer(again).await?;
        }
        let read_at = self.pool.clock().now();
        let Some(heard) = self.answer(store.messages()).await? else { return Ok(false) };
        self.lender.hear(self.pool.engine(), heard, nanos(read_at));
        if let Some(message) = self.lender.tick(self.pool.engine()) {
            self.last.clone_from(&message);
            self.answer(store.publish(me, message)).await?;
        }
        Ok(true)
    }

    /// Awaits the store. While it does not answer, the pool goes on without it.
    async fn answer<T>(&mut self, answer: StoreFuture<'_, T>) -> Result<T, StoreError> {
        let clock = self.pool.clock();
        let mut answer = pin!(answer);
        loop {
            tokio::select! {
                biased;
                answer = &mut answer => return answer,
                () = clock.sleep_until(clock.now().saturating_add(BETWEEN)) => {
                    self.lender.store_failed(self.pool.engine());
                }
            }
        }
    }
}

/// Also after a panic: no request may wait for a process that does not know of it.
impl Drop for Exchange<'_> {
    fn drop(&mut self) {
        self.lender.end(self.pool.engine());
    }
}
