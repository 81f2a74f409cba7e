//! The layers in the stacks that people build: over which clients, under which layers.

mod support;

use std::{convert::Infallible, time::Duration};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Empty, Full};
use hyper::body::Incoming;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use support::{Server, failover, get_request, http, pool};
use tower::{
    BoxError, Service, ServiceBuilder, ServiceExt, buffer::BufferLayer, limit::ConcurrencyLimitLayer,
    service_fn, timeout::TimeoutLayer, util::BoxCloneService,
};
use tower_key_rotation::{
    BuildError, Error, Failover, InjectError, KeyPool, KeyRotation, KeyRotationLayer, NoKeyAvailable,
    OperateError, RecoveryHandle, Rejected, UnusableSecret,
    classify::{LlmGateway, TooManyRequests},
    clock::ManualClock,
    store::StoreError,
};

/// Two keys, of which the server limits one, so that every stack has something to do.
async fn two_keys() -> (KeyPool, Server) {
    (pool(["alpha", "beta"], &ManualClock::new()), Server::limiting(["alpha"]).await)
}

/// Sends one request, which the stack has to bring through with the key that is left.
async fn answered<S>(mut client: S, server: &Server) -> S::Response
where
    S: Service<reqwest::Request>,
    S::Error: Into<BoxError>,
{
    let request = get_request(&server.url());
    let ready = client.ready().await.map_err(Into::into).unwrap();
    ready.call(request).await.map_err(Into::into).unwrap()
}

#[tokio::test]
async fn over_reqwest() {
    let (pool, server) = two_keys().await;
    let client = ServiceBuilder::new()
        .layer(KeyRotationLayer::new(&pool).failover(Failover::attempts(3)))
        .service(http());
    assert_eq!(answered(client, &server).await.status(), 200);
    assert_eq!(server.keys(), ["alpha", "beta"]);
}

#[tokio::test]
async fn over_reqwest_with_middleware_of_its_own() {
    let (pool, server) = two_keys().await;
    let inner = reqwest_middleware::ClientBuilder::new(http()).build();
    let client = ServiceBuilder::new()
        .layer(KeyRotationLayer::new(&pool).failover(Failover::attempts(3)))
        .service(inner);
    assert_eq!(answered(client, &server).await.status(), 200);
}

#[tokio::test]
async fn as_a_middleware_of_reqwest() {
    let (pool, server) = two_keys().await;
    let client = reqwest_middleware::ClientBuilder::new(http()).with(failover(&pool)).build();
    assert_eq!(client.get(server.url()).send().await.unwrap().status(), 200);
}

#[tokio::test]
async fn over_a_hyper_client() {
    let (pool, server) = two_keys().await;
    let mut client = ServiceBuilder::new()
        .layer(KeyRotationLayer::new(&pool).failover(Failover::attempts(3)))
        .service(Client::builder(TokioExecutor::new()).build_http::<Full<Bytes>>());
    let request = Request::post(server.url()).body(Full::from("ask")).unwrap();
    let response = client.ready().await.unwrap().call(request).await.unwrap();
    assert_eq!(response.status(), 200);
    response.into_body().collect().await.unwrap();
    assert_eq!(server.keys(), ["alpha", "beta"]);
}

#[tokio::test]
async fn hypers_body_type_passes_through_without_failover() {
    let (pool, server) = two_keys().await;
    let mut client = ServiceBuilder::new()
        .layer(KeyRotationLayer::new(&pool))
        .service(Client::builder(TokioExecutor::new()).build_http::<Empty<Bytes>>());
    let request = Request::get(server.url()).body(Empty::new()).unwrap();
    let response: Response<Incoming> = client.ready().await.unwrap().call(request).await.unwrap();
    assert_eq!(response.status(), 429);
    assert_eq!(server.keys(), ["alpha"]);
}

#[tokio::test]
async fn layers_compose_under_buffer_limit_timeout_and_box() {
    let (pool, server) = two_keys().await;
    let client = ServiceBuilder::new()
        .layer(BufferLayer::new(8))
        .layer(ConcurrencyLimitLayer::new(1))
        .layer(TimeoutLayer::new(Duration::from_secs(10)))
        .layer_fn(BoxCloneService::new)
        .layer(KeyRotationLayer::new(&pool).failover(Failover::attempts(3)))
        .service(http());
    assert_eq!(answered(client.clone(), &server).await.status(), 200);
    assert_eq!(answered(client, &server).await.status(), 200);
    assert_eq!(server.keys(), ["alpha", "beta", "beta"]);
}

#[tokio::test]
async fn over_a_buffer_a_limit_and_a_timeout() {
    let (pool, server) = two_keys().await;
    let client = ServiceBuilder::new()
        .map_err(Error::into_inner)
        .layer(KeyRotationLayer::new(&pool).failover(Failover::attempts(3)))
        .layer(BufferLayer::new(8))
        .layer(ConcurrencyLimitLayer::new(1))
        .layer(TimeoutLayer::new(Duration::from_secs(10)))
        .service(http());
    assert_eq!(answered(client, &server).await.status(), 200);
    assert_eq!(server.keys(), ["alpha", "beta"]);
}

#[tokio::test]
async fn over_a_function_of_any_body() {
    struct NotClone(&'static str);
    let pool = pool(["alpha"], &ManualClock::new());
    let mut client = ServiceBuilder::new().layer(KeyRotationLayer::new(&pool)).service(service_fn(
        async |request: Request<NotClone>| Ok::<_, Infallible>(Response::new(request.into_body().0.len())),
    ));
    let request = Request::get("https://api.example.com").body(NotClone("four")).unwrap();
    assert_eq!(client.ready().await.unwrap().call(request).await.unwrap().into_body(), 4);
}

type FailingOver<S> = KeyRotation<S, TooManyRequests, Failover>;

#[test]
fn pool_layers_and_services_are_send_and_shareable() {
    fn shared<T: Send + Sync + Clone + 'static>() {}
    fn sent<T: Send + 'static>() {}
    shared::<KeyPool>();
    shared::<KeyRotationLayer>();
    shared::<KeyRotationLayer<LlmGateway, Failover>>();
    shared::<KeyRotation<reqwest::Client>>();
    shared::<KeyRotation<reqwest::Client, LlmGateway>>();
    shared::<FailingOver<reqwest::Client>>();
    shared::<FailingOver<Client<hyper_util::client::legacy::connect::HttpConnector, Full<Bytes>>>>();
    shared::<NoKeyAvailable>();
    sent::<<KeyRotation<reqwest::Client, LlmGateway> as Service<reqwest::Request>>::Future>();
    sent::<<FailingOver<reqwest::Client> as Service<reqwest::Request>>::Future>();
    sent::<RecoveryHandle>();
}

#[test]
fn every_error_can_go_on_in_a_box() {
    fn boxed<T: std::error::Error + Send + Sync + 'static>() {}
    boxed::<Error<reqwest::Error>>();
    boxed::<Error<reqwest_middleware::Error>>();
    boxed::<Error<hyper_util::client::legacy::Error>>();
    boxed::<NoKeyAvailable>();
    boxed::<InjectError>();
    boxed::<BuildError>();
    boxed::<Rejected>();
    boxed::<UnusableSecret>();
    boxed::<OperateError>();
    boxed::<StoreError>();
}
