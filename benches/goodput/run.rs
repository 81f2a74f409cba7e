//! A run: the requests of several processes to one service, in virtual time or over sockets.

use std::{io, time::Duration};

use http::{Request, StatusCode};
use http_body_util::BodyExt;
use tokio::{
    runtime::Builder,
    time::{Instant, sleep_until, timeout},
};
use tower::ServiceExt;
use tower_key_rotation::Reservation;

use crate::{
    arrivals::Job,
    clients::{Client, ClientKind},
    processes::{Processes, Together},
    service::ServiceKind,
    sockets,
    upstream::{SentAt, Upstream},
};

/// A request that is not served within this time has failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

const URL: &str = "https://api.example.com/v1/chat/completions";

/// The results of a run.
pub(crate) struct Outcome {
    /// The share of the requests that failed.
    pub(crate) failed: f64,
    /// The 429s per 100 served requests.
    pub(crate) limited_per_100: f64,
    /// The time from each served request's arrival until it was sent for the last time.
    pub(crate) waits: Vec<f64>,
}

/// Runs in virtual time: the clock of the runtime is paused, and moves on when all tasks wait.
pub(crate) fn run(
    client: ClientKind,
    service: ServiceKind,
    processes: usize,
    together: Together,
    jobs: &[Job],
    seed: u64,
) -> Outcome {
    // The generator of the thread: the crate and some clients use it.
    fastrand::seed(seed);
    let runtime = Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let upstream = Upstream::start(service, seed);
        let seconds = jobs.last().map_or(0.0, |job| job.arrives);
        let processes = Processes::start(client, together, &upstream, processes, seconds, seed).await;
        outcome(&upstream, processes, jobs).await
    })
}

/// Runs this crate with pacing over TCP, in real time.
///
/// # Errors
///
/// If there is no port to listen on.
pub(crate) fn run_over_sockets(service: ServiceKind, jobs: &[Job], seed: u64) -> io::Result<Outcome> {
    fastrand::seed(seed);
    let runtime = Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let upstream = Upstream::start(service, seed);
        let client = sockets::client(&upstream).await?;
        Ok(outcome(&upstream, Processes::single(client, &upstream, seed), jobs).await)
    })
}

/// Sends each request when it arrives, and waits for all responses.
async fn outcome(upstream: &Upstream, mut processes: Processes, jobs: &[Job]) -> Outcome {
    let start = Instant::now();
    let mut requests = Vec::with_capacity(jobs.len());
    for job in jobs {
        sleep_until(start + Duration::from_secs_f64(job.arrives)).await;
        let (process, client) = processes.of(job).await;
        requests.push((process, tokio::spawn(send(client, *job))));
        if let Some(killed) = processes.killed() {
            requests.iter().filter(|(of, _)| *of == killed).for_each(|(_, request)| request.abort());
        }
    }
    let (mut waits, mut lost) = (Vec::new(), 0);
    for (_, request) in requests {
        match request.await {
            Ok(waited) => waits.extend(waited),
            Err(error) if error.is_cancelled() => lost += 1,
            Err(error) => panic!("{error}"),
        }
    }
    let counts = upstream.counts();
    Outcome {
        failed: 1.0 - waits.len() as f64 / (jobs.len() - lost) as f64,
        limited_per_100: 100.0 * counts.limited as f64 / counts.served as f64,
        waits,
    }
}

/// Returns how long the request waited, or `None` if it failed.
async fn send(client: Client, job: Job) -> Option<f64> {
    let mut request = Request::post(URL).body(Default::default()).unwrap();
    request.extensions_mut().insert(job);
    let response = timeout(PATIENCE, client.oneshot(request)).await.ok()?.ok()?;
    if response.status() != StatusCode::OK {
        return None;
    }
    let SentAt(sent) = *response.extensions().get().expect("an extension of the service");
    let reservation = response.extensions().get::<Reservation>().cloned();
    response.into_body().collect().await.ok()?;
    // The body says what was used. Only this crate's clients reserve tokens.
    if let Some(reservation) = reservation {
        reservation.used((job.input + job.output) as u64);
    }
    Some((sent - job.arrives).max(0.0))
}
