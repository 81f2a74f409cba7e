//! The configuration of an upstream: from the settings, or from an `[[upstream]]` table.

use std::{
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use tower_key_rotation::{Quota, Secret};

use super::{
    problems::Problems,
    quota,
    route::{self, Route},
    table::{At, Fields},
};
use crate::{
    arguments::{KeyPlace, Seconds},
    base_url::BaseUrl,
    classifier::Classifier,
    settings::Settings,
    state::{State, default_file},
};

/// The name of the only upstream, if it comes from the settings.
const DEFAULT: &str = "default";

/// One API: where it is, its keys, and how the gateway uses them.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct UpstreamConfig {
    /// In metrics, logs and the admin.
    pub(crate) name: String,
    pub(crate) route: Route,
    pub(crate) url: BaseUrl,
    pub(crate) allow_cleartext: bool,
    pub(crate) keys: Vec<KeySource>,
    pub(crate) mongodb: Option<MongoDb>,
    /// `None` with MongoDB, and if all is kept in memory.
    pub(crate) state: Option<StateFile>,
    pub(crate) inject: Vec<KeyPlace>,
    pub(crate) classifier: Classifier,
    pub(crate) pace: bool,
    pub(crate) quotas: Vec<Quota>,
    pub(crate) scope: ScopeRule,
    pub(crate) cooldown: Duration,
    pub(crate) wait: Duration,
    pub(crate) attempts: Option<u32>,
    pub(crate) connect_timeout: Duration,
    pub(crate) response_timeout: Duration,
    pub(crate) idle_timeout: Duration,
    pub(crate) ping: Duration,
    pub(crate) sanitize_errors: bool,
    /// A path for a cheap request that tells whether a key works.
    pub(crate) probe: Option<String>,
}

/// Where keys are written down.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum KeySource {
    File(PathBuf),
    Variable(String),
    /// By the program that the gateway is a part of.
    Program(Vec<(String, Secret)>),
}

/// The file that keeps keys and their state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StateFile {
    pub(crate) path: PathBuf,
    /// Whether the configuration names it.
    pub(crate) is_named: bool,
    pub(crate) data_keys: Option<PathBuf>,
}

#[derive(Clone, PartialEq, Eq)]
pub(crate) struct MongoDb {
    pub(crate) uri: String,
    pub(crate) database: Option<String>,
    pub(crate) collection: Option<String>,
    pub(crate) standby_collection: Option<String>,
    pub(crate) data_keys: Option<PathBuf>,
}

impl MongoDb {
    /// Whether both are the same collection.
    pub(super) fn holds_keys_of(&self, other: &Self) -> bool {
        let place = |of: &Self| {
            // The library's default.
            let collection = of.collection.clone().unwrap_or_else(|| "keys".to_owned());
            (of.uri.clone(), of.database.clone(), collection)
        };
        place(self) == place(other)
    }
}

/// What names the scope of a request, of which each is limited apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum ScopeRule {
    #[default]
    Model,
    Path,
    /// All requests share one scope.
    None,
}

impl FromStr for ScopeRule {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "model" => Ok(Self::Model),
            "path" => Ok(Self::Path),
            "none" => Ok(Self::None),
            _ => Err("it is \"model\", \"path\" or \"none\""),
        }
    }
}

impl UpstreamConfig {
    /// The upstream of the settings `upstream`, `keys` and so on. It gets all requests.
    pub(super) fn of_settings(settings: &Settings, problems: &mut Problems) -> Option<Self> {
        let Some(url) = settings.upstream.clone() else {
            problems
                .add("--upstream: it is missing; or name several by [[upstream]] in the file of --config");
            return None;
        };
        let mongodb = settings.mongodb.clone().map(|uri| MongoDb {
            uri,
            database: settings.mongodb_database.clone(),
            collection: settings.mongodb_collection.clone(),
            standby_collection: settings.mongodb_standby_collection.clone(),
            data_keys: settings.data_keys.clone(),
        });
        let state = mongodb.is_none().then(|| settings.state.clone().unwrap_or_default());
        let state = state.and_then(|state| StateFile::new(state, DEFAULT, &url, settings.data_keys.clone()));
        let keys: Vec<_> = settings
            .keys_of_program
            .iter()
            .cloned()
            .map(KeySource::Program)
            .chain(settings.keys.iter().cloned().map(KeySource::File))
            .collect();
        if keys.is_empty() && mongodb.is_none() && !state.as_ref().is_some_and(|file| file.is_named) {
            problems.add("there are no keys: set --keys, or --mongodb, or --state to a file with keys");
        }
        if mongodb.is_none() && state.is_none() && settings.data_keys.is_some() {
            problems.add("--data-keys is for keys that are kept: set --state to a file, or set --mongodb");
        }
        if !url.is_safe() && !settings.allow_cleartext {
            problems.add("--upstream: keys would travel in cleartext: use https, or set --allow-cleartext");
        }
        Some(Self {
            keys,
            mongodb,
            state,
            inject: settings.inject.clone(),
            ..Self::with_defaults(DEFAULT.to_owned(), Route::Rest, url, settings)
        })
    }

    /// Reads an `[[upstream]]` table. What it does not say is as in the settings.
    pub(super) fn of_table(
        mut table: Fields<'_>,
        settings: &Settings,
        problems: &mut Problems,
    ) -> Option<Self> {
        let name = table.text(problems, "name");
        match &name {
            Some(At { value, .. }) if is_name(value) => table.name = format!("upstream {value:?}"),
            Some(At { at, .. }) => {
                table.wrong_field(problems, *at, "name", "it must be 1 to 64 letters, digits, -, _ and .");
            }
            None => table.wrong(problems, "it has no name"),
        }
        let url = table.parsed::<BaseUrl>(problems, "url");
        if url.is_none() && !table.has_failed("url") {
            table.wrong(problems, "it has no url");
        }
        let route = route(&mut table, problems);
        let keys = keys(&mut table, problems);
        let data_keys = table.text(problems, "data-keys").map(|file| PathBuf::from(file.value));
        let mongodb = mongodb(&mut table, problems, data_keys.clone());
        let state = table.parsed::<State>(problems, "state").map(|state| state.value);
        let names_file = matches!(state, Some(State::File(_)));
        if keys.is_empty() && mongodb.is_none() && !names_file && !table.has_failed("keys") {
            table.wrong(
                problems,
                "it has no keys: set keys, keys-variable, mongodb, or state to a file with keys",
            );
        }
        let state = state.unwrap_or(match settings.state {
            Some(State::None) => State::None,
            _ => State::Default,
        });
        if mongodb.is_none() && state == State::None && data_keys.is_some() {
            table.wrong(
                problems,
                "data-keys: it is for keys that are kept: set state to a file, or set mongodb",
            );
        }
        let inject = table.list(problems, "inject").map_or_else(Vec::new, |inject| inject.value);
        let classifier = table.parsed(problems, "classifier").map(|classifier| classifier.value);
        let pace = table.flag(problems, "pace");
        let quotas = quota::read(&mut table, problems);
        let scope = table.parsed(problems, "scope").map(|scope| scope.value);
        let attempts = table.parsed::<u32>(problems, "attempts");
        if let Some(At { at, value: 0 }) = attempts {
            table.wrong_field(problems, at, "attempts", "it must be at least 1");
        }
        let [cooldown, wait] = ["cooldown", "wait"].map(|name| seconds(&mut table, problems, name, true));
        let [connect, response, idle] = ["connect-timeout", "response-timeout", "idle-timeout"]
            .map(|name| seconds(&mut table, problems, name, false));
        let sanitize_errors = table.flag(problems, "sanitize-errors");
        let allow_cleartext = table.flag(problems, "allow-cleartext").unwrap_or(settings.allow_cleartext);
        if let Some(At { at, value }) = &url
            && !value.is_safe()
            && !allow_cleartext
        {
            let reason = "keys would travel in cleartext: use https, or set allow-cleartext";
            table.wrong_field(problems, *at, "url", reason);
        }
        let probe = table.text(problems, "probe");
        if let Some(At { at, value }) = &probe
            && !value.starts_with('/')
        {
            table.wrong_field(problems, *at, "probe", "it must be a path such as /v1/models");
        }
        table.finish(problems);
        let defaults = Self::with_defaults(name?.value, route?, url?.value, settings);
        let state = mongodb.is_none().then_some(state);
        let state = state.and_then(|state| StateFile::new(state, &defaults.name, &defaults.url, data_keys));
        Some(Self {
            allow_cleartext,
            keys,
            mongodb,
            state,
            inject: if inject.is_empty() { defaults.inject } else { inject },
            classifier: classifier.unwrap_or_default(),
            pace: pace.unwrap_or(defaults.pace),
            quotas,
            scope: scope.unwrap_or_default(),
            cooldown: cooldown.unwrap_or(defaults.cooldown),
            wait: wait.unwrap_or(defaults.wait),
            attempts: attempts.map_or(defaults.attempts, |attempts| Some(attempts.value)),
            connect_timeout: connect.unwrap_or(defaults.connect_timeout),
            response_timeout: response.unwrap_or(defaults.response_timeout),
            idle_timeout: idle.unwrap_or(defaults.idle_timeout),
            sanitize_errors: sanitize_errors.unwrap_or(defaults.sanitize_errors),
            probe: probe.map(|probe| probe.value),
            ..defaults
        })
    }

    fn with_defaults(name: String, route: Route, url: BaseUrl, settings: &Settings) -> Self {
        Self {
            name,
            route,
            url,
            allow_cleartext: settings.allow_cleartext,
            keys: Vec::new(),
            mongodb: None,
            state: None,
            inject: vec![KeyPlace::Bearer],
            classifier: Classifier::default(),
            pace: settings.pace,
            quotas: Vec::new(),
            scope: ScopeRule::default(),
            cooldown: settings.cooldown.into(),
            wait: settings.wait.into(),
            attempts: settings.attempts,
            connect_timeout: settings.connect_timeout.into(),
            response_timeout: settings.response_timeout.into(),
            idle_timeout: settings.idle_timeout.into(),
            ping: settings.ping.into(),
            sanitize_errors: settings.sanitize_errors,
            probe: None,
        }
    }

    /// An upstream on this machine, without keys.
    #[cfg(test)]
    pub(crate) fn local() -> Self {
        let settings = <Settings as clap::Parser>::parse_from(["gateway"]);
        let url = "http://localhost".parse().unwrap();
        Self::with_defaults("local".to_owned(), Route::Rest, url, &settings)
    }

    /// Names one of its settings, for people.
    pub(crate) fn place_of(&self, setting: &str) -> String {
        if self.name == DEFAULT && self.route == Route::Rest {
            format!("--{setting}")
        } else {
            format!("upstream {:?}: {setting}", self.name)
        }
    }

    /// The files that hold secrets of the upstream.
    pub(crate) fn files(&self) -> impl Iterator<Item = &Path> {
        let keys = self.keys.iter().filter_map(|source| match source {
            KeySource::File(file) => Some(file.as_path()),
            KeySource::Variable(_) | KeySource::Program(_) => None,
        });
        let of_mongodb = self.mongodb.iter().filter_map(|mongodb| mongodb.data_keys.as_deref());
        keys.chain(of_mongodb).chain(self.state.iter().filter_map(|state| state.data_keys.as_deref()))
    }

    /// Whether there may be keys that no file and no variable names.
    pub(crate) fn may_keep_keys(&self) -> bool {
        self.mongodb.is_some() || self.state.as_ref().is_some_and(|state| state.is_named)
    }
}

impl StateFile {
    fn new(state: State, name: &str, url: &BaseUrl, data_keys: Option<PathBuf>) -> Option<Self> {
        let (path, is_named) = match state {
            State::None => return None,
            State::File(path) => (path, true),
            State::Default if name == DEFAULT => (default_file(url.authority()), false),
            State::Default => (default_file(&format!("{}@{name}", url.authority())), false),
        };
        Some(Self { path, is_named, data_keys })
    }
}

/// Whether a text can be a name: a label of metrics, a part of a URL, a word in a log.
pub(super) fn is_name(text: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    (1..=64).contains(&text.len()) && text.bytes().all(is_plain) && ![".", ".."].contains(&text)
}

fn route(table: &mut Fields<'_>, problems: &mut Problems) -> Option<Route> {
    let hosts = table.list::<String>(problems, "host");
    let paths = table.list::<String>(problems, "path");
    let strips = table.flag(problems, "strip-path");
    if let (None, Some(_)) = (&paths, strips) {
        table.wrong(problems, "strip-path: it says what becomes of path, which is missing");
    }
    if table.has_failed("host") || table.has_failed("path") {
        return None;
    }
    match (hosts, paths) {
        (Some(hosts), Some(_)) => {
            table.wrong_field(problems, hosts.at, "host", "set either host or path");
            None
        }
        (Some(hosts), None) => all(table, problems, "host", &hosts, route::host).map(Route::Hosts),
        (None, Some(paths)) => {
            let prefixes = all(table, problems, "path", &paths, route::prefix)?;
            Some(Route::Paths { prefixes, is_kept: strips == Some(false) })
        }
        (None, None) => Some(Route::Rest),
    }
}

/// Reads each text of a list, of which there must be one.
fn all(
    table: &Fields<'_>,
    problems: &mut Problems,
    field: &str,
    texts: &At<Vec<String>>,
    read: fn(&str) -> Result<String, &'static str>,
) -> Option<Vec<String>> {
    if texts.value.is_empty() {
        table.wrong_field(problems, texts.at, field, "it is an empty list");
        return None;
    }
    let mut values = Vec::new();
    for text in &texts.value {
        match read(text) {
            Ok(value) => values.push(value),
            Err(reason) => table.wrong_field(problems, texts.at, field, reason),
        }
    }
    (values.len() == texts.value.len()).then_some(values)
}

fn keys(table: &mut Fields<'_>, problems: &mut Problems) -> Vec<KeySource> {
    let file = table.text(problems, "keys").map(|file| KeySource::File(file.value.into()));
    let variable = table.text(problems, "keys-variable").map(|name| KeySource::Variable(name.value));
    file.into_iter().chain(variable).collect()
}

fn mongodb(table: &mut Fields<'_>, problems: &mut Problems, data_keys: Option<PathBuf>) -> Option<MongoDb> {
    let mut text = |field| table.text(problems, field).map(|text| text.value);
    let (uri, database) = (text("mongodb"), text("mongodb-database"));
    let (collection, standby) = (text("mongodb-collection"), text("mongodb-standby-collection"));
    let is_part = database.is_some() || collection.is_some() || standby.is_some();
    if uri.is_none() && is_part {
        table.wrong(problems, "mongodb-… is for keys in MongoDB: set mongodb, too");
    }
    Some(MongoDb { uri: uri?, database, collection, standby_collection: standby, data_keys })
}

fn seconds(
    table: &mut Fields<'_>,
    problems: &mut Problems,
    field: &str,
    may_be_zero: bool,
) -> Option<Duration> {
    let At { at, value } = table.parsed::<Seconds>(problems, field)?;
    let duration = Duration::from(value);
    if duration.is_zero() && !may_be_zero {
        table.wrong_field(problems, at, field, "it must be more than 0 seconds");
        return None;
    }
    Some(duration)
}
