//! Several HTTP/2 connections to one upstream.
//!
//! hyper's client opens one HTTP/2 connection, and a request waits there while the connection has as many streams as
//! the upstream allows. So the gateway has several clients, and uses the first one that is not busy.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll},
};

use axum::body::HttpBody;
use futures_util::{FutureExt, TryFutureExt, future::BoxFuture};
use http::{Request, Response};
use tower::{BoxError, Service};

use crate::{held::Held, whole::Whole};

/// How many requests in flight make a client busy. Most servers allow at least 100 streams, as RFC 9113 section 6.5.2
/// recommends.
const BUSY: usize = 100;

/// How many clients there are. When all are busy, the least busy one is used.
const CLIENTS: usize = 32;

/// A client that opens a further HTTP/2 connection when the others are busy.
///
/// A request is in flight until its response body ends or is dropped. Over HTTP/1.1 each request in flight has a
/// connection of its own anyway; there, only idle connections are kept apart.
#[derive(Clone)]
pub(super) struct Connections<C>(Arc<[Connection<C>]>);

struct Connection<C> {
    client: C,
    in_flight: Arc<AtomicUsize>,
}

/// Counts a request as in flight until it is dropped.
pub(super) struct InFlight(Arc<AtomicUsize>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

impl<C> Connections<C> {
    /// `client` must return a client with connections of its own each time.
    pub(super) fn new(client: impl FnMut() -> C) -> Self {
        let clients = std::iter::repeat_with(client).take(CLIENTS);
        Self(clients.map(|client| Connection { client, in_flight: Arc::default() }).collect())
    }

    fn begin(&self) -> (&C, InFlight) {
        let load = |connection: &&Connection<C>| connection.in_flight.load(Relaxed);
        let idle = self.0.iter().find(|connection| load(connection) < BUSY);
        // There is always a least busy one.
        let connection = idle.or_else(|| self.0.iter().min_by_key(load)).unwrap_or(&self.0[0]);
        connection.in_flight.fetch_add(1, Relaxed);
        (&connection.client, InFlight(connection.in_flight.clone()))
    }
}

impl<C, Req, B> Service<Request<Req>> for Connections<C>
where
    C: Service<Request<Req>, Response = Response<B>, Future: Send + 'static> + Clone,
    B: HttpBody<Error: Into<BoxError>> + Unpin,
{
    type Response = Response<Held<Whole<B>, InFlight>>;
    type Error = C::Error;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    /// hyper's clients are always ready.
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Req>) -> Self::Future {
        let (client, in_flight) = self.begin();
        let response = client.clone().call(request);
        response
            .map_ok(|response| {
                let version = response.version();
                response.map(|body| Held::new(Whole::new(body, version), in_flight))
            })
            .boxed()
    }
}
