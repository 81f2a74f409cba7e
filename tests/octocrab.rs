//! `octocrab`, a client with a body type of its own and a layer that completes URIs.

mod support;

use bytes::Bytes;
use http::Uri;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use octocrab::{AuthState, OctoBody, Octocrab, OctocrabBuilder, service::middleware::base_uri::BaseUriLayer};
use support::*;
use tower::{Layer, ServiceBuilder};
use tower_key_rotation::{KeyPool, clock::ManualClock};

fn two_keys() -> KeyPool {
    pool(["alpha", "beta"], &ManualClock::new())
}

fn base(server: &Server) -> BaseUriLayer {
    BaseUriLayer::new(Uri::try_from(server.url().trim_end_matches("/v1")).unwrap())
}

fn http_client() -> Client<hyper_util::client::legacy::connect::HttpConnector, OctoBody> {
    Client::builder(TokioExecutor::new()).build_http()
}

#[tokio::test]
async fn f34_octocrabs_limited_post_is_never_resent_empty() {
    let pool = two_keys();
    let server = Server::start(|request| async move {
        answer(if key_of(&request) == Some("alpha") { 429 } else { 201 }, r#"{"message":"limited"}"#)
    })
    .await;
    let client = ServiceBuilder::new().layer(base(&server)).layer(failover(&pool)).service(http_client());
    let octocrab = OctocrabBuilder::new_empty().with_service(client).with_auth(AuthState::None);
    let octocrab: Octocrab = octocrab.build().unwrap();

    let issue = serde_json::json!({ "title": "an issue" });
    let response = octocrab._post("/repos/owner/name/issues", Some(&issue)).await.unwrap();
    assert_eq!(response.status(), 429);
    let bodies: Vec<Bytes> = server.requests().iter().map(|request| request.body().clone()).collect();
    assert_eq!(bodies, [issue.to_string()]);
    // A request without a body is sent again.
    pool.reset("alpha").await.unwrap();
    let response = octocrab._get("/repos/owner/name").await.unwrap();
    assert_eq!((response.status().as_u16(), server.count()), (201, 2));
}

#[tokio::test]
async fn s06_octocrab_with_base_uri_inside_gets_no_key() {
    let (logs, _guard) = Logs::capture();
    let pool = two_keys();
    let server = Server::limiting([]).await;
    let client = failover(&pool).layer(base(&server).layer(http_client()));
    let octocrab = OctocrabBuilder::new_empty().with_service(client).with_auth(AuthState::None);
    let octocrab: Octocrab = octocrab.build().unwrap();
    octocrab._get("/rate_limit").await.unwrap();
    assert_eq!(server.keys(), ["none"]);
    assert_eq!(pool.stats().unkeyed, 1);
    assert_eq!(logs.count("its URI names no host"), 1, "{}", logs.text());
}
