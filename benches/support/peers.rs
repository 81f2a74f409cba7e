//! Alternatives to this crate: middleware that sets a header or limits the rate, and handwritten lists of keys behind
//! a lock.

use std::{
    convert::Infallible,
    future::{Future, Ready},
    num::NonZeroU32,
    sync::{
        Arc, Mutex, RwLock,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use governor::{DefaultDirectRateLimiter, DefaultKeyedRateLimiter, Quota, RateLimiter};
use http::{HeaderValue, Request, Response, StatusCode};
use tower::{Layer, Service, ServiceExt, limit::RateLimitLayer, retry::Policy, service_fn};
use tower_http::{
    auth::AddAuthorizationLayer,
    set_header::{SetRequestHeader, SetRequestHeaderLayer},
};

use super::{HEADER, SECRET, authorization};

pub trait Client<B>: Service<Request<B>, Response = Response<Self::Body>, Error = Infallible> {
    type Body;
}

impl<B, C, S: Service<Request<B>, Response = Response<C>, Error = Infallible>> Client<B> for S {
    type Body = C;
}

pub fn set_header<S>(inner: S) -> SetRequestHeader<S, HeaderValue> {
    set_this_header(inner, authorization())
}

pub fn set_this_header<S>(inner: S, header: HeaderValue) -> SetRequestHeader<S, HeaderValue> {
    SetRequestHeaderLayer::overriding(HEADER, header).layer(inner)
}

pub fn add_authorization<B, S: Client<B>>(inner: S) -> impl Client<B, Body = S::Body> {
    AddAuthorizationLayer::bearer(SECRET).as_sensitive(true).layer(inner)
}

/// Adds a rate limit that is never reached. Needs a tokio runtime with timers.
pub fn rate_limit<B, S: Client<B>>(inner: S) -> impl Client<B, Body = S::Body> {
    RateLimitLayer::new(u64::MAX, Duration::from_secs(3600)).layer(set_header(inner))
}

fn unreachable_quota() -> Quota {
    Quota::per_second(NonZeroU32::new(1_000_000_000).expect("not zero"))
}

pub fn governor_direct<B, S: Client<B>>(inner: S) -> impl Client<B, Body = S::Body> {
    let limiter: DefaultDirectRateLimiter = RateLimiter::direct(unreachable_quota());
    set_header(inner).map_request(move |request| {
        limiter.check().expect("a limit that is never reached");
        request
    })
}

/// Adds one rate limit per key; the keys take turns.
pub fn governor_keyed<B, S: Client<B>>(inner: S, keys: usize) -> impl Client<B, Body = S::Body> {
    let limiter: DefaultKeyedRateLimiter<usize> = RateLimiter::keyed(unreachable_quota());
    let values: Vec<_> = (0..keys).map(|_| authorization()).collect();
    let turn = AtomicUsize::new(0);
    inner.map_request(move |mut request: Request<B>| {
        let key = turn.fetch_add(1, Relaxed) % values.len();
        limiter.check_key(&key).expect("a limit that is never reached");
        request.headers_mut().insert(HEADER, values[key].clone());
        request
    })
}

/// The usual state of a key in a handwritten list.
#[derive(Clone)]
pub struct Key {
    id: String,
    secret: String,
    resting_until: Option<Instant>,
    requests: u64,
    last_error: Option<String>,
}

impl Key {
    fn is_available(&self, now: Instant) -> bool {
        self.resting_until.is_none_or(|until| until <= now)
    }

    fn rest(&mut self) {
        self.resting_until = Some(Instant::now() + COOLDOWN);
        self.last_error = Some("limited".into());
    }
}

const COOLDOWN: Duration = Duration::from_secs(120);

/// Creates keys; those rest for which `rests` returns `true`.
pub fn keys(keys: usize, rests: impl Fn(usize) -> bool) -> Vec<Key> {
    let resting_until = Instant::now().checked_add(Duration::from_secs(3600));
    let key = |number| Key {
        id: format!("key-{number}"),
        secret: format!("{SECRET}{number}"),
        resting_until: resting_until.filter(|_| rests(number)),
        requests: 0,
        last_error: None,
    };
    (0..keys).map(key).collect()
}

/// A list of keys behind a lock.
pub trait List {
    /// Picks an available key, and returns its index and its secret.
    fn pick(&self) -> impl Future<Output = (usize, String)>;
    fn rest(&self, number: usize) -> impl Future<Output = ()>;
}

fn first(keys: &mut [Key]) -> (usize, String) {
    let now = Instant::now();
    let number = keys.iter().position(|key| key.is_available(now)).expect("a key is available");
    keys[number].requests += 1;
    (number, keys[number].secret.clone())
}

/// Picks the first available key.
impl List for Mutex<Vec<Key>> {
    async fn pick(&self) -> (usize, String) {
        first(&mut self.lock().unwrap())
    }

    async fn rest(&self, number: usize) {
        self.lock().unwrap()[number].rest();
    }
}

/// Picks the first available key.
impl List for tokio::sync::Mutex<Vec<Key>> {
    async fn pick(&self) -> (usize, String) {
        first(&mut self.lock().await)
    }

    async fn rest(&self, number: usize) {
        self.lock().await[number].rest();
    }
}

/// A list that picks the next available key in turn.
pub struct InTurn {
    keys: RwLock<Vec<Key>>,
    turn: AtomicUsize,
}

impl InTurn {
    pub fn new(keys: Vec<Key>) -> Self {
        Self { keys: RwLock::new(keys), turn: AtomicUsize::new(0) }
    }
}

impl List for InTurn {
    async fn pick(&self) -> (usize, String) {
        let (keys, now) = (self.keys.read().unwrap(), Instant::now());
        let from = self.turn.fetch_add(1, Relaxed);
        let mut in_turn = (from..from + keys.len()).map(|number| number % keys.len());
        let number = in_turn.find(|number| keys[*number].is_available(now)).expect("a key is available");
        (number, keys[number].secret.clone())
    }

    async fn rest(&self, number: usize) {
        self.keys.write().unwrap()[number].rest();
    }
}

/// Rotation as programs write it by hand.
pub fn by_hand<B, S, L>(inner: S, list: Arc<L>) -> impl Client<B, Body = S::Body>
where
    S: Client<B> + Clone,
    L: List,
{
    service_fn(move |mut request: Request<B>| {
        let (mut inner, list) = (inner.clone(), list.clone());
        async move {
            let (number, secret) = list.pick().await;
            let header = HeaderValue::from_str(&format!("Bearer {secret}")).expect("text");
            request.headers_mut().insert(HEADER, header);
            let response = inner.call(request).await?;
            if response.status() == StatusCode::TOO_MANY_REQUESTS {
                list.rest(number).await;
            }
            Ok(response)
        }
    })
}

/// A retry policy that clones each request and never retries.
#[derive(Clone)]
pub struct Cloning;

impl<B: Clone, R, E> Policy<Request<B>, R, E> for Cloning {
    type Future = Ready<()>;

    fn retry(&mut self, _: &mut Request<B>, _: &mut Result<R, E>) -> Option<Self::Future> {
        None
    }

    fn clone_request(&mut self, request: &Request<B>) -> Option<Request<B>> {
        Some(request.clone())
    }
}
