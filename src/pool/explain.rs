//! Explains picks without making them: nothing is taken, no turn moves, no limit and no scope is made.

use std::{ops::Range, sync::Arc, time::Duration};

use super::{
    choose::demand,
    engine::Engine,
    explanation::{ExplainedKey, Explanation, PassedOver},
    key::Key,
    key_pool::KeyPool,
    layout::Layout,
    scoped::{Demand, Scoped},
    snapshot::Snapshot,
};
use crate::{
    key::KeyId,
    limit::{BudgetStats, Closed, Limit, NEVER, RestCause, Scope, Status, Traits, Unit, nanos},
};

/// The most keys that are looked at to say which ones a request passed over.
const LOOKED_AT: usize = 64;

/// The most keys that such a text names.
const NAMED: usize = 8;

impl KeyPool {
    /// Says which key the next request with these traits would get, and of each other key why not.
    ///
    /// This only looks: it takes nothing, and moves no turn. Between this and the next request, other requests may come
    /// first. Takes a time that grows with the number of keys; requests don't notice.
    ///
    /// The order of the keys is that of a request through a layer. An empty [`Traits`] stands for a request without any.
    ///
    /// ```
    /// use tower_key_rotation::{KeyPool, PassedOver, Traits};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let pool = KeyPool::builder().key("alpha", "sk-1").key("beta", "sk-2").build()?;
    /// pool.disable("alpha").await?;
    ///
    /// let explanation = pool.explain(&Traits::new().scope("gpt-5-mini"));
    /// assert_eq!(explanation.next.unwrap().as_str(), "beta");
    /// assert_eq!(explanation.keys[0].passed_over, Some(PassedOver::Disabled));
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn explain(&self, traits: &Traits) -> Explanation {
        self.engine().explain(traits)
    }

    /// Returns the time until a key has room for a request with these traits: zero if one has, `None` if none has
    /// before a request in flight ends, or an operator resets a key.
    ///
    /// [`next_return`](Self::next_return) knows nothing of scopes and limits. Takes a time that grows with the number of
    /// keys without room.
    ///
    /// ```
    /// use std::time::Duration;
    /// use tower_key_rotation::{KeyPool, Quota, Traits};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let pool = KeyPool::builder().key("alpha", "sk-1").quota(Quota::per_minute(60)).build()?;
    /// let traits = Traits::new().scope("gpt-5-mini");
    /// drop(pool.lease(&traits)?);
    /// assert!(pool.next_room(&traits).unwrap() > Duration::ZERO);
    /// assert_eq!(pool.next_return(), Some(Duration::ZERO));
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn next_room(&self, traits: &Traits) -> Option<Duration> {
        self.engine().next_room(traits)
    }
}

/// The keys as a pick of these traits would find them.
struct View<'a> {
    engine: &'a Engine,
    snapshot: &'a Snapshot,
    /// The suspected keys that are due for a trial: they come first.
    trials: Vec<usize>,
    /// The scope of a pick that chooses, if it has been used.
    scoped: Option<Arc<Scoped>>,
    /// Its name, if it has not.
    unused: Option<Scope>,
    /// Whether a pick looks at rests of whole keys only, in one turn over all of them.
    is_plain: bool,
    /// Whether a pick tries every key, one after the other, since no key that it would usually try may serve the request.
    tries_all: bool,
    /// Whether the first key with room serves, not the next one in turn.
    fills_first: bool,
    demand: Demand<'a>,
    now: Duration,
}

/// Why a key is closed, and until when, in ns; [`NEVER`] if it does not open by itself.
type Why = (PassedOver, u64);

impl Engine {
    fn explain(&self, traits: &Traits) -> Explanation {
        let snapshot = self.snapshot();
        let view = self.view(&snapshot, traits);
        let mut explanation = Explanation {
            scope: traits.named().scope.clone(),
            preferred: view.preferred().map(|slot| view.key(slot).id.clone()),
            waiting: view.scoped.as_ref().map_or(0, |scoped| scoped.common.waiting.count()),
            ..Explanation::default()
        };
        let mut best_tier = None;
        let mut first = NEVER;
        view.look(&mut |slot| {
            let why = view.why_not(slot);
            let is_open = why.is_none();
            let tier = view.key(slot).tier();
            let until = why.as_ref().map_or(0, |(_, until)| *until);
            first = first.min(until);
            let is_lower = is_open && best_tier.is_some_and(|best| best < tier) && view.demand.only.is_none();
            if is_open && best_tier.is_none() {
                best_tier = Some(tier);
                explanation.next = Some(view.key(slot).id.clone());
            }
            let passed_over = if is_lower { Some(PassedOver::LowerTier) } else { why.map(|(why, _)| why) };
            explanation.keys.push(view.explained(slot, passed_over, view.time_to(until)));
            true
        });
        explanation.opens_in = view.time_to(view.or_trial(first));
        explanation
    }

    fn next_room(&self, traits: &Traits) -> Option<Duration> {
        let snapshot = self.snapshot();
        let view = self.view(&snapshot, traits);
        let mut first = NEVER;
        view.look(&mut |slot| {
            first = first.min(view.why_not(slot).map_or(0, |(_, until)| until));
            first > 0
        });
        view.time_to(view.or_trial(first))
    }

    /// The keys that the next pick passes over, and why, if there are any: a text that names the first of them. Looks at
    /// the first keys only.
    pub(crate) fn passed_over(&self, traits: &Traits) -> Option<String> {
        let snapshot = self.snapshot();
        let view = self.view(&snapshot, traits);
        let (mut named, mut count) = (Vec::new(), 0);
        view.look(&mut |slot| {
            let Some((why, until)) = view.why_not(slot) else { return false };
            count += 1;
            if named.len() < NAMED {
                let key = view.explained(slot, Some(why), view.time_to(until));
                named.push(format!("{}: {}", key.id, key.reason().unwrap_or_default()));
            }
            count < LOOKED_AT
        });
        let more = count - named.len();
        if more > 0 {
            named.push(format!("{more} more"));
        }
        (count > 0).then(|| named.join("; "))
    }

    /// The first choice of a request's session.
    pub(crate) fn preferred(&self, traits: &Traits) -> Option<KeyId> {
        let snapshot = self.snapshot();
        let view = self.view(&snapshot, traits);
        Some(view.key(view.preferred()?).id.clone())
    }

    /// What is known of a key's limit after an answer, if anything.
    pub(crate) fn known_of(&self, key: &Arc<Key>, traits: &Traits) -> Option<String> {
        let snapshot = self.snapshot();
        let view = self.view(&snapshot, traits);
        let slot = snapshot.slot(&key.id).filter(|slot| Arc::ptr_eq(view.key(*slot), key))?;
        let rests = view.key_rests(slot).or_else(|| match view.limit(slot)?.why_closed(0, view.nanos())? {
            (Closed::Resting, until) => Some((PassedOver::RestingInScope, until)),
            _ => None,
        });
        let (why, until) = rests.map_or((None, 0), |(why, until)| (Some(why), until));
        let key = view.explained(slot, why, view.time_to(until));
        let known = key.known();
        (!known.is_empty()).then(|| known.join("; "))
    }

    fn view<'a>(&'a self, snapshot: &'a Snapshot, traits: &'a Traits) -> View<'a> {
        let is_plain = traits.is_empty() && !self.chooses();
        let scoped = snapshot.scopes.find(traits.named().scope.as_ref()).filter(|_| !is_plain);
        let (demand, now, fills_first) =
            (demand(traits, scoped.as_deref()), self.now(), self.limiting.fills_first);
        let trials = self.due_for_trial().iter().filter_map(|key| snapshot.slot(&key.id)).collect();
        let unused =
            (scoped.is_none() && !is_plain).then(|| traits.named().scope.clone().unwrap_or_else(Scope::none));
        let (engine, tries_all) = (self, false);
        let mut view =
            View { engine, snapshot, trials, scoped, unused, is_plain, tries_all, fills_first, demand, now };
        let mut slots = 0..snapshot.keys().len();
        view.tries_all = view.demand.only.is_some()
            || !view.demand.avoid.is_empty() && slots.all(|slot| view.why_not(slot).is_some());
        view
    }
}

impl<'a> View<'a> {
    fn key(&self, slot: usize) -> &'a Arc<Key> {
        &self.snapshot.keys()[slot]
    }

    fn layout(&self) -> &'a Layout {
        self.snapshot.layout()
    }

    fn limit(&self, slot: usize) -> Option<&Arc<Limit>> {
        self.scoped.as_ref()?.known_limit(slot)
    }

    fn nanos(&self) -> u64 {
        nanos(self.now)
    }

    fn time_to(&self, until: u64) -> Option<Duration> {
        (until != NEVER).then(|| Duration::from_nanos(until).saturating_sub(self.now))
    }

    /// That time, or the one at which a request may try a key in doubt, since none has room.
    fn or_trial(&self, first: u64) -> u64 {
        let trial = self.engine.doubts.next_trial(true);
        if trial == NEVER || self.demand.only.is_some() {
            first
        } else {
            first.min(trial.saturating_mul(1_000_000))
        }
    }

    // ---- the order ----

    /// Shows each key once, in the order in which a pick looks, until `show` returns `false`.
    fn look(&self, show: &mut dyn FnMut(usize) -> bool) {
        let keys = self.snapshot.keys().len();
        let mut seen = vec![false; keys];
        let mut once = |slot: usize| std::mem::replace(&mut seen[slot], true) || show(slot);
        let pinned = self.demand.only.and_then(|id| self.snapshot.slot(id));
        let mut goes_on = self.trials.iter().copied().all(&mut once)
            && pinned.is_none_or(&mut once)
            && self.candidates().into_iter().all(&mut once);
        if self.is_plain || self.tries_all {
            let turn = if self.is_plain { self.snapshot.turn() } else { 0 };
            _ = goes_on && (turn..keys).chain(0..turn).all(once);
            return;
        }
        let mut members = vec![0; self.layout().groups()];
        for (tier, slots) in self.layout().tiers().iter().enumerate() {
            if self.fills_first {
                goes_on = goes_on && (slots.start..slots.end).all(&mut once);
                continue;
            }
            let turns = self.layout().turns_of_tier(tier);
            let turn = self.scoped.as_ref().map_or(turns.start, |scoped| scoped.turn(tier));
            let turn = if turns.contains(&turn) { turn } else { turns.start };
            for turn in (turn..turns.end).chain(turns.start..turn) {
                if !goes_on {
                    return;
                }
                let slot = self.layout().slot_of_turn(turn);
                let is_tried = self.is_tried(slot);
                goes_on = once(if is_tried { self.member_in_turn(slot, slots, &mut members) } else { slot });
            }
        }
        // The members of groups whose turn it was not.
        _ = goes_on && (0..keys).all(once);
    }

    /// The member of a quota group whose turn it is, where a pick comes to one of them.
    fn member_in_turn(&self, slot: usize, tier: &Range<usize>, turns: &mut [usize]) -> usize {
        let Some((group, _)) = self.layout().group_of(slot) else { return slot };
        let members = self.layout().round_of_group(group);
        let turn = self.scoped.as_ref().map_or(0, |scoped| scoped.turn_of_member(group)) + turns[group];
        turns[group] += 1;
        let in_turn = (0..members.len()).map(|next| members[(turn + next) % members.len()] as usize);
        let is_tried = |member: &usize| tier.contains(member) && self.is_tried(*member);
        in_turn.into_iter().find(is_tried).unwrap_or(slot)
    }

    /// The keys that the session prefers, in the best tier: its first choice, and then where most is left.
    fn candidates(&self) -> Vec<usize> {
        let Some(session) = self.demand.session.filter(|_| self.demand.only.is_none()) else {
            return Vec::new();
        };
        let tiers = self.layout().tiers();
        let has_room = |slots: &&Range<usize>| (slots.start..slots.end).any(|slot| self.is_tried(slot));
        let Some(best) = tiers.iter().find(has_room).or(tiers.first()) else { return Vec::new() };
        let mut candidates = self.layout().preferences(self.snapshot.keys()).candidates(session);
        let first = candidates.next();
        let room = |slot: usize| {
            let limit = self.scoped.as_ref().and_then(|scoped| scoped.known_limit(slot));
            limit.map_or(f64::INFINITY, |limit| limit.room(self.nanos()))
        };
        let mut others: Vec<_> = candidates.collect();
        others.sort_by(|slot, other| room(*other).total_cmp(&room(*slot)));
        first.into_iter().chain(others).filter(|slot| best.contains(slot)).collect()
    }

    fn preferred(&self) -> Option<usize> {
        self.candidates().first().copied()
    }

    // ---- the reasons ----

    /// Whether a pick tries the key.
    fn is_tried(&self, slot: usize) -> bool {
        let is_in_index = |scoped: &Arc<Scoped>| scoped.in_index(slot, self.nanos()).is_ok();
        self.key_rests(slot).is_none()
            && self.is_full(slot).is_none()
            && self.scoped.as_ref().is_none_or(is_in_index)
            && self.rests_in_unused(slot).is_none()
    }

    /// Why the request would not get a key, whatever its tier.
    fn why_not(&self, slot: usize) -> Option<Why> {
        let key = self.key(slot);
        if self.demand.only.is_some_and(|id| key.id != *id) {
            return Some((PassedOver::AnotherIsPinned, NEVER));
        }
        if self.demand.avoid.contains(&key.id) {
            return Some((PassedOver::Avoided, NEVER));
        }
        let key = self.key_rests(slot);
        let limit = self.limit(slot).and_then(|limit| self.why_closed(slot, limit));
        let limit = limit.or_else(|| self.rests_in_unused(slot));
        // Requests in flight end sooner than a rest.
        let limit = limit
            .or_else(|| self.is_full(slot))
            .filter(|(why, _)| key.is_none() || !matches!(why, PassedOver::InFlight { .. }));
        // Of two that do not end by themselves, the key's.
        limit.into_iter().chain(key).max_by_key(|(_, until)| *until)
    }

    fn why_closed(&self, slot: usize, limit: &Limit) -> Option<Why> {
        let (tokens, now) = (self.demand.tokens, self.nanos());
        // As a rule, a pick tries no key without room for a usual request.
        let scoped = self.scoped.as_ref()?;
        let in_index = if self.tries_all { Ok(()) } else { scoped.in_index(slot, now) };
        let tokens = if in_index.is_ok() { tokens } else { tokens.max(scoped.usual_tokens()) };
        let budget = |is_it: &dyn Fn(usize, &BudgetStats) -> bool| {
            let budgets = limit.budgets(now).into_iter();
            let budget = budgets.filter(|(at, budget)| is_it(*at, budget)).map(|(_, budget)| budget).next();
            budget.map_or(PassedOver::RestingInScope, PassedOver::Budget)
        };
        let Some((closed, until)) = limit.why_closed(tokens, now) else {
            // A usual request cost more tokens when the pool last looked at the key.
            let due = in_index.err()?;
            return Some((budget(&|_, budget| budget.unit == Unit::Tokens), due.max(now)));
        };
        let why = match closed {
            Closed::Resting => PassedOver::RestingInScope,
            Closed::InFlight { in_flight, most } => PassedOver::InFlight { in_flight, most },
            Closed::Budget(short) => budget(&|at, _| at == short),
        };
        Some((why, until))
    }

    /// The first request of a scope finds the rests that other processes, or an earlier one, have named.
    fn rests_in_unused(&self, slot: usize) -> Option<Why> {
        let limit = (self.snapshot.keys(), self.layout());
        let scopes = &self.engine.limiting.scopes;
        let until = scopes.limit_rests_until(limit, slot, self.unused.as_ref()?, self.now);
        (until != 0).then_some((PassedOver::RestingInScope, until))
    }

    /// Whether a key has as many requests in flight as it may, in all scopes.
    fn is_full(&self, slot: usize) -> Option<Why> {
        let cap = self.key(slot).cap().filter(|cap| cap.is_full())?;
        Some((PassedOver::InFlight { in_flight: cap.in_flight(), most: cap.most().get() }, NEVER))
    }

    fn key_rests(&self, slot: usize) -> Option<Why> {
        let key = self.key(slot);
        let after = |left: Duration| nanos(self.now.saturating_add(left));
        // The next pick returns a key whose rest has ended.
        match key.status(self.now) {
            Status::Healthy => None,
            // A request that only this key may serve gets it.
            Status::Suspected if self.demand.only.is_some() || self.trials.contains(&slot) => None,
            Status::Suspected => {
                let until = self.engine.next_trial_of(key).map_or(NEVER, after);
                Some((PassedOver::Suspected, until))
            }
            Status::Disabled => Some((PassedOver::Disabled, NEVER)),
            status => {
                let until = key.state.load().time_left(self.now).map_or(NEVER, after);
                let cause = key.cause(self.now).unwrap_or(RestCause::Guessed);
                Some((PassedOver::Resting { status, cause }, until))
            }
        }
    }

    fn explained(
        &self,
        slot: usize,
        passed_over: Option<PassedOver>,
        opens_in: Option<Duration>,
    ) -> ExplainedKey {
        let (key, limit) = (self.key(slot), self.limit(slot));
        let budgets = limit.map(|limit| limit.budgets(self.nanos())).unwrap_or_default();
        ExplainedKey {
            id: key.id.clone(),
            tier: key.tier(),
            group: key.group().map(str::to_owned),
            passed_over,
            opens_in,
            in_flight: limit.map_or(0, |limit| limit.in_flight()),
            most_in_flight: limit.and_then(|limit| limit.most_in_flight()),
            budgets: budgets.into_iter().map(|(_, budget)| budget).collect(),
        }
    }
}
