//! The span of each request, and its events.
//!
//! Each test captures: a thread without a subscriber would decide for the others that a span is off.

mod support;

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use http::{HeaderMap, Request, Response, StatusCode};
use support::{
    MINUTE, SECOND,
    leased::{ask, keys, left, scope},
    listen_to_everything,
};
use tower::{Layer as _, ServiceExt, service_fn};
use tower_key_rotation::{
    Failover, KeyRotationLayer, Quota, Traits, classify::ResponseHead, clock::ManualClock,
};
use tracing::{
    Event, Subscriber,
    field::{Field, Visit},
    span::{Attributes, Id, Record},
    subscriber::DefaultGuard,
};
use tracing_subscriber::{filter::LevelFilter, layer::Context, prelude::*, registry::LookupSpan};

type Fields = BTreeMap<String, String>;

/// The library's spans that have ended, and its events, with all their fields.
#[derive(Clone, Default)]
struct Capture(Arc<Mutex<Captured>>);

#[derive(Default)]
struct Captured {
    open: BTreeMap<u64, Fields>,
    spans: Vec<Fields>,
    events: Vec<Fields>,
    /// How often the client was called inside a span.
    called_inside: usize,
}

struct Reader<'a>(&'a mut Fields);

impl Visit for Reader<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let before =
            self.0.insert(field.name().to_owned(), format!("{value:?}").trim_matches('"').to_owned());
        assert_eq!(before, None, "{field} is recorded twice");
    }
}

const TARGET: &str = "tower_key_rotation::request";

impl<S: Subscriber + for<'a> LookupSpan<'a>> tracing_subscriber::Layer<S> for Capture {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, _: Context<'_, S>) {
        if attributes.metadata().target() == TARGET {
            let mut fields = Fields::new();
            attributes.record(&mut Reader(&mut fields));
            self.0.lock().unwrap().open.insert(id.into_u64(), fields);
        }
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, _: Context<'_, S>) {
        if let Some(fields) = self.0.lock().unwrap().open.get_mut(&id.into_u64()) {
            values.record(&mut Reader(fields));
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let span = context.event_span(event).map(|span| span.id().into_u64());
        let mut captured = self.0.lock().unwrap();
        let is_inside = span.is_some_and(|span| captured.open.contains_key(&span));
        if event.metadata().target() == TARGET {
            assert!(is_inside);
            let mut fields = Fields::new();
            event.record(&mut Reader(&mut fields));
            captured.events.push(fields);
        } else if event.metadata().target() == "client" {
            captured.called_inside += usize::from(is_inside);
        }
    }

    fn on_close(&self, id: Id, _: Context<'_, S>) {
        let mut captured = self.0.lock().unwrap();
        let closed = captured.open.remove(&id.into_u64());
        captured.spans.extend(closed);
    }
}

impl Capture {
    fn at(level: LevelFilter) -> (Self, DefaultGuard) {
        listen_to_everything();
        let capture = Self::default();
        let subscriber = tracing_subscriber::registry().with(capture.clone().with_filter(level));
        (capture, tracing::subscriber::set_default(subscriber))
    }

    fn on() -> (Self, DefaultGuard) {
        Self::at(LevelFilter::TRACE)
    }

    /// The one span that ended since the last call, and its events.
    fn one(&self) -> (Fields, Vec<Fields>) {
        let mut captured = self.0.lock().unwrap();
        let (mut spans, events) = (std::mem::take(&mut captured.spans), std::mem::take(&mut captured.events));
        assert_eq!((spans.len(), captured.open.len()), (1, 0), "{spans:?}, {events:?}");
        (spans.remove(0), events)
    }
}

fn fields<const N: usize>(pairs: [(&str, &str); N]) -> Fields {
    pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).into()
}

/// A client that answers with these statuses, the last one again and again.
fn answering(
    statuses: &'static [u16],
) -> impl tower::Service<
    Request<String>,
    Response = Response<String>,
    Error = std::io::Error,
    Future = impl Future<Output = Result<Response<String>, std::io::Error>> + Send,
> + Clone
+ Send
+ 'static {
    let sent = Arc::new(AtomicUsize::new(0));
    service_fn(move |_: Request<String>| {
        tracing::info!(target: "client", "called");
        let status = statuses[sent.fetch_add(1, Relaxed).min(statuses.len() - 1)];
        async move { Ok(Response::builder().status(status).body(String::new()).unwrap()) }
    })
}

fn request(traits: Option<Traits>) -> Request<String> {
    let mut request = Request::post("https://api.example.com/v1").body("body".to_owned()).unwrap();
    if let Some(traits) = traits {
        request.extensions_mut().insert(traits);
    }
    request
}

#[tokio::test]
async fn no_span_is_made_below_its_level() {
    let (capture, _guard) = Capture::at(LevelFilter::DEBUG);
    let pool = keys(1).build().unwrap();
    let client = KeyRotationLayer::new(&pool).layer(answering(&[200]));
    client.oneshot(request(None)).await.unwrap();
    ask(&pool, &scope("model"), 200, &HeaderMap::new());
    let captured = capture.0.lock().unwrap();
    assert_eq!((captured.spans.len(), captured.events.len(), captured.called_inside), (0, 0, 0));
}

#[tokio::test]
async fn a_span_says_which_key_went_out_in_each_mode() {
    let (capture, _guard) = Capture::on();
    let pool = keys(3).build().unwrap();
    let layer = KeyRotationLayer::new(&pool);
    layer.layer(answering(&[200])).oneshot(request(None)).await.unwrap();
    let expected = |key| {
        let span = fields([("waited_ms", "0"), ("attempts", "1"), ("key", key)]);
        let event = fields([("message", "answered"), ("attempt", "1"), ("key", key), ("status", "200")]);
        (span, vec![event])
    };
    assert_eq!(capture.one(), expected("k0"));
    layer.clone().wait_up_to(SECOND).layer(answering(&[200])).oneshot(request(None)).await.unwrap();
    assert_eq!(capture.one(), expected("k1"));
    let failover = layer.failover(Failover::attempts(2));
    failover.layer(answering(&[200])).oneshot(request(None)).await.unwrap();
    assert_eq!(capture.one(), expected("k2"));
    assert_eq!(capture.0.lock().unwrap().called_inside, 3);
}

#[tokio::test]
async fn a_span_says_which_keys_were_passed_over() {
    let (capture, _guard) = Capture::on();
    let clock = ManualClock::new();
    let pool = keys(3).quota(Quota::per_minute(1)).clock(clock.clone()).build().unwrap();
    let client = KeyRotationLayer::new(&pool).layer(answering(&[429, 200]));
    let send = async || client.clone().oneshot(request(Some(scope("model")))).await.map(|_| ());

    // The 429 is learned: k0 rests.
    send().await.unwrap();
    let (span, events) = capture.one();
    assert_eq!((&*span["scope"], &*span["key"]), ("model", "k0"));
    assert_eq!((&*events[0]["status"], events[0].get("passed_over")), ("429", None));
    assert!(events[0]["learned"].starts_with("rests in this scope, 120.0 s"), "{events:?}");

    send().await.unwrap();
    assert_eq!(capture.one().0["key"], "k1");
    pool.disable("k2").await.unwrap();
    send().await.unwrap_err();
    let expected =
        "k2: disabled; k0: rests in this scope, 120.0 s; k1: 0.0 of 1 requests left (by quota), 60.0 s";
    assert_eq!(capture.one().1[0]["passed_over"], expected);

    clock.advance(2 * MINUTE);
    send().await.unwrap();
    let (_, events) = capture.one();
    assert_eq!((&*events[0]["key"], &*events[0]["passed_over"]), ("k0", "k2: disabled"));
}

#[tokio::test]
async fn a_span_says_which_key_a_session_prefers() {
    let (capture, _guard) = Capture::on();
    let pool = keys(5).quota(Quota::per_minute(1)).clock(ManualClock::new()).build().unwrap();
    let client = KeyRotationLayer::new(&pool).layer(answering(&[200]));
    let mut seen = Vec::new();
    for _ in 0..2 {
        client.clone().oneshot(request(Some(scope("model").session("user-7")))).await.unwrap();
        seen.extend(capture.one().1);
    }
    assert_eq!(seen[0]["preferred"], seen[0]["key"]);
    assert_eq!((&seen[1]["preferred"], seen[0].get("passed_over")), (&seen[0]["key"], None));
    assert!(seen[1]["passed_over"].starts_with(&format!("{}: 0.0 of 1 requests left", seen[0]["key"])));
}

#[tokio::test]
async fn a_span_says_that_a_request_is_a_probe() {
    let (capture, _guard) = Capture::on();
    let clock = ManualClock::new();
    let pool = keys(1).paced().clock(clock.clone()).build().unwrap();
    ask(&pool, &scope("model"), 200, &left("0", "600s"));
    _ = capture.one();
    let attempts = (0..60).filter_map(|_| {
        clock.advance(SECOND / 10);
        let lease = pool.lease(&scope("model")).ok();
        lease.map(|lease| lease.answered(&ResponseHead::new(StatusCode::OK, &left("0", "600s"))));
        Some(capture.one().1.remove(0)).filter(|event| event["message"] == "answered")
    });
    let attempts: Vec<_> = attempts.collect();
    assert!(
        attempts.iter().any(|event| event.get("probe").map(String::as_str) == Some("true")),
        "{attempts:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_span_says_how_long_a_request_waited() {
    let (capture, _guard) = Capture::on();
    let pool = keys(1).quota(Quota::per_minute(60)).build().unwrap();
    let client = KeyRotationLayer::new(&pool).wait_up_to(MINUTE).layer(answering(&[200]));
    client.clone().oneshot(request(Some(scope("model")))).await.unwrap();
    _ = capture.one();
    client.oneshot(request(Some(scope("model")))).await.unwrap();
    let (span, events) = capture.one();
    assert!((990..1_010).contains(&span["waited_ms"].parse::<u32>().unwrap()), "{span:?}");
    assert_eq!(events[0]["passed_over"], "k0: 0.0 of 1 requests left (by quota), 1.0 s");
    assert_eq!(events[0]["learned"], "0.0 of 1 requests left (by quota)");
}

#[tokio::test]
async fn a_span_explains_each_attempt_of_a_failover() {
    let (capture, _guard) = Capture::on();
    let pool = keys(3).clock(ManualClock::new()).build().unwrap();
    let failover = KeyRotationLayer::new(&pool).failover(Failover::attempts(3));
    failover.layer(answering(&[429, 429, 200])).oneshot(request(None)).await.unwrap();
    let (span, events) = capture.one();
    assert_eq!(span, fields([("waited_ms", "0"), ("attempts", "3"), ("key", "k2")]));
    let told: Vec<_> =
        events.iter().map(|event| (&*event["attempt"], &*event["key"], &*event["status"])).collect();
    assert_eq!(told, [("1", "k0", "429"), ("2", "k1", "429"), ("3", "k2", "200")]);
    assert_eq!(events[0]["learned"], "rests: rate limited (guessed), 120.0 s");
    assert_eq!(capture.0.lock().unwrap().called_inside, 3);
}

#[tokio::test]
async fn a_span_says_why_nothing_was_sent() {
    let (capture, _guard) = Capture::on();
    let pool = keys(1).build().unwrap();
    pool.disable("k0").await.unwrap();
    let layer = KeyRotationLayer::new(&pool);
    let expected = vec![fields([
        ("message", "not sent"),
        ("passed_over", "k0: disabled"),
        ("error", "no key available: all 1 are revoked or disabled, and stay so until reset or enabled"),
    ])];
    layer.layer(answering(&[200])).oneshot(request(None)).await.unwrap_err();
    assert_eq!(capture.one(), (fields([("waited_ms", "0"), ("attempts", "0")]), expected.clone()));
    let failover = layer.failover(Failover::attempts(2));
    failover.layer(answering(&[200])).oneshot(request(None)).await.unwrap_err();
    assert_eq!(capture.one().1, expected);
    pool.lease(&Traits::new()).unwrap_err();
    assert_eq!(capture.one().1, expected);
}

#[tokio::test]
async fn leases_have_a_span_up_to_their_answer() {
    let (capture, _guard) = Capture::on();
    let pool = keys(1).quota(Quota::per_minute(60).burst(3)).clock(ManualClock::new()).build().unwrap();
    ask(&pool, &scope("model"), 200, &HeaderMap::new());
    let (span, events) = capture.one();
    assert_eq!(span["key"], "k0");
    assert_eq!((&*events[0]["status"], &*events[0]["learned"]), ("200", "2.0 of 3 requests left (by quota)"));
    drop(pool.lease(&scope("model")).unwrap());
    let (_, events) = capture.one();
    assert_eq!((&*events[0]["message"], &*events[0]["key"]), ("dropped without an answer", "k0"));
}

#[cfg(feature = "reqwest-middleware")]
#[tokio::test]
async fn requests_of_reqwest_middleware_have_the_same_span() {
    let server = support::Server::limiting(["k0"]).await;
    let (capture, _guard) = Capture::on();
    let pool = support::pool(["k0", "k1"], &ManualClock::new());
    let layer = KeyRotationLayer::new(&pool).failover(Failover::attempts(2));
    let client = reqwest_middleware::ClientBuilder::new(support::http()).with(layer).build();
    let response = client.get(server.url()).with_extension(scope("model")).send().await.unwrap();
    assert_eq!(response.status(), 200);
    let (span, events) = capture.one();
    assert_eq!((&*span["scope"], &*span["attempts"], &*span["key"]), ("model", "2", "k1"));
    assert_eq!(events.iter().map(|event| &*event["status"]).collect::<Vec<_>>(), ["429", "200"]);
}
