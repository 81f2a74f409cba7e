//! Instructions per request through the layer with failover, compared with tower's `Retry` around `SetRequestHeader`.
//!
//! ```text
//! cargo install gungraun-runner --version 0.20.0    # and valgrind
//! cargo bench --all-features --bench instructions_failover
//! ```

#![allow(missing_docs)] // The macros generate undocumented items.

mod support;

use gungraun::prelude::*;
use http::HeaderValue;
use support::{
    instructions::*,
    peers::{Cloning, set_header},
    *,
};
use tower::{Layer, retry::Retry};
use tower_http::set_header::SetRequestHeader;
use tower_key_rotation::{Failover, KeyRotation, KeyRotationLayer, classify::TooManyRequests};

type Retrying = Retry<Cloning, SetRequestHeader<Answers, HeaderValue>>;

#[library_benchmark]
#[bench::request(warm(Retry::new(Cloning, set_header(Answers))))]
fn retry_and_set_request_header(service: Retrying) -> Retrying {
    send_all(service)
}

type FailingOver = KeyRotation<Answers, TooManyRequests, Failover>;

fn failing_over(keys: usize) -> FailingOver {
    warm(KeyRotationLayer::new(&pool(keys)).failover(Failover::attempts(3)).layer(Answers))
}

#[library_benchmark]
#[bench::keys_10(failing_over(10))]
fn failover_and_key_rotation(service: FailingOver) -> FailingOver {
    send_all(service)
}

library_benchmark_group!(
    name = request,
    benchmarks = [retry_and_set_request_header, failover_and_key_rotation]
);

main!(library_benchmark_groups = request);
