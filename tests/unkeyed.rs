//! Requests that get no key: they are sent without one, counted, and logged once for each host.

mod support;

use std::{
    convert::Infallible,
    sync::{Arc, Mutex},
};

use http::{HeaderMap, Request, Response, Uri, header};
use support::*;
use tower::{Layer, Service, ServiceBuilder, ServiceExt, service_fn};
use tower_key_rotation::{Failover, KeyPool, KeyRotationLayer, clock::ManualClock};

type Seen = Arc<Mutex<Vec<(Uri, HeaderMap)>>>;

/// A client that notes what it is sent.
fn notes() -> (
    Seen,
    impl Service<Request<String>, Response = Response<String>, Error = Infallible, Future: Send> + Clone + Send,
) {
    let seen = Seen::default();
    let client = service_fn({
        let seen = seen.clone();
        move |request: Request<String>| {
            let (head, body) = request.into_parts();
            seen.lock().unwrap().push((head.uri, head.headers));
            std::future::ready(Ok(Response::new(body)))
        }
    });
    (seen, client)
}

fn request(uri: &str) -> Request<String> {
    Request::post(uri).body("prompt".to_owned()).unwrap()
}

fn from_host(host: &str) -> Request<String> {
    Request::post("/v1").header(header::HOST, host).body("prompt".to_owned()).unwrap()
}

/// What the client of octocrab and of tonic do: a layer further in completes the URI.
fn completes_uris<S>(
    inner: S,
) -> impl Service<Request<String>, Response = S::Response, Error = S::Error> + Clone
where
    S: Service<Request<String>> + Clone,
{
    inner.map_request(|mut request: Request<String>| {
        let mut parts = request.uri().clone().into_parts();
        parts.scheme = Some(http::uri::Scheme::HTTP);
        parts.authority = Some(http::uri::Authority::from_static("api.example.com"));
        *request.uri_mut() = Uri::from_parts(parts).unwrap();
        request
    })
}

#[tokio::test]
async fn s06_uri_layers_inside_get_no_key() {
    let (logs, _guard) = Logs::capture();
    for hosts in [None, Some("api.example.com")] {
        let pool = builder(["alpha"], &ManualClock::new());
        let pool = hosts.into_iter().fold(pool, |pool, host| pool.allowed_hosts([host])).build().unwrap();
        let (seen, client) = notes();
        let client = ServiceBuilder::new()
            .layer(KeyRotationLayer::new(&pool))
            .layer_fn(completes_uris)
            .service(client);
        for _ in 0..3 {
            client.clone().oneshot(request("/v1/chat")).await.unwrap();
        }
        let seen = seen.lock().unwrap();
        assert_eq!(seen[0].0, "http://api.example.com/v1/chat");
        assert!(seen.iter().all(|(_, headers)| !headers.contains_key(header::AUTHORIZATION)));
        assert_eq!((pool.stats().unkeyed, stats_of(&pool, "alpha").requests), (3, 0));
    }
    assert_eq!(logs.count("its URI names no host"), 2, "once for each pool: {}", logs.text());
}

#[tokio::test]
async fn s06_uri_layers_outside_get_key_or_refusal() {
    let clock = ManualClock::new();
    let (seen, client) = notes();
    let stack = |pool: &KeyPool| {
        ServiceBuilder::new()
            .layer_fn(completes_uris)
            .layer(KeyRotationLayer::new(pool))
            .service(client.clone())
    };
    let pool = builder(["alpha"], &clock).allow_cleartext_to(["api.example.com"]).build().unwrap();
    stack(&pool).oneshot(request("/v1")).await.unwrap();
    assert_eq!(seen.lock().unwrap()[0].1[header::AUTHORIZATION], "Bearer sk-alpha");
    // The cleartext check sees where the request goes.
    let pool = builder(["alpha"], &clock).build().unwrap();
    assert!(stack(&pool).oneshot(request("/v1")).await.is_err());
    assert_eq!((seen.lock().unwrap().len(), pool.stats().unkeyed), (1, 0));
}

#[tokio::test]
async fn s06_host_headers_alone_need_listed_hosts() {
    let clock = ManualClock::new();
    let open = || builder(["alpha"], &clock);
    for (pool, host, keyed) in [
        (open(), "api.example.com", false),
        (open(), "localhost:8080", true),
        (open(), "[::1]:8080", true),
        (open(), "", false),
        (open().allowed_hosts(["api.example.com"]), "", false),
        (open().allowed_hosts(["api.example.com:443"]), "api.example.com", true),
        (open().allowed_hosts(["api.example.com"]), "api.example.com", true),
        (open().allow_cleartext_to(["api.example.com"]), "api.example.com", true),
        (open().allow_cleartext_to(["api.example.com"]), "other.example.com", false),
        (open().allowed_hosts(["api.example.com"]), "localhost", false),
    ] {
        let pool = pool.build().unwrap();
        let (seen, client) = notes();
        KeyRotationLayer::new(&pool).layer(client).oneshot(from_host(host)).await.unwrap();
        assert_eq!(seen.lock().unwrap()[0].1.contains_key(header::AUTHORIZATION), keyed, "{host}");
        assert_eq!(pool.stats().unkeyed, u64::from(!keyed), "{host}");
    }
}

#[tokio::test]
async fn s06_each_disallowed_host_is_logged_once() {
    let (logs, _guard) = Logs::capture();
    let pool = builder(["alpha"], &ManualClock::new()).allowed_hosts(["api.example.com"]).build().unwrap();
    let (seen, client) = notes();
    let client = KeyRotationLayer::new(&pool).failover(Failover::attempts(3)).layer(client);
    for host in ["a.test", "b.test", "A.test", "a.test", "api.example.com"] {
        client.clone().oneshot(request(&format!("https://{host}/v1?secret=1"))).await.unwrap();
    }
    assert_eq!((seen.lock().unwrap().len(), pool.stats().unkeyed), (5, 4));
    assert_eq!(logs.count("its host is not in `allowed_hosts`"), 2, "{}", logs.text());
    assert_eq!(logs.count("a.test"), 1);
    assert!(!logs.text().contains("secret=1"), "the path and the query are nobody's business");
}

#[tokio::test]
async fn s06_at_most_64_hosts_are_logged() {
    let (logs, _guard) = Logs::capture();
    let pool = builder(["alpha"], &ManualClock::new()).allowed_hosts(["api.example.com"]).build().unwrap();
    let client = KeyRotationLayer::new(&pool).layer(notes().1);
    for number in (0..1_000).chain([0]) {
        client.clone().oneshot(request(&format!("https://{number}.test"))).await.unwrap();
    }
    assert_eq!((logs.count("its host is not in `allowed_hosts`"), pool.stats().unkeyed), (64, 1_001));
}

#[tokio::test]
async fn s06_warnings_about_relative_uris_give_advice() {
    let (logs, _guard) = Logs::capture();
    let pool = builder(["alpha"], &ManualClock::new()).build().unwrap();
    let client = KeyRotationLayer::new(&pool).layer(notes().1);
    client.clone().oneshot(request("/v1")).await.unwrap();
    client.oneshot(from_host("api.example.com")).await.unwrap();
    assert_eq!(logs.count("Put `KeyRotationLayer` inside the layer that completes URIs"), 1);
    assert_eq!(logs.count("Name the host in `allowed_hosts`"), 1);
}
