//! Each program against a small server that limits the key `alpha`, in the way of its service.

#[path = "../../../tests/support/server.rs"]
#[allow(dead_code, unreachable_pub)]
mod server;

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use axum::body::Body;
use bytes::Bytes;
use futures_util::stream;
use http::{HeaderMap, Method, Request};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use serde_json::{Value, json};
use server::{Answer, Server, answer, answer_with, key_of};
use tokio::process::Command;

macro_rules! run {
    ($program:literal, $server:expr) => {
        run(env!(concat!("CARGO_BIN_EXE_", $program)), format!("http://{}", $server.address())).await
    };
}

/// The program's lines.
async fn run(program: &str, service: String) -> Vec<String> {
    let program = Command::new(program)
        .arg(service)
        .env("KEYS", "alpha=sk-alpha,beta=sk-beta")
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(Duration::from_secs(120), program).await.unwrap().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    let (out, errors) = (text(output.stdout), text(output.stderr));
    assert!(output.status.success(), "{out}\n{errors}");
    out.lines().map(str::to_owned).collect()
}

/// A service whose answers are OpenAI's. It limits `alpha` on these paths.
async fn openai(limits: &'static [&'static str]) -> Server {
    Server::start(move |request| async move {
        if key_of(&request) == Some("alpha") && limits.contains(&request.uri().path()) {
            return limited();
        }
        match request.uri().path() {
            "/v1/chat/completions" => chat(request.body()),
            "/v1/files" => file(),
            "/v1/models" => answer(200, "two models"),
            _ => answer(404, ""),
        }
    })
    .await
}

fn limited() -> Answer {
    let error = json!({
        "error": {
            "message": "Rate limit reached for gpt-5-mini on requests per min (RPM): Limit 3, Used 3, Requested 1.",
            "type": "requests",
            "param": null,
            "code": "rate_limit_exceeded",
        }
    });
    let headers = [
        ("content-type", "application/json"),
        ("x-ratelimit-limit-requests", "3"),
        ("x-ratelimit-remaining-requests", "0"),
        ("x-ratelimit-reset-requests", "20s"),
        ("retry-after", "20"),
    ];
    answer_with(429, headers, error.to_string())
}

fn chat(question: &Bytes) -> Answer {
    let question: Value = serde_json::from_slice(question).unwrap();
    let reply = |kind: &str, rest: Value| {
        let mut reply =
            json!({ "id": "chatcmpl-1", "object": kind, "created": 1, "model": question["model"] });
        reply["choices"] = json!([rest]);
        reply
    };
    if question["stream"] == json!(true) {
        let part = |text: &str| {
            let part = json!({ "index": 0, "delta": { "content": text }, "finish_reason": null });
            format!("data: {}\n\n", reply("chat.completion.chunk", part))
        };
        let end = json!({ "index": 0, "delta": {}, "finish_reason": "stop" });
        let end = format!("data: {}\n\ndata: [DONE]\n\n", reply("chat.completion.chunk", end));
        return answer_with(
            200,
            [("content-type", "text/event-stream")],
            part("good ") + &part("day") + &end,
        );
    }
    let message = json!({ "role": "assistant", "content": "good day" });
    let mut reply =
        reply("chat.completion", json!({ "index": 0, "message": message, "finish_reason": "stop" }));
    reply["usage"] = json!({ "prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3 });
    answer_with(200, [("content-type", "application/json")], reply.to_string())
}

fn file() -> Answer {
    let file = json!({
        "id": "file-1",
        "object": "file",
        "bytes": 3_000,
        "created_at": 1,
        "filename": "lines.jsonl",
        "purpose": "batch",
        "status": "processed",
    });
    answer_with(200, [("content-type", "application/json")], file.to_string())
}

fn bodies(server: &Server) -> Vec<Bytes> {
    server.requests().into_iter().map(Request::into_body).collect()
}

/// The secrets in `x-api-key`, in the order of arrival.
fn api_keys(server: &Server) -> Vec<String> {
    let secret = |request: &Request<Bytes>| request.headers()["x-api-key"].to_str().unwrap().to_owned();
    server.requests().iter().map(secret).collect()
}

#[tokio::test]
async fn octocrab_reads_with_the_second_key() {
    let reset = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() + 600;
    let server = Server::start(move |request| async move {
        if key_of(&request) == Some("alpha") {
            let headers = [
                ("content-type", "application/json"),
                ("x-ratelimit-limit", "5000"),
                ("x-ratelimit-remaining", "0"),
                ("x-ratelimit-reset", &reset.to_string()),
                ("x-ratelimit-resource", "core"),
            ];
            return answer_with(403, headers, r#"{"message":"API rate limit exceeded for user ID 1."}"#);
        }
        let found = if request.method() == Method::POST {
            ("title", "an issue")
        } else {
            ("full_name", "owner/name")
        };
        answer_with(200, [("content-type", "application/json")], json!({ found.0: found.1 }).to_string())
    })
    .await;
    assert_eq!(run!("octocrab", server), [r#""owner/name""#, r#""an issue""#]);
    assert_eq!(server.keys(), ["alpha", "beta", "beta"]);
}

#[tokio::test]
async fn async_openai_chats_and_streams_with_the_second_key() {
    let server = openai(&["/v1/chat/completions"]).await;
    assert_eq!(run!("async_openai", server), ["good day", "good day", "file-1"]);
    assert_eq!(server.keys(), ["alpha", "beta", "beta", "beta"]);
    assert_eq!(bodies(&server)[0], bodies(&server)[1]);
}

#[tokio::test]
async fn async_openais_upload_is_built_again_whole() {
    let server = openai(&["/v1/files"]).await;
    assert_eq!(run!("async_openai", server), ["good day", "good day", "file-1"]);
    assert_eq!(server.keys(), ["alpha", "beta", "alpha", "beta"]);
    let lines = "{}\n".repeat(1_000);
    for upload in &bodies(&server)[2..] {
        assert!(String::from_utf8_lossy(upload).contains(&lines));
    }
}

#[tokio::test]
async fn rig_asks_with_the_second_key() {
    let server = openai(&["/v1/chat/completions"]).await;
    assert_eq!(run!("rig", server), ["good day"]);
    assert_eq!(server.keys(), ["alpha", "beta"]);
    assert_eq!(bodies(&server)[0], bodies(&server)[1]);
}

#[tokio::test]
async fn genai_chats_and_streams_with_the_second_key() {
    let server = openai(&["/v1/chat/completions"]).await;
    assert_eq!(run!("genai", server), ["good day", "good day"]);
    assert_eq!(server.keys(), ["alpha", "beta", "beta"]);
}

#[tokio::test]
async fn genais_limited_stream_is_asked_again() {
    // `alpha` is limited from its second request on. The third request is the stream's, by turns.
    let seen = Arc::new(AtomicUsize::new(0));
    let server = Server::start(move |request| {
        let is_limited = seen.fetch_add(1, SeqCst) == 1;
        async move { if is_limited { limited() } else { chat(request.body()) } }
    })
    .await;
    assert_eq!(run!("genai", server), ["good day", "good day"]);
    assert_eq!(server.keys(), ["alpha", "beta", "alpha"]);
}

#[tokio::test]
async fn old_reqwest_asks_with_the_second_key() {
    let server = openai(&["/v1/chat/completions"]).await;
    assert_eq!(run!("reqwest_0_12", server), [r#""good day""#]);
    assert_eq!(server.keys(), ["alpha", "beta"]);
    assert_eq!(bodies(&server)[0], bodies(&server)[1]);
}

#[tokio::test]
async fn middlewares_cache_and_retry_around_the_keys() {
    let failures = Arc::new(AtomicUsize::new(0));
    let server = Server::start(move |request| {
        let failures = failures.clone();
        async move {
            if key_of(&request) == Some("alpha") {
                limited()
            } else if failures.fetch_add(1, SeqCst) == 0 {
                answer(500, "")
            } else {
                answer_with(200, [("cache-control", "max-age=3600")], "two models")
            }
        }
    })
    .await;
    assert_eq!(run!("reqwest_middleware", server), ["two models", "two models"]);
    // Limited, failed, and served. The second answer is that of the cache.
    assert_eq!(server.keys(), ["alpha", "beta", "beta"]);
}

#[tokio::test]
async fn eventsource_listens_with_the_second_key() {
    let server = Server::start(|request| async move {
        if key_of(&request) == Some("alpha") {
            return limited();
        }
        answer_with(200, [("content-type", "text/event-stream")], "data: an event\n\n")
    })
    .await;
    assert_eq!(run!("eventsource", server), ["an event"]);
    assert_eq!(server.keys(), ["alpha", "beta"]);
}

#[tokio::test]
async fn tonic_calls_with_the_second_key() {
    let server = Server::start(|request| async move {
        let is_limited = request.headers()["x-api-key"] == "sk-alpha";
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", "0".parse().unwrap());
        // One message of two bytes: status SERVING.
        let message = Frame::data(Bytes::from_static(&[0, 0, 0, 0, 2, 8, 1]));
        let frames = stream::iter([Ok::<_, std::io::Error>(message), Ok(Frame::trailers(trailers))]);
        if is_limited {
            let headers = [("content-type", "application/grpc"), ("grpc-status", "8")];
            return answer_with(200, headers, Body::empty());
        }
        let headers = [("content-type", "application/grpc")];
        answer_with(200, headers, Body::new(StreamBody::new(frames).boxed()))
    })
    .await;
    assert_eq!(run!("tonic", server), ["SERVING"]);
    assert_eq!(api_keys(&server), ["sk-alpha", "sk-beta"]);
}

#[tokio::test]
async fn smithy_puts_with_the_second_key() {
    let server = Server::start(|request| async move {
        if request.headers()["x-api-key"] == "sk-alpha" {
            return answer_with(429, [("x-amzn-errortype", "ThrottlingException")], "{}");
        }
        answer(200, request.into_body())
    })
    .await;
    assert_eq!(run!("aws_smithy", server), ["a note"]);
    assert_eq!(api_keys(&server), ["sk-alpha", "sk-beta"]);
    assert_eq!(bodies(&server), ["a note", "a note"]);
}

#[tokio::test]
async fn ollama_asks_with_the_second_key() {
    let server = Server::start(|request| async move {
        if key_of(&request) == Some("alpha") {
            return answer_with(429, [("retry-after", "60")], r#"{"error":"too many concurrent requests"}"#);
        }
        let message = json!({ "role": "assistant", "content": "good day" });
        let reply =
            json!({ "model": "gpt-oss", "created_at": "2026-01-01T00:00:00Z", "message": message, "done": true });
        answer_with(200, [("content-type", "application/json")], reply.to_string())
    })
    .await;
    assert_eq!(run!("ollama", server), ["good day"]);
    assert_eq!(server.keys(), ["alpha", "beta"]);
    assert_eq!(bodies(&server)[0], bodies(&server)[1]);
}

#[tokio::test]
async fn ureq_asks_with_the_second_key() {
    let server = openai(&["/v1/chat/completions"]).await;
    assert_eq!(run!("ureq", server), [r#""good day""#]);
    assert_eq!(server.keys(), ["alpha", "beta"]);
}

#[tokio::test]
async fn blocking_reqwest_asks_with_the_second_key() {
    let server = openai(&["/v1/chat/completions"]).await;
    assert_eq!(run!("reqwest_blocking", server), [r#""good day""#]);
    assert_eq!(server.keys(), ["alpha", "beta"]);
}

#[tokio::test]
async fn an_axum_server_asks_with_the_second_key() {
    let server = openai(&["/v1/models"]).await;
    assert_eq!(run!("axum_state", server), ["two models"]);
    assert_eq!(server.keys(), ["alpha", "beta"]);
}

#[tokio::test]
async fn two_pools_rotate_apart_in_one_client() {
    let server = Server::start(|request| async move {
        let has_alpha = |name| request.headers().get(name).is_some_and(|value| value == "sk-alpha");
        if key_of(&request) == Some("alpha") || has_alpha("x-api-key") {
            return limited();
        }
        answer(200, if request.headers().contains_key("x-api-key") { "by header" } else { "by bearer" })
    })
    .await;
    assert_eq!(run!("two_pools", server), ["by bearer", "by header"]);
    assert_eq!(server.count(), 4);
}
