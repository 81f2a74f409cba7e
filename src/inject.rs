//! Where a key goes in a request.

use std::{fmt, sync::Arc};

use http::{HeaderName, HeaderValue, header::AUTHORIZATION};

use crate::query;

/// Where a key goes: one place, or several at once.
///
/// What a key looks like there is worked out once, when the key is loaded. A header or query parameter that
/// the caller set under the same name is replaced.
///
/// ```
/// use http::HeaderName;
/// use tower_key_rotation::Inject;
///
/// // `Authorization: Bearer …`, the default
/// let inject = Inject::bearer();
/// // `x-api-key: …`
/// let inject = Inject::header("x-api-key");
/// // `?key=…`: services log URLs, so take a header where the service offers one
/// let inject = Inject::query("key");
/// // both headers, as some gateways want
/// let inject = Inject::bearer().and(Inject::header("x-api-key"));
/// // anything else that can be worked out from the secret
/// let inject = Inject::custom(|secret, credentials| {
///     credentials.header(HeaderName::from_static("x-auth"), &format!("Token token={secret}"))
/// });
/// # let _ = inject;
/// ```
#[derive(Clone)]
pub struct Inject {
    places: Vec<Place>,
    invalid_header: Option<String>,
}

type Place = Arc<dyn Fn(&str, &mut Credentials) -> Result<(), UnusableSecret> + Send + Sync>;

impl Inject {
    /// `Authorization: Bearer <secret>`.
    #[must_use]
    pub fn bearer() -> Self {
        Self::custom(|secret, credentials| credentials.header(AUTHORIZATION, &format!("Bearer {secret}")))
    }

    /// A header of that name, with the secret as its whole value.
    ///
    /// A name that is no header name is reported by
    /// [`KeyPoolBuilder::build`](crate::KeyPoolBuilder::build).
    #[must_use]
    pub fn header(name: impl AsRef<str>) -> Self {
        match HeaderName::from_bytes(name.as_ref().as_bytes()) {
            Ok(name) => Self::custom(move |secret, credentials| credentials.header(name.clone(), secret)),
            Err(_) => Self { places: Vec::new(), invalid_header: Some(name.as_ref().to_owned()) },
        }
    }

    /// A query parameter of that name, percent-encoded.
    ///
    /// A key in a URL is easily logged on its way. This crate takes it out of the errors and responses of
    /// `reqwest`, which carry the URL; what other layers and proxies log, it can't see.
    #[must_use]
    pub fn query(name: impl Into<String>) -> Self {
        let name = name.into();
        Self::custom(move |secret, credentials| {
            credentials.query(&name, secret);
            Ok(())
        })
    }

    /// Whatever `place` makes of a secret. It runs once per key, when the key is loaded.
    #[must_use]
    pub fn custom<F>(place: F) -> Self
    where
        F: Fn(&str, &mut Credentials) -> Result<(), UnusableSecret> + Send + Sync + 'static,
    {
        Self { places: vec![Arc::new(place)], invalid_header: None }
    }

    /// Here and there.
    #[must_use]
    pub fn and(mut self, other: Self) -> Self {
        self.places.extend(other.places);
        self.invalid_header = self.invalid_header.or(other.invalid_header);
        self
    }

    pub(crate) fn invalid_header(&self) -> Option<&str> {
        self.invalid_header.as_deref()
    }

    pub(crate) fn render(&self, secret: &str) -> Result<Credentials, UnusableSecret> {
        check(secret)?;
        let mut credentials = Credentials::default();
        for place in &self.places {
            place(secret, &mut credentials)?;
        }
        // There may be very many keys, and a vector's first push makes room for four.
        credentials.headers.shrink_to_fit();
        credentials.query.shrink_to_fit();
        Ok(credentials)
    }
}

impl Default for Inject {
    fn default() -> Self {
        Self::bearer()
    }
}

impl fmt::Debug for Inject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inject").field("places", &self.places.len()).finish()
    }
}

/// What a request carries for one key: see [`Inject::custom`].
#[derive(Default)]
pub struct Credentials {
    headers: Vec<(HeaderName, HeaderValue)>,
    query: Vec<query::Parameter>,
}

impl Credentials {
    /// Adds a header. Its value is marked sensitive.
    ///
    /// # Errors
    ///
    /// Where a header can't carry the value.
    pub fn header(&mut self, name: HeaderName, value: &str) -> Result<(), UnusableSecret> {
        let mut value = HeaderValue::from_str(value).map_err(|_| UnusableSecret::Control)?;
        value.set_sensitive(true);
        // The bytes are made shareable by their first clone, which allocates; later ones don't.
        drop(value.clone());
        self.headers.push((name, value));
        Ok(())
    }

    /// Adds a query parameter; both parts are percent-encoded.
    pub fn query(&mut self, name: &str, value: &str) {
        self.query.push(query::Parameter::new(name, value));
    }

    pub(crate) fn headers(&self) -> &[(HeaderName, HeaderValue)] {
        &self.headers
    }

    pub(crate) fn query_parameters(&self) -> &[query::Parameter] {
        &self.query
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("headers", &self.headers.len())
            .field("query", &self.query.len())
            .finish()
    }
}

/// Whether a secret can be put into a request. `http` accepts tabs and bytes beyond ASCII in a header value, and
/// trims nothing; a pasted key that has them is a broken key.
pub(crate) fn check(secret: &str) -> Result<(), UnusableSecret> {
    if secret.is_empty() {
        return Err(UnusableSecret::Empty);
    }
    if secret.chars().any(char::is_control) {
        return Err(UnusableSecret::Control);
    }
    if !secret.is_ascii() {
        return Err(UnusableSecret::NotAscii);
    }
    if secret.trim() != secret {
        return Err(UnusableSecret::EdgeSpace);
    }
    Ok(())
}

/// Why a secret can't be put into a request. It never says what the secret is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UnusableSecret {
    /// There is none.
    #[error("the secret is empty")]
    Empty,
    /// It has a newline, a tab or another control character.
    #[error("the secret has a newline, a tab or another control character")]
    Control,
    /// It has a character beyond ASCII.
    #[error("the secret has a character that is not ASCII")]
    NotAscii,
    /// It begins or ends with a space.
    #[error("the secret begins or ends with a space")]
    EdgeSpace,
    /// A function given to [`Inject::custom`] could make nothing of it.
    #[error("the secret does not have the form that is expected")]
    Form,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_places_are_filled_at_once_and_every_header_is_sensitive() {
        let inject = Inject::bearer().and(Inject::header("x-api-key")).and(Inject::query("key"));
        let credentials = inject.render("a+b").unwrap();
        let headers = credentials.headers();
        assert_eq!(headers[0].1, "Bearer a+b");
        assert_eq!(headers[1].1, "a+b");
        assert!(headers.iter().all(|(_, value)| value.is_sensitive()));
        assert_eq!(credentials.query_parameters()[0].encoded(), "key=a%2Bb");
    }

    #[test]
    fn f30_a_secret_that_no_header_should_carry_is_refused() {
        let refused = |secret| Inject::bearer().render(secret).map(|_| ()).unwrap_err();
        assert_eq!(refused(""), UnusableSecret::Empty);
        assert_eq!(refused("a\nb"), UnusableSecret::Control);
        assert_eq!(refused("a\tb"), UnusableSecret::Control);
        assert_eq!(refused("a\u{7f}"), UnusableSecret::Control);
        assert_eq!(refused(" a"), UnusableSecret::EdgeSpace);
        assert_eq!(refused("a "), UnusableSecret::EdgeSpace);
        assert_eq!(refused("schlüssel"), UnusableSecret::NotAscii);
        assert_eq!(refused("a\u{a0}"), UnusableSecret::NotAscii);
    }

    #[test]
    fn nothing_that_holds_a_secret_shows_it() {
        let inject = Inject::bearer().and(Inject::query("key"));
        let shown = format!("{inject:?} {:?}", inject.render("sk-canary").unwrap());
        assert!(!shown.contains("canary"), "{shown}");
    }
}
