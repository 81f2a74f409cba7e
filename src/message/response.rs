//! Responses that a classifier can judge.

use std::{borrow::Cow, sync::Arc};

use bytes::Bytes;
use http::{
    Extensions, HeaderMap, HeaderValue, Response, StatusCode,
    header::{CONTENT_LOCATION, Entry, HeaderName, LINK, LOCATION},
};
use http_body::Body;

use super::{end_of_body::EndOfBody, replay::Replay, watch::Watch};
use crate::{
    clock::Sleep,
    key::query::{self, Parameter},
};

/// A response that can be judged: `http::Response<B>` of any `B` or, with the feature `reqwest`,
/// `reqwest::Response`.
#[diagnostic::on_unimplemented(
    message = "a `{Self}` is not a response that a key can be judged by",
    label = "the client inside `KeyRotationLayer` returns this",
    note = "the client inside has to return `http::Response<B>` of `http` 1 or, with the feature `reqwest`, `reqwest::Response` of `reqwest` 0.13",
    note = "a layer that turns responses into something else goes outside `KeyRotationLayer`: above it in a `ServiceBuilder`"
)]
pub trait ResponseMessage: JudgedResponse {}

/// What the layer does with a response.
pub trait JudgedResponse: Sized {
    fn status(&self) -> StatusCode;
    fn headers(&self) -> &HeaderMap;
    fn extensions(&self) -> &Extensions;
    fn extensions_mut(&mut self) -> &mut Extensions;
    /// Takes a key out of the headers, and of the URL of a response that has one.
    fn forget_query(&mut self, parameters: &[Parameter]);
    /// Has the body say when it ends, if the layer can see the body.
    fn tell_end(&mut self, end: Arc<dyn EndOfBody>) {
        drop(end);
    }
}

/// A response whose body can be read in part and still be passed on whole. Failover needs it, and so does
/// `read_error_bodies`.
///
/// An `http::Response<B>` comes out as `http::Response<Replay<B>>`, a `reqwest::Response` as it is.
#[diagnostic::on_unimplemented(
    message = "the body of a `{Self}` can't be read ahead, as `failover` and `read_error_bodies` do",
    label = "the client inside `KeyRotationLayer` returns this",
    note = "the body of an `http::Response<B>` has to be an `http_body::Body`, and `Send` with its data and errors",
    note = "without `failover` and `read_error_bodies`, any body does"
)]
pub trait ReadableResponse: ResponseMessage {
    #[doc(hidden)]
    type Replayed: ResponseMessage;

    #[doc(hidden)]
    fn untouched(self) -> Self::Replayed;

    /// Reads a body, which may have been begun, until its end or one of the limits.
    #[doc(hidden)]
    fn read(
        response: Self::Replayed,
        most: usize,
        time_over: Sleep,
    ) -> impl Future<Output = (Self::Replayed, Bytes)> + Send;

    /// Reads a body until `watch` has seen enough of it, until its end, or until the time is over. `watch` sees the rest as
    /// it passes, and `end` is told that the caller has read all.
    #[doc(hidden)]
    fn hold(
        response: Self::Replayed,
        watch: Arc<dyn Watch>,
        end: Option<Arc<dyn EndOfBody>>,
        time_over: Sleep,
    ) -> impl Future<Output = Self::Replayed> + Send;

    /// Has the body say when it ends.
    #[doc(hidden)]
    fn tell_end_of(response: &mut Self::Replayed, end: Arc<dyn EndOfBody>);
}

impl<B> ResponseMessage for Response<B> {}

impl<B> JudgedResponse for Response<B> {
    #[inline]
    fn status(&self) -> StatusCode {
        self.status()
    }

    #[inline]
    fn headers(&self) -> &HeaderMap {
        self.headers()
    }

    #[inline]
    fn extensions(&self) -> &Extensions {
        self.extensions()
    }

    #[inline]
    fn extensions_mut(&mut self) -> &mut Extensions {
        self.extensions_mut()
    }

    fn forget_query(&mut self, parameters: &[Parameter]) {
        forget_in_headers(self.headers_mut(), parameters);
    }
}

/// Servers repeat the query in redirects and in links to the next page, and a client that follows them takes it to
/// another host.
fn forget_in_headers(headers: &mut HeaderMap, parameters: &[Parameter]) {
    let holds_one = |value: &HeaderValue| query::holds_one(parameters, &text_of(value));
    let holding: Vec<_> =
        headers.iter().filter(|(_, value)| holds_one(value)).map(|(name, _)| name.clone()).collect();
    for name in holding {
        let Entry::Occupied(values) = headers.entry(&name) else { continue };
        let values: Vec<_> = values.remove_entry_mult().1.collect();
        for value in values.iter().filter_map(|value| value_without(&name, value, parameters)) {
            headers.append(&name, value);
        }
    }
}

/// `None` where nothing is left: an empty URL would lead to the request's own.
fn value_without(name: &HeaderName, value: &HeaderValue, parameters: &[Parameter]) -> Option<HeaderValue> {
    let text = text_of(value);
    if !query::holds_one(parameters, &text) {
        return Some(value.clone());
    }
    let without = match *name {
        LOCATION | CONTENT_LOCATION => query::url_without(&text, parameters)?,
        LINK => query::links_without(&text, parameters),
        _ => return None,
    };
    if without.is_empty() { None } else { HeaderValue::from_bytes(without.as_bytes()).ok() }
}

/// Not only ASCII: clients read URLs as UTF-8, too.
fn text_of(value: &HeaderValue) -> Cow<'_, str> {
    String::from_utf8_lossy(value.as_bytes())
}

#[diagnostic::do_not_recommend]
impl<B> ReadableResponse for Response<B>
where
    B: Body + Send,
    B::Data: Send,
    B::Error: Send,
{
    type Replayed = Response<Replay<B>>;

    #[inline]
    fn untouched(self) -> Self::Replayed {
        self.map(Replay::untouched)
    }

    async fn read(response: Self::Replayed, most: usize, time_over: Sleep) -> (Self::Replayed, Bytes) {
        let (head, body) = response.into_parts();
        let body = body.read(most, time_over).await;
        let beginning = body.beginning();
        (Response::from_parts(head, body), beginning)
    }

    async fn hold(
        response: Self::Replayed,
        watch: Arc<dyn Watch>,
        end: Option<Arc<dyn EndOfBody>>,
        time_over: Sleep,
    ) -> Self::Replayed {
        let (head, body) = response.into_parts();
        Response::from_parts(head, body.hold(watch, end, time_over).await)
    }

    fn tell_end_of(response: &mut Self::Replayed, end: Arc<dyn EndOfBody>) {
        response.body_mut().tell_end(end);
    }
}
