//! What the counts of instructions share.

use std::fmt::Debug;

use http::Request;
use tower::Service;

use super::{request, send};

pub const REQUESTS: usize = 100;

/// What only the first request pays for is no part of the others.
pub fn warm<S: Service<Request<&'static str>, Error: Debug>>(mut service: S) -> S {
    send(&mut service, request());
    service
}

pub fn send_all<S: Service<Request<&'static str>, Error: Debug>>(mut service: S) -> S {
    for _ in 0..REQUESTS {
        send(&mut service, request());
    }
    service
}
