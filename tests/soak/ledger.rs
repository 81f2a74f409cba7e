//! What the service told each pool of its keys, and whether the pools keep to it: judged by cause, without a margin.
//!
//! Why that is exact is said in `examples/quickstart/src/ledger.rs`, and its names are used here. A soak can't keep all
//! requests until it ends, so each is judged as it arrives: whatever binds it was noted before its key was picked,
//! and so before it arrived. What was told to one pool binds the other one, too, but has to reach it first, by the
//! store; for that, it is counted how late a pool still picked such a key.

use std::{
    collections::HashMap,
    iter,
    ops::RangeInclusive,
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

/// So long afterwards it is known whether the store was in trouble.
pub(crate) const HINDSIGHT: Duration = Duration::from_secs(5);

/// No key is used for longer after another process was told that it rests, and so no trouble is to be remembered.
const REMEMBERED_FOR: Duration = Duration::from_secs(120);

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

/// When the store was in trouble.
#[derive(Default)]
struct Troubles {
    under_way: usize,
    since: Duration,
    past: Vec<RangeInclusive<Duration>>,
}

/// The store is in trouble for as long as this lives, and until it has settled.
pub(crate) struct Trouble<'a>(&'a Books);

/// Requests with keys that rested by what only the other pool knew, or somebody else.
#[derive(Default)]
pub(crate) struct Elsewhere {
    /// Within [`PROPAGATION`].
    pub(crate) soon: AtomicU64,
    /// By how many nanoseconds, at the most.
    latest: AtomicU64,
    /// Later: from when it was known until the key was picked.
    late: Mutex<Vec<(KeyId, RangeInclusive<Duration>)>>,
    pub(crate) late_in_trouble: AtomicU64,
    late_while_well: Mutex<Vec<String>>,
}

/// One pool's, for the layer of `watch.rs` and for the service.
pub(crate) struct Ledger {
    books: Arc<Books>,
    pool: usize,
}

#[derive(Debug, Default)]
struct Page {
    limits: [Vec<Limit>; 2],
    removed: [Option<Duration>; 3],
}

/// A response that spoke against the key.
#[derive(Debug)]
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
        let mut troubles = self.troubles.lock().unwrap();
        if troubles.under_way == 0 {
            troubles.since = self.now();
        }
        troubles.under_way += 1;
        Trouble(self)
    }

    /// It turns out that the store has been in trouble since then.
    pub(crate) fn was_in_trouble(&self, since: Duration) {
        self.troubles.lock().unwrap().add(since, self.now());
    }

    pub(crate) fn is_in_trouble(&self) -> bool {
        let now = self.now();
        self.troubles.lock().unwrap().overlap(&(now..=now))
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

    /// Requests that came with a key of which the other pool had known for longer than [`PROPAGATION`] that it rests,
    /// or somebody else that it is gone, although the store was well; those are judged that are older than `age`.
    pub(crate) fn late(&self, age: Duration) -> Vec<String> {
        let Elsewhere { late, late_in_trouble, late_while_well, .. } = &self.elsewhere;
        let now = self.now();
        let mut late_while_well = late_while_well.lock().unwrap();
        for (key, unheard) in late.lock().unwrap().extract_if(.., |(_, unheard)| *unheard.end() + age <= now)
        {
            if self.troubles.lock().unwrap().overlap(&unheard) {
                late_in_trouble.fetch_add(1, Relaxed);
            } else {
                late_while_well.push(format!("{key}, {:?} late", *unheard.end() - *unheard.start()));
            }
        }
        late_while_well.clone()
    }

    fn pages(&self) -> MutexGuard<'_, HashMap<KeyId, Page>> {
        self.pages.lock().unwrap()
    }
}

impl Elsewhere {
    /// How late at the most those were that were [`soon`](Self::soon).
    pub(crate) fn latest(&self) -> Duration {
        Duration::from_nanos(self.latest.load(Relaxed))
    }

    fn note(&self, key: &KeyId, unheard: RangeInclusive<Duration>) {
        let after = *unheard.end() - *unheard.start();
        if after > PROPAGATION {
            return self.late.lock().unwrap().push((key.clone(), unheard));
        }
        self.soon.fetch_add(1, Relaxed);
        self.latest.fetch_max(u64::try_from(after.as_nanos()).unwrap_or(u64::MAX), Relaxed);
    }
}

impl Drop for Trouble<'_> {
    fn drop(&mut self) {
        let mut troubles = self.0.troubles.lock().unwrap();
        troubles.under_way -= 1;
        if troubles.under_way == 0 {
            let since = troubles.since;
            troubles.add(since, self.0.now() + SETTLING);
        }
    }
}

impl Troubles {
    fn add(&mut self, since: Duration, until: Duration) {
        match self.past.last_mut() {
            Some(last) if since <= *last.end() => {
                *last = since.min(*last.start())..=until.max(*last.end());
            }
            _ => self.past.push(since..=until),
        }
        self.past.retain(|past| *past.end() + REMEMBERED_FOR > until);
    }

    fn overlap(&self, time: &RangeInclusive<Duration>) -> bool {
        let goes_on = self.under_way > 0 && self.since <= *time.end();
        goes_on || self.past.iter().any(|past| past.start() <= time.end() && time.start() <= past.end())
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
    ///
    /// What the response asked for plays no part: [`told`](Self::told) has the rest.
    pub(crate) fn limited(
        &self,
        key: &KeyId,
        answered_at: Duration,
        marked_by: Duration,
        _asked: Option<Duration>,
    ) {
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
            let hit = format!(
                "{key} was picked by pool {pool}, {after:?} after it knew that it must not be: at {before_pick:?}, it \
                 arrived at {arrived_at:?}; {page:?}"
            );
            self.books.hits.lock().unwrap().push(hit);
        }
        let elsewhere = (0..=SOMEBODY_ELSE).filter(|who| *who != self.pool).flat_map(known_before);
        if let Some(known) = elsewhere.min() {
            self.books.elsewhere.note(key, known..=before_pick);
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
