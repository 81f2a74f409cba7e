//! Marks on their way to the store.

use std::{sync::Arc, time::Duration};

use super::{KeyPool, key::Key};
use crate::{
    limit::{Rest, State},
    store::{KeyStore, Mark, StoreError},
    sync::{JoinError, JoinSet},
};

/// The most writes under way at once. Where as many in a row have failed, the rest are not tried: the store is gone, and
/// each would wait for it in its turn.
const WRITES_AT_ONCE: usize = 8;

impl KeyPool {
    /// Writes every mark that waits. What could not be written goes on waiting.
    pub(crate) async fn write_marks(&self) -> Result<(), StoreError> {
        let Some(store) = &self.inner.persistence.store else { return Ok(()) };
        self.plant_seeds().await?;
        // What the store refuses each time holds up no other mark for longer than a round.
        let mut next = self.inner.persistence.writing.lock().await;
        let snapshot = self.inner.snapshot.load_full();
        let mut writes = Writes::default();
        let first = (*next).min(snapshot.keys().len());
        for mut slots in [first..snapshot.keys().len(), 0..first] {
            while writes.failures_in_a_row < WRITES_AT_ONCE
                && let Some((slot, key)) = snapshot.take_unwritten(slots.clone())
            {
                slots.start = slot + 1;
                *next = slots.start;
                if writes.under_way.len() == WRITES_AT_ONCE {
                    writes.finish_one().await;
                }
                writes.under_way.spawn(self.clone().write_mark(key.clone(), store.clone()));
            }
        }
        writes.finish().await
    }

    pub(super) async fn write_mark(self, key: Arc<Key>, store: Arc<dyn KeyStore>) -> Result<(), StoreError> {
        let waiting = key.unwritten.rest();
        if waiting == State::HEALTHY {
            return Ok(());
        }
        let persistence = &self.inner.persistence;
        let now = self.now();
        // A rest that is over has nothing to say: it ended before it was written.
        if let Some((rest, left)) = waiting.rest(now) {
            let mark = Mark {
                id: key.id.clone(),
                secret: key.secret(),
                rest,
                left,
                age: Duration::from_nanos(now.saturating_sub(key.unwritten.marked_at())),
                http_status: key.last_status(),
            };
            let returns = PutBack { pool: &self, key: &key };
            store.write(mark).await.inspect_err(|_| tracing::debug!(key = %key.id, "mark not written"))?;
            std::mem::forget(returns);
            if matches!(rest, Rest::Exhausted | Rest::Revoked) {
                persistence.key_failed();
            }
        }
        key.unwritten.acknowledge(waiting, persistence.newest_reload());
        Ok(())
    }
}

#[derive(Default)]
struct Writes {
    under_way: JoinSet<Result<(), StoreError>>,
    failures_in_a_row: usize,
    first_error: Option<StoreError>,
}

impl Writes {
    async fn finish_one(&mut self) -> bool {
        let Some(write) = self.under_way.join_next().await else { return false };
        match finished(write) {
            Ok(()) => self.failures_in_a_row = 0,
            Err(error) => {
                self.failures_in_a_row += 1;
                self.first_error.get_or_insert(error);
            }
        }
        true
    }

    async fn finish(mut self) -> Result<(), StoreError> {
        while self.finish_one().await {}
        self.first_error.map_or(Ok(()), Err)
    }
}

fn finished(write: Result<Result<(), StoreError>, JoinError>) -> Result<(), StoreError> {
    // What a panic says might hold anything.
    write.unwrap_or_else(|_| Err(StoreError::new("a write panicked")))
}

/// Has a key looked at again by whoever writes marks, unless this guard is forgotten: the write failed, panicked or was
/// dropped.
struct PutBack<'a> {
    pool: &'a KeyPool,
    key: &'a Arc<Key>,
}

impl Drop for PutBack<'_> {
    fn drop(&mut self) {
        self.pool.refresh(self.key);
    }
}
