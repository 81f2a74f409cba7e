//! The gateway's metrics, and the dashboard's use of them.

mod support;

use std::collections::BTreeSet;

use reqwest::{StatusCode, header::AUTHORIZATION};
use serde_json::Value;
use support::{gateway::Gateway, *};

async fn metrics(gateway: &Gateway) -> String {
    let response = http().get(gateway.admin_url("/metrics")).send().await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    assert!(response.headers()["content-type"].to_str().unwrap().starts_with("text/plain"));
    response.text().await.unwrap()
}

#[tokio::test]
async fn prometheus_metrics_show_key_status_and_request_times() {
    let upstream = Server::limiting(["alpha"]).await;
    let gateway = Gateway::before(upstream.address(), &["alpha", "beta"], ["--pace=false"]).await;
    for _ in 0..3 {
        assert_eq!(http().get(gateway.url("/v1")).send().await.unwrap().status(), StatusCode::OK);
    }
    let metrics = metrics(&gateway).await;
    for line in [
        r#"key_rotation_keys{pool="default",status="healthy"} 1"#,
        r#"key_rotation_keys{pool="default",status="rate_limited"} 1"#,
        r#"key_rotation_marks_total{pool="default",reason="rate_limited"} 1"#,
        r#"key_rotation_picks_total{pool="default"} 4"#,
        r#"key_rotation_failovers_total{pool="default"} 1"#,
        r#"gateway_request_seconds_count{pool="default",status="200"} 3"#,
        r#"gateway_request_seconds_bucket{pool="default",status="200",le="+Inf"} 3"#,
        "# TYPE gateway_request_seconds histogram",
        "# HELP key_rotation_keys Keys by status.",
    ] {
        assert!(metrics.lines().any(|found| found == line), "{line} is not in {metrics}");
    }
    assert!(!metrics.contains("alpha") && !metrics.contains("sk-"), "{metrics}");
}

#[tokio::test]
async fn reading_metrics_needs_the_admin_token_if_set() {
    let upstream = Server::limiting([]).await;
    let gateway = Gateway::before(upstream.address(), &["alpha"], ["--admin-token", "hunters-2"]).await;
    let read =
        |token: &'static str| http().get(gateway.admin_url("/metrics")).header(AUTHORIZATION, token).send();
    assert_eq!(read("Bearer hunters-3").await.unwrap().status(), StatusCode::UNAUTHORIZED);
    assert_eq!(read("Bearer hunters-2").await.unwrap().status(), StatusCode::OK);
    assert_eq!(upstream.keys(), [""; 0], "nothing of it went upstream");
}

#[test]
fn the_dashboard_queries_exactly_the_existing_metrics() {
    let dashboard: Value = serde_json::from_str(include_str!("../grafana.json")).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let ids: BTreeSet<_> = panels.iter().map(|panel| panel["id"].as_u64().unwrap()).collect();
    assert_eq!(ids.len(), panels.len());

    let is_name = |word: &&str| word.starts_with("key_rotation_") || word.starts_with("gateway_");
    let mut asked = BTreeSet::new();
    for target in panels.iter().flat_map(|panel| panel["targets"].as_array().unwrap()) {
        let words = target["expr"].as_str().unwrap().split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        asked.extend(
            words.filter(is_name).map(|name| name.trim_end_matches("_bucket").trim_end_matches("_count")),
        );
    }
    let sources = [
        include_str!("../../src/meter.rs"),
        include_str!("../../src/pool/metrics.rs"),
        include_str!("../src/metrics.rs"),
    ];
    let there = sources.iter().flat_map(|source| source.split('"').skip(1).step_by(2)).filter(is_name);
    assert_eq!(asked, there.collect());
}
