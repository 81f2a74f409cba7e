//! One of several processes that share keys in MongoDB: sends requests at a steady rate, and says what it did.
//!
//! ```text
//! export MONGODB_URI=mongodb://localhost:27017
//! cargo run --example worker --all-features -- --upstream https://api.example.com/v1/models --rate 5
//! ```
//!
//! Start it several times: a key that the service limits for one worker is rested by all. It prints a line of
//! JSON when it has started, one for each pass of its recovery, and a summary when it ends: after `--seconds`,
//! or else at the end of its input, and at Ctrl-C in any case.

use std::{
    env,
    error::Error,
    future::pending,
    io::Read,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, SystemTime, SystemTimeError, UNIX_EPOCH},
};

use clap::Parser;
use reqwest::{Method, Request, StatusCode, Url};
use serde_json::json;
use tokio::{
    sync::oneshot,
    task::JoinSet,
    time::{MissedTickBehavior, interval, sleep, timeout},
};
use tower::{Layer, Service, ServiceExt};
use tower_key_rotation::{
    Error as KeyError, KeyPool, KeyRotation, KeyRotationLayer, RecoveryConfig, RecoveryHandle,
    same_origin_redirects, store::mongodb::MongoStore,
};

/// Sends requests with keys from MongoDB, which other workers use too.
#[derive(Debug, Parser)]
struct Options {
    /// Where requests go.
    #[arg(long)]
    upstream: Url,
    /// Requests a second; 0 for none.
    #[arg(long, default_value_t = 1.0)]
    rate: f64,
    /// What the service sees this worker as, in the header `x-worker`.
    #[arg(long, default_value = "worker")]
    name: String,
    /// How long to run; without it, until the input ends.
    #[arg(long)]
    seconds: Option<u64>,
    /// How long a key rests after a 429, in milliseconds.
    #[arg(long, default_value_t = 120_000)]
    cooldown_ms: u64,
    /// The time from one pass of the recovery to the next, in milliseconds.
    #[arg(long, default_value_t = 30_000)]
    interval_ms: u64,
    /// The database.
    #[arg(long, default_value = "worker")]
    database: String,
}

#[derive(Debug, Default)]
struct Counts {
    sent: AtomicU64,
    succeeded: AtomicU64,
    limited: AtomicU64,
    no_key: AtomicU64,
    failed: AtomicU64,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let options = Options::parse();
    let uri = env::var("MONGODB_URI").map_err(|_| "MONGODB_URI says where MongoDB is, and is not set")?;
    let store = MongoStore::builder().database(&options.database).connect(uri).await?;
    let pool = KeyPool::builder().cooldown(Duration::from_millis(options.cooldown_ms)).open(store).await?;
    let config = RecoveryConfig::new().interval(Duration::from_millis(options.interval_ms));
    let recovery = RecoveryHandle::spawn_with(&pool, config);
    say(json!({
        "event": "started",
        "name": options.name,
        "keys": pool.stats().keys.len(),
        "wall_clock": wall_clock()?,
    }));

    // A redirect that reqwest follows by itself would take a key along.
    let client = same_origin_redirects(reqwest::Client::builder()).build()?;
    let client = KeyRotationLayer::new(&pool).layer(client);
    let counts = Arc::new(Counts::default());
    tokio::select! {
        () = end(options.seconds) => {}
        () = send_requests(&options, client, &counts) => {}
        () = report_passes(&recovery) => {}
    }

    let report = recovery.sweep_now().await;
    let written = recovery.shutdown().await;
    say(json!({
        "event": "stopped",
        "name": options.name,
        "wall_clock": wall_clock()?,
        "sent": counts.sent.load(Relaxed),
        "succeeded": counts.succeeded.load(Relaxed),
        "limited": counts.limited.load(Relaxed),
        "no_key": counts.no_key.load(Relaxed),
        "failed": counts.failed.load(Relaxed),
        "passes": report.pass,
        "recovered": report.recovered,
        "marks_not_written": written.map_or_else(|error| error.marks, |()| 0),
    }));
    Ok(())
}

/// In seconds.
fn wall_clock() -> Result<u64, SystemTimeError> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs())
}

#[allow(clippy::print_stdout)]
fn say(line: serde_json::Value) {
    println!("{line}");
}

async fn end(seconds: Option<u64>) {
    let end = async {
        match seconds {
            Some(seconds) => sleep(Duration::from_secs(seconds)).await,
            None => end_of_input().await,
        }
    };
    tokio::select! {
        () = end => {}
        _ = tokio::signal::ctrl_c() => {}
    }
}

async fn end_of_input() {
    let (ended, end) = oneshot::channel();
    // A thread of its own: the runtime would wait for a read that blocks.
    std::thread::spawn(move || {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        let _ = ended.send(());
    });
    let _ = end.await;
}

async fn send_requests(options: &Options, client: KeyRotation<reqwest::Client>, counts: &Arc<Counts>) {
    if options.rate <= 0.0 {
        return pending().await;
    }
    let mut ticks = interval(Duration::from_secs_f64(1.0 / options.rate));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut under_way = JoinSet::new();
    loop {
        ticks.tick().await;
        let mut request = Request::new(Method::GET, options.upstream.clone());
        if let Ok(name) = options.name.parse() {
            request.headers_mut().insert("x-worker", name);
        }
        under_way.spawn(send(client.clone(), request, counts.clone()));
        while under_way.try_join_next().is_some() {}
    }
}

async fn send(client: KeyRotation<reqwest::Client>, request: Request, counts: Arc<Counts>) {
    let answered = answer(client, request);
    let outcome = match timeout(Duration::from_secs(10), answered).await {
        Ok(Ok(status)) if status.is_success() => &counts.succeeded,
        Ok(Ok(status)) if status == 429 => &counts.limited,
        Ok(Err(KeyError::NoKeyAvailable(_))) => &counts.no_key,
        _ => &counts.failed,
    };
    counts.sent.fetch_add(1, Relaxed);
    outcome.fetch_add(1, Relaxed);
}

async fn answer(
    mut client: KeyRotation<reqwest::Client>,
    request: Request,
) -> Result<StatusCode, KeyError<reqwest::Error>> {
    Ok(client.ready().await?.call(request).await?.status())
}

async fn report_passes(recovery: &RecoveryHandle) {
    let mut last = 0;
    loop {
        if let Some(report) = recovery.last_report().filter(|report| report.pass > last) {
            last = report.pass;
            let failure = report.outcome.err().map(|error| error.to_string());
            say(json!({ "event": "pass", "pass": last, "recovered": report.recovered, "failure": failure }));
        }
        sleep(Duration::from_millis(20)).await;
    }
}
