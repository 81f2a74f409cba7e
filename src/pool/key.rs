//! One key: what requests carry for it, and what is known about it.

use std::{
    fmt,
    num::NonZeroU32,
    sync::{Arc, OnceLock, Weak},
    time::Duration,
};

use crate::{
    key::inject::{Inject, Rendered, UnusableSecret},
    key::{KeyId, KeySpec, Secret},
    limit::{AtomicWord, Cap, Rest, RestCause, Scope, Status, Word},
    store::Born,
    sync::atomic::{
        AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64,
        Ordering::{Relaxed, SeqCst},
    },
};

/// The pool as its keys know it: a request in flight holds its key alone, and marks it through this.
pub(crate) trait Home: fmt::Debug + Send + Sync {
    /// Applies what a response said of the key that it was sent with.
    fn mark(&self, key: &Arc<Key>, rest: Rest, hint: Option<Duration>, http_status: u16);

    /// Applies the rest that a response named for one scope of its key.
    fn rest_in_scope(&self, key: &Arc<Key>, scope: &Scope, reason: Rest, rest: Option<Duration>);

    /// A response refused the key, or the request that it was sent with.
    fn refuse(&self, key: &Arc<Key>, http_status: u16);

    /// A trial of a key in doubt was answered with no refusal.
    fn serves(&self, key: &Arc<Key>);

    /// A request in flight of a key that had as many as it may has ended.
    fn has_room(&self, key: &Arc<Key>);

    /// A response named another organisation of a key than was known.
    fn regroup(&self);
}

/// An id, and what requests carry for it.
#[derive(Debug)]
pub(crate) struct UsableKey {
    pub(crate) id: KeyId,
    credentials: Rendered,
    settings: Option<Box<Settings>>,
}

/// The settings that few keys have.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Settings {
    group: Option<Box<str>>,
    tier: u8,
    weight: NonZeroU32,
    cap: Option<Arc<Cap>>,
}

impl Default for Settings {
    fn default() -> Self {
        Self { group: None, tier: 0, weight: NonZeroU32::MIN, cap: None }
    }
}

impl Settings {
    fn of(spec: &KeySpec) -> Option<Box<Self>> {
        let settings = Self {
            group: spec.group.as_deref().map(Into::into),
            tier: spec.tier.unwrap_or(0),
            weight: spec.weight.unwrap_or(NonZeroU32::MIN),
            cap: spec.max_in_flight.map(|most| Arc::new(Cap::new(most))),
        };
        (settings != Self::default()).then(|| Box::new(settings))
    }
}

impl UsableKey {
    /// # Errors
    ///
    /// If no request could carry the secret.
    pub(crate) fn new(spec: &KeySpec, inject: &Inject) -> Result<Self, UnusableSecret> {
        let credentials = inject.render(&spec.secret)?;
        Ok(Self { id: spec.id.clone(), credentials, settings: Settings::of(spec) })
    }

    pub(crate) fn spec(&self) -> KeySpec {
        spec(&self.id, self.credentials.secret(), self.settings.as_deref())
    }

    /// A healthy key of that pool, which the store may not know yet.
    pub(crate) fn healthy_in(self, home: Weak<dyn Home>) -> Key {
        Key {
            state: AtomicWord::default(),
            counts: Counts::default(),
            credentials: self.credentials,
            last_status: AtomicU16::new(0),
            cause: AtomicU8::new(RestCause::Guessed as u8),
            is_in_doubt: AtomicBool::new(false),
            slot: AtomicU32::new(0),
            pending: AtomicWord::default(),
            born: OnceLock::new(),
            home,
            id: self.id,
            settings: self.settings,
        }
    }
}

fn spec(id: &KeyId, secret: Secret, settings: Option<&Settings>) -> KeySpec {
    let mut spec = KeySpec::new(id.clone(), secret);
    if let Some(Settings { group, tier, weight, cap }) = settings {
        spec.group = group.as_deref().map(str::to_owned);
        spec.tier = Some(*tier).filter(|tier| *tier != 0);
        spec.weight = Some(*weight).filter(|weight| *weight != NonZeroU32::MIN);
        spec.max_in_flight = cap.as_ref().map(|cap| cap.most());
    }
    spec
}

/// The fields that each request writes come first, then those that each request reads: so processors pass as few cache
/// lines to each other, and fetch as few, as possible.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Key {
    pub(crate) state: AtomicWord,
    pub(crate) counts: Counts,
    pub(crate) credentials: Rendered,
    /// The last HTTP status that counted against the key; 0 for none.
    last_status: AtomicU16,
    /// The cause of the last rest that began, as a [`RestCause`].
    cause: AtomicU8,
    /// Whether only trials may use the key. Beside the state, which the store knows: a doubt is this process's own.
    is_in_doubt: AtomicBool,
    /// Where the newest snapshot holds the key. A hint: the reader checks who is there.
    slot: AtomicU32,
    /// The join of the marks that the store does not have yet; never more than `state`, unless that is over. Those of scopes
    /// are in [`Scopes`](super::scopes::Scopes).
    pub(crate) pending: AtomicWord,
    /// Unknown until the store has been read.
    born: OnceLock<Born>,
    home: Weak<dyn Home>,
    pub(crate) id: KeyId,
    settings: Option<Box<Settings>>,
}

impl Key {
    /// Has the pool, if it still exists, group its keys by their organisations.
    pub(super) fn regroup(&self) {
        if let Some(pool) = self.home.upgrade() {
            pool.regroup();
        }
    }

    pub(crate) fn group(&self) -> Option<&str> {
        self.settings.as_ref()?.group.as_deref()
    }

    pub(crate) fn tier(&self) -> u8 {
        self.settings.as_ref().map_or(0, |settings| settings.tier)
    }

    pub(crate) fn weight(&self) -> u32 {
        self.settings.as_ref().map_or(1, |settings| settings.weight.get())
    }

    pub(super) fn cap(&self) -> Option<&Cap> {
        self.settings.as_ref()?.cap.as_deref()
    }

    /// Tells the pool, if it still exists, that the key has room for another request in flight.
    pub(super) fn has_room(self: &Arc<Self>) {
        if let Some(pool) = self.home.upgrade() {
            pool.has_room(self);
        }
    }

    pub(crate) fn spec(&self) -> KeySpec {
        spec(&self.id, self.secret(), self.settings.as_deref())
    }

    /// The same key under another id.
    pub(crate) fn renamed(&self, id: KeyId) -> Self {
        let (credentials, settings) = (self.credentials.clone(), self.settings.clone());
        let same = UsableKey { id, credentials, settings }.healthy_in(self.home.clone());
        same.set_last_status(self.last_status.load(Relaxed));
        same.cause.store(self.cause.load(Relaxed), Relaxed);
        same.counts.take_over(&self.counts);
        same.state.update(|_| self.state.load());
        same.pending.update(|_| self.pending.load());
        same
    }

    /// The same key with another secret, which took the place of one that expires. A rest that may be about the old secret
    /// ends: the second value says whether there was one.
    pub(super) fn renewed(&self, with: UsableKey) -> (Self, bool) {
        let settings = self.settings.clone();
        let same = UsableKey { id: self.id.clone(), credentials: with.credentials, settings }
            .healthy_in(self.home.clone());
        let resting = self.state.load().resting(Duration::ZERO);
        let is_revoked = resting.is_some_and(|resting| resting.reason == Rest::Revoked);
        let was_refused = is_revoked || self.last_status() == Some(401);
        let next = |word: Word| if was_refused { word.ended() } else { word };
        same.cause.store(self.cause.load(Relaxed), Relaxed);
        same.counts.continue_from(&self.counts);
        same.state.update(|_| next(self.state.load()));
        if !was_refused {
            same.set_last_status(self.last_status.load(Relaxed));
            same.pending.update(|_| self.pending.load());
        }
        if let Some(born) = self.born() {
            same.born.get_or_init(|| born);
        }
        (same, was_refused && resting.is_some())
    }

    /// Whether this is the key object of that secret and birth, and of these settings. A key whose birth is unknown is born
    /// by this.
    pub(crate) fn is(&self, spec: &KeySpec, born: Born) -> bool {
        self.credentials.is_of(&spec.secret)
            && self.settings == Settings::of(spec)
            && *self.born.get_or_init(|| born) == born
    }

    pub(crate) fn born(&self) -> Option<Born> {
        self.born.get().copied()
    }

    pub(crate) fn has_pending(&self) -> bool {
        self.pending.load() != Word::HEALTHY
    }

    pub(crate) fn slot(&self) -> usize {
        self.slot.load(Relaxed) as usize
    }

    pub(crate) fn set_slot(&self, slot: usize) {
        self.slot.store(slot as u32, Relaxed);
    }

    pub(crate) fn secret(&self) -> Secret {
        self.credentials.secret()
    }

    /// Applies what a response said of the key, if the pool still exists.
    pub(crate) fn mark(self: &Arc<Self>, rest: Rest, hint: Option<Duration>, http_status: u16) {
        if let Some(pool) = self.home.upgrade() {
            pool.mark(self, rest, hint, http_status);
        }
    }

    /// Applies what a response said of one scope of the key, if the pool still exists.
    pub(super) fn rest_in_scope(self: &Arc<Self>, scope: &Scope, reason: Rest, rest: Option<Duration>) {
        if let Some(pool) = self.home.upgrade() {
            pool.rest_in_scope(self, scope, reason, rest);
        }
    }

    /// Applies a refusal, if the pool still exists.
    pub(crate) fn refuse(self: &Arc<Self>, http_status: u16) {
        if let Some(pool) = self.home.upgrade() {
            pool.refuse(self, http_status);
        }
    }

    /// Applies the success of a trial, if the pool still exists.
    pub(crate) fn serves(self: &Arc<Self>) {
        if let Some(pool) = self.home.upgrade() {
            pool.serves(self);
        }
    }

    /// Whether requests may use the key.
    pub(crate) fn is_available(&self) -> bool {
        self.state.load().is_available() && !self.is_in_doubt()
    }

    pub(crate) fn is_in_doubt(&self) -> bool {
        self.is_in_doubt.load(SeqCst)
    }

    /// Returns whether that changes anything. The indexes have to follow.
    pub(super) fn set_in_doubt(&self, is_in_doubt: bool) -> bool {
        self.is_in_doubt.swap(is_in_doubt, SeqCst) != is_in_doubt
    }

    /// What the key is good for.
    pub(crate) fn status(&self, now: Duration) -> Status {
        match self.state.load().status(now) {
            Status::Healthy if self.is_in_doubt() => Status::Suspected,
            status => status,
        }
    }

    /// Who says that the key does not serve; `None` if it does.
    pub(crate) fn cause(&self, now: Duration) -> Option<RestCause> {
        match self.status(now) {
            Status::Healthy => None,
            Status::Disabled => Some(RestCause::Operator),
            Status::Suspected => Some(RestCause::Suspected),
            _ => Some(RestCause::of(self.cause.load(Relaxed))),
        }
    }

    pub(super) fn set_cause(&self, cause: RestCause) {
        self.cause.store(cause as u8, Relaxed);
    }

    /// An ellipsis and the end of the secret.
    pub(crate) fn masked_secret(&self) -> String {
        let secret = self.secret();
        // A usable secret is ASCII: a byte is a character.
        let secret = secret.expose();
        let shown = (secret.len() / 4).min(4);
        format!("…{}", secret.get(secret.len() - shown..).unwrap_or(""))
    }

    pub(crate) fn last_status(&self) -> Option<u16> {
        Some(self.last_status.load(Relaxed)).filter(|status| *status != 0)
    }

    pub(crate) fn set_last_status(&self, status: u16) {
        self.last_status.store(status, Relaxed);
    }

    /// Counts a refusal of which a limit rests, not the whole key.
    pub(crate) fn count_limited(&self, http_status: u16) {
        self.counts.limited.fetch_add(1, Relaxed);
        self.set_last_status(http_status);
    }
}

#[derive(Debug, Default)]
#[repr(C)]
pub(crate) struct Counts {
    pub(crate) requests: Count,
    pub(crate) limited: AtomicU64,
    pub(crate) recovered: AtomicU64,
    pub(crate) tokens: Count,
}

impl Counts {
    /// Goes on where the counts of the same key stood.
    fn continue_from(&self, other: &Self) {
        self.requests.continue_from(&other.requests);
        self.tokens.continue_from(&other.tokens);
        self.limited.store(other.limited.load(Relaxed), Relaxed);
        self.recovered.store(other.recovered.load(Relaxed), Relaxed);
    }

    fn take_over(&self, other: &Self) {
        self.requests.add(other.requests.take());
        self.tokens.add(other.tokens.take());
        self.limited.store(other.limited.load(Relaxed), Relaxed);
        self.recovered.store(other.recovered.load(Relaxed), Relaxed);
    }
}

/// A sum that only grows, and how much of it has been taken for the store.
#[derive(Debug, Default)]
pub(crate) struct Count {
    sum: AtomicU64,
    taken: AtomicU64,
}

impl Count {
    #[inline]
    pub(crate) fn add(&self, more: u64) {
        self.sum.fetch_add(more, Relaxed);
    }

    pub(crate) fn sum(&self) -> u64 {
        self.sum.load(Relaxed)
    }

    /// Whether anything was added that was not taken.
    pub(crate) fn has_untaken(&self) -> bool {
        self.sum() != self.taken.load(Relaxed)
    }

    fn continue_from(&self, other: &Self) {
        let taken = other.taken.load(Relaxed);
        self.taken.store(taken, Relaxed);
        self.sum.store(other.sum(), Relaxed);
    }

    /// What was added since the last call.
    pub(crate) fn take(&self) -> u64 {
        let sum = self.sum();
        sum.wrapping_sub(self.taken.swap(sum, Relaxed))
    }
}
