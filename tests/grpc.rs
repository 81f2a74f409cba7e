//! gRPC calls: the status of a call is in trailers, or in the head if there is no message.

// A test may panic, and so may what it calls.

mod support;

use std::{
    io,
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use futures_util::{
    FutureExt, StreamExt,
    stream::{iter, pending},
};
use http::{HeaderMap, HeaderValue, Request, Response, Version, header::CONTENT_TYPE};
use http_body::{Body, Frame};
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use support::*;
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_key_rotation::{
    Error, Failover, KeyPool, KeyRotationLayer, Status,
    classify::{Grpc, LlmGateway},
    clock::ManualClock,
};

type Answered = Response<BoxBody<Bytes, io::Error>>;
type Frames = Vec<Frame<Bytes>>;

/// `RESOURCE_EXHAUSTED`, with a `google.rpc.RetryInfo` of 47 seconds.
const EXHAUSTED: [(&str, &str); 2] = [
    ("grpc-status", "8"),
    ("grpc-status-details-bin", "CAgaMAoodHlwZS5nb29nbGVhcGlzLmNvbS9nb29nbGUucnBjLlJldHJ5SW5mbxIECgIILw"),
];
const OK: [(&str, &str); 1] = [("grpc-status", "0")];
const MESSAGE: &[u8] = b"\0\0\0\0\x02hi";

fn headers(fields: &[(&'static str, &'static str)]) -> HeaderMap {
    let fields = fields.iter().map(|(name, value)| (name.parse().unwrap(), HeaderValue::from_static(value)));
    fields.collect()
}

fn trailers(fields: &[(&'static str, &'static str)]) -> Frame<Bytes> {
    Frame::trailers(headers(fields))
}

fn message() -> Frame<Bytes> {
    Frame::data(Bytes::from_static(MESSAGE))
}

fn call(frames: Frames) -> Answered {
    let body = BodyExt::boxed(StreamBody::new(iter(frames.into_iter().map(Ok))));
    Response::builder().header(CONTENT_TYPE, "application/grpc+proto").body(body).unwrap()
}

/// A call without a message, whose status is in the head.
fn failed_in_head(status: &[(&'static str, &'static str)]) -> Answered {
    let mut response = call(vec![]);
    response.headers_mut().extend(headers(status));
    response
}

/// A service that answers the first key so, and the others with a message.
#[derive(Clone)]
struct Scripted {
    answer: Arc<dyn Fn() -> Answered + Send + Sync>,
    keys: Arc<Mutex<Vec<String>>>,
}

impl Scripted {
    fn new(answer: impl Fn() -> Answered + Send + Sync + 'static) -> Self {
        Self { answer: Arc::new(answer), keys: Arc::default() }
    }

    fn service(
        &self,
    ) -> impl Service<Request<Full<Bytes>>, Response = Answered, Error = io::Error, Future: Send>
    + Clone
    + Send
    + use<> {
        let this = self.clone();
        service_fn(move |request: Request<Full<Bytes>>| {
            let key = key_of(&request).unwrap().to_owned();
            let answer = if key == "alpha" { (this.answer)() } else { call(vec![message(), trailers(&OK)]) };
            this.keys.lock().unwrap().push(key);
            std::future::ready(Ok(answer))
        })
    }

    fn keys(&self) -> Vec<String> {
        self.keys.lock().unwrap().clone()
    }
}

fn request() -> Request<Full<Bytes>> {
    Request::post("https://api.example.com/Service/Method").body(Full::from("message")).unwrap()
}

fn two_keys() -> KeyPool {
    builder(["alpha", "beta"], &ManualClock::new()).exact_hints().build().unwrap()
}

fn layer(pool: &KeyPool) -> KeyRotationLayer<Grpc, Failover> {
    KeyRotationLayer::new(pool).classify(Grpc).failover(Failover::attempts(3))
}

/// Data and trailers of a body.
async fn read<B: Body<Data = Bytes, Error: std::fmt::Debug>>(body: B) -> (Bytes, Option<HeaderMap>) {
    let collected = body.collect().await.unwrap();
    let trailers = collected.trailers().cloned();
    (collected.to_bytes(), trailers)
}

#[tokio::test]
async fn a_call_without_a_message_fails_over() {
    for answer in [|| failed_in_head(&EXHAUSTED), || call(vec![trailers(&EXHAUSTED)])] {
        let pool = two_keys();
        let service = Scripted::new(answer);
        let response = layer(&pool).layer(service.service()).oneshot(request()).await.unwrap();
        assert_eq!(read(response.into_body()).await, (MESSAGE.into(), Some(headers(&OK))));
        assert_eq!(service.keys(), ["alpha", "beta"]);
        assert_eq!(time_left(&pool, "alpha"), Some(47 * SECOND));
    }
}

#[tokio::test]
async fn trailers_behind_a_message_rest_the_key() {
    let pool = two_keys();
    let service = Scripted::new(|| call(vec![message(), trailers(&EXHAUSTED)]));
    let response = layer(&pool).layer(service.service()).oneshot(request()).await.unwrap();
    let mut body = response.into_body();
    assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), MESSAGE);
    assert_eq!(stats_of(&pool, "alpha").status, Status::Healthy);
    assert_eq!(body.frame().await.unwrap().unwrap().into_trailers().unwrap(), headers(&EXHAUSTED));
    assert_eq!(time_left(&pool, "alpha"), Some(47 * SECOND));
    assert_eq!(service.keys(), ["alpha"]);
}

#[tokio::test]
async fn trailers_that_come_later_hold_up_nothing() {
    let pool = two_keys();
    let service = Scripted::new(|| {
        let body = BodyExt::boxed(StreamBody::new(pending()));
        Response::builder().header(CONTENT_TYPE, "application/grpc").body(body).unwrap()
    });
    assert!(layer(&pool).layer(service.service()).oneshot(request()).now_or_never().is_some());
}

#[tokio::test]
async fn calls_that_may_not_be_sent_again_are_not() {
    const NEVER: [(&str, &str); 2] = [("grpc-status", "8"), ("grpc-retry-pushback-ms", "-1")];
    for answer in [|| failed_in_head(&NEVER), || call(vec![trailers(&NEVER)])] {
        let pool = two_keys();
        let service = Scripted::new(answer);
        layer(&pool).layer(service.service()).oneshot(request()).await.unwrap();
        assert_eq!(service.keys(), ["alpha"]);
        assert_eq!(stats_of(&pool, "alpha").status, Status::RateLimited);
    }
}

#[tokio::test]
async fn other_trailers_rest_no_key() {
    const UNAVAILABLE: [(&str, &str); 1] = [("grpc-status", "14")];
    let answers: [fn() -> Answered; 5] = [
        || call(vec![trailers(&OK)]),
        || call(vec![trailers(&UNAVAILABLE)]),
        || call(vec![message(), trailers(&UNAVAILABLE)]),
        // Not of gRPC.
        || {
            let mut response = call(vec![trailers(&EXHAUSTED)]);
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc-web"));
            response
        },
        || {
            let mut response = call(vec![trailers(&EXHAUSTED)]);
            response.headers_mut().remove(CONTENT_TYPE);
            response
        },
    ];
    for answer in answers {
        let pool = two_keys();
        let service = Scripted::new(answer);
        let response = layer(&pool).layer(service.service()).oneshot(request()).await.unwrap();
        read(response.into_body()).await;
        assert_eq!(service.keys(), ["alpha"]);
        assert_eq!(stats_of(&pool, "alpha").status, Status::Healthy);
    }
    // Classifiers of other services do not see trailers.
    let pool = two_keys();
    let service = Scripted::new(|| call(vec![trailers(&EXHAUSTED)]));
    let layer = KeyRotationLayer::new(&pool).classify(LlmGateway::new()).failover(Failover::attempts(3));
    let response = layer.layer(service.service()).oneshot(request()).await.unwrap();
    read(response.into_body()).await;
    assert_eq!(stats_of(&pool, "alpha").status, Status::Healthy);
}

#[tokio::test]
async fn over_http2_real_trailers_rest_the_key() {
    let pool = builder(["alpha"], &ManualClock::new()).exact_hints().build().unwrap();
    let server = Server::answering(|| {
        let frames = vec![Ok::<_, io::Error>(message()), Ok(trailers(&EXHAUSTED))];
        let body = axum::body::Body::new(StreamBody::new(iter(frames).boxed()));
        answer_with(200, [("content-type", "application/grpc")], body)
    })
    .await;
    let client = Client::builder(TokioExecutor::new()).http2_only(true).build_http::<Full<Bytes>>();
    let request = Request::post(server.url()).version(Version::HTTP_2).body(Full::from("message")).unwrap();
    let response = layer(&pool).layer(client).oneshot(request).await.map_err(Error::into_inner).unwrap();
    assert_eq!(response.version(), Version::HTTP_2);
    assert_eq!(read(response.into_body()).await, (MESSAGE.into(), Some(headers(&EXHAUSTED))));
    assert_eq!(time_left(&pool, "alpha"), Some(47 * SECOND));
}
