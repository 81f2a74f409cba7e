//! The quickstart as a process: against its own service, and against a service of these tests.

#![allow(unreachable_pub)] // The shared file is a module of other crates, too.

#[path = "../../../tests/support/files.rs"]
mod files;

use std::{
    process::{Output, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
};

use axum::{
    Router,
    body::Bytes,
    http::{HeaderMap, Method, StatusCode, Uri},
    response::{IntoResponse, Response},
};
use serde_json::Value;
use tokio::{net::TcpListener, process::Command, sync::Notify};

use self::files::keys_file;

#[tokio::test]
async fn quickstart_succeeds_without_using_a_key_in_cooldown() {
    let output = quickstart(["--json"]).output().await.unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let runs = runs(&output);
    let [rotation, paced] = &runs[..] else { panic!("{runs:?}") };
    for run in &runs {
        assert_eq!((number(run, "requests"), number(run, "succeeded")), (300, 300));
        assert_eq!(number(run, "hits_while_resting"), 0);
        let keys = run["keys"].as_array().unwrap();
        assert_eq!(keys.len(), 5);
        assert!(keys.iter().all(|key| key["id"].is_string() && number(key, "requests") > 0), "{run}");
        let limited: u64 = keys.iter().map(|key| number(key, "limited")).sum();
        assert_eq!(limited, number(run, "limited"));
        let requests: u64 = keys.iter().map(|key| number(key, "requests")).sum();
        assert_eq!(requests, 300 + limited, "each run has keys of its own");
    }
    assert!(number(rotation, "recovered") > 0, "{rotation}");
    // 3 at most on an idle machine; where requests take long to arrive, some come a moment too early.
    assert!(number(paced, "limited") * 10 < number(rotation, "limited"), "{runs:?}");
    assert_shows_none_of(&output, &["sk-local"]);
}

#[tokio::test]
async fn text_output_shows_both_runs_and_a_comparison() {
    let output = quickstart([]).output().await.unwrap();
    let shown = String::from_utf8(output.stdout.clone()).unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    for expected in ["2s after a 429", "shortened", "requests", "429s", "cooldowns", "recoveries", "epsilon"]
    {
        assert!(shown.contains(expected), "{expected} is missing in {shown}");
    }
    assert_eq!(shown.matches("The service saw no request on a key that was resting.").count(), 2, "{shown}");
    let (_, comparison) = shown.split_once("longest wait").unwrap_or_else(|| panic!("{shown}"));
    assert!(comparison.contains("│ rotation alone ┆") && comparison.contains("│ paced "), "{shown}");
    assert_shows_none_of(&output, &["sk-local"]);
}

#[tokio::test]
async fn an_upstream_receives_method_path_headers_and_body() {
    let upstream =
        Upstream::start(|seen| if seen.key("authorization") == "Bearer sk-canary-2" { 429 } else { 200 });
    let upstream = upstream.await;
    let keys =
        keys_file("a|sk-canary-1\nb|sk-canary-2\n# a space at its end:\nc|sk-canary-bad \nd|sk-canary-3\n");
    let output = quickstart(["--json", "--requests", "60", "--concurrency", "12", "--keys", keys.path()])
        .args(["--upstream", &upstream.url, "--method", "PUT", "--path", "/v1/things?page=2"])
        .args(["--body", r#"{"thing":"ä"}"#, "--header", "x-version: 7"])
        .env("RUST_LOG", "trace")
        .output()
        .await
        .unwrap();
    let summary = summary(&output);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!((number(&summary, "requests"), number(&summary, "succeeded")), (60, 60));
    assert_eq!(number(&summary, "hits_while_resting"), 0);
    assert_eq!(number(&summary, "recovered"), 0, "it rests for 2 minutes");

    let seen = upstream.seen.lock().unwrap();
    let limited = seen.iter().filter(|seen| seen.key("authorization") == "Bearer sk-canary-2").count() as u64;
    assert!((1..=12).contains(&limited), "{limited}");
    assert_eq!(number(&summary, "limited"), limited);
    assert_eq!(seen.len() as u64, 60 + limited);
    for seen in &*seen {
        assert_eq!((&seen.method, &*seen.uri.to_string()), (&Method::PUT, "/v1/things?page=2"));
        assert_eq!((seen.key("x-version"), seen.key("content-type")), ("7", "application/json"));
        assert_eq!(seen.body, r#"{"thing":"ä"}"#);
        assert!(!seen.headers.contains_key("x-before-pick"));
    }
    let ids: Vec<_> =
        summary["keys"].as_array().unwrap().iter().map(|key| key["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["a", "b", "d"]);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.contains("line 4: key c: the secret begins or ends with a space"), "{errors}");
    assert_shows_none_of(&output, &["sk-canary"]);
}

#[tokio::test]
async fn the_cooldown_option_applies_with_an_upstream() {
    let answered = AtomicU32::new(0);
    let first_is_limited = move |_: &Seen| if answered.fetch_add(1, Relaxed) == 0 { 429 } else { 200 };
    let upstream = Upstream::start(first_is_limited).await;
    let keys = keys_file("a|sk-canary-1\n");
    let output = quickstart(["--json", "--requests", "5", "--concurrency", "1", "--cooldown", "0.3"])
        .args(["--upstream", &upstream.url, "--keys", keys.path()])
        .output()
        .await
        .unwrap();
    let summary = summary(&output);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let counts =
        ["succeeded", "limited", "recovered", "hits_while_resting"].map(|name| number(&summary, name));
    assert_eq!(counts, [5, 1, 1, 0]);
}

#[tokio::test]
async fn a_paced_upstream_keeps_its_key_in_use() {
    let answered = AtomicU32::new(0);
    let first_is_limited = move |_: &Seen| if answered.fetch_add(1, Relaxed) == 0 { 429 } else { 200 };
    let upstream = Upstream::start(first_is_limited).await;
    let keys = keys_file("a|sk-canary-1\n");
    // A cooldown of 2 minutes would outlast the wait.
    let output = quickstart(["--json", "--paced", "--requests", "1", "--wait", "30"])
        .args(["--upstream", &upstream.url, "--keys", keys.path()])
        .output()
        .await
        .unwrap();
    let summary = summary(&output);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let counts =
        ["succeeded", "limited", "recovered", "hits_while_resting"].map(|name| number(&summary, name));
    assert_eq!(counts, [1, 1, 0, 0]);
    assert_shows_none_of(&output, &["sk-canary"]);
}

#[tokio::test]
async fn quickstart_injects_keys_into_headers_or_query() {
    let keys = keys_file("sk-canary-1\nsk-canary-2\n");
    let upstream = Upstream::start(|_| 204).await;
    for (place, expected) in [("header:x-api-key", "/"), ("query:key", "/?key=sk-canary-1")] {
        let output = quickstart(["--requests", "1", "--inject", place, "--keys", keys.path()])
            .args(["--upstream", &upstream.url])
            .env("RUST_LOG", "tower_key_rotation=trace")
            .output()
            .await
            .unwrap();
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        assert_shows_none_of(&output, &["sk-canary"]);
        let seen = upstream.seen.lock().unwrap().pop().unwrap();
        assert_eq!((&seen.method, &*seen.uri.to_string()), (&Method::GET, expected));
        assert_eq!(seen.headers.contains_key("x-api-key"), place.starts_with("header"));
        assert!(!seen.headers.contains_key("authorization"));
    }
}

#[tokio::test]
async fn service_failures_exit_with_1_naming_the_status() {
    let upstream = Upstream::start(|_| 500).await;
    let keys = keys_file("a|sk-canary-1\n");
    let output =
        quickstart(["--json", "--requests", "7", "--upstream", &upstream.url, "--keys", keys.path()])
            .output()
            .await
            .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(number(&summary(&output), "succeeded"), 0);
    assert_eq!(String::from_utf8_lossy(&output.stderr), "7 × 500 Internal Server Error\n");
    assert_shows_none_of(&output, &["sk-canary"]);
}

#[tokio::test]
async fn connection_errors_omit_the_key_in_the_url() {
    let keys = keys_file("a|sk-canary-1\n");
    // Nobody listens there.
    let url = "http://127.0.0.1:1/?key=sk-canary-2";
    let output =
        quickstart(["--requests", "2", "--inject", "query:key", "--keys", keys.path(), "--upstream", url])
            .output()
            .await
            .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("2 × error sending request"), "{output:?}");
    assert_shows_none_of(&output, &["sk-canary"]);
}

#[tokio::test]
async fn cleartext_upstreams_are_refused_by_default() {
    let keys = keys_file("a|sk-canary-1\n");
    let output = quickstart(["--requests", "2", "--keys", keys.path(), "--upstream", "http://192.0.2.1"])
        .output()
        .await
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("192.0.2.1 would get a key in cleartext"),
        "{output:?}"
    );
}

#[tokio::test]
async fn bad_arguments_exit_2_and_unusable_keys_1() {
    for wrong in [
        &["--upstream", "https://example.com"][..],
        &["--keys", "keys.txt"],
        &["--requests", "0"],
        &["--paced"],
        &["--upstream", "ftp://example.com", "--keys", "keys.txt"],
        &["--upstream", "https://example.com", "--keys", "keys.txt", "--inject", "header:no header"],
        &["--no-such-option"],
    ] {
        let output = quickstart(wrong.iter().copied()).output().await.unwrap();
        assert_eq!(output.status.code(), Some(2), "{wrong:?}: {output:?}");
    }
    let keys = keys_file("a|sk-canary-1 \n");
    for unusable in ["no/such/file", keys.path()] {
        let output =
            quickstart(["--upstream", "https://example.com", "--keys", unusable]).output().await.unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert_shows_none_of(&output, &["sk-canary"]);
    }
}

#[cfg(unix)]
#[tokio::test]
async fn ctrl_c_prints_the_summary_so_far() {
    let served = AtomicU32::new(0);
    let upstream =
        Upstream::start(move |_| if served.fetch_add(1, Relaxed) < 3 { 200 } else { Upstream::SILENCE });
    let upstream = upstream.await;
    let keys = keys_file("a|sk-canary-1\n");
    let child =
        quickstart(["--json", "--concurrency", "1", "--upstream", &upstream.url, "--keys", keys.path()])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
    upstream.silent.notified().await;
    interrupt(&child).await;
    let output = child.wait_with_output().await.unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert_eq!(number(&summary(&output), "succeeded"), 3);
    assert!(String::from_utf8_lossy(&output.stderr).contains("stopped by Ctrl-C"), "{output:?}");
}

/// A service that answers by a function and records its requests.
struct Upstream {
    url: String,
    seen: Arc<Mutex<Vec<Seen>>>,
    silent: Arc<Notify>,
}

#[derive(Clone)]
struct Seen {
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
}

impl Upstream {
    /// Instead of a status: no answer at all.
    const SILENCE: u16 = 0;

    async fn start(status: impl Fn(&Seen) -> u16 + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (seen, silent, status) = (Arc::default(), Arc::new(Notify::new()), Arc::new(status));
        let upstream = Self { url, seen: Arc::clone(&seen), silent: silent.clone() };
        let answer = async move |method, uri, headers, body| -> Response {
            let request = Seen { method, uri, headers, body };
            let status = status(&request);
            seen.lock().unwrap().push(request);
            if status == Self::SILENCE {
                silent.notify_one();
                std::future::pending::<()>().await;
            }
            StatusCode::from_u16(status).unwrap().into_response()
        };
        tokio::spawn(async move { axum::serve(listener, Router::new().fallback(answer)).await });
        upstream
    }
}

impl Seen {
    fn key(&self, header: &str) -> &str {
        self.headers.get(header).map_or("", |value| value.to_str().unwrap())
    }
}

fn quickstart<'a>(arguments: impl IntoIterator<Item = &'a str>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quickstart"));
    // The environment of this machine must not change a test.
    command.args(arguments).env("NO_PROXY", "127.0.0.1").env("no_proxy", "127.0.0.1").env_remove("RUST_LOG");
    command.stdin(Stdio::null()).kill_on_drop(true);
    command
}

#[cfg(unix)]
async fn interrupt(child: &tokio::process::Child) {
    let id = child.id().unwrap().to_string();
    assert!(Command::new("kill").args(["-INT", &id]).status().await.unwrap().success());
}

fn runs(output: &Output) -> Vec<Value> {
    let mut all: Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"));
    assert_eq!(all.as_object().unwrap().len(), 1, "{all}");
    let Value::Array(runs) = all["runs"].take() else { panic!("{all}") };
    runs
}

/// Of the only run.
fn summary(output: &Output) -> Value {
    let runs = runs(output);
    assert_eq!(runs.len(), 1, "{runs:?}");
    runs.into_iter().next().unwrap()
}

fn number(object: &Value, name: &str) -> u64 {
    object[name].as_u64().unwrap_or_else(|| panic!("no {name} in {object}"))
}

fn assert_shows_none_of(output: &Output, secrets: &[&str]) {
    let shown = [&*output.stdout, &*output.stderr].map(String::from_utf8_lossy).concat();
    for secret in secrets {
        assert!(!shown.contains(secret), "{secret} is shown:\n{shown}");
    }
}
