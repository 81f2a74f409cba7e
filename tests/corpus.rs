//! Recorded responses of services, and what the classifiers make of them: `corpus/<service>/<name>.http`.
//!
//! A file begins with comments: `# expect:` a verdict, `# source:` where the response is documented or was seen, and
//! `# body:` with `gzip`, `deflate`, `br` or `zstd` if the service sent the body so. Then come the status line, the headers, an empty line and
//! the body.

use std::{
    convert::Infallible,
    fmt::Write as _,
    fs,
    future::ready,
    io::Write as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use brotli::enc::BrotliEncoderParams;
use bytes::Bytes;
use flate2::{
    Compression,
    write::{GzEncoder, ZlibEncoder},
};
use futures_util::FutureExt;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use proptest::{collection::vec, prelude::*, sample::select};
use ruzstd::encoding::{CompressionLevel, compress_to_vec};
use tower::{Layer, Service, ServiceExt, service_fn};
use tower_key_rotation::{
    KeyPool, KeyPoolBuilder, KeyRotationLayer, KeyStats, Status, Traits,
    classify::{
        Anthropic, AzureOpenAi, ClassifyResponse, Cohere, DeepSeek, Discord, Gemini, Generic, GitHub, Groq,
        Grpc, HuggingFace, LlmGateway, Mistral, Notion, OpenAi, OpenRouter, ResponseHead, Shopify, Slack,
        Stripe, Verdict, XAi,
    },
    clock::ManualClock,
};

type Classifier = Arc<dyn ClassifyResponse + Send + Sync>;

/// The folders of the corpus, and the classifiers of their services.
fn services() -> Vec<(&'static str, Classifier)> {
    vec![
        ("generic", Arc::new(Generic)),
        ("openai", Arc::new(OpenAi)),
        ("azure_openai", Arc::new(AzureOpenAi)),
        ("anthropic", Arc::new(Anthropic)),
        ("gemini", Arc::new(Gemini)),
        ("mistral", Arc::new(Mistral)),
        ("groq", Arc::new(Groq)),
        ("openrouter", Arc::new(OpenRouter)),
        ("xai", Arc::new(XAi)),
        ("deepseek", Arc::new(DeepSeek)),
        ("cohere", Arc::new(Cohere)),
        ("hugging_face", Arc::new(HuggingFace)),
        ("litellm", Arc::new(LlmGateway::new())),
        ("github", Arc::new(GitHub)),
        ("slack", Arc::new(Slack)),
        ("discord", Arc::new(Discord)),
        ("stripe", Arc::new(Stripe)),
        ("shopify", Arc::new(Shopify)),
        ("notion", Arc::new(Notion)),
        ("grpc", Arc::new(Grpc)),
    ]
}

/// The folders whose services [`LlmGateway`] knows, too.
const LLMS: [&str; 12] = [
    "openai",
    "azure_openai",
    "anthropic",
    "gemini",
    "mistral",
    "groq",
    "openrouter",
    "xai",
    "deepseek",
    "cohere",
    "hugging_face",
    "litellm",
];

/// A recorded response.
#[derive(Clone)]
struct Recorded {
    name: String,
    expected: String,
    source: String,
    status: StatusCode,
    headers: HeaderMap,
    /// As the service sent it.
    body: Bytes,
}

impl Recorded {
    fn read(path: &Path) -> Self {
        let file = fs::read(path).unwrap();
        let name = format!("{}/{}", folder(path), path.file_stem().unwrap().to_str().unwrap());
        let end = file
            .windows(2)
            .position(|bytes| bytes == b"\n\n")
            .unwrap_or_else(|| panic!("{name}: no empty line"));
        let (head, body) = (str::from_utf8(&file[..end]).unwrap(), &file[end + 2..]);
        let mut lines = head.lines().peekable();
        let (mut expected, mut source, mut encoding) = (String::new(), String::new(), String::new());
        while let Some(comment) = lines.next_if(|line| line.starts_with("# ")) {
            match comment[2..].split_once(": ").unwrap_or_else(|| panic!("{name}: {comment}")) {
                ("expect", value) => expected = value.to_owned(),
                ("source", value) => source = value.to_owned(),
                ("body", value) => encoding = value.to_owned(),
                ("note", _) => {}
                (other, _) => panic!("{name}: {other}"),
            }
        }
        let status = lines.next().and_then(|line| line.split(' ').nth(1)?.parse().ok());
        let header = |line: &str| {
            let (name, value) = line.split_once(": ")?;
            Some((name.parse::<HeaderName>().ok()?, value.parse::<HeaderValue>().ok()?))
        };
        let headers = lines.map(|line| header(line).unwrap_or_else(|| panic!("{name}: {line}"))).collect();
        Self {
            status: status.unwrap_or_else(|| panic!("{name}: no status")),
            expected,
            source,
            headers,
            body: encoded(&encoding, body.strip_suffix(b"\n").unwrap_or(body)),
            name,
        }
    }

    /// A service that answers every request so.
    fn service(
        &self,
    ) -> impl Service<Request<()>, Response = Response<Full<Bytes>>, Error = Infallible, Future: Send>
    + Clone
    + Send
    + use<> {
        let mut response = Response::new(Full::new(self.body.clone()));
        *response.status_mut() = self.status;
        *response.headers_mut() = self.headers.clone();
        service_fn(move |_| ready(Ok(response.clone())))
    }

    /// The verdict of a classifier behind a layer, which reads the body if the classifier wants it. A success is judged as
    /// a lease judges it: with its body.
    fn verdict(&self, classifier: &Classifier) -> Verdict {
        if self.status.is_success() {
            return classifier.classify(&ResponseHead::new(self.status, &self.headers).with_body(&self.body));
        }
        let verdict = Arc::default();
        let pool = KeyPool::builder().key("alpha", "sk-1").clock(ManualClock::new()).build().unwrap();
        let recording = Recording { classifier: classifier.clone(), verdict: Arc::clone(&verdict) };
        let layer = KeyRotationLayer::new(&pool).classify(recording).read_error_bodies(16 * 1024);
        let client = layer.layer(self.service());
        let answer = client.oneshot(request(None)).now_or_never().unwrap().unwrap();
        let body = answer.into_body().collect().now_or_never().unwrap().unwrap().to_bytes();
        assert!(body == self.body, "{}: the caller gets another body", self.name);
        verdict.lock().unwrap().take().unwrap()
    }

    /// How the key stands after this response to a request in that scope.
    fn key_after(
        &self,
        classifier: &Classifier,
        pool: KeyPoolBuilder,
        scope: Option<&str>,
    ) -> (KeyPool, KeyStats) {
        let pool = pool.key("alpha", "sk-1").clock(ManualClock::new()).build().unwrap();
        let classifier = Recording { classifier: classifier.clone(), verdict: Arc::default() };
        let layer = KeyRotationLayer::new(&pool).classify(classifier).read_error_bodies(16 * 1024);
        let client = layer.layer(self.service());
        client.oneshot(request(scope)).now_or_never().unwrap().unwrap();
        let key = pool.stats().keys.remove(0);
        (pool, key)
    }
}

fn request(scope: Option<&str>) -> Request<()> {
    let mut request = Request::get("https://api.example.com").body(()).unwrap();
    if let Some(scope) = scope {
        request.extensions_mut().insert(Traits::new().scope(scope));
    }
    request
}

fn encoded(encoding: &str, body: &[u8]) -> Bytes {
    match encoding {
        "gzip" => {
            let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
            encoder.write_all(body).unwrap();
            encoder.finish().unwrap().into()
        }
        "deflate" => {
            let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
            encoder.write_all(body).unwrap();
            encoder.finish().unwrap().into()
        }
        "br" => {
            let (mut plain, mut encoded) = (body, Vec::new());
            brotli::BrotliCompress(&mut plain, &mut encoded, &BrotliEncoderParams::default()).unwrap();
            encoded.into()
        }
        "zstd" => compress_to_vec(body, CompressionLevel::Fastest).into(),
        _ => Bytes::copy_from_slice(body),
    }
}

/// Notes the verdict of another classifier.
#[derive(Clone)]
struct Recording {
    classifier: Classifier,
    verdict: Arc<Mutex<Option<Verdict>>>,
}

impl ClassifyResponse for Recording {
    fn classify(&self, response: &ResponseHead<'_>) -> Verdict {
        *self.verdict.lock().unwrap().insert(self.classifier.classify(response))
    }

    fn wants_body(&self, response: &ResponseHead<'_>) -> bool {
        self.classifier.wants_body(response)
    }
}

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus")
}

fn folder(path: &Path) -> &str {
    path.parent().unwrap().file_name().unwrap().to_str().unwrap()
}

/// The recorded responses of a service, by name.
fn recorded(service: &str) -> Vec<Recorded> {
    let files = fs::read_dir(corpus().join(service)).unwrap_or_else(|error| panic!("{service}: {error}"));
    let mut recorded: Vec<_> = files.map(|file| Recorded::read(&file.unwrap().path())).collect();
    recorded.sort_by(|one, other| one.name.cmp(&other.name));
    recorded
}

fn one(service: &str, name: &str) -> Recorded {
    Recorded::read(&corpus().join(service).join(name).with_extension("http"))
}

fn classifier_of(service: &str) -> Classifier {
    services().into_iter().find(|(name, _)| *name == service).unwrap().1
}

/// A verdict as the corpus writes it.
fn in_words(verdict: Verdict) -> String {
    let (words, wait) = match verdict {
        Verdict::Nothing => ("nothing", None),
        Verdict::RateLimited { wait } => ("rate limited", wait),
        Verdict::Exhausted { wait } => ("exhausted", wait),
        Verdict::ScopeExhausted { wait } => ("exhausted in the scope", wait),
        Verdict::Refused => ("refused", None),
        Verdict::Revoked => ("revoked", None),
        other => panic!("{other:?}"),
    };
    let mut text = words.to_owned();
    if let Some(wait) = wait {
        write!(text, " {}s", wait.as_secs_f64()).unwrap();
    }
    text
}

fn assert_verdicts(services: &[(&str, Classifier)]) {
    let mut failures = String::new();
    let mut count = 0;
    for (service, classifier) in services {
        for response in recorded(service) {
            let verdict = in_words(response.verdict(classifier));
            count += 1;
            if verdict != response.expected {
                let Recorded { name, expected, .. } = response;
                writeln!(failures, "  {name}: {verdict}, not {expected}").unwrap();
            }
        }
    }
    assert!(failures.is_empty(), "of {count} responses, these are misjudged:\n{failures}");
}

#[test]
fn recorded_responses_get_the_verdicts_they_name() {
    assert_verdicts(&services());
}

#[test]
fn the_union_judges_llm_services_as_each_does() {
    let union: Classifier = Arc::new(LlmGateway::new());
    assert_verdicts(&LLMS.map(|service| (service, union.clone())));
}

#[test]
fn every_recorded_response_names_its_source() {
    let all: Vec<_> = services().iter().flat_map(|(service, _)| recorded(service)).collect();
    for response in &all {
        assert!(response.source.starts_with("https://"), "{}", response.name);
    }
    assert!(all.len() >= 150, "{}", all.len());
    let folders = fs::read_dir(corpus()).unwrap().map(|entry| entry.unwrap().path());
    let known = services();
    for folder in folders {
        let name = folder.file_name().unwrap().to_str().unwrap();
        // `stream_head.rs` reads the streams.
        let is_known = name == "streams" || known.iter().any(|(service, _)| *service == name);
        assert!(is_known, "nothing reads {name}");
    }
}

#[test]
fn f37_unknown_refusals_revoke_and_exhaust_nothing() {
    let generic: Classifier = Arc::new(Generic);
    for response in recorded("generic") {
        for classifier in [generic.clone(), Arc::new(LlmGateway::new()), Arc::new(GitHub)] {
            let verdict = response.verdict(&classifier);
            let is_harmless =
                matches!(verdict, Verdict::Nothing | Verdict::Refused | Verdict::RateLimited { .. });
            assert!(is_harmless, "{}: {verdict:?}", response.name);
        }
    }
}

#[test]
fn f38_a_refusal_with_a_wait_is_a_cooldown() {
    let status = |service, name, exact: bool| {
        let pool = KeyPool::builder();
        let pool = if exact { pool.exact_hints() } else { pool };
        let (_, key) = one(service, name).key_after(&classifier_of(service), pool, None);
        (key.status, key.time_left.map(|left| left.as_secs()))
    };
    let limited = |seconds| (Status::RateLimited, Some(seconds));
    assert_eq!(status("github", "403_primary_limit", false), limited(1_200));
    assert_eq!(status("github", "403_secondary_limit_with_retry_after", true), limited(60));
    assert_eq!(status("github", "403_secondary_limit_with_retry_after", false), limited(120));
    assert_eq!(status("github", "403_secondary_limit_without_a_wait", false), limited(120));
    assert_eq!(status("openai", "401_invalid_api_key_with_retry_after", true), limited(30));
    assert_eq!(status("generic", "401_retry_after", true), limited(30));
    assert_eq!(status("generic", "402_retry_after_date", true), limited(120));
    assert_eq!(status("generic", "403_retry_after", true), limited(60));
}

/// The time until a request in that scope gets a key; zero if it gets one at once.
fn room(pool: &KeyPool, scope: Option<&str>) -> Duration {
    let traits = scope.map_or_else(Traits::new, |scope| Traits::new().scope(scope));
    match pool.lease(&traits) {
        Ok(_) => Duration::ZERO,
        Err(error) => error.retry_in().unwrap_or(Duration::MAX),
    }
}

#[test]
fn f42_a_daily_quota_rests_its_model_until_midnight() {
    let midnight = Duration::from_secs(40_798);
    for name in ["429_per_day_and_model", "429_per_day_minute_and_tokens", "429_gzip_per_day_and_model"] {
        let response = one("gemini", name);
        for pool in [KeyPool::builder(), KeyPool::builder().paced(), KeyPool::builder().exact_hints()] {
            let classifier = classifier_of("gemini");
            let (pool, key) = response.key_after(&classifier, pool, Some("gemini-2.5-flash"));
            assert_eq!(key.status, Status::Healthy, "{name}");
            assert_eq!(room(&pool, Some("gemini-2.5-flash")), midnight, "{name}");
            assert_eq!(room(&pool, Some("gemini-2.5-pro")), Duration::ZERO, "{name}");
        }
    }
}

#[test]
fn a_used_up_quota_lowers_no_pace() {
    let in_flight_after = |verdict| {
        let clock = ManualClock::new();
        let pool = KeyPool::builder().key("alpha", "sk-1").paced().clock(clock.clone()).build().unwrap();
        let traits = Traits::new().scope("a model");
        pool.lease(&traits).unwrap().answered_with(verdict);
        clock.advance(Duration::from_secs(25 * 60 * 60));
        std::iter::from_fn(|| pool.lease(&traits).ok()).take(100).collect::<Vec<_>>().len()
    };
    let (limited, used_up) = (Verdict::RateLimited { wait: None }, Verdict::ScopeExhausted { wait: None });
    assert!(in_flight_after(used_up) > in_flight_after(limited));
}

#[test]
fn f42_a_daily_quota_without_a_scope_rests_the_key() {
    let classifier = classifier_of("gemini");
    let rest = |name, scope| {
        let (_, key) = one("gemini", name).key_after(&classifier, KeyPool::builder(), scope);
        (key.status, key.time_left.map(|left| left.as_secs()))
    };
    assert_eq!(rest("429_per_day_and_model", None), (Status::Exhausted, Some(40_798)));
    assert_eq!(rest("429_per_day_of_the_project", Some("a model")), (Status::Exhausted, Some(40_798)));
    // Clocks change that day.
    assert_eq!(rest("429_per_day_before_spring_forward", None), (Status::Exhausted, Some(22 * 60 * 60)));
    assert_eq!(rest("429_per_day_before_fall_back", None), (Status::Exhausted, Some(24 * 60 * 60)));
}

#[test]
fn without_bodies_only_waits_and_statuses_count() {
    for (_, classifier) in services() {
        let verdict = |status: u16, retry_after: Option<&'static str>| {
            let wait =
                retry_after.map(|wait| ("retry-after".parse().unwrap(), HeaderValue::from_static(wait)));
            let headers: HeaderMap = wait.into_iter().collect();
            classifier.classify(&ResponseHead::new(StatusCode::from_u16(status).unwrap(), &headers))
        };
        for status in [401, 402, 403] {
            assert_eq!(verdict(status, None), Verdict::Refused);
            let wait = Some(Duration::from_secs(7));
            assert_eq!(verdict(status, Some("7")), Verdict::RateLimited { wait });
        }
        assert_eq!(verdict(429, None), Verdict::RateLimited { wait: None });
        for status in [200, 204, 301, 304, 400, 404, 498, 500, 503, 529] {
            assert_eq!(verdict(status, Some("7")), Verdict::Nothing, "{status}");
        }
    }
}

/// Bodies: random bytes, and JSON with members that rules look at.
fn body() -> impl Strategy<Value = Vec<u8>> {
    let word = select(vec![
        "error",
        "errors",
        "message",
        "code",
        "type",
        "details",
        "@type",
        "violations",
        "quotaId",
        "metadata",
        "headers",
        "retry_after",
        "X-RateLimit-Reset",
        "google.rpc.QuotaFailure",
        "PerDayPerModel",
        "regain access on ",
        "Out of call volume quota. Quota will be replenished in 99999999999999999999.9:9:9",
        "You have reached your specified API usage limits. You will regain access on 9999-12-31 at 24:00 UTC",
    ]);
    let leaf = prop_oneof![
        any::<f64>().prop_map(serde_json::Value::from),
        word.clone().prop_map(serde_json::Value::from),
        any::<String>().prop_map(serde_json::Value::from),
        Just(serde_json::Value::Null),
    ];
    let json = leaf.prop_recursive(4, 30, 5, move |inner| {
        prop_oneof![
            vec(inner.clone(), 0..5).prop_map(serde_json::Value::from),
            vec((word.clone(), inner), 0..5).prop_map(|members| {
                members
                    .into_iter()
                    .map(|(name, value)| (name.to_owned(), value))
                    .collect::<serde_json::Map<_, _>>()
                    .into()
            }),
        ]
    });
    prop_oneof![
        vec(any::<u8>(), 0..100),
        "\u{feff}?(<!--|-->|<[?]xml|[?]>|<html|<!DOCTYPE html| ){0,6}".prop_map(String::into_bytes),
        json.prop_map(|json| json.to_string().into_bytes()),
    ]
}

fn header() -> impl Strategy<Value = (&'static str, Vec<u8>)> {
    let names = vec![
        "grpc-status",
        "grpc-status-details-bin",
        "grpc-retry-pushback-ms",
        "www-authenticate",
        "x-error-code",
        "content-encoding",
        "date",
        "retry-after",
        "x-ratelimit-remaining",
        "x-ratelimit-resource",
    ];
    let value = prop_oneof![
        "[0-9]{1,3}".prop_map(String::into_bytes),
        "[A-Za-z0-9+/]{0,60}={0,2}".prop_map(String::into_bytes),
        vec(prop_oneof![0x20..0x7f_u8, 0x80..=0xff_u8], 0..40),
    ];
    (select(names), value)
}

proptest! {
    #[test]
    fn f28_no_response_panics(
        status in select(vec![200, 400, 401, 402, 403, 404, 429, 498, 503, 529]),
        headers in vec(header(), 0..4),
        body in body(),
    ) {
        let status = StatusCode::from_u16(status).unwrap();
        let headers: HeaderMap = headers
            .into_iter()
            .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_bytes(&value).unwrap()))
            .collect();
        let head = ResponseHead::new(status, &headers);
        for (_, classifier) in services() {
            classifier.wants_body(&head);
            classifier.classify(&head);
            classifier.classify(&head.with_body(&body));
        }
    }
}
