//! Five keys, 300 requests at once, and a service that limits each key.
//!
//! ```text
//! cargo run -p quickstart
//! ```
//!
//! It starts a service on this machine, which has a token bucket for each key and answers 429 with OpenAI's
//! headers. All 300 requests go out through `reqwest` and the layers. The first hundred empty the buckets;
//! then the keys rest, the other requests wait, the keys come back, and so on, until all have succeeded. The
//! cooldown is 2 seconds rather than the crate's 2 minutes, so that you see it end: it takes about 5 seconds.
//! The table at the end has for each key the requests that were sent with it, the 429s among their answers,
//! how often it began to rest (its cooldowns), and how often it came back (its recoveries).
//!
//! The exit code is 0 where all requests succeeded and none came to the service on a key that was resting
//! (`ledger.rs` says how that is judged), 2 where the arguments are wrong, and 1 otherwise. With `--json`,
//! the summary is one JSON object, and nothing else is on stdout.
//!
//! It drives a real service as well:
//!
//! ```text
//! cargo run -p quickstart -- --upstream https://api.example.com --keys keys.txt \
//!     --path /v1/chat/completions --body '{"model": "…", "messages": […]}' --requests 50
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

use self::{ledger::Ledger, options::Options, summary::Summary, target::Target};

#[tokio::main]
async fn main() -> ExitCode {
    let options = Options::parse();
    tracing_subscriber::fmt().with_writer(io::stderr).with_env_filter(EnvFilter::from_default_env()).init();
    match run(&options).await {
        Ok(summary) => {
            summary.print(options.json);
            summary.exit_code()
        }
        Err(error) => {
            eprintln!("{}", drive::with_sources(&*error));
            ExitCode::FAILURE
        }
    }
}

async fn run(options: &Options) -> Result<Summary, Box<dyn Error>> {
    let ledger = Arc::new(Ledger::start());
    let (target, pool) = match &options.upstream {
        Some(url) => (Target::upstream(url, options), options.keys_of_the_upstream(url)?),
        None => (service::start(&ledger).await?, options.keys_of_the_service()?),
    };
    report_rejected(&pool)?;
    if !options.json {
        announce(options, &target);
    }

    let recovery = RecoveryHandle::spawn(&pool);
    let client = client::with_keys(&pool, options, &target, &ledger)?;
    let started = ledger.now();
    let outcome = drive::drive(client, target, &pool, options).await;
    let took = ledger.now() - started;
    recovery.shutdown().await?;
    let hits = ledger.hits_while_resting(options.cooldown());
    Ok(Summary::new(options, outcome, &pool, hits, took))
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

fn announce(options: &Options, target: &Target) {
    let (requests, at_once) = (options.requests, options.concurrency());
    println!("{requests} requests to {}, {at_once} at once.", target.name());
    let cooldown = options.cooldown();
    if cooldown < options::USUAL_COOLDOWN {
        println!("A key rests for {cooldown:?} after a 429. That is shortened: it is 2 minutes by default.");
    } else {
        println!("A key rests for {} s after a 429, or longer if the service asks.", cooldown.as_secs());
    }
}
