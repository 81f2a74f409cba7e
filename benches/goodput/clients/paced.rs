//! This crate with pacing.

use std::{
    error::Error,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use http_body_util::Full;
use tower::{BoxError, Layer, Service, ServiceExt};
use tower_key_rotation::{
    Failover, KeyId, KeyPool, KeyPoolBuilder, KeyRotationLayer, KeySpec, Quota, Traits,
    clock::{Clock, Sleep, SystemClock},
};

use super::{Client, boxed};
use crate::{
    arrivals::Job,
    service::{PER_DAY, ServiceKind, ZONE},
    upstream::Upstream,
};

/// The wall clock of the simulated service, beside the clock of the runtime.
#[derive(Debug)]
struct SimulatedClock {
    clock: SystemClock,
    epoch: SystemTime,
}

impl Clock for SimulatedClock {
    fn now(&self) -> Duration {
        self.clock.now()
    }

    fn sleep_until(&self, deadline: Duration) -> Sleep {
        self.clock.sleep_until(deadline)
    }

    fn wall(&self) -> SystemTime {
        self.epoch + self.now()
    }
}

/// Returns a builder with the service's keys.
pub(crate) fn builder(upstream: &Upstream) -> KeyPoolBuilder {
    let limits = upstream.limits();
    let (kind, members) = (limits.kind(), limits.members());
    let specs = upstream.secrets().enumerate().map(|(key, secret)| {
        let mut spec = KeySpec::new(KeyId::new(format!("key-{key}")).unwrap(), secret);
        spec.group = (members > 1).then(|| format!("g{}", key / members));
        spec
    });
    let clock = SimulatedClock { clock: SystemClock::new(), epoch: kind.epoch() };
    let mut builder = specs.fold(KeyPool::builder().paced().clock(clock), KeyPoolBuilder::key_spec);
    if kind == ServiceKind::Daily {
        builder = builder.quota(Quota::per_day(PER_DAY).resets_at("00:00", ZONE));
    }
    builder
}

/// Creates a client over `service`. A request waits for `patience` at most.
pub(crate) fn over<S, B>(service: S, upstream: &Upstream, patience: Duration) -> Client
where
    S: Service<Request<Full<Bytes>>, Response = Response<B>> + Clone + Send + Sync + 'static,
    S::Error: Error + Send + Sync + 'static,
    S::Future: Send + 'static,
    B: Body<Data = Bytes, Error: Into<BoxError> + Send> + Send + 'static,
{
    of_pool(&builder(upstream).build().unwrap(), service, patience)
}

/// Creates a client with the keys of that pool.
pub(crate) fn of_pool<S, B>(pool: &KeyPool, service: S, patience: Duration) -> Client
where
    S: Service<Request<Full<Bytes>>, Response = Response<B>> + Clone + Send + Sync + 'static,
    S::Error: Error + Send + Sync + 'static,
    S::Future: Send + 'static,
    B: Body<Data = Bytes, Error: Into<BoxError> + Send> + Send + 'static,
{
    let mut layer = KeyRotationLayer::new(pool).failover(Failover::attempts(10));
    if !patience.is_zero() {
        layer = layer.wait_up_to(patience);
    }
    boxed(layer.layer(service).map_request(|mut request: Request<_>| {
        let job = *request.extensions().get::<Job>().expect("a job in each request");
        let traits = Traits::new().scope(format!("model-{}", job.model)).tokens(job.estimate as u64);
        request.extensions_mut().insert(traits);
        request
    }))
}
