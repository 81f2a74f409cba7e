//! Keeps in the store what is left of the quotas' windows, for the time after a restart.

use std::time::Duration;

use tokio::sync::watch;

use super::log::Chain;
use crate::{pool::KeyPool, store::StoreError};

/// The time between two writes. What a process that is killed has used since the last one is forgotten.
const BETWEEN: Duration = Duration::from_secs(1);

/// The next write waits for that many times as long as the last one took.
const WRITING_SHARE: u32 = 20;

/// Runs until `stop` says so, or its sender is gone. Ends at once if no quota has windows, or the store keeps none.
pub(super) async fn keep_quotas(pool: KeyPool, mut stop: watch::Receiver<()>) {
    if pool.link().is_none() || !pool.engine().has_windows() {
        return;
    }
    let clock = pool.clock().clone();
    let (mut last, mut is_failing, mut pause) = (Vec::new(), false, BETWEEN);
    loop {
        let is_told = tokio::select! {
            biased;
            told = stop.changed() => match told {
                Ok(()) => true,
                // Nothing is written then.
                Err(_) => return,
            },
            () = clock.sleep_until(clock.now().saturating_add(pause)) => false,
        };
        let began = clock.now();
        match keep(&pool, &mut last).await {
            Ok(true) => is_failing = false,
            Ok(false) => return,
            Err(error) => {
                // Once an outage, not once a second.
                if !std::mem::replace(&mut is_failing, true) {
                    tracing::warn!(error = %Chain(&error), "what is left of the quotas was not kept");
                }
            }
        }
        if is_told {
            return;
        }
        pause = BETWEEN.max(clock.now().saturating_sub(began).saturating_mul(WRITING_SHARE));
    }
}

/// Returns whether the store keeps it.
async fn keep(pool: &KeyPool, last: &mut Vec<u8>) -> Result<bool, StoreError> {
    // A store that was not read yet may have more.
    let Some(link) = pool.link().filter(|link| link.is_open()) else { return Ok(true) };
    let windows = pool.engine().windows();
    if windows == *last {
        return Ok(true);
    }
    let is_kept = link.store.keep_quotas(windows.clone()).await?;
    *last = windows;
    Ok(is_kept)
}
