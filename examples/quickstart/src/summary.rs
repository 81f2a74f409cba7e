//! What came of a run, and of two in comparison.

use std::{process::ExitCode, time::Duration};

use comfy_table::{CellAlignment, Table, presets::UTF8_FULL_CONDENSED};
use serde_json::json;
use tower_key_rotation::{KeyPool, KeyStats, Status};

use crate::{
    drive::Outcome,
    options::{Mode, Options},
};

pub(crate) struct Summary {
    mode: Mode,
    requests: usize,
    outcome: Outcome,
    keys: Vec<KeyStats>,
    hits_while_resting: usize,
    took: Duration,
    seen_by: &'static str,
}

impl Summary {
    pub(crate) fn new(
        options: &Options,
        mode: Mode,
        outcome: Outcome,
        pool: &KeyPool,
        hits_while_resting: usize,
        took: Duration,
    ) -> Self {
        Self {
            mode,
            requests: options.requests.get(),
            outcome,
            keys: pool.stats().keys,
            hits_while_resting,
            took,
            seen_by: if options.upstream.is_some() { "This client sent" } else { "The service saw" },
        }
    }

    fn is_good(&self) -> bool {
        let all_succeeded = self.outcome.succeeded == self.requests && !self.outcome.interrupted;
        all_succeeded && self.hits_while_resting == 0
    }

    pub(crate) fn was_interrupted(&self) -> bool {
        self.outcome.interrupted
    }

    pub(crate) fn print(&self, as_json: bool) {
        for (failure, times) in &self.outcome.failed {
            eprintln!("{times} × {failure}");
        }
        if self.outcome.interrupted {
            eprintln!("stopped by Ctrl-C");
        }
        if !as_json {
            println!("{}\n{}\n", self.table(), self.conclusion());
        }
    }

    fn json(&self) -> serde_json::Value {
        let keys: Vec<_> = self
            .keys
            .iter()
            .map(|key| json!({ "id": key.id.as_str(), "requests": key.requests, "limited": key.limited }))
            .collect();
        json!({
            "requests": self.requests,
            "succeeded": self.outcome.succeeded,
            "limited": self.total(|key| key.limited),
            "recovered": self.total(|key| key.recovered),
            "hits_while_resting": self.hits_while_resting,
            "keys": keys,
        })
    }

    fn table(&self) -> Table {
        let mut rows: Vec<_> = self.keys.iter().map(|key| row(key.id.as_str(), |count| count(key))).collect();
        rows.push(row("all", |count| self.total(count)));
        aligned(["key", "requests", "429s", "cooldowns", "recoveries"], rows)
    }

    fn conclusion(&self) -> String {
        let Self { requests, outcome, took, seen_by, hits_while_resting, .. } = self;
        let seen = match hits_while_resting {
            0 => "no request",
            1 => "1 request",
            _ => &format!("{hits_while_resting} requests"),
        };
        format!(
            "{} of {requests} requests succeeded, in {:.1} s. {seen_by} {seen} on a key that was resting.",
            outcome.succeeded,
            took.as_secs_f64(),
        )
    }

    fn total(&self, count: fn(&KeyStats) -> u64) -> u64 {
        self.keys.iter().map(count).sum()
    }
}

/// 0 where each run is without fault.
pub(crate) fn exit_code(runs: &[Summary]) -> ExitCode {
    if runs.iter().all(Summary::is_good) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Prints what all runs have in common, after each has printed its own part.
pub(crate) fn print_all(runs: &[Summary], as_json: bool) {
    if as_json {
        let runs: Vec<_> = runs.iter().map(Summary::json).collect();
        println!("{}", json!({ "runs": runs }));
    } else if runs.len() > 1 {
        println!("{}", comparison(runs));
    }
}

fn comparison(runs: &[Summary]) -> Table {
    let seconds = |time: Duration| format!("{:.1} s", time.as_secs_f64());
    let row = |run: &Summary| {
        let limited = run.total(|key| key.limited);
        [run.mode.name().to_owned(), limited.to_string(), seconds(run.took), seconds(run.outcome.longest)]
    };
    aligned(["", "429s", "time", "longest wait"], runs.iter().map(row))
}

/// A table whose first column is text and all others are numbers.
fn aligned<const N: usize>(header: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> Table {
    let mut table = Table::new();
    table.load_preset(UTF8_FULL_CONDENSED).set_header(header).add_rows(rows);
    table.column_iter_mut().skip(1).for_each(|column| column.set_cell_alignment(CellAlignment::Right));
    table
}

fn row(name: &str, value: impl Fn(fn(&KeyStats) -> u64) -> u64) -> [String; 5] {
    let numbers: [fn(&KeyStats) -> u64; 4] =
        [|key| key.requests, |key| key.limited, cooldowns, |key| key.recovered];
    let [requests, limited, cooldowns, recovered] = numbers.map(|count| value(count).to_string());
    [name.to_owned(), requests, limited, cooldowns, recovered]
}

/// How often it began to rest: it came back from each rest but the one that it is in.
fn cooldowns(key: &KeyStats) -> u64 {
    key.recovered + u64::from(key.status == Status::RateLimited)
}
