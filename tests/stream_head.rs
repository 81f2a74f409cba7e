//! Streams that begin with an error, or have one later: recorded ones are in `corpus/streams`.
//!
//! A recorded stream begins with comments, as the other files of the corpus do. `# expect:` says what becomes of it:
//!
//! - `content`: it goes to the caller, and its key stays healthy;
//! - `error, …`: it begins with an error. `passed on`: it goes to the caller; `without capacity`: another key serves, and
//!   the first one stays healthy; a verdict: another key serves, and the first one rests;
//! - `content, then error, …`: it goes to the caller, and its key rests by that verdict.

// A test may panic, and so may what it calls.

mod support;

use std::{
    fs,
    future::ready,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{FutureExt, stream::unfold};
use http::{
    HeaderMap, HeaderName, HeaderValue, Request, Response,
    header::{CONTENT_ENCODING, CONTENT_TYPE},
};
use http_body::{Body, Frame};
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use support::*;
use tokio::time::{Instant, sleep, timeout};
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_key_rotation::{
    Failover, KeyId, KeyPool, KeyRotationLayer, KeySpec, Quota, RestCause, Status, Traits,
    classify::LlmGateway,
};

const GOOD: &str = "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"fine\"}}]}\n\ndata: [DONE]\n\n";
const START: &str = "event: message_start\ndata: {\"type\":\"message_start\"}\n\n";
const PING: &str = "event: ping\ndata: {\"type\":\"ping\"}\n\n";
const CONTENT: &str = "data: {\"type\":\"content_block_delta\",\"delta\":{\"text\":\"Hi\"}}\n\n";
const LIMITED: &str =
    "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"rate_limit_error\"}}\n\n";
const OVERLOADED: &str =
    "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"overloaded_error\"}}\n\n";
const UNKNOWN_KEY: &str =
    "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"authentication_error\"}}\n\n";

/// A part of a stream.
#[derive(Clone, Debug)]
enum Part {
    Data(Bytes),
    Pause(Duration),
    Fails,
    /// The stream stays open, and nothing comes.
    Stays,
}

use Part::{Fails, Pause, Stays};

fn data(text: &'static str) -> Part {
    Part::Data(Bytes::from_static(text.as_bytes()))
}

type Streaming = Response<BoxBody<Bytes, io::Error>>;

/// A response with such a stream.
fn streaming(parts: impl IntoIterator<Item = Part>) -> Streaming {
    let parts: Vec<_> = parts.into_iter().collect();
    let stream = unfold(parts.into_iter(), |mut parts| async move {
        loop {
            match parts.next()? {
                Part::Data(data) => return Some((Ok(Frame::data(data)), parts)),
                Pause(time) => sleep(time).await,
                Fails => return Some((Err(io::ErrorKind::ConnectionReset.into()), parts)),
                Stays => std::future::pending().await,
            }
        }
    });
    let body = BodyExt::boxed(StreamBody::new(stream));
    Response::builder().header(CONTENT_TYPE, "text/event-stream").body(body).unwrap()
}

/// A service that answers requests by their keys, and notes these.
#[derive(Clone)]
struct Scripted {
    answer: Arc<dyn Fn(&str) -> Streaming + Send + Sync>,
    keys: Arc<Mutex<Vec<String>>>,
}

type Req = Request<Full<Bytes>>;

impl Scripted {
    fn new(answer: impl Fn(&str) -> Streaming + Send + Sync + 'static) -> Self {
        Self { answer: Arc::new(answer), keys: Arc::default() }
    }

    /// The first key's answers have these parts, and all others' [`GOOD`].
    fn alpha(parts: impl IntoIterator<Item = Part>) -> Self {
        let parts: Vec<_> = parts.into_iter().collect();
        Self::new(move |key| streaming(if key == "alpha" { parts.clone() } else { vec![data(GOOD)] }))
    }

    fn service(
        &self,
    ) -> impl Service<Req, Response = Streaming, Error = io::Error, Future: Send> + Clone + Send + use<> {
        let this = self.clone();
        service_fn(move |request: Req| {
            let key = key_of(&request).unwrap().to_owned();
            let answer = (this.answer)(&key);
            this.keys.lock().unwrap().push(key);
            ready(Ok(answer))
        })
    }

    fn keys(&self) -> Vec<String> {
        self.keys.lock().unwrap().clone()
    }
}

fn request() -> Req {
    Request::post("https://api.example.com/v1").body(Full::from("prompt")).unwrap()
}

fn scoped(scope: &str) -> Req {
    let mut request = request();
    request.extensions_mut().insert(Traits::new().scope(scope));
    request
}

fn keys<const N: usize>(ids: [&str; N]) -> KeyPool {
    KeyPool::builder().keys(ids.map(|id| (id, format!("sk-{id}")))).build().unwrap()
}

type Layered = KeyRotationLayer<LlmGateway, Failover>;

fn layer(pool: &KeyPool) -> Layered {
    let layer = KeyRotationLayer::new(pool).classify(LlmGateway::new()).failover(Failover::attempts(3));
    layer.stream_head(64 * 1024, 10 * SECOND)
}

/// All of a body that ends.
async fn text_of<B: Body<Error: std::fmt::Debug>>(body: B) -> String {
    let collected = timeout(10 * MINUTE, body.collect()).await.expect("the body ends").unwrap();
    String::from_utf8(collected.to_bytes().to_vec()).unwrap()
}

// ---- recorded streams ----

struct Recorded {
    name: String,
    expected: String,
    source: String,
    headers: HeaderMap,
    body: Bytes,
}

impl Recorded {
    fn read(path: &Path) -> Self {
        let file = fs::read_to_string(path).unwrap();
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let (head, body) = file.split_once("\n\n").unwrap();
        let (mut expected, mut source) = (String::new(), String::new());
        let mut headers = HeaderMap::new();
        for line in head.lines() {
            match line.split_once(": ") {
                Some(("# expect", value)) => expected = value.to_owned(),
                Some(("# source", value)) => source = value.to_owned(),
                Some((name, value)) => {
                    headers
                        .insert(name.parse::<HeaderName>().unwrap(), HeaderValue::from_str(value).unwrap());
                }
                None => assert_eq!(line, "HTTP/1.1 200 OK", "{name}"),
            }
        }
        Self { name, expected, source, headers, body: Bytes::copy_from_slice(body.as_bytes()) }
    }

    fn all() -> Vec<Self> {
        let folder: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus/streams");
        let mut all: Vec<_> =
            fs::read_dir(folder).unwrap().map(|file| Self::read(&file.unwrap().path())).collect();
        all.sort_by(|one, other| one.name.cmp(&other.name));
        all
    }

    fn one(name: &str) -> Self {
        Self::all().into_iter().find(|recorded| recorded.name == name).unwrap()
    }

    /// The first key's answers are this stream, in these pieces.
    fn service(&self, pieces: &[&[u8]]) -> Scripted {
        let parts: Vec<_> = pieces.iter().map(|piece| Part::Data(Bytes::copy_from_slice(piece))).collect();
        let headers = self.headers.clone();
        Scripted::new(move |key| {
            if key != "alpha" {
                return streaming([data(GOOD)]);
            }
            let mut response = streaming(parts.clone());
            *response.headers_mut() = headers.clone();
            response
        })
    }

    /// Panics unless the stream, in these pieces, does what it names.
    fn check(&self, pieces: &[&[u8]]) {
        let Self { name, expected, body, .. } = self;
        let pool = keys(["alpha", "beta"]);
        let service = self.service(pieces);
        let client = layer(&pool).layer(service.service());
        let got = async { client.oneshot(request()).await.unwrap().into_body().collect().await.unwrap() };
        let got = got.now_or_never().unwrap().to_bytes();
        let is_served_by_other = expected.starts_with("error, ") && expected != "error, passed on";
        let verdict = expected.rsplit(", ").next().unwrap();
        let status = match verdict {
            "rate limited" => Status::RateLimited,
            "exhausted" | "exhausted in the scope" => Status::Exhausted,
            "content" | "passed on" | "without capacity" | "nothing" => Status::Healthy,
            other => panic!("{name}: {other}"),
        };
        if is_served_by_other {
            assert_eq!(service.keys(), ["alpha", "beta"], "{name}");
            assert_eq!(got, GOOD, "{name}");
        } else {
            assert_eq!(service.keys(), ["alpha"], "{name}");
            assert_eq!(got, *body, "{name}");
        }
        assert_eq!(stats_of(&pool, "alpha").status, status, "{name}");
        assert_eq!(stats_of(&pool, "beta").status, Status::Healthy, "{name}");
    }
}

#[tokio::test]
async fn f44_recorded_streams_do_what_they_name() {
    for recorded in Recorded::all() {
        recorded.check(&[&recorded.body]);
        assert!(recorded.source.starts_with("https://"), "{}", recorded.name);
    }
}

#[tokio::test]
async fn f44_pieces_of_any_length_mean_the_same() {
    for recorded in Recorded::all() {
        for length in [1, 2, 3, 7, 64] {
            recorded.check(&recorded.body.chunks(length).collect::<Vec<_>>());
        }
    }
}

#[tokio::test]
async fn f44_a_split_at_any_byte_means_the_same() {
    for name in ["anthropic_rate_limit_first", "openai_chat_rate_limit_later", "gemini_overloaded_first"] {
        let recorded = Recorded::one(name);
        for at in 0..=recorded.body.len() {
            let (one, other) = recorded.body.split_at(at);
            recorded.check(&[one, other]);
        }
    }
}

// ---- limits of the hold ----

#[tokio::test(start_paused = true)]
async fn f44_a_long_beginning_passes_on_unheld() {
    let pool = keys(["alpha", "beta"]);
    let service = Scripted::alpha([data(START), data(PING), Stays]);
    let layer = layer(&pool).stream_head(START.len() + 1, 10 * SECOND);
    let before = Instant::now();
    let response = layer.layer(service.service()).oneshot(request()).await.unwrap();
    assert_eq!(before.elapsed(), Duration::ZERO);
    let mut body = response.into_body();
    assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), START);
    assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), PING);
}

#[tokio::test(start_paused = true)]
async fn f44_a_slow_beginning_passes_on_in_time() {
    let pool = keys(["alpha", "beta"]);
    let service =
        Scripted::alpha([data(START), Pause(2 * SECOND), data(PING), Pause(20 * SECOND), data(LIMITED)]);
    let layer = layer(&pool).stream_head(1_000, 3 * SECOND);
    let before = Instant::now();
    let response = layer.layer(service.service()).oneshot(request()).await.unwrap();
    assert_eq!(before.elapsed(), 3 * SECOND);
    assert_eq!(stats_of(&pool, "alpha").status, Status::Healthy);
    // The caller has the head: the error is the caller's, and the key's.
    assert_eq!(text_of(response.into_body()).await, [START, PING, LIMITED].concat());
    assert_eq!(before.elapsed(), 22 * SECOND);
    assert_eq!(service.keys(), ["alpha"]);
    assert_eq!(stats_of(&pool, "alpha").status, Status::RateLimited);
}

#[tokio::test(start_paused = true)]
async fn f44_a_stream_without_content_passes_on() {
    for parts in [
        vec![],
        vec![data("")],
        vec![data(": hello\n\n")],
        vec![data(START), data(PING)],
        vec![data("event: error\n\n")],
    ] {
        let pool = keys(["alpha", "beta"]);
        let service = Scripted::alpha(parts.clone());
        let response = layer(&pool).layer(service.service()).oneshot(request()).await.unwrap();
        let sent: String = parts
            .iter()
            .map(|part| match part {
                Part::Data(data) => str::from_utf8(data).unwrap(),
                _ => "",
            })
            .collect();
        assert_eq!(text_of(response.into_body()).await, sent);
        assert_eq!(service.keys(), ["alpha"]);
        assert_eq!(stats_of(&pool, "alpha").status, Status::Healthy);
    }
}

#[tokio::test(start_paused = true)]
async fn f44_a_broken_stream_is_not_sent_again() {
    let pool = keys(["alpha", "beta"]);
    let service = Scripted::alpha([data(START), Fails]);
    let response = layer(&pool).layer(service.service()).oneshot(request()).await.unwrap();
    let mut body = response.into_body();
    assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), START);
    assert_eq!(body.frame().await.unwrap().unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(service.keys(), ["alpha"]);
}

/// When each frame of a body comes, and what it is.
async fn timed<B: Body<Data = Bytes, Error: std::fmt::Debug> + Unpin>(mut body: B) -> Vec<(Duration, Bytes)> {
    let begin = Instant::now();
    let mut frames = Vec::new();
    while let Some(frame) = body.frame().await {
        frames.push((begin.elapsed(), frame.unwrap().into_data().unwrap()));
    }
    frames
}

#[tokio::test(start_paused = true)]
async fn f44_the_first_content_comes_at_the_same_moment() {
    let millis = Duration::from_millis;
    let parts = [
        Pause(millis(40)),
        data(START),
        Pause(millis(300)),
        data(PING),
        Pause(millis(457)),
        data(CONTENT),
        Pause(millis(50)),
        data(CONTENT),
    ];
    let pool = keys(["alpha", "beta"]);
    let service = Scripted::alpha(parts);
    let with_key = |mut request: Req| {
        request.headers_mut().insert("authorization", HeaderValue::from_static("Bearer sk-alpha"));
        request
    };
    let begin = Instant::now();
    let bare = service.service().oneshot(with_key(request())).await.unwrap();
    let bare = timed(bare.into_body()).await;
    let first = bare.iter().find(|(_, data)| *data == CONTENT).unwrap().0;
    assert_eq!((first, begin.elapsed()), (millis(797), millis(847)));

    let begin = Instant::now();
    let held = layer(&pool).layer(service.service()).oneshot(request()).await.unwrap();
    assert_eq!(begin.elapsed(), first);
    let held: Vec<_> = timed(held.into_body()).await;
    assert_eq!(held.iter().map(|(at, _)| *at).collect::<Vec<_>>(), [0, 0, 0, 50].map(millis));
    let data = |frames: &[(Duration, Bytes)]| frames.iter().map(|(_, data)| data.clone()).collect::<Vec<_>>();
    assert_eq!(data(&held), data(&bare));
}

#[tokio::test(start_paused = true)]
async fn other_responses_are_not_held() {
    let is_held = |name: HeaderName, value: &'static str, status: u16| {
        let service = Scripted::new(move |_| {
            let mut response = streaming([Stays]);
            response.headers_mut().insert(name.clone(), HeaderValue::from_static(value));
            *response.status_mut() = status.try_into().unwrap();
            response
        });
        let client = layer(&keys(["alpha"])).layer(service.service());
        client.oneshot(request()).now_or_never().is_none()
    };
    assert!(!is_held(CONTENT_TYPE, "application/json", 200));
    assert!(!is_held(CONTENT_TYPE, "text/event-streams", 200));
    assert!(!is_held(CONTENT_ENCODING, "gzip", 200));
    assert!(!is_held(CONTENT_ENCODING, "identity", 500));
    assert!(is_held(CONTENT_ENCODING, "identity", 200));
    assert!(is_held(CONTENT_TYPE, "Text/Event-Stream ; charset=utf-8", 206));
}

// ---- which key serves ----

#[tokio::test(start_paused = true)]
async fn f44_an_error_before_an_open_end_fails_over() {
    let pool = keys(["alpha", "beta"]);
    let service = Scripted::alpha([data(START), data(LIMITED), Stays]);
    let begin = Instant::now();
    let response = layer(&pool).layer(service.service()).oneshot(request()).await.unwrap();
    assert_eq!(begin.elapsed(), Duration::ZERO);
    assert_eq!(text_of(response.into_body()).await, GOOD);
}

#[tokio::test(start_paused = true)]
async fn f44_the_last_error_is_the_callers_whole() {
    for (error, status) in [(OVERLOADED, Status::Healthy), (LIMITED, Status::RateLimited)] {
        let pool = keys(["alpha", "beta"]);
        let service = Scripted::new(move |_| streaming([data(START), data(error)]));
        let response = layer(&pool).layer(service.service()).oneshot(request()).await.unwrap();
        assert_eq!(text_of(response.into_body()).await, [START, error].concat());
        assert_eq!(service.keys(), ["alpha", "beta"]);
        assert_eq!(pool.stats().keys.iter().map(|key| key.status).collect::<Vec<_>>(), [status; 2]);
    }
}

#[tokio::test(start_paused = true)]
async fn f44_two_keys_refused_alike_are_not_suspected() {
    let pool = keys(["alpha", "beta", "gamma"]);
    let service = Scripted::new(|_| streaming([data(UNKNOWN_KEY)]));
    let response = layer(&pool).layer(service.service()).oneshot(request()).await.unwrap();
    assert_eq!(text_of(response.into_body()).await, UNKNOWN_KEY);
    assert_eq!(service.keys(), ["alpha", "beta"]);
    assert!(pool.stats().keys.iter().all(|key| key.status == Status::Healthy));
}

#[tokio::test(start_paused = true)]
async fn f44_a_trial_succeeds_with_content_alone() {
    let pool = keys(["alpha", "beta"]);
    let now = Arc::new(Mutex::new(UNKNOWN_KEY));
    let alphas = now.clone();
    let service = Scripted::new(move |key| {
        streaming([data(START), data(if key == "alpha" { *alphas.lock().unwrap() } else { CONTENT })])
    });
    let client = layer(&pool).layer(service.service());
    let send = async || drop(text_of(client.clone().oneshot(request()).await.unwrap().into_body()).await);
    send().await;
    let alpha = || stats_of(&pool, "alpha");
    assert_eq!((alpha().status, alpha().cause), (Status::RateLimited, Some(RestCause::Confirmed)));
    // The first trial is refused, too, and the second one serves.
    sleep(61 * SECOND).await;
    send().await;
    assert_eq!(service.keys(), ["alpha", "beta", "alpha", "beta"]);
    assert_eq!(alpha().status, Status::RateLimited);
    // Not after the first interval again, but after twice as long.
    *now.lock().unwrap() = CONTENT;
    sleep(61 * SECOND).await;
    send().await;
    sleep(61 * SECOND).await;
    send().await;
    assert_eq!(service.keys()[4..], ["beta", "alpha"]);
    assert_eq!(alpha().status, Status::Healthy);
}

#[tokio::test(start_paused = true)]
async fn f44_the_retry_budget_counts_for_streams() {
    struct NoBudget;
    impl tower::retry::budget::Budget for NoBudget {
        fn deposit(&self) {}
        fn withdraw(&self) -> bool {
            false
        }
    }
    let pool = keys(["alpha", "beta"]);
    let service = Scripted::alpha([data(LIMITED)]);
    let failover = Failover::attempts(3).budget(NoBudget);
    let layer = KeyRotationLayer::new(&pool).classify(LlmGateway::new()).failover(failover);
    let client = layer.stream_head(1_000, SECOND).layer(service.service());
    assert_eq!(text_of(client.oneshot(request()).await.unwrap().into_body()).await, LIMITED);
    assert_eq!(service.keys(), ["alpha"]);
    assert_eq!(stats_of(&pool, "alpha").status, Status::RateLimited);
}

// ---- modes ----

#[tokio::test(start_paused = true)]
async fn f44_without_failover_the_key_rests() {
    for waits in [false, true] {
        for parts in [vec![data(START), data(LIMITED)], vec![data(CONTENT), data(LIMITED)]] {
            let pool = keys(["alpha", "beta"]);
            let service = Scripted::alpha(parts.clone());
            let layer = KeyRotationLayer::new(&pool).classify(LlmGateway::new());
            let layer = match waits {
                true => layer.wait_up_to(SECOND).stream_head(1_000, SECOND),
                false => layer.stream_head(1_000, SECOND),
            };
            let response = layer.layer(service.service()).oneshot(request()).await.unwrap();
            assert!(text_of(response.into_body()).await.ends_with(LIMITED));
            assert_eq!(service.keys(), ["alpha"]);
            assert_eq!(stats_of(&pool, "alpha").status, Status::RateLimited);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn f44_a_refused_stream_waits_for_the_key() {
    let pool = keys(["alpha"]);
    let service = Scripted::new({
        let first = Mutex::new(true);
        move |_| {
            let is_first = std::mem::take(&mut *first.lock().unwrap());
            streaming([data(START), data(if is_first { LIMITED } else { CONTENT })])
        }
    });
    let client = layer(&pool).wait_up_to(5 * MINUTE).layer(service.service());
    let begin = Instant::now();
    let response = client.oneshot(request()).await.unwrap();
    assert_eq!(text_of(response.into_body()).await, [START, CONTENT].concat());
    assert_eq!(service.keys(), ["alpha", "alpha"]);
    assert!(begin.elapsed() >= 2 * MINUTE);
}

#[tokio::test(start_paused = true)]
async fn f44_of_two_layers_the_inner_one_acts() {
    for parts in [vec![data(LIMITED)], vec![data(CONTENT), data(LIMITED)]] {
        let (inner, outer) = (keys(["alpha"]), keys(["alpha", "beta"]));
        let service = Scripted::alpha(parts);
        let client = service.service().map_err(io::Error::other::<io::Error>);
        let client = layer(&inner).layer(client).map_err(|error| io::Error::other(error.to_string()));
        let response = layer(&outer).layer(client).oneshot(request()).await.unwrap();
        assert!(text_of(response.into_body()).await.ends_with(LIMITED));
        assert_eq!(service.keys(), ["alpha"]);
        assert_eq!(stats_of(&inner, "alpha").status, Status::RateLimited);
        assert_eq!(stats_of(&outer, "alpha").status, Status::Healthy);
    }
}

#[tokio::test]
async fn f44_streams_fail_over_with_reqwest_and_its_middleware() {
    let answer = |key: &str| {
        let stream = if key == "alpha" { [START, LIMITED].concat() } else { GOOD.to_owned() };
        answer_with(200, [("content-type", "text/event-stream")], stream)
    };
    let server = async || Server::start(move |request| ready(answer(key_of(&request).unwrap()))).await;

    let (pool, service) = (keys(["alpha", "beta"]), server().await);
    let response = get(&layer(&pool).layer(http()), &service.url()).await.unwrap();
    assert_eq!(response.url().as_str(), service.url());
    assert_eq!(response.text().await.unwrap(), GOOD);
    assert_eq!(service.keys(), ["alpha", "beta"]);
    assert_eq!(stats_of(&pool, "alpha").status, Status::RateLimited);

    let (pool, service) = (keys(["alpha", "beta"]), server().await);
    let client = reqwest_middleware::ClientBuilder::new(http()).with(layer(&pool)).build();
    let response = client.get(service.url()).send().await.unwrap();
    assert_eq!(response.text().await.unwrap(), GOOD);
    assert_eq!(service.keys(), ["alpha", "beta"]);
    assert_eq!(stats_of(&pool, "alpha").status, Status::RateLimited);
}

// ---- what a request holds ----

#[tokio::test(start_paused = true)]
async fn f44_held_streams_are_in_flight_until_they_end() {
    let capped = || {
        let mut key = KeySpec::new(KeyId::new("alpha").unwrap(), "sk-alpha");
        key.max_in_flight = Some(1.try_into().unwrap());
        KeyPool::builder().key_spec(key).build().unwrap()
    };
    let has_room = |pool: &KeyPool| pool.lease(&Traits::new()).is_ok();

    // Held, passing, ended.
    let pool = capped();
    let service = Scripted::alpha([data(START), Pause(SECOND), data(CONTENT), Pause(SECOND), data(CONTENT)]);
    let client = layer(&pool).layer(service.service());
    let sent = tokio::spawn(client.oneshot(request()));
    sleep(SECOND / 2).await;
    assert!(!has_room(&pool));
    let mut body = sent.await.unwrap().unwrap().into_body();
    assert!(!has_room(&pool));
    while body.frame().await.is_some() {
        assert!(!has_room(&pool) || body.is_end_stream());
    }
    assert!(has_room(&pool));

    // Dropped while it is held.
    let pool = capped();
    let client = layer(&pool).layer(Scripted::alpha([data(START), Stays]).service());
    let sent = tokio::spawn(client.oneshot(request()));
    sleep(SECOND).await;
    assert!(!has_room(&pool));
    sent.abort();
    assert!(sent.await.unwrap_err().is_cancelled());
    assert!(has_room(&pool));

    // Refused in its first event.
    let pool = capped();
    let client = layer(&pool).layer(Scripted::alpha([data(START), data(OVERLOADED), Stays]).service());
    let response = client.oneshot(request()).await.unwrap();
    assert!(has_room(&pool));
    drop(response);
    assert!(has_room(&pool));
}

fn thousand_tokens() -> KeyPool {
    let quota = Quota::per_day(1_000).burst(1_000).tokens();
    KeyPool::builder().key("alpha", "sk-alpha").quota(quota).build().unwrap()
}

fn left(pool: &KeyPool) -> f64 {
    let explanation = pool.explain(&Traits::new());
    explanation.keys[0].budgets.iter().map(|budget| budget.left).fold(f64::INFINITY, f64::min)
}

fn for_400_tokens() -> Req {
    let mut request = request();
    request.extensions_mut().insert(Traits::new().tokens(400));
    request
}

/// The tokens that are left of 1,000, after a request for 400 whose stream has these parts.
async fn left_after(parts: Vec<Part>) -> f64 {
    let pool = thousand_tokens();
    let client = layer(&pool).layer(Scripted::alpha(parts).service());
    let response = client.oneshot(for_400_tokens()).await.unwrap();
    drop(response.into_body().collect().await);
    left(&pool)
}

/// The same for `reqwest`, with a body of a known length.
async fn left_after_by_reqwest(text: String) -> f64 {
    let pool = thousand_tokens();
    let client = service_fn(move |_: reqwest::Request| {
        let response = Response::builder().header(CONTENT_TYPE, "text/event-stream").body(text.clone());
        ready(io::Result::Ok(reqwest::Response::from(response.unwrap())))
    });
    let layer = layer(&pool).describe(|_: &reqwest::Request| Traits::new().tokens(400));
    let response = get(&layer.layer(client), "https://api.example.com/v1").await.unwrap();
    response.text().await.unwrap();
    left(&pool)
}

#[tokio::test(start_paused = true)]
async fn f44_a_refused_stream_gives_its_tokens_back() {
    let left = left_after_by_reqwest([START, OVERLOADED].concat()).await;
    assert!(left > 990.0, "{left}");
    let left = left_after_by_reqwest([START, CONTENT, OVERLOADED].concat()).await;
    assert!((599.0..650.0).contains(&left), "{left}");

    let left = left_after(vec![data(START), data(OVERLOADED)]).await;
    assert!(left > 990.0, "{left}");
    let left = left_after(vec![data(START), data(CONTENT), data(OVERLOADED)]).await;
    assert!((599.0..650.0).contains(&left), "{left}");
}

#[tokio::test(start_paused = true)]
async fn f44_a_dropped_stream_gives_half_back() {
    let about_800 = |pool: &KeyPool| (799.0..850.0).contains(&left(pool));
    // While it is held.
    let pool = thousand_tokens();
    let client = layer(&pool).layer(Scripted::alpha([data(START), Stays]).service());
    let sent = tokio::spawn(client.oneshot(for_400_tokens()));
    sleep(SECOND).await;
    sent.abort();
    assert!(sent.await.unwrap_err().is_cancelled());
    assert!(about_800(&pool), "{}", left(&pool));
    // While it passes.
    let pool = thousand_tokens();
    let client = layer(&pool).layer(Scripted::alpha([data(START), data(CONTENT), Stays]).service());
    let mut body = client.oneshot(for_400_tokens()).await.unwrap().into_body();
    body.frame().await.unwrap().unwrap();
    drop(body);
    assert!(about_800(&pool), "{}", left(&pool));
}

#[tokio::test(start_paused = true)]
async fn f44_an_error_in_a_scope_rests_the_scope() {
    for parts in [vec![data(START), data(LIMITED)], vec![data(CONTENT), data(LIMITED)]] {
        for paced in [false, true] {
            let pool = KeyPool::builder().key("alpha", "sk-alpha");
            let pool = if paced { pool.paced() } else { pool }.build().unwrap();
            let client = layer(&pool).layer(Scripted::alpha(parts.clone()).service());
            let response = client.oneshot(scoped("a model")).await.unwrap();
            assert!(text_of(response.into_body()).await.ends_with(LIMITED));
            let room =
                |scope| pool.lease(&Traits::new().scope(scope)).map(drop).map_err(|error| error.retry_in());
            assert_eq!(room("another"), Ok(()));
            let wait = room("a model").unwrap_err().unwrap();
            assert!(wait > MINUTE && wait <= 2 * MINUTE, "{wait:?}");
            assert_eq!(stats_of(&pool, "alpha").status, Status::Healthy);
            assert_eq!(stats_of(&pool, "alpha").limited, 1);
        }
    }
}
