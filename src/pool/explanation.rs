//! Which key the next request would get, and why no other: for an operator.

use std::{collections::BTreeMap, fmt, time::Duration};

use crate::{
    key::KeyId,
    limit::{BudgetStats, RestCause, Scope, Status},
};

/// The most keys that the text of an explanation lists.
const LISTED: usize = 50;

/// Which key the next request would get, and why no other: see [`KeyPool::explain`](crate::KeyPool::explain).
///
/// `Display` is a table of the first 50 keys, for a log:
///
/// ```text
/// scope gpt-5-mini: the next request gets beta; 0 wait
///   alpha  rests: rate limited (said by the service), 118.0 s
///   beta   open; 7.0 of 10 requests left (by headers); 1 in flight
///   gamma  a tier before it has room
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Explanation {
    /// The scope of the request.
    pub scope: Option<Scope>,
    /// The key that the next request would get. `None` if no key has room. Requests that wait come first.
    pub next: Option<KeyId>,
    /// The first choice of the request's session among the keys of the best tier, whether it has room or not.
    pub preferred: Option<KeyId>,
    /// How many requests wait in the scope. Requests that wait at the gate of a layer over a pool without limits are not
    /// counted.
    pub waiting: usize,
    /// The time until the first key that may serve the request has room: zero if one has. `None` if none has by itself.
    /// Serialized in seconds, with a fraction.
    #[cfg_attr(feature = "serde", serde(rename = "opens_in_seconds", serialize_with = "seconds"))]
    pub opens_in: Option<Duration>,
    /// Each key, in the order in which the next pick looks at them.
    pub keys: Vec<ExplainedKey>,
}

/// One key, as a request would find it: see [`Explanation::keys`].
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct ExplainedKey {
    /// Its public name.
    pub id: KeyId,
    /// Its tier.
    pub tier: u8,
    /// Its quota group: its members share their budgets.
    pub group: Option<String>,
    /// Why the request would not get it, now. `None` if it may.
    pub passed_over: Option<PassedOver>,
    /// The time until it has room: zero if it has. `None` if it does not by itself: it is disabled or revoked, waits for the
    /// answers of its requests in flight, or may not serve the request. Serialized in seconds, with a fraction.
    #[cfg_attr(feature = "serde", serde(rename = "opens_in_seconds", serialize_with = "seconds"))]
    pub opens_in: Option<Duration>,
    /// Its requests in the scope that have no answer yet. 0 where the key has no limit.
    pub in_flight: u32,
    /// At most so many of them go at once, while nothing else is known of the limit.
    pub most_in_flight: Option<u32>,
    /// What is left of its budgets in the scope, as far as they are known.
    pub budgets: Vec<BudgetStats>,
}

/// Why a key does not serve a request.
///
/// Of several reasons, the one that lasts longest is given.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize), serde(tag = "why", rename_all = "snake_case"))]
#[non_exhaustive]
pub enum PassedOver {
    /// An operator took it out of service.
    Disabled,
    /// The whole key rests.
    Resting {
        /// Why it rests.
        status: Status,
        /// Who says so.
        cause: RestCause,
    },
    /// The service refused a request with it, and nobody knows yet whether the key is the reason. It has room again after
    /// a trial.
    Suspected,
    /// It rests in this scope.
    RestingInScope,
    /// Too little of this budget is left for the request, or for a usual one.
    Budget(BudgetStats),
    /// It has as many requests in flight as it may.
    InFlight {
        /// How many it has.
        in_flight: u32,
        /// How many it may have.
        most: u32,
    },
    /// A key of a tier before its own has room.
    LowerTier,
    /// The request avoids it.
    Avoided,
    /// The request may only be served by another key.
    AnotherIsPinned,
}

impl fmt::Display for PassedOver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Disabled => f.write_str("disabled"),
            Self::Resting { status, cause } => write!(f, "rests: {} ({})", word(*status), cause.name()),
            Self::Suspected => f.write_str("suspected"),
            Self::RestingInScope => f.write_str("rests in this scope"),
            Self::Budget(budget) => write!(f, "{budget}"),
            Self::InFlight { in_flight, most } => write!(f, "{in_flight} of {most} in flight"),
            Self::LowerTier => f.write_str("a tier before it has room"),
            Self::Avoided => f.write_str("avoided"),
            Self::AnotherIsPinned => f.write_str("another key is pinned"),
        }
    }
}

fn word(status: Status) -> &'static str {
    match status {
        Status::Healthy => "healthy",
        Status::RateLimited => "rate limited",
        Status::Exhausted => "exhausted",
        Status::Revoked => "revoked",
        Status::Suspected => "suspected",
        Status::Disabled => "disabled",
    }
}

impl ExplainedKey {
    /// The reason, and how long it lasts.
    pub(super) fn reason(&self) -> Option<String> {
        let reason = self.passed_over.as_ref()?;
        Some(match self.opens_in.filter(|time| !time.is_zero()) {
            Some(time) => format!("{reason}, {:.1} s", time.as_secs_f64()),
            None => reason.to_string(),
        })
    }

    /// All that is known of it.
    pub(super) fn known(&self) -> Vec<String> {
        let is_named = |budget: &&BudgetStats| self.passed_over == Some(PassedOver::Budget(**budget));
        let budgets = self.budgets.iter().filter(|budget| !is_named(budget)).map(BudgetStats::to_string);
        let in_flight = match self.most_in_flight {
            Some(most) => Some(format!("{} of {most} in flight", self.in_flight)),
            None => Some(format!("{} in flight", self.in_flight)).filter(|_| self.in_flight > 0),
        };
        let is_named = matches!(self.passed_over, Some(PassedOver::InFlight { .. }));
        self.reason().into_iter().chain(budgets).chain(in_flight.filter(|_| !is_named)).collect()
    }
}

impl fmt::Display for ExplainedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let open = Some("open".to_owned()).filter(|_| self.passed_over.is_none());
        f.write_str(&open.into_iter().chain(self.known()).collect::<Vec<_>>().join("; "))
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.scope {
            Some(scope) => write!(f, "scope {scope}: ")?,
            None => f.write_str("no scope: ")?,
        }
        match (&self.next, self.opens_in) {
            (Some(next), _) => write!(f, "the next request gets {next}")?,
            (None, Some(time)) => write!(f, "no key has room for {:.1} s", time.as_secs_f64())?,
            (None, None) => f.write_str("no key has room, and none has by itself")?,
        }
        if let Some(preferred) = &self.preferred {
            write!(f, "; the session prefers {preferred}")?;
        }
        write!(f, "; {} wait", self.waiting)?;
        let listed = &self.keys[..self.keys.len().min(LISTED)];
        let width = listed.iter().map(|key| key.id.as_str().chars().count()).max().unwrap_or(0);
        for key in listed {
            write!(f, "\n  {:width$}  {key}", key.id.as_str())?;
        }
        let mut others: BTreeMap<&str, usize> = BTreeMap::new();
        for key in &self.keys[listed.len()..] {
            *others.entry(if key.passed_over.is_some() { "passed over" } else { "open" }).or_default() += 1;
        }
        if !others.is_empty() {
            let counts: Vec<_> = others.iter().map(|(what, count)| format!("{count} {what}")).collect();
            write!(f, "\n  and {} more: {}", self.keys.len() - listed.len(), counts.join(", "))?;
        }
        Ok(())
    }
}

#[cfg(feature = "serde")]
fn seconds<S: serde::Serializer>(time: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
    serde::Serialize::serialize(&time.map(|time| time.as_secs_f64()), serializer)
}
