//! The unmodified SDKs of OpenAI and Anthropic through the gateway.

mod support;

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex},
};

use bytes::Bytes;
use http::Request;
use serde_json::{Value, json};
use support::{gateway::Gateway, python::run_script, *};

const CALLS: [&str; 7] =
    ["chat", "chat_stream", "responses", "responses_stream", "models", "message", "message_stream"];

/// Both places at once, so that one gateway serves both APIs.
const INJECT: [&str; 2] = ["--inject", "bearer,header:x-api-key"];

/// Makes these calls one after the other and returns their outcomes.
async fn calls(gateway: &Gateway, token: &str, retries: u32, calls: &[&str]) -> Vec<Value> {
    let base = [&gateway.url(""), token, &retries.to_string()].map(str::to_owned);
    let arguments: Vec<_> = base.into_iter().chain(calls.iter().map(|&call| call.to_owned())).collect();
    let output = run_script("calls.py", &arguments).await;
    serde_json::from_slice(&output.unwrap_or_else(|error| panic!("{error}"))).unwrap()
}

fn texts(outcomes: &[Value]) -> Vec<&str> {
    outcomes.iter().map(|outcome| outcome["text"].as_str().unwrap_or_else(|| panic!("{outcome}"))).collect()
}

/// An upstream that speaks both APIs and limits each key after this many uses.
async fn upstream<const N: usize>(allowed: [(&'static str, usize); N]) -> (Server, Arc<Mutex<usize>>) {
    let left = Arc::new(Mutex::new(HashMap::from(allowed)));
    let limited = Arc::new(Mutex::new(0));
    let count = limited.clone();
    let server = Server::start(move |request| {
        let key = key_of(&request).unwrap_or("none").to_owned();
        assert_eq!(request.headers()["x-api-key"], format!("sk-{key}"));
        let mut left = left.lock().unwrap();
        let left = left.get_mut(&*key).unwrap();
        let reply = if *left == 0 {
            *count.lock().unwrap() += 1;
            json_answer(429, &json!({ "error": { "message": "slow down", "type": "requests" } }))
        } else {
            *left -= 1;
            reply(&request)
        };
        std::future::ready(reply)
    })
    .await;
    (server, limited)
}

fn json_answer(status: u16, body: &Value) -> Answer {
    answer_with(status, [("content-type", "application/json")], body.to_string())
}

fn events<'e>(events: impl IntoIterator<Item = &'e Value>) -> Answer {
    let events: String = events
        .into_iter()
        .map(|event| match event["type"].as_str() {
            Some(kind) => format!("event: {kind}\ndata: {event}\n\n"),
            None => format!("data: {event}\n\n"),
        })
        .collect();
    answer_with(200, [("content-type", "text/event-stream")], events)
}

fn reply(request: &Request<Bytes>) -> Answer {
    let asked: Value = serde_json::from_slice(request.body()).unwrap_or_default();
    let streams = asked["stream"] == true;
    match request.uri().path() {
        "/v1/chat/completions" if streams => chat_stream(),
        "/v1/chat/completions" => json_answer(
            200,
            &json!({
                "id": "1", "object": "chat.completion", "created": 1, "model": "a-model",
                "choices": [{ "index": 0, "finish_reason": "stop", "message": { "role": "assistant", "content": "Hello!" } }],
                "usage": { "prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2 },
            }),
        ),
        "/v1/responses" if streams => events([
            &json!({ "type": "response.output_text.delta", "sequence_number": 0, "item_id": "1", "output_index": 0, "content_index": 0, "delta": "Hel", "logprobs": [] }),
            &json!({ "type": "response.output_text.delta", "sequence_number": 1, "item_id": "1", "output_index": 0, "content_index": 0, "delta": "lo!", "logprobs": [] }),
            &json!({ "type": "response.completed", "sequence_number": 2, "response": response() }),
        ]),
        "/v1/responses" => json_answer(200, &response()),
        "/v1/models" => json_answer(
            200,
            &json!({ "object": "list", "data": [{ "id": "Hello!", "object": "model", "created": 1, "owned_by": "me" }] }),
        ),
        "/v1/messages" if streams => message_stream(),
        "/v1/messages" => json_answer(200, &message("Hello!")),
        path => panic!("{path}"),
    }
}

fn chat_stream() -> Answer {
    let chunk = |choices: Value, usage: Value| {
        let chunk = json!({ "id": "1", "object": "chat.completion.chunk", "created": 1, "model": "a-model", "choices": choices, "usage": usage });
        format!("data: {chunk}\n\n")
    };
    let delta = |text: &str| {
        let choice = json!({ "index": 0, "delta": { "content": text }, "finish_reason": null });
        chunk(json!([choice]), Value::Null)
    };
    let usage = json!({ "prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2 });
    let body = [delta("Hel"), delta("lo!"), chunk(json!([]), usage), "data: [DONE]\n\n".to_owned()].concat();
    answer_with(200, [("content-type", "text/event-stream")], body)
}

fn response() -> Value {
    json!({
        "id": "1", "object": "response", "created_at": 1, "status": "completed", "model": "a-model",
        "output": [{
            "id": "1", "type": "message", "role": "assistant", "status": "completed",
            "content": [{ "type": "output_text", "text": "Hello!", "annotations": [] }],
        }],
        "parallel_tool_calls": false, "tool_choice": "auto", "tools": [],
        "usage": {
            "input_tokens": 1, "output_tokens": 1, "total_tokens": 2,
            "input_tokens_details": { "cached_tokens": 0 }, "output_tokens_details": { "reasoning_tokens": 0 },
        },
    })
}

fn message(text: &str) -> Value {
    let content = if text.is_empty() { json!([]) } else { json!([{ "type": "text", "text": text }]) };
    json!({
        "id": "1", "type": "message", "role": "assistant", "model": "a-model", "content": content,
        "stop_reason": null, "stop_sequence": null, "usage": { "input_tokens": 1, "output_tokens": 1 },
    })
}

fn message_stream() -> Answer {
    let delta = |text: &str| json!({ "type": "content_block_delta", "index": 0, "delta": { "type": "text_delta", "text": text } });
    events([
        &json!({ "type": "message_start", "message": message("") }),
        &json!({ "type": "content_block_start", "index": 0, "content_block": { "type": "text", "text": "" } }),
        &delta("Hel"),
        &delta("lo!"),
        &json!({ "type": "content_block_stop", "index": 0 }),
        &json!({ "type": "message_delta", "delta": { "stop_reason": "end_turn", "stop_sequence": null }, "usage": { "output_tokens": 2 } }),
        &json!({ "type": "message_stop" }),
    ])
}

#[tokio::test]
async fn sdk_calls_succeed_while_one_key_remains() {
    let (upstream, limited) = upstream([("a", 2), ("b", 3), ("c", usize::MAX)]).await;
    let gateway = Gateway::before(upstream.address(), &["a", "b", "c"], INJECT).await;
    let outcomes = calls(&gateway, "no matter what", 0, &[CALLS, CALLS].concat()).await;
    assert_eq!(texts(&outcomes), ["Hello!"; 14]);
    assert_eq!(*limited.lock().unwrap(), 2, "a and b are limited once each and then not used");
}

#[tokio::test]
async fn sdks_raise_rate_limit_errors_with_retry_after() {
    let (upstream, _) = upstream([("a", 0), ("b", 0)]).await;
    let [inject, places] = INJECT;
    let arguments = [inject, places, "--pace=false", "--wait", "0"];
    let gateway = Gateway::before(upstream.address(), &["a", "b"], arguments).await;
    let outcomes =
        calls(&gateway, "no matter what", 0, &["chat", "chat_stream", "message", "message_stream"]).await;
    let errors = [
        "openai.RateLimitError",
        "openai.RateLimitError",
        "anthropic.RateLimitError",
        "anthropic.RateLimitError",
    ];
    for (outcome, error) in outcomes.iter().zip(errors) {
        assert_eq!((&outcome["error"], &outcome["status"]), (&json!(error), &json!(429)), "{outcome}");
        let wait: u64 = outcome["retry_after"].as_str().unwrap().parse().unwrap();
        assert!((60..=120).contains(&wait), "{outcome}");
    }
    assert!(outcomes[0]["message"].as_str().unwrap().contains("slow down"), "{}", outcomes[0]);
    for outcome in &outcomes[1..] {
        let message = outcome["message"].as_str().unwrap();
        assert!(message.contains("all keys rest or have no room; the first is available in"), "{message}");
    }
    assert_eq!(upstream.keys(), ["a", "b"]);
}

#[tokio::test]
async fn a_retrying_sdk_honours_retry_after_and_succeeds() {
    let seen = Arc::new(Mutex::new(HashSet::new()));
    let upstream = Server::start(move |request| {
        let is_first = seen.lock().unwrap().insert(request.uri().path().to_owned());
        std::future::ready(if is_first { answer(429, "") } else { reply(&request) })
    })
    .await;
    let gateway =
        Gateway::before(upstream.address(), &["a"], ["--pace=false", "--wait", "0", "--cooldown", "1"]).await;
    let outcomes = calls(&gateway, "no matter what", 1, &["chat", "message"]).await;
    assert_eq!(texts(&outcomes), ["Hello!"; 2]);
    assert_eq!(upstream.count(), 4, "each call is limited once and served once");
}

#[tokio::test]
async fn sdks_raise_their_own_401_and_413_errors() {
    let upstream = Server::start(|request| std::future::ready(reply(&request))).await;
    let arguments = ["--client-token", "the-token", "--max-body", "1000000"];
    let gateway = Gateway::before(upstream.address(), &["a"], arguments).await;
    let failed = async |token: &str, all: &[&str]| {
        let outcomes = calls(&gateway, token, 0, all).await;
        let errors = outcomes.iter().map(|outcome| (outcome["error"].clone(), outcome["status"].clone()));
        errors
            .map(|(error, status)| (error.as_str().unwrap_or("none").to_owned(), status))
            .collect::<Vec<_>>()
    };
    let error = |name: &str, status: u16| (name.to_owned(), json!(status));

    assert_eq!(
        failed("another-token", &["chat", "chat_stream", "message"]).await,
        [
            error("openai.AuthenticationError", 401),
            error("openai.AuthenticationError", 401),
            error("anthropic.AuthenticationError", 401),
        ]
    );
    assert_eq!(
        failed("the-token", &["chat_long", "message_long"]).await,
        [error("openai.APIStatusError", 413), error("anthropic.ContentTooLargeError", 413)]
    );
    assert_eq!(upstream.count(), 0);
    assert_eq!(texts(&calls(&gateway, "the-token", 0, &["chat", "message"]).await), ["Hello!"; 2]);
}
