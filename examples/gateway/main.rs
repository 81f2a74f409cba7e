//! A gateway: an HTTP reverse proxy that puts one of several API keys into each request.
//!
//! ```text
//! cargo run --example gateway --features full -- --upstream https://api.example.com --keys keys.txt
//! ```
//!
//! `keys.txt` has one `id|secret` a line. Any client of the API points its base URL at `http://127.0.0.1:8080`, and
//! gives whatever it likes for a key. `--help` has all settings, and `docs/GATEWAY.md` the rest.
//!
//! To see how the crate is used, begin with `proxy/upstream.rs`, where the layers stand around a client, and
//! `keys.rs`, where the pool comes from.

mod admin;
#[path = "../local/arguments.rs"]
mod arguments;
mod callers;
mod gateway;
mod health;
mod keys;
mod media_type;
mod metrics;
mod proxy;
mod read_on;
mod serve;
mod settings;
mod this_machine;

use std::{error::Error, io, iter, process::ExitCode};

use tracing_subscriber::EnvFilter;

use self::settings::{Settings, WrongSetting};

/// The exit code where a setting is wrong.
const WRONG_SETTING: u8 = 2;

#[tokio::main]
async fn main() -> ExitCode {
    match run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("gateway: {}", with_sources(&*error));
            if error.is::<WrongSetting>() { ExitCode::from(WRONG_SETTING) } else { ExitCode::FAILURE }
        }
    }
}

async fn run() -> Result<(), Box<dyn Error>> {
    let settings = Settings::read()?;
    let filter =
        EnvFilter::try_new(&settings.log).map_err(|error| WrongSetting::new(format!("--log: {error}")))?;
    tracing_subscriber::fmt().with_writer(io::stderr).with_env_filter(filter).init();
    gateway::run(settings).await
}

/// An error and what is behind it.
fn sources<'e>(error: &'e (dyn Error + 'static)) -> impl Iterator<Item = &'e (dyn Error + 'static)> {
    iter::successors(Some(error), |&error| error.source())
}

/// The same, on one line.
fn with_sources(error: &(dyn Error + 'static)) -> String {
    let mut line: Vec<_> = sources(error).map(ToString::to_string).collect();
    // A transparent error says the same as its source.
    line.dedup();
    line.join(": ")
}
