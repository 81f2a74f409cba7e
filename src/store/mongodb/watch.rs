//! Changes by others: from a change stream if the deployment has them, otherwise by asking regularly.

use std::{future::poll_fn, pin::pin, sync::Arc, task::Poll, time::Duration};

use ::mongodb::{
    action::Action,
    bson::{RawDocument, RawDocumentBuf, Timestamp, doc},
    change_stream::{ChangeStream, event::ResumeToken},
};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, timeout},
};

use super::{
    document,
    error::Failure,
    fields::ours,
    inner::{Inner, primary},
    rendered,
};
use crate::store::Change;

/// The pause before another try to open a stream.
const BEFORE_ANOTHER_TRY: Duration = Duration::from_millis(500);

/// The pause between two commands that read a stream. Without it, each change would be answered with a command of each
/// process.
const BETWEEN_BATCHES: Duration = Duration::from_millis(400);

/// The pause before a stream that broke off is opened again.
const BEFORE_OPENING_AGAIN: Duration = Duration::from_millis(100);

/// A server that refuses a stream this often has none. Before that, it may be in the middle of an election.
const REFUSALS: u32 = 4;

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
                pause(&changes, BEFORE_OPENING_AGAIN).await;
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
    let _ = timeout(time, changes.closed()).await;
}

async fn open(store: &Inner, resume: Option<ResumeToken>) -> Result<Stream, Failure> {
    let watch = store.keys.watch().pipeline(store.fields.changes());
    let stream = match resume {
        Some(token) => watch.resume_after(token).await?,
        None => {
            watch
                .optional(after_last_acknowledged(store).await?, |watch, time| {
                    watch.start_at_operation_time(time)
                })
                .await?
        }
    };
    Ok(stream.with_type())
}

/// The moment after the last operation that a majority has acknowledged; `None` if the deployment has no change streams.
///
/// Left to itself, a stream begins after the last operation that the primary has applied. A load shows what a majority has
/// acknowledged, and so lacks what the primary has applied just before: that would be seen in neither.
async fn after_last_acknowledged(store: &Inner) -> Result<Option<Timestamp>, Failure> {
    let read = doc! {
        "find": store.keys.name(),
        "projection": { "_id": 1 },
        "limit": 1,
        "singleBatch": true,
        "readConcern": { "level": "majority" },
    };
    let answer = store.database.run_command(read).selection_criteria(primary()).await?;
    let acknowledged = answer.get_timestamp("operationTime").ok();
    // The moment after it: a load shows that operation itself.
    Ok(acknowledged.map(|time| Timestamp { increment: time.increment.saturating_add(1), ..time }))
}

/// Passes a stream on until it breaks off. Returns the place to resume it at.
async fn forward(store: &Inner, mut stream: Stream, changes: &mpsc::Sender<Change>) -> Option<ResumeToken> {
    let mut resume = stream.resume_token();
    while stream.is_alive() && !changes.is_closed() {
        let (event, took_a_command) = next(&mut stream).await;
        let event = match event {
            Ok(event) => event,
            Err(error) => {
                tracing::debug!(failure = %Failure::from(error), "the change stream broke off");
                return resume;
            }
        };
        if let Some(event) = event {
            // The place first: what is left of a rest counts from the moment at which it is sent.
            let place = changes.reserve().await.ok()?;
            if let Some(change) = change_in(&event, store.clock.latest(Instant::now())) {
                place.send(change);
            }
            if took_a_command {
                sleep(BETWEEN_BATCHES).await;
            }
        }
        resume = stream.resume_token();
    }
    // The collection was dropped or renamed: there is nothing to resume.
    None
}

/// The next event, if there is one within a second, and whether it took a command to get it.
async fn next(stream: &mut Stream) -> (::mongodb::error::Result<Option<RawDocumentBuf>>, bool) {
    // To its end: a driver's future must not be dropped half-way.
    let mut next = pin!(stream.next_if_any());
    match poll_fn(|context| Poll::Ready(next.as_mut().poll(context))).await {
        Poll::Ready(event) => (event, false),
        Poll::Pending => (next.await, true),
    }
}

/// What an event says, at that time of the server. If the time is not known, the key has to be loaded. A document whose
/// id cannot be a key's is none, whatever becomes of it.
fn change_in(event: &RawDocument, server_time: Option<Duration>) -> Option<Change> {
    let Ok(document) = event.get_document("documentKey") else {
        // About the collection as a whole.
        return Some(Change::Anything);
    };
    let id = document::id(document)?;
    let standing = event.get_str(ours::WORDS).ok().and_then(rendered::parse);
    Some(match standing.zip(server_time) {
        Some((standing, now)) => Change::Standing(id, document::from_now(standing, now)),
        None => Change::Keys(vec![id]),
    })
}

#[cfg(test)]
mod tests {
    use ::mongodb::bson::Document;

    use super::*;
    use crate::{
        key::KeyId,
        limit::{Rest, Resting, Until, Words},
        store::{Born, Standing},
    };

    fn change(event: Document, server_time: Option<u64>) -> Option<Change> {
        change_in(&RawDocumentBuf::try_from(&event).unwrap(), server_time.map(Duration::from_secs))
    }

    #[test]
    fn a_change_carries_words_or_names_what_to_load() {
        let alpha = || KeyId::new("alpha").unwrap();
        let written = |words: &str| doc! { "documentKey": { "_id": "alpha" }, "words": words };
        let words = "00000000000000ff\u{1f}3\u{1f}120000\u{1f}1\u{1f}";
        let resting = Resting { until: Until::After(Duration::from_secs(30)), reason: Rest::RateLimited };
        let limited = Words { generation: 3, key: Some(resting), ..Words::default() };
        let standing = Standing::new(Born(255), limited, false);
        assert_eq!(change(written(words), Some(90)), Some(Change::Standing(alpha(), standing)));

        assert_eq!(change(written(words), None), Some(Change::Keys(vec![alpha()])));
        assert_eq!(change(written("anything"), Some(90)), Some(Change::Keys(vec![alpha()])));
        assert_eq!(change(doc! {}, Some(90)), Some(Change::Anything));
        assert_eq!(change(doc! { "documentKey": { "_id": 7 } }, Some(90)), None);
    }
}
