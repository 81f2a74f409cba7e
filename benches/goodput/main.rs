//! Goodput near the quota: how many requests fail, and how long they wait, at loads around what a service allows.
//!
//! ```text
//! cargo bench --bench goodput
//! cargo bench --bench goodput -- --services openai,anthropic --clients today --loads 0.5,0.95 --seeds 1 --json
//! cargo bench --bench goodput -- --plot docs/goodput.svg
//! ```
//!
//! Clients send Poisson arrivals to a simulated service in virtual time: 300 s pass within a second. `service.rs` has the
//! rules of the services, `arrivals.rs` those of the requests. A load of 1 is all that the limits of the service allow.
//! Each process is a client of its own, and all use the same keys. Figures are medians over the seeds.
//!
//! A run repeats exactly, unless its client uses `tokio::select!`, which polls in random order.

mod arguments;
mod arrivals;
mod clients;
mod limit;
mod oracle;
mod plot;
mod run;
mod service;
mod table;
mod upstream;

use std::{
    collections::BTreeMap,
    env,
    ops::Range,
    sync::{
        atomic::{AtomicUsize, Ordering::Relaxed},
        mpsc,
    },
    thread,
};

use arguments::{Arguments, name};
use arrivals::Job;
use clap::{Parser, ValueEnum};
use clients::ClientKind;
use service::ServiceKind;
use table::{Figures, Row};

fn main() {
    // `cargo test --benches` only checks that each client runs.
    if !env::args().any(|argument| argument == "--bench") {
        let short = Scenario { service: ServiceKind::OpenAi, load: 0.95, seeds: 0..1, seconds: 20.0 };
        assert_eq!(short.rows(ClientKind::value_variants(), &[1]).len(), ClientKind::value_variants().len());
        return;
    }
    let arguments = Arguments::parse();
    if let Some(path) = &arguments.plot {
        let mut rows = Vec::new();
        measure(&arguments, |row| rows.push(row));
        return plot::draw(path, &rows);
    }
    if !arguments.json {
        Row::print_head();
    }
    measure(&arguments, |row| if arguments.json { row.print_json() } else { row.print() });
}

/// Runs all scenarios, and takes the rows in order.
fn measure(arguments: &Arguments, mut take: impl FnMut(Row)) {
    for_each_in_order(
        &arguments.scenarios(),
        |scenario| arguments.rows(scenario),
        |rows| rows.into_iter().for_each(&mut take),
    );
}

/// A service and a load: all clients get the same requests.
struct Scenario {
    service: ServiceKind,
    load: f64,
    seeds: Range<u64>,
    seconds: f64,
}

/// The requests of a scenario with one seed, and the waits of the oracle.
struct Traffic {
    seed: u64,
    jobs: Vec<Job>,
    oracle: Vec<f64>,
}

impl Scenario {
    fn rows(&self, clients: &[ClientKind], processes: &[usize]) -> Vec<Row> {
        let traffic: Vec<_> = self.seeds.clone().map(|seed| self.traffic(seed)).collect();
        let cases = processes.iter().flat_map(|processes| clients.iter().map(|client| (*processes, *client)));
        cases.map(|(processes, client)| self.row(client, processes, &traffic)).collect()
    }

    fn traffic(&self, seed: u64) -> Traffic {
        let jobs = arrivals::poisson(self.service, self.load, self.seconds, seed);
        let oracle = oracle::waits(self.service, &jobs);
        Traffic { seed, jobs, oracle }
    }

    fn row(&self, client: ClientKind, processes: usize, traffic: &[Traffic]) -> Row {
        let figures = |Traffic { seed, jobs, oracle }: &Traffic| {
            Figures::new(run::run(client, self.service, processes, jobs, *seed), oracle)
        };
        let of_seeds: Vec<_> = traffic.iter().map(figures).collect();
        Row {
            client: name(client),
            service: name(self.service),
            processes,
            load: self.load,
            figures: Figures::medians(&of_seeds),
        }
    }
}

/// Works on items in as many threads as the machine has cores, and takes the results in the order of the items.
fn for_each_in_order<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync, mut take: impl FnMut(R)) {
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let (next, (sender, receiver)) = (AtomicUsize::new(0), mpsc::channel());
    thread::scope(|scope| {
        for _ in 0..threads {
            let (next, work, sender) = (&next, &work, sender.clone());
            scope.spawn(move || {
                loop {
                    let number = next.fetch_add(1, Relaxed);
                    let Some(item) = items.get(number) else { break };
                    sender.send((number, work(item))).unwrap();
                }
            });
        }
        drop(sender);
        let (mut early, mut taken) = (BTreeMap::new(), 0);
        for (number, result) in receiver {
            early.insert(number, result);
            while let Some(result) = early.remove(&taken) {
                take(result);
                taken += 1;
            }
        }
    });
}
