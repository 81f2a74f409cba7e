//! This crate without pacing.

use std::time::Duration;

use tower::Layer;
use tower_key_rotation::{Failover, KeyPool, KeyPoolBuilder, KeyRotationLayer};

use super::{Client, boxed};
use crate::{run::PATIENCE, upstream::Upstream};

fn builder(upstream: &Upstream) -> KeyPoolBuilder {
    KeyPool::builder().keys((0..).map(|key| format!("key-{key}")).zip(upstream.secrets()))
}

/// By default, with failover.
pub(super) fn today(upstream: &Upstream) -> Client {
    let pool = builder(upstream).build().unwrap();
    boxed(KeyRotationLayer::new(&pool).failover(Failover::attempts(3)).layer(upstream.service()))
}

/// With failover; a key rests for as long as the service asks, and requests wait for a key.
pub(super) fn exact(upstream: &Upstream) -> Client {
    let builder = builder(upstream).exact_hints();
    let pool = builder.hint_limits(Duration::from_millis(10), Duration::from_secs(3600)).build().unwrap();
    let layer = KeyRotationLayer::new(&pool).failover(Failover::attempts(3)).wait_up_to(PATIENCE);
    boxed(layer.layer(upstream.service()))
}
