//! Marks on their way to the store.

use std::sync::Arc;

use super::link::Link;
use crate::{
    limit::Rest,
    meter::Counted,
    pool::{Engine, Key},
    store::{Mark, Operation, StoreError},
    sync::{JoinSet, atomic::Ordering::SeqCst},
};

/// After so many failures in a row the round ends: the store is gone, and each further write would wait for it in its turn.
const FAILURES_IN_A_ROW: usize = 8;

impl Link {
    /// Writes every pending mark. A mark that could not be written stays pending.
    pub(crate) async fn write_marks(self: &Arc<Self>) -> Result<(), StoreError> {
        self.open().await?;
        // One failure must not prevent the rest.
        let ended = self.end_rests_of_served().await;
        let Round { refused, first_error, .. } = self.write_round().await;
        let written = first_error.map_or(ended, Err);
        if refused.is_empty() {
            return written;
        }
        // The store has another key of that id, or none.
        self.load(Some(refused.iter().map(|key| key.id.clone()).collect())).await?;
        let snapshot = self.engine.snapshot();
        let still_refused = refused.iter().find(|key| snapshot.holds(key) && key.has_pending());
        written.and(still_refused.map_or(Ok(()), |key| {
            Err(StoreError::new(format!("the store refuses the marks of key {}, which it has", key.id)))
        }))
    }

    /// Ends the rests of keys that this process had guessed, since the keys serve. What the store rests them for may be
    /// newer than that: then one more response says so.
    async fn end_rests_of_served(self: &Arc<Self>) -> Result<(), StoreError> {
        let mut served = self.engine.take_served().into_iter();
        if served.len() == 0 {
            return Ok(());
        }
        let _turn = self.turn().await.inspect_err(|_| self.engine.put_served_back(served.clone()))?;
        while let Some(key) = served.next() {
            // A newer mark is on its way to the store.
            if !self.engine.snapshot().holds(&key) || key.has_pending() {
                continue;
            }
            match self.operate(&key.id, Operation::Reset(None)).await {
                Ok(Some(standing)) if key.born() == Some(standing.born) => {
                    self.engine.apply_reset(&key, &standing.words, Some(standing.disabled), None);
                }
                Ok(_) => {}
                Err(error) => {
                    self.engine.put_served_back(std::iter::once(key).chain(served));
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    async fn write_round(self: &Arc<Self>) -> Round {
        // Each round continues behind the last one, so that marks which always fail hold up no other mark.
        let mut next = self.round.lock().await;
        let snapshot = self.engine.snapshot().clone();
        let mut round = Round::default();
        let at_once = self.at_once();
        let first = (*next).min(snapshot.keys().len());
        for mut slots in [first..snapshot.keys().len(), 0..first] {
            while round.failures_in_a_row < FAILURES_IN_A_ROW
                && let Some((slot, key)) = snapshot.take_pending(slots.clone())
            {
                slots.start = slot + 1;
                *next = slots.start;
                if round.in_flight.len() == at_once {
                    self.finish_one(&mut round).await;
                }
                round.in_flight.spawn(self.clone().write_mark(key.clone()));
            }
        }
        while self.finish_one(&mut round).await {}
        round
    }

    async fn finish_one(&self, round: &mut Round) -> bool {
        let Some(write) = round.in_flight.join_next().await else { return false };
        // The text of a panic might hold anything.
        match write.unwrap_or_else(|_| Err(StoreError::new("a write panicked"))) {
            Ok(Written::Refused(key)) => round.refused.push(key),
            Ok(Written::Yes { key_failed }) => {
                round.failures_in_a_row = 0;
                self.key_failed.fetch_or(key_failed, SeqCst);
            }
            Err(error) => {
                round.failures_in_a_row += 1;
                round.first_error.get_or_insert(error);
            }
        }
        true
    }

    /// Writes a key's pending mark, and joins the store's answer.
    pub(crate) async fn write_mark(self: Arc<Self>, key: Arc<Key>) -> Result<Written, StoreError> {
        let engine = &self.engine;
        let _put_back = PutBack { engine, key: &key };
        let Some(unwritten) = engine.unwritten(&key) else { return Ok(Written::Yes { key_failed: false }) };
        let Some(born) = key.born() else { return Ok(Written::Refused(key.clone())) };
        let key_failed = unwritten.words.key.is_some_and(|resting| resting.reason > Rest::RateLimited);
        let words = unwritten.words.clone();
        let mark = Mark { id: key.id.clone(), born, words, http_status: key.last_status() };
        let merged = self.store.merge(mark).await.inspect_err(|_| {
            engine.store_failed(Counted::Write);
            tracing::debug!(key = %key.id, "mark not written");
        });
        let Some(standing) = merged? else { return Ok(Written::Refused(key.clone())) };
        engine.join(&key, &standing.words);
        engine.is_written(&key, &unwritten);
        Ok(Written::Yes { key_failed })
    }

    /// Whether the store took a mark of an exhausted or revoked key since the last call.
    pub(crate) fn a_key_has_failed(&self) -> bool {
        self.key_failed.swap(false, SeqCst)
    }
}

#[derive(Default)]
struct Round {
    in_flight: JoinSet<Result<Written, StoreError>>,
    failures_in_a_row: usize,
    first_error: Option<StoreError>,
    refused: Vec<Arc<Key>>,
}

pub(crate) enum Written {
    Yes { key_failed: bool },
    Refused(Arc<Key>),
}

/// Puts a key back into the index of pending marks if it still has one: the write failed, panicked or was dropped.
struct PutBack<'a> {
    engine: &'a Engine,
    key: &'a Arc<Key>,
}

impl Drop for PutBack<'_> {
    fn drop(&mut self) {
        self.engine.refresh(self.key);
    }
}
