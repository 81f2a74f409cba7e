//! The companion of a pool: writes its marks to the store, follows what changes there, and every 30 seconds
//! resets in the store what has expired and brings the store's view into memory.

use std::{fmt, sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
};

use crate::{
    clock::Clock,
    limit::nanos,
    pool::KeyPool,
    store::{Changed, Recovered, StoreError},
};

/// How long the store is left alone after marks were written, so that a storm of them becomes two writes.
const BETWEEN_WRITES: Duration = Duration::from_millis(250);

/// How long until marks that could not be written, or changes that could not be read, are tried again.
const AFTER_A_FAILURE: Duration = Duration::from_secs(1);

/// After all keys were loaded because something changed, they are not loaded again for that many times as long as
/// it took: with very many keys, loading is then still a small part of all that the two have to do.
const LOADING_SHARE: u32 = 10;

/// When and for how long a [`RecoveryHandle`] works.
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
#[derive(Clone, Debug)]
#[must_use]
pub struct RecoveryConfig {
    interval: Duration,
    limit: Duration,
    start_jitter: Option<Duration>,
}

impl Default for RecoveryConfig {
    fn default() -> Self {
        Self { interval: Duration::from_secs(30), limit: Duration::from_secs(10), start_jitter: None }
    }
}

impl RecoveryConfig {
    /// A pass every 30 seconds, for at most 10 seconds.
    pub fn new() -> Self {
        Self::default()
    }

    /// The time from the start of one pass to the start of the next. A pass that starts late delays the ones
    /// after it; none is made up for.
    pub fn interval(mut self, interval: Duration) -> Self {
        self.interval = interval;
        self
    }

    /// How long a pass may take. One that takes longer is reported as failed. It is not cut off, and the next
    /// one does not begin beside it.
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// The first pass begins at random within that time, so that processes which start together don't sweep
    /// together. By default the interval.
    pub fn start_jitter(mut self, within: Duration) -> Self {
        self.start_jitter = Some(within);
        self
    }
}

/// Keeps a pool and its store in line for as long as it lives. Dropping it stops that, without waiting.
///
/// A pool works without one: keys rest and come back. What a handle adds is the store: marks are written to
/// it as they come, its expired cooldowns are reset, usage is added up, and what other processes and operators
/// changed there is honoured here: at once where the store tells of it, otherwise after the next pass.
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
#[must_use = "dropping the handle stops the recovery"]
pub struct RecoveryHandle {
    pool: KeyPool,
    commands: mpsc::Sender<Command>,
    reports: watch::Receiver<Option<Report>>,
}

enum Command {
    Sweep(oneshot::Sender<Report>),
    ShutDown(oneshot::Sender<Result<(), MarksNotWritten>>),
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

    /// Starts with intervals of one's own.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime, as `tokio::spawn` does.
    pub fn spawn_with(pool: &KeyPool, config: RecoveryConfig) -> Self {
        let (commands, received) = mpsc::channel(8);
        let (reports, reported) = watch::channel(None);
        let (stop, stopped) = watch::channel(());
        tokio::spawn(follow_changes(pool.clone(), stopped.clone()));
        tracing::info!(interval_ms = millis(config.interval), "recovery started");
        let recovery = Recovery {
            pool: pool.clone(),
            config,
            commands: received,
            reports,
            writer: tokio::spawn(write_marks(pool.clone(), stopped)),
            stop,
            overdue: None,
            passes: 0,
            failures: 0,
            recovered: 0,
        };
        tokio::spawn(recovery.run());
        Self { pool: pool.clone(), commands, reports: reported }
    }

    /// Makes a pass now, or after the one that is under way, and says how it went.
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

    /// Finishes the pass that is under way, writes the marks that wait and what keys were used, and stops. The
    /// pass and the writes each have the limit of a pass.
    ///
    /// # Errors
    ///
    /// Where marks could not be written. They are lost when the process ends.
    pub async fn shutdown(self) -> Result<(), MarksNotWritten> {
        let (reply, done) = oneshot::channel();
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
            outcome: Err(PassError::Stopped),
        }
    }
}

impl fmt::Debug for RecoveryHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RecoveryHandle").field("last_report", &self.last_report()).finish()
    }
}

/// How a pass went.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Report {
    /// Which pass it was, from 1.
    pub pass: u64,
    /// How many passes have failed so far.
    pub failures: u64,
    /// How many keys all passes together have reset so far: see [`outcome`](Self::outcome).
    pub recovered: u64,
    /// How long it took.
    pub duration: Duration,
    /// What it reset, or why it failed. In a pool over a store that is what had expired in the store; in one that has
    /// none, what had expired and no request had taken back already.
    /// [`KeyStats::recovered`](crate::KeyStats::recovered) counts every return.
    pub outcome: Result<Recovered, PassError>,
}

/// Why a pass failed. The next one runs all the same.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PassError {
    /// The store failed.
    #[error("the pass failed")]
    Store(#[source] Arc<StoreError>),
    /// It took longer than it may. It goes on, and the next pass waits for it.
    #[error("the pass took longer than {0:?}")]
    TookTooLong(Duration),
    /// It panicked.
    #[error("the pass panicked")]
    Panicked,
    /// There was no pass: the recovery has stopped, with its runtime.
    #[error("the recovery has stopped")]
    Stopped,
}

/// That many marks could not be written before a shutdown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} marks could not be written to the store before the shutdown")]
pub struct MarksNotWritten(pub usize);

/// What it has reset, and whether nothing in it failed.
type Pass = JoinHandle<(Recovered, Result<(), StoreError>)>;

struct Recovery {
    pool: KeyPool,
    config: RecoveryConfig,
    commands: mpsc::Receiver<Command>,
    reports: watch::Sender<Option<Report>>,
    writer: JoinHandle<()>,
    /// Dropped to stop the writer, and whoever follows the store's changes.
    stop: watch::Sender<()>,
    /// A pass that took longer than it may, and is still under way.
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
                    // Nobody waits for it any more.
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
            None if self.pool.is_open() => random_within(self.config.interval),
            None => Duration::ZERO,
        }
    }

    /// From the start of the pass that begins now to that of the next one.
    fn interval(&self) -> Duration {
        if self.pool.is_open() {
            return self.config.interval;
        }
        let growing = AFTER_A_FAILURE.saturating_mul(1 << self.passes.min(5));
        (growing / 2).saturating_add(random_within(growing)).min(self.config.interval)
    }

    async fn pass(&mut self, clock: &dyn Clock) -> Report {
        let started = clock.now();
        let (recovered, done) = self.make_pass(clock, started.saturating_add(self.config.limit)).await;
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
        let too_long = Err(PassError::TookTooLong(self.config.limit));
        if let Some(overdue) = &mut self.overdue {
            tokio::select! {
                biased;
                pass = overdue => {
                    self.overdue = None;
                    self.recovered += pass.map_or(0, |(recovered, _)| recovered.count);
                }
                () = clock.sleep_until(deadline) => return (Recovered::default(), too_long),
            }
        }
        // Spawned and awaited, rather than run here: so a limit doesn't drop a driver's future half-way, and a
        // panic ends the pass alone.
        let mut pass = tokio::spawn(write_sweep_reload(self.pool.clone()));
        tokio::select! {
            biased;
            result = &mut pass => match result {
                Ok((recovered, done)) => {
                    (recovered, done.map_err(|error| PassError::Store(Arc::new(error))))
                }
                Err(_) => (Recovered::default(), Err(PassError::Panicked)),
            },
            () = clock.sleep_until(deadline) => {
                self.overdue = Some(pass);
                (Recovered::default(), too_long)
            }
        }
    }

    async fn shut_down(self, clock: &dyn Clock) -> Result<(), MarksNotWritten> {
        drop(self.stop);
        let pool = self.pool.clone();
        let (writer, overdue) = (self.writer, self.overdue);
        let last_writes = tokio::spawn(async move {
            if let Err(error) = pool.write_marks().await {
                tracing::warn!(error = %Chain(&error), "marks could not be written");
            }
            if let Err(error) = pool.write_usage().await {
                tracing::warn!(error = %Chain(&error), "usage could not be written");
            }
            let _ = writer.await;
            if let Some(pass) = overdue {
                let _ = pass.await;
            }
        });
        tokio::select! {
            biased;
            _ = last_writes => {}
            () = clock.sleep_until(clock.now().saturating_add(self.config.limit)) => {}
        }
        tracing::info!("recovery stopped");
        all_written(&self.pool)
    }
}

fn all_written(pool: &KeyPool) -> Result<(), MarksNotWritten> {
    match pool.marks_waiting() {
        0 => Ok(()),
        waiting => Err(MarksNotWritten(waiting)),
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
    // What the store doesn't do must not keep it from doing the rest.
    let marks = pool.write_marks().await;
    let usage = pool.write_usage().await;
    let (recovered, swept) = match pool.sweep().await {
        Ok(recovered) => (recovered, Ok(())),
        Err(error) => (Recovered::default(), Err(error)),
    };
    let replaced = pool.replace_failed().await;
    let reloaded = pool.reload().await;
    (recovered, marks.and(usage).and(replaced).and(reloaded).and(swept))
}

/// Follows what changes in the store, until the sender of `stop` is gone. It never stops in the middle of a read.
///
/// All keys are loaded for no more than a share of the time. Those that are known to have changed don't wait for that.
async fn follow_changes(pool: KeyPool, mut stop: watch::Receiver<()>) {
    let Some(mut changes) = pool.watch() else { return };
    let clock = pool.clock().clone();
    let (mut all_are_due, mut not_before) = (false, Duration::ZERO);
    loop {
        let changed = tokio::select! {
            biased;
            _ = stop.changed() => return,
            () = clock.sleep_until(not_before), if all_are_due => Changed::Anything,
            changed = changes.recv() => match changed {
                Some(Changed::Anything) => {
                    all_are_due = true;
                    continue;
                }
                Some(changed) => changed,
                None => {
                    return tracing::warn!("the store no longer says what changes: passes alone bring it in");
                }
            },
        };
        let began = clock.now();
        let all = changed == Changed::Anything;
        let following = pool.clone();
        let followed = tokio::spawn(async move { following.follow(changed).await }).await;
        if !matches!(followed, Ok(Ok(()))) {
            // The passes tell of it, where it lasts. What was missed is among all keys.
            (all_are_due, not_before) = (true, Duration::ZERO);
            if stopped_within(AFTER_A_FAILURE, &*clock, &mut stop).await {
                return;
            }
        } else if all {
            let took = clock.now().saturating_sub(began);
            (all_are_due, not_before) =
                (false, clock.now().saturating_add(took.saturating_mul(LOADING_SHARE)));
        }
    }
}

/// Writes marks as they come, until the sender of `stop` is gone. It never stops in the middle of a write.
async fn write_marks(pool: KeyPool, mut stop: watch::Receiver<()>) {
    let clock = pool.clock().clone();
    let mut failing = false;
    loop {
        tokio::select! {
            biased;
            _ = stop.changed() => return,
            () = pool.mark_waiting() => {}
        }
        let pause = match pool.write_marks().await {
            Ok(()) => {
                failing = false;
                if pool.a_key_has_failed() {
                    // Now rather than at the next pass, which does it where this fails. It may take a while.
                    tokio::spawn(replace_and_reload(pool.clone()));
                }
                BETWEEN_WRITES
            }
            Err(error) => {
                // Once an outage, not once a second: the passes tell of it as well.
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(error = %Chain(&error), "marks could not be written, they wait in memory");
                }
                pool.keep_waiting();
                AFTER_A_FAILURE
            }
        };
        if stopped_within(pause, &*clock, &mut stop).await {
            return;
        }
    }
}

async fn stopped_within(time: Duration, clock: &dyn Clock, stop: &mut watch::Receiver<()>) -> bool {
    tokio::select! {
        biased;
        _ = stop.changed() => true,
        () = clock.sleep_until(clock.now().saturating_add(time)) => false,
    }
}

async fn replace_and_reload(pool: KeyPool) -> Result<(), StoreError> {
    match pool.replace_failed().await? {
        0 => Ok(()),
        _ => pool.reload().await,
    }
}

fn random_within(time: Duration) -> Duration {
    Duration::from_nanos(fastrand::u64(..=nanos(time)))
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// An error and its sources on one line, of bounded length.
struct Chain<'a>(&'a (dyn std::error::Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const LONGEST: usize = 400;
        let mut text = self.0.to_string();
        let mut error = self.0;
        while let Some(source) = error.source() {
            text = format!("{text}: {source}");
            error = source;
        }
        let printable = text.chars().map(|c| if c.is_control() { ' ' } else { c });
        f.write_str(&printable.take(LONGEST).collect::<String>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn no_interval_is_too_long_or_too_short() {
        for time in [Duration::ZERO, Duration::MAX] {
            let pool = KeyPool::builder().key("alpha", "sk-1").build().unwrap();
            let config =
                RecoveryConfig::new().interval(Duration::MAX).limit(Duration::MAX).start_jitter(time);
            let recovery = RecoveryHandle::spawn_with(&pool, config);
            assert!(recovery.sweep_now().await.outcome.is_ok());
            assert_eq!(recovery.shutdown().await, Ok(()));
        }
    }
}
