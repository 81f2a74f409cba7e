//! What the counts of instructions share.

use std::fmt::Debug;

use http::{HeaderValue, Request};
use tower::{Layer, Service};
use tower_http::set_header::{SetRequestHeader, SetRequestHeaderLayer};

use super::{HEADER, authorization, request, send};

pub const REQUESTS: usize = 100;

pub fn set_header<S>(inner: S) -> SetRequestHeader<S, HeaderValue> {
    SetRequestHeaderLayer::overriding(HEADER, authorization()).layer(inner)
}

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
