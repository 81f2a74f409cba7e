//! How many instructions the layer adds to a whole HTTP/1.1 request, of client and server, over a connection in
//! memory.
//!
//! ```text
//! cargo install gungraun-runner --version 0.20.0    # and valgrind
//! cargo bench --bench instructions_http
//! ```

#![allow(missing_docs)] // Of what the macros make.

mod support;

use std::fmt::Debug;

use gungraun::prelude::*;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper_util::rt::TokioIo;
use support::{instructions::REQUESTS, *};
use tokio::runtime::Runtime;
use tower::{Layer, Service, ServiceExt, service_fn, util::BoxService};
use tower_http::set_header::SetRequestHeaderLayer;
use tower_key_rotation::KeyRotationLayer;

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

library_benchmark_group!(name = request, benchmarks = over_http);

main!(library_benchmark_groups = request);
