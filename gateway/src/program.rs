//! The program: its command line, its log, and its exit code.

use std::{error::Error, ffi::OsString, panic, process::ExitCode};

use tracing_subscriber::EnvFilter;

use crate::{
    NAME, check,
    config::{Config, Invalid},
    gateway,
    log::Log,
    settings, with_sources,
};

/// The first argument of a run that only checks the configuration.
const CHECK: &str = "check";

/// The exit code for an invalid configuration.
const INVALID: u8 = 2;

/// Runs the program with these arguments, the first of which is its name.
pub async fn run(mut arguments: Vec<OsString>) -> ExitCode {
    if arguments.get(1).is_some_and(|argument| argument == CHECK) {
        arguments.remove(1);
        return check::run(arguments).await;
    }
    let Ok(log) = Log::to_stderr() else { return ExitCode::FAILURE };
    let code = match serve(&arguments, &log).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log.line(&format!("{NAME}: {}", with_sources(&*error)));
            if error.is::<Invalid>() { ExitCode::from(INVALID) } else { ExitCode::FAILURE }
        }
    };
    log.finish();
    code
}

async fn serve(arguments: &[OsString], log: &Log) -> Result<(), Box<dyn Error>> {
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
