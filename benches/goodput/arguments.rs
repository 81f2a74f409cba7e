//! The command line: which cases to run.

use std::ops::Range;

use clap::{Parser, ValueEnum};

use crate::{Row, Scenario, StoreUse, clients::ClientKind, plot, processes::Scene, service::ServiceKind};

#[derive(Debug, Parser)]
#[command(about = "Goodput near the quota, in virtual time")]
pub(crate) struct Arguments {
    /// The services, by default all of them
    #[arg(long, value_enum, value_delimiter = ',')]
    services: Vec<ServiceKind>,
    /// The clients, by default all of them
    #[arg(long, value_enum, value_delimiter = ',')]
    clients: Vec<ClientKind>,
    /// The numbers of processes that share the keys
    #[arg(long, value_delimiter = ',', default_values_t = [1, 3])]
    processes: Vec<usize>,
    /// Loads as shares of what the service allows
    #[arg(long, value_delimiter = ',', default_values_t = [0.5, 0.8, 0.95, 1.1])]
    loads: Vec<f64>,
    /// The number of seeds
    #[arg(long, default_value_t = 3)]
    seeds: u64,
    /// The first seed
    #[arg(long, default_value_t = 0)]
    first_seed: u64,
    /// How long requests arrive, by default 300 s, and 52 hours for `daily`
    #[arg(long)]
    seconds: Option<f64>,
    /// Whether this crate's processes share a store
    #[arg(long, value_enum, default_value_t = StoreUse::Auto)]
    store: StoreUse,
    /// What happens to the processes; the other clients know nothing of it
    #[arg(long, value_enum, default_value_t = Scene::Even)]
    scene: Scene,
    /// Print one JSON object per line
    #[arg(long)]
    pub(crate) json: bool,
    /// Run `paced` against `openai` at a load of 0.95 for 100 s: in virtual time, and over TCP in real time
    #[arg(long, conflicts_with_all = ["services", "clients", "processes", "loads", "seeds", "seconds", "plot"])]
    pub(crate) sockets: bool,
    /// Draw failed requests by load to this file, an SVG, instead of printing a table
    #[arg(long, conflicts_with_all = ["services", "clients", "processes", "loads", "json"])]
    pub(crate) plot: Option<String>,
    /// Passed by Cargo
    #[arg(long, hide = true)]
    bench: bool,
}

impl Arguments {
    pub(crate) fn scenarios(&self) -> Vec<Scenario> {
        if self.plot.is_some() {
            return plot::loads().map(|load| self.scenario(plot::SERVICE, load)).collect();
        }
        let services = if self.services.is_empty() { ServiceKind::value_variants() } else { &self.services };
        let of_service = |service: &ServiceKind| {
            let service = *service;
            self.loads.iter().map(move |load| self.scenario(service, *load))
        };
        services.iter().flat_map(of_service).collect()
    }

    fn scenario(&self, service: ServiceKind, load: f64) -> Scenario {
        let seconds = self.seconds.unwrap_or(service.seconds());
        Scenario { service, load, seeds: self.seeds(), seconds, store: self.store, scene: self.scene }
    }

    pub(crate) fn seeds(&self) -> Range<u64> {
        self.first_seed..self.first_seed + self.seeds
    }

    pub(crate) fn print(&self, row: &Row) {
        if self.json { row.print_json() } else { row.print() }
    }

    pub(crate) fn rows(&self, scenario: &Scenario) -> Vec<Row> {
        if self.plot.is_some() {
            return scenario.rows(&plot::clients(), &[1]);
        }
        let clients = if self.clients.is_empty() { ClientKind::value_variants() } else { &self.clients };
        scenario.rows(clients, &self.processes)
    }
}

/// Returns the name on the command line and in the table.
pub(crate) fn name(value: impl ValueEnum) -> String {
    value.to_possible_value().expect("a value that can be chosen").get_name().to_owned()
}
