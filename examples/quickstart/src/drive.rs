//! Sends the requests, so many at once, and counts how they end.

use std::{
    collections::BTreeMap,
    error::Error,
    iter,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use futures_util::FutureExt;
use reqwest::StatusCode;
use tokio::{signal, sync::mpsc, task::JoinSet, time};
use tower::{Service, ServiceExt};
use tower_key_rotation::KeyPool;

use crate::{client::Client, options::Options, progress::Progress, target::Target};

/// How the requests ended.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) succeeded: usize,
    /// How often each status or error was the end of a request. No secret is in them.
    pub(crate) failed: BTreeMap<String, usize>,
    /// How long the slowest of them took, with all its attempts.
    pub(crate) longest: Duration,
    /// Whether it was stopped by Ctrl-C.
    pub(crate) interrupted: bool,
}

/// Runs until all requests have ended, or Ctrl-C.
pub(crate) async fn drive(client: Client, target: Target, pool: &KeyPool, options: &Options) -> Outcome {
    // Polled once, so that it listens before the first request is sent.
    let mut interrupted = pin!(interrupted());
    if interrupted.as_mut().now_or_never().is_some() {
        return Outcome { interrupted: true, ..Outcome::default() };
    }

    let requests = options.requests.get();
    let (ends, mut ended) = mpsc::unbounded_channel();
    let left = Arc::new(AtomicUsize::new(requests));
    let target = Arc::new(target);
    let mut senders = JoinSet::new();
    for _ in 0..options.concurrency() {
        senders.spawn(send_while_any_is_left(client.clone(), target.clone(), left.clone(), ends.clone()));
    }
    drop(ends);

    let progress = Progress::new(requests, pool, options.json);
    let mut outcome = Outcome::default();
    let mut tick = time::interval(Duration::from_millis(100));
    loop {
        tokio::select! {
            end = ended.recv() => match end {
                Some(end) => outcome.count(end),
                None => break,
            },
            _ = tick.tick() => progress.show(outcome.succeeded),
            () = &mut interrupted => {
                outcome.interrupted = true;
                break;
            }
        }
    }
    senders.shutdown().await;
    while let Some(end) = ended.recv().await {
        outcome.count(end);
    }
    progress.finish(outcome.succeeded);
    outcome
}

/// How a request ended: with a status, or with what went wrong.
type End = Result<StatusCode, String>;

/// An end, and how long it took.
type Ended = (End, Duration);

async fn send_while_any_is_left(
    mut client: Client,
    target: Arc<Target>,
    left: Arc<AtomicUsize>,
    ends: mpsc::UnboundedSender<Ended>,
) {
    let take = || left.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)).is_ok();
    while take() {
        let began = Instant::now();
        let end = send(&mut client, &target).await;
        if ends.send((end, began.elapsed())).is_err() {
            return;
        }
    }
}

async fn send(client: &mut Client, target: &Target) -> End {
    use tower_key_rotation::Error::{Inner, NoKeyAvailable};

    // What `reqwest` says of an error names the URL, and all that is in its query.
    let describe = |error: reqwest::Error| with_sources(&error.without_url());
    let response = match async { client.ready().await?.call(target.request()).await }.await {
        Ok(response) => response,
        Err(Inner(error)) => return Err(describe(error)),
        // Its own words say when the first key is back, and differ each time.
        Err(NoKeyAvailable(_)) => {
            return Err("no key available within the time that a request may wait".into());
        }
        Err(error) => return Err(with_sources(&error)),
    };
    let status = response.status();
    // To the end, so that the connection is used again.
    response.bytes().await.map_err(describe)?;
    Ok(status)
}

impl Outcome {
    fn count(&mut self, (end, took): Ended) {
        self.longest = self.longest.max(took);
        let failure = match end {
            Ok(status) if status.is_success() => return self.succeeded += 1,
            Ok(status) => status.to_string(),
            Err(error) => error,
        };
        *self.failed.entry(failure).or_default() += 1;
    }
}

/// Completes at a Ctrl-C; never where those can't be heard.
async fn interrupted() {
    if signal::ctrl_c().await.is_err() {
        std::future::pending().await
    }
}

/// An error and what is behind it, on one line.
pub(crate) fn with_sources(error: &(dyn Error + 'static)) -> String {
    let chain = iter::successors(Some(error), |&error| error.source());
    let mut line: Vec<String> = chain.map(ToString::to_string).collect();
    // A transparent error says the same as its source.
    line.dedup();
    line.join(": ")
}
