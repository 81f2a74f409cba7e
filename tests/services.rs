//! The layers as services among services: readiness, dropped futures, panics, errors, and what they leave alone.

use std::{
    convert::Infallible,
    future::{Future, pending, ready},
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{FutureExt, StreamExt, future::join_all, stream};
use http::{HeaderMap, HeaderValue, Method, Request, Response, Version, header};
use http_body::{Body, Frame};
use http_body_util::{
    BodyExt, Full, StreamBody,
    channel::{Channel, Sender},
};
use proptest::{prelude::*, sample::Index};
use tokio_test::{assert_pending, assert_ready, task};
use tower::{
    Layer, Service, ServiceBuilder, ServiceExt, buffer::BufferLayer, limit::ConcurrencyLimitLayer,
    service_fn, util::BoxCloneService,
};
use tower_key_rotation::{
    Error, Failover, Inject, KeyPool, KeyRotationLayer, NoKeyAvailable, Replay, Status,
    classify::{ClassifyResponse, ResponseHead, Verdict},
    clock::{Clock, ManualClock, Sleep},
};
use tower_test::mock;

const COOLDOWN: Duration = Duration::from_secs(120);
const URL: &str = "https://api.example.com/v1";

type Req = Request<String>;
type Res = Response<Full<Bytes>>;
type Mock = mock::Mock<Req, Res>;
type Handle = mock::Handle<Req, Res>;

fn request() -> Req {
    Request::post(URL).body("a prompt".to_owned()).unwrap()
}

fn response(status: u16) -> Res {
    Response::builder().status(status).body(Full::from("an answer")).unwrap()
}

/// `key-0` with the secret `sk-0`, and so on.
fn pool(keys: usize) -> (KeyPool, ManualClock) {
    let clock = ManualClock::new();
    let keys = (0..keys).map(|number| (format!("key-{number}"), format!("sk-{number}")));
    (KeyPool::builder().keys(keys).clock(clock.clone()).build().unwrap(), clock)
}

fn one_key_for(host: &str) -> KeyPool {
    KeyPool::builder().key("key-0", "sk-0").allowed_hosts([host]).clock(ManualClock::new()).build().unwrap()
}

/// A service that is always ready and answers with these statuses, then with 200.
fn answers(
    statuses: &[u16],
) -> impl Service<Req, Response = Res, Error = Infallible, Future: Send> + Clone + Send + 'static {
    let statuses = Arc::new(Mutex::new(Vec::from(statuses).into_iter()));
    service_fn(move |_: Req| ready(Ok(response(statuses.lock().unwrap().next().unwrap_or(200)))))
}

fn key_of<B>(request: &Request<B>) -> &str {
    request.headers()[header::AUTHORIZATION].to_str().unwrap()
}

fn statuses(pool: &KeyPool) -> Vec<Status> {
    pool.stats().keys.iter().map(|key| key.status).collect()
}

fn requests(pool: &KeyPool) -> Vec<u64> {
    pool.stats().keys.iter().map(|key| key.requests).collect()
}

/// The next request that the mock got, which must be there.
fn received(handle: &mut Handle) -> (Req, mock::SendResponse<Res>) {
    assert_ready!(handle.poll_request()).expect("the mock is in use")
}

fn poll_ready<S: Service<Req>>(service: &mut S) -> Poll<Result<(), S::Error>> {
    service.poll_ready(&mut Context::from_waker(std::task::Waker::noop()))
}

fn call<S: Service<Req>>(service: &mut S) -> task::Spawn<S::Future> {
    let Poll::Ready(Ok(())) = poll_ready(service) else { panic!("not ready") };
    task::spawn(service.call(request()))
}

// ---- readiness ----

#[test]
fn f25_the_client_reports_its_services_readiness() {
    let (pool, _) = pool(1);
    let (mut client, mut handle) = mock::spawn_layer::<Req, Res, _>(KeyRotationLayer::new(&pool));
    handle.allow(0);
    assert_pending!(client.poll_ready());
    handle.allow(1);
    assert!(client.is_woken());
    assert_ready!(client.poll_ready()).unwrap();

    let layers = ServiceBuilder::new().layer(KeyRotationLayer::new(&pool).failover(Failover::attempts(3)));
    let (mut client, mut handle) = mock::spawn_with(|mock: Mock| layers.service(mock));
    handle.allow(0);
    assert_pending!(client.poll_ready::<Req>());
    handle.allow(1);
    assert!(client.is_woken());
    assert_ready!(client.poll_ready::<Req>()).unwrap();
}

#[test]
fn f25_a_readiness_error_passes_through_as_inner() {
    let (pool, _) = pool(1);
    let (mut client, mut handle) = mock::spawn_layer::<Req, Res, _>(KeyRotationLayer::new(&pool));
    handle.send_error("closed");
    let error = assert_ready!(client.poll_ready()).unwrap_err();
    assert!(matches!(&error, Error::Inner(inner) if inner.to_string() == "closed"), "{error:?}");

    let layers = ServiceBuilder::new().layer(KeyRotationLayer::new(&pool).failover(Failover::attempts(3)));
    let (mut client, mut handle) = mock::spawn_with(|mock: Mock| layers.service(mock));
    handle.send_error("closed");
    let error = assert_ready!(client.poll_ready::<Req>()).unwrap_err();
    assert!(matches!(&error, Error::Inner(inner) if inner.to_string() == "closed"), "{error:?}");
    assert_eq!(statuses(&pool), [Status::Healthy]);
}

#[test]
fn f25_a_second_attempt_waits_for_service_readiness() {
    let (pool, _) = pool(2);
    let layers = ServiceBuilder::new().layer(KeyRotationLayer::new(&pool).failover(Failover::attempts(3)));
    let (mut client, mut handle) = mock::spawn_with(|mock: Mock| layers.service(mock));
    handle.allow(1);
    assert_ready!(client.poll_ready::<Req>()).unwrap();
    let mut answer = task::spawn(client.call(request()));
    assert_pending!(answer.poll());
    let (first, reply) = received(&mut handle);
    assert_eq!(key_of(&first), "Bearer sk-0");
    reply.send_response(response(429));

    assert_pending!(answer.poll());
    assert_pending!(handle.poll_request());
    assert_eq!(requests(&pool), [1, 0], "a key was taken for a service that is not ready");

    handle.allow(1);
    assert!(answer.is_woken());
    assert_pending!(answer.poll());
    let (second, reply) = received(&mut handle);
    assert_eq!(key_of(&second), "Bearer sk-1");
    reply.send_response(response(200));
    assert_eq!(assert_ready!(answer.poll()).unwrap().status(), 200);
}

#[test]
fn f25_a_readiness_error_between_attempts_fails_the_request() {
    let (pool, _) = pool(2);
    let layers = ServiceBuilder::new().layer(KeyRotationLayer::new(&pool).failover(Failover::attempts(3)));
    let (mut client, mut handle) = mock::spawn_with(|mock: Mock| layers.service(mock));
    handle.allow(1);
    assert_ready!(client.poll_ready::<Req>()).unwrap();
    let mut answer = task::spawn(client.call(request()));
    assert_pending!(answer.poll());
    received(&mut handle).1.send_response(response(429));
    assert_pending!(answer.poll());
    handle.send_error("closed");
    let error = assert_ready!(answer.poll()).unwrap_err();
    assert!(matches!(&error, Error::Inner(inner) if inner.to_string() == "closed"), "{error:?}");
    assert_eq!(statuses(&pool), [Status::RateLimited, Status::Healthy]);
}

/// A service that has to be asked twice before it is ready, is ready for one call, and whose clones are not.
struct Strict<S> {
    inner: S,
    asked: u32,
    calls: Arc<AtomicUsize>,
}

impl<S> Strict<S> {
    fn new(inner: S) -> Self {
        Self { inner, asked: 0, calls: Arc::default() }
    }
}

impl<S: Clone> Clone for Strict<S> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), asked: 0, calls: self.calls.clone() }
    }
}

impl<S: Service<Req>> Service<Req> for Strict<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.asked += 1;
        if self.asked < 2 {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Req) -> S::Future {
        assert!(self.asked >= 2, "called unready");
        self.asked = 0;
        self.calls.fetch_add(1, SeqCst);
        self.inner.call(request)
    }
}

#[tokio::test]
async fn f25_an_unready_service_is_never_called() {
    let (pool, _) = pool(4);
    let strict = Strict::new(answers(&[200, 429, 429, 200, 200, 429, 200]));
    let calls = strict.calls.clone();
    let mut client = ServiceBuilder::new()
        .layer(KeyRotationLayer::new(&pool).failover(Failover::attempts(3)))
        .service(strict);
    for _ in 0..4 {
        assert_eq!(client.ready().await.unwrap().call(request()).await.unwrap().status(), 200);
    }
    assert_eq!(calls.load(SeqCst), 7);
}

#[tokio::test]
async fn f25_a_waiting_request_never_calls_an_unready_service() {
    let (pool, clock) = pool(1);
    let mut client = ServiceBuilder::new()
        .layer(KeyRotationLayer::new(&pool).failover(Failover::attempts(3)).wait_up_to(2 * COOLDOWN))
        .service(Strict::new(answers(&[429, 200, 200])));
    // Limited, it waits for its own key; meanwhile two others queue without having been sent at all.
    let mut waiting = Vec::new();
    for _ in 0..3 {
        let mut answer = task::spawn(client.ready().await.unwrap().call(request()));
        assert_pending!(answer.poll());
        waiting.push(answer);
    }
    assert_eq!(requests(&pool), [1]);
    clock.advance(COOLDOWN);
    let statuses = join_all(waiting).await.into_iter().map(|answer| answer.unwrap().status().as_u16());
    assert_eq!(statuses.collect::<Vec<_>>(), [200, 200, 200]);
}

#[tokio::test]
async fn f25_reading_bodies_never_calls_an_unready_service() {
    let (pool, _) = pool(2);
    let mut client = ServiceBuilder::new()
        .layer(KeyRotationLayer::new(&pool).read_error_bodies(100).failover(Failover::attempts(3)))
        .service(Strict::new(answers(&[429, 200])));
    assert_eq!(client.ready().await.unwrap().call(request()).await.unwrap().status(), 200);
}

/// How many requests are in the service at once, at most.
fn counting(
    statuses: &[u16],
    most: &Arc<AtomicUsize>,
) -> impl Service<Req, Response = Res, Error = Infallible, Future: Send> + Clone + Send + 'static {
    let (inner, most) = (answers(statuses), most.clone());
    let now = Arc::new(AtomicUsize::new(0));
    service_fn(move |request: Req| {
        let (mut inner, most, now) = (inner.clone(), most.clone(), now.clone());
        async move {
            most.fetch_max(now.fetch_add(1, SeqCst) + 1, SeqCst);
            tokio::task::yield_now().await;
            let answer = inner.call(request).await;
            now.fetch_sub(1, SeqCst);
            answer
        }
    })
}

async fn twenty_at_once<S, B>(client: S, limited: usize, pool: &KeyPool)
where
    S: Service<Req, Response = Response<B>, Error: std::fmt::Debug> + Clone,
{
    let sent = (0..20).map(|_| client.clone().oneshot(request()));
    let answers = tokio::time::timeout(Duration::from_secs(10), join_all(sent)).await.expect("no deadlock");
    assert!(answers.into_iter().all(|answer| answer.unwrap().status() == 200));
    assert_eq!(pool.stats().rate_limited, limited);
    assert_eq!(requests(pool).iter().sum::<u64>(), 20 + limited as u64);
}

#[tokio::test]
async fn f25_a_limit_below_the_layers_serialises_attempts() {
    let (pool, _) = pool(9);
    let most = Arc::default();
    let client = ServiceBuilder::new()
        .layer(KeyRotationLayer::new(&pool).failover(Failover::attempts(3)))
        .layer(ConcurrencyLimitLayer::new(1))
        .service(counting(&[429, 200, 429, 429], &most));
    twenty_at_once(client, 3, &pool).await;
    assert_eq!(most.load(SeqCst), 1);
}

#[tokio::test]
async fn f25_a_limit_above_the_layers_serialises_requests() {
    let (pool, _) = pool(9);
    let most = Arc::default();
    let client = ServiceBuilder::new()
        .layer(ConcurrencyLimitLayer::new(1))
        .layer(KeyRotationLayer::new(&pool).failover(Failover::attempts(3)))
        .service(counting(&[429, 200, 429, 429], &most));
    twenty_at_once(client, 3, &pool).await;
    assert_eq!(most.load(SeqCst), 1);
}

#[tokio::test]
async fn f25_every_attempt_reserves_a_buffer_slot() {
    let (pool, _) = pool(9);
    let most = Arc::default();
    let client = ServiceBuilder::new()
        .layer(KeyRotationLayer::new(&pool).failover(Failover::attempts(3)))
        .layer(BufferLayer::new(1))
        .service(Strict::new(counting(&[429, 200, 429, 429], &most)));
    twenty_at_once(client, 3, &pool).await;
}

// ---- dropped futures ----

/// A token that lives as long as anything holds on to the pool, and the pool.
fn watched_pool(keys: usize) -> (Arc<()>, KeyPool, ManualClock) {
    let (token, clock) = (Arc::new(()), ManualClock::new());
    let held = token.clone();
    let inject = Inject::custom(move |secret, credentials| {
        let _ = &held;
        credentials.header(header::AUTHORIZATION, &format!("Bearer {secret}"))
    });
    let keys = (0..keys).map(|number| (format!("key-{number}"), format!("sk-{number}")));
    let pool = KeyPool::builder().keys(keys).inject(inject).clock(clock.clone()).build().unwrap();
    (token, pool, clock)
}

#[test]
fn f23_dropping_a_response_future_leaks_nothing() {
    for polls in 0..3 {
        let (token, pool, _) = watched_pool(2);
        let (inner, mut handle) = mock::pair::<Req, Res>();
        handle.allow(u64::MAX);
        let mut client = ServiceBuilder::new()
            .layer(KeyRotationLayer::new(&pool).failover(Failover::attempts(3)))
            .layer(ConcurrencyLimitLayer::new(1))
            .service(inner);

        let mut answer = call(&mut client);
        assert_pending!(poll_ready(&mut client), "the one permit is in use");
        (0..polls).for_each(|_| assert_pending!(answer.poll()));
        drop(answer);

        assert_eq!(statuses(&pool), [Status::Healthy; 2]);
        let mut answer = call(&mut client);
        assert_pending!(answer.poll());
        // What the mock still has of the first request is answered to nobody.
        let (_, too_late) = received(&mut handle);
        too_late.send_response(response(429));
        let (request, reply) = received(&mut handle);
        assert_eq!(key_of(&request), "Bearer sk-1");
        reply.send_response(response(200));
        assert_eq!(assert_ready!(answer.poll()).unwrap().status(), 200);
        assert_eq!(statuses(&pool), [Status::Healthy; 2]);

        drop((answer, client, pool));
        assert_eq!(Arc::strong_count(&token), 1, "something is left of the pool after {polls} polls");
    }
}

#[test]
fn f23_dropping_before_the_second_attempt_leaks_nothing() {
    let (token, pool, _) = watched_pool(3);
    let (inner, mut handle) = mock::pair::<Req, Res>();
    let limit = ConcurrencyLimitLayer::new(1);
    let mut client = ServiceBuilder::new()
        .layer(KeyRotationLayer::new(&pool).failover(Failover::attempts(3)))
        .layer(limit)
        .service(inner);
    handle.allow(1);
    let mut answer = call(&mut client);
    assert_pending!(answer.poll());
    received(&mut handle).1.send_response(response(429));
    // The second attempt has the permit, and waits for the mock.
    assert_pending!(answer.poll());
    drop(answer);

    handle.allow(1);
    let mut answer = call(&mut client);
    assert_pending!(answer.poll());
    let (request, reply) = received(&mut handle);
    assert_eq!(key_of(&request), "Bearer sk-1");
    reply.send_response(response(200));
    assert_eq!(assert_ready!(answer.poll()).unwrap().status(), 200);
    assert_eq!(statuses(&pool), [Status::RateLimited, Status::Healthy, Status::Healthy]);
    drop((answer, client, pool));
    assert_eq!(Arc::strong_count(&token), 1);
}

type Sent = Response<Channel<Bytes, Infallible>>;

/// A service of which the first answer is a 429 with a body that the test sends, and the others are 200.
fn limits_slowly() -> (
    Sender<Bytes, Infallible>,
    impl Service<Req, Response = Sent, Error = Infallible, Future: Send> + Clone + Send + 'static,
) {
    let (sender, body) = Channel::new(1);
    let body = Arc::new(Mutex::new(Some(body)));
    let inner = service_fn(move |_: Req| {
        let body = body.lock().unwrap().take();
        let status = if body.is_some() { 429 } else { 200 };
        let body = body.unwrap_or_else(|| Channel::new(1).1);
        ready(Ok::<_, Infallible>(Response::builder().status(status).body(body).unwrap()))
    });
    (sender, inner)
}

/// Drops a response of which a part of the body has been read on its way.
fn dropped_while_its_body_is_read<S>(client: &mut S, mut body: Sender<Bytes, Infallible>)
where
    S: Service<Req, Response: std::fmt::Debug, Error: std::fmt::Debug>,
{
    let mut answer = call(client);
    assert_pending!(answer.poll());
    assert!(body.try_send(Frame::data(Bytes::from("slow"))).is_ok());
    assert!(answer.is_woken());
    assert_pending!(answer.poll());
    drop(answer);
    assert!(body.try_send(Frame::data(Bytes::from("down"))).is_err(), "the body is kept");
    assert!(assert_ready!(call(client).poll()).is_ok());
}

#[test]
fn f23_dropping_while_draining_a_429_leaks_nothing() {
    let (token, pool, _) = watched_pool(2);
    let (body, inner) = limits_slowly();
    let mut client = ServiceBuilder::new()
        .layer(KeyRotationLayer::new(&pool).failover(Failover::attempts(3)))
        .layer(ConcurrencyLimitLayer::new(1))
        .service(inner);
    dropped_while_its_body_is_read(&mut client, body);
    assert_eq!(statuses(&pool), [Status::RateLimited, Status::Healthy]);
    assert_eq!(requests(&pool), [1, 1]);
    drop((client, pool));
    assert_eq!(Arc::strong_count(&token), 1);
}

#[test]
fn f23_dropping_while_reading_an_error_leaks_nothing() {
    let (token, pool, _) = watched_pool(2);
    let (body, inner) = limits_slowly();
    let mut client = ServiceBuilder::new()
        .layer(KeyRotationLayer::new(&pool).read_error_bodies(100))
        .layer(ConcurrencyLimitLayer::new(1))
        .service(inner);
    dropped_while_its_body_is_read(&mut client, body);
    assert_eq!(requests(&pool), [1, 1]);
    drop((client, pool));
    assert_eq!(Arc::strong_count(&token), 1);
}

/// A request that goes before the waiting one may need that permit: with each holding what the other waits
/// for, nothing would move.
#[test]
fn a_waiting_request_holds_no_concurrency_permit() {
    let (pool, clock) = pool(1);
    let mut client = ServiceBuilder::new()
        .layer(KeyRotationLayer::new(&pool).failover(Failover::attempts(1)).wait_up_to(2 * COOLDOWN))
        .layer(ConcurrencyLimitLayer::new(1))
        .service(answers(&[429]));
    assert_eq!(assert_ready!(call(&mut client).poll()).unwrap().status(), 429);
    let mut waiting = call(&mut client);
    assert_pending!(waiting.poll());
    let mut other = client.clone();
    assert!(poll_ready(&mut other).is_ready());

    // It takes its permit when its turn comes, and not before there is one.
    clock.advance(COOLDOWN);
    assert_pending!(waiting.poll());
    drop(other);
    assert_eq!(assert_ready!(waiting.poll()).unwrap().status(), 200);
}

#[test]
fn f23_dropping_a_waiting_request_frees_its_queue_place() {
    const PERMITS: usize = 20;
    for polls in 0..3 {
        let (token, pool, clock) = watched_pool(1);
        let (inner, mut handle) = mock::pair::<Req, Res>();
        handle.allow(u64::MAX);
        let mut client = ServiceBuilder::new()
            .layer(KeyRotationLayer::new(&pool).failover(Failover::attempts(1)).wait_up_to(2 * COOLDOWN))
            .layer(ConcurrencyLimitLayer::new(PERMITS))
            .service(inner);
        let mut limited = call(&mut client);
        assert_pending!(limited.poll());
        received(&mut handle).1.send_response(response(429));
        assert_eq!(assert_ready!(limited.poll()).unwrap().status(), 429);
        // Like any response of `tower`'s limit, it holds its permit for as long as its future is there.
        drop(limited);

        let (mut first, mut second) = (call(&mut client), call(&mut client));
        (0..polls).for_each(|_| assert_pending!(first.poll()));
        assert_pending!(second.poll());
        assert_pending!(handle.poll_request());
        drop(first);

        clock.advance(COOLDOWN);
        assert!(second.is_woken() || polls == 0);
        assert_pending!(second.poll());
        received(&mut handle).1.send_response(response(200));
        assert_eq!(assert_ready!(second.poll()).unwrap().status(), 200);

        drop(second);

        // Nobody waits any more, so the next requests go straight on, all at once, and every permit is free.
        let mut next: Vec<_> = (0..PERMITS).map(|_| call(&mut client)).collect();
        for next in &mut next {
            assert_pending!(next.poll());
            received(&mut handle);
        }
        drop((next, client, pool));
        assert_eq!(Arc::strong_count(&token), 1);
    }
}

#[test]
fn f23_dropping_a_sent_request_admits_the_next_waiter() {
    let (pool, clock) = pool(1);
    let (inner, mut handle) = mock::pair::<Req, Res>();
    handle.allow(u64::MAX);
    let mut client = ServiceBuilder::new()
        .layer(KeyRotationLayer::new(&pool).failover(Failover::attempts(1)).wait_up_to(2 * COOLDOWN))
        .service(inner);
    let mut limited = call(&mut client);
    assert_pending!(limited.poll());
    received(&mut handle).1.send_response(response(429));
    assert_eq!(assert_ready!(limited.poll()).unwrap().status(), 429);

    let mut waiting: Vec<_> = (0..4).map(|_| call(&mut client)).collect();
    waiting.iter_mut().for_each(|waiting| assert_pending!(waiting.poll()));
    clock.advance(COOLDOWN);
    while !waiting.is_empty() {
        waiting.iter_mut().for_each(|waiting| assert_pending!(waiting.poll()));
        // One is let through, and then dropped; only that makes room.
        drop(received(&mut handle));
        assert_pending!(handle.poll_request());
        drop(waiting.remove(0));
    }
}

#[derive(Clone, Debug)]
enum Happens {
    Request,
    Poll(Index),
    Drop(Index),
    Answer(u16),
    Lose,
    Pass(Duration),
}

fn happens() -> impl Strategy<Value = Happens> {
    prop_oneof![
        4 => Just(Happens::Request),
        8 => any::<Index>().prop_map(Happens::Poll),
        3 => any::<Index>().prop_map(Happens::Drop),
        4 => prop_oneof![Just(200), Just(429)].prop_map(Happens::Answer),
        1 => Just(Happens::Lose),
        1 => (0u64..150).prop_map(|seconds| Happens::Pass(Duration::from_secs(seconds))),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn f23_random_drops_release_permits_turns_and_pool(
        keys in 1usize..4,
        what in prop::collection::vec(happens(), 1..120),
    ) {
        const PERMITS: usize = 5;
        let (token, pool, clock) = watched_pool(keys);
        let (inner, mut handle) = mock::pair::<Req, Res>();
        handle.allow(u64::MAX);
        let client = ServiceBuilder::new()
            .layer(KeyRotationLayer::new(&pool).failover(Failover::attempts(3)).wait_up_to(2 * COOLDOWN))
            .layer(ConcurrencyLimitLayer::new(PERMITS))
            .service(inner);
        let mut under_way = Vec::new();
        let mut received = Vec::new();
        for what in what {
            match what {
                Happens::Request => {
                    let mut own = client.clone();
                    if poll_ready(&mut own).is_ready() {
                        under_way.push(task::spawn(own.call(request())));
                    }
                }
                Happens::Poll(which) if !under_way.is_empty() => {
                    let which = which.index(under_way.len());
                    if under_way[which].poll().is_ready() {
                        drop(under_way.remove(which));
                    }
                }
                Happens::Drop(which) if !under_way.is_empty() => {
                    drop(under_way.remove(which.index(under_way.len())));
                }
                Happens::Answer(status) => {
                    if let Some((_, reply)) = received.pop() {
                        let reply: mock::SendResponse<Res> = reply;
                        reply.send_response(response(status));
                    }
                }
                Happens::Lose => received.clear(),
                Happens::Pass(time) => clock.advance(time),
                Happens::Poll(_) | Happens::Drop(_) => {}
            }
            while let Poll::Ready(Some(next)) = handle.poll_request() {
                received.push(next);
            }
        }
        under_way.clear();
        received.clear();
        clock.advance(COOLDOWN);
        clock.advance(COOLDOWN);
        prop_assert_eq!(pool.stats().healthy, keys);

        // All permits are there, and nobody stands in the queue: each request reaches the service at once.
        let mut clients = vec![client.clone(); PERMITS];
        let mut at_once: Vec<_> = clients.iter_mut().map(call).collect();
        let mut replies = Vec::new();
        for answer in &mut at_once {
            assert_pending!(answer.poll());
            replies.push(assert_ready!(handle.poll_request()).unwrap().1);
        }
        for (answer, reply) in at_once.iter_mut().zip(replies) {
            reply.send_response(response(200));
            prop_assert_eq!(assert_ready!(answer.poll()).unwrap().status(), 200);
        }
        drop(at_once);
        prop_assert!(clients.iter_mut().all(|client| poll_ready(client).is_ready()), "a permit is lost");

        // Nor is any turn lost: as many that wait go at once as keys are back.
        let mut limited = KeyRotationLayer::new(&pool).layer(answers(&[429; 3]));
        (0..keys).for_each(|_| assert!(assert_ready!(call(&mut limited).poll()).is_ok()));
        let mut waiting: Vec<_> = clients.iter_mut().take(keys).map(call).collect();
        waiting.iter_mut().for_each(|waiting| assert_pending!(waiting.poll()));
        clock.advance(COOLDOWN);
        waiting.iter_mut().for_each(|waiting| assert_pending!(waiting.poll()));
        for _ in 0..keys {
            prop_assert!(handle.poll_request().is_ready(), "a turn is lost");
        }
        drop((waiting, limited, clients, client, pool));
        prop_assert_eq!(Arc::strong_count(&token), 1);
    }
}

#[test]
fn a_waiting_request_takes_the_second_returning_key() {
    let (pool, clock) = pool(2);
    let (inner, mut handle) = mock::pair::<Req, Res>();
    handle.allow(u64::MAX);
    let mut client = ServiceBuilder::new()
        .layer(KeyRotationLayer::new(&pool).failover(Failover::attempts(1)).wait_up_to(2 * COOLDOWN))
        .service(inner);
    for _ in 0..2 {
        let mut limited = call(&mut client);
        assert_pending!(limited.poll());
        received(&mut handle).1.send_response(response(429));
        assert_eq!(assert_ready!(limited.poll()).unwrap().status(), 429);
        clock.advance(Duration::from_secs(1));
    }
    let mut waiting = [call(&mut client), call(&mut client)];
    waiting.iter_mut().for_each(|waiting| assert_pending!(waiting.poll()));

    clock.advance(COOLDOWN - Duration::from_secs(2));
    waiting.iter_mut().for_each(|waiting| assert_pending!(waiting.poll()));
    let (first, _answer_takes_long) = received(&mut handle);
    assert_eq!(key_of(&first), "Bearer sk-0");
    assert_eq!(pool.stats().healthy, 1);

    // The other key is idle from now on.
    clock.advance(Duration::from_secs(1));
    assert_eq!(pool.stats().healthy, 2);
    waiting.iter_mut().for_each(|waiting| assert_pending!(waiting.poll()));
    waiting.iter_mut().for_each(|waiting| assert_pending!(waiting.poll()));
    let (second, _) = received(&mut handle);
    assert_eq!(key_of(&second), "Bearer sk-1");
}

/// A clock that stands still until it has been read a number of times. In the middle of the next reading the first
/// key's rest ends, and another thread returns the key to service.
#[derive(Debug)]
struct Interrupting {
    clock: ManualClock,
    readings_left: AtomicUsize,
    pool: Arc<OnceLock<KeyPool>>,
}

const FIRST_IS_BACK: Duration = Duration::from_secs(1);
const SECOND_IS_BACK: Duration = Duration::from_secs(100);

impl Clock for Interrupting {
    fn now(&self) -> Duration {
        if let Some(pool) = self.pool.get()
            && self.readings_left.fetch_sub(1, SeqCst) == 0
        {
            self.clock.advance(FIRST_IS_BACK);
            assert_eq!(pool.stats().healthy, 1);
        }
        self.clock.now()
    }

    fn sleep_until(&self, deadline: Duration) -> Sleep {
        self.clock.sleep_until(deadline)
    }
}

#[test]
fn a_waiter_never_oversleeps_a_key_returned_elsewhere() {
    for readings in 0..40 {
        let later = Arc::new(OnceLock::new());
        let readings_left = AtomicUsize::new(readings);
        let clock = Interrupting { clock: ManualClock::new(), readings_left, pool: later.clone() };
        let manual = clock.clock.clone();
        let keys = [("alpha", "sk-1"), ("beta", "sk-2")];
        let pool = KeyPool::builder().keys(keys).exact_hints().clock(clock).build().unwrap();
        let rests = Arc::new(Mutex::new([FIRST_IS_BACK, SECOND_IS_BACK].into_iter()));
        let service = service_fn(move |_: Req| {
            let limited = rests
                .lock()
                .unwrap()
                .next()
                .map(|rest| Response::builder().status(429).header(header::RETRY_AFTER, rest.as_secs()));
            ready(limited.unwrap_or_default().body(Full::<Bytes>::default()))
        });
        let mut client = KeyRotationLayer::new(&pool).wait_up_to(SECOND_IS_BACK).layer(service);
        for _ in 0..2 {
            assert_eq!(assert_ready!(call(&mut client).poll()).unwrap().status(), 429);
        }
        later.set(pool.clone()).unwrap();

        let mut waiting = call(&mut client);
        let answered = waiting.poll().is_ready();
        if manual.now() == Duration::ZERO {
            // It was not interrupted.
            assert!(!answered);
            manual.advance(FIRST_IS_BACK);
        }
        assert!(answered || waiting.poll().is_ready(), "after {readings} readings of the clock");
    }
}

// ---- panics ----

/// What the service does with one request.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Does {
    Answer(u16),
    PanicInCall,
    PanicInFuture,
}

type Boxed<T> = Pin<Box<dyn Future<Output = T> + Send>>;

fn does(
    what: &[Does],
) -> impl Service<Req, Response = Res, Error = Infallible, Future: Send> + Clone + Send + Sync + 'static {
    let what = Arc::new(Mutex::new(Vec::from(what).into_iter()));
    service_fn(move |_: Req| -> Boxed<Result<Res, Infallible>> {
        let next = what.lock().unwrap().next().unwrap_or(Does::Answer(200));
        match next {
            Does::Answer(status) => Box::pin(ready(Ok(response(status)))),
            Does::PanicInCall => panic!("in call"),
            Does::PanicInFuture => Box::pin(async { panic!("in the future") }),
        }
    })
}

/// Sends a request and has it panic.
fn panics<S: Service<Req>>(client: &mut S) {
    let sent = AssertUnwindSafe(|| call(client).poll().is_ready());
    assert!(catch_unwind(sent).is_err(), "it did not panic");
}

#[test]
fn f24_a_panicking_service_marks_no_key() {
    for panic in [Does::PanicInCall, Does::PanicInFuture] {
        let (token, pool, _) = watched_pool(2);
        let mut client = KeyRotationLayer::new(&pool).layer(does(&[panic, panic]));
        panics(&mut client);
        assert_eq!(statuses(&pool), [Status::Healthy; 2], "{panic:?}");
        panics(&mut client);
        for _ in 0..4 {
            assert_eq!(assert_ready!(call(&mut client).poll()).unwrap().status(), 200);
        }
        assert_eq!(requests(&pool), [3, 3]);
        drop((client, pool));
        assert_eq!(Arc::strong_count(&token), 1, "{panic:?}");
    }
}

#[test]
fn f24_a_panicking_service_poisons_no_lock() {
    for panic in [Does::PanicInCall, Does::PanicInFuture] {
        let (pool, clock) = pool(2);
        let mut client = ServiceBuilder::new()
            .layer(KeyRotationLayer::new(&pool).failover(Failover::attempts(3)).wait_up_to(COOLDOWN))
            // Its second attempt panics, too.
            .service(does(&[panic, Does::Answer(429), panic]));
        panics(&mut client);
        assert_eq!(statuses(&pool), [Status::Healthy; 2]);
        panics(&mut client);
        assert_eq!(pool.stats().rate_limited, 1, "only the key that was limited rests");

        std::thread::scope(|scope| {
            scope.spawn(|| {
                assert_eq!(assert_ready!(call(&mut client).poll()).unwrap().status(), 200);
                pool.insert("key-2", "sk-2").now_or_never().unwrap().unwrap();
                pool.reset("key-0").now_or_never().unwrap().unwrap();
                pool.disable("key-1").now_or_never().unwrap().unwrap();
                pool.remove("key-1").now_or_never().unwrap().unwrap();
                pool.reload().now_or_never().unwrap().unwrap();
            });
        });
        clock.advance(COOLDOWN);
        assert_eq!(pool.stats().healthy, 2);
        assert_eq!(assert_ready!(call(&mut client).poll()).unwrap().status(), 200);
    }
}

#[test]
fn f24_a_panic_after_waiting_admits_the_next_request() {
    for panic in [Does::PanicInCall, Does::PanicInFuture] {
        let (pool, clock) = pool(1);
        let mut client = ServiceBuilder::new()
            .layer(KeyRotationLayer::new(&pool).failover(Failover::attempts(1)).wait_up_to(COOLDOWN))
            .service(does(&[Does::Answer(429), panic, panic]));
        assert_eq!(assert_ready!(call(&mut client).poll()).unwrap().status(), 429);
        let mut waiting: Vec<_> = (0..3).map(|_| call(&mut client)).collect();
        waiting.iter_mut().for_each(|waiting| assert_pending!(waiting.poll()));
        clock.advance(COOLDOWN);
        for _ in 0..2 {
            let first = AssertUnwindSafe(waiting.remove(0));
            // The future is dropped by the panic, as a task's is.
            assert!(catch_unwind(|| { first }.0.poll().is_ready()).is_err());
        }
        assert_eq!(assert_ready!(waiting[0].poll()).unwrap().status(), 200, "{panic:?}");
        assert_eq!(statuses(&pool), [Status::Healthy]);
        assert_eq!(assert_ready!(call(&mut client).poll()).unwrap().status(), 200);
    }
}

#[test]
fn f24_a_panicking_classifier_marks_no_key() {
    let (pool, _) = pool(1);
    let layer = KeyRotationLayer::new(&pool).classify(|head: &ResponseHead<'_>| {
        assert_ne!(head.status(), 500);
        tower_key_rotation::classify::Verdict::Nothing
    });
    let mut client = layer.layer(answers(&[500]));
    panics(&mut client);
    assert_eq!(statuses(&pool), [Status::Healthy]);
    assert_eq!(assert_ready!(call(&mut client).poll()).unwrap().status(), 200);
}

// ---- errors, and what passes through ----

#[test]
fn a_service_error_passes_through_and_marks_nothing() {
    let (pool, _) = pool(2);
    let fails = service_fn(|_: Req| ready(Err::<Res, _>(io::Error::other("no route"))));
    let mut client = ServiceBuilder::new()
        .layer(KeyRotationLayer::new(&pool).failover(Failover::attempts(3)).wait_up_to(COOLDOWN))
        .service(fails);
    let error = assert_ready!(call(&mut client).poll()).unwrap_err();
    assert!(matches!(&error, Error::Inner(inner) if inner.to_string() == "no route"), "{error:?}");
    assert_eq!(error.to_string(), "no route");
    assert!(NoKeyAvailable::find(&error).is_none());
    // It is sent once: an error is not a limit.
    assert_eq!(requests(&pool), [1, 0]);
    assert_eq!(statuses(&pool), [Status::Healthy; 2]);
}

#[test]
fn a_second_attempts_error_passes_through() {
    let (pool, _) = pool(2);
    let replies = Arc::new(Mutex::new(vec![Err(io::Error::other("no route")), Ok(response(429))]));
    let inner = service_fn(move |_: Req| ready(replies.lock().unwrap().pop().unwrap()));
    let mut client = ServiceBuilder::new()
        .layer(KeyRotationLayer::new(&pool).failover(Failover::attempts(3)))
        .service(inner);
    let error = assert_ready!(call(&mut client).poll()).unwrap_err();
    assert!(matches!(&error, Error::Inner(_)), "{error:?}");
    assert_eq!(statuses(&pool), [Status::RateLimited, Status::Healthy]);
}

#[test]
fn f20_the_service_is_not_called_without_a_key() {
    let (pool, _) = pool(1);
    let (inner, mut handle) = mock::pair::<Req, Res>();
    handle.allow(u64::MAX);
    let mut client = KeyRotationLayer::new(&pool).layer(inner);
    let mut limited = call(&mut client);
    assert_pending!(limited.poll());
    received(&mut handle).1.send_response(response(429));
    assert_eq!(assert_ready!(limited.poll()).unwrap().status(), 429);

    let error = assert_ready!(call(&mut client).poll()).unwrap_err();
    assert_eq!(NoKeyAvailable::find(&*error.into_inner()).unwrap().retry_in(), Some(COOLDOWN));
    assert_pending!(handle.poll_request());
    assert_eq!(requests(&pool), [1]);
}

#[test]
fn a_request_to_another_host_passes_through_unchanged() {
    let pool = one_key_for("api.example.com");
    let seen = Arc::new(Mutex::new(Vec::new()));
    let inner = {
        let seen = seen.clone();
        service_fn(move |request: Req| {
            seen.lock().unwrap().push(request.headers().clone());
            ready(Ok::<_, Infallible>(response(429)))
        })
    };
    let mut client = ServiceBuilder::new()
        .layer(KeyRotationLayer::new(&pool).expose_key().failover(Failover::attempts(3)))
        .service(inner);
    let elsewhere = || {
        Request::get("https://other.example.com/")
            .header(header::AUTHORIZATION, "the caller's own")
            .body(String::new())
            .unwrap()
    };
    let answer = assert_ready!(task::spawn(client.call(elsewhere())).poll()).unwrap();
    assert_eq!(answer.status(), 429);
    assert!(answer.extensions().get::<tower_key_rotation::ServedBy>().is_none());
    assert_eq!(seen.lock().unwrap().len(), 1, "it was sent again");
    assert_eq!(seen.lock().unwrap()[0][header::AUTHORIZATION], "the caller's own");
    assert_eq!((requests(&pool), statuses(&pool)), (vec![0], vec![Status::Healthy]));

    // Nor does it need one.
    assert_eq!(assert_ready!(call(&mut client).poll()).unwrap().status(), 429);
    assert_eq!(statuses(&pool), [Status::RateLimited]);
    assert_eq!(assert_ready!(task::spawn(client.call(elsewhere())).poll()).unwrap().status(), 429);
    assert_eq!(requests(&pool), [1]);
}

#[test]
fn a_request_to_another_host_never_waits() {
    let pool = one_key_for("api.example.com");
    let mut client = ServiceBuilder::new()
        .layer(KeyRotationLayer::new(&pool).failover(Failover::attempts(1)).wait_up_to(COOLDOWN))
        .service(answers(&[429]));
    assert_eq!(assert_ready!(call(&mut client).poll()).unwrap().status(), 429);
    let elsewhere = Request::get("https://other.example.com/").body(String::new()).unwrap();
    let mut answer = task::spawn(client.call(elsewhere));
    assert_eq!(
        assert_ready!(answer.poll(), "it waits for a key that it does not get").unwrap().status(),
        200
    );
}

#[derive(Clone, Debug, PartialEq)]
struct Trace(u64);

#[test]
fn only_the_key_header_of_a_request_changes() {
    let (pool, _) = pool(2);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let inner = {
        let seen = seen.clone();
        service_fn(move |request: Req| {
            let status = if key_of(&request) == "Bearer sk-0" { 429 } else { 200 };
            seen.lock().unwrap().push(request);
            ready(Ok::<_, Infallible>(response(status)))
        })
    };
    let mut client = ServiceBuilder::new()
        .layer(KeyRotationLayer::new(&pool).failover(Failover::attempts(3)))
        .service(inner);
    let mut sent = Request::builder()
        .method(Method::from_bytes(b"PROPFIND").unwrap())
        .uri("https://user@api.example.com:8443/v1/%C3%A4?b=2&a=1&a=%20")
        .version(Version::HTTP_10)
        .header("x-list", "one")
        .header("x-list", "two")
        .header(header::CONTENT_TYPE, "application/json")
        .header("x-bytes", HeaderValue::from_bytes(b"\xff\xfe").unwrap())
        .extension(Trace(7))
        .body("a prompt".to_owned())
        .unwrap();
    let answer = assert_ready!(task::spawn(client.call(sent.clone())).poll()).unwrap();
    assert_eq!(answer.status(), 200);

    let seen = seen.lock().unwrap();
    assert_eq!(seen.len(), 2);
    for (number, seen) in seen.iter().enumerate() {
        let key = format!("Bearer sk-{number}").parse().unwrap();
        sent.headers_mut().insert(header::AUTHORIZATION, key);
        assert_eq!(seen.headers(), sent.headers());
        assert_eq!(seen.method(), sent.method());
        assert_eq!(seen.uri(), sent.uri());
        assert_eq!(seen.version(), sent.version());
        assert_eq!(seen.body(), sent.body());
        assert_eq!(seen.extensions().get(), Some(&Trace(7)));
        assert!(seen.headers()[header::AUTHORIZATION].is_sensitive());
    }
}

#[tokio::test]
async fn a_uri_that_cannot_carry_a_key_errors() {
    let pool = KeyPool::builder().key("key-0", "sk-0").inject(Inject::query("key")).build().unwrap();
    let refused = async |uri: &str| {
        let service = service_fn(async |_: Req| -> Result<Res, Infallible> { unreachable!() });
        let request = Request::builder().uri(uri).header(header::HOST, "localhost");
        let request = request.body(String::new()).unwrap();
        let error = KeyRotationLayer::new(&pool).layer(service).oneshot(request).await.unwrap_err();
        let Error::Inject(error) = error else { panic!("{error}") };
        error
    };
    assert!(refused("*").await.to_string().contains("can't have a query"));
    assert!(refused("127.0.0.1:443").await.to_string().contains("can't have a query"));
    let long = format!("/v1?{}", "a".repeat(65_525));
    assert!(refused(&long).await.is_uri_too_long());
}

#[tokio::test]
async fn nothing_of_a_response_is_changed() {
    let (pool, _) = pool(1);
    let inner = service_fn(|_: Req| {
        let mut answer = response(429);
        answer.headers_mut().append("x-list", HeaderValue::from_static("one"));
        answer.headers_mut().append("x-list", HeaderValue::from_static("two"));
        answer.extensions_mut().insert(Trace(7));
        *answer.version_mut() = Version::HTTP_2;
        ready(Ok::<_, Infallible>(answer))
    });
    let mut client = ServiceBuilder::new()
        .layer(KeyRotationLayer::new(&pool).read_error_bodies(100).failover(Failover::attempts(3)))
        .service(inner);
    let answer = client.ready().await.unwrap().call(request()).await.unwrap();
    assert_eq!(answer.status(), 429);
    assert_eq!(answer.version(), Version::HTTP_2);
    assert_eq!(answer.headers().get_all("x-list").iter().collect::<Vec<_>>(), ["one", "two"]);
    assert_eq!(answer.headers().len(), 2);
    assert_eq!(answer.extensions().get(), Some(&Trace(7)));
    assert_eq!(answer.into_body().collect().await.unwrap().to_bytes(), "an answer");
}

#[tokio::test]
async fn f27_body_frames_and_trailers_pass_through_unchanged() {
    for status in [200, 404, 503] {
        let (pool, _) = pool(2);
        let inner = service_fn(move |_: Req| {
            let sum = HeaderMap::from_iter([("x-sum".parse().unwrap(), HeaderValue::from_static("1"))]);
            let data = |text: &'static str| Frame::data(Bytes::from(text));
            let frames = [data("one"), data(""), data("three"), Frame::trailers(sum)];
            let body = StreamBody::new(stream::iter(frames.map(Ok::<_, Infallible>)));
            ready(Ok::<_, Infallible>(Response::builder().status(status).body(body).unwrap()))
        });
        let mut client = ServiceBuilder::new()
            .layer(KeyRotationLayer::new(&pool).read_error_bodies(100).failover(Failover::attempts(3)))
            .service(inner);
        let mut body = client.ready().await.unwrap().call(request()).await.unwrap().into_body();
        for text in ["one", "", "three"] {
            assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), text, "{status}");
        }
        assert_eq!(body.frame().await.unwrap().unwrap().into_trailers().unwrap()["x-sum"], "1", "{status}");
        assert!(body.frame().await.is_none());
    }
}

/// Asks for the body of each error, and notes what it is shown.
#[derive(Clone, Default)]
struct Reader(Arc<Mutex<Vec<Bytes>>>);

impl ClassifyResponse for Reader {
    fn classify(&self, response: &ResponseHead<'_>) -> Verdict {
        self.0.lock().unwrap().push(Bytes::copy_from_slice(response.body().unwrap_or_default()));
        Verdict::RateLimited { wait: None }
    }

    fn wants_body(&self, _: &ResponseHead<'_>) -> bool {
        true
    }
}

fn data(text: &'static str) -> Result<Frame<Bytes>, &'static str> {
    Ok(Frame::data(Bytes::from_static(text.as_bytes())))
}

#[tokio::test]
async fn bodies_read_ahead_keep_their_trailers_and_errors() {
    for (most, seen, is_cut) in [
        (0, "", false),
        (1, "ab", false),
        (3, "abcd", false),
        (3, "abcd", true),
        (100, "abcdef", false),
        (100, "abcdef", true),
    ] {
        let inner = service_fn(move |_: Req| {
            let sum = HeaderMap::from_iter([("x-sum".parse().unwrap(), HeaderValue::from_static("1"))]);
            let end = if is_cut { Err("cut") } else { Ok(Frame::trailers(sum)) };
            let body = StreamBody::new(stream::iter([data("ab"), data("cd"), data("ef"), end]));
            ready(Ok::<_, Infallible>(Response::builder().status(503).body(body).unwrap()))
        });
        let reader = Reader::default();
        let layer = KeyRotationLayer::new(&pool(1).0).classify(reader.clone()).read_error_bodies(most);
        let mut body = layer.layer(inner).oneshot(request()).await.unwrap().into_body();
        assert_eq!(*reader.0.lock().unwrap(), [seen]);
        for text in ["ab", "cd", "ef"] {
            assert!(!body.is_end_stream());
            assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), text, "{most}");
        }
        match body.frame().await.unwrap() {
            Ok(frame) => assert!(!is_cut && frame.into_trailers().unwrap()["x-sum"] == "1"),
            Err(error) => assert!(is_cut && error == "cut"),
        }
        assert!(body.frame().await.is_none());
    }
}

#[tokio::test]
async fn a_body_read_twice_in_part_arrives_whole() {
    let (pool, _) = pool(2);
    let inner = service_fn({
        let pool = pool.clone();
        move |_: Req| {
            let pool = pool.clone();
            // The other key is disabled while failover drains the body, which the classifier saw in part.
            let disable = move |frame: &Result<Frame<Bytes>, &str>| {
                if frame.as_ref().unwrap().data_ref().unwrap() == "cd" {
                    pool.disable("key-1").now_or_never().unwrap().unwrap();
                }
            };
            let body = stream::iter([data("ab"), data("cd"), data("ef"), data("gh")]).inspect(disable);
            ready(Ok::<_, Infallible>(Response::builder().status(503).body(StreamBody::new(body)).unwrap()))
        }
    });
    let reader = Reader::default();
    let layer = KeyRotationLayer::new(&pool).classify(reader.clone()).read_error_bodies(1);
    let client = layer.failover(Failover::attempts(2).drain_up_to(5)).layer(inner);
    let body = client.oneshot(request()).await.unwrap().into_body();
    assert_eq!(*reader.0.lock().unwrap(), ["ab"]);
    assert_eq!(body.collect().await.unwrap().to_bytes(), "abcdefgh");
    assert_eq!(requests(&pool), [1, 0]);
}

// ---- bodies that are not Clone ----

/// A request body that is not `Clone`.
#[derive(Debug, PartialEq)]
enum Upload {
    Buffered(&'static str),
    Streaming(&'static str),
}

type UploadClient = BoxCloneService<Request<Upload>, Response<Replay<Full<Bytes>>>, Error<Infallible>>;

fn upload(body: Upload) -> Request<Upload> {
    Request::post(URL).header("x-own", "kept").body(body).unwrap()
}

/// A client whose service limits the first request, and what that service saw.
fn upload_client(pool: &KeyPool) -> (UploadClient, Arc<Mutex<Vec<Request<Upload>>>>) {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let inner = {
        let seen = seen.clone();
        service_fn(move |request: Request<Upload>| {
            let mut seen = seen.lock().unwrap();
            seen.push(request);
            ready(Ok::<_, Infallible>(response(if seen.len() == 1 { 429 } else { 200 })))
        })
    };
    let clone = |request: &Request<Upload>| match request.body() {
        Upload::Buffered(text) => {
            let mut clone = Request::new(Upload::Buffered(text));
            *clone.method_mut() = request.method().clone();
            *clone.uri_mut() = request.uri().clone();
            *clone.headers_mut() = request.headers().clone();
            Some(clone)
        }
        Upload::Streaming(_) => None,
    };
    let client = ServiceBuilder::new()
        .layer(KeyRotationLayer::new(pool).failover(Failover::attempts(3).clone_with(clone)))
        .service(inner);
    (BoxCloneService::new(client), seen)
}

#[test]
fn a_request_without_clone_still_gets_a_key() {
    let (pool, _) = pool(1);
    let inner = service_fn(|request: Request<Upload>| {
        assert_eq!(key_of(&request), "Bearer sk-0");
        assert_eq!(request.into_body(), Upload::Streaming("text"));
        ready(Ok::<_, Infallible>(response(200)))
    });
    let mut client = KeyRotationLayer::new(&pool).layer(inner);
    let mut answer = task::spawn(client.call(upload(Upload::Streaming("text"))));
    assert_eq!(assert_ready!(answer.poll()).unwrap().status(), 200);
}

#[test]
fn a_cloneable_request_is_retried_with_another_key() {
    let (pool, _) = pool(2);
    let (mut client, seen) = upload_client(&pool);
    let mut answer = task::spawn(client.call(upload(Upload::Buffered("text"))));
    assert_eq!(assert_ready!(answer.poll()).unwrap().status(), 200);
    let seen = seen.lock().unwrap();
    assert_eq!(seen.iter().map(key_of).collect::<Vec<_>>(), ["Bearer sk-0", "Bearer sk-1"]);
    assert!(
        seen.iter().all(|seen| seen.body() == &Upload::Buffered("text") && seen.headers()["x-own"] == "kept")
    );
}

#[test]
fn f26_a_request_without_clone_is_sent_once() {
    let (pool, _) = pool(2);
    let (mut client, seen) = upload_client(&pool);
    let mut answer = task::spawn(client.call(upload(Upload::Streaming("text"))));
    let answer = assert_ready!(answer.poll()).unwrap();
    assert_eq!(answer.status(), 429);
    let body = answer.into_body().collect().now_or_never().unwrap().unwrap().to_bytes();
    assert_eq!(body, "an answer");
    assert_eq!(seen.lock().unwrap().len(), 1);
    assert_eq!(statuses(&pool), [Status::RateLimited, Status::Healthy]);
}

#[test]
fn a_request_that_never_ends_holds_up_nobody() {
    let (pool, _) = pool(1);
    let inner = service_fn(|request: Req| -> Boxed<Result<Res, Infallible>> {
        if request.body().is_empty() { Box::pin(pending()) } else { Box::pin(ready(Ok(response(200)))) }
    });
    let mut client = ServiceBuilder::new()
        .layer(KeyRotationLayer::new(&pool).failover(Failover::attempts(3)).wait_up_to(COOLDOWN))
        .service(inner);
    let mut hangs: Vec<_> =
        (0..100).map(|_| task::spawn(client.call(Request::post(URL).body(String::new()).unwrap()))).collect();
    hangs.iter_mut().for_each(|hangs| assert_pending!(hangs.poll()));
    assert_eq!(assert_ready!(call(&mut client).poll()).unwrap().status(), 200);
}
