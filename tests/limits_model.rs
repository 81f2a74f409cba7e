//! A pool with quotas beside a plain model of them: for each key and scope a rest, and the level of each budget.
//!
//! Random sequences of requests, answers, failures, dropped requests, time and operators' changes are played to both. The
//! model says from when on each key may and must serve a request, and so whether a pick, or its error, is right.

mod support;

use std::{
    collections::BTreeMap,
    io,
    num::NonZeroU32,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures_util::future::BoxFuture;
use http::{Request, Response};
use proptest::{
    prelude::*,
    sample::Index,
    test_runner::{TestCaseError, TestCaseResult},
};
use support::model::{
    Answer, COOLDOWN, Condition, LONGEST_HINT, SecretNumber, immediately, key_id, secret, secret_number,
    verdict,
};
use tokio::sync::oneshot;
use tower::{Layer, Service, service_fn, util::BoxService};
use tower_key_rotation::{
    Error, KeyPool, KeyPoolBuilder, KeyRotationLayer, KeySpec, NoKeyAvailable, Quota, Traits,
    classify::{ResponseHead, Verdict},
    clock::ManualClock,
    store::Scope,
};

/// How far apart the pool's ns and the model's levels may be, in seconds.
const ROUNDING: f64 = 0.001;

/// How far apart the time in an error and the model's may be, in seconds.
const PRECISION: f64 = 0.02;

/// Pools keep the ends of windows in ticks of 2^24 ns.
const TICK: u64 = 1 << 24;

/// How many rests of keys a pick ends that are over.
const ENDED_PER_PICK: usize = 16;

type Seconds = f64;

// ---- what is played ----

#[derive(Clone, Debug)]
struct Setup {
    keys: Vec<Place>,
    quotas: Vec<Limits>,
    /// The fewest and the most tokens of a request.
    costs: (u64, u64),
}

#[derive(Clone, Copy, Debug)]
struct Place {
    tier: u8,
    group: Option<u8>,
    weight: NonZeroU32,
    /// The most requests in flight.
    cap: Option<NonZeroU32>,
}

#[derive(Clone, Copy, Debug)]
struct Limits {
    units: u32,
    period: Period,
    burst: Option<u32>,
    is_window: bool,
    is_of_tokens: bool,
}

#[derive(Clone, Copy, Debug)]
enum Period {
    Second,
    Minute,
    Hour,
}

#[derive(Clone, Debug)]
struct Wish {
    scope: Option<u8>,
    tokens: u64,
    session: Option<u8>,
    key: WishedKey,
}

#[derive(Clone, Debug)]
enum WishedKey {
    Any,
    Only(Index),
    Avoid(Vec<Index>),
}

#[derive(Clone, Copy, Debug)]
enum Reply {
    Answer(Answer),
    /// The connection breaks.
    Failure,
}

#[derive(Clone, Debug)]
enum Step {
    /// A request that is answered at once.
    Send(Wish, Reply),
    /// As many of them as there are keys, and then some.
    SendRound(Wish, Reply, u8),
    Begin(Wish),
    Finish(Index, Reply),
    Drop(Index),
    Advance(Duration),
    /// To the time that the last error named.
    AdvanceToRetry,
    Reset(Index),
    Disable(Index),
    Enable(Index),
    Remove(Index),
    Insert(Place),
}

fn place() -> impl Strategy<Value = Place> {
    let tier = prop_oneof![4 => Just(0), 1 => Just(1), 1 => Just(2)];
    let group = prop_oneof![3 => Just(None), 1 => (0u8..2).prop_map(Some)];
    let weight = prop_oneof![2 => Just(NonZeroU32::MIN), 1 => any::<u8>().prop_map(|weight| NonZeroU32::MIN.saturating_add(weight.into()))];
    let cap = prop_oneof![3 => Just(None), 1 => (1u32..4).prop_map(NonZeroU32::new)];
    (tier, group, weight, cap).prop_map(|(tier, group, weight, cap)| Place { tier, group, weight, cap })
}

fn limits() -> impl Strategy<Value = Limits> {
    let period = prop_oneof![1 => Just(Period::Second), 3 => Just(Period::Minute), 1 => Just(Period::Hour)];
    let burst = prop::option::of(1u32..8);
    (any::<bool>(), 1u32..12, period, burst, any::<bool>()).prop_map(
        |(is_of_tokens, units, period, burst, is_window)| {
            let scale = if is_of_tokens { 40 } else { 1 };
            let burst = burst.map(|burst| burst * scale);
            Limits { units: units * scale, period, burst, is_window, is_of_tokens }
        },
    )
}

fn setup(keys: impl Strategy<Value = usize>) -> impl Strategy<Value = Setup> {
    let costs = prop_oneof![
        2 => Just((0, 0)),
        2 => (1u64..150).prop_map(|cost| (cost, cost)),
        1 => Just((0, 200)),
    ];
    let plain = Just(ALONE);
    let places = prop_oneof![plain.boxed(), place().boxed()];
    let keys = keys.prop_flat_map(move |count| prop::collection::vec(places.clone(), count));
    (keys, prop::collection::vec(limits(), 0..4), costs).prop_map(|(keys, quotas, costs)| Setup {
        keys,
        quotas,
        costs,
    })
}

fn wish() -> impl Strategy<Value = Wish> {
    let scope = prop_oneof![4 => Just(Some(0)), 1 => Just(Some(1)), 1 => Just(None)];
    let key = prop_oneof![
        8 => Just(WishedKey::Any),
        1 => any::<Index>().prop_map(WishedKey::Only),
        1 => prop::collection::vec(any::<Index>(), 1..4).prop_map(WishedKey::Avoid),
    ];
    let session = prop::option::weighted(0.2, 0u8..4);
    (scope, any::<u64>(), session, key).prop_map(|(scope, tokens, session, key)| Wish {
        scope,
        tokens,
        session,
        key,
    })
}

fn reply() -> impl Strategy<Value = Reply> {
    let answer = |status, retry_after| Reply::Answer(Answer { status, retry_after });
    prop_oneof![
        12 => Just(answer(200, None)),
        1 => Just(answer(500, None)),
        2 => Just(answer(429, None)),
        2 => (0u64..4_000).prop_map(move |seconds| answer(429, Some(seconds))),
        1 => Just(answer(402, None)),
        2 => Just(Reply::Failure),
    ]
}

fn time() -> impl Strategy<Value = Duration> {
    prop_oneof![
        4 => (0u64..3_000).prop_map(Duration::from_millis),
        4 => (0u64..90).prop_map(Duration::from_secs),
        1 => Just(Duration::from_nanos(1)),
        1 => Just(COOLDOWN),
        1 => Just(COOLDOWN - Duration::from_nanos(1)),
        1 => Just(LONGEST_HINT),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => (wish(), reply()).prop_map(|(wish, reply)| Step::Send(wish, reply)),
        4 => (wish(), reply(), 0u8..4).prop_map(|(wish, reply, more)| Step::SendRound(wish, reply, more)),
        8 => wish().prop_map(Step::Begin),
        6 => (any::<Index>(), reply()).prop_map(|(which, reply)| Step::Finish(which, reply)),
        2 => any::<Index>().prop_map(Step::Drop),
        8 => time().prop_map(Step::Advance),
        4 => Just(Step::AdvanceToRetry),
        1 => any::<Index>().prop_map(Step::Reset),
        1 => any::<Index>().prop_map(Step::Disable),
        1 => any::<Index>().prop_map(Step::Enable),
        1 => any::<Index>().prop_map(Step::Remove),
        1 => place().prop_map(Step::Insert),
    ]
}

fn steps(most: usize) -> impl Strategy<Value = Vec<Step>> {
    prop::collection::vec(step(), 1..most)
}

impl Limits {
    fn quota(self) -> Quota {
        let quota = match self.period {
            Period::Second => Quota::per_second(self.units),
            Period::Minute => Quota::per_minute(self.units),
            Period::Hour => Quota::per_hour(self.units),
        };
        let quota = self.burst.map_or(quota.clone(), |burst| quota.burst(burst));
        let quota = if self.is_window { quota.window() } else { quota };
        if self.is_of_tokens { quota.tokens() } else { quota }
    }

    fn seconds(self) -> u64 {
        match self.period {
            Period::Second => 1,
            Period::Minute => 60,
            Period::Hour => 3_600,
        }
    }

    fn cost(self, tokens: u64) -> f64 {
        if self.is_of_tokens { tokens as f64 } else { 1.0 }
    }
}

// ---- the model ----

#[derive(Clone, Debug)]
enum Budget {
    /// The level at the last change, and when that was.
    Bucket {
        rate: f64,
        size: f64,
        level: f64,
        at: Seconds,
    },
    Window {
        period: Duration,
        limit: f64,
        end: Duration,
        left: f64,
    },
}

impl Budget {
    fn full(limits: Limits, now: Duration) -> Self {
        let units = f64::from(limits.units);
        if limits.is_window {
            let period = Duration::from_secs(limits.seconds());
            let [end, period] = [now + period, period]
                .map(|time| Duration::from_nanos((time.as_nanos() as u64).next_multiple_of(TICK)));
            return Self::Window { period, limit: units, end, left: units };
        }
        let rate = units / limits.seconds() as f64;
        let size = limits.burst.map_or(rate.max(1.0), f64::from);
        Self::Bucket { rate, size, level: size, at: seconds(now) }
    }

    /// Takes from the budget, or gives back what was taken at that time. What an earlier window gave is lost.
    fn change(&mut self, now: Duration, by: f64, taken_at: Duration) {
        match self {
            Self::Bucket { rate, size, level, at } => {
                let now = seconds(now);
                *level = (*level + (now - *at) * *rate).min(*size) + by;
                *level = level.min(*size);
                *at = now;
            }
            Self::Window { period, limit, end, left } => {
                while *end <= now {
                    (*end, *left) = (*end + *period, *limit);
                }
                if taken_at + Duration::from_nanos(TICK) >= *end - *period {
                    *left = (*left + by).clamp(0.0, *limit);
                }
            }
        }
    }

    /// When there is that much, or all that there can be. Long ago, if there always was.
    fn when(&self, cost: f64, now: Duration) -> Seconds {
        match self {
            Self::Bucket { rate, size, level, at } => at + (cost.min(*size) - level) / rate,
            Self::Window { limit, end, left, .. } => {
                if *end <= now || cost.min(*limit) <= *left {
                    f64::NEG_INFINITY
                } else {
                    seconds(*end)
                }
            }
        }
    }
}

#[derive(Clone, Debug)]
struct Limit {
    rest: Seconds,
    budgets: Vec<(Limits, Budget)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Owner {
    Key(SecretNumber),
    Group(u8),
}

#[derive(Clone, Debug)]
struct Key {
    id: String,
    secret: SecretNumber,
    place: Place,
    condition: Condition,
    in_flight: u32,
}

impl Key {
    fn owner(&self) -> Owner {
        self.place.group.map_or(Owner::Key(self.secret), Owner::Group)
    }

    fn is_full(&self) -> bool {
        self.place.cap.is_some_and(|cap| self.in_flight >= cap.get())
    }
}

/// From when on a key may and must serve a request.
#[derive(Clone, Copy, Debug)]
struct Window {
    may: Seconds,
    must: Seconds,
}

impl Window {
    const ALWAYS: Self = Self { may: f64::NEG_INFINITY, must: f64::NEG_INFINITY };
    const NEVER: Self = Self { may: f64::INFINITY, must: f64::INFINITY };

    fn but_after(self, may: Seconds, must: Seconds) -> Self {
        Self { may: self.may.max(may), must: self.must.max(must) }
    }

    fn must_serve(self, now: Seconds) -> bool {
        self.must <= now - ROUNDING
    }

    fn or(self, other: Self) -> Self {
        Self { may: self.may.min(other.may), must: self.must.min(other.must) }
    }
}

#[derive(Debug, Default)]
struct Model {
    now: Duration,
    keys: Vec<Key>,
    quotas: Vec<Limits>,
    limits: Vec<Limit>,
    limit_of: BTreeMap<(Owner, Option<u8>), usize>,
    /// The most tokens of a request that was served in a scope: a key with less room may be passed over.
    most_tokens: BTreeMap<Option<u8>, u64>,
    secrets: SecretNumber,
}

/// A request, with the keys that it wishes for.
#[derive(Clone, Debug)]
struct Demand {
    scope: Option<u8>,
    tokens: u64,
    session: Option<u8>,
    only: Option<String>,
    avoid: Vec<String>,
}

impl Model {
    /// From when on a key serves a request.
    fn window(&self, key: &Key, demand: &Demand) -> Window {
        let is_wished = demand.only.as_ref().is_none_or(|id| *id == key.id);
        if key.condition.disabled || !is_wished || demand.avoid.contains(&key.id) {
            return Window::NEVER;
        }
        if key.is_full() {
            return Window::NEVER;
        }
        let mut window = Window::ALWAYS;
        if let Some(rest) = key.condition.rest(self.now) {
            let until = rest.until.map_or(f64::INFINITY, seconds);
            window = window.but_after(until, until);
        }
        if demand.only.is_some() && key.condition.rest.is_some() && self.keys.len() > ENDED_PER_PICK {
            // Picks end the rests of other keys first.
            window.must = f64::INFINITY;
        }
        let Some(limit) = self.limit_of.get(&(key.owner(), demand.scope)) else { return window };
        let Limit { rest, budgets } = &self.limits[*limit];
        window = window.but_after(*rest, *rest);
        let usual = match demand.only {
            Some(_) => 0,
            None => self.most_tokens.get(&demand.scope).copied().unwrap_or(0),
        };
        for (limits, budget) in budgets {
            let may = budget.when(limits.cost(demand.tokens), self.now);
            let must = budget.when(limits.cost(demand.tokens.max(usual)), self.now);
            window = window.but_after(may, must);
        }
        window
    }

    /// Counts a request that a key serves. Returns its limit.
    fn serve(&mut self, owner: Owner, demand: &Demand) -> usize {
        let now = self.now;
        let limit = *self.limit_of.entry((owner, demand.scope)).or_insert_with(|| {
            let budgets = self.quotas.iter().map(|limits| (*limits, Budget::full(*limits, now)));
            self.limits.push(Limit { rest: f64::NEG_INFINITY, budgets: budgets.collect() });
            self.limits.len() - 1
        });
        for (limits, budget) in &mut self.limits[limit].budgets {
            budget.change(now, -limits.cost(demand.tokens), now);
        }
        let most = self.most_tokens.entry(demand.scope).or_default();
        *most = demand.tokens.max(*most);
        limit
    }

    /// Counts a request in or out.
    fn count(&mut self, secret: SecretNumber, change: i32) {
        if let Some(key) = self.keys.iter_mut().find(|key| key.secret == secret) {
            key.in_flight = key.in_flight.checked_add_signed(change).expect("no more than began");
        }
    }

    /// Gives back what a request took: all of it, or its tokens alone.
    fn give_back(&mut self, flight: &Flight, all: bool) {
        for (limits, budget) in &mut self.limits[flight.limit].budgets {
            if all || limits.is_of_tokens {
                budget.change(self.now, limits.cost(flight.tokens), flight.at);
            }
        }
    }

    fn finish(&mut self, flight: &Flight, reply: Reply) {
        let Reply::Answer(answer) = reply else { return self.give_back(flight, false) };
        let Some(rest) = answer.rest(self.now) else {
            if answer.status >= 400 {
                self.give_back(flight, false);
            }
            return;
        };
        if answer.status != 429 {
            self.give_back(flight, false);
            if let Some(key) = self.keys.iter_mut().find(|key| key.secret == flight.pending.secret) {
                key.condition.extend(rest);
            }
            return;
        }
        self.give_back(flight, true);
        let hint = answer.retry_after.map_or(Duration::ZERO, Duration::from_secs).min(LONGEST_HINT);
        let until = seconds(self.now + hint.max(COOLDOWN));
        let limit = &mut self.limits[flight.limit];
        limit.rest = limit.rest.max(until);
        let scope =
            self.limit_of.iter().find(|(_, limit)| **limit == flight.limit).map(|((_, scope), _)| *scope);
        let key = self.keys.iter_mut().find(|key| key.secret == flight.pending.secret);
        if let (Some(None), Some(key)) = (scope, key) {
            // Without a scope, the whole key rests.
            key.condition.extend(rest);
        }
    }

    fn add(&mut self, place: Place) -> KeySpec {
        self.secrets += 1;
        let id = format!("key-{:03}", self.secrets);
        let mut spec = KeySpec::new(key_id(&id), secret(self.secrets));
        spec.tier = Some(place.tier);
        spec.weight = Some(place.weight);
        spec.max_in_flight = place.cap;
        spec.group = place.group.map(|group| format!("group-{group}"));
        self.keys.push(Key {
            id,
            secret: self.secrets,
            place,
            condition: Condition::default(),
            in_flight: 0,
        });
        spec
    }

    fn remove(&mut self, place: usize) {
        let owner = self.keys.remove(place).owner();
        if self.keys.iter().all(|key| key.owner() != owner) {
            self.limit_of.retain(|(of, _), _| *of != owner);
        }
    }
}

fn seconds(time: Duration) -> Seconds {
    time.as_secs_f64()
}

// ---- the pool, driven through the layer ----

type Sent = Arc<Mutex<Option<(String, oneshot::Sender<Reply>)>>>;

/// A client with the layer, over a service that the test answers for.
struct Client {
    service: BoxService<Request<()>, Response<()>, Error<io::Error>>,
    sent: Sent,
}

/// A request under way.
struct Pending {
    secret: SecretNumber,
    reply: oneshot::Sender<Reply>,
    response: BoxFuture<'static, Result<Response<()>, Error<io::Error>>>,
}

impl Client {
    fn new(pool: &KeyPool) -> Self {
        let sent = Sent::default();
        let seen = sent.clone();
        let inner = service_fn(move |request: Request<()>| {
            let header = request.headers()["authorization"].to_str().expect("text");
            let secret = header.strip_prefix("Bearer ").expect("a secret").to_owned();
            let (reply, answered) = oneshot::channel();
            *seen.lock().expect("not poisoned") = Some((secret, reply));
            async move {
                let Reply::Answer(Answer { status, retry_after }) = answered.await.expect("an answer") else {
                    return Err(io::ErrorKind::ConnectionReset.into());
                };
                let mut response = Response::builder().status(status);
                if let Some(seconds) = retry_after {
                    response = response.header("retry-after", seconds);
                }
                Ok(response.body(()).expect("a response"))
            }
        });
        let layer = KeyRotationLayer::new(pool).classify(verdict as fn(&ResponseHead<'_>) -> Verdict);
        Self { service: BoxService::new(layer.layer(inner)), sent }
    }

    fn send(&mut self, traits: Traits) -> Result<Pending, NoKeyAvailable> {
        let request = Request::get("https://api.example.com/").extension(traits).body(()).expect("a request");
        let response = self.service.call(request);
        let sent = self.sent.lock().expect("not poisoned").take();
        let Some((secret, reply)) = sent else {
            let error = immediately(response).expect_err("no key");
            return Err(*NoKeyAvailable::find(&error).expect("about keys"));
        };
        let secret = secret_number(&secret).expect("a secret of the model");
        Ok(Pending { secret, reply, response })
    }
}

impl Pending {
    fn reply(self, reply: Reply) {
        self.reply.send(reply).expect("the request is under way");
        let _ = immediately(self.response);
    }
}

/// A request under way, and what it took.
struct Flight {
    pending: Pending,
    limit: usize,
    tokens: u64,
    at: Duration,
}

struct Pair {
    model: Model,
    pool: KeyPool,
    clock: ManualClock,
    client: Client,
    costs: (u64, u64),
    under_way: Vec<Flight>,
    retry_in: Option<Duration>,
}

impl Pair {
    fn new(setup: Setup) -> Self {
        let clock = ManualClock::new();
        clock.advance(Duration::from_secs(1_000));
        let mut model = Model { now: Duration::from_secs(1_000), ..Model::default() };
        let mut builder = KeyPool::builder().clock(clock.clone()).strict();
        builder = setup.keys.iter().map(|place| model.add(*place)).fold(builder, KeyPoolBuilder::key_spec);
        builder = setup.quotas.iter().map(|limits| limits.quota()).fold(builder, KeyPoolBuilder::quota);
        model.quotas = setup.quotas;
        let pool = builder.build().expect("a pool");
        let client = Client::new(&pool);
        let (under_way, retry_in) = Default::default();
        Self { model, pool, clock, client, costs: setup.costs, under_way, retry_in }
    }

    fn demand(&self, wish: &Wish) -> Demand {
        let (least, most) = self.costs;
        let (only, avoid) = match &wish.key {
            WishedKey::Any => (None, Vec::new()),
            WishedKey::Only(which) => (Some(self.some_id(*which)), Vec::new()),
            WishedKey::Avoid(all) => (None, all.iter().map(|which| self.some_id(*which)).collect()),
        };
        let tokens = least + wish.tokens % (most - least + 1);
        Demand { scope: wish.scope, tokens, session: wish.session, only, avoid }
    }

    /// Sends a request with both, and compares what became of it.
    fn begin(&mut self, wish: &Wish) -> Result<Option<Flight>, TestCaseError> {
        let demand = self.demand(wish);
        let mut traits = Traits::new().tokens(demand.tokens);
        traits = demand.scope.into_iter().fold(traits, |traits, scope| traits.scope(format!("s{scope}")));
        traits = demand.session.into_iter().fold(traits, Traits::session);
        traits = demand.only.iter().fold(traits, |traits, id| traits.key(key_id(id)));
        traits = demand.avoid.iter().fold(traits, |traits, id| traits.avoid(key_id(id)));
        let sent = self.client.send(traits);

        let now = seconds(self.model.now);
        let windows: Vec<_> =
            self.model.keys.iter().map(|key| (key, self.model.window(key, &demand))).collect();
        let pending = match sent {
            Ok(pending) => pending,
            Err(error) => return self.check_error(error, &demand).map(|()| None),
        };
        let served = windows.iter().find(|(key, _)| key.secret == pending.secret);
        prop_assert!(served.is_some(), "a key was used that has left the pool");
        let (key, window) = served.expect("there");
        prop_assert!(
            window.may <= now + ROUNDING,
            "{} served {demand:?} at {now}, but has room {window:?}",
            key.id
        );
        for (other, window) in windows.iter().filter(|(other, _)| other.place.tier < key.place.tier) {
            prop_assert!(!window.must_serve(now), "{} served {demand:?} instead of {}", key.id, other.id);
        }
        let owner = key.owner();
        let limit = self.model.serve(owner, &demand);
        self.model.count(pending.secret, 1);
        Ok(Some(Flight { pending, limit, tokens: demand.tokens, at: self.model.now }))
    }

    /// Fails if a key has room for a request that got none, or has room at another time than the error says.
    fn check_error(&mut self, error: NoKeyAvailable, demand: &Demand) -> TestCaseResult {
        let now = seconds(self.model.now);
        let windows: Vec<_> =
            self.model.keys.iter().map(|key| (key, self.model.window(key, demand))).collect();
        for (key, window) in &windows {
            prop_assert!(!window.must_serve(now), "{} has room for {demand:?}, but: {error}", key.id);
        }
        let next = windows.iter().fold(Window::NEVER, |next, (_, window)| next.or(*window));
        self.retry_in = error.retry_in();
        let said = error.retry_in().map_or(f64::INFINITY, |time| now + seconds(time));
        // A key with less room than usual requests need is closed until it has that much, whatever this one costs.
        // And when a key has room that is full, nobody knows: until then, the time of its limit is named.
        let is_exact = self.costs.0 == self.costs.1
            && next.must.is_finite() == next.may.is_finite()
            && !self.model.keys.iter().any(Key::is_full);
        let earliest = if is_exact { next.may } else { now };
        prop_assert!(
            said >= earliest - PRECISION && said <= next.must + PRECISION,
            "{demand:?} at {now}: in {:?} it said, but there is room at {next:?}",
            error.retry_in()
        );
        Ok(())
    }

    fn finish(&mut self, flight: Flight, reply: Reply) {
        self.model.count(flight.pending.secret, -1);
        self.model.finish(&flight, reply);
        flight.pending.reply(reply);
    }

    fn send(&mut self, wish: &Wish, reply: Reply) -> TestCaseResult {
        if let Some(flight) = self.begin(wish)? {
            self.finish(flight, reply);
        }
        Ok(())
    }

    fn some_id(&self, which: Index) -> String {
        match self.model.keys.len() {
            0 => "nobody".to_owned(),
            count => self.model.keys[which.index(count)].id.clone(),
        }
    }

    fn some_flight(&mut self, which: Index) -> Option<Flight> {
        let count = self.under_way.len();
        (count > 0).then(|| self.under_way.swap_remove(which.index(count)))
    }

    fn step(&mut self, step: Step) -> TestCaseResult {
        match step {
            Step::Send(wish, reply) => self.send(&wish, reply)?,
            Step::SendRound(wish, reply, more) => {
                for _ in 0..self.model.keys.len() + usize::from(more) {
                    self.send(&wish, reply)?;
                }
            }
            Step::Begin(wish) => {
                let flight = self.begin(&wish)?;
                self.under_way.extend(flight);
            }
            Step::Finish(which, reply) => {
                if let Some(flight) = self.some_flight(which) {
                    self.finish(flight, reply);
                }
            }
            Step::Drop(which) => {
                if let Some(flight) = self.some_flight(which) {
                    self.model.count(flight.pending.secret, -1);
                    self.model.give_back(&flight, false);
                }
            }
            Step::Advance(by) => self.advance(by),
            Step::AdvanceToRetry => {
                if let Some(by) = self.retry_in.take() {
                    self.advance(by);
                }
            }
            Step::Reset(which) => {
                let id = self.some_id(which);
                let done = immediately(self.pool.reset(&id)).is_ok();
                let key = self.model.keys.iter_mut().find(|key| key.id == id);
                prop_assert_eq!(done, key.is_some());
                if let Some(key) = key {
                    key.condition.rest = None;
                    let owner = key.owner();
                    for (_, limit) in self.model.limit_of.iter().filter(|((of, _), _)| *of == owner) {
                        self.model.limits[*limit].rest = f64::NEG_INFINITY;
                    }
                }
            }
            Step::Disable(which) => self.set_disabled(which, true),
            Step::Enable(which) => self.set_disabled(which, false),
            Step::Remove(which) => {
                let id = self.some_id(which);
                let _ = immediately(self.pool.remove(&id));
                if let Some(place) = self.model.keys.iter().position(|key| key.id == id) {
                    self.model.remove(place);
                }
            }
            Step::Insert(place) => {
                let spec = self.model.add(place);
                let done = immediately(self.pool.insert_all([spec]));
                prop_assert!(done.iter().all(Result::is_ok), "{done:?}");
            }
        }
        Ok(())
    }

    fn set_disabled(&mut self, which: Index, disabled: bool) {
        let id = self.some_id(which);
        let _ = match disabled {
            true => immediately(self.pool.disable(&id)),
            false => immediately(self.pool.enable(&id)),
        };
        for key in self.model.keys.iter_mut().filter(|key| key.id == id) {
            key.condition.disabled = disabled;
        }
    }

    fn advance(&mut self, by: Duration) {
        self.clock.advance(by);
        self.model.now += by;
    }
}

fn play(setup: Setup, steps: Vec<Step>) -> TestCaseResult {
    let mut pair = Pair::new(setup);
    steps.into_iter().try_for_each(|step| pair.step(step))
}

fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, max_shrink_iters: 4_000, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(cases(400))]

    #[test]
    fn small_pools_keep_to_their_quotas(setup in setup(0usize..6), steps in steps(80)) {
        play(setup, steps)?;
    }
}

proptest! {
    #![proptest_config(cases(40))]

    /// More keys than one pick opens.
    #[test]
    fn pools_of_many_keys_keep_to_their_quotas(setup in setup(17usize..90), steps in steps(40)) {
        play(setup, steps)?;
    }
}

// ---- requests in flight, of a paced pool whose service says nothing ----

#[derive(Clone, Debug)]
enum Move {
    Begin(u8),
    Finish(Index),
    Fail(Index),
    Drop(Index),
    Insert,
    Remove(Index),
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let one = prop_oneof![
        12 => (0u8..2).prop_map(Move::Begin),
        4 => any::<Index>().prop_map(Move::Finish),
        2 => any::<Index>().prop_map(Move::Fail),
        2 => any::<Index>().prop_map(Move::Drop),
        1 => Just(Move::Insert),
        1 => any::<Index>().prop_map(Move::Remove),
    ];
    prop::collection::vec(one, 1..80)
}

/// The keys of a paced pool, and how many requests each carries in a scope, of how many at most.
struct Carried {
    pool: KeyPool,
    client: Client,
    keys: Vec<SecretNumber>,
    secrets: SecretNumber,
    load: BTreeMap<(SecretNumber, u8), (u32, u32)>,
    under_way: Vec<(Pending, u8)>,
}

impl Carried {
    fn new() -> Self {
        let pool = KeyPool::builder().clock(ManualClock::new()).paced().build().expect("a pool");
        let client = Client::new(&pool);
        let (keys, secrets, load, under_way) = Default::default();
        let mut carried = Self { pool, client, keys, secrets, load, under_way };
        (0..2).for_each(|_| carried.insert());
        carried
    }

    fn insert(&mut self) {
        self.secrets += 1;
        immediately(self.pool.insert(format!("key-{}", self.secrets), secret(self.secrets))).expect("new");
        self.keys.push(self.secrets);
    }

    fn load(&mut self, key: SecretNumber, scope: u8) -> &mut (u32, u32) {
        self.load.entry((key, scope)).or_insert((0, 4))
    }

    fn begin(&mut self, scope: u8) -> TestCaseResult {
        let free = |(load, most): &mut (u32, u32)| *load < *most;
        match self.client.send(Traits::new().scope(format!("s{scope}"))) {
            Ok(pending) => {
                let load = self.load(pending.secret, scope);
                prop_assert!(free(load), "{} carries {load:?} already", pending.secret);
                load.0 += 1;
                self.under_way.push((pending, scope));
            }
            Err(_) => {
                for key in self.keys.clone() {
                    let load = self.load(key, scope);
                    prop_assert!(!free(load), "{key} carries {load:?} only");
                }
            }
        }
        Ok(())
    }

    /// Ends a request that is under way, if there is one.
    fn end(&mut self, which: Index, reply: Option<Reply>) {
        let count = self.under_way.len();
        if count == 0 {
            return;
        }
        let (pending, scope) = self.under_way.swap_remove(which.index(count));
        let load = self.load(pending.secret, scope);
        load.0 -= 1;
        if let Some(Reply::Answer(_)) = reply {
            load.1 += 1;
        }
        match reply {
            Some(reply) => pending.reply(reply),
            None => drop(pending),
        }
    }

    fn step(&mut self, step: Move) -> TestCaseResult {
        let fine = Reply::Answer(Answer { status: 200, retry_after: None });
        match step {
            Move::Begin(scope) => self.begin(scope)?,
            Move::Finish(which) => self.end(which, Some(fine)),
            Move::Fail(which) => self.end(which, Some(Reply::Failure)),
            Move::Drop(which) => self.end(which, None),
            Move::Insert => self.insert(),
            Move::Remove(which) if !self.keys.is_empty() => {
                let key = self.keys.remove(which.index(self.keys.len()));
                immediately(self.pool.remove(format!("key-{key}"))).expect("there");
            }
            Move::Remove(_) => {}
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(cases(200))]

    /// Afterwards each key carries as many requests as ever.
    #[test]
    fn requests_in_flight_are_counted_to_zero(moves in moves()) {
        let mut carried = Carried::new();
        moves.into_iter().try_for_each(|step| carried.step(step))?;
        carried.under_way.clear();
        carried.load.values_mut().for_each(|load| load.0 = 0);
        for scope in [0, 1] {
            let most: u32 = carried.keys.clone().iter().map(|key| carried.load(*key, scope).1).sum();
            for _ in 0..=most {
                carried.begin(scope)?;
            }
            prop_assert_eq!(carried.under_way.drain(..).count(), most as usize);
            carried.load.values_mut().for_each(|load| load.0 = 0);
        }
    }
}

// ---- what the models found, one by one ----

const FINE: Reply = Reply::Answer(Answer { status: 200, retry_after: None });
const LIMITED: Reply = Reply::Answer(Answer { status: 429, retry_after: None });
const ALONE: Place = Place { tier: 0, group: None, weight: NonZeroU32::MIN, cap: None };

/// A pool whose first key is called `key-1`.
fn pool_of(places: &[Place], quotas: &[Quota]) -> (KeyPool, ManualClock, Client) {
    let clock = ManualClock::new();
    let builder = KeyPool::builder().clock(clock.clone());
    let specs = (1..).zip(places).map(|(number, place)| {
        let mut spec = KeySpec::new(key_id(&format!("key-{number}")), secret(number));
        spec.tier = Some(place.tier);
        spec.weight = Some(place.weight);
        spec.max_in_flight = place.cap;
        spec.group = place.group.map(|group| format!("group-{group}"));
        spec
    });
    let builder =
        quotas.iter().cloned().fold(specs.fold(builder, KeyPoolBuilder::key_spec), KeyPoolBuilder::quota);
    let pool = builder.build().expect("a pool");
    let client = Client::new(&pool);
    (pool, clock, client)
}

fn scoped() -> Traits {
    Traits::new().scope("s")
}

fn insert(pool: &KeyPool, number: SecretNumber) {
    immediately(pool.insert(format!("key-{number}"), secret(number))).expect("new");
}

fn remove(pool: &KeyPool, number: SecretNumber) {
    immediately(pool.remove(format!("key-{number}"))).expect("there");
}

#[test]
fn an_error_names_no_time_of_an_avoided_key() {
    let (_, _, mut client) = pool_of(&[ALONE, ALONE], &[Quota::per_minute(1)]);
    client.send(scoped()).unwrap().reply(FINE);
    client.send(scoped()).unwrap().reply(LIMITED);
    let error = client.send(scoped().avoid(key_id("key-1"))).err().unwrap();
    assert_eq!(error.retry_in(), Some(COOLDOWN));
}

#[test]
fn quota_groups_do_not_lead_to_later_tiers() {
    let (first, later) = (Place { group: Some(0), ..ALONE }, Place { tier: 1, group: Some(0), ..ALONE });
    let (_, _, mut client) = pool_of(&[first, later], &[]);
    for _ in 0..4 {
        assert_eq!(client.send(scoped()).unwrap().secret, 1);
    }
}

#[test]
fn a_429_holds_after_the_keys_have_changed() {
    let (pool, _, mut client) = pool_of(&[ALONE], &[]);
    let pending = client.send(scoped()).unwrap();
    insert(&pool, 2);
    pending.reply(LIMITED);
    for _ in 0..4 {
        assert_eq!(client.send(scoped()).unwrap().secret, 2);
    }
}

#[test]
fn an_error_names_the_time_of_the_slowest_quota() {
    let (_, _, mut client) = pool_of(&[ALONE], &[Quota::per_second(1), Quota::per_minute(1)]);
    let only = || scoped().key(key_id("key-1"));
    client.send(only()).unwrap().reply(FINE);
    let retry_in = client.send(only()).err().unwrap().retry_in().unwrap();
    assert!(retry_in > Duration::from_secs(59), "{retry_in:?}");
}

#[test]
fn a_full_key_opens_again_after_two_changes_of_the_keys() {
    let pool = KeyPool::builder().key("key-1", secret(1)).clock(ManualClock::new()).paced().build().unwrap();
    let mut client = Client::new(&pool);
    let pending: Vec<_> = (0..4).map(|_| client.send(scoped()).unwrap()).collect();
    assert!(client.send(scoped()).is_err());
    insert(&pool, 2);
    remove(&pool, 2);
    pending.into_iter().for_each(|pending| pending.reply(FINE));
    assert!(client.send(scoped()).is_ok());
}

#[test]
fn windows_are_as_long_as_they_should_be() {
    let (_, clock, mut client) = pool_of(&[ALONE], &[Quota::per_second(1).window()]);
    let mut passed = Duration::ZERO;
    for _ in 0..100 {
        client.send(scoped()).unwrap().reply(FINE);
        let wait = client.send(scoped()).err().unwrap().retry_in().unwrap();
        clock.advance(wait);
        passed += wait;
    }
    assert!((99_980..101_000).contains(&passed.as_millis()), "100 windows took {passed:?}");
}

/// A user's clock may count from 1970.
#[test]
fn windows_hold_on_a_clock_that_began_long_ago() {
    let clock = ManualClock::new();
    clock.advance(Duration::from_secs(1_795_000_000));
    let quota = Quota::per_day(5).window();
    let pool = KeyPool::builder().key("k0", "sk-0").quota(quota).clock(clock.clone()).build().unwrap();
    for _ in 0..3 {
        let leases: Vec<_> = std::iter::from_fn(|| pool.lease(&Traits::new()).ok()).take(10).collect();
        assert_eq!(leases.len(), 5);
        leases.iter().for_each(|lease| lease.answered_with(Verdict::Nothing));
        clock.advance(Duration::from_secs(12 * 60 * 60));
        assert!(pool.lease(&Traits::new()).is_err());
        clock.advance(Duration::from_secs(12 * 60 * 60 + 1));
    }
}

#[test]
fn of_many_keys_the_first_tier_returns_first() {
    let mut places = vec![ALONE; 2];
    places.extend([Place { tier: 1, ..ALONE }; 20]);
    let (_, clock, mut client) = pool_of(&places, &[Quota::per_minute(1)]);
    (0..22).for_each(|_| client.send(scoped()).unwrap().reply(FINE));
    clock.advance(Duration::from_secs(61));
    assert!(client.send(scoped()).unwrap().secret <= 2);
}

#[test]
fn a_removed_key_gives_its_tokens_back_to_its_group() {
    let member = Place { group: Some(0), ..ALONE };
    let (pool, _, mut client) = pool_of(&[member, member], &[Quota::per_minute(60).burst(60).tokens()]);
    let pending = client.send(scoped().tokens(60)).unwrap();
    assert!(client.send(scoped().tokens(60)).is_err());
    remove(&pool, pending.secret);
    drop(pending);
    assert!(client.send(scoped().tokens(60)).is_ok());
}

#[test]
fn a_window_gives_nothing_back_to_a_later_one() {
    for reply in [None, Some(LIMITED)] {
        let (pool, clock, mut client) = pool_of(&[ALONE], &[Quota::per_minute(10).tokens().window()]);
        let pending = client.send(scoped().tokens(10)).unwrap();
        clock.advance(Duration::from_secs(61));
        client.send(scoped().tokens(10)).unwrap().reply(FINE);
        match reply {
            Some(reply) => pending.reply(reply),
            None => drop(pending),
        }
        immediately(pool.reset("key-1")).unwrap();
        assert!(client.send(scoped().tokens(10)).is_err());
    }
}

/// An operator resets one scope of a key.
#[test]
fn a_reset_of_one_scope_leaves_the_others() {
    let (pool, _, mut client) = pool_of(&[ALONE], &[]);
    client.send(scoped()).unwrap().reply(LIMITED);
    client.send(Traits::new().scope("other")).unwrap().reply(LIMITED);
    immediately(pool.reset_scope("key-1", Scope::new("s").unwrap())).unwrap();
    assert!(client.send(scoped()).is_ok());
    assert!(client.send(Traits::new().scope("other")).is_err());
}
