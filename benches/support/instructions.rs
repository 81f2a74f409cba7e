//! Shared code of the benchmarks that count instructions.

use std::fmt::Debug;

use http::Request;
use tower::Service;

use super::{Text, request, send};

pub const REQUESTS: usize = 100;

/// Sends one request, so that one-time costs are not counted.
pub fn warm<S: Service<Request<Text>, Error: Debug>>(mut service: S) -> S {
    send(&mut service, request());
    service
}

pub fn send_all<S: Service<Request<Text>, Error: Debug>>(mut service: S) -> S {
    for _ in 0..REQUESTS {
        send(&mut service, request());
    }
    service
}
