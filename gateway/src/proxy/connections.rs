//! Several HTTP/2 connections to one upstream.
//!
//! hyper's client opens one HTTP/2 connection, and a request waits there while the connection has as many streams as
//! the upstream allows. So the gateway has several clients, and uses the first one that is not busy and whose upstream
//! allows requests.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll},
};

use axum::body::HttpBody;
use futures_util::{FutureExt, future::BoxFuture};
use http::{Request, Response};
use tower::{BoxError, Service};

use super::streams::Streams;
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
    streams: Streams,
    in_flight: Arc<AtomicUsize>,
}

/// Counts a request as in flight until it is dropped.
pub(crate) struct InFlight(Arc<AtomicUsize>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

impl<C> Connections<C> {
    /// `client` must return a client with connections of its own each time, which note what the upstream allows on them.
    pub(super) fn new(mut client: impl FnMut(Streams) -> C) -> Self {
        let connection = || {
            let streams = Streams::new();
            Connection { client: client(streams.clone()), streams, in_flight: Arc::default() }
        };
        Self(std::iter::repeat_with(connection).take(CLIENTS).collect())
    }

    fn begin(&self) -> (&Connection<C>, InFlight) {
        let load = |connection: &&Connection<C>| connection.in_flight.load(Relaxed);
        let open = self.0.iter().filter(|connection| !connection.streams.are_none());
        let idle = open.clone().find(|connection| load(connection) < BUSY);
        let least_busy = || open.min_by_key(load).or_else(|| self.0.iter().min_by_key(load));
        // There is always a least busy one.
        let connection = idle.or_else(least_busy).unwrap_or(&self.0[0]);
        connection.in_flight.fetch_add(1, Relaxed);
        (connection, InFlight(connection.in_flight.clone()))
    }
}

impl<C, Req, B> Service<Request<Req>> for Connections<C>
where
    C: Service<Request<Req>, Response = Response<B>, Error: Into<BoxError>, Future: Send + 'static> + Clone,
    B: HttpBody<Error: Into<BoxError>> + Unpin,
{
    type Response = Response<Held<Whole<B>, InFlight>>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    /// hyper's clients are always ready.
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Req>) -> Self::Future {
        let (connection, in_flight) = self.begin();
        let streams = connection.streams.clone();
        let response = connection.client.clone().call(request);
        async move {
            let response = streams.send(response).await?.map_err(Into::into)?;
            let version = response.version();
            Ok(response.map(|body| Held::new(Whole::new(body, version), in_flight)))
        }
        .boxed()
    }
}
