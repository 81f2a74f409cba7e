//! The keys as they are, and a stream of what changes for whoever listens.

use std::{
    convert::Infallible,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use axum::response::sse::Event;
use futures_util::{Stream, stream};
use serde::Serialize;
use tokio::{
    sync::{
        broadcast::{self, error::RecvError},
        watch,
    },
    time::{self, MissedTickBehavior},
};
use tower_key_rotation::KeyPool;

use super::{
    history::{self, millis},
    keys::{Key, Keys, Look, Shown},
};

const INTERVAL: Duration = Duration::from_millis(250);

/// Counters change with each request, and are told less often.
const LOOKS_PER_COUNT: u32 = 4;

/// A listener that is further behind gets a snapshot instead.
const CHANGES_WAITING: usize = 64;

pub(super) struct Live {
    pool: KeyPool,
    /// Held while a change is sent, so that a snapshot has all that was sent before, and nothing else.
    keys: Mutex<Keys>,
    changes: broadcast::Sender<Arc<str>>,
    stopped: watch::Sender<bool>,
}

type Listener = broadcast::Receiver<Arc<str>>;

#[derive(Serialize)]
struct Snapshot {
    history_ms: u64,
    keys: Vec<Shown>,
}

impl Live {
    /// Looks at the pool's keys from now on, for as long as somebody else holds this.
    pub(super) fn start(pool: KeyPool) -> Arc<Self> {
        let live = Arc::new(Self {
            pool,
            keys: Mutex::default(),
            changes: broadcast::Sender::new(CHANGES_WAITING),
            stopped: watch::Sender::new(false),
        });
        live.look(Look::Everything);
        let weak = Arc::downgrade(&live);
        tokio::spawn(async move {
            let mut interval = time::interval(INTERVAL);
            interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
            for look in (1..=LOOKS_PER_COUNT).cycle() {
                interval.tick().await;
                let Some(live) = weak.upgrade() else { return };
                live.look(if look == LOOKS_PER_COUNT { Look::Everything } else { Look::Statuses });
            }
        });
        live
    }

    /// Takes in how the keys are now. Whoever changes something looks, so that all hear of it at once.
    pub(super) fn look(&self, look: Look) {
        let mut keys = self.keys();
        let changes = keys.look(self.now(), &self.pool, look);
        if self.changes.receiver_count() > 0 && !changes.is_empty() {
            // It fails where the last one has just left.
            let _ = self.changes.send(json(&changes));
        }
    }

    pub(super) fn pool(&self) -> &KeyPool {
        &self.pool
    }

    pub(super) fn get(&self, id: &str) -> Option<Shown> {
        self.keys().get(id).map(|key| key.shown(self.now()))
    }

    /// What `of` makes of all keys, in the order in which they are picked, and of the time.
    pub(super) fn all<T>(&self, of: impl FnOnce(Vec<&Key>, Duration) -> T) -> T {
        let keys = self.keys();
        of(keys.in_order(), self.now())
    }

    /// First a snapshot, then what changes; it ends with [`Live::stop`].
    pub(super) fn events(self: Arc<Self>) -> impl Stream<Item = Result<Event, Infallible>> + Send + 'static {
        stream::unfold((self, None), async |(live, listener)| {
            let (event, listener) = live.next_event(listener).await?;
            Some((Ok(event), (live, Some(listener))))
        })
    }

    /// Ends what would not end by itself.
    pub(super) fn stop(&self) {
        self.stopped.send_replace(true);
    }

    async fn next_event(&self, listener: Option<Listener>) -> Option<(Event, Listener)> {
        let Some(mut listener) = listener else { return Some(self.begin()) };
        let mut stopped = self.stopped.subscribe();
        let next = tokio::select! {
            next = listener.recv() => next,
            _ = stopped.wait_for(|stopped| *stopped) => return None,
        };
        match next {
            Ok(changes) => Some((Event::default().event("changes").data(changes), listener)),
            Err(RecvError::Lagged(_)) => Some(self.begin()),
            Err(RecvError::Closed) => None,
        }
    }

    fn begin(&self) -> (Event, Listener) {
        let keys = self.keys();
        let now = self.now();
        let snapshot = Snapshot {
            history_ms: millis(history::KEPT),
            keys: keys.in_order().into_iter().map(|key| key.shown(now)).collect(),
        };
        (Event::default().event("snapshot").data(json(&snapshot)), self.changes.subscribe())
    }

    fn keys(&self) -> MutexGuard<'_, Keys> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Duration {
        self.pool.clock().now()
    }
}

fn json(value: &impl Serialize) -> Arc<str> {
    // It fails for maps whose names are no text, and these are none.
    serde_json::to_string(value).unwrap_or_default().into()
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use futures_util::{FutureExt, StreamExt};

    use super::*;

    fn pool() -> KeyPool {
        KeyPool::builder().key("alpha", "sk-alpha").build().unwrap()
    }

    fn name(event: Option<Result<Event, Infallible>>) -> String {
        let event = format!("{:?}", event.unwrap().unwrap());
        ["snapshot", "changes"].into_iter().find(|name| event.contains(name)).unwrap().to_owned()
    }

    #[tokio::test]
    async fn who_listens_gets_a_snapshot_and_then_each_change() {
        let live = Live::start(pool());
        let mut events = pin!(live.clone().events());
        assert_eq!(name(events.next().await), "snapshot");
        assert!(events.next().now_or_never().is_none());
        live.pool.disable("alpha").await.unwrap();
        assert_eq!(name(events.next().await), "changes");
    }

    #[tokio::test]
    async fn who_falls_behind_gets_a_snapshot_again_and_goes_on_from_there() {
        let live = Live::start(pool());
        let mut events = pin!(live.clone().events());
        assert_eq!(name(events.next().await), "snapshot");
        for _ in 0..CHANGES_WAITING {
            live.pool.disable("alpha").await.unwrap();
            live.look(Look::Statuses);
            live.pool.enable("alpha").await.unwrap();
            live.look(Look::Statuses);
        }
        assert_eq!(name(events.next().await), "snapshot");
        assert!(events.next().now_or_never().is_none());
        live.pool.disable("alpha").await.unwrap();
        assert_eq!(name(events.next().await), "changes");
    }

    #[tokio::test]
    async fn a_stream_ends_when_the_gateway_stops_also_one_that_begins_later() {
        let live = Live::start(pool());
        let mut events = pin!(live.clone().events());
        assert_eq!(name(events.next().await), "snapshot");
        live.stop();
        assert!(events.next().await.is_none());
        assert_eq!(live.events().count().await, 1);
    }
}
