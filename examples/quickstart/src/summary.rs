//! What came of it.

use std::{process::ExitCode, time::Duration};

use comfy_table::{CellAlignment, Table, presets::UTF8_FULL_CONDENSED};
use serde_json::json;
use tower_key_rotation::{KeyPool, KeyStats, Status};

use crate::{drive::Outcome, options::Options};

pub(crate) struct Summary {
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
        outcome: Outcome,
        pool: &KeyPool,
        hits_while_resting: usize,
        took: Duration,
    ) -> Self {
        Self {
            requests: options.requests.get(),
            outcome,
            keys: pool.stats().keys,
            hits_while_resting,
            took,
            seen_by: if options.upstream.is_some() { "This client sent" } else { "The service saw" },
        }
    }

    pub(crate) fn exit_code(&self) -> ExitCode {
        let all_succeeded = self.outcome.succeeded == self.requests && !self.outcome.interrupted;
        if all_succeeded && self.hits_while_resting == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }

    pub(crate) fn print(&self, as_json: bool) {
        for (failure, times) in &self.outcome.failed {
            eprintln!("{times} × {failure}");
        }
        if self.outcome.interrupted {
            eprintln!("stopped by Ctrl-C");
        }
        if as_json {
            println!("{}", self.json());
        } else {
            println!("{}\n{}", self.table(), self.conclusion());
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
        let mut table = Table::new();
        table.load_preset(UTF8_FULL_CONDENSED).set_header([
            "key",
            "requests",
            "429s",
            "cooldowns",
            "recoveries",
        ]);
        for key in &self.keys {
            table.add_row(row(key.id.as_str(), |count| count(key)));
        }
        table.add_row(row("all", |count| self.total(count)));
        table.column_iter_mut().skip(1).for_each(|column| column.set_cell_alignment(CellAlignment::Right));
        table
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
