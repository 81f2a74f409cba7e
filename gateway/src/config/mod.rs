//! The configuration: settings of the program, and its upstreams.
//!
//! It comes from the command line, the environment and a TOML file. Reading it finds all that is wrong with it, so that
//! one run of `check` is enough.

mod caller;
mod file;
mod problems;
mod quota;
mod route;
mod table;
mod upstream;

use std::{
    collections::BTreeSet,
    ffi::OsString,
    mem,
    path::{Path, PathBuf},
};

use clap::{ArgMatches, Command, FromArgMatches, parser::ValueSource};
use tower_key_rotation::Secret;

pub(crate) use self::{
    caller::CallerConfig,
    file::Values,
    problems::Invalid,
    route::below,
    upstream::{KeySource, MongoDb, ScopeRule, StateFile, UpstreamConfig},
};
use self::{file::File, table::Fields};
use crate::{
    NAME,
    settings::{Settings, in_one_line},
    state::State,
};

/// Settings that say what the only upstream is. An `[[upstream]]` table has fields of its own for them.
const OF_ONE_UPSTREAM: [&str; 8] = [
    "upstream",
    "keys",
    "inject",
    "mongodb",
    "mongodb-database",
    "mongodb-collection",
    "mongodb-standby-collection",
    "data-keys",
];

/// Settings of the program around the gateway: its admin, its log, and the files that it looks at.
const NOT_IN_A_PROGRAM: [&str; 6] =
    ["admin-listen", "admin-token", "log", "watch", "webhook", "webhook-below"];

pub(crate) struct Config {
    /// What the configuration was read by.
    pub(crate) arguments: Vec<OsString>,
    pub(crate) settings: Settings,
    /// At least one; no two with the same name or the same requests.
    pub(crate) upstreams: Vec<UpstreamConfig>,
    /// Those with a token; no two with the same name or token.
    pub(crate) callers: Vec<CallerConfig>,
}

impl Config {
    /// Reads the configuration that the arguments of the program and its environment say. For `--help` and `--version`,
    /// it prints the text and exits.
    pub(crate) fn read(arguments: &[OsString]) -> Result<Self, Invalid> {
        match Self::read_in_part(arguments)? {
            (config, None) => Ok(config),
            (_, Some(invalid)) => Err(invalid),
        }
    }

    /// Reads as much of a configuration as possible, for `check`. Also returns what is wrong with it.
    pub(crate) fn read_in_part(arguments: &[OsString]) -> Result<(Self, Option<Invalid>), Invalid> {
        let command = Settings::command_with_environment();
        let no_setting_required = command.clone().mut_args(|arg| arg.required(false));
        let path = parse(no_setting_required.clone(), arguments)?.get_one::<PathBuf>("config").cloned();
        let text = path.as_deref().map(file::text).transpose()?.unwrap_or_default();
        let file = match &path {
            Some(path) => File::parse(path, &text, &Settings::command_without_environment()),
            None => File::none(),
        };
        Self::with_file(command, arguments, file, None)
    }

    /// Reads the configuration of a gateway that is a part of a program, without a look at the environment.
    pub(crate) fn of_program(
        upstream: Option<&str>,
        text: &str,
        keys: Vec<(String, Secret)>,
    ) -> Result<Self, Invalid> {
        let mut file =
            File::parse(Path::new("the configuration"), text, &Settings::command_without_environment());
        for name in NOT_IN_A_PROGRAM {
            if file.values.contains_key(name) {
                file.wrong_setting(name, format!("{name}: not for a gateway that is a part of a program"));
            }
        }
        let upstream = upstream.map(|url| format!("--upstream={url}").into());
        let arguments: Vec<_> = [NAME.into()].into_iter().chain(upstream).collect();
        let keys = (!keys.is_empty()).then_some(keys);
        match Self::with_file(Settings::command_of_program(), &arguments, file, keys)? {
            (config, None) => Ok(config),
            (_, Some(invalid)) => Err(invalid),
        }
    }

    fn with_file(
        command: Command,
        arguments: &[OsString],
        mut file: File<'_>,
        keys_of_program: Option<Vec<(String, Secret)>>,
    ) -> Result<(Self, Option<Invalid>), Invalid> {
        let matches = parse(Settings::with_file(command, &file.values), arguments)?;
        let mut settings =
            Settings::from_arg_matches(&matches).map_err(|error| Invalid::because(in_one_line(&error)))?;
        settings.keys_of_program = keys_of_program;
        for (name, reason) in settings.problems().into_iter().chain(open_addresses(&settings, &file)) {
            file.wrong_setting(name, reason);
        }
        let upstreams = upstreams(&settings, &matches, &mut file);
        let callers = callers(&settings, &upstreams, &mut file);
        let config = Self { arguments: arguments.to_vec(), settings, upstreams, callers };
        Ok((config, file.problems.into_error()))
    }

    /// The files that the configuration names and that should be readable by their owner only.
    pub(crate) fn files(&self) -> impl Iterator<Item = &Path> {
        let of_upstreams = self.upstreams.iter().flat_map(UpstreamConfig::files);
        self.settings.config.as_deref().into_iter().chain(of_upstreams)
    }
}

/// Without tokens, only this machine may reach the gateway.
fn open_addresses(settings: &Settings, file: &File<'_>) -> Vec<(&'static str, String)> {
    let mut problems = Vec::new();
    let has_no_callers = settings.client_token.is_empty() && file.callers.is_empty();
    if has_no_callers && !settings.listen.ip().is_loopback() {
        let reason = "--listen: without a client token it listens on loopback only: set GATEWAY_CLIENT_TOKEN";
        problems.push(("listen", reason.to_owned()));
    }
    if has_no_callers && settings.admin_token.is_none() && !settings.admin_listen.ip().is_loopback() {
        let reason =
            "--admin-listen: without an admin token it listens on loopback only: set GATEWAY_ADMIN_TOKEN";
        problems.push(("admin-listen", reason.to_owned()));
    }
    problems
}

fn parse(command: Command, arguments: &[OsString]) -> Result<ArgMatches, Invalid> {
    command.try_get_matches_from(arguments).map_err(|error| {
        if !error.use_stderr() {
            error.exit();
        }
        Invalid::because(in_one_line(&error))
    })
}

fn upstreams(settings: &Settings, matches: &ArgMatches, file: &mut File<'_>) -> Vec<UpstreamConfig> {
    let tables = mem::take(&mut file.upstreams);
    if tables.is_empty() {
        // Problems of the file may be the reason why there is no upstream.
        if !file.problems.is_empty() && settings.upstream.is_none() {
            return Vec::new();
        }
        return UpstreamConfig::of_settings(settings, &mut file.problems).into_iter().collect();
    }
    for name in OF_ONE_UPSTREAM {
        let id = name.replace('-', "_");
        let is_given = matches.value_source(&id).is_some_and(|source| source != ValueSource::DefaultValue);
        if is_given || file.values.contains_key(name) {
            file.wrong_setting(name, format!("--{name}: with [[upstream]] it belongs in these tables"));
        }
    }
    if settings.keys_of_program.is_some() {
        file.problems.add("with [[upstream]], keys belong in these tables, by keys or keys-variable");
    }
    if let Some(State::File(_)) = settings.state {
        file.wrong_setting("state", "--state: with [[upstream]] a file belongs in these tables".to_owned());
    }
    let problems = &mut file.problems;
    let mut upstreams: Vec<UpstreamConfig> = Vec::new();
    let mut names = BTreeSet::new();
    for table in tables {
        let at = table.span().start;
        let Some(fields) = Fields::of("[[upstream]]", table, problems) else { continue };
        let Some(upstream) = UpstreamConfig::of_table(fields, settings, problems) else { continue };
        let name = &upstream.name;
        if !names.insert(name.clone()) {
            problems.add_at(at, format!("upstream {name:?}: another upstream has this name"));
        }
        for other in &upstreams {
            if let Some(both) = upstream.route.overlap(&other.route) {
                problems.add_at(at, format!("upstream {name:?}: upstream {:?} gets {both}, too", other.name));
            }
            if let (Some(here), Some(there)) = (&upstream.mongodb, &other.mongodb)
                && here.holds_keys_of(there)
            {
                let reason =
                    format!("upstream {name:?}: upstream {:?} has the same MongoDB collection", other.name);
                problems.add_at(at, reason);
            }
        }
        if let Some(state) = &upstream.state
            && let Some(other) = upstreams
                .iter()
                .find(|other| other.state.as_ref().is_some_and(|there| there.path == state.path))
        {
            problems
                .add_at(at, format!("upstream {name:?}: upstream {:?} has the same state file", other.name));
        }
        upstreams.push(upstream);
    }
    upstreams
}

/// `upstreams` are those without problems.
fn callers(settings: &Settings, upstreams: &[UpstreamConfig], file: &mut File<'_>) -> Vec<CallerConfig> {
    let tables = mem::take(&mut file.callers);
    let all_upstreams_are_known = file.problems.is_empty();
    let problems = &mut file.problems;
    let mut callers = CallerConfig::of_settings(settings);
    for table in tables {
        let at = table.span().start;
        let Some(fields) = Fields::of("[[caller]]", table, problems) else { continue };
        let Some(caller) = CallerConfig::of_table(fields, problems) else { continue };
        let name = &caller.name;
        for other in &callers {
            if other.name == *name {
                problems.add_at(at, format!("caller {name:?}: another caller has this name"));
            }
            if other.token == caller.token {
                problems.add_at(at, format!("caller {name:?}: caller {:?} has the same token", other.name));
            }
        }
        for wanted in &caller.upstreams {
            if all_upstreams_are_known && !upstreams.iter().any(|upstream| upstream.name == *wanted) {
                problems.add_at(at, format!("caller {name:?}: upstreams: there is no upstream {wanted:?}"));
            }
        }
        callers.push(caller);
    }
    callers
}
