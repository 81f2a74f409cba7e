//! Five keys, 300 requests at once, and a service that limits each key: with rotation alone, and paced.
//!
//! ```text
//! cargo run -p quickstart
//! ```
//!
//! It starts a service on this machine, which has a token bucket for each key and sends OpenAI's headers. All 300
//! requests go out through `reqwest` and the layers; then the same again, from another pool to another service
//! with full buckets. The two pools differ in one call, `KeyPoolBuilder::paced`:
//!
//! - Rotation alone sends until the service answers 429. The first hundred requests empty the buckets; then the
//!   keys rest, the other requests wait, the keys come back, and so on, until all have succeeded. The cooldown is 2
//!   seconds rather than the crate's 2 minutes, so that you see it end: it takes about 5 seconds.
//! - A paced pool learns from the headers what each key may send. The requests wait in its queue, and go as the
//!   buckets fill: it takes little more than the 4 seconds that the service allows, and few requests get a 429.
//!
//! The table of a run has for each key the requests that were sent with it, the 429s among their answers, how often
//! it began to rest (its cooldowns), and how often it came back (its recoveries). In a paced pool no key has
//! cooldowns: its limit closes instead, for as long as a 429 asks. The table at the end compares the runs; the
//! longest wait is the time from a request's start to its response, with all its attempts.
//!
//! The exit code is 0 where all requests succeeded and none came to the service on a key that was resting
//! (`ledger.rs` says how that is judged), in both runs; 2 where the arguments are wrong, and 1 otherwise. With
//! `--json`, a JSON object `{"runs": [rotation, paced]}` is all that is on stdout.
//!
//! It drives a real service as well, once, with rotation alone or `--paced`:
//!
//! ```text
//! cargo run -p quickstart -- --upstream https://api.example.com --keys keys.txt \
//!     --path /v1/chat/completions --body '{"model": "…", "messages": […]}' --requests 50 --paced
//! ```
//!
//! `keys.txt` has one `id|secret` a line. `RUST_LOG=tower_key_rotation=debug` shows what the layers do, and
//! `--help` what else there is. To begin a program of your own, start from `client.rs`.

mod bucket;
mod client;
mod drive;
mod ledger;
mod options;
mod progress;
mod service;
mod summary;
mod target;
#[path = "../../local/watch.rs"]
mod watch;

use std::{error::Error, io, process::ExitCode, sync::Arc};

use clap::Parser;
use tower_key_rotation::{KeyPool, RecoveryHandle};
use tracing_subscriber::EnvFilter;

use self::{
    ledger::{Ledger, Rests},
    options::{Mode, Options},
    summary::Summary,
    target::Target,
};

#[tokio::main]
async fn main() -> ExitCode {
    let options = Options::parse();
    tracing_subscriber::fmt().with_writer(io::stderr).with_env_filter(EnvFilter::from_default_env()).init();
    match run_all(&options).await {
        Ok(runs) => {
            summary::print_all(&runs, options.json);
            summary::exit_code(&runs)
        }
        Err(error) => {
            eprintln!("{}", drive::with_sources(&*error));
            ExitCode::FAILURE
        }
    }
}

/// Runs in each mode, up to a run that is interrupted.
async fn run_all(options: &Options) -> Result<Vec<Summary>, Box<dyn Error>> {
    let mut runs = Vec::new();
    for &mode in options.runs() {
        let summary = run(options, mode).await?;
        summary.print(options.json);
        let was_interrupted = summary.was_interrupted();
        runs.push(summary);
        if was_interrupted {
            break;
        }
    }
    Ok(runs)
}

async fn run(options: &Options, mode: Mode) -> Result<Summary, Box<dyn Error>> {
    let ledger = Arc::new(Ledger::start(match mode {
        Mode::Rotation => Rests::For(options.cooldown()),
        Mode::Paced => Rests::AsAsked,
    }));
    let (target, pool) = match &options.upstream {
        Some(url) => (Target::upstream(url, options), options.keys_of_the_upstream(url, mode)?),
        None => (service::start(&ledger).await?, options.keys_of_the_service(mode)?),
    };
    report_rejected(&pool)?;
    if !options.json {
        announce(options, mode, &target);
    }

    let recovery = RecoveryHandle::spawn(&pool);
    let client = client::with_keys(&pool, options, &target, &ledger)?;
    let started = ledger.now();
    let outcome = drive::drive(client, target, &pool, options).await;
    let took = ledger.now() - started;
    recovery.shutdown().await?;
    Ok(Summary::new(options, mode, outcome, &pool, ledger.hits_while_resting(), took))
}

fn report_rejected(pool: &KeyPool) -> Result<(), Box<dyn Error>> {
    for rejected in pool.rejected() {
        eprintln!("not used: {rejected}");
    }
    if pool.stats().keys.is_empty() {
        return Err("there is no key that can be used".into());
    }
    Ok(())
}

fn announce(options: &Options, mode: Mode, target: &Target) {
    let (requests, at_once, cooldown) = (options.requests, options.concurrency(), options.cooldown());
    println!("{requests} requests to {}, {at_once} at once, {}.", target.name(), mode.name());
    if mode == Mode::Paced {
        println!("The pool learns what each key may send, and sends no more than that.");
    } else if cooldown < options::USUAL_COOLDOWN {
        println!("A key rests for {cooldown:?} after a 429. That is shortened: it is 2 minutes by default.");
    } else {
        println!("A key rests for {} s after a 429, or longer if the service asks.", cooldown.as_secs());
    }
}
