//! How many instructions a request takes through the layer, and through what it stands beside.
//!
//! ```text
//! cargo install gungraun-runner --version 0.20.0    # and valgrind
//! cargo bench --bench instructions
//! ```

#![allow(missing_docs)] // Of what the macros make.

mod support;

use std::fmt::Debug;

use gungraun::prelude::*;
use http::{HeaderValue, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper_util::rt::TokioIo;
use support::*;
use tokio::runtime::Runtime;
use tower::{
    Layer, Service, ServiceExt,
    retry::{Policy, Retry},
    service_fn,
    util::BoxService,
};
use tower_http::set_header::{SetRequestHeader, SetRequestHeaderLayer};
use tower_key_rotation::{FailoverLayer, KeyRotation, KeyRotationLayer, failover::Failover};

const REQUESTS: usize = 100;

fn set_header<S>(inner: S) -> SetRequestHeader<S, HeaderValue> {
    SetRequestHeaderLayer::overriding(HEADER, authorization()).layer(inner)
}

/// What only the first request pays for is no part of the others.
fn warm<S: Service<Request<&'static str>, Error: Debug>>(mut service: S) -> S {
    send(&mut service, request());
    service
}

fn send_all<S: Service<Request<&'static str>, Error: Debug>>(mut service: S) -> S {
    for _ in 0..REQUESTS {
        send(&mut service, request());
    }
    service
}

fn all_healthy(keys: usize) -> KeyRotation<Answers> {
    warm(rotation(Answers, keys, |_| false))
}

fn half_resting(keys: usize) -> KeyRotation<Answers> {
    warm(rotation(Answers, keys, |number| number % 2 == 0))
}

#[library_benchmark]
#[bench::request(warm(Answers))]
fn nothing(service: Answers) -> Answers {
    send_all(service)
}

#[library_benchmark]
#[bench::request(warm(set_header(Answers)))]
fn set_request_header(
    service: SetRequestHeader<Answers, HeaderValue>,
) -> SetRequestHeader<Answers, HeaderValue> {
    send_all(service)
}

#[library_benchmark]
#[bench::key_1(all_healthy(1))]
#[bench::keys_10_000(all_healthy(10_000))]
#[bench::keys_100_half_resting(half_resting(100))]
fn key_rotation(service: KeyRotation<Answers>) -> KeyRotation<Answers> {
    send_all(service)
}

/// Clones each request and never goes again.
#[derive(Clone)]
struct Cloning;

impl<B: Clone, R, E> Policy<Request<B>, R, E> for Cloning {
    type Future = std::future::Ready<()>;

    fn retry(&mut self, _: &mut Request<B>, _: &mut Result<R, E>) -> Option<Self::Future> {
        None
    }

    fn clone_request(&mut self, request: &Request<B>) -> Option<Request<B>> {
        Some(request.clone())
    }
}

type Retrying = Retry<Cloning, SetRequestHeader<Answers, HeaderValue>>;

#[library_benchmark]
#[bench::request(warm(Retry::new(Cloning, set_header(Answers))))]
fn retry_and_set_request_header(service: Retrying) -> Retrying {
    send_all(service)
}

fn failing_over(keys: usize) -> Failover<KeyRotation<Answers>> {
    let pool = pool(keys);
    warm(FailoverLayer::new(&pool).layer(KeyRotationLayer::new(&pool).layer(Answers)))
}

#[library_benchmark]
#[bench::keys_10(failing_over(10))]
fn failover_and_key_rotation(service: Failover<KeyRotation<Answers>>) -> Failover<KeyRotation<Answers>> {
    send_all(service)
}

type Body = Full<Bytes>;
type OverHttp = BoxService<Request<Body>, Response<Incoming>, hyper::Error>;

/// A connection in memory, over HTTP/1.1, and a client on it.
struct Wire {
    runtime: Runtime,
    client: OverHttp,
}

impl Wire {
    fn new<S>(layer: impl Layer<OverHttp, Service = S>) -> Self
    where
        S: Service<Request<Body>, Response = Response<Incoming>, Error: Debug> + Send + 'static,
        S::Future: Send,
    {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let client = runtime.block_on(async {
            let (here, there) = tokio::io::duplex(64 * 1024);
            let answer = hyper::service::service_fn(async |request: Request<Incoming>| {
                request.into_body().collect().await?;
                Ok::<_, hyper::Error>(Response::new(Body::from("{}")))
            });
            let server = hyper::server::conn::http1::Builder::new();
            tokio::spawn(server.serve_connection(TokioIo::new(there), answer));
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(here)).await.unwrap();
            tokio::spawn(connection);
            sender.ready().await.unwrap();
            BoxService::new(service_fn(move |request| sender.send_request(request)))
        });
        let client = layer.layer(client).map_err(|error| panic!("{error:?}"));
        let mut wire = Self { runtime, client: BoxService::new(client) };
        wire.send();
        wire
    }

    fn send(&mut self) {
        let (parts, body) = request().into_parts();
        let request = Request::from_parts(parts, Full::from(body));
        let answer = self.runtime.block_on(async {
            let response = self.client.ready().await.unwrap().call(request).await.unwrap();
            response.into_body().collect().await.unwrap().to_bytes()
        });
        assert_eq!(answer, "{}");
    }
}

#[library_benchmark]
#[bench::set_request_header(Wire::new(SetRequestHeaderLayer::overriding(HEADER, authorization())))]
#[bench::key_rotation(Wire::new(KeyRotationLayer::new(&pool(10))))]
fn over_http(mut wire: Wire) -> Wire {
    (0..REQUESTS).for_each(|_| wire.send());
    wire
}

library_benchmark_group!(
    name = request,
    benchmarks = [
        nothing,
        set_request_header,
        key_rotation,
        retry_and_set_request_header,
        failover_and_key_rotation,
        over_http
    ]
);

main!(library_benchmark_groups = request);
