//! What the recorder of the `metrics` crate is told.

mod support;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    time::Duration,
};

use http::{HeaderMap, Request, Response, StatusCode};
use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};
use support::*;
use tower::{Layer, Service, service_fn};
use tower_key_rotation::{
    Failover, KeyPool, KeyRotationLayer, Quota, RecoveryHandle, Traits,
    classify::{ResponseHead, TooManyRequests},
    clock::ManualClock,
};

/// All that is recorded, by name and labels: of a histogram, how many values.
fn recorded(snapshotter: &Snapshotter) -> BTreeMap<String, f64> {
    let metrics = snapshotter.snapshot().into_vec().into_iter();
    let value = |value| match value {
        DebugValue::Counter(count) => count as f64,
        DebugValue::Gauge(value) => value.into_inner(),
        DebugValue::Histogram(values) => values.len() as f64,
    };
    metrics
        .map(|(key, _, _, seen)| {
            let labels = key.key().labels().filter(|label| label.key() != "pool");
            let labels: Vec<_> = labels.map(|label| format!(" {}", label.value())).collect();
            assert!(key.key().labels().any(|label| (label.key(), label.value()) == ("pool", "openai")));
            (format!("{}{}", key.key().name(), labels.concat()), value(seen))
        })
        .collect()
}

fn listening() -> (Snapshotter, DebuggingRecorder) {
    let recorder = DebuggingRecorder::new();
    (recorder.snapshotter(), recorder)
}

fn failover(pool: &KeyPool, failover: Failover) -> KeyRotationLayer<TooManyRequests, Failover> {
    KeyRotationLayer::new(pool).failover(failover)
}

/// Answers with the status that the first letter of the key's secret stands for.
fn client(
    layer: KeyRotationLayer<TooManyRequests, Failover>,
) -> impl Service<Request<String>, Response: std::fmt::Debug, Error = impl std::fmt::Debug> {
    let answer = service_fn(async |request: Request<String>| {
        let status = match request.headers()["authorization"].as_bytes()[7] {
            b'l' => 429,
            b'e' => 402,
            b'r' => 401,
            _ => 200,
        };
        Ok::<_, io::Error>(Response::builder().status(status).body(String::new()).unwrap())
    });
    layer.classify(ByStatus).layer(answer)
}

fn request() -> Request<String> {
    Request::get("https://api.example.com/v1").body(String::new()).unwrap()
}

#[tokio::test]
async fn metrics_report_key_status_and_request_outcomes() {
    let (metrics, recorder) = listening();
    let _guard = metrics::set_default_local_recorder(&recorder);
    let clock = ManualClock::new();
    let keys =
        [("limited", "l-1"), ("exhausted", "e-1"), ("revoked", "r-1"), ("fine", "f-1"), ("off", "f-2")];
    let pool = KeyPool::builder().name("openai").clock(clock.clone()).keys(keys).build().unwrap();
    pool.disable("off").await.unwrap();
    let mut client = client(failover(&pool, Failover::attempts(9)));
    client.call(request()).await.unwrap();
    client.call(request()).await.unwrap();
    pool.record_metrics();
    let mut seen = recorded(&metrics);
    let apart = ["store_errors", "pass_", "recovered", "pacing", "waiting ", "_left", "_limits"];
    seen.retain(|name, _| !apart.iter().any(|part| name.contains(part)));
    let expected = [
        ("key_rotation_keys healthy", 1.0),
        ("key_rotation_keys rate_limited", 1.0),
        ("key_rotation_keys exhausted", 1.0),
        ("key_rotation_keys revoked", 1.0),
        ("key_rotation_keys suspected", 0.0),
        ("key_rotation_keys disabled", 1.0),
        ("key_rotation_unreadable_keys", 0.0),
        ("key_rotation_marks_waiting", 0.0),
        ("key_rotation_next_return_seconds", 0.0),
        ("key_rotation_picks_total", 5.0),
        ("key_rotation_marks_total rate_limited", 1.0),
        ("key_rotation_marks_total exhausted", 1.0),
        ("key_rotation_marks_total revoked", 1.0),
        ("key_rotation_refusals_total suspected", 0.0),
        ("key_rotation_refusals_total acquitted", 0.0),
        ("key_rotation_refusals_total confirmed", 0.0),
        ("key_rotation_failovers_total", 3.0),
        ("key_rotation_failover_budget_used_up_total", 0.0),
        ("key_rotation_no_key_total", 0.0),
        ("key_rotation_unkeyed_total", 0.0),
    ];
    assert_eq!(seen, expected.map(|(name, value)| (name.to_owned(), value)).into());

    // What left with a key still counts.
    pool.remove("fine").await.unwrap();
    client.call(request()).await.unwrap_err();
    pool.record_metrics();
    let seen = recorded(&metrics);
    // The exhausted key is tried before the limited one is back.
    assert_eq!(seen["key_rotation_next_return_seconds"], 60.0);
    assert_eq!((seen["key_rotation_picks_total"], seen["key_rotation_no_key_total"]), (5.0, 1.0));

    pool.remove("limited").await.unwrap();
    pool.remove("exhausted").await.unwrap();
    pool.record_metrics();
    assert_eq!(recorded(&metrics)["key_rotation_next_return_seconds"], f64::INFINITY);
}

#[tokio::test]
async fn metrics_report_exhausted_retry_budgets_and_wait_times() {
    let (metrics, recorder) = listening();
    let _guard = metrics::set_default_local_recorder(&recorder);
    let clock = ManualClock::new();
    let keys = [("alpha", "l-1"), ("beta", "l-2")];
    let pool = KeyPool::builder().name("openai").clock(clock.clone()).keys(keys).build().unwrap();
    let nothing = tower::retry::budget::TpsBudget::new(Duration::from_secs(10), 0, 0.0);
    client(failover(&pool, Failover::attempts(3).budget(nothing))).call(request()).await.unwrap();
    pool.record_metrics();
    assert_eq!(recorded(&metrics)["key_rotation_failover_budget_used_up_total"], 1.0);

    client(failover(&pool, Failover::attempts(3))).call(request()).await.unwrap();
    let mut waiting = client(failover(&pool, Failover::attempts(1)).wait_up_to(10 * MINUTE));
    let (answer, ()) = tokio::join!(waiting.call(request()), async {
        settle().await;
        clock.advance(2 * MINUTE);
    });
    answer.unwrap();
    assert_eq!(recorded(&metrics)["key_rotation_wait_seconds"], 1.0);
}

#[tokio::test]
async fn metrics_report_limits_by_a_bounded_number_of_scopes() {
    let (metrics, recorder) = listening();
    let _guard = metrics::set_default_local_recorder(&recorder);
    let keys = [("alpha", "f-1"), ("beta", "f-2")];
    let builder = KeyPool::builder().name("openai").clock(ManualClock::new()).keys(keys);
    let pool = builder.quota(Quota::per_minute(60).burst(10)).build().unwrap();
    let ask = |scope: &str, status: u16| {
        let lease = pool.lease(&Traits::new().scope(scope)).unwrap();
        lease.answered(&ResponseHead::new(StatusCode::from_u16(status).unwrap(), &HeaderMap::new()));
    };
    ask("model", 200);
    ask("model", 429);
    pool.record_metrics();
    let seen = recorded(&metrics);
    assert_eq!(seen["key_rotation_limited_despite_pacing_total model"], 1.0);
    assert_eq!(seen["key_rotation_limited_despite_pacing_total "], 0.0);
    // The refused request was not counted.
    assert_eq!(seen["key_rotation_left requests model"], 19.0);
    assert_eq!(seen["key_rotation_limits quota model"], 2.0);
    assert_eq!(seen["key_rotation_waiting model"], 0.0);

    for number in 0..200 {
        ask(&format!("scope-{number}"), 429);
    }
    pool.record_metrics();
    let seen = recorded(&metrics);
    let waiting = seen.keys().filter(|name| name.starts_with("key_rotation_waiting ")).count();
    assert_eq!(waiting, 101);
    assert_eq!(seen["key_rotation_limited_despite_pacing_total (others)"], 102.0);
    assert_eq!(seen["key_rotation_limits quota (others)"], 102.0);
}

#[tokio::test]
async fn metrics_report_passes_and_store_errors() {
    let (metrics, recorder) = listening();
    let _guard = metrics::set_default_local_recorder(&recorder);
    let clock = ManualClock::new();
    let store = FaultyStore::new(&clock);
    let pool = KeyPool::builder().name("openai").clock(clock.clone()).key("alpha", "l-1");
    let pool = pool.open(store.clone()).await.unwrap();
    let recovery = RecoveryHandle::spawn_with(&pool, passes_by_hand());
    client(failover(&pool, Failover::attempts(3))).call(request()).await.unwrap();
    recovery.sweep_now().await.outcome.unwrap();
    clock.advance(2 * MINUTE);
    recovery.sweep_now().await.outcome.unwrap();
    let seen = recorded(&metrics);
    assert_eq!((seen["key_rotation_pass_seconds"], seen["key_rotation_recovered_total"]), (2.0, 1.0));
    assert_eq!((seen["key_rotation_pass_failures_total"], seen["key_rotation_keys healthy"]), (0.0, 1.0));
    let store_errors = seen.iter().filter(|(name, _)| name.contains("store_errors"));
    assert_eq!(store_errors.map(|(_, count)| count).sum::<f64>(), 0.0);

    for operation in [&store.loads, &store.recovers, &store.operators] {
        operation.set(Mode::Fails);
    }
    assert!(recovery.sweep_now().await.outcome.is_err());
    pool.reset("alpha").await.unwrap_err();
    pool.record_metrics();
    let seen = recorded(&metrics);
    assert_eq!(seen["key_rotation_pass_failures_total"], 1.0);
    for operation in ["load", "recover", "operate"] {
        assert_eq!(seen[&format!("key_rotation_store_errors_total {operation}")], 1.0, "{operation}");
    }
}

#[test]
fn documented_metrics_match_the_code_exactly() {
    let source = concat!(include_str!("../src/meter.rs"), include_str!("../src/pool/metrics.rs"));
    let in_code = source.split('"').skip(1).step_by(2).filter(|text| text.starts_with("key_rotation_"));
    let rows = source.lines().filter_map(|line| line.trim().strip_prefix("/// | `"));
    let documented = rows.filter_map(|row| row.split('`').next());
    assert_eq!(in_code.collect::<BTreeSet<_>>(), documented.collect());
}
