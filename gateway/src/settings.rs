//! The settings: each has a default, over which stand a TOML file, the environment and the command line, in this
//! order. `clap` knows that order already, so a setting is named once, as a field of [`Settings`].

use std::{
    collections::BTreeMap,
    env,
    error::Error,
    ffi::OsString,
    fmt, fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::{
    Arg, ArgMatches, Command, CommandFactory, FromArgMatches, Parser,
    builder::BoolishValueParser,
    error::{ContextKind, ContextValue, ErrorKind},
};
use toml::{Table, Value};

use crate::{
    arguments::{KeyPlace, Seconds},
    callers::Token,
    proxy::Upstream,
};

/// A reverse proxy that puts one of several API keys into each request, rests a key that is limited, and takes it
/// back by itself.
///
/// Each setting can also come from an environment variable (GATEWAY_UPSTREAM and so on) or from a TOML file (by the
/// same names: upstream = "…"). The command line overrides the environment, and that the file.
#[derive(Parser)]
#[command(name = env!("CARGO_BIN_NAME"))]
pub(crate) struct Settings {
    /// A TOML file with any of these settings
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Where to listen; without a client token on loopback only
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8080")]
    pub(crate) listen: SocketAddr,

    /// The API: a path in it goes before the path of each request
    #[arg(long, value_name = "URL")]
    pub(crate) upstream: Upstream,

    /// Send keys in cleartext, where the upstream is http and not on this machine
    #[arg(long, value_name = "BOOL", value_parser = BoolishValueParser::new())]
    #[arg(num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true")]
    pub(crate) allow_cleartext: bool,

    /// The keys: a file of TOML, JSON, or one `id|secret` or bare secret a line
    #[arg(long, value_name = "FILE")]
    pub(crate) keys: Option<PathBuf>,

    /// Share keys and their state through this MongoDB; keys of --keys that it lacks are added to it
    #[arg(long, value_name = "URI")]
    pub(crate) mongodb: Option<String>,

    /// The database [default: the crate's]
    #[arg(long, value_name = "NAME")]
    pub(crate) mongodb_database: Option<String>,

    /// The collection of keys [default: the crate's]
    #[arg(long, value_name = "NAME")]
    pub(crate) mongodb_collection: Option<String>,

    /// The collection of standby keys [default: none]
    #[arg(long, value_name = "NAME")]
    pub(crate) mongodb_standby_collection: Option<String>,

    /// Encrypt the keys in MongoDB with the data keys of this file
    #[arg(long, value_name = "FILE")]
    pub(crate) data_keys: Option<PathBuf>,

    /// Where a key goes in a request: bearer, header:NAME or query:NAME; can be given several times
    #[arg(long, value_name = "PLACE", default_value = "bearer", value_delimiter = ',')]
    pub(crate) inject: Vec<KeyPlace>,

    /// How long a key rests after a 429, or longer if the API asks
    #[arg(long, value_name = "SECONDS", default_value = "120")]
    pub(crate) cooldown: Seconds,

    /// How long a request may wait for a key where all rest
    #[arg(long, value_name = "SECONDS", default_value = "0")]
    pub(crate) wait: Seconds,

    /// How often a limited request is sent at most [default: once with each key]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) attempts: Option<u32>,

    /// How much of a request's body is kept to send it again; one with a larger body is sent once
    #[arg(long, value_name = "BYTES", default_value_t = 1 << 20)]
    pub(crate) keep_body: usize,

    /// The largest body of a request
    #[arg(long, value_name = "BYTES", default_value_t = 100 << 20)]
    pub(crate) max_body: usize,

    /// How long it may take to connect to the upstream
    #[arg(long, value_name = "SECONDS", default_value = "10")]
    pub(crate) connect_timeout: Seconds,

    /// How long the upstream may take to begin its answer, each time that a request is sent
    #[arg(long, value_name = "SECONDS", default_value = "600")]
    pub(crate) response_timeout: Seconds,

    /// How long the upstream may then send nothing, before the answer is broken off
    #[arg(long, value_name = "SECONDS", default_value = "600")]
    pub(crate) idle_timeout: Seconds,

    /// How long a caller that has connected may take until its first request has come, without the body
    #[arg(long, value_name = "SECONDS", default_value = "30")]
    pub(crate) head_timeout: Seconds,

    /// How long a caller's HTTP/1.1 connection is kept until the next request has come
    #[arg(long, value_name = "SECONDS", default_value = "180")]
    pub(crate) keep_alive: Seconds,

    /// How often an HTTP/2 connection is asked whether the other side is still there; it is closed where no answer
    /// comes in half that time; 0 is never
    #[arg(long, value_name = "SECONDS", default_value = "20")]
    pub(crate) ping: Seconds,

    /// How long requests under way may take to finish once the gateway is told to stop
    #[arg(long, value_name = "SECONDS", default_value = "30")]
    pub(crate) shutdown_limit: Seconds,

    /// A token that callers give as their API key; can be given several times. Who lists the processes of this
    /// machine sees the command line: better set GATEWAY_CLIENT_TOKEN, with commas between tokens, or use the file
    #[arg(long, value_name = "TOKEN", value_delimiter = ',')]
    pub(crate) client_token: Vec<Token>,

    /// The token of the admin page and of the metrics, which without one are there for this machine only, and not at
    /// all where there is a client token. Better set GATEWAY_ADMIN_TOKEN, or use the file
    #[arg(long, value_name = "TOKEN")]
    pub(crate) admin_token: Option<Token>,

    /// Answer with errors of the gateway's own in place of the upstream's, which may tell of accounts and billing
    #[arg(long, value_name = "BOOL", value_parser = BoolishValueParser::new())]
    #[arg(num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true")]
    pub(crate) sanitize_errors: bool,

    /// What is logged: error, warn, info, debug, trace, or any filter of tracing's
    #[arg(long, value_name = "FILTER", default_value = "info")]
    pub(crate) log: String,
}

/// A setting that can't be used, and why. It never repeats a value, which may be a secret.
#[derive(Debug)]
pub(crate) struct WrongSetting(String);

impl WrongSetting {
    pub(crate) fn new(reason: impl Into<String>) -> Self {
        Self(reason.into())
    }
}

impl fmt::Display for WrongSetting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for WrongSetting {}

impl Settings {
    /// Reads all of them. Where `--help` is asked for, it is printed, and the program ends.
    pub(crate) fn read() -> Result<Self, WrongSetting> {
        let command = Self::command().mut_args(with_environment);
        let config = parse(command.clone().mut_args(|arg| arg.required(false)))?;
        let file = match config.get_one::<PathBuf>("config") {
            Some(path) => read_file(path)?,
            None => BTreeMap::new(),
        };
        let matches = parse(command.mut_args(|arg| with_file(arg, &file)))?;
        let settings = Self::from_arg_matches(&matches).map_err(|error| WrongSetting(in_one_line(&error)))?;
        settings.check()?;
        Ok(settings)
    }

    fn check(&self) -> Result<(), WrongSetting> {
        let wrong = |reason: &str| Err(WrongSetting::new(reason));
        if self.keys.is_none() && self.mongodb.is_none() {
            return wrong("there are no keys: give --keys, --mongodb or both");
        }
        if self.mongodb.is_none() && self.data_keys.is_some() {
            return wrong("--data-keys is for the keys in MongoDB: give --mongodb, too");
        }
        if self.client_token.is_empty() && !self.listen.ip().is_loopback() {
            return wrong(
                "--listen: without a client token it listens on loopback only: set GATEWAY_CLIENT_TOKEN",
            );
        }
        if !self.upstream.is_safe() && !self.allow_cleartext {
            return wrong(
                "--upstream: keys would go there in cleartext: use https, or say --allow-cleartext",
            );
        }
        let limits = [
            ("connect-timeout", self.connect_timeout),
            ("response-timeout", self.response_timeout),
            ("idle-timeout", self.idle_timeout),
            ("head-timeout", self.head_timeout),
            ("keep-alive", self.keep_alive),
        ];
        match limits.into_iter().find(|(_, limit)| Duration::from(*limit).is_zero()) {
            Some((name, _)) => wrong(&format!("--{name}: in 0 seconds nothing can be done: give it more")),
            None => Ok(()),
        }
    }
}

/// Which it is, `clap` doesn't say.
fn not_text() -> String {
    let is_text = |text: &OsString| text.to_str().is_some();
    let is_ours = |name: &OsString| name.to_str().is_some_and(|name| name.starts_with("GATEWAY_"));
    let argument = env::args_os().skip(1).position(|argument| !is_text(&argument));
    let variable = env::vars_os().find(|(name, value)| is_ours(name) && !is_text(value));
    match (argument, variable) {
        (Some(before), _) => format!("argument {}: it is not UTF-8", before + 1),
        (None, Some((name, _))) => format!("{}: it is not UTF-8", name.display()),
        (None, None) => "an argument is not UTF-8".to_owned(),
    }
}

fn with_environment(arg: Arg) -> Arg {
    let name = format!("GATEWAY_{}", arg.get_id().as_str().to_uppercase());
    // One that is empty is as good as not set: this is how a compose file passes on what nobody has set.
    if env::var_os(&name).is_some_and(|value| value.is_empty()) {
        arg
    } else {
        arg.env(name).hide_env_values(true)
    }
}

/// What is in the file stands in place of the default.
fn with_file(arg: Arg, file: &File) -> Arg {
    match arg.get_long().and_then(|name| file.get(name)) {
        Some(values) => arg.required(false).default_values(values.clone()),
        None => arg,
    }
}

fn parse(command: Command) -> Result<ArgMatches, WrongSetting> {
    command.try_get_matches().map_err(|error| {
        if !error.use_stderr() {
            error.exit();
        }
        WrongSetting(in_one_line(&error))
    })
}

/// The values of each setting, by its name.
type File = BTreeMap<String, Vec<String>>;

fn read_file(path: &Path) -> Result<File, WrongSetting> {
    let wrong = |reason: String| WrongSetting(format!("{}: {reason}", path.display()));
    let text = fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
    let table: Table = toml::from_str(&text).map_err(|error| {
        // All that it says beside its message is the line, with what may be a token.
        let line = error.span().map_or(1, |span| text[..span.start].lines().count().max(1));
        wrong(format!("line {line}: {}", error.message()))
    })?;
    let command = Settings::command().mut_args(|arg| arg.required(false));
    let is_list = |name: &str| {
        command.get_arguments().any(|arg| arg.get_long() == Some(name) && arg.get_value_delimiter().is_some())
    };
    let values = |(name, value): (String, Value)| match values(value) {
        _ if name == "config" => Err(wrong("config: a file names no other".to_owned())),
        Some(values) if is_list(&name) && values.iter().any(|value| value.contains(',')) => {
            Err(wrong(format!("{name}: a value has no comma in it: write several as a list")))
        }
        Some(values) => Ok((name, values)),
        None => Err(wrong(format!("{name}: it is text, a number, true or false, or a list of these"))),
    };
    let file = table.into_iter().map(values).collect::<Result<File, _>>()?;
    // Read as a command line of its own, so that what is wrong is said to be the file's.
    let arguments =
        file.iter().flat_map(|(name, values)| values.iter().map(move |v| format!("--{name}={v}")));
    let arguments = std::iter::once(env!("CARGO_BIN_NAME").to_owned()).chain(arguments);
    command.try_get_matches_from(arguments).map_err(|error| wrong(in_one_line(&error)))?;
    Ok(file)
}

fn values(value: Value) -> Option<Vec<String>> {
    match value {
        Value::String(text) => Some(vec![text]),
        Value::Integer(number) => Some(vec![number.to_string()]),
        Value::Float(number) => Some(vec![number.to_string()]),
        Value::Boolean(flag) => Some(vec![flag.to_string()]),
        Value::Array(list) => {
            list.into_iter().map(values).collect::<Option<Vec<_>>>().map(|list| list.concat())
        }
        Value::Datetime(_) | Value::Table(_) => None,
    }
}

/// What `clap` says of an error, without the value.
fn in_one_line(error: &clap::Error) -> String {
    if error.kind() == ErrorKind::InvalidUtf8 {
        return not_text();
    }
    if error.kind() == ErrorKind::UnknownArgument
        && let Some(ContextValue::String(unknown)) = error.get(ContextKind::InvalidArg)
        && !unknown.starts_with("--")
    {
        return "there is a value without a name: write each as --name value".to_owned();
    }
    if let (Some(argument), Some(reason)) = (error.get(ContextKind::InvalidArg), error.source()) {
        return format!("{argument}: {reason}");
    }
    let text = error.to_string();
    let first: Vec<_> = text.lines().take_while(|line| !line.is_empty()).map(str::trim).collect();
    first.join(" ").trim_start_matches("error: ").to_owned()
}
