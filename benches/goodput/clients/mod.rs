//! The clients: this crate, and the algorithms of others.
//!
//! A client belongs to one process. It knows the number of processes, and nothing else of the others.

mod cubic;
mod governor;
mod layer;
mod least_used;
pub(crate) mod paced;

use std::time::Duration;

use bytes::Bytes;
use clap::ValueEnum;
use http::{Request, Response};
use http_body::Body;
use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use tower::{BoxError, Service, ServiceExt, service_fn, util::BoxCloneService};

use crate::{
    arrivals::Job,
    run::PATIENCE,
    upstream::{self, Upstream},
};

pub(crate) type Client =
    BoxCloneService<Request<Full<Bytes>>, Response<UnsyncBoxBody<Bytes, BoxError>>, BoxError>;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub(crate) enum ClientKind {
    /// This crate, with pacing.
    Paced,
    /// This crate, with pacing. A request fails if no key has room when it arrives.
    PacedAtOnce,
    /// This crate without pacing: failover only.
    Today,
    /// This crate without pacing: failover, exact hints, and waiting.
    Exact,
    /// `governor`, with the limits known.
    Governor,
    /// Routing by usage as in LiteLLM, with the limits known.
    LeastUsed,
    /// The adaptive rate limiter of the AWS SDKs: CUBIC on 429s.
    Cubic,
}

impl ClientKind {
    /// Returns how long a request may wait. The oracle of a client has the same patience.
    pub(crate) fn patience(self) -> Duration {
        if self == Self::PacedAtOnce { Duration::ZERO } else { PATIENCE }
    }

    /// Starts the client of one of `processes` processes.
    pub(crate) fn start(self, upstream: &Upstream, processes: usize) -> Client {
        match self {
            Self::Paced | Self::PacedAtOnce => paced::over(upstream.service(), upstream, self.patience()),
            Self::Today => layer::today(upstream),
            Self::Exact => layer::exact(upstream),
            Self::Governor => governor::client(upstream, processes),
            Self::LeastUsed => least_used::client(upstream, processes),
            Self::Cubic => cubic::client(upstream),
        }
    }
}

fn boxed<S, B>(service: S) -> Client
where
    S: Service<Request<Full<Bytes>>, Response = Response<B>> + Clone + Send + 'static,
    S::Error: Into<BoxError>,
    S::Future: Send + 'static,
    B: Body<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
{
    let boxed = |response: Response<B>| response.map(|body| body.map_err(Into::into).boxed_unsync());
    BoxCloneService::new(service.map_response(boxed).map_err(Into::into))
}

/// Creates a client that does not need HTTP requests. It returns `None` when it gives up.
fn peer<F, A>(send: F) -> Client
where
    F: Fn(Job) -> A + Clone + Send + 'static,
    A: Future<Output = Option<Response<upstream::Body>>> + Send + 'static,
{
    boxed(service_fn(move |request: Request<Full<Bytes>>| {
        let answer = send(*request.extensions().get::<Job>().expect("a job in each request"));
        async { answer.await.ok_or("the client gave up") }
    }))
}
