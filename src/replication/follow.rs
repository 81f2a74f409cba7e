//! Follows the changes of a store, so that a pool need not wait for its next pass.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
};

use super::link::Link;
use crate::{
    key::KeyId,
    store::{Change, StoreError},
};

/// After a failed load, the time until all keys are loaded.
const AFTER_A_FAILURE: Duration = Duration::from_secs(1);

/// After a load of all keys, the next one waits for that many times as long as it took: even with very many keys, loads
/// take a small part of the time.
const LOADING_SHARE: u32 = 10;

/// More changed keys than these are as well answered by loading all.
const KEYS_AT_ONCE: usize = 1_000;

/// What has to be loaded.
#[derive(Default)]
struct Due {
    ids: BTreeSet<KeyId>,
    all: bool,
    /// When a load may begin: any, and one of all keys.
    not_before: Duration,
    all_not_before: Duration,
}

struct Load {
    began: Duration,
    all: bool,
    task: JoinHandle<Result<(), StoreError>>,
}

/// Follows the changes until the sender of `stop` is gone.
///
/// Words are joined as they come, also during a load: their times count from now. Keys that change during a load are
/// loaded together.
pub(super) async fn follow(
    link: Arc<Link>,
    mut changes: mpsc::Receiver<Change>,
    mut stop: watch::Receiver<()>,
) {
    let clock = link.engine.config.clock.clone();
    let mut due = Due::default();
    let mut load: Option<Load> = None;
    loop {
        let begins_at = due.begins_at().filter(|_| load.is_none());
        tokio::select! {
            biased;
            _ = stop.changed() => return,
            is_ok = finished(&mut load) => if let Some(load) = load.take() {
                due.after(&load, is_ok, clock.now());
            },
            () = clock.sleep_until(begins_at.unwrap_or(Duration::MAX)), if begins_at.is_some() => {
                load = Some(due.begin(&link, clock.now()));
            }
            change = changes.recv() => match change {
                Some(Change::Standing(id, standing)) if link.engine.hear(&id, &standing) => {}
                Some(change) => due.add(change),
                None => {
                    return tracing::warn!("the store no longer tells of changes: only passes load them");
                }
            },
        }
    }
}

/// Whether a load went well, when it has ended.
async fn finished(load: &mut Option<Load>) -> bool {
    match load {
        Some(load) => matches!((&mut load.task).await, Ok(Ok(()))),
        None => std::future::pending().await,
    }
}

impl Due {
    fn add(&mut self, change: Change) {
        match change {
            Change::Standing(id, _) => _ = self.ids.insert(id),
            Change::Keys(ids) => self.ids.extend(ids),
            Change::Anything => self.all = true,
        }
        self.all |= self.ids.len() > KEYS_AT_ONCE;
    }

    /// A load in a task of its own: it must not be dropped half-way, and may panic.
    fn begin(&mut self, link: &Arc<Link>, now: Duration) -> Load {
        let ids = std::mem::take(&mut self.ids);
        let all = self.all && self.all_not_before <= now;
        self.all &= !all;
        let only = (!all).then(|| ids.into_iter().collect());
        let link = link.clone();
        Load { began: now, all, task: tokio::spawn(async move { link.load(only).await }) }
    }

    fn begins_at(&self) -> Option<Duration> {
        if !self.ids.is_empty() {
            Some(self.not_before)
        } else if self.all {
            Some(self.not_before.max(self.all_not_before))
        } else {
            None
        }
    }

    fn after(&mut self, load: &Load, is_ok: bool, now: Duration) {
        if !is_ok {
            // Passes report a failure that lasts. What was missed is among all keys.
            (self.all, self.all_not_before) = (true, Duration::ZERO);
            self.ids.clear();
            self.not_before = now.saturating_add(AFTER_A_FAILURE);
        } else if load.all {
            let took = now.saturating_sub(load.began);
            self.all_not_before = now.saturating_add(took.saturating_mul(LOADING_SHARE));
        }
    }
}
