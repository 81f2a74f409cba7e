//! Instructions per request through the layer, compared with no middleware and with `SetRequestHeader`.
//!
//! ```text
//! cargo install gungraun-runner --version 0.20.0    # and valgrind
//! cargo bench --all-features --bench instructions
//! ```

#![allow(missing_docs)] // The macros generate undocumented items.

mod support;

use gungraun::prelude::*;
use http::HeaderValue;
use support::{instructions::*, peers::set_header, *};
use tower_http::set_header::SetRequestHeader;
use tower_key_rotation::KeyRotation;

fn all_healthy(keys: usize) -> KeyRotation<Answers> {
    warm(rotation(Answers, keys, |_| false))
}

fn half_resting(keys: usize) -> KeyRotation<Answers> {
    warm(rotation(Answers, keys, |number| number % 2 == 0))
}

#[library_benchmark]
#[bench::request(warm(Answers))]
fn nothing(service: Answers) -> Answers {
    send_all(service)
}

#[library_benchmark]
#[bench::request(warm(set_header(Answers)))]
fn set_request_header(
    service: SetRequestHeader<Answers, HeaderValue>,
) -> SetRequestHeader<Answers, HeaderValue> {
    send_all(service)
}

#[library_benchmark]
#[bench::key_1(all_healthy(1))]
#[bench::keys_10_000(all_healthy(10_000))]
#[bench::keys_100_half_resting(half_resting(100))]
fn key_rotation(service: KeyRotation<Answers>) -> KeyRotation<Answers> {
    send_all(service)
}

library_benchmark_group!(name = request, benchmarks = [nothing, set_request_header, key_rotation]);

main!(library_benchmark_groups = request);
