//! Requests that a key can be put into.

use http::{
    HeaderMap, Request, Uri,
    header::HOST,
    uri::{PathAndQuery, Scheme},
};

use crate::{
    key::{
        InjectError,
        hosts::{Destination, Transport},
        query::{self, Parameter},
    },
    limit::Traits,
};

/// A request that a key can be put into: `http::Request<B>` of any `B` or, with the feature `reqwest`,
/// `reqwest::Request`.
#[diagnostic::on_unimplemented(
    message = "a key can't be put into a `{Self}`",
    label = "not a request that `KeyRotationLayer` knows",
    note = "it knows `http::Request<B>` of `http` 1 and, with the feature `reqwest`, `reqwest::Request` of `reqwest` 0.13",
    note = "the same type of another version of `http` or `reqwest` is another type: see `cargo tree -d`"
)]
pub trait RequestMessage: KeyedRequest {}

/// What the layer does with a request.
pub trait KeyedRequest {
    fn is_https(&self) -> bool;
    fn destination(&self) -> Destination<'_>;
    fn headers_mut(&mut self) -> &mut HeaderMap;
    /// What the request says of itself, in its extensions.
    fn traits(&self) -> Option<Traits>;
    fn set_query(&mut self, parameters: &[Parameter]) -> Result<(), InjectError>;
}

impl<B> RequestMessage for Request<B> {}

impl<B> KeyedRequest for Request<B> {
    /// A URI with a scheme has a host.
    #[inline]
    fn is_https(&self) -> bool {
        self.uri().scheme_str() == Some("https")
    }

    fn destination(&self) -> Destination<'_> {
        match self.uri().authority() {
            Some(authority) => {
                let transport = match self.uri().scheme() {
                    Some(scheme) if *scheme == Scheme::HTTPS => Transport::Tls,
                    _ => Transport::Cleartext,
                };
                Destination { transport, host: Some(authority.host()), port: authority.port_u16() }
            }
            // The connection was chosen elsewhere, and with it whether it is encrypted.
            None => {
                let host = self.headers().get(HOST).and_then(|host| host.to_str().ok());
                let (host, port) = host.map_or((None, None), host_and_port);
                Destination { transport: Transport::Unknown, host, port }
            }
        }
    }

    #[inline]
    fn headers_mut(&mut self) -> &mut HeaderMap {
        self.headers_mut()
    }

    #[inline(always)]
    fn traits(&self) -> Option<Traits> {
        self.extensions().get().cloned()
    }

    fn set_query(&mut self, parameters: &[Parameter]) -> Result<(), InjectError> {
        let path = self.uri().path();
        if !path.starts_with('/') {
            return Err(InjectError::no_query());
        }
        let query = query::with(self.uri().query(), parameters);
        let path_and_query =
            PathAndQuery::try_from(format!("{path}?{query}")).map_err(|_| InjectError::uri_too_long())?;
        let mut parts = self.uri().clone().into_parts();
        parts.path_and_query = Some(path_and_query);
        *self.uri_mut() = Uri::from_parts(parts).map_err(|_| InjectError::uri_too_long())?;
        Ok(())
    }
}

/// Divides a `Host` header.
fn host_and_port(host: &str) -> (Option<&str>, Option<u16>) {
    match host.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (Some(host), port.parse().ok()),
        _ => (Some(host), None),
    }
}
