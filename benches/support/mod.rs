//! What the benchmarks share: requests as programs send them, a service that answers at once, and pools.

#![allow(dead_code, unreachable_pub)] // Each benchmark uses a part of it.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    hint::black_box,
    sync::LazyLock,
    task::{Context, Poll},
};

use futures_util::FutureExt;
use http::{
    HeaderValue, Method, Request, Response, Uri,
    header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, USER_AGENT},
};
use tower::Service;
use tower_key_rotation::KeyPool;

/// What a provider's secret looks like.
pub const SECRET: &str = "sk-proj-0123456789abcdefghijklmnopqrstuvwxyz01234567";

static TARGET: LazyLock<Uri> =
    LazyLock::new(|| Uri::from_static("https://api.example.com/v1/chat/completions"));

/// A new request with three headers and a body, of parts that need no parsing.
pub fn request() -> Request<&'static str> {
    let mut request = Request::new(r#"{"model":"m","messages":[]}"#);
    *request.method_mut() = Method::POST;
    *request.uri_mut() = TARGET.clone();
    let headers = request.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(ACCEPT, HeaderValue::from_static("application/json"));
    headers.insert(USER_AGENT, HeaderValue::from_static("benchmark"));
    request
}

pub fn authorization() -> HeaderValue {
    let mut value = HeaderValue::from_str(&format!("Bearer {SECRET}")).unwrap();
    value.set_sensitive(true);
    // Its first clone allocates.
    drop(value.clone());
    value
}

/// The header that a program without rotation sets.
pub const HEADER: http::HeaderName = AUTHORIZATION;

#[derive(Clone, Debug)]
pub struct Answers;

impl<B> Service<Request<B>> for Answers {
    type Response = Response<()>;
    type Error = Infallible;
    type Future = Ready<Result<Response<()>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        black_box(&request);
        ready(Ok(Response::new(())))
    }
}

pub fn pool(keys: usize) -> KeyPool {
    let keys = (0..keys).map(|number| (format!("key-{number}"), format!("{SECRET}{number}")));
    KeyPool::builder().keys(keys).build().unwrap()
}

/// Sends one request and drops its answer.
pub fn send<S>(service: &mut S, request: Request<&'static str>)
where
    S: Service<Request<&'static str>>,
    S::Error: std::fmt::Debug,
{
    let answer = service.call(request).now_or_never();
    let _ = black_box(answer.expect("an answer at once"));
}
