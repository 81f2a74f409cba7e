//! A gateway: an HTTP reverse proxy that puts one of several API keys into each request.
//!
//! ```text
//! cargo run -p key-rotation-gateway -- --upstream https://api.example.com --keys keys.txt
//! ```
//!
//! `keys.txt` has one `id|secret` per line. Any client of the API uses `http://127.0.0.1:8080` as its base URL and any
//! text as its key. `--help` lists all settings; `README.md` describes the rest.
//!
//! To see how the gateway uses the library, begin with `proxy/client.rs`, which stacks the layers around a client,
//! and `keys.rs`, which opens the pool.

mod admin;
mod arguments;
mod audit;
mod base_url;
mod caller;
mod callers;
mod check;
mod classifier;
mod config;
mod exchange;
mod gateway;
mod guesses;
mod health;
mod held;
mod keys;
mod log;
mod media_type;
mod metrics;
mod probe;
mod proxy;
mod read_on;
mod reload;
mod serve;
mod served;
mod settings;
mod state;
mod this_machine;
mod unread;
mod upstream;
mod watch;
mod webhook;
mod whole;

use std::{env, error::Error, ffi::OsString, iter, panic, process::ExitCode};

use tracing_subscriber::EnvFilter;

use self::{
    config::{Config, Invalid},
    log::Log,
};

/// The first argument of a run that only checks the configuration.
const CHECK: &str = "check";

/// The exit code for an invalid configuration.
const INVALID: u8 = 2;

#[tokio::main]
async fn main() -> ExitCode {
    let mut arguments: Vec<_> = env::args_os().collect();
    if arguments.get(1).is_some_and(|argument| argument == CHECK) {
        arguments.remove(1);
        return check::run(arguments).await;
    }
    let Ok(log) = Log::to_stderr() else { return ExitCode::FAILURE };
    let code = match run(&arguments, &log).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log.line(&format!("{}: {}", env!("CARGO_BIN_NAME"), with_sources(&*error)));
            if error.is::<Invalid>() { ExitCode::from(INVALID) } else { ExitCode::FAILURE }
        }
    };
    log.finish();
    code
}

async fn run(arguments: &[OsString], log: &Log) -> Result<(), Box<dyn Error>> {
    let config = Config::read(arguments)?;
    let filter = EnvFilter::try_new(&config.settings.log)?;
    tracing_subscriber::fmt()
        .with_writer(log.clone())
        // The subscriber would report them to stderr, and panic if that fails.
        .log_internal_errors(false)
        .with_env_filter(filter)
        .init();
    // The default hook would block on a stderr that nobody reads.
    panic::set_hook(Box::new(|panic| tracing::error!("{panic}")));
    for warning in settings::warnings(config.files()) {
        tracing::warn!("{warning}");
    }
    gateway::run(config).await
}

/// Iterates over an error and its sources.
fn sources<'e>(error: &'e (dyn Error + 'static)) -> impl Iterator<Item = &'e (dyn Error + 'static)> {
    iter::successors(Some(error), |&error| error.source())
}

/// Formats an error and its sources on one line.
fn with_sources(error: &(dyn Error + 'static)) -> String {
    let mut line: Vec<_> = sources(error).map(ToString::to_string).collect();
    // A transparent error has the same text as its source.
    line.dedup();
    line.join(": ")
}
