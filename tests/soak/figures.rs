//! What is counted, and how it is shown.

use std::{
    alloc::System,
    array,
    collections::BTreeMap,
    fmt, fs,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use reqwest::StatusCode;
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};
use tokio::runtime::Handle;

use crate::{Soak, third_and_end};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// How the callers' requests ended, and what was done to the store and to its keys.
#[derive(Default)]
pub(crate) struct Figures {
    succeeded: AtomicU64,
    /// A response that spoke against its key, where no further attempt could be made.
    passed_on: AtomicU64,
    no_key: AtomicU64,
    failed: Mutex<BTreeMap<String, u64>>,
    /// Of those that succeeded, while the store was well, and while it was in trouble.
    times: [Times; 2],
    counted: Mutex<BTreeMap<&'static str, u64>>,
}

impl Figures {
    pub(crate) fn answered(&self, status: StatusCode, time: Duration, in_trouble: bool) {
        match status.as_u16() {
            200 => {
                self.succeeded.fetch_add(1, Relaxed);
                self.times[usize::from(in_trouble)].add(time);
            }
            401 | 402 | 429 => _ = self.passed_on.fetch_add(1, Relaxed),
            _ => self.failed(status.to_string()),
        }
    }

    pub(crate) fn no_key(&self) {
        self.no_key.fetch_add(1, Relaxed);
    }

    pub(crate) fn failed(&self, how: String) {
        *self.failed.lock().unwrap().entry(how).or_default() += 1;
    }

    pub(crate) fn failures(&self) -> BTreeMap<String, u64> {
        self.failed.lock().unwrap().clone()
    }

    /// A fault of the store, a key that was added or removed, or whatever else happens now and then.
    pub(crate) fn count(&self, what: &'static str, times: u64) {
        *self.counted.lock().unwrap().entry(what).or_default() += times;
    }

    fn count_of(&self, kind: &str) -> u64 {
        let counted = self.counted.lock().unwrap();
        counted.iter().filter(|(what, _)| what.starts_with(kind)).map(|(_, count)| count).sum()
    }

    fn requests(&self) -> u64 {
        [&self.succeeded, &self.passed_on, &self.no_key].map(|count| count.load(Relaxed)).iter().sum()
    }
}

impl Soak {
    /// How it goes.
    pub(crate) fn line(&self, time: Duration, held: Held) -> String {
        let (requests, seconds) = (self.figures.requests(), time.as_secs_f64());
        format!(
            "{seconds:4.0} s: {requests} requests, {:.0}/s, {} marks, {} faults, {} keys added; {held}",
            requests as f64 / seconds,
            self.books.marks(),
            self.figures.count_of("fault"),
            self.figures.count_of("keys added"),
        )
    }

    /// How it went, as a table.
    pub(crate) fn show(&self, time: Duration, samples: &[Held]) {
        let Self { books, figures, service } = self;
        let get = |count: &AtomicU64| count.load(Relaxed);
        let row = |what: &str, figure: &dyn fmt::Display| println!("| {what} | {figure} |");
        let requests = figures.requests();
        let answers =
            [&service.answers.limited, &service.answers.exhausted, &service.answers.revoked].map(get);
        let sent = get(&service.answers.good) + answers.iter().sum::<u64>();
        let [third, end] = third_and_end(samples);
        row("requests", &requests);
        row("requests a second", &(requests / time.as_secs().max(1)));
        row("200", &get(&figures.succeeded));
        row("429, 402, 401", &show(answers));
        row("failed over", &(sent - (requests - get(&figures.no_key))));
        row("passed on to the caller", &get(&figures.passed_on));
        row("no key available", &get(&figures.no_key));
        row("marks", &books.marks());
        for (what, count) in &*figures.counted.lock().unwrap() {
            row(what, count);
        }
        row("requests with a key that their process knew to rest, or to be gone", &books.hits().len());
        row("that only the other process knew, within 1 s", &get(&books.elsewhere.soon));
        row(
            "of these, how long after the mark at the most",
            &format_args!("{:.0?}", books.elsewhere.latest()),
        );
        row("later, the store well", &books.late(Duration::ZERO).len());
        row("later, the store in trouble", &get(&books.elsewhere.late_in_trouble));
        row("p50, p99 of a success, the store well", &figures.times[0]);
        row("p50, p99 of a success, the store in trouble", &figures.times[1]);
        row("held after a third", &third);
        row("held at the end", &end);
    }
}

fn show<const N: usize>(counts: [u64; N]) -> String {
    counts.map(|count| count.to_string()).join(", ")
}

/// How long requests took, in steps of 5 %: as small after ten minutes as after ten seconds.
struct Times([AtomicU64; STEPS]);

const STEPS: usize = 400;
const STEP: f64 = 1.05;

impl Default for Times {
    fn default() -> Self {
        Self(array::from_fn(|_| AtomicU64::new(0)))
    }
}

impl Times {
    fn add(&self, time: Duration) {
        let step = (time.as_micros().max(1) as f64).log(STEP) as usize;
        self.0[step.min(STEPS - 1)].fetch_add(1, Relaxed);
    }

    /// What that share of the requests took at most.
    fn at(&self, share: f64) -> Duration {
        let counts = self.0.each_ref().map(|count| count.load(Relaxed));
        let wanted = (counts.iter().sum::<u64>() as f64 * share) as u64;
        let mut sum = 0;
        let step = counts.iter().position(|count| {
            sum += count;
            sum > wanted
        });
        Duration::from_micros(STEP.powi(step.unwrap_or_default() as i32 + 1) as u64)
    }
}

impl fmt::Display for Times {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1?}, {:.1?}", self.at(0.5), self.at(0.99))
    }
}

/// What the program holds at one moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Held {
    /// Allocated.
    pub(crate) bytes: usize,
    /// Of the runtime that asks.
    pub(crate) tasks: usize,
    /// What the operating system says that the program takes; zero where it doesn't say it.
    resident_kib: usize,
}

impl Held {
    pub(crate) fn now() -> Self {
        let allocated = ALLOCATOR.stats();
        Self {
            bytes: allocated.bytes_allocated - allocated.bytes_deallocated,
            tasks: Handle::current().metrics().num_alive_tasks(),
            resident_kib: resident_kib().unwrap_or_default(),
        }
    }

    /// Of each, what is in the middle of these.
    pub(crate) fn median(of: &[Self]) -> Self {
        let median = |value: fn(&Self) -> usize| {
            let mut values: Vec<_> = of.iter().map(value).collect();
            values.sort_unstable();
            values[values.len() / 2]
        };
        Self {
            bytes: median(|held| held.bytes),
            tasks: median(|held| held.tasks),
            resident_kib: median(|held| held.resident_kib),
        }
    }
}

impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (allocated, resident) = (self.bytes / 1024, self.resident_kib);
        write!(f, "{allocated} KiB allocated, {resident} KiB resident, {} tasks", self.tasks)
    }
}

fn resident_kib() -> Option<usize> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().split(' ').next()?.parse().ok()
}
