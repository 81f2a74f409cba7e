//! The place of a key in a request.

use std::{
    fmt,
    sync::{Arc, OnceLock},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, header::AUTHORIZATION};
use zeroize::Zeroizing;

pub(crate) use super::unusable::{UnusableSecret, check};
use super::{query, secret::Secret};

/// The place of the key in a request: a header, a query parameter, or several of them.
///
/// The pool renders a key once, when it loads the key. A header or query parameter of the same name that the
/// caller set is replaced.
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
/// // any other function of the secret
/// let inject = Inject::custom(|secret, credentials| {
///     credentials.header(HeaderName::from_static("x-auth"), &format!("Token token={secret}"))
/// });
/// # let _ = inject;
/// ```
#[derive(Clone)]
pub struct Inject {
    places: Vec<Place>,
    invalid_header: Option<String>,
    /// The form of the pool's first key, which the other keys share.
    form: Arc<OnceLock<Arc<Form>>>,
}

type Place = Arc<dyn Fn(&str, &mut Credentials) -> Result<(), UnusableSecret> + Send + Sync>;

impl Inject {
    /// `Authorization: Bearer <secret>`.
    #[must_use]
    pub fn bearer() -> Self {
        Self::custom(|secret, credentials| {
            let value = Zeroizing::new(format!("Bearer {secret}"));
            credentials.header(AUTHORIZATION, &value)
        })
    }

    /// A header of that name, with the secret as its whole value.
    ///
    /// [`KeyPoolBuilder::build`](crate::KeyPoolBuilder::build) reports a name that is not a header name.
    #[must_use]
    pub fn header(name: impl AsRef<str>) -> Self {
        match HeaderName::from_bytes(name.as_ref().as_bytes()) {
            Ok(name) => Self::custom(move |secret, credentials| credentials.header(name.clone(), secret)),
            Err(_) => Self::of(Vec::new(), Some(name.as_ref().to_owned())),
        }
    }

    /// A query parameter of that name, percent-encoded.
    ///
    /// Proxies and servers often log URLs, and a key in the query with them. This crate removes the key from the
    /// errors and responses of `reqwest`, which carry the URL. It cannot remove the key from other logs.
    #[must_use]
    pub fn query(name: impl Into<String>) -> Self {
        let name = name.into();
        Self::custom(move |secret, credentials| {
            credentials.query(&name, secret);
            Ok(())
        })
    }

    /// The credentials that `place` makes of a secret. The pool calls it once per key, when it loads the key.
    ///
    /// For a secret that it cannot use, `place` returns an [`UnusableSecret`].
    #[must_use]
    pub fn custom<F>(place: F) -> Self
    where
        F: Fn(&str, &mut Credentials) -> Result<(), UnusableSecret> + Send + Sync + 'static,
    {
        Self::of(vec![Arc::new(place)], None)
    }

    fn of(places: Vec<Place>, invalid_header: Option<String>) -> Self {
        Self { places, invalid_header, form: Arc::default() }
    }

    /// Puts the key into the places of both.
    #[must_use]
    pub fn and(mut self, other: Self) -> Self {
        self.places.extend(other.places);
        Self::of(self.places, self.invalid_header.or(other.invalid_header))
    }

    pub(crate) fn invalid_header(&self) -> Option<&str> {
        self.invalid_header.as_deref()
    }

    pub(crate) fn render(&self, secret: &Secret) -> Result<Rendered, UnusableSecret> {
        check(secret.expose())?;
        let mut credentials = Credentials::default();
        for place in &self.places {
            place(secret.expose(), &mut credentials)?;
        }
        let (value, form) = credentials.into_form(secret);
        Ok(Rendered { value, form: self.shared(form) })
    }

    fn shared(&self, form: Form) -> Arc<Form> {
        if form.is_of_one_key() {
            return Arc::new(form);
        }
        let first = self.form.get_or_init(|| Arc::new(form.clone()));
        if first.first == form.first { first.clone() } else { Arc::new(form) }
    }
}

impl fmt::Debug for Inject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inject").field("places", &self.places.len()).finish()
    }
}

/// The headers and query parameters of one key: see [`Inject::custom`].
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
    /// A header can't carry the value.
    pub fn header(&mut self, name: HeaderName, value: &str) -> Result<(), UnusableSecret> {
        // Shared from the start, so that a request's clone does not allocate; wiped with the last of them.
        let bytes = Bytes::from_owner(Zeroizing::new(Box::<[u8]>::from(value.as_bytes())));
        let mut value = HeaderValue::from_maybe_shared(bytes).map_err(|_| UnusableSecret::CONTROL)?;
        value.set_sensitive(true);
        self.headers.push((name, value));
        Ok(())
    }

    /// Adds a query parameter; both parts are percent-encoded.
    pub fn query(&mut self, name: &str, value: &str) {
        self.query.push(query::Parameter::new(name, value));
    }

    /// Splits the credentials into the part of this key, and the form that keys share.
    fn into_form(self, secret: &Secret) -> (Option<HeaderValue>, Form) {
        let mut headers = self.headers.into_iter();
        let (first, value) = match headers.next() {
            Some((name, value)) => (Some(FirstHeader::new(name, &value, secret)), Some(value)),
            None => (None, None),
        };
        let found = first.as_ref().is_some_and(|first| first.around_secret.is_some());
        let apart = (!found).then(|| secret.clone());
        (value, Form { first, more: headers.collect(), query: self.query, apart })
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

/// The credentials of one key, with its secret. Small, since a pool may have many keys.
#[derive(Clone)]
pub(crate) struct Rendered {
    /// The value of the first header.
    value: Option<HeaderValue>,
    form: Arc<Form>,
}

/// Everything but the value of the first header. In most pools, all keys share one form.
#[derive(Clone)]
struct Form {
    first: Option<FirstHeader>,
    more: Box<[(HeaderName, HeaderValue)]>,
    query: Vec<query::Parameter>,
    /// The secret, if the first header does not contain it unchanged.
    apart: Option<Secret>,
}

#[derive(Clone, PartialEq, Eq)]
struct FirstHeader {
    name: HeaderName,
    /// The number of bytes before the secret in the header value, and after it.
    around_secret: Option<(usize, usize)>,
}

impl FirstHeader {
    fn new(name: HeaderName, value: &HeaderValue, secret: &Secret) -> Self {
        let secret = secret.expose();
        let found = value.to_str().ok().and_then(|text| Some((text.find(secret)?, text.len())));
        Self { name, around_secret: found.map(|(before, len)| (before, len - before - secret.len())) }
    }
}

impl Form {
    fn is_of_one_key(&self) -> bool {
        self.apart.is_some() || !self.more.is_empty() || !self.query.is_empty()
    }

    #[cold]
    fn insert_more_into(&self, headers: &mut HeaderMap) {
        for (name, value) in &self.more {
            headers.insert(name.clone(), value.clone());
        }
    }
}

impl Rendered {
    /// Sets the request's headers, and replaces others of the same names.
    #[inline(always)]
    pub(crate) fn insert_into(&self, headers: &mut HeaderMap) {
        if let (Some(first), Some(value)) = (&self.form.first, &self.value) {
            headers.insert(first.name.clone(), value.clone());
        }
        if !self.form.more.is_empty() {
            self.form.insert_more_into(headers);
        }
    }

    #[inline]
    pub(crate) fn query_parameters(&self) -> &[query::Parameter] {
        &self.form.query
    }

    pub(crate) fn secret(&self) -> Secret {
        match &self.form.apart {
            Some(secret) => secret.clone(),
            None => Secret::new(self.in_first_header()),
        }
    }

    pub(crate) fn is_of(&self, secret: &Secret) -> bool {
        match &self.form.apart {
            Some(own) => own == secret,
            None => self.in_first_header() == secret.expose(),
        }
    }

    fn in_first_header(&self) -> &str {
        let around = self.form.first.as_ref().and_then(|first| first.around_secret);
        let text = self.value.as_ref().and_then(|value| value.to_str().ok());
        let Some(((before, behind), text)) = around.zip(text) else { return "" };
        text.get(before..text.len() - behind).unwrap_or("")
    }
}

impl fmt::Debug for Rendered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rendered").finish_non_exhaustive()
    }
}

/// Why a key can't or must not be put into a request. The request was not sent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(transparent)]
pub struct InjectError(#[from] Obstacle);

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
enum Obstacle {
    #[error("{host} would get a key in cleartext: use https, or name it to the pool's `allow_cleartext_to`")]
    Cleartext { host: String },
    #[error("with the key in its query, the request's URI would be too long")]
    UriTooLong,
    #[error("the request's URI is one that can't have a query, where the key would go")]
    NoQuery,
}

impl InjectError {
    /// Whether the key would travel in cleartext to a host that is neither loopback nor in
    /// [`allow_cleartext_to`](crate::KeyPoolBuilder::allow_cleartext_to).
    #[must_use]
    pub fn is_cleartext(&self) -> bool {
        matches!(self.0, Obstacle::Cleartext { .. })
    }

    /// Whether the URI would be longer than a URI can be with the key in its query.
    #[must_use]
    pub fn is_uri_too_long(&self) -> bool {
        self.0 == Obstacle::UriTooLong
    }

    pub(crate) fn cleartext(host: &str) -> Self {
        Self(Obstacle::Cleartext { host: host.to_owned() })
    }

    pub(crate) fn uri_too_long() -> Self {
        Self(Obstacle::UriTooLong)
    }

    /// The URI of a `CONNECT`, or `*`, has no query.
    pub(crate) fn no_query() -> Self {
        Self(Obstacle::NoQuery)
    }
}
