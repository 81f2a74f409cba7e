//! What the service told each pool of its keys, and whether the pools keep to it: judged by cause, without a margin.
//!
//! Why that is exact is said in `examples/quickstart/ledger.rs`, and its names are used here. A soak can't keep all
//! requests until it ends, so each is judged as it arrives: whatever binds it was noted before its key was picked,
//! and so before it arrived. What was told to one pool binds the other one, too, but has to reach it first, by the
//! store; for that, it is counted how late a pool still picked such a key.

use std::{
    collections::HashMap,
    iter,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use tower_key_rotation::KeyId;

/// How long until what one pool learns is honoured by the other, while the store is well: what the README promises.
pub(crate) const PROPAGATION: Duration = Duration::from_secs(1);

/// After a fault, so long until both pools follow the store again: each part of them tries again after a second at
/// the latest, and what was under way when the fault began ends within another one.
const SETTLING: Duration = Duration::from_secs(3);

/// Who learns that a key is not to be used: one of the two pools, or somebody who removes it behind their backs.
pub(crate) const SOMEBODY_ELSE: usize = 2;

/// Both pools' books.
pub(crate) struct Books {
    start: Instant,
    pages: Mutex<HashMap<KeyId, Page>>,
    troubles: Mutex<Troubles>,
    marks: AtomicU64,
    hits: Mutex<Vec<String>>,
    pub(crate) elsewhere: Elsewhere,
}

/// The store's.
#[derive(Default)]
struct Troubles {
    now: usize,
    until: Duration,
}

/// The store is in trouble for as long as this lives, and for [`SETTLING`] after.
pub(crate) struct Trouble<'a>(&'a Books);

/// Requests on keys that rested by what only the other pool knew, or somebody else: within [`PROPAGATION`], and later.
#[derive(Default)]
pub(crate) struct Elsewhere {
    pub(crate) while_well: [AtomicU64; 2],
    pub(crate) in_trouble: [AtomicU64; 2],
    /// How late, while the store was well, in nanoseconds.
    latest: AtomicU64,
}

/// One pool's, for the layer of `watch.rs` and for the service.
pub(crate) struct Ledger {
    books: Arc<Books>,
    pool: usize,
}

#[derive(Default)]
struct Page {
    limits: [Vec<Limit>; 2],
    removed: [Option<Duration>; 3],
}

/// A response that spoke against the key.
struct Limit {
    answered_at: Duration,
    rest: Duration,
    /// None until the layer has been seen to have marked the key.
    marked_by: Option<Duration>,
}

/// A key that has to rest, by all that its pools were told.
pub(crate) struct Resting {
    pub(crate) key: KeyId,
    pub(crate) until: Duration,
    /// A mark is reckoned from when the response was here, which is no later than it was noted.
    pub(crate) until_at_most: Duration,
}

impl Books {
    pub(crate) fn open() -> Arc<Self> {
        Arc::new(Self {
            start: Instant::now(),
            pages: Mutex::default(),
            troubles: Mutex::default(),
            marks: AtomicU64::new(0),
            hits: Mutex::default(),
            elsewhere: Elsewhere::default(),
        })
    }

    pub(crate) fn now(&self) -> Duration {
        self.start.elapsed()
    }

    pub(crate) fn of(self: &Arc<Self>, pool: usize) -> Arc<Ledger> {
        Arc::new(Ledger { books: self.clone(), pool })
    }

    pub(crate) fn removed(&self, key: &KeyId, by: usize) {
        let now = self.now();
        self.pages().entry(key.clone()).or_default().removed[by] = Some(now);
    }

    /// A key that nobody has any more.
    pub(crate) fn forget(&self, key: &KeyId) {
        self.pages().remove(key);
    }

    pub(crate) fn trouble(&self) -> Trouble<'_> {
        self.troubles.lock().unwrap().now += 1;
        Trouble(self)
    }

    pub(crate) fn is_in_trouble(&self) -> bool {
        self.troubled_until() > self.now()
    }

    fn troubled_until(&self) -> Duration {
        let troubles = self.troubles.lock().unwrap();
        if troubles.now > 0 { Duration::MAX } else { troubles.until }
    }

    pub(crate) fn marks(&self) -> u64 {
        self.marks.load(Relaxed)
    }

    /// What was told to a pool and has not been seen to be marked: zero when no request is under way.
    pub(crate) fn unmarked(&self) -> usize {
        let pages = self.pages();
        pages
            .values()
            .flat_map(|page| page.limits.iter().flatten())
            .filter(|limit| limit.marked_by.is_none())
            .count()
    }

    /// Keys that are marked to rest for longer than until `time`.
    pub(crate) fn resting_beyond(&self, time: Duration) -> Vec<Resting> {
        self.pages().iter().filter_map(|(key, page)| page.resting_beyond(time, key)).collect()
    }

    /// Requests that came with a key of which their own pool knew that it rests, or is gone.
    pub(crate) fn hits(&self) -> Vec<String> {
        self.hits.lock().unwrap().clone()
    }

    fn pages(&self) -> MutexGuard<'_, HashMap<KeyId, Page>> {
        self.pages.lock().unwrap()
    }
}

impl Drop for Trouble<'_> {
    fn drop(&mut self) {
        let mut troubles = self.0.troubles.lock().unwrap();
        troubles.now -= 1;
        troubles.until = self.0.now() + SETTLING;
    }
}

impl Elsewhere {
    fn note(&self, since_known: Duration, was_well: bool) {
        let counts = if was_well { &self.while_well } else { &self.in_trouble };
        counts[usize::from(since_known > PROPAGATION)].fetch_add(1, Relaxed);
        if was_well {
            self.latest.fetch_max(nanos(since_known), Relaxed);
        }
    }

    pub(crate) fn latest(&self) -> Duration {
        Duration::from_nanos(self.latest.load(Relaxed))
    }
}

impl Ledger {
    pub(crate) fn now(&self) -> Duration {
        self.books.now()
    }

    /// The service is about to answer so.
    pub(crate) fn told(&self, key: &KeyId, answered_at: Duration, rest: Duration) {
        let mut pages = self.books.pages();
        let limits = &mut pages.entry(key.clone()).or_default().limits[self.pool];
        limits.retain(|limit| limit.marked_by.is_none() || limit.until() > answered_at);
        limits.push(Limit { answered_at, rest, marked_by: None });
    }

    /// The layer has marked the key by now.
    pub(crate) fn limited(&self, key: &KeyId, answered_at: Duration, marked_by: Duration) {
        self.books.marks.fetch_add(1, Relaxed);
        let mut pages = self.books.pages();
        let limits = pages.get_mut(key).into_iter().flat_map(|page| &mut page.limits[self.pool]);
        let mut unmarked =
            limits.filter(|limit| limit.answered_at == answered_at && limit.marked_by.is_none());
        unmarked.next().expect("a mark of what the service has told").marked_by = Some(marked_by);
    }

    pub(crate) fn arrived(&self, key: &KeyId, before_pick: Duration, arrived_at: Duration) {
        let pages = self.books.pages();
        let Some(page) = pages.get(key) else { return };
        let known_before = |who| page.reasons(who, arrived_at).filter(|known| *known <= before_pick);
        if let Some(known) = known_before(self.pool).next() {
            let (pool, after) = (self.pool, before_pick - known);
            let hit = format!("{key} was picked by pool {pool}, {after:?} after it knew that it must not be");
            self.books.hits.lock().unwrap().push(hit);
        }
        let elsewhere = (0..=SOMEBODY_ELSE).filter(|who| *who != self.pool).flat_map(known_before);
        if let Some(known) = elsewhere.min() {
            self.books.elsewhere.note(before_pick - known, self.books.troubled_until() <= known);
        }
    }
}

impl Page {
    /// Since when somebody has known of each reason not to use the key that holds at that moment.
    fn reasons(&self, who: usize, at: Duration) -> impl Iterator<Item = Duration> {
        let limits = self.limits.get(who).into_iter().flatten().filter(move |limit| limit.until() > at);
        limits.filter_map(|limit| limit.marked_by).chain(self.removed[who])
    }

    fn resting_beyond(&self, time: Duration, key: &KeyId) -> Option<Resting> {
        if self.removed.iter().any(Option::is_some) {
            return None;
        }
        let marked = || self.limits.iter().flatten().filter_map(|limit| Some((limit, limit.marked_by?)));
        let until = marked().map(|(limit, _)| limit.until()).filter(|until| *until > time).max()?;
        let at_most = marked().map(|(limit, marked_by)| marked_by.saturating_add(limit.rest));
        let until_at_most = at_most.chain(iter::once(until)).max()?;
        Some(Resting { key: key.clone(), until, until_at_most })
    }
}

impl Limit {
    fn until(&self) -> Duration {
        self.answered_at.saturating_add(self.rest)
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
