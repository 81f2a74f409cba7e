//! The webhook: what it is told.

mod support;

use serde_json::{Value, json};
use support::{gateway::Gateway, *};

#[tokio::test]
async fn a_webhook_is_told_of_a_revoked_key() {
    let upstream = Server::answering(|| answer(401, r#"{"error":{"code":"invalid_api_key"}}"#)).await;
    let receiver = Server::answering(|| answer(204, "")).await;
    let url = format!("http://{}/hook", receiver.address());
    let arguments = ["--webhook", &url, "--pace=false"];
    let gateway = Gateway::before(upstream.address(), &["alpha", "beta"], arguments).await;
    // The last key only rests, however plainly it is refused.
    assert_eq!(http().get(gateway.url("/")).send().await.unwrap().status(), 401);
    eventually("it is told", || receiver.count() == 2).await;
    let told: Vec<Value> =
        receiver.requests().iter().map(|request| serde_json::from_slice(request.body()).unwrap()).collect();
    assert_eq!((&told[0]["event"], &told[0]["key"]), (&json!("key_revoked"), &json!("alpha")));
    assert_eq!((&told[1]["event"], &told[1]["healthy"]), (&json!("no_healthy_key"), &json!(0)));
    assert_eq!(receiver.requests()[0].headers()["content-type"], "application/json");
}

#[tokio::test]
async fn a_failing_webhook_is_tried_again() {
    let upstream = Server::answering(|| answer(200, "")).await;
    let tried = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let receiver = Server::answering(move || {
        let is_first = tried.fetch_add(1, std::sync::atomic::Ordering::Relaxed) == 0;
        answer(if is_first { 500 } else { 200 }, "")
    })
    .await;
    let url = format!("http://{}/hook", receiver.address());
    let arguments = ["--webhook", &url, "--webhook-below", "2"];
    let _gateway = Gateway::before(upstream.address(), &["alpha"], arguments).await;
    eventually("it is told", || receiver.count() == 2).await;
    let told: Value = serde_json::from_slice(receiver.requests()[1].body()).unwrap();
    assert_eq!(told["event"], "few_healthy_keys");
}
