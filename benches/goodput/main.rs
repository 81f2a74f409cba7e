//! Goodput near the quota: the share of requests that fail, and their waits, at loads around what a service allows.
//!
//! ```text
//! cargo bench --bench goodput
//! cargo bench --bench goodput -- --services openai,anthropic --clients today --loads 0.5,0.95 --seeds 1 --json
//! cargo bench --bench goodput -- --sockets
//! cargo bench --bench goodput -- --plot docs/goodput.svg
//! ```
//!
//! Clients send Poisson arrivals to a simulated service in virtual time: 300 s take less than a second. `service.rs` has
//! the rules of the services, `arrivals.rs` those of the requests. At a load of 1, requests arrive as fast as all limits of
//! the service together allow. Each process is a client of its own, and all use the same keys. Figures are medians over
//! the seeds.
//!
//! A run repeats exactly, unless its client uses `tokio::select!`, which polls in random order.

mod arguments;
mod arrivals;
#[path = "../support/plot.rs"]
#[allow(dead_code, unreachable_pub)] // Other benchmarks use the rest.
mod chart;
mod clients;
mod limit;
mod oracle;
mod plot;
mod processes;
mod run;
mod service;
mod sockets;
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
use oracle::Oracle;
use processes::{Scene, Together};
use run::Outcome;
use service::ServiceKind;
use table::{Figures, Row};

fn main() {
    // `cargo test --benches` only checks that each client runs.
    if !env::args().any(|argument| argument == "--bench") {
        let (store, scene) = (StoreUse::Auto, Scene::Even);
        let short =
            Scenario { service: ServiceKind::OpenAi, load: 0.95, seeds: 0..1, seconds: 20.0, store, scene };
        assert_eq!(short.rows(ClientKind::value_variants(), &[1]).len(), ClientKind::value_variants().len());
        return;
    }
    let arguments = Arguments::parse();
    if arguments.sockets {
        return compare_with_sockets(&arguments);
    }
    if let Some(path) = &arguments.plot {
        let mut rows = Vec::new();
        measure(&arguments, |row| rows.push(row));
        return plot::draw(path, &rows);
    }
    if !arguments.json {
        Row::print_head();
    }
    measure(&arguments, |row| arguments.print(&row));
}

/// Runs all scenarios, and takes the rows in order.
fn measure(arguments: &Arguments, mut take: impl FnMut(Row)) {
    for_each_in_order(
        &arguments.scenarios(),
        |scenario| arguments.rows(scenario),
        |rows| rows.into_iter().for_each(&mut take),
    );
}

/// Prints the row of `openai` in virtual time, and the same over TCP in real time, where the seeds run one after the other.
fn compare_with_sockets(arguments: &Arguments) {
    let (service, client) = (ServiceKind::OpenAi, ClientKind::Paced);
    let (store, scene) = (StoreUse::No, Scene::Even);
    let scenario = Scenario { service, load: 0.95, seeds: arguments.seeds(), seconds: 100.0, store, scene };
    let virtual_time = scenario.rows(&[client], &[1]);
    let over_sockets = scenario.seeds.clone().map(|seed| {
        let jobs = scenario.jobs(seed);
        let outcome = run::run_over_sockets(service, &jobs, seed).expect("a port to listen on");
        scenario.figures(outcome, &scenario.oracle(client, &jobs))
    });
    let figures = Figures::medians(&over_sockets.collect::<Vec<_>>());
    let row = Row { client: "paced, over TCP".to_owned(), figures, ..scenario.row_of(client, 1, figures) };
    if !arguments.json {
        Row::print_head();
    }
    virtual_time.into_iter().chain([row]).for_each(|row| arguments.print(&row));
}

/// A service and a load. All clients get the same requests.
struct Scenario {
    service: ServiceKind,
    load: f64,
    seeds: Range<u64>,
    seconds: f64,
    store: StoreUse,
    scene: Scene,
}

/// Whether this crate's processes share a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum StoreUse {
    /// From 10 processes on
    Auto,
    Yes,
    No,
}

impl StoreUse {
    fn by(self, client: ClientKind, processes: usize) -> bool {
        client == ClientKind::Paced && (self == Self::Yes || self == Self::Auto && processes >= 10)
    }
}

impl Scenario {
    fn rows(&self, clients: &[ClientKind], processes: &[usize]) -> Vec<Row> {
        let jobs: Vec<_> = self.seeds.clone().map(|seed| (seed, self.jobs(seed))).collect();
        let cases = processes.iter().flat_map(|processes| clients.iter().map(|client| (*processes, *client)));
        cases.map(|(processes, client)| self.row(client, processes, &jobs)).collect()
    }

    fn jobs(&self, seed: u64) -> Vec<Job> {
        arrivals::poisson(self.service, self.load, self.seconds, seed)
    }

    fn oracle(&self, client: ClientKind, jobs: &[Job]) -> Oracle {
        oracle::serve(self.service, jobs, client.patience().as_secs_f64())
    }

    fn row(&self, client: ClientKind, processes: usize, jobs: &[(u64, Vec<Job>)]) -> Row {
        let figures = |(seed, jobs): &(u64, Vec<Job>)| {
            let together = self.together(client, processes);
            let outcome = run::run(client, self.service, processes, together, jobs, *seed);
            self.figures(outcome, &self.oracle(client, jobs))
        };
        let of_seeds: Vec<_> = jobs.iter().map(figures).collect();
        self.row_of(client, processes, Figures::medians(&of_seeds))
    }

    /// The demand of a day exceeds what `daily` allows, so requests must fail. Its row has the failures beyond those.
    fn figures(&self, outcome: Outcome, oracle: &Oracle) -> Figures {
        let figures = Figures::new(outcome, oracle);
        if self.service == ServiceKind::Daily { figures.of_allowed() } else { figures }
    }

    fn row_of(&self, client: ClientKind, processes: usize, figures: Figures) -> Row {
        let store = self.together(client, processes).store;
        let scene = (self.scene != Scene::Even).then(|| name(self.scene));
        let (client, service) = (name(client), name(self.service));
        Row { client, service, processes, store, scene, load: self.load, figures }
    }

    fn together(&self, client: ClientKind, processes: usize) -> Together {
        Together { store: self.store.by(client, processes), scene: self.scene }
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
