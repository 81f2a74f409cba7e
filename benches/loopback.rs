//! Cost of the layer for a request over a socket to a server on the same machine, the cheapest request over a network.
//!
//! ```text
//! cargo bench --all-features --bench loopback
//! ```

mod support;

use std::{sync::LazyLock, thread};

use axum::{Router, routing::post};
use http::{HeaderValue, Request, header::CONTENT_TYPE};
use http_body_util::{BodyExt, Full};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use support::{
    HEADER, authorization,
    compare::Comparison,
    peers::{Cloning, set_header},
    pool,
};
use tokio::{net::TcpListener, runtime::Runtime};
use tower::{Layer, Service, ServiceExt, retry::Retry};
use tower_key_rotation::{Failover, KeyRotationLayer};

type Body = Full<bytes::Bytes>;

const BODY: &str = r#"{"model":"m","messages":[]}"#;
const KEYS: usize = 100;

const BARE: &str = "header set by the caller";
const SET_HEADER: &str = "`SetRequestHeader`";
const LAYER: &str = "`KeyRotationLayer`";
const FAILOVER: &str = "`KeyRotationLayer` with failover";
const RETRY: &str = "tower's `Retry`, cloning, and `SetRequestHeader`";

static PREPARED: LazyLock<HeaderValue> = LazyLock::new(authorization);

/// The URL of a server in this process, which runs on its own thread.
static URL: LazyLock<String> = LazyLock::new(|| {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
    listener.set_nonblocking(true).unwrap();
    let url = format!("http://{}/v1/chat/completions", listener.local_addr().unwrap());
    thread::spawn(move || {
        let runtime = current_thread();
        runtime.block_on(async move {
            let app = Router::new().fallback(post(async || "{}"));
            axum::serve(TcpListener::from_std(listener).unwrap(), app).await.unwrap();
        });
    });
    url
});

fn current_thread() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

fn http_request() -> Request<Body> {
    let request = Request::post(URL.as_str()).header(CONTENT_TYPE, "application/json");
    request.body(Full::from(BODY)).unwrap()
}

/// Returns a closure that sends a request with `hyper-util` and reads the response.
fn hyper<S>(
    layer: impl FnOnce(Client<HttpConnector, Body>) -> S,
    prepare: fn(&mut Request<Body>),
) -> impl FnMut()
where
    S: Service<Request<Body>, Response: IntoAnswer, Error: std::fmt::Debug> + Clone,
{
    let runtime = current_thread();
    let client = layer(Client::builder(TokioExecutor::new()).build_http());
    move || {
        runtime.block_on(async {
            let mut request = http_request();
            prepare(&mut request);
            let response = client.clone().oneshot(request).await.unwrap();
            assert_eq!(response.answer().await, "{}");
        });
    }
}

trait IntoAnswer {
    async fn answer(self) -> bytes::Bytes;
}

impl<B: http_body::Body<Error: std::fmt::Debug>> IntoAnswer for http::Response<B> {
    async fn answer(self) -> bytes::Bytes {
        self.into_body().collect().await.unwrap().to_bytes()
    }
}

impl IntoAnswer for reqwest::Response {
    async fn answer(self) -> bytes::Bytes {
        self.bytes().await.unwrap()
    }
}

/// Returns a closure that sends a request with `reqwest` and reads the response.
fn reqwest<S>(layer: impl FnOnce(reqwest::Client) -> S, prepare: fn(&mut reqwest::Request)) -> impl FnMut()
where
    S: Service<reqwest::Request, Response: IntoAnswer, Error: std::fmt::Debug> + Clone,
{
    let runtime = current_thread();
    let plain = reqwest::Client::new();
    let client = layer(plain.clone());
    move || {
        runtime.block_on(async {
            let request = plain.post(URL.as_str()).header(CONTENT_TYPE, "application/json").body(BODY);
            let mut request = request.build().unwrap();
            prepare(&mut request);
            let response = client.clone().oneshot(request).await.unwrap();
            assert_eq!(response.answer().await, "{}");
        });
    }
}

fn main() {
    let comparison = Comparison::new("over loopback, with hyper-util")
        .case(BARE, || {
            hyper(|client| client, |request| _ = request.headers_mut().insert(HEADER, PREPARED.clone()))
        })
        .case(SET_HEADER, || hyper(set_header, |_| {}))
        .case(LAYER, || hyper(|client| KeyRotationLayer::new(&pool(KEYS)).layer(client), |_| {}))
        .case(FAILOVER, || {
            let layer = KeyRotationLayer::new(&pool(KEYS)).failover(Failover::attempts(3));
            hyper(move |client| layer.layer(client), |_| {})
        })
        .case(RETRY, || hyper(|client| Retry::new(Cloning, set_header(client)), |_| {}));
    if let Some(outcome) = comparison.run() {
        outcome.print(LAYER);
    }

    let comparison = Comparison::new("over loopback, with reqwest")
        .case(BARE, || {
            reqwest(|client| client, |request| _ = request.headers_mut().insert(HEADER, PREPARED.clone()))
        })
        .case(LAYER, || reqwest(|client| KeyRotationLayer::new(&pool(KEYS)).layer(client), |_| {}))
        .case(FAILOVER, || {
            let layer = KeyRotationLayer::new(&pool(KEYS)).failover(Failover::attempts(3));
            reqwest(move |client| layer.layer(client), |_| {})
        });
    if let Some(outcome) = comparison.run() {
        outcome.print(LAYER);
    }
}
