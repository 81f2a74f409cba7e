//! A harness that compares the times of several cases.
//!
//! Cases that run one after the other can't be compared: a machine's speed changes from one second to the next.
//! Here the cases take turns in short batches, in random order. Each ratio compares two batches of the same round.
//! Memory addresses affect the times of a whole process. So several processes measure, and the result is the median
//! of their medians. The first case runs a second time under another name, to show the remaining noise.

use std::{
    env,
    hint::black_box,
    process::{self, Command},
    time::{Duration, Instant},
};

const PROCESSES: usize = 5;
const ROUNDS: usize = 200;

/// The environment variable that tells a child process which comparison to measure.
const CHILD: &str = "COMPARISON";

pub const AGAIN: &str = "the first case again";

type Batch = Box<dyn FnMut(u64) -> Duration>;

struct Case {
    name: String,
    start: Box<dyn Fn() -> Batch>,
}

pub struct Comparison {
    title: String,
    cases: Vec<Case>,
    batch: Duration,
}

impl Comparison {
    pub fn new(title: impl Into<String>) -> Self {
        Self { title: title.into(), cases: Vec::new(), batch: Duration::from_micros(100) }
    }

    /// Sets the minimum duration of a batch. By default 100 µs.
    pub fn batches_of(self, batch: Duration) -> Self {
        Self { batch, ..self }
    }

    /// Adds a case: `start` creates the closure that is timed.
    pub fn case<F: FnMut() + 'static>(
        self,
        name: impl Into<String>,
        start: impl Fn() -> F + 'static,
    ) -> Self {
        self.timed(name, move || {
            let mut once = start();
            move |times| {
                let started = Instant::now();
                for _ in 0..times {
                    once();
                }
                started.elapsed()
            }
        })
    }

    /// Adds a case that times its own calls: the closure gets the number of calls and returns their total time.
    pub fn timed<F: FnMut(u64) -> Duration + 'static>(
        mut self,
        name: impl Into<String>,
        start: impl Fn() -> F + 'static,
    ) -> Self {
        self.cases.push(Case { name: name.into(), start: Box::new(move || Box::new(start())) });
        self
    }

    /// Measures all cases. Returns `None` in a child process that measures another comparison.
    pub fn run(self) -> Option<Outcome> {
        // `cargo test --benches` only checks that each case runs.
        if !is_benchmark() {
            self.cases.iter().for_each(|case| {
                black_box((case.start)()(1));
            });
            return None;
        }
        match env::var(CHILD) {
            Ok(title) if title == self.title => {
                println!("{}", serde_json::to_string(&self.measure()).unwrap());
                process::exit(0);
            }
            Ok(_) => None,
            Err(_) => {
                let rounds = (0..PROCESSES).map(|_| self.measure_in_a_process()).collect();
                let mut names: Vec<_> = self.cases.into_iter().map(|case| case.name).collect();
                names.push(AGAIN.into());
                Some(Outcome { title: self.title, names, processes: rounds })
            }
        }
    }

    fn measure_in_a_process(&self) -> Rounds {
        let child = Command::new(env::current_exe().unwrap()).arg("--bench").env(CHILD, &self.title).output();
        let child = child.unwrap();
        assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stderr));
        serde_json::from_slice(&child.stdout).unwrap()
    }

    fn measure(&self) -> Rounds {
        let starts = self.cases.iter().chain(self.cases.first());
        let mut batches: Vec<_> = starts.map(|case| Running::new((case.start)(), self.batch)).collect();
        let mut order: Vec<_> = (0..batches.len()).collect();
        (0..ROUNDS)
            .map(|_| {
                fastrand::shuffle(&mut order);
                let mut round = vec![0.0; order.len()];
                order.iter().for_each(|case| round[*case] = batches[*case].nanoseconds());
                round
            })
            .collect()
    }
}

/// For each round, the nanoseconds per call of each case.
type Rounds = Vec<Vec<f64>>;

struct Running {
    batch: Batch,
    times: u64,
}

impl Running {
    fn new(mut batch: Batch, at_least: Duration) -> Self {
        // The shortest of three: the first calls are slow, and the thread may be interrupted during a batch.
        let mut shortest = |times| (0..3).map(|_| batch(times)).min();
        let mut times = 1;
        while shortest(times).is_some_and(|time| time < at_least) {
            times *= 2;
        }
        Self { batch, times }
    }

    fn nanoseconds(&mut self) -> f64 {
        (self.batch)(self.times).as_nanos() as f64 / self.times as f64
    }
}

/// Returns `true` under `cargo bench`, `false` under `cargo test --benches`.
pub fn is_benchmark() -> bool {
    env::args().any(|argument| argument == "--bench")
}

pub struct Outcome {
    title: String,
    names: Vec<String>,
    processes: Vec<Rounds>,
}

/// The target of a figure.
#[derive(Clone, Copy, Debug)]
pub enum Bar {
    AtMost(f64),
    AtLeast(f64),
}

impl Bar {
    pub fn print(self, what: &str, measured: f64, unit: &str) {
        let (met, word, bar) = match self {
            Self::AtMost(bar) => (measured <= bar, "at most", bar),
            Self::AtLeast(bar) => (measured >= bar, "at least", bar),
        };
        let verdict = if met { "met" } else { "MISSED" };
        println!("{verdict}: {what}: {measured:.2}{unit}, {word} {bar}{unit}");
    }
}

impl Outcome {
    fn position(&self, case: &str) -> usize {
        self.names.iter().position(|name| name == case).unwrap_or_else(|| panic!("no case {case:?}"))
    }

    /// Returns the nanoseconds per call.
    pub fn time(&self, case: &str) -> f64 {
        let case = self.position(case);
        median_of_medians(&self.processes, |round| round[case])
    }

    /// Returns the nanoseconds that a call of `case` takes beyond a call of `other`.
    pub fn beyond(&self, case: &str, other: &str) -> f64 {
        let (case, other) = (self.position(case), self.position(other));
        median_of_medians(&self.processes, |round| round[case] - round[other])
    }

    pub fn ratio(&self, case: &str, other: &str) -> f64 {
        median(self.ratios(case, other))
    }

    /// Returns one ratio per process.
    fn ratios(&self, case: &str, other: &str) -> Vec<f64> {
        let (case, other) = (self.position(case), self.position(other));
        let of_process =
            |rounds: &Rounds| median(rounds.iter().map(|round| round[case] / round[other]).collect());
        self.processes.iter().map(of_process).collect()
    }

    /// Prints each case compared with the first, and `subject` compared with each case.
    pub fn print(&self, subject: &str) {
        let first = &self.names[0];
        println!("\n{}\n", self.title);
        println!("| | ns | beyond {first} | ÷ {first} | {subject} ÷ this |");
        println!("|---|---|---|---|---|");
        for name in &self.names {
            let (time, to_first, of_subject) =
                (self.time(name), self.ratio(name, first), self.ratio(subject, name));
            let beyond = self.beyond(name, first);
            println!(
                "| {name} | {} | {} | {to_first:.2} | {of_subject:.2} |",
                rounded(time),
                rounded(beyond)
            );
        }
        println!();
    }

    pub fn bar(&self, case: &str, other: &str, bar: Bar) {
        let mut ratios = self.ratios(case, other);
        let measured = median(ratios.clone());
        ratios.sort_by(f64::total_cmp);
        let what = format!("{case} / {other} ({:.2} to {:.2})", ratios[0], ratios[ratios.len() - 1]);
        bar.print(&what, measured, "");
    }
}

/// Formats nanoseconds with the significant digits only.
pub fn rounded(nanoseconds: f64) -> String {
    if nanoseconds < 100.0 { format!("{nanoseconds:.1}") } else { format!("{nanoseconds:.0}") }
}

fn median_of_medians(processes: &[Rounds], figure: impl Fn(&[f64]) -> f64) -> f64 {
    let of_process = |rounds: &Rounds| median(rounds.iter().map(|round| figure(round)).collect());
    median(processes.iter().map(of_process).collect())
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}
