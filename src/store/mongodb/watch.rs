//! Changes by others: from a change stream if the deployment has them, otherwise by asking regularly.

use std::{
    collections::{BTreeMap, BTreeSet},
    future::poll_fn,
    pin::{Pin, pin},
    sync::Arc,
    task::Poll,
    time::Duration,
};

use ::mongodb::{
    bson::{RawBsonRef, RawDocument, RawDocumentBuf},
    change_stream::{ChangeStream, event::ResumeToken},
};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep},
};

use super::{document, error::Failure, fields::ours, inner::Inner, rendered};
use crate::{
    key::KeyId,
    store::{Change, Standing},
};

/// The pause before a stream that broke off is opened again.
const BEFORE_ANOTHER_TRY: Duration = Duration::from_millis(500);

/// The pause between two commands that read a stream. Without it, each change would be answered with a command of each
/// process.
const BETWEEN_BATCHES: Duration = Duration::from_millis(100);

/// A server that refuses a stream this often has none. Before that, it may be in the middle of an election.
const REFUSALS: u32 = 4;

/// More changed keys than these are as well answered by loading all.
const KEYS_AT_ONCE: usize = 1_000;

type Stream = ChangeStream<RawDocumentBuf>;

/// Follows until nobody listens any more.
pub(super) async fn follow(store: Arc<Inner>, changes: mpsc::Sender<Change>) {
    let mut resume = None;
    let mut refusals = 0;
    while !changes.is_closed() {
        match open(&store, resume.clone()).await {
            Ok(stream) => {
                refusals = 0;
                // Changes from before the stream began are in no stream.
                if resume.is_none() && changes.send(Change::Anything).await.is_err() {
                    return;
                }
                resume = forward(&store, stream, &changes).await;
                pause(&changes, BEFORE_ANOTHER_TRY).await;
            }
            // The server no longer has the place to resume from.
            Err(failure) if failure.is_from_server() && resume.is_some() => resume = None,
            Err(failure) if failure.is_from_server() => {
                let poll = store.limits.poll;
                if refusals == REFUSALS {
                    let interval_ms = poll.as_millis() as u64;
                    tracing::info!(%failure, interval_ms, "no change stream: the keys are read regularly");
                }
                pause(&changes, if refusals < REFUSALS { poll.min(BEFORE_ANOTHER_TRY) } else { poll }).await;
                refusals = refusals.saturating_add(1);
                let _ = changes.send(Change::Anything).await;
            }
            Err(failure) => {
                tracing::debug!(%failure, "no change stream");
                pause(&changes, BEFORE_ANOTHER_TRY).await;
            }
        }
    }
}

async fn pause(changes: &mpsc::Sender<Change>, time: Duration) {
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

/// Passes a stream on until it breaks off. Returns the place to resume it at.
async fn forward(store: &Inner, mut stream: Stream, changes: &mpsc::Sender<Change>) -> Option<ResumeToken> {
    let mut delivery = Delivery { store, changes, waiting: Waiting::default() };
    let mut resume = stream.resume_token();
    while stream.is_alive() && !changes.is_closed() {
        let (event, takes_a_command) = delivery.next(&mut stream).await;
        let event = match event {
            Ok(event) => event,
            Err(error) => {
                tracing::debug!(failure = %Failure::from(error), "the change stream broke off");
                return resume.filter(|_| delivery.waiting.is_empty());
            }
        };
        if let Some(event) = event {
            delivery.waiting.add(&event);
            if takes_a_command {
                delivery.until(pin!(sleep(BETWEEN_BATCHES))).await;
            }
        }
        resume = stream.resume_token();
    }
    // The collection was dropped or renamed: there is nothing to resume.
    None
}

struct Delivery<'a> {
    store: &'a Inner,
    changes: &'a mpsc::Sender<Change>,
    waiting: Waiting,
}

impl Delivery<'_> {
    /// The next event, if there is one within a second, and whether it took a command to get it.
    async fn next(
        &mut self,
        stream: &mut Stream,
    ) -> (::mongodb::error::Result<Option<RawDocumentBuf>>, bool) {
        // To its end: a driver's future must not be dropped half-way.
        let mut next = pin!(stream.next_if_any());
        match poll_fn(|context| Poll::Ready(next.as_mut().poll(context))).await {
            Poll::Ready(event) => (event, false),
            Poll::Pending => (self.until(next).await, true),
        }
    }

    /// Delivers changes until something else has ended.
    async fn until<T>(&mut self, mut end: Pin<&mut impl Future<Output = T>>) -> T {
        loop {
            tokio::select! {
                biased;
                output = end.as_mut() => return output,
                place = self.changes.reserve(), if !self.waiting.is_empty() => match (place, self.waiting.take()) {
                    (Ok(place), Some(change)) => place.send(from_now(change, self.store.clock.latest(Instant::now()))),
                    _ => self.waiting = Waiting::default(),
                },
            }
        }
    }
}

/// Changes that nobody has taken yet.
#[derive(Debug, Default)]
struct Waiting {
    /// With words that count from the epoch. The last one of a key is all that matters.
    standings: BTreeMap<KeyId, Standing>,
    keys: BTreeSet<KeyId>,
    anything: bool,
}

impl Waiting {
    fn add(&mut self, event: &RawDocument) {
        let id = match event.get_document("documentKey").map(|key| key.get("_id")) {
            Ok(Ok(Some(RawBsonRef::String(id)))) => KeyId::new(id).ok(),
            Ok(_) => None,
            Err(_) => {
                // About the collection as a whole.
                self.anything = true;
                None
            }
        };
        // A document whose id cannot be a key's is none, whatever becomes of it.
        let Some(id) = id else { return };
        match event.get_str(ours::WORDS).ok().and_then(rendered::parse) {
            Some(standing) => _ = self.standings.insert(id, standing),
            None => _ = self.keys.insert(id),
        }
        self.anything |= self.keys.len() > KEYS_AT_ONCE;
    }

    fn is_empty(&self) -> bool {
        self.standings.is_empty() && self.keys.is_empty() && !self.anything
    }

    fn take(&mut self) -> Option<Change> {
        if self.anything {
            *self = Self::default();
            return Some(Change::Anything);
        }
        if let Some((id, standing)) = self.standings.pop_first() {
            return Some(Change::Standing(id, standing));
        }
        let keys = std::mem::take(&mut self.keys);
        (!keys.is_empty()).then(|| Change::Keys(keys.into_iter().collect()))
    }
}

/// Words that count from now. If the server's time is not known, the key has to be loaded.
fn from_now(change: Change, server_time: Option<Duration>) -> Change {
    match (change, server_time) {
        (Change::Standing(id, standing), Some(time)) => {
            Change::Standing(id, document::from_now(standing, time))
        }
        (Change::Standing(id, _), None) => Change::Keys(vec![id]),
        (change, _) => change,
    }
}

#[cfg(test)]
mod tests {
    use ::mongodb::bson::{Document, doc};

    use super::*;
    use crate::{
        limit::{Rest, Resting, Until, Words},
        store::Born,
    };

    fn waiting(events: impl IntoIterator<Item = Document>) -> Waiting {
        let mut waiting = Waiting::default();
        for event in events {
            waiting.add(&RawDocumentBuf::try_from(&event).unwrap());
        }
        waiting
    }

    fn edited(number: usize) -> Document {
        doc! { "documentKey": { "_id": format!("{number:04}") } }
    }

    fn id(number: usize) -> KeyId {
        KeyId::new(format!("{number:04}")).unwrap()
    }

    fn marked(number: usize, until: u32) -> Document {
        let mut event = edited(number);
        event.insert("words", format!("00000000000000ff\u{1f}3\u{1f}{until}000\u{1f}1\u{1f}"));
        event
    }

    fn limited(seconds: u64) -> Standing {
        let resting =
            Resting { until: Until::After(Duration::from_secs(seconds)), reason: Rest::RateLimited };
        Standing::new(Born(255), Words { generation: 3, key: Some(resting), ..Words::default() }, false)
    }

    #[test]
    fn foreign_edits_are_collected_and_taken_together() {
        let mut changed = waiting([edited(1), edited(2), edited(1)]);
        assert!(!changed.is_empty());
        assert_eq!(changed.take(), Some(Change::Keys(vec![id(1), id(2)])));
        assert!(changed.is_empty());
        assert_eq!(changed.take(), None);
    }

    #[test]
    fn own_writes_carry_words_and_the_last_counts() {
        let mut changed = waiting([marked(1, 100), marked(1, 120)]);
        let change = changed.take().unwrap();
        assert_eq!(change, Change::Standing(id(1), limited(120)));
        assert!(changed.is_empty());
        let second = Duration::from_secs(1);
        assert_eq!(from_now(change.clone(), Some(90 * second)), Change::Standing(id(1), limited(30)));
        assert_eq!(from_now(change, None), Change::Keys(vec![id(1)]));
    }

    #[test]
    fn spoiled_words_lead_to_a_load() {
        let mut event = edited(1);
        event.insert("words", "anything");
        assert_eq!(waiting([event]).take(), Some(Change::Keys(vec![id(1)])));
    }

    #[test]
    fn an_event_about_the_collection_changes_anything() {
        for events in [vec![doc! {}], vec![doc! {}, edited(1)]] {
            let mut changed = waiting(events);
            assert_eq!(changed.take(), Some(Change::Anything));
            assert!(changed.is_empty());
        }
    }

    #[test]
    fn up_to_a_thousand_keys_are_named() {
        let taken = |keys| waiting((0..keys).map(edited)).take();
        assert!(matches!(taken(1_000), Some(Change::Keys(ids)) if ids.len() == 1_000));
        assert_eq!(taken(1_001), Some(Change::Anything));
    }

    #[test]
    fn documents_that_are_no_keys_change_nothing() {
        assert!(waiting([doc! { "documentKey": { "_id": 7 } }]).is_empty());
    }
}
