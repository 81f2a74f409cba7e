//! Prometheus metrics at `/metrics`: those of the key pools, request durations, and the usage of callers.

use std::{error::Error, iter, sync::OnceLock, time::Duration};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::IntoResponse,
    routing::get,
};
use metrics::Histogram;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

use crate::served::Current;

const REQUESTS: &str = "gateway_request_seconds";

const LOG_LINES_LOST: &str = "gateway_log_lines_lost_total";

const CALLER_REQUESTS: &str = "gateway_caller_requests_total";

const CALLER_TOKENS: &str = "gateway_caller_tokens_total";

const CALLER_OVER_LIMIT: &str = "gateway_caller_over_limit_total";

const CALLER_IN_FLIGHT: &str = "gateway_caller_in_flight";

const WRONG_TOKENS: &str = "gateway_wrong_tokens_total";

/// Buckets, from a cached response to a model that thinks for minutes.
const SECONDS: [f64; 16] =
    [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0];

/// Installs a Prometheus exporter as the global recorder of the `metrics` crate.
pub(crate) fn install() -> Result<PrometheusHandle, Box<dyn Error>> {
    let builder = PrometheusBuilder::new();
    let exporter = builder.set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &SECONDS)?;
    let exporter = exporter.install_recorder()?;
    metrics::describe_histogram!(
        REQUESTS,
        metrics::Unit::Seconds,
        "Time until the response head, by pool and status."
    );
    metrics::describe_counter!(LOG_LINES_LOST, "Log lines that stderr did not accept.");
    metrics::describe_counter!(WRONG_TOKENS, "Wrong tokens of callers and of the admin, by kind.");
    metrics::describe_counter!(CALLER_REQUESTS, "Requests by caller, without those beyond its limits.");
    metrics::describe_counter!(CALLER_TOKENS, "Tokens by caller, as far as responses report them.");
    metrics::describe_counter!(CALLER_OVER_LIMIT, "Requests beyond a limit of their caller.");
    metrics::describe_gauge!(CALLER_IN_FLIGHT, "Requests in flight by caller.");
    log_lines_lost(0);
    tokio::spawn(keep_up(exporter.clone()));
    Ok(exporter)
}

/// Compacts recorded samples regularly. Without a scrape, they would use more and more memory.
async fn keep_up(exporter: PrometheusHandle) {
    let mut ticks = tokio::time::interval(Duration::from_secs(5));
    loop {
        ticks.tick().await;
        exporter.run_upkeep();
    }
}

/// The times until the heads of an upstream's responses, by status.
pub(crate) struct Durations {
    upstream: String,
    /// Looked up once: the lookup costs more than all else that a request records.
    by_status: Box<[OnceLock<Histogram>]>,
}

/// Statuses are numbers of three digits.
const STATUSES: usize = 1_000;

impl Durations {
    pub(crate) fn of(upstream: &str) -> Self {
        let by_status = iter::repeat_with(OnceLock::new).take(STATUSES).collect();
        Self { upstream: upstream.to_owned(), by_status }
    }

    /// Records the status of a response and the time until its head.
    pub(crate) fn record(&self, status: StatusCode, took: Duration) {
        let histogram = || histogram(self.upstream.clone(), status);
        match self.by_status.get(usize::from(status.as_u16())) {
            Some(known) => known.get_or_init(histogram).record(took),
            None => histogram().record(took),
        }
    }
}

/// Records a response of the gateway's own to a request that has no upstream.
pub(crate) fn refused(status: StatusCode, took: Duration) {
    histogram(String::new(), status).record(took);
}

fn histogram(upstream: String, status: StatusCode) -> Histogram {
    metrics::histogram!(REQUESTS, "pool" => upstream, "status" => status.as_str().to_owned())
}

/// Counts log lines that were not written.
pub(crate) fn log_lines_lost(lines: u64) {
    metrics::counter!(LOG_LINES_LOST).increment(lines);
}

/// Counts wrong tokens of a kind.
pub(crate) fn wrong_tokens(of: &'static str, tokens: u64) {
    metrics::counter!(WRONG_TOKENS, "of" => of).increment(tokens);
}

pub(crate) fn router(current: Current, exporter: PrometheusHandle) -> Router {
    Router::new().route("/metrics", get(read)).with_state((current, exporter))
}

async fn read(State((current, exporter)): State<(Current, PrometheusHandle)>) -> impl IntoResponse {
    let served = current.get();
    for upstream in &served.upstreams {
        upstream.pool.record_metrics();
    }
    for caller in served.callers.shown() {
        let name = caller.name().to_owned();
        metrics::counter!(CALLER_REQUESTS, "caller" => name.clone()).absolute(caller.requests());
        metrics::counter!(CALLER_TOKENS, "caller" => name.clone()).absolute(caller.tokens());
        metrics::counter!(CALLER_OVER_LIMIT, "caller" => name.clone()).absolute(caller.over_limit());
        metrics::gauge!(CALLER_IN_FLIGHT, "caller" => name).set(caller.in_flight() as f64);
    }
    ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], exporter.render())
}
