//! How many instructions a request takes through the layer, and through what it stands beside.
//!
//! ```text
//! cargo install gungraun-runner --version 0.20.0    # and valgrind
//! cargo bench --bench instructions --features full
//! ```

mod support;

use std::fmt::Debug;

use gungraun::prelude::*;
use http::{HeaderValue, Request};
use support::*;
use tower::{Layer, Service};
use tower_http::set_header::{SetRequestHeader, SetRequestHeaderLayer};
use tower_key_rotation::{KeyRotation, KeyRotationLayer};

const REQUESTS: usize = 100;

fn set_header() -> SetRequestHeader<Answers, HeaderValue> {
    SetRequestHeaderLayer::overriding(HEADER, authorization()).layer(Answers)
}

/// What only the first request pays for is no part of the others.
fn rotation(keys: usize) -> KeyRotation<Answers> {
    let mut service = KeyRotationLayer::new(&pool(keys)).layer(Answers);
    send(&mut service, request());
    service
}

fn send_all<S: Service<Request<&'static str>, Error: Debug>>(mut service: S) -> S {
    for _ in 0..REQUESTS {
        send(&mut service, request());
    }
    service
}

#[library_benchmark]
fn nothing() -> Answers {
    send_all(Answers)
}

#[library_benchmark]
#[bench::one(set_header())]
fn set_request_header(
    service: SetRequestHeader<Answers, HeaderValue>,
) -> SetRequestHeader<Answers, HeaderValue> {
    send_all(service)
}

#[library_benchmark]
#[bench::key_1(rotation(1))]
#[bench::keys_10_000(rotation(10_000))]
fn key_rotation(service: KeyRotation<Answers>) -> KeyRotation<Answers> {
    send_all(service)
}

library_benchmark_group!(name = request, benchmarks = [nothing, set_request_header, key_rotation]);

main!(library_benchmark_groups = request);
