//! Requests and responses of `reqwest`.

use std::sync::Arc;

use bytes::Bytes;
use http::{Extensions, HeaderMap, StatusCode};
use reqwest::{Body, Error, Request, Response, ResponseBuilderExt, Url};

use super::{
    end_of_body::EndOfBody,
    replay::Replay,
    request::{KeyedRequest, RequestMessage},
    response::{JudgedResponse, ReadableResponse, ResponseMessage},
    until_end::UntilEnd,
    watch::Watch,
};
use crate::{
    clock::Sleep,
    key::{
        InjectError,
        hosts::{Destination, Transport},
        query::{self, Parameter},
    },
    limit::Traits,
};

impl RequestMessage for Request {}

impl KeyedRequest for Request {
    #[inline]
    fn is_https(&self) -> bool {
        self.url().scheme() == "https"
    }

    fn destination(&self) -> Destination<'_> {
        let transport = if self.is_https() { Transport::Tls } else { Transport::Cleartext };
        Destination { transport, host: self.url().host_str(), port: self.url().port() }
    }

    #[inline]
    fn headers_mut(&mut self) -> &mut HeaderMap {
        self.headers_mut()
    }

    /// Its extensions are its own.
    #[inline(always)]
    fn traits(&self) -> Option<Traits> {
        None
    }

    fn set_query(&mut self, parameters: &[Parameter]) -> Result<(), InjectError> {
        let query = query::with(self.url().query(), parameters);
        self.url_mut().set_query(Some(&query));
        Ok(())
    }
}

impl ResponseMessage for Response {}

impl JudgedResponse for Response {
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
        let mut url = self.url().clone();
        forget(&mut url, parameters);
        let mut response = take_http(self);
        response.forget_query(parameters);
        *self = from_http(response, url);
    }

    fn tell_end(&mut self, end: Arc<dyn EndOfBody>) {
        let url = self.url().clone();
        let response = take_http(self);
        *self = from_http(response.map(|body| Body::wrap(UntilEnd::new(body, end))), url);
    }
}

impl ReadableResponse for Response {
    type Replayed = Self;

    #[inline]
    fn untouched(self) -> Self {
        self
    }

    async fn read(response: Self, most: usize, time_over: Sleep) -> (Self, Bytes) {
        let url = response.url().clone();
        let response = http::Response::<Body>::from(response).map(Replay::untouched);
        let (response, beginning) = http::Response::<Body>::read(response, most, time_over).await;
        (from_http(response.map(Body::wrap), url), beginning)
    }

    async fn hold(
        response: Self,
        watch: Arc<dyn Watch>,
        end: Option<Arc<dyn EndOfBody>>,
        time_over: Sleep,
    ) -> Self {
        let url = response.url().clone();
        let response = http::Response::<Body>::from(response).map(Replay::untouched);
        let response = http::Response::<Body>::hold(response, watch, end, time_over).await;
        from_http(response.map(Body::wrap), url)
    }

    fn tell_end_of(response: &mut Self, end: Arc<dyn EndOfBody>) {
        response.tell_end(end);
    }
}

fn take_http(response: &mut Response) -> http::Response<Body> {
    let nothing = Response::from(http::Response::new(Body::default()));
    http::Response::from(std::mem::replace(response, nothing))
}

/// `reqwest` takes the URL of a response from an extension that only its own builder can set.
fn from_http(response: http::Response<Body>, url: Url) -> Response {
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
    // A redirect may have put the key elsewhere.
    let elsewhere = |url: &Url| query::holds_one(parameters, url.as_str());
    if elsewhere(url) {
        url.set_query(None);
        url.set_fragment(None);
    }
    if elsewhere(url) {
        url.set_path("");
    }
}

pub(crate) fn redact_url(error: &mut Error, parameters: &[Parameter]) {
    if let Some(url) = error.url_mut() {
        forget(url, parameters);
    }
}
