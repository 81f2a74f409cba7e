//! The command line.

use std::{num::NonZeroUsize, path::PathBuf, time::Duration};

use clap::Parser;
use reqwest::{
    Method, Url,
    header::{HeaderName, HeaderValue},
};
use tower_key_rotation::{BuildError, Inject, KeyPool, KeyPoolBuilder};

use crate::service;

/// How long a key rests after a 429 where nobody says otherwise: the crate's own default.
pub(crate) const USUAL_COOLDOWN: Duration = Duration::from_secs(120);

/// The same for the local service, so that one sees it end.
const SHORT_COOLDOWN: Duration = Duration::from_secs(2);

/// Sends requests with several keys: to a local service that limits each of them, or to a real one.
///
/// The local service gets them twice, from a pool that rotates its keys and from one that is paced as well. Exits with 0
/// where all requests succeeded and none was sent on a key that was resting.
#[derive(Debug, Parser)]
pub(crate) struct Options {
    /// Print {"runs": […]}, with a summary for each run, and nothing else on stdout
    #[arg(long)]
    pub(crate) json: bool,

    /// How many requests are sent, further attempts not counted
    #[arg(long, value_name = "N", default_value = "300")]
    pub(crate) requests: NonZeroUsize,

    /// How many of them are under way at once [default: all, or 16 with --upstream]
    #[arg(long, value_name = "N")]
    concurrency: Option<NonZeroUsize>,

    /// How long a key of a pool that is not paced rests after a 429 [default: 2, or 120 with --upstream]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    cooldown: Option<Duration>,

    /// How long a request waits for keys, in all [default: 60, or 5 cooldowns where that is more]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    wait: Option<Duration>,

    /// How often a request is sent at most, the first time included
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub(crate) attempts: u32,

    /// How long an attempt may take
    #[arg(long, value_name = "SECONDS", default_value = "120", value_parser = seconds)]
    pub(crate) timeout: Duration,

    /// Send to this service rather than to a local one
    #[arg(long, value_name = "URL", value_parser = web_url, requires = "keys")]
    pub(crate) upstream: Option<Url>,

    /// Pace the requests to it, rather than rotate its keys alone
    #[arg(long, requires = "upstream")]
    paced: bool,

    /// Its keys: one `id|secret` or bare secret a line, or JSON
    #[arg(long, value_name = "FILE", requires = "upstream")]
    keys: Option<PathBuf>,

    /// Where a key goes: bearer, header:NAME or query:NAME
    #[arg(long, value_name = "PLACE", default_value = "bearer", value_parser = place, requires = "upstream")]
    inject: Inject,

    /// The method [default: GET, or POST with --body]
    #[arg(long, requires = "upstream")]
    pub(crate) method: Option<Method>,

    /// A path and query, in place of the URL's own
    #[arg(long, requires = "upstream")]
    pub(crate) path: Option<String>,

    /// A body, which is JSON unless a --header says otherwise
    #[arg(long, value_name = "TEXT", requires = "upstream")]
    pub(crate) body: Option<String>,

    /// A further header; can be given several times
    #[arg(long = "header", value_name = "NAME:VALUE", value_parser = header, requires = "upstream")]
    pub(crate) headers: Vec<(HeaderName, HeaderValue)>,

    /// Send keys in cleartext, if the URL is http and not on this machine
    #[arg(long, requires = "upstream")]
    pub(crate) allow_cleartext: bool,
}

/// How the pool of a run keeps to the limits of its keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// It rests a key after a 429.
    Rotation,
    /// It also learns what each key may send, and sends no more.
    Paced,
}

impl Mode {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Rotation => "rotation alone",
            Self::Paced => "paced",
        }
    }
}

impl Options {
    pub(crate) fn runs(&self) -> &'static [Mode] {
        match (&self.upstream, self.paced) {
            (None, _) => &[Mode::Rotation, Mode::Paced],
            (Some(_), false) => &[Mode::Rotation],
            (Some(_), true) => &[Mode::Paced],
        }
    }

    pub(crate) fn concurrency(&self) -> usize {
        let usual = if self.upstream.is_some() { 16 } else { usize::MAX };
        self.concurrency.map_or(usual, NonZeroUsize::get).min(self.requests.get())
    }

    pub(crate) fn cooldown(&self) -> Duration {
        let usual = if self.upstream.is_some() { USUAL_COOLDOWN } else { SHORT_COOLDOWN };
        self.cooldown.unwrap_or(usual)
    }

    pub(crate) fn wait(&self) -> Duration {
        let usual = Duration::from_secs(60).max(self.cooldown().saturating_mul(5));
        self.wait.unwrap_or(usual)
    }

    /// They go to the upstream's host and to no other.
    pub(crate) fn keys_of_the_upstream(&self, url: &Url, mode: Mode) -> Result<KeyPool, BuildError> {
        let mut builder = self.pool(mode).inject(self.inject.clone()).allowed_hosts(url.host_str());
        if self.allow_cleartext {
            builder = builder.allow_cleartext_to(url.host_str());
        }
        self.keys.iter().fold(builder, |builder, file| builder.keys_from_file(file)).build()
    }

    pub(crate) fn keys_of_the_service(&self, mode: Mode) -> Result<KeyPool, BuildError> {
        self.pool(mode).keys(service::KEYS).build()
    }

    fn pool(&self, mode: Mode) -> KeyPoolBuilder {
        match mode {
            Mode::Rotation => KeyPool::builder().cooldown(self.cooldown()),
            Mode::Paced => KeyPool::builder().paced(),
        }
    }
}

/// Parses a number of seconds, with or without a fraction.
fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().map_err(|_| "not a number of seconds")?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}

fn place(text: &str) -> Result<Inject, String> {
    let place = match text.split_once(':') {
        None if text == "bearer" => Some(Inject::bearer()),
        Some(("header", name)) => name.parse::<HeaderName>().ok().map(Inject::header),
        Some(("query", name)) if !name.is_empty() => Some(Inject::query(name)),
        _ => None,
    };
    place.ok_or_else(|| "it is bearer, header:NAME or query:NAME".to_owned())
}

fn web_url(text: &str) -> Result<Url, String> {
    let url: Url = text.parse().map_err(|error| format!("{error}"))?;
    if matches!(url.scheme(), "http" | "https") { Ok(url) } else { Err("it is http or https".to_owned()) }
}

fn header(text: &str) -> Result<(HeaderName, HeaderValue), String> {
    let (name, value) = text.split_once(':').ok_or("there is no colon")?;
    let name = name.trim().parse().map_err(|_| "its name can't be one")?;
    let value = value.trim().parse().map_err(|_| "its value can't be one")?;
    Ok((name, value))
}
