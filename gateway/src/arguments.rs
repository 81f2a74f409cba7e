//! Types of settings: a duration in seconds and the place of a key in a request.

use std::{str::FromStr, time::Duration};

use http::HeaderName;
use tower_key_rotation::Inject;

/// A duration in seconds, with or without a fraction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seconds(Duration);

impl From<Seconds> for Duration {
    fn from(seconds: Seconds) -> Self {
        seconds.0
    }
}

impl FromStr for Seconds {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let seconds = text.parse().map_err(|_| "not a number of seconds".to_owned())?;
        Duration::try_from_secs_f64(seconds).map(Self).map_err(|error| error.to_string())
    }
}

/// The place of a key in a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum KeyPlace {
    Bearer,
    Header(HeaderName),
    Query(String),
}

impl KeyPlace {
    pub(crate) fn inject(&self) -> Inject {
        match self {
            Self::Bearer => Inject::bearer(),
            Self::Header(name) => Inject::header(name),
            Self::Query(name) => Inject::query(name),
        }
    }
}

impl FromStr for KeyPlace {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let place = match text.split_once(':') {
            None if text == "bearer" => Some(Self::Bearer),
            Some(("header", name)) => name.parse().ok().map(Self::Header),
            Some(("query", name)) if !name.is_empty() => Some(Self::Query(name.to_owned())),
            _ => None,
        };
        place.ok_or_else(|| "it is bearer, header:NAME or query:NAME".to_owned())
    }
}
