//! The state file: what survives a restart, and what does not open.

mod support;

use std::{fs, path::Path};

use reqwest::Method;
use serde_json::{Value, json};
use support::{gateway::*, *};
use tokio::process::Command;

const TOKEN: &str = "the-admin-s-token";

/// A gateway that sends requests one after the other to this upstream.
fn gateway(upstream: &Server, keys: &TestFile, arguments: &[&str]) -> Command {
    gateway_with(upstream, keys, &[&["--cooldown", "600"], arguments].concat())
}

fn gateway_with(upstream: &Server, keys: &TestFile, arguments: &[&str]) -> Command {
    let url = format!("http://{}", upstream.address());
    let all = ["--upstream", &url, "--keys", keys.path(), "--admin-token", TOKEN, "--pace=false"];
    let mut command = command([&all[..], &["--wait", "0"], arguments].concat());
    if !arguments.contains(&"--state") {
        command.env_remove("GATEWAY_STATE");
    }
    command
}

async fn started(upstream: &Server, keys: &TestFile, state: &str) -> Gateway {
    Gateway::start(gateway(upstream, keys, &["--state", state])).await
}

async fn stop(mut gateway: Gateway) {
    gateway.terminate().await;
    assert_eq!(gateway.ended().await.code(), Some(0), "{}", gateway.log());
}

async fn admin(gateway: &Gateway, method: Method, path: &str, body: Value) -> Value {
    let request = http().request(method, gateway.admin_url("/admin/api") + path).bearer_auth(TOKEN);
    let request = request.header("x-gateway-admin", "1").header("content-type", "application/json");
    let response = request.body(body.to_string()).send().await.unwrap();
    let (status, text) = (response.status(), response.text().await.unwrap());
    assert!(status.is_success(), "{path}: {status} {text}");
    serde_json::from_str(&text).unwrap_or_default()
}

/// Each key with its status.
async fn statuses(gateway: &Gateway) -> Vec<String> {
    let answer = admin(gateway, Method::GET, "/keys", Value::Null).await;
    let text = |key: &Value, field: &str| key[field].as_str().unwrap().to_owned();
    let mut keys: Vec<_> = answer["keys"]
        .as_array()
        .unwrap()
        .iter()
        .map(|key| format!("{} {}", text(key, "id"), text(key, "status")))
        .collect();
    keys.sort();
    keys
}

#[tokio::test]
async fn f45_a_restarted_gateway_forgets_no_rest() {
    let upstream = Server::limiting(["a"]).await;
    let (keys, directory) = (keys_file("a|sk-a\nb|sk-b"), tempfile::tempdir().unwrap());
    let state = directory.path().join("state.redb");
    let first = started(&upstream, &keys, state.to_str().unwrap()).await;
    assert!(first.log().contains(&format!("state is kept in {}", state.display())), "{}", first.log());
    assert_eq!(http().get(first.url("/")).send().await.unwrap().status(), 200);
    assert_eq!(upstream.keys(), ["a", "b"]);
    stop(first).await;

    let second = started(&upstream, &keys, state.to_str().unwrap()).await;
    assert_eq!(statuses(&second).await, ["a rate_limited", "b healthy"]);
    for _ in 0..3 {
        assert_eq!(http().get(second.url("/")).send().await.unwrap().status(), 200);
    }
    assert_eq!(upstream.keys(), ["a", "b", "b", "b", "b"]);
}

#[tokio::test]
async fn the_key_file_decides_on_keys_and_the_state_on_state() {
    let upstream = Server::limiting([]).await;
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().join("state.redb");
    let state = state.to_str().unwrap();
    let first = started(&upstream, &keys_file("a|sk-a\nb|sk-b\nc|sk-c\nd|sk-d"), state).await;
    admin(&first, Method::POST, "/keys", json!({ "id": "added", "secret": "sk-added" })).await;
    for key in ["a", "b", "c", "added"] {
        admin(&first, Method::POST, &format!("/keys/{key}/disable"), Value::Null).await;
    }
    admin(&first, Method::DELETE, "/keys/d", Value::Null).await;
    stop(first).await;

    // a stays, b has another secret, c has gone from the key file, and d is still in it.
    let second = started(&upstream, &keys_file("a|sk-a\nb|sk-new\nd|sk-d"), state).await;
    let expected = ["a disabled", "added disabled", "b healthy", "d healthy"];
    assert_eq!(statuses(&second).await, expected);
    stop(second).await;

    // Without a key file, the keys of the state file serve.
    let url = format!("http://{}", upstream.address());
    let arguments = ["--upstream", &url, "--admin-token", TOKEN, "--state", state];
    let third = Gateway::start(command(arguments)).await;
    assert_eq!(statuses(&third).await, expected);
}

#[tokio::test]
async fn f45_a_second_gateway_over_a_state_file_exits_2() {
    let upstream = Server::limiting([]).await;
    let (keys, directory) = (keys_file("a|sk-a"), tempfile::tempdir().unwrap());
    let state = directory.path().join("state.redb");
    let first = started(&upstream, &keys, state.to_str().unwrap()).await;
    let second = ended(gateway(&upstream, &keys, &["--state", state.to_str().unwrap()])).await;
    assert_eq!(second.status.code(), Some(2));
    let said = String::from_utf8(second.stderr).unwrap();
    let expected = format!("--state: {} is in use by another process", state.display());
    assert!(said.lines().last().unwrap().contains(&expected), "{said}");
    assert_eq!(http().get(first.url("/")).send().await.unwrap().status(), 200);
}

#[tokio::test]
async fn f45_unusable_state_files_exit_2_unchanged() {
    let upstream = Server::limiting([]).await;
    let keys = keys_file("a|sk-a");
    let foreign = file("redb", "a|sk-canary");
    let output = ended(gateway(&upstream, &keys, &["--state", foreign.path()])).await;
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains(&format!("--state: {} is ", foreign.path())) && !said.contains("canary"), "{said}");
    assert_eq!(fs::read_to_string(foreign.path()).unwrap(), "a|sk-canary");
}

/// Starts a gateway that may choose its state file, with a directory for state.
async fn by_default(upstream: &Server, keys: &TestFile, directory: &Path) -> Gateway {
    let mut command = gateway(upstream, keys, &[]);
    command.env_remove("STATE_DIRECTORY").env("XDG_STATE_HOME", directory);
    Gateway::start(command).await
}

#[tokio::test]
async fn by_default_each_upstream_has_a_state_file() {
    let (one, other) = (Server::limiting([]).await, Server::limiting([]).await);
    let (keys, directory) = (keys_file("a|sk-a"), tempfile::tempdir().unwrap());
    let name = |upstream: &Server| format!("{}.redb", upstream.address().to_string().replace(':', "_"));
    let expected = |upstream: &Server| directory.path().join("key-rotation-gateway").join(name(upstream));
    for upstream in [&one, &other] {
        let gateway = by_default(upstream, &keys, directory.path()).await;
        let said = format!("state is kept in {}", expected(upstream).display());
        assert!(gateway.log().contains(&said), "{}", gateway.log());
        assert!(expected(upstream).is_file());
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(expected(&one).parent().unwrap()), mode(&expected(&one))), (0o700, 0o600));
    }
}

#[tokio::test]
async fn without_room_for_a_default_file_state_is_in_memory() {
    let upstream = Server::limiting([]).await;
    let (keys, no_directory) = (keys_file("a|sk-a"), file("txt", "a file"));
    let gateway = by_default(&upstream, &keys, Path::new(no_directory.path())).await;
    assert!(
        gateway.log().contains("state is kept in memory, because no file can be used"),
        "{}",
        gateway.log()
    );
    assert_eq!(http().get(gateway.url("/")).send().await.unwrap().status(), 200);
}

#[tokio::test]
async fn data_keys_encrypt_the_state_file() {
    let upstream = Server::limiting([]).await;
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().join("state.redb");
    let (keys, data_keys) = (keys_file("a|sk-canary"), file("txt", &format!("2026a={}A==", "A".repeat(85))));
    let arguments = ["--state", state.to_str().unwrap(), "--data-keys", data_keys.path()];
    stop(Gateway::start(gateway(&upstream, &keys, &arguments)).await).await;
    let content = String::from_utf8_lossy(&fs::read(&state).unwrap()).into_owned();
    assert!(content.contains("encrypted.v1.2026a.") && !content.contains("sk-canary"));
}

#[tokio::test]
async fn a_new_state_file_without_a_key_file_exits_2() {
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().join("state.redb");
    let output = refusal(["--upstream", "https://example.com", "--state", state.to_str().unwrap()]).await;
    assert_eq!(output.status.code(), Some(2));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.lines().last().unwrap().contains("--keys: there is no key"), "{said}");
}

#[tokio::test]
async fn reloads_go_on_with_the_same_state_file() {
    let upstream = Server::limiting([]).await;
    let (keys, config) = (keys_file("a|sk-a\nb|sk-b"), file("toml", ""));
    let directory = tempfile::tempdir().unwrap();
    let state = directory.path().join("state.redb");
    let configure = |cooldown: u32| {
        let text = format!("cooldown = {cooldown}\nwatch = false\nstate = {state:?}\n");
        fs::write(config.path(), text).unwrap();
    };
    configure(600);
    let start = || gateway_with(&upstream, &keys, &["--config", config.path()]);
    let first = Gateway::start(start()).await;
    admin(&first, Method::POST, "/keys", json!({ "id": "added", "secret": "sk-added" })).await;
    admin(&first, Method::POST, "/keys/a/disable", Value::Null).await;

    // Other keys, and then another configuration.
    fs::write(keys.path(), "a|sk-a\nc|sk-c").unwrap();
    for (reloads, cooldown) in [(1, 600), (2, 700)] {
        configure(cooldown);
        first.hang_up().await;
        eventually("it is reloaded", || first.log().matches("configuration reloaded").count() == reloads)
            .await;
        assert_eq!(statuses(&first).await, ["a disabled", "added healthy", "c healthy"], "{}", first.log());
    }
    // c came with a reload, and goes with the next start.
    stop(first).await;
    fs::write(keys.path(), "a|sk-a\nd|sk-d").unwrap();
    let second = Gateway::start(start()).await;
    assert_eq!(statuses(&second).await, ["a disabled", "added healthy", "d healthy"]);
}
