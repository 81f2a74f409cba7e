//! Two pools in one stack, or one behind another: each acts on refusals of its own keys only.

mod support;

use std::{error::Error as StdError, io};

use http::{Request, Response};
use support::*;
use tower::{BoxError, Layer, ServiceBuilder, ServiceExt, service_fn, timeout::TimeoutLayer};
use tower_key_rotation::{
    Error, Failover, Inject, KeyPool, KeyRotationLayer, NoKeyAvailable, Status, clock::ManualClock,
};

/// Keys in a header of their own.
fn pool_in(header: &str, keys: usize, clock: &ManualClock) -> KeyPool {
    let keys = (0..keys).map(|number| (format!("{header}-{number}"), format!("sk-{header}-{number}")));
    KeyPool::builder().keys(keys).inject(Inject::header(header)).clock(clock.clone()).build().unwrap()
}

fn two_pools(inner: usize) -> (KeyPool, KeyPool) {
    let clock = ManualClock::new();
    (pool_in("x-outer", 2, &clock), pool_in("x-inner", inner, &clock))
}

#[tokio::test]
async fn f36_nested_failovers_send_three_requests() {
    let (outer, inner) = two_pools(12);
    let server = Server::answering(|| answer(429, "too many requests")).await;
    let client = ServiceBuilder::new()
        .layer(KeyRotationLayer::new(&outer).failover(Failover::attempts(3)))
        .layer(KeyRotationLayer::new(&inner).failover(Failover::attempts(3)))
        .service(http());
    let response = get(&client, &server.url()).await.unwrap();
    assert_eq!(response.status(), 429);
    assert_eq!(response.text().await.unwrap(), "too many requests");
    assert_eq!(server.count(), 3);
    assert_eq!((inner.stats().rate_limited, outer.stats().rate_limited), (3, 0));
}

#[tokio::test]
async fn f36_nested_middlewares_send_three_requests() {
    let (outer, inner) = two_pools(12);
    let server = Server::answering(|| answer(429, "")).await;
    let client =
        reqwest_middleware::ClientBuilder::new(http()).with(failover(&outer)).with(failover(&inner)).build();
    assert_eq!(client.get(server.url()).send().await.unwrap().status(), 429);
    assert_eq!(server.count(), 3);
    assert_eq!((inner.stats().rate_limited, outer.stats().rate_limited), (3, 0));
}

#[tokio::test]
async fn f36_without_failover_only_the_inner_key_rests() {
    let (outer, inner) = two_pools(1);
    let server = Server::answering(|| answer(429, "")).await;
    let client = ServiceBuilder::new()
        .layer(KeyRotationLayer::new(&outer).read_error_bodies(1_000))
        .layer(KeyRotationLayer::new(&inner))
        .service(http());
    assert_eq!(status(&client, &server.url()).await, 429);
    assert_eq!((inner.stats().rate_limited, outer.stats().rate_limited), (1, 0));
}

/// A request that the inner pool gives no key is the outer pool's.
#[tokio::test]
async fn f36_refusals_without_inner_key_are_the_outer_pools() {
    let clock = ManualClock::new();
    let outer = pool_in("x-outer", 2, &clock);
    let inner =
        KeyPool::builder().key("elsewhere", "sk-1").allowed_hosts(["api.example.com"]).build().unwrap();
    let server = Server::start(|request| async move {
        answer(if request.headers()["x-outer"] == "sk-x-outer-0" { 429 } else { 200 }, "")
    })
    .await;
    let client = ServiceBuilder::new().layer(failover(&outer)).layer(failover(&inner)).service(http());
    assert_eq!(status(&client, &server.url()).await, 200);
    assert_eq!((server.count(), stats_of(&outer, "x-outer-0").status), (2, Status::RateLimited));
}

#[tokio::test]
async fn f36_the_outer_layer_finds_the_inner_no_key() {
    let (outer, inner) = two_pools(0);
    let client = ServiceBuilder::new().layer(failover(&outer)).layer(failover(&inner)).service(http());
    let error = get(&client, "http://127.0.0.1:1").await.unwrap_err();
    assert!(NoKeyAvailable::find(&error).expect("it is found").is_empty_pool());
    assert!(matches!(&error, Error::Inner(Error::NoKeyAvailable(_))), "{error:?}");
    assert_eq!(outer.stats().rate_limited, 0);
}

#[tokio::test]
async fn f36_errors_of_the_inner_layer_keep_their_type() {
    let (outer, inner) = two_pools(1);
    let fails =
        service_fn(async |_: Request<String>| Err::<Response<String>, _>(io::Error::other("no route")));
    let client = ServiceBuilder::new().layer(failover(&outer)).layer(failover(&inner)).service(fails);
    let request = Request::get("https://api.example.com").body(String::new()).unwrap();
    let error = client.oneshot(request).await.unwrap_err();
    assert!(NoKeyAvailable::find(&error).is_none());
    assert!(matches!(error.flatten(), Error::Inner(error) if error.to_string() == "no route"));
}

#[tokio::test]
async fn no_key_available_is_found_in_boxed_errors() {
    let (outer, inner) = two_pools(0);
    let client = ServiceBuilder::new()
        .layer(KeyRotationLayer::new(&outer))
        .layer(TimeoutLayer::new(MINUTE))
        .layer(KeyRotationLayer::new(&inner))
        .service(http());
    let error: Error<BoxError> = get(&client, "http://127.0.0.1:1").await.unwrap_err();
    assert!(NoKeyAvailable::find(&*error.into_inner()).is_some());
    let own: Error<BoxError> = Error::Inner("no route".into());
    assert!(NoKeyAvailable::find(&*own.into_inner()).is_none());
}

#[tokio::test]
async fn unsent_requests_name_the_reason_in_their_source() {
    let (_, empty) = two_pools(0);
    let error = get(&KeyRotationLayer::new(&empty).layer(http()), "http://127.0.0.1:1").await.unwrap_err();
    assert_eq!(error.to_string(), "the request was not sent");
    assert_eq!(error.source().unwrap().to_string(), "no key available: the pool is empty");
    let pool = pool(["alpha"], &ManualClock::new());
    let error = get(&rotating(&pool), "http://api.example.com").await.unwrap_err();
    assert_eq!(error.to_string(), "the request was not sent");
    assert!(error.source().unwrap().to_string().contains("api.example.com"));
}
