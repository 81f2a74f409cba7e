//! Pacing, on by default: the gateway knows what the API allows each key, for each model apart, and waits instead of failing.

mod support;

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::{StreamExt, future::join_all, stream::FuturesUnordered};
use http::Request;
use serde_json::{Value, json};
use support::{gateway::Gateway, *};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// Requests that an API allows each key and model: so many a second, after a burst.
const RATE: f64 = 3.0;
const BURST: f64 = 5.0;

type Buckets = HashMap<(String, String), (Instant, f64)>;

/// An API that limits each key and model by a token bucket, and says what is left as OpenAI does.
#[derive(Clone, Default)]
struct Api {
    /// By key and model: when it was used last, and what was left then.
    buckets: Arc<Mutex<Buckets>>,
    refused: Arc<Mutex<usize>>,
}

impl Api {
    async fn start(&self) -> Server {
        let api = self.clone();
        Server::start(move |request| std::future::ready(api.answer(&request))).await
    }

    fn answer(&self, request: &Request<Bytes>) -> Answer {
        let now = Instant::now();
        let mut buckets = self.buckets.lock().unwrap();
        let (at, level) =
            buckets.entry((key_of(request).unwrap().to_owned(), model(request))).or_insert((now, BURST));
        *level = (*level + (now - *at).as_secs_f64() * RATE).min(BURST);
        *at = now;
        let is_served = *level >= 1.0;
        if is_served {
            *level -= 1.0;
        } else {
            *self.refused.lock().unwrap() += 1;
        }
        let reset = format!("{}ms", ((BURST - *level) / RATE * 1_000.0).ceil());
        let headers = [
            ("x-ratelimit-limit-requests", &*BURST.to_string()),
            ("x-ratelimit-remaining-requests", &*level.floor().to_string()),
            ("x-ratelimit-reset-requests", &*reset),
        ];
        answer_with(if is_served { 200 } else { 429 }, headers, "")
    }
}

fn model(request: &Request<Bytes>) -> String {
    let body: Value = serde_json::from_slice(request.body()).unwrap();
    body["model"].as_str().unwrap().to_owned()
}

async fn post(http: &reqwest::Client, gateway: &Gateway, body: &Value) -> u16 {
    let request = http.post(gateway.url("/v1/chat/completions")).json(body);
    request.send().await.unwrap().status().as_u16()
}

/// As the SDKs write it: the model comes after the messages.
fn chat(first: &str, model: &str) -> Value {
    json!({ "messages": [{ "role": "user", "content": first }], "model": model })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn near_the_quota_every_request_is_served() {
    const REQUESTS: u32 = 120;
    let api = Api::default();
    let upstream = api.start().await;
    let gateway = Arc::new(Gateway::before(upstream.address(), &["a", "b", "c"], ["--wait", "120"]).await);
    let http = http();
    // Two models of three keys each: 90 % of what they allow together.
    let apart = Duration::from_secs_f64(1.0 / (2.0 * 3.0 * RATE * 0.9));
    let began = tokio::time::Instant::now();
    let requests = (0..REQUESTS).map(|number| {
        let (http, gateway) = (http.clone(), gateway.clone());
        tokio::spawn(async move {
            tokio::time::sleep_until(began + apart * number).await;
            post(&http, &gateway, &chat(&number.to_string(), ["one", "two"][number as usize % 2])).await
        })
    });
    let requests: Vec<_> = requests.collect();
    for status in join_all(requests).await {
        assert_eq!(status.unwrap(), 200);
    }
    let refused = *api.refused.lock().unwrap();
    assert!(refused <= REQUESTS as usize / 10, "{refused} requests of {REQUESTS} met a 429");
}

#[tokio::test]
async fn the_admin_lists_what_each_model_allows() {
    let upstream = Api::default().start().await;
    let gateway = Gateway::before(upstream.address(), &["a", "b"], []).await;
    let http = http();
    let scopes = async || -> Vec<Value> {
        let scopes = http.get(gateway.admin_url("/admin/api/scopes")).send().await.unwrap();
        scopes.json().await.unwrap()
    };
    assert_eq!(scopes().await, [] as [Value; 0]);
    for model in ["large", "large", "small"] {
        assert_eq!(post(&http, &gateway, &chat("hello", model)).await, 200);
    }
    let scopes = scopes().await;
    let known: Vec<_> = scopes.iter().map(|scope| (&scope["scope"], &scope["known_by_headers"])).collect();
    // One conversation keeps its key.
    assert_eq!(known, [(&json!("large"), &json!(1)), (&json!("small"), &json!(1))]);
    let left = scopes[0]["requests_left"].as_f64().unwrap();
    assert!((2.9..=5.0).contains(&left), "{left}");
    assert_eq!((&scopes[0]["waiting"], &scopes[0]["limited_despite_pacing"]), (&json!(0), &json!(0)));
}

#[tokio::test]
async fn a_model_without_room_leaves_the_others_alone() {
    let upstream = Server::start(|request| {
        let has_room = model(&request) == "small";
        let none = || answer_with(429, [("retry-after", "500")], "");
        std::future::ready(if has_room { answer(200, "") } else { none() })
    })
    .await;
    let gateway = Gateway::before(upstream.address(), &["a", "b"], ["--wait", "0"]).await;
    let http = http();
    for _ in 0..3 {
        assert_eq!(post(&http, &gateway, &chat("hello", "large")).await, 429);
        assert_eq!(post(&http, &gateway, &chat("hello", "small")).await, 200);
    }
    let of_large = upstream.requests().iter().filter(|request| model(request) == "large").count();
    assert_eq!(of_large, 2, "each key is tried once");
}

#[tokio::test]
async fn a_429_names_the_time_of_the_first_key() {
    let upstream = Server::start(|request| {
        let wait = if key_of(&request) == Some("a") { "40" } else { "3600" };
        std::future::ready(answer_with(429, [("retry-after", wait)], ""))
    })
    .await;
    let gateway = Gateway::before(upstream.address(), &["a", "b"], ["--wait", "0"]).await;
    let http = http();
    for _ in 0..3 {
        let body = chat("hello", "m").to_string();
        let request = http.post(gateway.url("/v1")).header("content-type", "application/json").body(body);
        let answer = request.send().await.unwrap();
        let wait: u64 = answer.headers()["retry-after"].to_str().unwrap().parse().unwrap();
        assert!(answer.status() == 429 && wait <= 40, "{answer:?}");
    }
}

#[tokio::test]
async fn requests_beyond_those_in_flight_may_come_again() {
    let upstream = Server::start(|_| std::future::pending()).await;
    let gateway = Gateway::before(upstream.address(), &["a"], ["--wait", "1"]).await;
    let http = http();
    let chat = chat("hello", "m");
    let mut posts: FuturesUnordered<_> = (0..10).map(|_| post(&http, &gateway, &chat)).collect();
    // The first ones are in flight and have no answer.
    assert_eq!(in_time(posts.next()).await, Some(429));
}

#[tokio::test]
async fn a_conversation_keeps_its_key_unless_pacing_is_off() {
    let (keys, http) = (["a", "b", "c", "d", "e"], http());
    for (pace, keeps) in [("--pace", true), ("--pace=false", false)] {
        let upstream = Server::limiting([]).await;
        let gateway = Gateway::before(upstream.address(), &keys, [pace]).await;
        let mut used = BTreeSet::new();
        for conversation in 0..60 {
            let before = upstream.count();
            for turn in 0..4 {
                let mut body = chat(&format!("question {conversation}"), "m");
                for said in 0..turn {
                    body["messages"]
                        .as_array_mut()
                        .unwrap()
                        .push(json!({ "role": "assistant", "content": said }));
                }
                assert_eq!(post(&http, &gateway, &body).await, 200);
            }
            let of_this: BTreeSet<_> = upstream.keys().drain(before..).collect();
            assert_eq!(of_this.len() == 1, keeps, "{of_this:?}");
            used.extend(of_this);
        }
        assert_eq!(used.len(), 5, "conversations share the keys: {used:?}");
    }
}

#[tokio::test]
async fn bodies_that_are_read_ahead_arrive_unchanged() {
    let upstream = Server::limiting([]).await;
    let gateway = Gateway::before(upstream.address(), &["a"], ["--keep-body", "100000"]).await;
    let long = chat(&"long ".repeat(100_000), "m").to_string();
    for body in [long.as_str(), "{\"model\":", "[1, 2]", "not json", ""] {
        let request = http().post(gateway.url("/v1")).header("content-type", "application/json");
        assert_eq!(request.body(body.to_owned()).send().await.unwrap().status(), 200);
        assert!(upstream.requests().last().unwrap().body() == body, "{} bytes", body.len());
    }
}

#[tokio::test]
async fn a_caller_that_does_not_finish_its_body_holds_no_key() {
    let upstream = Server::limiting([]).await;
    let arguments = ["--response-timeout", "2", "--wait", "0"];
    let gateway = Gateway::before(upstream.address(), &["a"], arguments).await;
    let mut stalled = TcpStream::connect(gateway.address()).await.unwrap();
    let begun = "POST /v1 HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{\"model\":";
    stalled.write_all(begun.as_bytes()).await.unwrap();
    let http = http();
    for _ in 0..10 {
        assert_eq!(post(&http, &gateway, &chat("hello", "m")).await, 200);
    }
    let mut answer = [0; 12];
    in_time(stalled.read_exact(&mut answer)).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 408");
    assert_eq!(upstream.count(), 10);
}
