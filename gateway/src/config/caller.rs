//! The configuration of a caller: from the setting `client-token`, or from a `[[caller]]` table.

use std::{env, num::NonZeroU32};

use super::{
    problems::Problems,
    route,
    table::{At, Fields},
    upstream::is_name,
};
use crate::{
    callers::{CallerLimits, Token},
    settings::Settings,
};

/// Who may call, and what.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct CallerConfig {
    /// In metrics, logs and the admin.
    pub(crate) name: String,
    /// `None` for everyone who has no token, where none is set.
    pub(crate) token: Option<Token>,
    pub(crate) limits: CallerLimits,
    /// Names of upstreams; empty for all.
    pub(crate) upstreams: Vec<String>,
    /// Prefixes; empty for all.
    pub(crate) paths: Vec<String>,
    /// Names, or beginnings that end with `*`; empty for all.
    pub(crate) models: Vec<String>,
}

impl CallerConfig {
    pub(crate) fn unlimited(name: impl Into<String>, token: Option<Token>) -> Self {
        Self {
            name: name.into(),
            token,
            limits: CallerLimits::default(),
            upstreams: Vec::new(),
            paths: Vec::new(),
            models: Vec::new(),
        }
    }

    /// The callers with the tokens of `client-token`: `client-1` and so on.
    pub(super) fn of_settings(settings: &Settings) -> Vec<Self> {
        let tokens = (1..).zip(&settings.client_token);
        tokens
            .map(|(number, token)| Self::unlimited(format!("client-{number}"), Some(token.clone())))
            .collect()
    }

    /// Reads a `[[caller]]` table.
    pub(super) fn of_table(mut table: Fields<'_>, problems: &mut Problems) -> Option<Self> {
        let name = table.text(problems, "name");
        match &name {
            Some(At { value, .. }) if is_name(value) => table.name = format!("caller {value:?}"),
            Some(At { at, .. }) => {
                table.wrong_field(problems, *at, "name", "it must be 1 to 64 letters, digits, -, _ and .");
            }
            None => table.wrong(problems, "it has no name"),
        }
        let token = token(&mut table, problems);
        let mut number = |field| table.parsed::<NonZeroU32>(problems, field).map(|number| number.value);
        let limits = CallerLimits {
            requests_per_minute: number("requests-per-minute").map(NonZeroU32::get),
            tokens_per_minute: number("tokens-per-minute").map(NonZeroU32::get),
            max_in_flight: number("max-in-flight"),
        };
        let upstreams = list(&mut table, problems, "upstreams", |text| Ok(text.to_owned()));
        let paths = list(&mut table, problems, "paths", route::prefix);
        let models = list(&mut table, problems, "models", |text| Ok(text.to_owned()));
        table.finish(problems);
        Some(Self { name: name?.value, token: Some(token?), limits, upstreams, paths, models })
    }
}

fn token(table: &mut Fields<'_>, problems: &mut Problems) -> Option<Token> {
    let token = table.parsed::<Token>(problems, "token");
    let variable = table.text(problems, "token-variable");
    match (token, variable) {
        (Some(token), None) => Some(token.value),
        (None, Some(At { at, value })) => {
            let token = match env::var(&value) {
                Ok(text) => text.parse().map_err(str::to_owned),
                Err(_) => Err(format!("the environment variable {value} is not set, or not UTF-8")),
            };
            token.map_err(|reason| table.wrong_field(problems, at, "token-variable", reason)).ok()
        }
        (Some(token), Some(_)) => {
            table.wrong_field(problems, token.at, "token", "set either token or token-variable");
            None
        }
        (None, None) => {
            if !table.has_failed("token") && !table.has_failed("token-variable") {
                table.wrong(problems, "it has no token: set token or token-variable");
            }
            None
        }
    }
}

/// Reads a list. An empty one would allow all, which nobody means.
fn list(
    table: &mut Fields<'_>,
    problems: &mut Problems,
    field: &str,
    read: fn(&str) -> Result<String, &'static str>,
) -> Vec<String> {
    let Some(At { at, value }) = table.list::<String>(problems, field) else { return Vec::new() };
    if value.is_empty() {
        table.wrong_field(problems, at, field, "it is an empty list: leave it out to allow all");
    }
    let values = value.iter().filter_map(|text| match read(text) {
        Ok(value) => Some(value),
        Err(reason) => {
            table.wrong_field(problems, at, field, reason);
            None
        }
    });
    values.collect()
}
