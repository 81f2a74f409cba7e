//! What stores and pools tell each other of a key's limits, and how the two views are joined.

use std::{
    cmp::{Ordering, Reverse},
    collections::BTreeMap,
    fmt,
    time::Duration,
};

use compact_str::CompactString;

use super::status::Rest;

/// The part of a service that is limited apart from the rest of it: a model, a route, a resource.
///
/// A name is data: 1 to 128 bytes without control characters.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize), serde(transparent))]
pub struct Scope(CompactString);

impl Scope {
    const MAX_BYTES: usize = 128;

    /// The scope of that name.
    ///
    /// # Errors
    ///
    /// If the name is empty, longer than 128 bytes, or has a control character.
    pub fn new(name: impl AsRef<str>) -> Result<Self, InvalidScope> {
        let name = name.as_ref();
        if name.is_empty() || name.len() > Self::MAX_BYTES || name.chars().any(char::is_control) {
            return Err(InvalidScope);
        }
        Ok(Self(name.into()))
    }

    /// The scope of that name as far as it can be one: its first 128 bytes, with `?` for control characters.
    pub(crate) fn lossy(name: &str) -> Option<Self> {
        let is_plain = name.len() <= Self::MAX_BYTES && name.bytes().all(|byte| (0x20..0x7f).contains(&byte));
        if is_plain {
            return (!name.is_empty()).then(|| Self(name.into()));
        }
        let fits = |end: &usize| name.is_char_boundary(*end);
        let end = (0..=name.len().min(Self::MAX_BYTES)).rev().find(fits)?;
        Self::new(name[..end].replace(char::is_control, "?")).ok()
    }

    /// What the rest of requests without a scope is called, where rests of scopes are listed.
    pub(crate) fn none() -> Self {
        Self(CompactString::const_new("(none)"))
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// A name that cannot be a [`Scope`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a scope's name has 1 to 128 bytes and no control characters")]
pub struct InvalidScope;

/// When a rest ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Until {
    /// After that time, which counts from the origin of its [`Words`].
    After(Duration),
    /// Not before somebody resets the key.
    Reset,
}

impl Until {
    /// The time after which the rest ends by itself.
    pub(crate) fn left(self) -> Option<Duration> {
        match self {
            Self::After(left) => Some(left),
            Self::Reset => None,
        }
    }
}

/// A rest: when it ends, and why. The later one is the greater one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Resting {
    /// When it ends.
    pub until: Until,
    /// Why.
    pub reason: Rest,
}

/// The state of all limits of one key: a generation, the key's own rest, and the rests of scopes.
///
/// Two views of one key are [joined](Self::join): the higher generation wins whole; of the same generation, each
/// limit rests for the longer of the two. Order, delay and repetition change nothing. Only a store makes a new
/// generation: when a key is reset.
///
/// Times count from an origin that both views share: from now, where words travel between a pool and its store;
/// from a clock's start, where a store keeps them. [`later`](Self::later) and [`after`](Self::after) move the
/// origin.
///
/// ```
/// use std::time::Duration;
/// use tower_key_rotation::{Rest, store::{Resting, Until, Words}};
///
/// let resting = |seconds| {
///     let until = Until::After(Duration::from_secs(seconds));
///     Words { key: Some(Resting { until, reason: Rest::RateLimited }), ..Words::default() }
/// };
/// let mut words = resting(60);
/// words.join(&resting(120));
/// words.join(&resting(90));
/// assert_eq!(words, resting(120));
///
/// // a reset is a higher generation in which nothing rests
/// words.join(&Words { generation: 1, ..Words::default() });
/// assert_eq!(words.key, None);
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Words {
    /// How often the key was reset.
    pub generation: u64,
    /// The rest of the whole key.
    pub key: Option<Resting>,
    /// The rests of single scopes. [`join`](Self::join) keeps the 64 that end last.
    pub scopes: BTreeMap<Scope, Resting>,
}

impl Words {
    /// Callers may choose the names of scopes, and what is kept of a key must not grow with them.
    pub(crate) const MOST_SCOPES: usize = 64;

    /// Takes in what another view of the same key knows.
    pub fn join(&mut self, other: &Self) {
        match self.generation.cmp(&other.generation) {
            Ordering::Greater => {}
            Ordering::Less => self.clone_from(other),
            Ordering::Equal => {
                self.key = self.key.max(other.key);
                for (scope, resting) in &other.scopes {
                    let known = self.scopes.entry(scope.clone()).or_insert(*resting);
                    *known = (*known).max(*resting);
                }
            }
        }
        self.drop_the_first_to_end();
    }

    /// Of two views that were cut, the join is the cut of what both would be in whole.
    fn drop_the_first_to_end(&mut self) {
        while self.scopes.len() > Self::MOST_SCOPES {
            let order = |(scope, resting): (&Scope, &Resting)| (*resting, Reverse(scope.clone()));
            let Some((_, Reverse(first))) = self.scopes.iter().map(order).min() else { return };
            self.scopes.remove(&first);
        }
    }

    /// Ends all rests, or that of one scope, in a new generation.
    ///
    /// A store does this for a reset.
    pub fn reset(&mut self, scope: Option<&Scope>) {
        self.generation += 1;
        match scope {
            Some(scope) => _ = self.scopes.remove(scope),
            None => *self = Self { generation: self.generation, ..Self::default() },
        }
    }

    /// The same words, counted from an origin that is so much earlier.
    #[must_use]
    pub fn later(self, by: Duration) -> Self {
        self.map(|until| Some(until.saturating_add(by)))
    }

    /// The same words, counted from an origin that is so much later. Rests that have ended by then are dropped.
    #[must_use]
    pub fn after(self, passed: Duration) -> Self {
        self.map(|until| until.checked_sub(passed).filter(|left| !left.is_zero()))
    }

    fn map(self, time: impl Fn(Duration) -> Option<Duration>) -> Self {
        let moved = |resting: Resting| match resting.until {
            Until::Reset => Some(resting),
            Until::After(until) => time(until).map(|until| Resting { until: Until::After(until), ..resting }),
        };
        let scopes = self.scopes.into_iter();
        Self {
            generation: self.generation,
            key: self.key.and_then(moved),
            scopes: scopes.filter_map(|(scope, resting)| Some((scope, moved(resting)?))).collect(),
        }
    }
}
