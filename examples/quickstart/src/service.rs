//! The local service: a token bucket for each key, and OpenAI's words for a limit.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::{
    Json, Router,
    body::Bytes,
    extract::State,
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header::AUTHORIZATION},
    response::{IntoResponse, Response},
    routing::post,
};
use serde_json::json;
use tokio::net::TcpListener;
use tower_key_rotation::{InvalidKeyId, KeyId};

use crate::{
    bucket::{Taken, TokenBucket},
    ledger::Ledger,
    target::Target,
    watch,
};

/// The keys that it knows, each with its id.
pub(crate) const KEYS: [(&str, &str); 5] = [
    ("alpha", "sk-local-4f1c"),
    ("beta", "sk-local-9b27"),
    ("gamma", "sk-local-03de"),
    ("delta", "sk-local-c85a"),
    ("epsilon", "sk-local-71e6"),
];

/// What a key may send at once, and a second. A third of 300 requests passes at once; the rest takes several
/// cooldowns of 2 seconds, in each of which a bucket fills up again.
const BURST: u32 = 20;
const PER_SECOND: u32 = 10;

const TIME_TO_ANSWER: Duration = Duration::from_millis(50);

const LIMIT: &str = "x-ratelimit-limit-requests";
const REMAINING: &str = "x-ratelimit-remaining-requests";
const RESET: &str = "x-ratelimit-reset-requests";
const RETRY_AFTER_MS: HeaderName = HeaderName::from_static("retry-after-ms");

struct Service {
    accounts: HashMap<String, Account>,
    ledger: Arc<Ledger>,
}

struct Account {
    id: KeyId,
    bucket: Mutex<TokenBucket>,
}

/// Starts it on a free port of this machine, with full buckets.
pub(crate) async fn start(ledger: &Arc<Ledger>) -> io::Result<Target> {
    let accounts = KEYS.iter().map(|(id, secret)| Account::new(id, secret)).collect::<Result<_, _>>();
    let service = Service { accounts: accounts.map_err(io::Error::other)?, ledger: ledger.clone() };
    let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
    let address = listener.local_addr()?;
    let router = Router::new().route("/v1/chat/completions", post(answer)).with_state(Arc::new(service));
    tokio::spawn(async move { axum::serve(listener, router).await });
    Target::local(&format!("http://{address}/v1/chat/completions")).map_err(io::Error::other)
}

impl Account {
    /// With what an `Authorization` header says for it.
    fn new(id: &str, secret: &str) -> Result<(String, Self), InvalidKeyId> {
        let bucket = Mutex::new(TokenBucket::full(BURST, PER_SECOND));
        Ok((format!("Bearer {secret}"), Self { id: KeyId::new(id)?, bucket }))
    }
}

async fn answer(State(service): State<Arc<Service>>, headers: HeaderMap, _body: Bytes) -> Response {
    let arrived_at = service.ledger.now();
    let account = headers.get(AUTHORIZATION).and_then(|key| service.accounts.get(key.to_str().ok()?));
    let Some(account) = account else { return unknown_key() };
    if let Some(before_pick) = watch::stamped(&headers, &watch::BEFORE_PICK) {
        service.ledger.arrived(&account.id, before_pick, arrived_at);
    }
    let taken = account.bucket.lock().unwrap_or_else(PoisonError::into_inner).take();
    let mut response = if taken.granted {
        tokio::time::sleep(TIME_TO_ANSWER).await;
        completion()
    } else {
        limited(&account.id, service.ledger.now(), taken.wait)
    };
    response.headers_mut().extend(describe(&taken));
    response
}

fn completion() -> Response {
    let message = json!({ "role": "assistant", "content": "Hello!" });
    Json(json!({ "object": "chat.completion", "choices": [{ "index": 0, "message": message }] }))
        .into_response()
}

fn limited(key: &KeyId, answered_at: Duration, wait: Duration) -> Response {
    let error = json!({
        "message": "Rate limit reached for requests",
        "type": "requests",
        "param": null,
        "code": "rate_limit_exceeded",
    });
    let mut response = (StatusCode::TOO_MANY_REQUESTS, Json(json!({ "error": error }))).into_response();
    response.headers_mut().insert(RETRY_AFTER_MS, HeaderValue::from(in_millis(wait)));
    response.headers_mut().insert(watch::ANSWERED, watch::stamp(answered_at));
    response.headers_mut().extend(HeaderValue::try_from(key.as_str()).map(|key| (watch::KEY, key)));
    response
}

fn unknown_key() -> Response {
    let error = json!({
        "message": "Incorrect API key provided",
        "type": "invalid_request_error",
        "param": null,
        "code": "invalid_api_key",
    });
    (StatusCode::UNAUTHORIZED, Json(json!({ "error": error }))).into_response()
}

/// The headers of every response, as OpenAI sends them: the state of the bucket when the request came.
fn describe(taken: &Taken) -> impl Iterator<Item = (HeaderName, HeaderValue)> {
    let reset = HeaderValue::try_from(as_go_prints(taken.reset)).ok();
    let numbers =
        [(LIMIT, BURST), (REMAINING, taken.remaining)].map(|(name, number)| (name, Some(number.into())));
    numbers
        .into_iter()
        .chain([(RESET, reset)])
        .filter_map(|(name, value)| Some((HeaderName::from_static(name), value?)))
}

/// `120ms` or `1.5s`, as OpenAI's headers have it; rounded up, and less than a minute here.
fn as_go_prints(time: Duration) -> String {
    match in_millis(time) {
        millis @ 0..1000 => format!("{millis}ms"),
        millis => format!("{}s", millis as f64 / 1000.0),
    }
}

/// Rounded up: a client that comes back then is not too early.
fn in_millis(time: Duration) -> u64 {
    u64::try_from(time.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX)
}
