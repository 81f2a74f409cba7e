//! The key of a request that has traits, or of a pool with limits: the scope's next key that has room, now or after a wait.

use std::{sync::Arc, time::Duration};

use super::{
    doubts::Trials,
    engine::Engine,
    key::Key,
    lease::Lease,
    no_key::NoKeyAvailable,
    scoped::{Common, Demand, Picked, Scoped},
    ticket::Ticket,
    waiting::Place,
};
use crate::{
    clock::Clock,
    limit::{NEVER, Named, Traits, millis, nanos},
};

/// The most requests that wait in one scope.
const MOST_WAITING: usize = 10_000;

/// How often the first waiter looks if no key opens by itself.
const NO_KEY_IN_SIGHT: u64 = 1_000_000_000;

impl Engine {
    /// The next key that has room for a request.
    ///
    /// # Errors
    ///
    /// When the first key has room, in ns of the pool's clock; [`NEVER`] if none has by itself.
    pub(crate) fn pick_for(&self, traits: &Traits, trials: Trials) -> Result<Lease, u64> {
        // A misread header must not block requests that do not wait, either.
        self.pick_now(traits, trials)
            .or_else(|until| self.probe(traits, nanos(self.now())).map_err(|_| until))
    }

    /// A key for a request that these keys have refused; for an experiment rather one that was not refused lately.
    pub(crate) fn pick_besides_for(
        &self,
        traits: &Traits,
        tried: &[Arc<Key>],
        is_experiment: bool,
    ) -> Option<Lease> {
        let untried = tried.iter().fold(traits.clone(), |traits, key| traits.avoid(key.id.clone()));
        if is_experiment {
            let good = self.doubtful().into_iter().fold(untried.clone(), Traits::avoid);
            if let Ok(lease) = self.pick_for(&good, Trials::No) {
                return Some(lease);
            }
        }
        self.pick_for(&untried, Trials::No).ok()
    }

    fn pick_now(&self, traits: &Traits, trials: Trials) -> Result<Lease, u64> {
        let now = self.now();
        let snapshot = self.snapshot();
        let rests_at = self.return_expired_at(&snapshot, millis(now));
        snapshot.scopes.with(traits.named().scope.as_ref(), &self.limiting, |scoped| {
            let demand = demand(traits, Some(scoped));
            if let Some(at) = rests_at
                && let Some(lease) = self.trial_in(scoped, &demand, at, trials)
            {
                return Ok(lease);
            }
            let picked = scoped.pick(&demand, nanos(now)).map(|picked| lease(scoped, picked));
            match rests_at {
                None => picked,
                Some(at) => picked.or_else(|until| self.pick_in_doubt(scoped, &demand, at, trials, until)),
            }
        })
    }

    /// No key has room: if none is available, one that is in doubt may do.
    #[cold]
    fn pick_in_doubt(
        &self,
        scoped: &Arc<Scoped>,
        demand: &Demand<'_>,
        now: u64,
        trials: Trials,
        until: u64,
    ) -> Result<Lease, u64> {
        let next = match self.doubts.next_trial(true) {
            NEVER => return Err(until),
            // One that is due did not do.
            next => (next.max(now.saturating_add(1_000))).saturating_mul(1_000_000),
        };
        let until = until.min(next);
        if self.snapshot().has_available() {
            return Err(until);
        }
        if self.end_suspicion()
            && let Ok(picked) = scoped.pick(demand, nanos(self.now()))
        {
            return Ok(lease(scoped, picked));
        }
        self.trial_in(scoped, demand, now, if trials == Trials::No { trials } else { Trials::OfAll })
            .ok_or(until)
    }

    /// A key in doubt that is due for a trial, and has room for the request.
    #[inline]
    fn trial_in(&self, scoped: &Arc<Scoped>, demand: &Demand<'_>, now: u64, trials: Trials) -> Option<Lease> {
        let has_failover = trials == Trials::OfAll;
        if trials == Trials::No || self.doubts.next_trial(has_failover) > now {
            return None;
        }
        self.begin_trial(now, has_failover, |key| {
            let picked = scoped.take_to_try(key, demand, nanos(self.now()))?;
            Some(lease(scoped, picked).into_trial())
        })
    }

    /// Whether requests of a scope wait already.
    pub(crate) fn has_waiting(&self, traits: &Traits) -> bool {
        self.in_scope(traits, |scoped| scoped.common.waiting.has_any())
    }

    /// The error of a request that got no key.
    #[cold]
    pub(crate) fn no_room(&self, until: u64) -> NoKeyAvailable {
        let keys = self.snapshot().keys().len();
        if until == NEVER && self.snapshot().has_available() {
            return NoKeyAvailable::busy(keys);
        }
        NoKeyAvailable::resting(keys, (until != NEVER).then(|| self.time_to(until)))
    }

    /// Whether no key has room before that time, for certain.
    fn is_in_vain(&self, until: u64, give_up: Duration) -> bool {
        // The rest of a whole key is certain.
        if self.next_return().is_none_or(|time| self.now().saturating_add(time) > give_up) {
            return true;
        }
        // What is learned may be wrong, and nobody knows when a request in flight ends.
        let may_be_earlier = self.limiting.learns || (until == NEVER && self.snapshot().has_caps());
        !may_be_earlier && until > nanos(give_up)
    }

    fn time_to(&self, until: u64) -> Duration {
        Duration::from_nanos(until).saturating_sub(self.now())
    }

    /// A key for a request, after it has waited for its turn if need be. A refused request goes before all that were not
    /// sent yet. It sleeps by `clock`: the pool's, or one that parks the thread.
    ///
    /// # Errors
    ///
    /// If no key has room within `limit`, or too many requests wait.
    pub(crate) async fn acquire(
        &self,
        traits: &Traits,
        limit: Duration,
        was_refused: bool,
        trials: Trials,
        clock: &dyn Clock,
    ) -> Result<Lease, NoKeyAvailable> {
        let give_up = self.now().saturating_add(limit);
        if was_refused || limit.is_zero() || !self.has_waiting(traits) {
            match self.pick_now(traits, trials) {
                Ok(lease) => return Ok(lease),
                Err(until) if limit.is_zero() => return Err(self.no_room(until)),
                Err(until) if self.is_in_vain(until, give_up) => return Err(self.no_room(until)),
                Err(_) => {}
            }
        }
        let common = self.in_scope(traits, |scoped| scoped.common.clone());
        let now = nanos(self.now());
        let Some(place) = common.waiting.join(MOST_WAITING, is_picky(traits), now) else {
            return Err(NoKeyAvailable::queue_is_full(self.snapshot().keys().len()));
        };
        let began = self.now();
        let time_over = clock.sleep_until(give_up);
        let acquired = tokio::select! {
            biased;
            lease = self.in_turn(traits, &common, &place, was_refused, trials, clock) => Ok(lease),
            () = time_over => self.pick_now(traits, trials).map_err(|until| self.no_room(until)),
        };
        self.config.meter.waited(self.now().saturating_sub(began));
        acquired
    }

    async fn in_turn(
        &self,
        traits: &Traits,
        common: &Arc<Common>,
        place: &Place<'_>,
        was_refused: bool,
        trials: Trials,
        clock: &dyn Clock,
    ) -> Lease {
        // A request that only some keys may serve would hold up all others.
        let is_picky = is_picky(traits);
        let _first = if is_picky { None } else { Some(place.first(was_refused).await) };
        // Boxed: of many requests that wait, one is the first.
        Box::pin(self.in_first_place(traits, common, trials, clock)).await
    }

    async fn in_first_place(
        &self,
        traits: &Traits,
        common: &Common,
        trials: Trials,
        clock: &dyn Clock,
    ) -> Lease {
        loop {
            // Subscribed before the pick, so that no event after it is missed.
            let changed = common.waiting.changed();
            let returned = self.returned();
            let until = match self.pick_now(traits, trials) {
                Ok(lease) => return lease,
                Err(until) => until,
            };
            let now = nanos(self.now());
            let probe_at = match self.probe(traits, now) {
                Ok(lease) => return lease,
                Err(next) => next,
            };
            let look_again =
                until.min(probe_at).min(now + NO_KEY_IN_SIGHT * if until == NEVER { 1 } else { 3_600 });
            tokio::select! {
                () = clock.sleep_until(Duration::from_nanos(look_again)) => {}
                () = changed => {}
                () = returned => {}
            }
        }
    }

    /// A misread header must not block traffic: now and then, one request is sent although nothing should be left.
    fn probe(&self, traits: &Traits, now: u64) -> Result<Lease, u64> {
        if !self.limiting.learns {
            return Err(NEVER);
        }
        self.in_scope(traits, |scoped| {
            if let Some(next) = scoped.lock_probing().not_before(now, scoped.common.borrowing.processes()) {
                return Err(next);
            }
            match scoped.probe(&demand(traits, Some(scoped)), now) {
                Some(picked) => Ok(lease(scoped, picked)),
                None => Err(scoped.lock_probing().next()),
            }
        })
    }

    fn in_scope<T>(&self, traits: &Traits, then: impl FnOnce(&Arc<Scoped>) -> T) -> T {
        self.snapshot().scopes.with(traits.named().scope.as_ref(), &self.limiting, then)
    }
}

pub(super) fn demand<'a>(traits: &'a Traits, scoped: Option<&Scoped>) -> Demand<'a> {
    let Named { tokens, session, key, avoid, .. } = traits.named();
    let tokens = tokens.or_else(|| Some(scoped?.common.unestimated_tokens())).unwrap_or_default();
    Demand { tokens, session: *session, only: key.as_ref(), avoid }
}

/// Whether only some of the keys may serve the request.
fn is_picky(traits: &Traits) -> bool {
    let Named { key, avoid, .. } = traits.named();
    key.is_some() || !avoid.is_empty()
}

fn lease(scoped: &Arc<Scoped>, picked: Picked) -> Lease {
    let key = scoped.key(picked.slot).clone();
    key.counts.requests.add(1);
    Lease::with(key, Ticket::new(scoped.clone(), picked))
}
