//! The sources of a pool's keys, and what is known of each.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Notify, watch},
    task::JoinSet,
};

use super::key::{Key, UsableKey};
use crate::{
    clock::Clock,
    key::{
        KeyId, KeySpec, Rejected, Secret,
        rejected::{ParsedKey, Place},
    },
    source::{KeySet, KeySource, SourceError, SourceFuture},
};

/// The limit of a read.
const LIMIT: Duration = Duration::from_secs(30);

/// The time from one read after a 401 to the next.
const BETWEEN_REFUSALS: Duration = Duration::from_secs(10);

/// A secret is renewed after a random part of its life, in percent.
const RENEWED_AFTER: std::ops::RangeInclusive<u64> = 75..=90;

/// No secret is renewed earlier than that after the last read.
const SHORTEST_LIFE: Duration = Duration::from_secs(1);

/// One source of a pool. Its locks are std's: no request of a pool without sources comes here.
pub(crate) struct Source {
    source: Arc<dyn KeySource>,
    state: Mutex<State>,
    asked: Notify,
    /// How many reads were answered that a request had asked for.
    answers: watch::Sender<u64>,
    /// Held by the task that follows the source.
    pub(crate) following: tokio::sync::Mutex<()>,
}

/// What a source said, and when the read began.
#[derive(Clone, Debug)]
pub(crate) struct Read {
    pub(crate) set: KeySet,
    pub(crate) at: Duration,
}

#[derive(Default)]
struct State {
    /// The keys as the pool took them over.
    given: BTreeMap<KeyId, Given>,
    read_at: Option<Duration>,
    changed_at: Option<Duration>,
    error: Option<String>,
    rejected: Vec<String>,
    /// When a secret is to be renewed.
    renew_at: Option<Duration>,
    is_followed: bool,
    /// Whether a request asks for a read, and whether the read in progress answers it.
    is_asked: bool,
    is_answering: bool,
    not_asked_before: Duration,
}

/// A key of a source.
#[derive(Clone)]
pub(super) struct Given {
    pub(super) spec: KeySpec,
    /// When its secret expires.
    pub(super) until: Option<Duration>,
    pub(super) has_expired: bool,
    /// The key that has left the pool for that reason.
    pub(super) suspended: Option<Arc<Key>>,
}

/// How fresh a source of keys is: see [`KeyPool::sources`](crate::KeyPool::sources).
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct SourceStats {
    /// The name of the source.
    pub name: String,
    /// The keys that the pool has taken from it.
    pub keys: usize,
    /// Those among them that have left the pool, because their secrets have expired.
    pub expired: usize,
    /// The time until the next secret expires, zero if one has; `None` if none does. Serialized in seconds, with a fraction.
    #[cfg_attr(
        feature = "serde",
        serde(rename = "expires_in_seconds", serialize_with = "super::stats::seconds")
    )]
    pub expires_in: Option<Duration>,
    /// The time since the beginning of the last read that succeeded; `None` before the first. Serialized in seconds, with a
    /// fraction.
    #[cfg_attr(
        feature = "serde",
        serde(rename = "since_read_seconds", serialize_with = "super::stats::seconds")
    )]
    pub since_read: Option<Duration>,
    /// The time since a read last changed keys; `None` if none did. Serialized in seconds, with a fraction.
    #[cfg_attr(
        feature = "serde",
        serde(rename = "since_change_seconds", serialize_with = "super::stats::seconds")
    )]
    pub since_change: Option<Duration>,
    /// Why the last read failed, or why a key could not be taken over.
    pub error: Option<String>,
    /// The entries that can't be used as a key: each with its place and the reason.
    pub rejected: Vec<String>,
    /// Whether a [`RecoveryHandle`](crate::RecoveryHandle) follows it.
    pub is_followed: bool,
}

impl Source {
    pub(super) fn new(source: impl KeySource) -> Self {
        Self {
            source: Arc::new(source),
            state: Mutex::default(),
            asked: Notify::new(),
            answers: watch::Sender::new(0),
            following: tokio::sync::Mutex::new(()),
        }
    }

    pub(crate) fn name(&self) -> Cow<'_, str> {
        self.source.name()
    }

    /// Reads the source, in a task of its own: it may panic.
    pub(crate) async fn read(&self, clock: &dyn Clock) -> Result<Read, SourceError> {
        let at = clock.now();
        self.lock().begin_answer();
        let source = self.source.clone();
        let mut reading = JoinSet::new();
        reading.spawn(async move { source.read().await });
        let read = tokio::select! {
            biased;
            read = reading.join_next() => read,
            () = clock.sleep_until(at.saturating_add(LIMIT)) => return Err(SourceError::took_too_long(LIMIT)),
        };
        // The text of a panic might hold anything.
        let set = read.and_then(Result::ok).ok_or_else(|| SourceError::new("the read panicked"))??;
        if set.keys.is_empty() && set.rejected.is_empty() {
            Err(SourceError::empty())
        } else {
            Ok(Read { set, at })
        }
    }

    /// Completes when the source may have changed.
    pub(crate) fn changed(&self) -> SourceFuture<'_, ()> {
        self.source.changed()
    }

    /// The entries of a read, with their places.
    pub(super) fn parsed(&self, read: &Read) -> Vec<ParsedKey> {
        let name: Arc<str> = self.name().into();
        let keys = (1..).zip(&read.set.keys).map(|(number, key)| ParsedKey {
            place: Place::Entry(name.clone(), number),
            key: Ok(key.spec.clone()),
        });
        let whole = || Place::Whole(name.clone());
        let rejected =
            read.set.rejected.iter().map(|rejected| ParsedKey { place: whole(), key: Err(rejected.clone()) });
        keys.chain(rejected).collect()
    }

    /// The pool is built with these keys of the first read.
    pub(super) fn begin(&self, read: &Read, keys: &[UsableKey]) {
        let specs: Vec<_> = keys.iter().map(UsableKey::spec).collect();
        let given = read.given(&specs);
        let mut state = self.lock();
        state.read_at = Some(read.at);
        state.given = given;
        state.plan_renewal(read.at);
    }

    pub(super) fn given(&self) -> BTreeMap<KeyId, Given> {
        self.lock().given.clone()
    }

    /// The pool has a key of the source as it is named now.
    pub(super) fn note(&self, key: Given) {
        self.lock().given.insert(key.spec.id.clone(), key);
    }

    /// The pool no longer has a key that the source does not name any more.
    pub(super) fn forget(&self, id: &KeyId) {
        self.lock().given.remove(id);
    }

    /// The key that has left the pool because its secret has expired.
    pub(super) fn suspended(&self, id: &KeyId) -> Option<Arc<Key>> {
        self.lock().given.get(id)?.suspended.clone()
    }

    /// The pool has taken over what it could of a read.
    pub(super) fn took(&self, read: &Read, has_changed: bool, now: Duration) {
        let mut state = self.lock();
        state.read_at = Some(read.at);
        if has_changed {
            state.changed_at = Some(now);
        }
        state.plan_renewal(read.at);
    }

    /// Notes how the last read went. Returns whether that is news.
    pub(crate) fn note_error(&self, error: Option<String>) -> bool {
        let mut state = self.lock();
        let is_news = state.error != error;
        state.error = error;
        is_news
    }

    /// Notes the entries that can't be used. Returns those that are new.
    pub(crate) fn note_rejected(&self, rejected: &[Rejected]) -> Vec<String> {
        let rejected: Vec<_> = rejected.iter().map(ToString::to_string).collect();
        let before = std::mem::replace(&mut self.lock().rejected, rejected.clone());
        rejected.into_iter().filter(|rejected| !before.contains(rejected)).collect()
    }

    pub(super) fn stats(&self, now: Duration) -> SourceStats {
        let state = self.lock();
        let since = |at: Option<Duration>| at.map(|at| now.saturating_sub(at));
        SourceStats {
            name: self.name().into_owned(),
            keys: state.given.len(),
            expired: state.given.values().filter(|key| key.has_expired).count(),
            expires_in: state
                .given
                .values()
                .filter_map(|key| key.until)
                .min()
                .map(|at| at.saturating_sub(now)),
            since_read: since(state.read_at),
            since_change: since(state.changed_at),
            error: state.error.clone(),
            rejected: state.rejected.clone(),
            is_followed: state.is_followed,
        }
    }

    // ---- secrets that expire ----

    /// When a secret is to be renewed, if one expires.
    pub(crate) fn renew_at(&self) -> Option<Duration> {
        self.lock().renew_at
    }

    /// When the next secret expires that is still in use.
    pub(crate) fn expires_at(&self) -> Option<Duration> {
        let state = self.lock();
        state.given.values().filter(|key| !key.has_expired).filter_map(|key| key.until).min()
    }

    /// Notes which secrets have expired by now, with the key that a pool has for an id. Returns the ids, and the keys that
    /// must leave the pool.
    pub(super) fn expire(
        &self,
        now: Duration,
        held: impl Fn(&KeyId) -> Option<Arc<Key>>,
    ) -> (Vec<KeyId>, Vec<Arc<Key>>) {
        let (mut ids, mut keys) = (Vec::new(), Vec::new());
        for key in self.lock().given.values_mut() {
            if key.has_expired || key.until.is_none_or(|until| until > now) {
                continue;
            }
            key.has_expired = true;
            key.suspended = held(&key.spec.id).filter(|held| held.secret() == key.spec.secret);
            keys.extend(key.suspended.clone());
            ids.push(key.spec.id.clone());
        }
        (ids, keys)
    }

    /// The secrets that expire; `None` for one that has expired.
    pub(super) fn expiring(&self) -> Vec<(KeyId, Option<Secret>)> {
        let state = self.lock();
        let keys = state.given.iter().filter(|(_, key)| key.until.is_some());
        let secret = |key: &Given| (!key.has_expired).then(|| key.spec.secret.clone());
        keys.map(|(id, key)| (id.clone(), secret(key))).collect()
    }

    // ---- 401s ----

    pub(super) fn gives(&self, key: &Key) -> bool {
        let (state, secret) = (self.lock(), key.secret());
        // The store may have the key under another id.
        state.given.contains_key(&key.id) || state.given.values().any(|given| given.spec.secret == secret)
    }

    /// Asks for a read, if there was none for that reason lately. Returns where its end is told.
    pub(super) fn ask(&self, now: Duration) -> Option<watch::Receiver<u64>> {
        let mut state = self.lock();
        if !state.is_followed {
            return None;
        }
        if !state.is_asked {
            if now < state.not_asked_before {
                return None;
            }
            state.is_asked = true;
            state.not_asked_before = now.saturating_add(BETWEEN_REFUSALS);
            self.asked.notify_one();
        }
        Some(self.answers.subscribe())
    }

    /// Completes when a request asks for a read.
    pub(crate) async fn asked(&self) {
        loop {
            let asked = self.asked.notified();
            if self.lock().is_asked {
                return;
            }
            asked.await;
        }
    }

    /// Tells the requests that asked before the last read began.
    pub(crate) fn answer(&self) {
        let mut state = self.lock();
        if std::mem::take(&mut state.is_answering) {
            state.is_asked = false;
            self.answers.send_modify(|answers| *answers += 1);
        }
    }

    /// While the guard lives, a task follows the source.
    pub(crate) fn is_followed(&self) -> Followed<'_> {
        self.lock().is_followed = true;
        Followed(self)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Releases the requests that wait for a read.
pub(crate) struct Followed<'a>(&'a Source);

impl Drop for Followed<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        (state.is_followed, state.is_answering) = (false, true);
        drop(state);
        self.0.answer();
    }
}

impl Read {
    /// These keys, with the times at which their secrets expire.
    pub(super) fn given(&self, specs: &[KeySpec]) -> BTreeMap<KeyId, Given> {
        let lives: HashMap<_, _> =
            self.set.keys.iter().map(|key| (&key.spec.secret, key.expires_in)).collect();
        let until = |spec: &KeySpec| Some(self.at.saturating_add((*lives.get(&spec.secret)?)?));
        let given = |spec: &KeySpec| Given {
            spec: spec.clone(),
            until: until(spec),
            has_expired: false,
            suspended: None,
        };
        specs.iter().map(|spec| (spec.id.clone(), given(spec))).collect()
    }
}

impl State {
    fn begin_answer(&mut self) {
        self.is_answering = self.is_asked;
    }

    fn plan_renewal(&mut self, read_at: Duration) {
        let first = self.given.values().filter_map(|key| key.until).min();
        self.renew_at = first.map(|until| {
            let life = until.saturating_sub(read_at);
            let part = fastrand::u64(RENEWED_AFTER) as u32;
            read_at.saturating_add((life / 100 * part).max(SHORTEST_LIFE))
        });
    }
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Source").field(&self.name()).finish()
    }
}
