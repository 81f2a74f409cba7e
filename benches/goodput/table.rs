//! Rows: medians over the seeds, printed as a table or as JSON.

use serde::Serialize;

use crate::{oracle::Oracle, run::Outcome};

/// A row. Waits are in seconds, and of served requests only.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) client: String,
    pub(crate) service: String,
    pub(crate) processes: usize,
    /// Whether the processes share a store.
    pub(crate) store: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) scene: Option<String>,
    pub(crate) load: f64,
    #[serde(flatten)]
    pub(crate) figures: Figures,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Figures {
    /// The share of the requests that failed: from 0 to 1.
    pub(crate) failed: f64,
    limited_per_100: f64,
    p50_wait: f64,
    p99_wait: f64,
    /// The share of the requests that the limits do not allow within the client's patience.
    oracle_failed: f64,
    oracle_p50: f64,
    oracle_p99: f64,
}

impl Figures {
    pub(crate) fn new(outcome: Outcome, oracle: &Oracle) -> Self {
        let (waits, by_oracle) = (sorted(outcome.waits), sorted(oracle.waits.clone()));
        Self {
            failed: outcome.failed,
            limited_per_100: outcome.limited_per_100,
            p50_wait: percentile(&waits, 0.5),
            p99_wait: percentile(&waits, 0.99),
            oracle_failed: oracle.failed,
            oracle_p50: percentile(&by_oracle, 0.5),
            oracle_p99: percentile(&by_oracle, 0.99),
        }
    }

    /// Counts failed requests as a share of those that the limits allow: the oracle's failures are nobody's fault.
    pub(crate) fn of_allowed(self) -> Self {
        let allowed = 1.0 - self.oracle_failed;
        Self { failed: ((self.failed - self.oracle_failed) / allowed).max(0.0), ..self }
    }

    /// Returns the median of each figure.
    pub(crate) fn medians(of: &[Self]) -> Self {
        let median = |figure: fn(&Self) -> f64| percentile(&sorted(of.iter().map(figure).collect()), 0.5);
        Self {
            failed: median(|figures| figures.failed),
            limited_per_100: median(|figures| figures.limited_per_100),
            p50_wait: median(|figures| figures.p50_wait),
            p99_wait: median(|figures| figures.p99_wait),
            oracle_failed: median(|figures| figures.oracle_failed),
            oracle_p50: median(|figures| figures.oracle_p50),
            oracle_p99: median(|figures| figures.oracle_p99),
        }
    }
}

impl Row {
    pub(crate) fn print_head() {
        println!(
            "| service | load | processes | client | failed | 429s per 100 served | wait p50 | p99 \
             | the oracle: failed | p50 | p99 |\n|---|---|---|---|---|---|---|---|---|---|---|"
        );
    }

    pub(crate) fn print(&self) {
        let Self { client, service, processes, store, scene, load, figures } = self;
        let Figures { limited_per_100, p50_wait, p99_wait, oracle_p50, oracle_p99, .. } = figures;
        let processes = [
            Some(processes.to_string()),
            store.then(|| "a store".to_owned()),
            scene.as_ref().map(|scene| format!("`{scene}`")),
        ];
        let processes = processes.into_iter().flatten().collect::<Vec<_>>().join(", ");
        println!(
            "| `{service}` | {load:.2} | {processes} | `{client}` | {:.2} % | {limited_per_100:.2} \
             | {p50_wait:.2} s | {p99_wait:.2} s | {:.2} % | {oracle_p50:.2} s | {oracle_p99:.2} s |",
            100.0 * figures.failed,
            100.0 * figures.oracle_failed,
        );
    }

    pub(crate) fn print_json(&self) {
        println!("{}", serde_json::to_string(self).unwrap());
    }
}

fn sorted(mut figures: Vec<f64>) -> Vec<f64> {
    figures.sort_by(f64::total_cmp);
    figures
}

/// Returns NaN if there are no figures.
fn percentile(sorted: &[f64], share: f64) -> f64 {
    let last = sorted.len().saturating_sub(1);
    sorted.get(((sorted.len() as f64 * share) as usize).min(last)).copied().unwrap_or(f64::NAN)
}
