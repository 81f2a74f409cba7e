//! What a request costs in allocations, compared with the same request without a layer.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    sync::Arc,
    time::Duration,
};

use futures_util::FutureExt;
use http::{Request, Response};
use tower::{Layer, Service};
use tower_key_rotation::{
    Failover, Inject, KeyPool, KeyRotationLayer,
    classify::{ClassifyResponse, GitHub, Grpc, LlmGateway, OpenAi},
    clock::ManualClock,
};

type Req = Request<String>;

/// Answers with the status that the request has for a body, and allocates nothing.
#[derive(Clone)]
struct Echo;

impl Service<Req> for Echo {
    type Response = Response<http_body_util::Empty<bytes::Bytes>>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Infallible>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Req) -> Self::Future {
        let mut response = Response::new(http_body_util::Empty::new());
        *response.status_mut() = request.body().parse().unwrap();
        ready(Ok(response))
    }
}

fn request(status: &'static str) -> Req {
    let builder = Request::post("https://api.example.com/v1").header("content-type", "application/json");
    builder.header("authorization", "the caller's own").body(status.to_owned()).unwrap()
}

/// The allocations of a hundred requests, when everything is warm.
fn allocations<S: Service<Req>>(client: &mut S, status: &'static str) -> u64 {
    let mut send = |request| drop(client.call(request).now_or_never());
    (0..300).for_each(|_| send(request("200")));
    let mut requests = (0..100).map(|_| request(status)).collect::<Vec<_>>();
    allocation_counter::measure(|| requests.drain(..).for_each(&mut send)).count_total
}

fn pool(keys: usize, clock: &ManualClock) -> KeyPool {
    let keys = (0..keys).map(|number| (format!("key-{number}"), format!("sk-{number}")));
    KeyPool::builder().keys(keys).inject(Inject::bearer()).clock(clock.clone()).build().unwrap()
}

#[test]
fn requests_allocate_nothing_while_keys_are_healthy() {
    let pool = pool(100, &ManualClock::new());
    let mut client = KeyRotationLayer::new(&pool).layer(Echo);
    assert_eq!(allocations(&mut client, "200"), allocations(&mut Echo, "200"));
}

#[test]
fn requests_allocate_nothing_while_spans_are_off() {
    let subscriber =
        tracing_subscriber::fmt().with_max_level(tracing::Level::DEBUG).with_writer(std::io::sink);
    tracing::subscriber::with_default(subscriber.finish(), || {
        let pool = pool(100, &ManualClock::new());
        let mut client = KeyRotationLayer::new(&pool).layer(Echo);
        assert_eq!(allocations(&mut client, "200"), allocations(&mut Echo, "200"));
    });
}

#[test]
fn requests_allocate_nothing_while_keys_rest_or_return() {
    let clock = ManualClock::new();
    let pool = pool(100, &clock);
    let mut client = KeyRotationLayer::new(&pool).layer(Echo);
    for _ in 0..50 {
        client.call(request("429")).now_or_never();
    }
    assert_eq!(pool.stats().rate_limited, 50);
    assert_eq!(allocations(&mut client, "200"), 0);
    clock.advance(Duration::from_secs(120));
    let came_back = allocation_counter::measure(|| {
        let _ = pool.next_return();
    });
    assert_eq!((came_back.count_total, allocations(&mut client, "200")), (0, 0));
}

/// What the layer leaves in the extensions of a limited response is as large as this, and boxed there as well.
#[derive(Clone)]
struct Note(#[allow(dead_code)] Arc<()>);

/// A client without a layer, whose limited responses come with a note.
#[derive(Clone)]
struct EchoWithNote;

impl Service<Req> for EchoWithNote {
    type Response = Response<http_body_util::Empty<bytes::Bytes>>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Infallible>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Req) -> Self::Future {
        let is_limited = request.body() == "429";
        let answer = Echo.call(request).into_inner();
        ready(answer.map(|mut response| {
            if is_limited {
                response.extensions_mut().insert(Note);
            }
            response
        }))
    }
}

#[test]
fn marking_a_key_allocates_only_the_response_extension() {
    let pool = pool(1_000, &ManualClock::new());
    let mut client = KeyRotationLayer::new(&pool).layer(Echo);
    let note = allocations(&mut EchoWithNote, "429");
    assert!(note > 0);
    assert_eq!(allocations(&mut client, "429"), note);
    assert_eq!(pool.stats().rate_limited, 100, "each of them marked a key");
}

#[test]
fn failover_allocates_only_the_request_clone() {
    let pool = pool(10, &ManualClock::new());
    let mut client = KeyRotationLayer::new(&pool).failover(Failover::attempts(3)).layer(Echo);
    let clones = allocation_counter::measure(|| {
        for _ in 0..100 {
            drop(request("200"));
        }
    });
    let built_and_cloned = allocation_counter::measure(|| {
        for _ in 0..100 {
            drop(request("200").clone());
        }
    });
    let clone = built_and_cloned.count_total - clones.count_total;
    assert!(clone > 0);
    assert_eq!(allocations(&mut client, "200"), clone);
}

fn classified<C: ClassifyResponse + Clone>(classifier: C) -> u64 {
    let pool = pool(100, &ManualClock::new());
    let mut client = KeyRotationLayer::new(&pool).classify(classifier).layer(Echo);
    allocations(&mut client, "200")
}

#[test]
fn classifiers_of_services_allocate_nothing_for_successes() {
    let without = allocations(&mut Echo, "200");
    // The last two look at the headers of successes.
    let counts = [classified(OpenAi), classified(LlmGateway::new()), classified(GitHub), classified(Grpc)];
    assert_eq!(counts, [without; 4]);
}
