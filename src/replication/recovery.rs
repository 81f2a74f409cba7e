//! The tasks of a pool over a store: they write its marks, follow the store's changes, and every 30 seconds sweep the
//! store and load it.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
};

use super::{follow::follow, limits::share_limits, log::Chain, quotas::keep_quotas, sources::follow_source};
use crate::{
    clock::Clock,
    limit::{millis, nanos},
    pool::KeyPool,
    store::{Recovered, StoreError},
};

/// The time until marks that could not be written are tried again.
const AFTER_A_FAILURE: Duration = Duration::from_secs(1);

/// When and for how long a [`RecoveryHandle`] makes its passes.
///
/// ```
/// use std::time::Duration;
/// use tower_key_rotation::{KeyPool, RecoveryConfig, RecoveryHandle};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let pool = KeyPool::builder().key("alpha", "sk-1").build()?;
/// let config = RecoveryConfig::new()
///     .interval(Duration::from_secs(10))
///     .limit(Duration::from_secs(3))
///     .start_jitter(Duration::ZERO);
/// let recovery = RecoveryHandle::spawn_with(&pool, config);
/// # recovery.shutdown().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct RecoveryConfig {
    interval: Option<Duration>,
    limit: Option<Duration>,
    start_jitter: Option<Duration>,
    shutdown_limit: Option<Duration>,
}

impl RecoveryConfig {
    /// A pass every 30 seconds, for at most 10 seconds.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the time from the start of one pass to the start of the next. A pass that starts late delays the ones
    /// after it; a missed pass is not made up for.
    pub fn interval(mut self, interval: Duration) -> Self {
        self.interval = Some(interval);
        self
    }

    /// Sets how long a pass may take. A longer one is reported as failed. It is not cut off, and the next pass does not
    /// begin beside it.
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = Some(limit);
        self
    }

    /// Sets the time within which the first pass begins, at random, so that processes which start together don't sweep
    /// together. By default the interval.
    pub fn start_jitter(mut self, within: Duration) -> Self {
        self.start_jitter = Some(within);
        self
    }

    /// Sets how long a [shutdown](RecoveryHandle::shutdown) may take. By default 8 seconds: a container is usually killed
    /// after 10.
    pub fn shutdown_limit(mut self, limit: Duration) -> Self {
        self.shutdown_limit = Some(limit);
        self
    }

    fn shutdown_limit_or_default(&self) -> Duration {
        self.shutdown_limit.unwrap_or(Duration::from_secs(8))
    }

    fn interval_or_default(&self) -> Duration {
        self.interval.unwrap_or(Duration::from_secs(30))
    }

    fn limit_or_default(&self) -> Duration {
        self.limit.unwrap_or(Duration::from_secs(10))
    }
}

/// Keeps a pool and its store in line for as long as it lives. Dropping it stops that without waiting, and writes
/// nothing: [`shutdown`](Self::shutdown) does.
///
/// A pool works without a handle: keys rest and come back. For the store, the handle writes marks as they come,
/// resets expired cooldowns, adds up usage, and brings in what other processes and operators changed: at once if the
/// store tells of changes, otherwise with the next pass. In a pool that [learns limits](crate::KeyPoolBuilder::paced), it
/// shares them with the other processes over the store.
///
/// The handle also follows the [sources](crate::source) of the pool's keys, with or without a store. Without it, keys do not
/// change, and secrets that expire are neither renewed nor taken out of service.
///
/// ```
/// use tower_key_rotation::{KeyPool, RecoveryHandle};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let pool = KeyPool::builder().key("alpha", "sk-1").build()?;
/// let recovery = RecoveryHandle::spawn(&pool);
///
/// let report = recovery.sweep_now().await;
/// assert_eq!(report.outcome?.count, 0);
///
/// recovery.shutdown().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use = "dropping the handle stops the recovery"]
pub struct RecoveryHandle {
    pool: KeyPool,
    commands: mpsc::Sender<Command>,
    reports: watch::Receiver<Option<Report>>,
    /// When a shutdown began, by the pool's clock.
    shuts_down: watch::Sender<Option<Duration>>,
}

#[derive(Debug)]
enum Command {
    Sweep(oneshot::Sender<Report>),
    ShutDown(oneshot::Sender<Result<(), NotWritten>>),
}

impl RecoveryHandle {
    /// Starts with the usual intervals.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime, as `tokio::spawn` does.
    pub fn spawn(pool: &KeyPool) -> Self {
        Self::spawn_with(pool, RecoveryConfig::default())
    }

    /// Starts with these intervals.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime, as `tokio::spawn` does.
    pub fn spawn_with(pool: &KeyPool, config: RecoveryConfig) -> Self {
        let (commands, received) = mpsc::channel(8);
        let (reports, reported) = watch::channel(None);
        let (stop, stopped) = watch::channel(());
        let (shuts_down, shutdown) = watch::channel(None);
        follow_changes(pool, stopped.clone());
        let sharing = tokio::spawn(share_limits(pool.clone(), stopped.clone()));
        let keeping = tokio::spawn(keep_quotas(pool.clone(), stopped.clone()));
        let sources = pool.engine().config.sources.iter();
        let sourcing =
            sources.map(|source| tokio::spawn(follow_source(pool.clone(), source.clone(), stopped.clone())));
        let sourcing = sourcing.collect();
        tracing::info!(interval_ms = millis(config.interval_or_default()), "recovery started");
        let recovery = Recovery {
            pool: pool.clone(),
            config,
            commands: received,
            reports,
            shutdown,
            writer: tokio::spawn(write_marks(pool.clone(), stopped)),
            sharing,
            keeping,
            sourcing,
            stop,
            overdue: None,
            passes: 0,
            failures: 0,
            recovered: 0,
        };
        tokio::spawn(recovery.run());
        Self { pool: pool.clone(), commands, reports: reported, shuts_down }
    }

    /// Makes a pass now, or after the one in progress, and returns how it went.
    pub async fn sweep_now(&self) -> Report {
        let (reply, report) = oneshot::channel();
        // Where the task is gone, so is the reply's sender.
        let _ = self.commands.send(Command::Sweep(reply)).await;
        report.await.unwrap_or_else(|_| self.stopped())
    }

    /// How the last pass went; `None` before the first.
    ///
    /// ```
    /// # use tower_key_rotation::{KeyPool, RecoveryHandle};
    /// # async fn health(recovery: RecoveryHandle) {
    /// match recovery.last_report().map(|report| report.outcome) {
    ///     Some(Err(error)) => println!("the store is in trouble: {error}"),
    ///     _ => println!("fine"),
    /// }
    /// # }
    /// ```
    #[must_use]
    pub fn last_report(&self) -> Option<Report> {
        self.reports.borrow().clone()
    }

    /// Finishes the pass in progress, writes pending marks and usage, and stops, within
    /// [8 seconds](RecoveryConfig::shutdown_limit). The pass has half of that.
    ///
    /// # Errors
    ///
    /// If marks or usage could not be written. They are lost when the process ends.
    pub async fn shutdown(self) -> Result<(), NotWritten> {
        let (reply, done) = oneshot::channel();
        let began = self.pool.clock().now();
        // Now: the task may be in the middle of a pass.
        self.shuts_down.send_replace(Some(began));
        let _ = self.commands.send(Command::ShutDown(reply)).await;
        done.await.unwrap_or_else(|_| all_written(&self.pool))
    }

    fn stopped(&self) -> Report {
        let last = self.last_report();
        Report {
            pass: last.as_ref().map_or(0, |report| report.pass),
            failures: last.as_ref().map_or(0, |report| report.failures),
            recovered: last.as_ref().map_or(0, |report| report.recovered),
            duration: Duration::ZERO,
            outcome: Err(PassError(Arc::new(Cause::Stopped))),
        }
    }
}

/// How a pass went.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Report {
    /// The number of the pass, from 1.
    pub pass: u64,
    /// How many passes have failed so far.
    pub failures: u64,
    /// How many keys all passes together have reset so far: see [`outcome`](Self::outcome).
    pub recovered: u64,
    /// How long the pass took.
    pub duration: Duration,
    /// The keys that it reset, or why it failed. With a store, these are the keys whose rest had expired there; without,
    /// those that no request had taken back yet. [`KeyStats::recovered`](crate::KeyStats::recovered) counts every return.
    pub outcome: Result<Recovered, PassError>,
}

/// The reason why a pass failed: the store failed, or the pass took longer than its limit, or it panicked, or the
/// recovery has stopped. After all but the last, the next pass runs all the same.
///
/// If the store failed, the [`StoreError`] is the source.
#[derive(Clone, Debug, thiserror::Error)]
#[error(transparent)]
pub struct PassError(Arc<Cause>);

#[derive(Debug, thiserror::Error)]
enum Cause {
    #[error("the pass failed")]
    Store(#[source] StoreError),
    /// It continues, and the next pass waits for it.
    #[error("the pass took longer than {0:?}")]
    TookTooLong(Duration),
    #[error("the pass panicked")]
    Panicked,
    /// With its runtime: there was no pass.
    #[error("the recovery has stopped")]
    Stopped,
}

/// What could not be written to the store before a shutdown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the marks of {marks} keys and the usage of {usage} keys could not be written before the shutdown")]
#[non_exhaustive]
pub struct NotWritten {
    /// The keys with marks that the store does not have.
    pub marks: usize,
    /// The keys with usage that the store has not confirmed. It may have added some of that.
    pub usage: usize,
}

/// The keys that a pass reset, and whether nothing in it failed.
type Pass = JoinHandle<(Recovered, Result<(), StoreError>)>;

struct Recovery {
    pool: KeyPool,
    config: RecoveryConfig,
    commands: mpsc::Receiver<Command>,
    reports: watch::Sender<Option<Report>>,
    shutdown: watch::Receiver<Option<Duration>>,
    writer: JoinHandle<()>,
    sharing: JoinHandle<()>,
    keeping: JoinHandle<()>,
    sourcing: Vec<JoinHandle<()>>,
    /// Dropped to stop the writer and the follower.
    stop: watch::Sender<()>,
    /// A pass that took longer than its limit and is still in progress.
    overdue: Option<Pass>,
    passes: u64,
    failures: u64,
    recovered: u64,
}

impl Recovery {
    async fn run(mut self) {
        let clock = self.pool.clock().clone();
        let mut next = clock.now().saturating_add(self.start_jitter());
        loop {
            tokio::select! {
                biased;
                command = self.commands.recv() => match command {
                    // The caller has gone.
                    Some(Command::Sweep(reply)) if reply.is_closed() => {}
                    Some(Command::Sweep(reply)) => {
                        let report = self.pass(&*clock).await;
                        let _ = reply.send(report);
                    }
                    Some(Command::ShutDown(reply)) => {
                        let _ = reply.send(self.shut_down(&*clock).await);
                        return;
                    }
                    None => return tracing::info!("recovery stopped"),
                },
                () = clock.sleep_until(next) => {
                    next = clock.now().saturating_add(self.interval());
                    self.pass(&*clock).await;
                }
            }
        }
    }

    fn start_jitter(&self) -> Duration {
        match self.config.start_jitter {
            Some(within) => random_within(within),
            None if is_open(&self.pool) => random_within(self.config.interval_or_default()),
            None => Duration::ZERO,
        }
    }

    /// The time from the start of this pass to the start of the next one.
    fn interval(&self) -> Duration {
        if is_open(&self.pool) {
            return self.config.interval_or_default();
        }
        let growing = AFTER_A_FAILURE.saturating_mul(1 << self.passes.min(5));
        (growing / 2).saturating_add(random_within(growing)).min(self.config.interval_or_default())
    }

    async fn pass(&mut self, clock: &dyn Clock) -> Report {
        let started = clock.now();
        let (recovered, done) =
            self.make_pass(clock, started.saturating_add(self.config.limit_or_default())).await;
        self.passes += 1;
        self.failures += u64::from(done.is_err());
        self.recovered += recovered.count;
        let duration = clock.now().saturating_sub(started);
        log(&recovered, &done, duration);
        self.pool.meter().passed(duration, done.is_ok(), recovered.count);
        #[cfg(feature = "metrics")]
        self.pool.record_metrics();
        let report = Report {
            pass: self.passes,
            failures: self.failures,
            recovered: self.recovered,
            duration,
            outcome: done.map(|()| recovered),
        };
        self.reports.send_replace(Some(report.clone()));
        report
    }

    async fn make_pass(
        &mut self,
        clock: &dyn Clock,
        deadline: Duration,
    ) -> (Recovered, Result<(), PassError>) {
        let too_long = Err(PassError(Arc::new(Cause::TookTooLong(self.config.limit_or_default()))));
        let shutdown = (self.shutdown.clone(), self.config.shutdown_limit_or_default());
        if let Some(overdue) = &mut self.overdue {
            let shutdown = shutdown.clone();
            let Some(pass) = by_or_half_of(shutdown, deadline, clock, overdue).await else {
                return (Recovered::default(), too_long);
            };
            self.overdue = None;
            self.recovered += pass.map_or(0, |(recovered, _)| recovered.count);
        }
        // A task of its own: the limit must not drop a driver's future half-way, and a panic must end the pass alone.
        let mut pass = tokio::spawn(write_sweep_reload(self.pool.clone()));
        match by_or_half_of(shutdown, deadline, clock, &mut pass).await {
            Some(Ok((recovered, done))) => {
                (recovered, done.map_err(|error| PassError(Arc::new(Cause::Store(error)))))
            }
            Some(Err(_)) => (Recovered::default(), Err(PassError(Arc::new(Cause::Panicked)))),
            None => {
                self.overdue = Some(pass);
                (Recovered::default(), too_long)
            }
        }
    }

    async fn shut_down(self, clock: &dyn Clock) -> Result<(), NotWritten> {
        // A value, so that the other processes are told; dropping the sender tells nobody.
        let _ = self.stop.send(());
        let pool = self.pool.clone();
        let Self { writer, sharing, keeping, sourcing, overdue, .. } = self;
        let last_writes = tokio::spawn(async move {
            write_last(&pool).await;
            let _ = writer.await;
            let _ = sharing.await;
            let _ = keeping.await;
            for following in sourcing {
                let _ = following.await;
            }
            if let Some(pass) = overdue {
                let _ = pass.await;
            }
        });
        let began = self.shutdown.borrow().unwrap_or_else(|| clock.now());
        let deadline = began.saturating_add(self.config.shutdown_limit_or_default());
        let _ = by(deadline, clock, last_writes).await;
        tracing::info!("recovery stopped");
        all_written(&self.pool)
    }
}

fn all_written(pool: &KeyPool) -> Result<(), NotWritten> {
    let usage = pool.link().map_or(0, |link| link.count_unconfirmed_usage());
    match pool.engine().snapshot().count_pending() {
        0 if usage == 0 => Ok(()),
        marks => Err(NotWritten { marks, usage }),
    }
}

/// Whether the store has been read, or there is none.
fn is_open(pool: &KeyPool) -> bool {
    pool.link().is_none_or(|link| link.is_open())
}

async fn write_last(pool: &KeyPool) {
    let Some(link) = pool.link() else { return };
    if let Err(error) = link.write_marks().await {
        // Usage would be lost with the next failure.
        return tracing::warn!(error = %Chain(&error), "marks could not be written");
    }
    if let Err(error) = link.write_usage().await {
        tracing::warn!(error = %Chain(&error), "usage could not be written");
    }
}

fn log(recovered: &Recovered, done: &Result<(), PassError>, duration: Duration) {
    let duration_ms = millis(duration);
    if recovered.count > 0 {
        let Recovered { count, ids } = recovered;
        tracing::info!(count, ?ids, duration_ms, "keys recovered");
    }
    if let Err(error) = done {
        tracing::warn!(error = %Chain(error), duration_ms, "recovery pass failed");
    }
}

async fn write_sweep_reload(pool: KeyPool) -> (Recovered, Result<(), StoreError>) {
    let Some(link) = pool.link() else { return (pool.engine().return_all_expired(), Ok(())) };
    // One failure must not prevent the rest.
    let marks = link.write_marks().await;
    let (recovered, swept) = match link.sweep().await {
        Ok(recovered) => (recovered, Ok(())),
        Err(error) => (Recovered::default(), Err(error)),
    };
    let replaced = link.replace_failed().await;
    let reloaded = pool.reload().await;
    // Usage is lost if its write fails: so it is written only if the store has just answered.
    let used = match reloaded {
        Ok(()) => link.write_usage().await,
        Err(error) => Err(error),
    };
    (recovered, marks.and(replaced).and(used).and(swept))
}

/// Follows the store's changes, if it tells of any, until the sender of `stop` is gone.
fn follow_changes(pool: &KeyPool, stop: watch::Receiver<()>) {
    if let Some(link) = pool.link()
        && let Some(changes) = link.store.changes()
    {
        tokio::spawn(follow(link.clone(), changes, stop));
    }
}

/// Writes marks as they come, until the sender of `stop` is gone. It never stops in the middle of a write.
async fn write_marks(pool: KeyPool, mut stop: watch::Receiver<()>) {
    let Some(link) = pool.link() else { return };
    let clock = pool.clock().clone();
    let between_rounds = link.store.writes().pause;
    let mut failing = false;
    loop {
        tokio::select! {
            biased;
            _ = stop.changed() => return,
            () = pool.engine().mark_pending() => {}
        }
        let pause = match link.write_marks().await {
            Ok(()) => {
                failing = false;
                if link.a_key_has_failed() {
                    // Beside the writer, since it may take a while. If it fails, the next pass does it.
                    tokio::spawn(replace_and_reload(pool.clone()));
                }
                between_rounds
            }
            Err(error) => {
                // Once an outage, not once a second: passes report it as well.
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(error = %Chain(&error), "marks could not be written and stay pending");
                }
                pool.engine().wake_writer();
                AFTER_A_FAILURE
            }
        };
        if by(clock.now().saturating_add(pause), &*clock, stop.changed()).await.is_some() {
            return;
        }
    }
}

async fn replace_and_reload(pool: KeyPool) -> Result<(), StoreError> {
    match pool.link() {
        Some(link) if link.replace_failed().await? > 0 => pool.reload().await,
        _ => Ok(()),
    }
}

/// The output of a future; `None` if there is none by the deadline.
async fn by<T>(deadline: Duration, clock: &dyn Clock, future: impl Future<Output = T>) -> Option<T> {
    tokio::select! {
        biased;
        output = future => Some(output),
        () = clock.sleep_until(deadline) => None,
    }
}

/// The same, but no longer than half of what a shutdown may take, once one has begun.
async fn by_or_half_of<T>(
    (mut shutdown, limit): (watch::Receiver<Option<Duration>>, Duration),
    deadline: Duration,
    clock: &dyn Clock,
    future: impl Future<Output = T>,
) -> Option<T> {
    let halfway = async {
        // Without its sender, the handle was dropped: that waits for nothing.
        let began = shutdown.wait_for(Option::is_some).await.ok().and_then(|began| *began);
        let Some(began) = began else { return std::future::pending().await };
        clock.sleep_until(began.saturating_add(limit / 2)).await;
    };
    tokio::select! {
        biased;
        output = by(deadline, clock, future) => output,
        () = halfway => None,
    }
}

fn random_within(time: Duration) -> Duration {
    Duration::from_nanos(fastrand::u64(..=nanos(time)))
}
