//! A request is sent again only after a refusal, and only with the same body.

mod support;

use std::{
    convert::Infallible,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    task::{Context, Poll},
};

use bytes::Bytes;
use futures_util::FutureExt;
use http::{Request, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt, Full};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use support::*;
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_key_rotation::{
    Failover, KeyPool, KeyRotationLayer, Status,
    classify::{ResponseHead, Verdict},
    clock::ManualClock,
};

const URL: &str = "https://api.example.com/v1";

/// A body whose clones share one stream, as octocrab's do. It may keep its length to itself.
#[derive(Clone)]
struct Shared {
    body: Arc<Mutex<Full<Bytes>>>,
    says_its_length: bool,
}

impl Shared {
    fn new(text: &'static str) -> Self {
        Self { body: Arc::new(Mutex::new(Full::from(text))), says_its_length: true }
    }

    fn of_unknown_length(text: &'static str) -> Self {
        Self { says_its_length: false, ..Self::new(text) }
    }
}

impl Body for Shared {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Pin::new(&mut *self.body.lock().unwrap()).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.lock().unwrap().is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        if self.says_its_length { self.body.lock().unwrap().size_hint() } else { SizeHint::default() }
    }
}

/// A service that reads the body of each request, or not, and limits the first key.
fn limits_alpha(
    reads: bool,
) -> (Received, impl Service<Request<Shared>, Response = Res, Error = Infallible, Future: Send> + Clone + Send)
{
    let received = Received::default();
    let service = service_fn({
        let received = received.clone();
        move |request: Request<Shared>| {
            let limited = request.headers()["authorization"] == "Bearer sk-alpha";
            let body = if reads {
                request.into_body().collect().now_or_never().unwrap().unwrap().to_bytes()
            } else {
                Bytes::from("not read")
            };
            received.lock().unwrap().push(body);
            let status = if limited { StatusCode::TOO_MANY_REQUESTS } else { StatusCode::CREATED };
            std::future::ready(Ok(Response::builder().status(status).body(Full::from("answer")).unwrap()))
        }
    });
    (received, service)
}

type Received = Arc<Mutex<Vec<Bytes>>>;
type Res = Response<Full<Bytes>>;

fn two_keys() -> KeyPool {
    pool(["alpha", "beta"], &ManualClock::new())
}

async fn post(layer: &FailoverLayer, reads: bool, body: Shared) -> (u16, String, Vec<Bytes>) {
    let (received, service) = limits_alpha(reads);
    let request = Request::post(URL).body(body).unwrap();
    let response = layer.layer(service).oneshot(request).await.unwrap();
    let status = response.status().as_u16();
    let answer = response.into_body().collect().await.unwrap().to_bytes();
    let received = received.lock().unwrap().clone();
    (status, String::from_utf8(answer.to_vec()).unwrap(), received)
}

#[tokio::test]
async fn f34_consumed_shared_streams_are_never_resent() {
    let pool = two_keys();
    let (status, answer, received) = post(&failover(&pool), true, Shared::new("prompt")).await;
    assert_eq!((status, answer.as_str()), (429, "answer"), "the caller gets the refused response");
    assert_eq!(received, ["prompt"]);
    assert_eq!(stats_of(&pool, "alpha").status, Status::RateLimited);
}

#[tokio::test]
async fn f34_bodies_of_unknown_length_are_never_resent() {
    for reads in [true, false] {
        let (status, _, received) =
            post(&failover(&two_keys()), reads, Shared::of_unknown_length("prompt")).await;
        assert_eq!((status, received.len()), (429, 1));
    }
}

#[tokio::test]
async fn f34_unread_bodies_are_resent_whole() {
    let (status, _, received) = post(&failover(&two_keys()), false, Shared::new("prompt")).await;
    assert_eq!((status, received.len()), (201, 2));
}

#[tokio::test]
async fn f34_an_empty_body_is_sent_again() {
    let (status, _, received) = post(&failover(&two_keys()), true, Shared::new("")).await;
    assert_eq!((status, received.len()), (201, 2));
}

/// The body is whole when the wait begins, and consumed when it ends.
#[tokio::test]
async fn f34_bodies_consumed_during_a_wait_are_never_resent() {
    let clock = ManualClock::new();
    let pool = pool(["alpha"], &clock);
    let body = Shared::new("prompt");
    let (received, service) = limits_alpha(false);
    let layer = failover(&pool).wait_up_to(5 * MINUTE);
    let request = Request::post(URL).body(body.clone()).unwrap();
    let mut answer = tokio_test::task::spawn(layer.layer(service).oneshot(request));
    assert!(answer.poll().is_pending());
    body.collect().await.unwrap();
    clock.advance(2 * MINUTE);
    let response = in_time(answer).await.unwrap();
    assert_eq!((response.status().as_u16(), received.lock().unwrap().len()), (429, 1));
}

#[tokio::test]
async fn f34_the_caller_can_answer_for_its_clones() {
    let pool = two_keys();
    let text = "prompt";
    let clone = move |request: &Request<Shared>| {
        let mut clone = Request::new(Shared::of_unknown_length(text));
        clone.clone_from_head(request);
        Some(clone)
    };
    let (received, service) = limits_alpha(true);
    let client =
        KeyRotationLayer::new(&pool).failover(Failover::attempts(3).clone_with(clone)).layer(service);
    let request = Request::post(URL).body(Shared::of_unknown_length(text)).unwrap();
    assert_eq!(client.oneshot(request).await.unwrap().status(), 201);
    assert_eq!(*received.lock().unwrap(), [text, text]);
}

trait CloneFromHead {
    fn clone_from_head(&mut self, other: &Self);
}

impl<B> CloneFromHead for Request<B> {
    fn clone_from_head(&mut self, other: &Self) {
        *self.method_mut() = other.method().clone();
        *self.uri_mut() = other.uri().clone();
        *self.headers_mut() = other.headers().clone();
    }
}

/// Rests a key whose last request this was, as services say it with a response that went well.
fn rests_at_zero(response: &ResponseHead<'_>) -> Verdict {
    let nothing_left = response.headers().get("x-ratelimit-remaining").is_some_and(|left| left == "0");
    if nothing_left { Verdict::RateLimited { wait: None } } else { Verdict::Nothing }
}

#[tokio::test]
async fn f35_successes_that_rest_keys_execute_once() {
    for status in [200, 201, 204, 302, 304] {
        let executed = Arc::new(AtomicUsize::new(0));
        let server = Server::answering({
            let executed = executed.clone();
            move || {
                executed.fetch_add(1, SeqCst);
                answer_with(status, [("x-ratelimit-remaining", "0")], "")
            }
        })
        .await;
        let http = Client::builder(TokioExecutor::new()).build_http::<Full<Bytes>>();
        for keys in [&["alpha"][..], &["alpha", "beta"]] {
            let pool = builder(keys, &ManualClock::new()).build().unwrap();
            let layer = failover(&pool).wait_up_to(5 * MINUTE).classify(rests_at_zero);
            let request = Request::post(server.url()).body(Full::from("order")).unwrap();
            let response = in_time(layer.layer(http.clone()).oneshot(request)).await.unwrap();
            assert_eq!(response.status(), status);
            assert_eq!(stats_of(&pool, "alpha").status, Status::RateLimited);
        }
        assert_eq!(executed.load(SeqCst), 2, "once for each of two requests");
    }
}

#[tokio::test]
async fn f35_nor_is_it_executed_twice_by_the_middleware() {
    let server = Server::answering(|| answer_with(201, [("x-ratelimit-remaining", "0")], "made")).await;
    let pool = two_keys();
    let layer = failover(&pool).classify(rests_at_zero);
    let client = reqwest_middleware::ClientBuilder::new(http()).with(layer).build();
    let response = client.post(server.url()).body("order").send().await.unwrap();
    assert_eq!((response.status().as_u16(), server.count()), (201, 1));
    assert_eq!(stats_of(&pool, "alpha").status, Status::RateLimited);
}
