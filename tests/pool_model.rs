//! The pool beside a plain model of it: a row of keys, a cursor, and a deadline each.
//!
//! Random sequences of requests, answers, time and operators' changes are played to both. After each step,
//! both have to have picked the same key and to say the same of all of them.

mod support;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use proptest::{
    prelude::*,
    sample::Index,
    test_runner::{TestCaseError, TestCaseResult},
};
use support::model::*;
use tower_key_rotation::{
    KeyPool, KeySpec, KeyStats, ServedBy, Status,
    clock::ManualClock,
    store::{KeyStore, MemoryStore, Operation},
};

#[derive(Clone, Debug)]
enum Step {
    /// A request that is answered at once.
    Send(Answer),
    /// As many requests as there are keys, and then some, all answered alike.
    SendRound(Answer, u8),
    /// A request that stays under way.
    Begin,
    /// The answer to one that is under way, if there is one.
    Finish(Index, Answer),
    /// The caller drops one that is under way.
    Abandon(Index),
    Advance(Duration),
    Reset(Index),
    Disable(Index),
    Enable(Index),
    Insert(u32),
    Remove(Index),
    Reload,
    /// Somebody asks when the next key is there.
    Look,
    /// Another process inserts a key into the store, removes one, or gives one another secret.
    StoreInsert(u32),
    StoreRemove(Index),
    StoreReplace(Index),
}

fn answer() -> impl Strategy<Value = Answer> {
    let status = prop_oneof![5 => Just(200), 1 => Just(500), 6 => Just(429), 1 => Just(401), 1 => Just(402)];
    let retry_after = prop_oneof![
        3 => Just(None),
        1 => (0u64..600).prop_map(Some),
        1 => prop_oneof![Just(3_599), Just(3_600), Just(3_601), Just(u64::MAX)].prop_map(Some),
    ];
    (status, retry_after).prop_map(|(status, retry_after)| Answer { status, retry_after })
}

fn time() -> impl Strategy<Value = Duration> {
    prop_oneof![
        6 => (0u64..40_000).prop_map(Duration::from_millis),
        1 => Just(Duration::from_nanos(1)),
        3 => Just(COOLDOWN),
        1 => Just(COOLDOWN - Duration::from_nanos(1)),
        1 => Just(LONGEST_HINT),
        1 => Just(EXHAUSTED),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        24 => answer().prop_map(Step::Send),
        2 => (answer(), any::<u8>()).prop_map(|(answer, more)| Step::SendRound(answer, more % 8)),
        6 => Just(Step::Begin),
        6 => (any::<Index>(), answer()).prop_map(|(which, answer)| Step::Finish(which, answer)),
        1 => any::<Index>().prop_map(Step::Abandon),
        10 => time().prop_map(Step::Advance),
        2 => any::<Index>().prop_map(Step::Reset),
        2 => any::<Index>().prop_map(Step::Disable),
        2 => any::<Index>().prop_map(Step::Enable),
        2 => any::<u32>().prop_map(Step::Insert),
        2 => any::<Index>().prop_map(Step::Remove),
        3 => Just(Step::Reload),
        1 => Just(Step::Look),
        1 => any::<u32>().prop_map(Step::StoreInsert),
        1 => any::<Index>().prop_map(Step::StoreRemove),
        1 => any::<Index>().prop_map(Step::StoreReplace),
    ]
}

fn steps(most: usize) -> impl Strategy<Value = Vec<Step>> {
    prop::collection::vec(step(), 1..most)
}

// ---- the model ----

#[derive(Clone, Debug)]
struct ModelKey {
    id: String,
    secret: SecretNumber,
    condition: Condition,
    requests: u64,
    limited: u64,
    last_reason: Option<u16>,
    unwritten: bool,
}

impl ModelKey {
    fn new(id: &str, secret: SecretNumber, disabled: bool) -> Self {
        let condition = Condition { disabled, ..Condition::default() };
        let (requests, limited, last_reason, unwritten) = Default::default();
        Self { id: id.to_owned(), secret, condition, requests, limited, last_reason, unwritten }
    }

    fn mark(&mut self, answer: Answer, now: Duration) {
        let Some(rest) = answer.rest(now) else { return };
        self.limited += 1;
        self.last_reason = Some(answer.status);
        self.unwritten |= self.condition.extend(rest);
    }

    fn differs_from(&self, stats: &KeyStats, now: Duration) -> bool {
        self.id != stats.id.as_str()
            || self.condition.status(now) != stats.status
            || self.condition.time_left(now) != stats.time_left
            || self.requests != stats.requests
            || self.limited != stats.limited
            || self.last_reason != stats.last_reason
    }
}

#[derive(Debug, Default)]
struct Model {
    now: Duration,
    keys: Vec<ModelKey>,
    /// The place behind the key that was picked last.
    cursor: usize,
    store: BTreeMap<String, (SecretNumber, bool)>,
    secrets: SecretNumber,
}

impl Model {
    fn pick(&mut self) -> Option<SecretNumber> {
        let count = self.keys.len();
        let place = (self.cursor..count)
            .chain(0..self.cursor.min(count))
            .find(|place| self.keys[*place].condition.is_available(self.now))?;
        self.cursor = place + 1;
        self.keys[place].requests += 1;
        Some(self.keys[place].secret)
    }

    fn retry_in(&self) -> Option<Duration> {
        retry_in(self.keys.iter().map(|key| &key.condition), self.now)
    }

    fn mark(&mut self, secret: SecretNumber, answer: Answer) {
        let now = self.now;
        if let Some(key) = self.keys.iter_mut().find(|key| key.secret == secret) {
            key.mark(answer, now);
        }
    }

    fn new_secret(&mut self) -> SecretNumber {
        self.secrets += 1;
        self.secrets
    }

    fn take_out(&mut self, place: usize) {
        self.keys.remove(place);
        // The turn stays behind the key that was picked last.
        if place < self.cursor {
            self.cursor -= 1;
        }
    }

    fn reload(&mut self) {
        for place in (0..self.keys.len()).rev() {
            if !self.store.contains_key(&self.keys[place].id) {
                self.take_out(place);
            }
        }
        for (id, (secret, disabled)) in &self.store {
            match self.keys.iter_mut().find(|key| key.id == *id) {
                Some(key) if key.secret == *secret => {}
                Some(key) => *key = ModelKey::new(id, *secret, *disabled),
                None => self.keys.push(ModelKey::new(id, *secret, *disabled)),
            }
        }
    }
}

// ---- the pool, driven through the layer ----

struct Pair {
    model: Model,
    pool: KeyPool,
    clock: ManualClock,
    store: MemoryStore,
    caller: Caller,
    under_way: Vec<Flight>,
}

impl Pair {
    fn new(keys: usize) -> Self {
        let clock = ManualClock::new();
        let store = MemoryStore::with_clock(Arc::new(clock.clone()));
        let mut model = Model::default();
        let mut builder = KeyPool::builder().clock(clock.clone());
        for number in 0..keys {
            let (id, own) = (format!("key-{number:06}"), model.new_secret());
            builder = builder.key(id.clone(), secret(own));
            model.store.insert(id.clone(), (own, false));
            model.keys.push(ModelKey::new(&id, own, false));
        }
        let pool = immediately(builder.open(store.clone())).expect("a pool");
        assert_eq!(pool.rejected(), []);

        let caller = Caller::new(&pool);
        Self { model, pool, clock, store, caller, under_way: Vec::new() }
    }

    /// Sends a request with both, and compares which key it went out with.
    fn begin(&mut self) -> Result<Option<Flight>, TestCaseError> {
        match (self.caller.send(), self.model.pick()) {
            (Ok(flight), Some(expected)) => {
                prop_assert!(
                    flight.secret() == expected,
                    "{:?} was picked, but {:?} is next",
                    self.name(flight.secret()),
                    self.name(expected)
                );
                Ok(Some(flight))
            }
            (Err(error), None) => {
                prop_assert_eq!(error.retry_in(), self.model.retry_in());
                prop_assert_eq!(error.is_empty_pool(), self.model.keys.is_empty());
                Ok(None)
            }
            (Ok(flight), None) => {
                let name = self.name(flight.secret());
                Err(TestCaseError::fail(format!("{name:?} was used, but none is available")))
            }
            (Err(_), Some(expected)) => {
                Err(TestCaseError::fail(format!("no key was found, but {:?} is there", self.name(expected))))
            }
        }
    }

    fn finish(&mut self, flight: Flight, answer: Answer) -> TestCaseResult {
        let secret = flight.secret();
        let id = self.name(secret);
        let others = self.model.keys.iter().filter(|key| key.secret != secret);
        let has_another = others.clone().any(|key| key.condition.is_available(self.model.now));
        let answer = answer.unless_last(has_another);
        let response = flight.answer(answer);
        if let Some(id) = id {
            prop_assert_eq!(response.extensions().get(), Some(&ServedBy(key_id(&id))));
        }
        self.model.mark(secret, answer);
        Ok(())
    }

    fn send(&mut self, answer: Answer) -> TestCaseResult {
        match self.begin()? {
            Some(flight) => self.finish(flight, answer),
            None => Ok(()),
        }
    }

    fn name(&self, number: SecretNumber) -> Option<String> {
        self.model.keys.iter().find(|key| key.secret == number).map(|key| key.id.clone())
    }

    fn some_id(&self, which: Index) -> String {
        match self.model.keys.len() {
            0 => "nobody".to_owned(),
            count => self.model.keys[which.index(count)].id.clone(),
        }
    }

    /// An operator's change of one key: the store makes it, and the pool applies the store's answer, or loads the key if
    /// the store has another one of that id.
    fn operate(&mut self, id: &str, done: bool, change: impl Fn(&mut ModelKey)) -> TestCaseResult {
        let known = self.model.keys.iter_mut().find(|key| key.id == id).zip(self.model.store.get(id));
        prop_assert_eq!(done, known.is_some());
        if let Some((key, (secret, disabled))) = known {
            if key.secret != *secret {
                *key = ModelKey::new(id, *secret, *disabled);
            }
            change(key);
        }
        Ok(())
    }

    fn step(&mut self, step: Step) -> TestCaseResult {
        match step {
            Step::Send(answer) => self.send(answer)?,
            Step::SendRound(answer, more) => {
                for _ in 0..self.model.keys.len() + usize::from(more) {
                    self.send(answer)?;
                }
            }
            Step::Begin => {
                if let Some(flight) = self.begin()? {
                    self.under_way.push(flight);
                }
            }
            Step::Finish(which, answer) => {
                if !self.under_way.is_empty() {
                    let flight = self.under_way.swap_remove(which.index(self.under_way.len()));
                    self.finish(flight, answer)?;
                }
            }
            Step::Abandon(which) => {
                if !self.under_way.is_empty() {
                    self.under_way.swap_remove(which.index(self.under_way.len()));
                }
            }
            Step::Advance(by) => self.advance(by),
            Step::Reset(which) => {
                let id = self.some_id(which);
                let done = immediately(self.pool.reset(&id)).is_ok();
                self.operate(&id, done, |key| {
                    key.condition.rest = None;
                    key.unwritten = false;
                })?;
            }
            Step::Disable(which) => self.set_disabled(which, true)?,
            Step::Enable(which) => self.set_disabled(which, false)?,
            Step::Insert(number) => {
                let (id, own) = (format!("new-{:02}", number % 50), self.model.new_secret());
                let done = immediately(self.pool.insert(&id, secret(own))).is_ok();
                let taken =
                    self.model.store.contains_key(&id) || self.model.keys.iter().any(|key| key.id == id);
                prop_assert_eq!(done, !taken);
                if done {
                    self.model.keys.push(ModelKey::new(&id, own, false));
                    self.model.store.insert(id, (own, false));
                }
            }
            Step::Remove(which) => {
                let id = self.some_id(which);
                let done = immediately(self.pool.remove(&id)).is_ok();
                let place = self.model.keys.iter().position(|key| key.id == id);
                prop_assert_eq!(done, place.is_some());
                if let Some(place) = place {
                    self.model.take_out(place);
                    self.model.store.remove(&id);
                }
            }
            Step::Reload => {
                immediately(self.pool.reload()).expect("a store in memory");
                self.model.reload();
            }
            Step::Look => self.look()?,
            Step::StoreInsert(number) => {
                let (id, own) = (format!("new-{:02}", number % 50), self.model.new_secret());
                let inserted = self.operate_elsewhere(&id, insertion(&id, own));
                prop_assert_eq!(inserted, !self.model.store.contains_key(&id));
                self.model.store.entry(id).or_insert((own, false));
            }
            Step::StoreRemove(which) => {
                let id = self.some_id(which);
                let was_there = self.operate_elsewhere(&id, Operation::Remove);
                prop_assert_eq!(was_there, self.model.store.remove(&id).is_some());
            }
            Step::StoreReplace(which) => {
                let (id, own) = (self.some_id(which), self.model.new_secret());
                if self.operate_elsewhere(&id, Operation::Remove) {
                    prop_assert!(self.operate_elsewhere(&id, insertion(&id, own)));
                    self.model.store.insert(id, (own, false));
                }
            }
        }
        self.compare()
    }

    /// Whether the store could do it.
    fn operate_elsewhere(&self, id: &str, operation: Operation) -> bool {
        immediately(self.store.operate(key_id(id), operation)).expect("memory").is_some()
    }

    fn set_disabled(&mut self, which: Index, disabled: bool) -> TestCaseResult {
        let id = self.some_id(which);
        let done = match disabled {
            true => immediately(self.pool.disable(&id)),
            false => immediately(self.pool.enable(&id)),
        };
        if let Some((_, stored)) = self.model.store.get_mut(&id).filter(|_| done.is_ok()) {
            *stored = disabled;
        }
        self.operate(&id, done.is_ok(), |key| key.condition.disabled = disabled)
    }

    fn advance(&mut self, by: Duration) {
        self.clock.advance(by);
        self.model.now += by;
    }

    fn compare(&self) -> TestCaseResult {
        let (model, stats) = (&self.model, self.pool.stats());
        let now = model.now;
        let count = |status| model.keys.iter().filter(|key| key.condition.status(now) == status).count();
        prop_assert_eq!(stats.keys.len(), model.keys.len());
        for (expected, key) in model.keys.iter().zip(&stats.keys) {
            prop_assert!(!expected.differs_from(key, now), "{expected:?} at {now:?}, but {key:?}");
        }
        prop_assert_eq!(stats.healthy, count(Status::Healthy));
        prop_assert_eq!(stats.rate_limited, count(Status::RateLimited));
        prop_assert_eq!(stats.exhausted, count(Status::Exhausted));
        prop_assert_eq!(stats.revoked, count(Status::Revoked));
        prop_assert_eq!(stats.disabled, count(Status::Disabled));
        prop_assert_eq!(stats.marks_waiting, model.keys.iter().filter(|key| key.unwritten).count());
        Ok(())
    }

    fn look(&self) -> TestCaseResult {
        let available = self.model.keys.iter().any(|key| key.condition.is_available(self.model.now));
        let next = if available { Some(Duration::ZERO) } else { self.model.retry_in() };
        prop_assert_eq!(self.pool.next_return(), next);
        Ok(())
    }
}

fn insertion(id: &str, own: SecretNumber) -> Operation {
    Operation::Insert(KeySpec::new(key_id(id), secret(own)))
}

fn play(keys: usize, steps: Vec<Step>) -> TestCaseResult {
    let mut pair = Pair::new(keys);
    steps.into_iter().try_for_each(|step| pair.step(step))
}

fn is_about_requests(step: &Step) -> bool {
    matches!(
        step,
        Step::Send(_)
            | Step::SendRound(..)
            | Step::Begin
            | Step::Finish(..)
            | Step::Abandon(_)
            | Step::Advance(_)
            | Step::Look
    )
}

fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, max_shrink_iters: 2_000, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(cases(250))]

    #[test]
    fn small_pools_rotate_in_order_under_any_responses(keys in 0usize..8, steps in steps(80)) {
        play(keys, steps.into_iter().filter(is_about_requests).collect())?;
    }

    #[test]
    fn small_pools_rotate_despite_operators_and_store_changes(
        keys in 0usize..8,
        steps in steps(80),
    ) {
        play(keys, steps)?;
    }
}

proptest! {
    #![proptest_config(cases(30))]

    #[test]
    fn two_hundred_keys_rotate_in_order(keys in 60usize..200, steps in steps(60)) {
        play(keys, steps)?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 20, ..cases(6) })]

    /// From 4,097 keys on, the index has a third level: it is needed where everything between two available
    /// keys rests up to there.
    #[test]
    fn large_pools_rotate_across_all_index_levels(
        keys in 4_100usize..4_500,
        awake_below in prop::collection::vec(0usize..4_096, 1..4),
        awake_above in prop::collection::vec(any::<Index>(), 1..4),
        steps in steps(12),
    ) {
        let mut pair = Pair::new(keys);
        let awake_above: Vec<_> = awake_above.iter().map(|place| 4_096 + place.index(keys - 4_096)).collect();
        for place in 0..keys {
            let is_awake = awake_below.contains(&place) || awake_above.contains(&place);
            pair.send(if is_awake { FINE } else { LIMITED })?;
        }
        pair.compare()?;
        for _ in 0..20 {
            pair.send(FINE)?;
        }
        // No whole rounds here: they take a model as slow as this one too long.
        for step in steps.into_iter().filter(|step| !matches!(step, Step::SendRound(..))) {
            pair.step(step)?;
        }
        pair.advance(COOLDOWN);
        for _ in 0..200 {
            pair.send(FINE)?;
        }
        pair.compare()?;
    }
}

// ---- what the model found, and what it leaves out, one by one ----

#[test]
fn removing_a_key_skips_no_other_key() {
    let mut pair = Pair::new(4);
    pair.send(FINE).unwrap();
    pair.send(FINE).unwrap();
    // The third is next, and stays so without the first.
    immediately(pair.pool.remove("key-000000")).unwrap();
    pair.model.take_out(0);
    pair.send(FINE).unwrap();
}

#[test]
fn reload_removing_a_key_skips_no_other_key() {
    let mut pair = Pair::new(4);
    pair.send(FINE).unwrap();
    pair.send(FINE).unwrap();
    assert!(pair.operate_elsewhere("key-000000", Operation::Remove));
    pair.model.store.remove("key-000000");
    pair.step(Step::Reload).unwrap();
    pair.send(FINE).unwrap();
}

#[test]
fn f08_a_reload_keeps_a_mark_the_store_lacks() {
    let mut pair = Pair::new(2);
    pair.send(LIMITED).unwrap();
    pair.step(Step::Reload).unwrap();
    let stats = pair.pool.stats();
    assert_eq!((stats.keys[0].status, stats.keys[0].time_left), (Status::RateLimited, Some(COOLDOWN)));
    assert_eq!(stats.marks_waiting, 1);
}

#[test]
fn remote_disabling_works_beside_a_pending_mark() {
    let mut pair = Pair::new(2);
    pair.send(LIMITED).unwrap();
    assert!(pair.operate_elsewhere("key-000000", Operation::Disable));
    immediately(pair.pool.reload()).unwrap();
    assert_eq!(pair.pool.stats().keys[0].status, Status::Disabled);
    // Nor does its own deadline bring it back.
    pair.clock.advance(COOLDOWN);
    assert_eq!(pair.pool.stats().keys[0].status, Status::Disabled);
}

/// With the turn at key 100, and all of 200 back at one moment, key 100 is next.
#[test]
fn keys_returning_together_are_picked_in_order() {
    let mut pair = Pair::new(200);
    for _ in 0..100 {
        pair.send(FINE).unwrap();
    }
    for _ in 0..200 {
        pair.send(LIMITED).unwrap();
    }
    pair.clock.advance(COOLDOWN);
    pair.model.now += COOLDOWN;
    for _ in 0..400 {
        pair.send(FINE).unwrap();
    }
}

/// What holds of such a crowd in any case: nobody is left out for longer than a round.
#[test]
fn keys_returning_together_are_picked_evenly() {
    let mut pair = Pair::new(200);
    for _ in 0..300 {
        pair.send(if pair.model.keys[150].requests == 0 { FINE } else { LIMITED }).unwrap();
    }
    while pair.begin().unwrap().map(|flight| pair.finish(flight, LIMITED)).is_some() {}
    let before: Vec<_> = pair.pool.stats().keys.iter().map(|key| key.requests).collect();
    pair.clock.advance(COOLDOWN);
    for _ in 0..10 * 200 {
        pair.caller.send().expect("a key is available").answer(FINE);
    }
    for (key, before) in pair.pool.stats().keys.iter().zip(before) {
        let served = key.requests - before;
        assert!((9..=11).contains(&served), "{} was picked {served} times in 10 rounds", key.id);
    }
}
