//! Counters of a pool's rare events, for the recorder of the `metrics` crate.
//!
//! The pool counts in atomics, and passes the counts to the recorder only on request. So a request neither allocates
//! labels nor calls a recorder.

use std::{borrow::Cow, collections::BTreeMap, sync::PoisonError, time::Duration};

use crate::{
    key::unkeyed::Unkeyed,
    limit::{Rest, Scope, nanos},
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

/// The most scopes that metrics tell apart. Callers may name the scopes, and a recorder keeps each name.
const MOST_SCOPES: usize = 100;

/// The label of all further scopes.
const OTHER_SCOPES: &str = "(others)";

/// Counters of rare events. Each key counts its own requests.
#[cfg_attr(not(feature = "metrics"), allow(dead_code))]
#[derive(Debug, Default)]
pub(crate) struct Meter {
    pool: Cow<'static, str>,
    marks: [AtomicU64; REASONS.len()],
    refusals: [AtomicU64; BECAME.len()],
    no_key: AtomicU64,
    pub(crate) unkeyed: Unkeyed,
    failovers: AtomicU64,
    budget_used_up: AtomicU64,
    pass_failures: AtomicU64,
    recovered: AtomicU64,
    store_errors: [AtomicU64; OPERATIONS.len()],
    waits: AtomicU64,
    /// In ns.
    waited: AtomicU64,
    /// The scopes that metrics tell apart. None is forgotten: a recorder would show its last values for ever.
    scopes: Mutex<BTreeMap<String, InScope>>,
}

/// What is recorded of one scope.
#[derive(Clone, Copy, Debug, Default)]
struct InScope {
    /// Refusals that pacing failed to avoid.
    refused: u64,
    #[cfg(feature = "metrics")]
    now: ScopeNow,
}

/// A scope as it is at the moment.
#[cfg(feature = "metrics")]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ScopeNow {
    pub(crate) waiting: usize,
    /// What is left of requests and of tokens.
    pub(crate) left: [f64; 2],
    /// How many limits are known by a quota, by headers, by refusals, and by refusals because their headers lie.
    pub(crate) limits: [usize; 4],
}

/// In the order of [`Rest`].
const REASONS: [&str; 3] = ["rate_limited", "exhausted", "revoked"];

/// What becomes of a refusal that does not say whether it is about the key.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Became {
    Suspected,
    Acquitted,
    Confirmed,
    Recovered,
}

/// In the order of [`Became`].
const BECAME: [&str; 4] = ["suspected", "acquitted", "confirmed", "recovered"];

/// What a store is asked for, as failures are counted.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Counted {
    Load,
    Write,
    Recover,
    Usage,
    Operate,
    Replace,
}

/// In the order of [`Counted`].
const OPERATIONS: [&str; 6] = ["load", "write", "recover", "usage", "operate", "replace"];

/// In the order of [`ScopeNow::left`].
#[cfg(feature = "metrics")]
const UNITS: [&str; 2] = ["requests", "tokens"];

/// In the order of [`ScopeNow::limits`].
#[cfg(feature = "metrics")]
const KNOWN_BY: [&str; 4] = ["quota", "headers", "refusals", "distrusted"];

impl Meter {
    pub(crate) fn of(pool: Cow<'static, str>) -> Self {
        Self { pool, ..Self::default() }
    }

    pub(crate) fn marked(&self, rest: Rest) {
        self.marks[rest as usize].fetch_add(1, Relaxed);
    }

    pub(crate) fn refusal(&self, became: Became) {
        self.refusals[became as usize].fetch_add(1, Relaxed);
    }

    pub(crate) fn no_key(&self) {
        self.no_key.fetch_add(1, Relaxed);
    }

    pub(crate) fn failed_over(&self) {
        self.failovers.fetch_add(1, Relaxed);
    }

    pub(crate) fn budget_is_used_up(&self) {
        self.budget_used_up.fetch_add(1, Relaxed);
    }

    pub(crate) fn waited(&self, time: Duration) {
        self.observe("key_rotation_wait_seconds", time);
        self.waits.fetch_add(1, Relaxed);
        self.waited.fetch_add(nanos(time), Relaxed);
    }

    /// How many requests have waited for a key, and for how long together.
    pub(crate) fn waits(&self) -> (u64, Duration) {
        (self.waits.load(Relaxed), Duration::from_nanos(self.waited.load(Relaxed)))
    }

    /// Counts a refusal that pacing failed to avoid.
    pub(crate) fn refused_in(&self, scope: Option<&Scope>) {
        in_scope(&mut self.lock_scopes(), scope).refused += 1;
    }

    /// The refusals that pacing failed to avoid.
    pub(crate) fn refused(&self) -> u64 {
        self.lock_scopes().values().map(|scope| scope.refused).sum()
    }

    fn lock_scopes(&self) -> MutexGuard<'_, BTreeMap<String, InScope>> {
        self.scopes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn passed(&self, time: Duration, is_ok: bool, recovered: u64) {
        self.observe("key_rotation_pass_seconds", time);
        self.pass_failures.fetch_add((!is_ok).into(), Relaxed);
        self.recovered.fetch_add(recovered, Relaxed);
    }

    pub(crate) fn store_failed(&self, operation: Counted) {
        self.store_errors[operation as usize].fetch_add(1, Relaxed);
    }

    #[cfg(not(feature = "metrics"))]
    fn observe(&self, _: &'static str, _: Duration) {}
}

/// The entry of a scope, or that of all others once there are many. Requests without a scope have the name "".
fn in_scope<'a>(scopes: &'a mut BTreeMap<String, InScope>, scope: Option<&Scope>) -> &'a mut InScope {
    let name = scope.map_or("", Scope::as_str);
    let name = if scopes.len() < MOST_SCOPES || scopes.contains_key(name) { name } else { OTHER_SCOPES };
    scopes.entry(name.to_owned()).or_default()
}

#[cfg(feature = "metrics")]
mod recorded {
    use std::{iter, time::Duration};

    use ::metrics::{
        Label, Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram,
    };

    use super::{BECAME, KNOWN_BY, Meter, OPERATIONS, REASONS, ScopeNow, UNITS, in_scope};
    use crate::{
        limit::Scope,
        sync::atomic::{AtomicU64, Ordering::Relaxed},
    };

    impl Meter {
        pub(super) fn observe(&self, name: &'static str, time: Duration) {
            histogram!(name, self.labels(None)).record(time);
        }

        /// Passes all counters, the number of keys by status and the given gauges to the recorder.
        pub(crate) fn record(
            &self,
            picks: u64,
            keys: &[(&'static str, usize)],
            gauges: &[(&'static str, f64)],
        ) {
            describe();
            for (status, count) in keys {
                gauge!("key_rotation_keys", self.labels(Some(("status", status)))).set(*count as f64);
            }
            for (name, value) in gauges {
                gauge!(*name, self.labels(None)).set(*value);
            }
            counter!("key_rotation_picks_total", self.labels(None)).absolute(picks);
            self.counted("key_rotation_no_key_total", &self.no_key);
            counter!("key_rotation_unkeyed_total", self.labels(None)).absolute(self.unkeyed.count());
            self.counted("key_rotation_failovers_total", &self.failovers);
            self.counted("key_rotation_failover_budget_used_up_total", &self.budget_used_up);
            self.counted("key_rotation_pass_failures_total", &self.pass_failures);
            self.counted("key_rotation_recovered_total", &self.recovered);
            self.counted_by("key_rotation_marks_total", "reason", &REASONS, &self.marks);
            self.counted_by("key_rotation_refusals_total", "became", &BECAME, &self.refusals);
            self.counted_by("key_rotation_store_errors_total", "operation", &OPERATIONS, &self.store_errors);
        }

        /// Passes what is known of each scope to the recorder.
        pub(crate) fn record_scopes<'a>(&self, now: impl IntoIterator<Item = (Option<&'a Scope>, ScopeNow)>) {
            let mut locked = self.lock_scopes();
            locked.values_mut().for_each(|scope| scope.now = ScopeNow::default());
            // There from the start: a rate needs two samples.
            in_scope(&mut locked, None);
            for (scope, now) in now {
                in_scope(&mut locked, scope).now.add(now);
            }
            // A recorder takes its time, and a refused request may wait for the lock.
            let scopes = locked.clone();
            drop(locked);
            for (name, scope) in &scopes {
                let labels = |more: Option<(&'static str, &'static str)>| {
                    let mut labels = self.labels(more);
                    labels.push(Label::new("scope", name.clone()));
                    labels
                };
                counter!("key_rotation_limited_despite_pacing_total", labels(None)).absolute(scope.refused);
                gauge!("key_rotation_waiting", labels(None)).set(scope.now.waiting as f64);
                for (unit, left) in UNITS.iter().zip(scope.now.left) {
                    gauge!("key_rotation_left", labels(Some(("unit", unit)))).set(left);
                }
                for (known_by, limits) in KNOWN_BY.iter().zip(scope.now.limits) {
                    gauge!("key_rotation_limits", labels(Some(("known_by", known_by)))).set(limits as f64);
                }
            }
        }

        fn counted(&self, name: &'static str, count: &AtomicU64) {
            counter!(name, self.labels(None)).absolute(count.load(Relaxed));
        }

        fn counted_by(
            &self,
            name: &'static str,
            label: &'static str,
            by: &[&'static str],
            counts: &[AtomicU64],
        ) {
            for (value, count) in by.iter().zip(counts) {
                counter!(name, self.labels(Some((label, value)))).absolute(count.load(Relaxed));
            }
        }

        fn labels(&self, more: Option<(&'static str, &'static str)>) -> Vec<Label> {
            let more = more.map(|(name, value)| Label::from_static_parts(name, value));
            iter::once(Label::new("pool", self.pool.clone())).chain(more).collect()
        }
    }

    impl ScopeNow {
        fn add(&mut self, other: Self) {
            self.waiting += other.waiting;
            self.left.iter_mut().zip(other.left).for_each(|(sum, more)| *sum += more);
            self.limits.iter_mut().zip(other.limits).for_each(|(sum, more)| *sum += more);
        }
    }

    type Described = (&'static str, Unit, &'static str);

    const GAUGES: [Described; 7] = [
        ("key_rotation_keys", Unit::Count, "Keys by status."),
        ("key_rotation_unreadable_keys", Unit::Count, "Entries in the store that are not valid keys."),
        ("key_rotation_marks_waiting", Unit::Count, "Marks not yet written to the store."),
        (
            "key_rotation_next_return_seconds",
            Unit::Seconds,
            "Time until a key is available; infinite if no rest ends by itself.",
        ),
        ("key_rotation_waiting", Unit::Count, "Requests that wait for a key, by scope."),
        ("key_rotation_left", Unit::Count, "What all limits of a scope still allow, by unit."),
        ("key_rotation_limits", Unit::Count, "Limits of a scope, by how they are known."),
    ];

    const COUNTERS: [Described; 11] = [
        ("key_rotation_picks_total", Unit::Count, "Requests that got a key."),
        ("key_rotation_marks_total", Unit::Count, "Responses that marked their key, by reason."),
        ("key_rotation_refusals_total", Unit::Count, "Ambiguous refusals, by what became of the key."),
        (
            "key_rotation_limited_despite_pacing_total",
            Unit::Count,
            "Limited responses that pacing failed to avoid, by scope.",
        ),
        ("key_rotation_no_key_total", Unit::Count, "Attempts that found no available key."),
        ("key_rotation_unkeyed_total", Unit::Count, "Requests that were sent without a key."),
        ("key_rotation_failovers_total", Unit::Count, "Retries after a limited response."),
        ("key_rotation_failover_budget_used_up_total", Unit::Count, "Retries that the retry budget refused."),
        ("key_rotation_pass_failures_total", Unit::Count, "Recovery passes that failed."),
        ("key_rotation_recovered_total", Unit::Count, "Keys that recovery passes reset."),
        ("key_rotation_store_errors_total", Unit::Count, "Failed store operations, by operation."),
    ];

    const HISTOGRAMS: [Described; 2] = [
        ("key_rotation_wait_seconds", Unit::Seconds, "Time that requests waited for a key."),
        ("key_rotation_pass_seconds", Unit::Seconds, "Duration of recovery passes."),
    ];

    fn describe() {
        for (name, unit, what) in GAUGES {
            describe_gauge!(name, unit, what);
        }
        for (name, unit, what) in COUNTERS {
            describe_counter!(name, unit, what);
        }
        for (name, unit, what) in HISTOGRAMS {
            describe_histogram!(name, unit, what);
        }
    }
}
