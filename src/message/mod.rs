//! One interface to `http` and `reqwest` messages.

use std::borrow::Cow;

use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Request, Response, StatusCode, Uri,
    header::{CONTENT_LOCATION, Entry, HOST, HeaderName, LINK, LOCATION},
    uri::PathAndQuery,
};
use http_body::Body;

pub use self::replay::Replay;
use crate::{
    clock::Sleep,
    key::{
        InjectError, UriTooLong,
        hosts::{Destination, Hosts, Ruling},
        query::{self, Parameter},
    },
};

mod replay;

mod sealed {
    pub trait Sealed {}
}

/// A request that can carry a key: `http::Request<B>` with any `B` or, with the feature `reqwest`,
/// `reqwest::Request`.
pub trait RequestMessage: sealed::Sealed {
    #[doc(hidden)]
    fn is_https(&self) -> bool;
    /// Costs more than [`is_https`](Self::is_https), since the host has to be extracted.
    #[doc(hidden)]
    fn destination(&self) -> Destination<'_>;
    #[doc(hidden)]
    fn headers_mut(&mut self) -> &mut HeaderMap;
    #[doc(hidden)]
    fn set_query(&mut self, parameters: &[Parameter]) -> Result<(), InjectError>;
}

/// Decides whether a pool with these hosts gives this request a key.
#[inline]
pub(crate) fn rule<R: RequestMessage>(hosts: &Hosts, request: &R) -> Ruling {
    if hosts.allows_all() && request.is_https() {
        return Ruling::Key;
    }
    hosts.rule(request.destination())
}

/// A response that can be classified: `http::Response<B>` with any `B` or, with the feature `reqwest`,
/// `reqwest::Response`.
pub trait ResponseMessage: sealed::Sealed + Sized {
    #[doc(hidden)]
    fn status(&self) -> StatusCode;
    #[doc(hidden)]
    fn headers(&self) -> &HeaderMap;
    #[doc(hidden)]
    fn extensions(&self) -> &http::Extensions;
    #[doc(hidden)]
    fn extensions_mut(&mut self) -> &mut http::Extensions;
    /// Removes a key from the headers, and from the URL of a `reqwest::Response`.
    #[doc(hidden)]
    fn forget_query(&mut self, parameters: &[Parameter]);
}

/// A response whose body can be read in part and still be passed on whole.
///
/// An `http::Response<B>` becomes an `http::Response<Replay<B>>`. A `reqwest::Response` keeps its type.
pub trait ReadableResponse: ResponseMessage {
    /// The type of the response once its body may have been read in part.
    type Replayed: ResponseMessage;

    #[doc(hidden)]
    fn untouched(self) -> Self::Replayed;

    /// Reads the body to the end, or until one of the limits is reached.
    #[doc(hidden)]
    fn begin(self, most: usize, time_over: Sleep) -> impl Future<Output = (Self::Replayed, Bytes)> + Send;
}

impl<B> sealed::Sealed for Request<B> {}

impl<B> RequestMessage for Request<B> {
    #[inline]
    fn is_https(&self) -> bool {
        self.uri().scheme_str() == Some("https")
    }

    fn destination(&self) -> Destination<'_> {
        match self.uri().authority() {
            Some(authority) => Destination {
                is_cleartext: !self.is_https(),
                host: Some(authority.host()),
                port: authority.port_u16(),
            },
            // A URI without an authority is relative: an inner service has chosen the connection.
            None => {
                let host = self.headers().get(HOST).and_then(|host| host.to_str().ok());
                let (host, port) = host.map_or((None, None), divided);
                Destination { is_cleartext: false, host, port }
            }
        }
    }

    #[inline]
    fn headers_mut(&mut self) -> &mut HeaderMap {
        self.headers_mut()
    }

    fn set_query(&mut self, parameters: &[Parameter]) -> Result<(), InjectError> {
        let path = self.uri().path();
        if !path.starts_with('/') {
            return Err(InjectError::NoQuery);
        }
        let query = query::with(self.uri().query(), parameters);
        let path_and_query = PathAndQuery::try_from(format!("{path}?{query}")).map_err(|_| UriTooLong)?;
        let mut parts = self.uri().clone().into_parts();
        parts.path_and_query = Some(path_and_query);
        *self.uri_mut() = Uri::from_parts(parts).map_err(|_| UriTooLong)?;
        Ok(())
    }
}

/// Splits a `Host` header into host and port.
fn divided(host: &str) -> (Option<&str>, Option<u16>) {
    match host.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (Some(host), port.parse().ok()),
        _ => (Some(host), None),
    }
}

impl<B> sealed::Sealed for Response<B> {}

impl<B> ResponseMessage for Response<B> {
    #[inline]
    fn status(&self) -> StatusCode {
        self.status()
    }

    #[inline]
    fn headers(&self) -> &HeaderMap {
        self.headers()
    }

    #[inline]
    fn extensions(&self) -> &http::Extensions {
        self.extensions()
    }

    #[inline]
    fn extensions_mut(&mut self) -> &mut http::Extensions {
        self.extensions_mut()
    }

    fn forget_query(&mut self, parameters: &[Parameter]) {
        forget_in_headers(self.headers_mut(), parameters);
    }
}

/// Removes a key in a query from all headers.
///
/// Servers copy the request's query into redirects and links, and a client that follows a redirect would take the key
/// to another host.
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

/// Returns a header value without the key, or `None` if nothing is left.
///
/// An empty URL would resolve to the URL of the request.
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

/// Reads a header value as UTF-8 rather than ASCII, since clients also follow URLs that are not ASCII.
fn text_of(value: &HeaderValue) -> Cow<'_, str> {
    String::from_utf8_lossy(value.as_bytes())
}

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

    async fn begin(self, most: usize, time_over: Sleep) -> (Self::Replayed, Bytes) {
        let (head, body) = self.into_parts();
        let body = Replay::begin(body, most, time_over).await;
        let beginning = body.beginning();
        (Response::from_parts(head, body), beginning)
    }
}

#[cfg(feature = "reqwest")]
pub(crate) mod for_reqwest {
    use reqwest::{Request, Response, ResponseBuilderExt, Url};

    use super::*;

    impl sealed::Sealed for Request {}

    impl RequestMessage for Request {
        #[inline]
        fn is_https(&self) -> bool {
            self.url().scheme() == "https"
        }

        fn destination(&self) -> Destination<'_> {
            Destination {
                is_cleartext: !self.is_https(),
                host: self.url().host_str(),
                port: self.url().port(),
            }
        }

        #[inline]
        fn headers_mut(&mut self) -> &mut HeaderMap {
            self.headers_mut()
        }

        fn set_query(&mut self, parameters: &[Parameter]) -> Result<(), InjectError> {
            let query = query::with(self.url().query(), parameters);
            self.url_mut().set_query(Some(&query));
            Ok(())
        }
    }

    impl sealed::Sealed for Response {}

    impl ResponseMessage for Response {
        #[inline]
        fn status(&self) -> StatusCode {
            self.status()
        }

        #[inline]
        fn headers(&self) -> &HeaderMap {
            self.headers()
        }

        #[inline]
        fn extensions(&self) -> &http::Extensions {
            self.extensions()
        }

        #[inline]
        fn extensions_mut(&mut self) -> &mut http::Extensions {
            self.extensions_mut()
        }

        fn forget_query(&mut self, parameters: &[Parameter]) {
            let mut url = self.url().clone();
            forget(&mut url, parameters);
            let nothing = Self::from(http::Response::new(reqwest::Body::default()));
            let mut response = http::Response::<reqwest::Body>::from(std::mem::replace(self, nothing));
            response.forget_query(parameters);
            *self = from_http(response, url);
        }
    }

    impl ReadableResponse for Response {
        type Replayed = Self;

        #[inline]
        fn untouched(self) -> Self {
            self
        }

        async fn begin(self, most: usize, time_over: Sleep) -> (Self, Bytes) {
            let url = self.url().clone();
            let response = http::Response::<reqwest::Body>::from(self);
            let (response, beginning) = response.begin(most, time_over).await;
            (from_http(response.map(reqwest::Body::wrap), url), beginning)
        }
    }

    /// Converts a response and keeps its URL.
    ///
    /// reqwest takes the URL from an extension that only `ResponseBuilderExt::url` can set.
    fn from_http(response: http::Response<reqwest::Body>, url: Url) -> Response {
        let with_url = http::Response::builder().url(url).body(());
        let (mut parts, body) = response.into_parts();
        if let Ok(with_url) = with_url {
            parts.extensions.extend(with_url.into_parts().0.extensions);
        }
        Response::from(http::Response::from_parts(parts, body))
    }

    fn forget(url: &mut Url, parameters: &[Parameter]) {
        let left = query::without(url.query(), parameters);
        url.set_query(left.as_deref());
        // A redirect may have put the key into the fragment or the path.
        let elsewhere = |url: &Url| query::holds_one(parameters, url.as_str());
        if elsewhere(url) {
            url.set_query(None);
            url.set_fragment(None);
        }
        if elsewhere(url) {
            url.set_path("");
        }
    }

    pub(crate) fn redact_url(error: &mut reqwest::Error, parameters: &[Parameter]) {
        if let Some(url) = error.url_mut() {
            forget(url, parameters);
        }
    }
}
