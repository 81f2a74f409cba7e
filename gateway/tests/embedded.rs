//! The gateway as a part of a program: `serve`.

mod support;

use std::{
    env,
    net::TcpStream,
    sync::{Arc, Mutex},
};

use key_rotation_gateway::{Config, serve};
use serde_json::{Value, json};
use support::*;
use tokio::{process::Command, time::timeout};

fn config(upstream: &Server) -> Config {
    Config::new(format!("http://{}", upstream.address()))
}

#[tokio::test]
async fn a_client_with_only_a_base_url_gets_rotated_keys() {
    let upstream = Server::limiting(["a"]).await;
    let gateway = serve(config(&upstream).key("a", "sk-a").key("b", "sk-b")).await.unwrap();
    let url = format!("{}/v1/chat/completions", gateway.url());
    for _ in 0..4 {
        let request = http().post(&url).bearer_auth("any").json(&json!({ "model": "m-1" }));
        let response = request.send().await.unwrap();
        assert_eq!((response.status().as_u16(), response.text().await.unwrap()), (200, "fine".to_owned()));
    }
    let requests = upstream.requests();
    assert!(requests.iter().all(|request| request.uri() == "/v1/chat/completions"));
    // One request finds out that the first key is limited.
    let keys: Vec<_> = requests.iter().filter_map(key_of).collect();
    assert_eq!(keys.iter().filter(|key| **key == "a").count(), 1, "{keys:?}");
    assert_eq!(keys.iter().filter(|key| **key == "b").count(), 4, "{keys:?}");
    gateway.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_file_names_upstreams_and_callers() {
    let (one, other) = (Server::answering(|| answer(200, "one")).await, Server::limiting([]).await);
    let keys = keys_file("a|sk-a\n");
    let text = format!(
        "[[upstream]]\nname = 'one'\npath = '/one'\nurl = 'http://{}'\nkeys = '{keys}'\n\
         [[upstream]]\nname = 'other'\nurl = 'http://{}'\nkeys = '{keys}'\n\
         [[caller]]\nname = 'website'\ntoken = 'token-of-website'\n",
        one.address(),
        other.address(),
        keys = keys.path(),
    );
    let gateway = serve(Config::from_toml(text)).await.unwrap();
    let get = async |path: &str, token: &str| {
        let response =
            http().get(format!("{}{path}", gateway.url())).bearer_auth(token).send().await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    };
    assert_eq!(get("/one/x", "token-of-website").await, (200, "one".to_owned()));
    assert_eq!(get("/x", "token-of-website").await, (200, "fine".to_owned()));
    assert_eq!(get("/x", "another-token").await.0, 401);
    assert_eq!(one.requests()[0].uri(), "/x");
}

#[tokio::test]
async fn two_gateways_of_one_program_are_apart() {
    let (one, other) = (Server::limiting([]).await, Server::limiting([]).await);
    let first = serve(config(&one).key("a", "sk-a")).await.unwrap();
    let second = serve(config(&other).key("b", "sk-b")).await.unwrap();
    assert_ne!(first.url(), second.url());
    for gateway in [&first, &second] {
        assert_eq!(status(&http(), &format!("{}/x", gateway.url())).await, 200);
        assert_eq!(status(&http(), &format!("{}/readyz", gateway.url())).await, 200);
    }
    let keys =
        |server: &Server| server.requests().iter().filter_map(key_of).map(String::from).collect::<Vec<_>>();
    assert_eq!((keys(&one), keys(&other)), (vec!["a".to_owned()], vec!["b".to_owned()]));
}

#[tokio::test]
async fn a_shutdown_lets_requests_finish() {
    let (mut body, answered) = stream();
    let answered = Arc::new(Mutex::new(Some(answered)));
    let upstream = Server::answering(move || answer(200, answered.lock().unwrap().take().unwrap())).await;
    let gateway = serve(config(&upstream).key("a", "sk-a")).await.unwrap();
    let url = gateway.url().to_owned();
    let response = http().get(&url).send().await.unwrap();
    let shutdown = tokio::spawn(gateway.shutdown());
    eventually("nobody listens", || TcpStream::connect(url.trim_start_matches("http://")).is_err()).await;
    assert!(!shutdown.is_finished());
    body.send_data("whole".into()).await.unwrap();
    drop(body);
    assert_eq!(response.text().await.unwrap(), "whole");
    timeout(MINUTE, shutdown).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn a_dropped_gateway_stops() {
    let upstream = Server::limiting([]).await;
    let gateway = serve(config(&upstream).key("a", "sk-a")).await.unwrap();
    let address = gateway.url().trim_start_matches("http://").to_owned();
    drop(gateway);
    eventually("nobody listens", || TcpStream::connect(&address).is_err()).await;
}

#[tokio::test]
async fn an_invalid_configuration_says_why_without_secrets() {
    for (config, reason) in [
        (Config::new("https://api.example.com"), "there are no keys"),
        (Config::new("http://api.example.com").key("a", "sk-canary"), "cleartext"),
        (Config::new("https://api.example.com").key("a", "sk-canary\n\u{7}x"), "keys"),
        (Config::new("https://api.example.com").key("", "sk-canary"), "keys"),
        (Config::from_toml("client-token = 'canary'\n"), "the configuration: line 1: "),
        (Config::from_toml("\nadmin-token = 'sk-canary-admin'"), "line 2: admin-token: not for a gateway"),
        (
            Config::from_toml("[[upstream]]\nname = 'a'\nurl = 'http://[::1]:1'\nkeys-variable = 'NONE'\n")
                .key("a", "sk-canary"),
            "with [[upstream]]",
        ),
    ] {
        assert!(!format!("{config:?}").contains("canary"), "{config:?}");
        let error = serve(config).await.unwrap_err().to_string();
        assert!(error.contains(reason) && !error.contains("canary"), "{error}");
    }
}

#[tokio::test]
async fn the_environment_sets_nothing() {
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", "a_client_with_only_a_base_url_gets_rotated_keys"])
        .env("GATEWAY_CLIENT_TOKEN", "token-of-the-environment")
        .env("GATEWAY_WAIT", "nonsense")
        .output();
    let output = timeout(MINUTE, output).await.unwrap().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}

#[tokio::test]
async fn usage_of_a_caller_is_limited() {
    let upstream = Server::answering(|| {
        let usage: Value = json!({ "usage": { "total_tokens": 900 } });
        answer_with(200, [("content-type", "application/json")], usage.to_string())
    })
    .await;
    let text = format!(
        "upstream = 'http://{}'\n[[caller]]\nname = 'website'\ntoken = 'token-of-website'\ntokens-per-minute = 1000\n",
        upstream.address()
    );
    let gateway = serve(Config::from_toml(text).key("a", "sk-a")).await.unwrap();
    let post = async || {
        let request = http().post(gateway.url()).bearer_auth("token-of-website");
        let response = request.json(&json!({ "max_tokens": 200 })).send().await.unwrap();
        let status = response.status().as_u16();
        // The usage counts with the end of the body.
        response.bytes().await.unwrap();
        status
    };
    // The end of the first response may be counted just after its caller has read it.
    let statuses = [post().await, post().await, post().await];
    assert_eq!((statuses[0], statuses[2]), (200, 429), "{statuses:?}");
}
