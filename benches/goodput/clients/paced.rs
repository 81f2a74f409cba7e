//! This crate with pacing.

use tower::{Layer, ServiceExt};
use tower_key_rotation::{Failover, KeyId, KeyPool, KeyPoolBuilder, KeyRotationLayer, KeySpec, Traits};

use super::{Client, boxed};
use crate::{arrivals::Job, run::PATIENCE, upstream::Upstream};

pub(super) fn client(upstream: &Upstream) -> Client {
    let members = upstream.limits().members();
    let specs = upstream.secrets().enumerate().map(|(key, secret)| {
        let mut spec = KeySpec::new(KeyId::new(format!("key-{key}")).unwrap(), secret);
        spec.group = (members > 1).then(|| format!("g{}", key / members));
        spec
    });
    let pool = specs.fold(KeyPool::builder().paced(), KeyPoolBuilder::key_spec).build().unwrap();
    let layer = KeyRotationLayer::new(&pool).failover(Failover::attempts(10)).wait_up_to(PATIENCE);
    boxed(layer.layer(upstream.service()).map_request(|mut request: http::Request<_>| {
        let job = *request.extensions().get::<Job>().expect("a job in each request");
        let traits = Traits::new().scope(format!("model-{}", job.model)).tokens(job.estimate as u64);
        request.extensions_mut().insert(traits);
        request
    }))
}
