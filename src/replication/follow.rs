//! Follows the changes of a store, so that a pool need not wait for its next pass.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
};

use super::loader::Loader;
use crate::{
    key::KeyId,
    pool::Engine,
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

pub(super) struct Follower {
    engine: Arc<Engine>,
    loader: Arc<Loader>,
    changes: mpsc::Receiver<Change>,
    due: Due,
}

impl Follower {
    pub(super) fn new(engine: Arc<Engine>, loader: Arc<Loader>, changes: mpsc::Receiver<Change>) -> Self {
        Self { engine, loader, changes, due: Due::default() }
    }

    /// Runs until the sender of `stop` is gone.
    ///
    /// Words are joined as they come, also during a load: their times count from now. Keys that change during a load are
    /// loaded together.
    pub(super) async fn run(mut self, mut stop: watch::Receiver<()>) {
        let clock = self.engine.config.clock.clone();
        let mut load: Option<Load> = None;
        loop {
            let begins_at = self.due.begins_at().filter(|_| load.is_none());
            tokio::select! {
                biased;
                _ = stop.changed() => return,
                loaded = finished(&mut load) => {
                    self.due.after(&loaded, clock.now());
                    load = None;
                }
                () = clock.sleep_until(begins_at.unwrap_or(Duration::MAX)), if begins_at.is_some() => {
                    load = Some(self.begin(clock.now()));
                }
                change = self.changes.recv() => match change {
                    Some(change) => self.take_in(change),
                    None => {
                        return tracing::warn!("the store no longer tells of changes: only passes load them");
                    }
                },
            }
        }
    }

    fn take_in(&mut self, change: Change) {
        match change {
            Change::Standing(id, standing) if self.engine.hear(&id, &standing) => {}
            Change::Standing(id, _) => _ = self.due.ids.insert(id),
            Change::Keys(ids) => self.due.ids.extend(ids),
            Change::Anything => self.due.all = true,
        }
        if self.due.ids.len() > KEYS_AT_ONCE {
            self.due.ids.clear();
            self.due.all = true;
        }
    }

    /// A load in a task of its own: it must not be dropped half-way, and may panic.
    fn begin(&mut self, now: Duration) -> Load {
        let ids = std::mem::take(&mut self.due.ids);
        let all = self.due.all && self.due.all_not_before <= now;
        self.due.all &= !all;
        let only = (!all).then(|| ids.into_iter().collect());
        let loader = self.loader.clone();
        Load { began: now, all, task: tokio::spawn(async move { loader.load(only).await }) }
    }
}

/// Whether a load went well, when it has ended.
struct Loaded {
    began: Duration,
    all: bool,
    is_ok: bool,
}

async fn finished(load: &mut Option<Load>) -> Loaded {
    match load {
        Some(Load { began, all, task }) => {
            let is_ok = matches!(task.await, Ok(Ok(())));
            Loaded { began: *began, all: *all, is_ok }
        }
        None => std::future::pending().await,
    }
}

impl Due {
    fn begins_at(&self) -> Option<Duration> {
        if !self.ids.is_empty() {
            Some(self.not_before)
        } else if self.all {
            Some(self.not_before.max(self.all_not_before))
        } else {
            None
        }
    }

    fn after(&mut self, loaded: &Loaded, now: Duration) {
        if !loaded.is_ok {
            // Passes report a failure that lasts. What was missed is among all keys.
            (self.all, self.all_not_before) = (true, Duration::ZERO);
            self.ids.clear();
            self.not_before = now.saturating_add(AFTER_A_FAILURE);
        } else if loaded.all {
            let took = now.saturating_sub(loaded.began);
            self.all_not_before = now.saturating_add(took.saturating_mul(LOADING_SHARE));
        }
    }
}
