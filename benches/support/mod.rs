//! Shared code of the benchmarks: typical requests, services that answer at once, and pools.

#![allow(dead_code, unreachable_pub)] // Each benchmark uses only some of these items.

pub mod compare;
pub mod instructions;
pub mod peers;
pub mod plot;
pub mod times;

use std::{
    cell::Cell,
    convert::Infallible,
    fmt::Debug,
    future::{Future, Ready, ready},
    hint::black_box,
    pin::{Pin, pin},
    sync::LazyLock,
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use http::{
    HeaderValue, Method, Request, Response, StatusCode, Uri,
    header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, USER_AGENT},
};
use http_body::{Frame, SizeHint};
use http_body_util::Empty;
use tower::{Layer, Service};
use tower_key_rotation::{KeyPool, KeyRotation, KeyRotationLayer};

/// A secret of the usual length and form.
pub const SECRET: &str = "sk-proj-0123456789abcdefghijklmnopqrstuvwxyz01234567";

static TARGET: LazyLock<Uri> =
    LazyLock::new(|| Uri::from_static("https://api.example.com/v1/chat/completions"));

/// A body that costs nothing to make, to clone and to drop.
#[derive(Clone, Debug)]
pub struct Text(pub &'static str);

impl http_body::Body for Text {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let text = std::mem::take(&mut self.0);
        Poll::Ready((!text.is_empty()).then(|| Ok(Frame::data(Bytes::from_static(text.as_bytes())))))
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.0.len() as u64)
    }
}

/// Creates a request with three headers and a body, from parts that need no parsing.
pub fn request() -> Request<Text> {
    let mut request = Request::new(Text(r#"{"model":"m","messages":[]}"#));
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
    // The first clone allocates, which must not be timed.
    drop(value.clone());
    value
}

/// The header that a program without this crate sets.
pub const HEADER: http::HeaderName = AUTHORIZATION;

/// A service that answers each request at once.
#[derive(Clone, Debug)]
pub struct Answers;

impl<B> Service<Request<B>> for Answers {
    type Response = Response<Empty<Bytes>>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        black_box(&request);
        ready(Ok(Response::new(Empty::new())))
    }
}

thread_local! {
    /// The last request that this thread sent.
    static BACK: Cell<Option<Request<StatusCode>>> = const { Cell::new(None) };
}

/// A service that answers with the status in the request's body, and puts the request into [`BACK`].
///
/// The caller sends the same request again, so that little but the layer is timed. The response does not carry the
/// request: such a response is three times as large, and the number of its moves differs between builds.
#[derive(Clone, Debug)]
pub struct GivesBack;

impl Service<Request<StatusCode>> for GivesBack {
    type Response = Response<()>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<StatusCode>) -> Self::Future {
        let mut response = Response::new(());
        *response.status_mut() = *request.body();
        BACK.set(Some(request));
        ready(Ok(response))
    }
}

/// A request that is sent repeatedly.
pub struct Turns(Option<Request<StatusCode>>);

impl Turns {
    pub fn new() -> Self {
        let mut request = Request::new(StatusCode::OK);
        *request.uri_mut() = TARGET.clone();
        Self(Some(request))
    }

    /// Sends the request once; [`GivesBack`] answers with `status`.
    pub fn take<S>(&mut self, service: &mut S, status: StatusCode)
    where
        S: Service<Request<StatusCode>, Error: Debug>,
    {
        let mut request = self.0.take().expect("the last request came back");
        *request.body_mut() = status;
        let _ = black_box(answer(service, request).expect("an answer"));
        self.0 = BACK.take();
    }
}

pub fn keys(keys: usize) -> impl Iterator<Item = (String, String)> {
    (0..keys).map(|number| (format!("key-{number}"), format!("{SECRET}{number}")))
}

pub fn pool(number_of_keys: usize) -> KeyPool {
    KeyPool::builder().keys(keys(number_of_keys)).build().unwrap()
}

/// Creates a client with this many keys; the keys rest for which `rests` returns `true`.
pub fn rotation<S>(inner: S, keys: usize, rests: impl Fn(usize) -> bool) -> KeyRotation<S> {
    let pool = pool(keys);
    let (mut client, mut turns) = (KeyRotationLayer::new(&pool).layer(GivesBack), Turns::new());
    for number in 0..keys {
        let status = if rests(number) { StatusCode::TOO_MANY_REQUESTS } else { StatusCode::OK };
        turns.take(&mut client, status);
    }
    assert_eq!(pool.stats().rate_limited, (0..keys).filter(|number| rests(*number)).count());
    KeyRotationLayer::new(&pool).layer(inner)
}

fn answer<B, S: Service<Request<B>>>(service: &mut S, request: Request<B>) -> Result<S::Response, S::Error> {
    let mut context = Context::from_waker(Waker::noop());
    assert!(matches!(service.poll_ready(&mut context), Poll::Ready(Ok(()))));
    match pin!(service.call(request)).poll(&mut context) {
        Poll::Ready(answer) => answer,
        Poll::Pending => panic!("the service did not answer at once"),
    }
}

/// Sends one request and drops the response.
pub fn send<S: Service<Request<Text>, Error: Debug>>(service: &mut S, request: Request<Text>) {
    let _ = black_box(answer(service, request));
}
