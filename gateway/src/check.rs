//! `check`: says what is wrong with a configuration, and with `--probe`, whether each key works.

use std::{
    ffi::OsString,
    io::{self, Write},
    process::ExitCode,
};

use crate::{
    config::{Config, Invalid, UpstreamConfig},
    keys, probe, settings, with_sources,
};

/// The exit code if a key does not work.
const BROKEN_KEY: u8 = 1;

/// The exit code if the configuration is invalid, as for the gateway itself.
const INVALID: u8 = 2;

/// The argument that asks for a request with each key.
const PROBE: &str = "--probe";

/// Checks the configuration of these arguments, which are those of the gateway. Problems go to stderr, all else to stdout.
pub(crate) async fn run(mut arguments: Vec<OsString>) -> ExitCode {
    let before = arguments.len();
    arguments.retain(|argument| argument != PROBE);
    let probes = arguments.len() < before;
    let (config, invalid) = match Config::read_in_part(&arguments) {
        Ok((config, invalid)) => (Some(config), invalid),
        Err(invalid) => (None, Some(invalid)),
    };
    let upstreams = config.as_ref().map(|config| &config.upstreams[..]).unwrap_or_default();
    let mut problems: Vec<_> = invalid.iter().flat_map(Invalid::problems).map(ToString::to_string).collect();
    problems.extend(upstreams.iter().flat_map(keys::problems));
    for problem in &problems {
        say(io::stderr(), problem);
    }
    if let Some(config) = &config {
        for warning in settings::warnings(config.files()) {
            say(io::stderr(), &format!("warning: {warning}"));
        }
    }
    if !problems.is_empty() {
        say(io::stderr(), &format!("the configuration has {} problem(s)", problems.len()));
        return ExitCode::from(INVALID);
    }
    say(io::stdout(), "the configuration is valid");
    if probes && !all_work(upstreams).await { ExitCode::from(BROKEN_KEY) } else { ExitCode::SUCCESS }
}

async fn all_work(upstreams: &[UpstreamConfig]) -> bool {
    let mut all_work = true;
    for upstream in upstreams {
        let name = &upstream.name;
        match probe::keys(upstream).await {
            Ok(keys) => {
                for (key, outcome) in keys {
                    all_work &= outcome.works();
                    say(io::stdout(), &format!("upstream {name:?}: key {key} {outcome}"));
                }
            }
            Err(error) => {
                all_work = false;
                say(
                    io::stdout(),
                    &format!("upstream {name:?}: its keys can't be read: {}", with_sources(&*error)),
                );
            }
        }
    }
    all_work
}

/// Writes a line. A reader that is gone changes nothing of the exit code.
fn say(mut to: impl Write, line: &str) {
    _ = writeln!(to, "{line}");
}
