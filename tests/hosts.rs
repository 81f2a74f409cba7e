//! Which hosts get a key, by the patterns of `allowed_hosts` and `allow_cleartext_to`. `unkeyed.rs` shows what becomes
//! of requests that get none.

use std::{convert::Infallible, future::ready};

use futures_util::FutureExt;
use http::{Request, Response, header::AUTHORIZATION};
use tower::{Layer, ServiceExt, service_fn};
use tower_key_rotation::{Error, KeyPool, KeyPoolBuilder, KeyRotationLayer};

/// How a request goes out.
#[derive(Debug, PartialEq)]
enum Sent {
    WithKey,
    WithoutKey,
    NotAtAll,
}

use Sent::{NotAtAll, WithKey, WithoutKey};

fn builder() -> KeyPoolBuilder {
    KeyPool::builder().key("alpha", "sk-1")
}

fn allowed(host: &str) -> KeyPool {
    builder().allowed_hosts([host]).build().unwrap()
}

fn sent(pool: &KeyPool, url: &str) -> Sent {
    let client = service_fn(|request: Request<()>| {
        ready(Ok::<_, Infallible>(Response::new(request.headers().contains_key(AUTHORIZATION))))
    });
    let request = Request::get(url).body(()).unwrap();
    match KeyRotationLayer::new(pool).layer(client).oneshot(request).now_or_never().unwrap() {
        Ok(response) if *response.body() => WithKey,
        Ok(_) => WithoutKey,
        Err(Error::Inject(error)) if error.is_cleartext() => NotAtAll,
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn hosts_match_by_name_wildcard_and_port() {
    for (host, url, expected) in [
        ("api.example.com", "https://API.example.com./v1", WithKey),
        ("api.example.com", "https://api.example.com:8443", WithKey),
        ("api.example.com", "https://example.com", WithoutKey),
        ("api.example.com", "https://api.example.com.evil.test", WithoutKey),
        ("api.example.com", "https://xapi.example.com", WithoutKey),
        ("api.example.com", "https://evil.test/?api.example.com", WithoutKey),
        ("api.example.com", "https://api.example.com@evil.test/", WithoutKey),
        ("*.example.com", "https://a.b.Example.com", WithKey),
        ("*.example.com", "https://example.com", WithoutKey),
        ("*.example.com", "https://badexample.com", WithoutKey),
        ("api.example.com:443", "https://api.example.com", WithKey),
        ("api.example.com:443", "https://api.example.com:8443", WithoutKey),
    ] {
        assert_eq!(sent(&allowed(host), url), expected, "{host}: {url}");
    }
}

#[test]
fn s03_cleartext_goes_to_loopback_or_named_hosts() {
    let pool = builder().allow_cleartext_to(["gateway.internal"]).build().unwrap();
    for (url, expected) in [
        ("http://127.0.0.1:8080", WithKey),
        ("http://[::1]", WithKey),
        ("http://[::ffff:127.0.0.1]", WithKey),
        ("http://localhost", WithKey),
        ("http://a.LOCALHOST", WithKey),
        ("http://gateway.internal", WithKey),
        ("https://example.com", WithKey),
        ("http://example.com", NotAtAll),
        ("http://10.0.0.1", NotAtAll),
        ("http://notlocalhost", NotAtAll),
        ("http://.localhost", NotAtAll),
        ("http://127.0.0.1.evil.test", NotAtAll),
    ] {
        assert_eq!(sent(&pool, url), expected, "{url}");
    }
}

#[test]
fn invalid_host_patterns_are_refused() {
    for wrong in [
        "",
        "https://api.example.com",
        "api.example.com/v1",
        "*",
        ".",
        "*..",
        "*.*.com",
        "me@host",
        "host:",
        "host:99999",
        "host:80a",
    ] {
        assert!(builder().allowed_hosts([wrong]).build().is_err(), "{wrong}");
        assert!(builder().allow_cleartext_to([wrong]).build().is_err(), "{wrong}");
    }
}
