//! What others change: by a change stream where the deployment has them, by asking regularly elsewhere.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use ::mongodb::{
    bson::{RawBsonRef, RawDocumentBuf},
    change_stream::{ChangeStream, event::ResumeToken},
};
use tokio::{sync::mpsc, time::sleep};

use super::{Inner, error::Failure};
use crate::{key::KeyId, store::Changed};

/// How long until a stream that broke off is begun again.
const BEFORE_ANOTHER_TRY: Duration = Duration::from_millis(500);

/// So often a server may refuse a stream before it is taken to have none: it may be in the middle of an election.
const REFUSALS: u32 = 4;

/// More changes than these at once are as well answered by loading all keys.
const KEYS_AT_ONCE: usize = 1_000;

type Stream = ChangeStream<RawDocumentBuf>;

/// Follows until nobody listens any more.
pub(super) async fn follow(store: Arc<Inner>, changes: mpsc::Sender<Changed>) {
    let mut resume = None;
    let mut refusals = 0;
    while !changes.is_closed() {
        match open(&store, resume.clone()).await {
            Ok(stream) => {
                refusals = 0;
                // What changed before the stream began is in no stream.
                if resume.is_none() && changes.send(Changed::Anything).await.is_err() {
                    return;
                }
                resume = forward(stream, &changes).await;
                pause(&changes, BEFORE_ANOTHER_TRY).await;
            }
            // The server no longer has what it would be resumed from.
            Err(failure) if failure.is_from_server() && resume.is_some() => resume = None,
            Err(failure) if failure.is_from_server() => {
                let poll = store.limits.poll;
                if refusals == REFUSALS {
                    let interval_ms = poll.as_millis() as u64;
                    tracing::info!(%failure, interval_ms, "no change stream: the keys are read regularly");
                }
                pause(&changes, if refusals < REFUSALS { poll.min(BEFORE_ANOTHER_TRY) } else { poll }).await;
                refusals = refusals.saturating_add(1);
                let _ = changes.send(Changed::Anything).await;
            }
            Err(failure) => {
                tracing::debug!(%failure, "no change stream");
                pause(&changes, BEFORE_ANOTHER_TRY).await;
            }
        }
    }
}

async fn pause(changes: &mpsc::Sender<Changed>, time: Duration) {
    tokio::select! {
        () = changes.closed() => {}
        () = sleep(time) => {}
    }
}

async fn open(store: &Inner, resume: Option<ResumeToken>) -> Result<Stream, Failure> {
    let watch = store.keys.watch().pipeline(store.fields.changes());
    let stream = match resume {
        Some(token) => watch.resume_after(token).await?,
        None => watch.await?,
    };
    Ok(stream.with_type())
}

/// Passes on what a stream tells until it breaks off, and says where it can be resumed.
async fn forward(mut stream: Stream, changes: &mpsc::Sender<Changed>) -> Option<ResumeToken> {
    let mut changed = Waiting::default();
    let mut resume = stream.resume_token();
    while stream.is_alive() && !changes.is_closed() {
        // Not in a `select`: it must not be dropped half-way. It comes back after a second at the latest.
        match stream.next_if_any().await {
            Ok(Some(event)) => changed.add(&event),
            Ok(None) => {}
            Err(error) => {
                tracing::debug!(failure = %Failure::from(error), "the change stream broke off");
                return resume.filter(|_| changed.is_empty());
            }
        }
        if let Ok(place) = changes.try_reserve()
            && let Some(changed) = changed.take()
        {
            place.send(changed);
        }
        resume = stream.resume_token();
    }
    // The collection was dropped or renamed: there is nothing to resume.
    None
}

/// Changes that nobody has taken yet.
#[derive(Debug, Default)]
struct Waiting {
    keys: BTreeSet<KeyId>,
    anything: bool,
}

impl Waiting {
    fn add(&mut self, event: &RawDocumentBuf) {
        let key = match event.get_document("documentKey").map(|key| key.get("_id")) {
            Ok(Ok(Some(RawBsonRef::String(id)))) => KeyId::new(id).ok(),
            Ok(_) => None,
            Err(_) => {
                // About the collection as a whole.
                self.anything = true;
                None
            }
        };
        // A document whose id can't be a key's is none, whatever it becomes.
        self.keys.extend(key);
        self.anything |= self.keys.len() > KEYS_AT_ONCE;
    }

    fn is_empty(&self) -> bool {
        self.keys.is_empty() && !self.anything
    }

    fn take(&mut self) -> Option<Changed> {
        let Self { keys, anything } = std::mem::take(self);
        match (anything, keys.is_empty()) {
            (true, _) => Some(Changed::Anything),
            (false, false) => Some(Changed::Keys(keys.into_iter().collect())),
            (false, true) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use ::mongodb::bson::{Document, doc};

    use super::*;

    fn waiting(events: impl IntoIterator<Item = Document>) -> Waiting {
        let mut waiting = Waiting::default();
        for event in events {
            waiting.add(&RawDocumentBuf::try_from(&event).unwrap());
        }
        waiting
    }

    fn of_key(number: usize) -> Document {
        doc! { "documentKey": { "_id": format!("{number:04}") } }
    }

    #[test]
    fn changes_wait_until_they_are_taken() {
        let mut changed = waiting([of_key(1), of_key(2), of_key(1)]);
        assert!(!changed.is_empty());
        let ids = ["0001", "0002"].map(|id| KeyId::new(id).unwrap());
        assert_eq!(changed.take(), Some(Changed::Keys(ids.to_vec())));
        assert!(changed.is_empty());
        assert_eq!(changed.take(), None);
    }

    #[test]
    fn what_is_about_the_collection_changes_anything() {
        for events in [vec![doc! {}], vec![doc! {}, of_key(1)]] {
            let mut changed = waiting(events);
            assert!(!changed.is_empty());
            assert_eq!(changed.take(), Some(Changed::Anything));
        }
    }

    #[test]
    fn up_to_a_thousand_keys_are_named() {
        let taken = |keys| waiting((0..keys).map(of_key)).take();
        assert!(matches!(taken(1_000), Some(Changed::Keys(ids)) if ids.len() == 1_000));
        assert_eq!(taken(1_001), Some(Changed::Anything));
    }

    #[test]
    fn what_can_be_no_key_changes_nothing() {
        assert!(waiting([doc! { "documentKey": { "_id": 7 } }]).is_empty());
    }
}
