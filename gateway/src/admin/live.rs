//! The current state of the keys, and a stream of their changes.

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
        Semaphore,
        broadcast::{self, error::RecvError},
        watch,
    },
    time::{self, Instant, MissedTickBehavior},
};

use super::{
    history::{self, millis},
    keys::{Key, Keys, Look, Shown},
};
use crate::served::{Current, Served};

const INTERVAL: Duration = Duration::from_millis(250);

/// Counters change with each request, so they are sent with every fourth look only.
const LOOKS_PER_COUNT: u32 = 4;

/// Most event streams at once. Each holds a snapshot of all keys until it is sent.
const STREAMS: usize = 8;

/// Buffered changes. A listener that is further behind gets a new snapshot.
const CHANGES_WAITING: usize = 64;

pub(super) struct Live {
    current: Current,
    began: Instant,
    /// Locked while a change is sent, so that a snapshot contains exactly the changes sent before it.
    keys: Mutex<Keys>,
    changes: broadcast::Sender<Arc<str>>,
    streams: Arc<Semaphore>,
    stopped: watch::Sender<bool>,
}

type Listener = broadcast::Receiver<Arc<str>>;

#[derive(Serialize)]
struct Snapshot {
    history_ms: u64,
    /// The names of the upstreams.
    upstreams: Vec<String>,
    keys: Vec<Shown>,
}

impl Live {
    /// Starts to watch the upstreams' keys, until the returned value is dropped.
    pub(super) fn start(current: Current) -> Arc<Self> {
        let live = Arc::new(Self {
            current,
            began: Instant::now(),
            keys: Mutex::default(),
            changes: broadcast::Sender::new(CHANGES_WAITING),
            streams: Arc::new(Semaphore::new(STREAMS)),
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

    /// Takes over the current state of the pools and sends the changes.
    ///
    /// The API calls this method after each change, so that every page shows it at once.
    pub(super) fn look(&self, look: Look) {
        let mut keys = self.keys();
        let served = self.current.get();
        let pools = served.upstreams.iter().map(|upstream| (upstream.name(), &upstream.pool));
        let changes = keys.look(self.now(), pools, look);
        if self.changes.receiver_count() > 0 && !changes.is_empty() {
            // Sending fails if the last listener has just left.
            let _ = self.changes.send(json(&changes));
        }
    }

    pub(super) fn served(&self) -> Arc<Served> {
        self.current.get()
    }

    pub(super) fn get(&self, upstream: &str, id: &str) -> Option<Shown> {
        self.keys().get(upstream, id).map(|key| key.shown(self.now()))
    }

    /// Calls `of` with all keys in order and the current time.
    pub(super) fn all<T>(&self, of: impl FnOnce(Vec<&Key>, Duration) -> T) -> T {
        let keys = self.keys();
        of(keys.in_order(), self.now())
    }

    /// Returns a stream of a snapshot and then changes, or `None` if there are too many streams. It ends with
    /// [`Live::stop`].
    pub(super) fn events(
        self: Arc<Self>,
    ) -> Option<impl Stream<Item = Result<Event, Infallible>> + Send + 'static> {
        let place = self.streams.clone().try_acquire_owned().ok()?;
        Some(stream::unfold((self, place, None), async |(live, place, listener)| {
            let (event, listener) = live.next_event(listener).await?;
            Some((Ok(event), (live, place, Some(listener))))
        }))
    }

    /// Ends all event streams.
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
            upstreams: self.served().upstreams.iter().map(|upstream| upstream.name().to_owned()).collect(),
            keys: keys.in_order().into_iter().map(|key| key.shown(now)).collect(),
        };
        (Event::default().event("snapshot").data(json(&snapshot)), self.changes.subscribe())
    }

    fn keys(&self) -> MutexGuard<'_, Keys> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }
}

fn json(value: &impl Serialize) -> Arc<str> {
    // Serialization fails only for maps with keys that are not strings.
    serde_json::to_string(value).unwrap_or_default().into()
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use futures_util::{FutureExt, StreamExt};
    use tower_key_rotation::KeyPool;

    use super::*;
    use crate::{callers::Callers, upstream::Upstream};

    fn live() -> Arc<Live> {
        let pool = KeyPool::builder().key("alpha", "sk-alpha").build().unwrap();
        Live::start(Current::new(Served {
            upstreams: vec![Arc::new(Upstream::of(pool))],
            callers: Callers::new(Vec::new(), None),
        }))
    }

    fn pool(live: &Live) -> KeyPool {
        live.served().upstreams[0].pool.clone()
    }

    fn name(event: Option<Result<Event, Infallible>>) -> String {
        let event = format!("{:?}", event.unwrap().unwrap());
        ["snapshot", "changes"].into_iter().find(|name| event.contains(name)).unwrap().to_owned()
    }

    #[tokio::test]
    async fn a_listener_gets_a_snapshot_then_each_change() {
        let live = live();
        let mut events = pin!(live.clone().events().unwrap());
        assert_eq!(name(events.next().await), "snapshot");
        assert!(events.next().now_or_never().is_none());
        pool(&live).disable("alpha").await.unwrap();
        assert_eq!(name(events.next().await), "changes");
    }

    #[tokio::test]
    async fn a_lagging_listener_gets_a_snapshot_then_changes() {
        let live = live();
        let mut events = pin!(live.clone().events().unwrap());
        assert_eq!(name(events.next().await), "snapshot");
        for _ in 0..CHANGES_WAITING {
            pool(&live).disable("alpha").await.unwrap();
            live.look(Look::Statuses);
            pool(&live).enable("alpha").await.unwrap();
            live.look(Look::Statuses);
        }
        assert_eq!(name(events.next().await), "snapshot");
        assert!(events.next().now_or_never().is_none());
        pool(&live).disable("alpha").await.unwrap();
        assert_eq!(name(events.next().await), "changes");
    }

    #[tokio::test]
    async fn event_streams_are_limited_until_one_ends() {
        let live = live();
        let mut streams: Vec<_> = (0..STREAMS).map(|_| live.clone().events().unwrap()).collect();
        assert!(live.clone().events().is_none());
        streams.pop();
        assert!(live.events().is_some());
    }

    #[tokio::test]
    async fn stopping_the_gateway_ends_current_and_later_streams() {
        let live = live();
        let mut events = pin!(live.clone().events().unwrap());
        assert_eq!(name(events.next().await), "snapshot");
        live.stop();
        assert!(events.next().await.is_none());
        assert_eq!(live.events().unwrap().count().await, 1);
    }
}
