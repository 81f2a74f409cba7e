//! Instructions of a whole HTTP/1.1 request, client and server included, over an in-memory connection.
//!
//! ```text
//! cargo install gungraun-runner --version 0.20.0    # and valgrind
//! cargo bench --all-features --bench instructions_http
//! ```

#![allow(missing_docs)] // The macros generate undocumented items.

mod support;

use std::{
    convert::Infallible,
    fmt::Debug,
    future::{Ready, ready},
    io,
    pin::Pin,
    task::{Context, Poll},
};

use gungraun::prelude::*;
use http::{HeaderValue, Request, Response, Uri};
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper_util::{
    client::legacy::{
        Client,
        connect::{self, Connection},
    },
    rt::{TokioExecutor, TokioIo},
};
use support::{instructions::REQUESTS, peers::Cloning, *};
use tokio::{io::DuplexStream, runtime::Runtime};
use tower::{
    Layer, Service, ServiceExt,
    layer::util::Stack,
    retry::{Retry, RetryLayer},
};
use tower_http::set_header::{SetRequestHeader, SetRequestHeaderLayer};
use tower_key_rotation::{Failover, KeyRotation, KeyRotationLayer, classify::TooManyRequests};

type Body = Full<Bytes>;
type OverHttp = Client<InMemory, Body>;

/// Connects to a server in this process.
#[derive(Clone)]
struct InMemory;

impl Service<Uri> for InMemory {
    type Response = Connected;
    type Error = Infallible;
    type Future = Ready<Result<Connected, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let (here, there) = tokio::io::duplex(64 * 1024);
        let answer = hyper::service::service_fn(async |request: Request<Incoming>| {
            request.into_body().collect().await?;
            Ok::<_, hyper::Error>(Response::new(Body::from("{}")))
        });
        tokio::spawn(
            hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(there), answer),
        );
        ready(Ok(Connected(TokioIo::new(here))))
    }
}

struct Connected(TokioIo<DuplexStream>);

impl Connection for Connected {
    fn connected(&self) -> connect::Connected {
        connect::Connected::new()
    }
}

impl hyper::rt::Read for Connected {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: hyper::rt::ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl hyper::rt::Write for Connected {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// A client and the runtime that drives both client and server.
struct Wire<S> {
    runtime: Runtime,
    client: S,
}

impl<S, B> Wire<S>
where
    S: Service<Request<Body>, Response = Response<B>, Error: Debug>,
    B: http_body::Body<Data = Bytes, Error: Debug>,
{
    fn new(layer: impl Layer<OverHttp, Service = S>) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let client = layer.layer(Client::builder(TokioExecutor::new()).build(InMemory));
        let mut wire = Self { runtime, client };
        wire.send();
        wire
    }

    fn send(&mut self) {
        let request = request().map(|body| Full::from(body.0));
        let answer = self.runtime.block_on(async {
            let response = self.client.ready().await.unwrap().call(request).await.unwrap();
            response.into_body().collect().await.unwrap().to_bytes()
        });
        assert_eq!(answer, "{}");
    }

    fn send_all(mut self) -> Self {
        (0..REQUESTS).for_each(|_| self.send());
        self
    }
}

#[library_benchmark]
#[bench::over_http(Wire::new(SetRequestHeaderLayer::overriding(HEADER, authorization())))]
fn set_request_header(
    wire: Wire<SetRequestHeader<OverHttp, HeaderValue>>,
) -> Wire<SetRequestHeader<OverHttp, HeaderValue>> {
    wire.send_all()
}

#[library_benchmark]
#[bench::over_http(Wire::new(KeyRotationLayer::new(&pool(10))))]
fn key_rotation(wire: Wire<KeyRotation<OverHttp>>) -> Wire<KeyRotation<OverHttp>> {
    wire.send_all()
}

type Retrying = Retry<Cloning, SetRequestHeader<OverHttp, HeaderValue>>;

#[library_benchmark]
#[bench::over_http(Wire::new(Stack::new(
    SetRequestHeaderLayer::overriding(HEADER, authorization()),
    RetryLayer::new(Cloning),
)))]
fn retry_and_set_request_header(wire: Wire<Retrying>) -> Wire<Retrying> {
    wire.send_all()
}

type FailingOver = KeyRotation<OverHttp, TooManyRequests, Failover>;

fn failing_over(keys: usize) -> Wire<FailingOver> {
    Wire::new(KeyRotationLayer::new(&pool(keys)).failover(Failover::attempts(3)))
}

#[library_benchmark]
#[bench::over_http(failing_over(10))]
fn failover_and_key_rotation(wire: Wire<FailingOver>) -> Wire<FailingOver> {
    wire.send_all()
}

library_benchmark_group!(
    name = request,
    benchmarks = [set_request_header, key_rotation, retry_and_set_request_header, failover_and_key_rotation]
);

main!(library_benchmark_groups = request);
