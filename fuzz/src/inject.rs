//! Injection of a key into a request. An input is the request, followed by the pool's settings:
//!
//! ```text
//! POST https://api.example.com/v1?a=1&key=2
//! x-api-key: the caller's
//!
//! bearer
//! header x-api-key
//! query key
//! custom-header x-auth Token {}
//! custom-query token v1.{}
//! allowed api.example.com
//! cleartext gateway.internal
//! secret canary-1
//! ```

use std::{
    convert::Infallible,
    fmt::Debug,
    future::{Ready, ready},
    net::IpAddr,
    task::{Context, Poll},
};

use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, Uri, header::HOST};
use percent_encoding::percent_decode_str;
use reqwest::Url;
use tower::{Layer, Service, ServiceExt};
use tower_key_rotation::{Error, Inject, KeyPool, KeyRotation, KeyRotationLayer, NoKeyAvailable, ServedBy};

use crate::{can_be_sent, now, text};

/// The part of a secret that no error or `Debug` output may show.
const CANARY: &str = "canary";

pub fn check(input: &[u8]) {
    let (head, setup) = text::divided(input);
    let (Ok(setup), mut lines) = (str::from_utf8(setup), text::lines(head)) else { return };
    let Some((method, uri)) = lines.next().and_then(first_line) else { return };
    let headers = text::headers(lines);
    let setup = Setup::read(setup);
    let Some(pool) = setup.pool() else { return };

    if let Ok(uri) = Uri::try_from(uri) {
        setup.check_requests(&pool, || {
            let mut request = Request::new(());
            *request.method_mut() = method.clone();
            *request.uri_mut() = uri.clone();
            *request.headers_mut() = headers.clone();
            request
        });
    }
    // A new pool, so that rotation begins with the first key again.
    if let (Ok(url), Some(pool)) = (Url::parse(uri), setup.pool()) {
        setup.check_requests(&pool, || {
            let mut request = reqwest::Request::new(method.clone(), url.clone());
            *request.headers_mut() = headers.clone();
            request
        });
    }
}

fn first_line(line: &[u8]) -> Option<(Method, &str)> {
    let (method, uri) = str::from_utf8(line).ok()?.split_once(' ')?;
    Some((method.parse().ok()?, uri))
}

/// The parts of an `http` or `reqwest` request that the target compares.
#[derive(Debug, PartialEq)]
struct Seen {
    method: Method,
    /// The URI without its query.
    address: String,
    has_path: bool,
    is_cleartext: bool,
    /// Whether the URI is only a path.
    is_relative: bool,
    /// The host of the URI, or of the `Host` header if the URI is relative.
    host: Option<String>,
    port: Option<u16>,
    query: Option<String>,
    headers: HeaderMap,
}

/// A client that answers with the request.
#[derive(Clone)]
struct Echo;

impl<R> Service<R> for Echo
where
    Seen: for<'r> From<&'r R>,
{
    type Response = Response<Seen>;
    type Error = Infallible;
    type Future = Ready<Result<Response<Seen>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: R) -> Self::Future {
        ready(Ok(Response::new(Seen::from(&request))))
    }
}

impl From<&Request<()>> for Seen {
    fn from(request: &Request<()>) -> Self {
        let uri = request.uri();
        let header = || request.headers().get(HOST)?.to_str().ok().map(host_and_port);
        let (host, port) = match uri.host() {
            Some(host) => (Some(host.to_ascii_lowercase()), uri.port_u16()),
            None => header().map_or((None, None), |(host, port)| (Some(host), port)),
        };
        Self {
            method: request.method().clone(),
            address: uri.to_string().split('?').next().unwrap_or_default().to_owned(),
            has_path: uri.path().starts_with('/'),
            is_cleartext: uri.host().is_some() && uri.scheme_str() != Some("https"),
            is_relative: uri.host().is_none(),
            host,
            port,
            query: uri.query().map(str::to_owned),
            headers: request.headers().clone(),
        }
    }
}

impl From<&reqwest::Request> for Seen {
    fn from(request: &reqwest::Request) -> Self {
        let url = request.url();
        let mut without_query = url.clone();
        without_query.set_query(None);
        Self {
            method: request.method().clone(),
            address: without_query.to_string(),
            has_path: true,
            is_cleartext: url.scheme() != "https",
            is_relative: false,
            host: url.host_str().map(str::to_ascii_lowercase),
            port: url.port(),
            query: url.query().map(str::to_owned),
            headers: request.headers().clone(),
        }
    }
}

#[derive(Debug, PartialEq)]
enum Ruling {
    Key,
    PassThrough,
    Refused,
}

#[derive(Default)]
struct Setup<'a> {
    places: Vec<Place<'a>>,
    allowed: Vec<&'a str>,
    cleartext: Vec<&'a str>,
    secrets: Vec<&'a str>,
    /// Whether another setting contains the canary and may be shown.
    canary_is_public: bool,
}

/// A place for the key: the setting's first word, a name, and a template in which `{}` stands for the secret.
#[derive(Clone, Copy)]
struct Place<'a> {
    kind: &'a str,
    name: &'a str,
    template: &'a str,
}

impl<'a> Setup<'a> {
    fn read(text: &'a str) -> Self {
        let mut setup = Self::default();
        for line in text.split('\n') {
            setup.canary_is_public |=
                !line.starts_with("secret ") && line.to_ascii_lowercase().contains(CANARY);
            let (kind, rest) = line.split_once(' ').unwrap_or((line, ""));
            let place = |name, template| Place { kind, name, template };
            match kind {
                "bearer" => setup.places.push(place("authorization", "Bearer {}")),
                "header" | "query" => setup.places.push(place(rest, "{}")),
                "custom-header" | "custom-query" => {
                    let (name, template) = rest.split_once(' ').unwrap_or((rest, "{}"));
                    if kind == "custom-query" || name.parse::<HeaderName>().is_ok() {
                        setup.places.push(place(name, template));
                    }
                }
                "allowed" => setup.allowed.push(rest),
                "cleartext" => setup.cleartext.push(rest),
                "secret" => setup.secrets.push(rest),
                _ => {}
            }
        }
        if setup.places.is_empty() {
            setup.places.push(Place { kind: "bearer", name: "authorization", template: "Bearer {}" });
        }
        setup
    }

    fn pool(&self) -> Option<KeyPool> {
        let keys = (1..).zip(&self.secrets).map(|(number, secret)| (format!("key-{number}"), *secret));
        let inject = self.places.iter().map(Place::inject).reduce(Inject::and).unwrap_or_else(Inject::bearer);
        let builder = KeyPool::builder().keys(keys).inject(inject);
        let builder = if self.allowed.is_empty() { builder } else { builder.allowed_hosts(&self.allowed) };
        let builder = builder.allow_cleartext_to(&self.cleartext);
        self.assert_hidden(&builder);
        match builder.build() {
            Ok(pool) => {
                self.assert_hidden(pool.rejected());
                Some(pool)
            }
            Err(error) => {
                let said = error.to_string();
                assert!(said.contains("is not a header name") || said.contains("is not a host"), "{error:?}");
                None
            }
        }
    }

    /// Returns the ids and secrets of all usable keys.
    fn keys(&self) -> Vec<(String, &'a str)> {
        let mut keys: Vec<(String, &str)> = Vec::new();
        for (number, secret) in (1..).zip(&self.secrets) {
            if self.is_usable(secret) && !keys.iter().any(|(_, other)| other == secret) {
                keys.push((format!("key-{number}"), secret));
            }
        }
        keys
    }

    fn is_usable(&self, secret: &str) -> bool {
        let mut headers = self.headers();
        can_be_sent(secret)
            && headers.all(|header| HeaderValue::from_bytes(header.filled(secret).as_bytes()).is_ok())
    }

    fn headers(&self) -> impl Iterator<Item = Place<'a>> {
        self.places.iter().copied().filter(|place| place.kind != "query" && place.kind != "custom-query")
    }

    fn query(&self, secret: &str) -> Vec<(String, String)> {
        let query = self.places.iter().filter(|place| ["query", "custom-query"].contains(&place.kind));
        query.map(|place| (place.name.to_owned(), place.filled(secret))).collect()
    }

    fn assert_hidden(&self, what: &(impl Debug + ?Sized)) {
        let shown = format!("{what:?}");
        assert!(self.canary_is_public || !shown.contains(CANARY), "{shown}");
    }

    /// Sends the request once with each key.
    fn check_requests<R>(&self, pool: &KeyPool, request: impl Fn() -> R)
    where
        KeyRotation<Echo>: Service<R, Response = Response<Seen>, Error = Error<Infallible>>,
        Seen: for<'r> From<&'r R>,
    {
        let client = KeyRotationLayer::new(pool).expose_key().layer(Echo);
        let keys = self.keys();
        let ids = pool.stats().keys.into_iter().map(|key| key.id.to_string());
        assert!(ids.eq(keys.iter().map(|(id, _)| id.clone())));

        let before = Seen::from(&request());
        let ruling = self.ruling(&before);
        if keys.is_empty() && ruling == Ruling::Key {
            let error = now(client.clone().oneshot(request())).unwrap_err();
            assert!(NoKeyAvailable::find(&error).is_some_and(|error| error.is_empty_pool()));
        }
        for (id, secret) in keys {
            match (&ruling, now(client.clone().oneshot(request()))) {
                (Ruling::Key, Ok(response)) => {
                    let ServedBy(served_by) = response.extensions().get().unwrap();
                    assert_eq!(served_by.as_str(), id);
                    self.assert_keyed(&before, response.body(), secret);
                }
                (Ruling::PassThrough, Ok(response)) => assert_eq!(response.body(), &before),
                (Ruling::Refused, Err(Error::Inject(error))) if error.is_cleartext() => {
                    let host_is_canary = before.host.as_ref().is_some_and(|host| host.contains(CANARY));
                    let shown = format!("{error} {error:?}").to_ascii_lowercase();
                    assert!(host_is_canary || !shown.contains(CANARY), "{shown}");
                }
                (Ruling::Key, Err(Error::Inject(error)))
                    if !error.is_cleartext() && !error.is_uri_too_long() =>
                {
                    assert!(!self.query(secret).is_empty() && !before.has_path, "{before:?}");
                }
                (_, outcome) => panic!("ruling {ruling:?}, but outcome {outcome:?}"),
            }
        }
    }

    fn assert_keyed(&self, before: &Seen, sent: &Seen, secret: &str) {
        assert_eq!((&before.method, &before.address), (&sent.method, &sent.address));
        let (mut others, mut sent_others) = (before.headers.clone(), sent.headers.clone());
        let mut expected = HeaderMap::new();
        for header in self.headers() {
            let name: HeaderName = header.name.parse().unwrap();
            others.remove(&name);
            sent_others.remove(&name);
            expected.insert(name, HeaderValue::from_bytes(header.filled(secret).as_bytes()).unwrap());
        }
        assert_eq!(others, sent_others);
        for (name, value) in &expected {
            let values: Vec<_> = sent.headers.get_all(name).iter().collect();
            assert_eq!(values, [value]);
            assert!(values[0].is_sensitive());
        }

        let own = self.query(secret);
        if own.is_empty() {
            return assert_eq!(before.query, sent.query);
        }
        let is_own = |pair: &str| own.iter().any(|(name, _)| decoded(pair).0 == *name);
        let kept: Vec<_> = pairs(&before.query).filter(|pair| !is_own(pair)).collect();
        let sent: Vec<_> = pairs(&sent.query).collect();
        let (others, added) = sent.split_at(kept.len());
        assert_eq!(others, kept);
        let added: Vec<_> = added.iter().map(|pair| decoded(pair)).collect();
        assert_eq!(added, own);
    }

    fn ruling(&self, request: &Seen) -> Ruling {
        let Some(host) = request.host.as_deref().filter(|host| !host.is_empty()) else {
            return Ruling::PassThrough;
        };
        let listed = |hosts: &[&str], default_port| {
            let port = request.port.unwrap_or(default_port);
            hosts.iter().any(|listed| lists(listed, host, port))
        };
        let is_fit_for_cleartext = is_loopback(host) || listed(&self.cleartext, 80);
        let is_allowed = listed(&self.allowed, if request.is_cleartext { 80 } else { 443 });
        if !self.allowed.is_empty() && !is_allowed {
            Ruling::PassThrough
        } else if request.is_relative && self.allowed.is_empty() && !is_fit_for_cleartext {
            Ruling::PassThrough
        } else if request.is_cleartext && !is_fit_for_cleartext {
            Ruling::Refused
        } else {
            Ruling::Key
        }
    }
}

impl Place<'_> {
    fn inject(&self) -> Inject {
        let (name, template) = (self.name.to_owned(), self.template.to_owned());
        match self.kind {
            "bearer" => Inject::bearer(),
            "header" => Inject::header(name),
            "query" => Inject::query(name),
            "custom-header" => {
                let name: HeaderName = name.parse().unwrap();
                Inject::custom(move |secret, credentials| {
                    credentials.header(name.clone(), &template.replace("{}", secret))
                })
            }
            _ => Inject::custom(move |secret, credentials| {
                credentials.query(&name, &template.replace("{}", secret));
                Ok(())
            }),
        }
    }

    fn filled(&self, secret: &str) -> String {
        self.template.replace("{}", secret)
    }
}

fn pairs(query: &Option<String>) -> impl Iterator<Item = &str> {
    query.as_deref().unwrap_or_default().split('&').filter(|pair| !pair.is_empty())
}

fn decoded(pair: &str) -> (String, String) {
    let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
    let decoded = |text| percent_decode_str(text).decode_utf8_lossy().into_owned();
    (decoded(name), decoded(value))
}

fn host_and_port(authority: &str) -> (String, Option<u16>) {
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, port.parse().ok()),
        _ => (authority, None),
    };
    (host.to_ascii_lowercase(), port)
}

/// Returns whether an entry of a host list matches this host and port.
fn lists(entry: &str, host: &str, port: u16) -> bool {
    let (name, only_port) = host_and_port(entry);
    let (name, host) = (name.trim_end_matches('.'), host.strip_suffix('.').unwrap_or(host));
    let is_it = match name.strip_prefix("*.") {
        Some(domain) => {
            host.strip_suffix(domain).is_some_and(|below| below.len() > 1 && below.ends_with('.'))
        }
        None => name == host,
    };
    is_it && only_port.is_none_or(|only| only == port)
}

fn is_loopback(host: &str) -> bool {
    match host.trim_matches(['[', ']']).parse::<IpAddr>() {
        Ok(address) => address.to_canonical().is_loopback(),
        Err(_) => {
            host == "localhost" || host.strip_suffix(".localhost").is_some_and(|below| !below.is_empty())
        }
    }
}
