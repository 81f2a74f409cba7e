//! Settings, from the command line, the environment, a TOML file and defaults, in this order of precedence.
//!
//! `clap` merges the sources: the file's values become the defaults of its arguments. So each setting is declared once,
//! as a field of [`Settings`]. `config` reads the file.

use std::{
    env,
    error::Error,
    ffi::OsString,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::{
    Arg, Command, CommandFactory, Parser,
    builder::BoolishValueParser,
    error::{ContextKind, ContextValue, ErrorKind},
};
use tokio::sync::Semaphore;
use tower_key_rotation::Secret;
use tracing_subscriber::EnvFilter;

use crate::{
    arguments::{KeyPlace, Seconds},
    base_url::BaseUrl,
    callers::Token,
    config::Values,
    state::State,
    webhook::WebhookUrl,
};

/// A reverse proxy that puts one of several API keys into each request, rests a key after a 429, and retries the
/// request with another key.
///
/// `check` before the settings says what is wrong with them; `check --probe` also tries each key by a request.
///
/// Each setting can also come from an environment variable (GATEWAY_UPSTREAM) or a TOML file (upstream = "…"). The
/// command line overrides the environment, and the environment overrides the file.
#[derive(Parser)]
#[command(name = crate::NAME)]
pub(crate) struct Settings {
    /// TOML file with any of these settings, and with several upstreams
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,

    /// Address to listen on; without a client token, a loopback address
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8080")]
    pub(crate) listen: SocketAddr,

    /// Address of the admin page and the metrics; without an admin or client token, a loopback address. It is separate,
    /// so that no page from the upstream has the admin's origin
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8081")]
    pub(crate) admin_listen: SocketAddr,

    /// URL of the API; a path in it goes before the path of each request
    #[arg(long, value_name = "URL")]
    pub(crate) upstream: Option<BaseUrl>,

    /// Allow an http upstream on another machine, which receives the keys in cleartext
    #[arg(long, value_name = "BOOL", value_parser = BoolishValueParser::new())]
    #[arg(num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true")]
    pub(crate) allow_cleartext: bool,

    /// Key file: TOML, JSON, or one `id|secret` or bare secret per line
    #[arg(long, value_name = "FILE")]
    pub(crate) keys: Option<PathBuf>,

    /// File that keeps keys and their state over restarts, or none to keep them in memory. Without effect with --mongodb
    /// [default: a file for the upstream in the user's state directory]
    #[arg(long, value_name = "FILE")]
    pub(crate) state: Option<State>,

    /// Share keys and their state through this MongoDB; missing keys of --keys are added to it
    #[arg(long, value_name = "URI")]
    pub(crate) mongodb: Option<String>,

    /// Database [default: the one that the URI names]
    #[arg(long, value_name = "NAME")]
    pub(crate) mongodb_database: Option<String>,

    /// Collection of keys [default: keys]
    #[arg(long, value_name = "NAME")]
    pub(crate) mongodb_collection: Option<String>,

    /// Collection of standby keys, which replace exhausted and revoked keys [default: none]
    #[arg(long, value_name = "NAME")]
    pub(crate) mongodb_standby_collection: Option<String>,

    /// Encrypt secrets in the state file or in MongoDB with the data keys of this file
    #[arg(long, value_name = "FILE")]
    pub(crate) data_keys: Option<PathBuf>,

    /// Place of the key in a request: bearer, header:NAME or query:NAME; repeatable
    #[arg(long, value_name = "PLACE", default_value = "bearer", value_delimiter = ',')]
    pub(crate) inject: Vec<KeyPlace>,

    /// How long a key rests after a 429; a longer wait that the API asks for takes precedence
    #[arg(long, value_name = "SECONDS", default_value = "120")]
    pub(crate) cooldown: Seconds,

    /// Learn from the responses what the API allows each key, for each model apart, and send no more than that; requests
    /// beyond it wait. If it is off, keys serve in turn until they get a 429
    #[arg(long, value_name = "BOOL", value_parser = BoolishValueParser::new())]
    #[arg(num_args = 0..=1, require_equals = true, default_value = "true", default_missing_value = "true")]
    pub(crate) pace: bool,

    /// How long a request may wait for a key that has room
    #[arg(long, value_name = "SECONDS", default_value = "30")]
    pub(crate) wait: Seconds,

    /// Maximum number of attempts per request, the first included [default: one per key]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) attempts: Option<u32>,

    /// How much of a request body to keep for a retry; a request with a larger body is sent once
    #[arg(long, value_name = "BYTES", default_value_t = 1 << 20)]
    pub(crate) keep_body: usize,

    /// Largest request body
    #[arg(long, value_name = "BYTES", default_value_t = 100 << 20)]
    pub(crate) max_body: usize,

    /// Timeout for a connection to the upstream
    #[arg(long, value_name = "SECONDS", default_value = "10")]
    pub(crate) connect_timeout: Seconds,

    /// Timeout until the upstream's response begins, for each attempt
    #[arg(long, value_name = "SECONDS", default_value = "600")]
    pub(crate) response_timeout: Seconds,

    /// Idle timeout of the upstream's response body
    #[arg(long, value_name = "SECONDS", default_value = "600")]
    pub(crate) idle_timeout: Seconds,

    /// Timeout from a caller's connection to the end of its first request's headers
    #[arg(long, value_name = "SECONDS", default_value = "30")]
    pub(crate) head_timeout: Seconds,

    /// Idle timeout of a caller's connection
    #[arg(long, value_name = "SECONDS", default_value = "180")]
    pub(crate) keep_alive: Seconds,

    /// How long a caller may read nothing of its response before its connection closes
    #[arg(long, value_name = "SECONDS", default_value = "600")]
    pub(crate) send_timeout: Seconds,

    /// Maximum number of connections of callers, and as many of the admin; a further one is closed at once
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = at_least_one)]
    pub(crate) max_connections: usize,

    /// Maximum number of requests in flight; a further one gets 503
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = at_least_one)]
    pub(crate) max_requests: usize,

    /// How much of all request bodies to keep for retries; beyond it, a request is sent once
    #[arg(long, value_name = "BYTES", default_value_t = 256 << 20)]
    pub(crate) keep_bodies: usize,

    /// Interval of HTTP/2 pings to callers and upstream; 0 disables them. A connection closes if no answer comes
    /// within half the interval
    #[arg(long, value_name = "SECONDS", default_value = "20")]
    pub(crate) ping: Seconds,

    /// How long requests in flight may take to finish at shutdown
    #[arg(long, value_name = "SECONDS", default_value = "30")]
    pub(crate) shutdown_limit: Seconds,

    /// Token that callers must send as their API key; repeatable. Other users of this machine can read the command
    /// line: prefer GATEWAY_CLIENT_TOKEN, with commas between tokens, or the file
    #[arg(long, value_name = "TOKEN", value_delimiter = ',')]
    pub(crate) client_token: Vec<Token>,

    /// Token for the admin page and the metrics. Without one they answer this machine only, or nobody if a client
    /// token is set. Prefer GATEWAY_ADMIN_TOKEN or the file
    #[arg(long, value_name = "TOKEN")]
    pub(crate) admin_token: Option<Token>,

    /// URL that receives a POST of JSON when a key is revoked or few keys are healthy. Prefer GATEWAY_WEBHOOK or the
    /// file if it holds a secret
    #[arg(long, value_name = "URL")]
    pub(crate) webhook: Option<WebhookUrl>,

    /// Send few_healthy_keys when an upstream has fewer healthy keys than this
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) webhook_below: usize,

    /// Read the files again when they change, as on SIGHUP
    #[arg(long, value_name = "BOOL", value_parser = BoolishValueParser::new())]
    #[arg(num_args = 0..=1, require_equals = true, default_value = "true", default_missing_value = "true")]
    pub(crate) watch: bool,

    /// Replace the upstream's errors, which may contain details of accounts and billing, with the gateway's own
    #[arg(long, value_name = "BOOL", value_parser = BoolishValueParser::new())]
    #[arg(num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true")]
    pub(crate) sanitize_errors: bool,

    /// Log level (error, warn, info, debug, trace) or a filter of tracing's EnvFilter
    #[arg(long, value_name = "FILTER", default_value = "info")]
    pub(crate) log: String,

    /// Keys that the program gives which the gateway is a part of.
    #[arg(skip)]
    pub(crate) keys_of_program: Option<Vec<(String, Secret)>>,
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("it must be at least 1".to_owned()),
        Ok(number) if number <= Semaphore::MAX_PERMITS => Ok(number),
        Ok(_) => Err("it is too large".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

impl Settings {
    /// The command line, with a variable for each setting.
    pub(crate) fn command_with_environment() -> Command {
        Self::command().mut_args(with_environment)
    }

    /// The command line alone, of which nothing is required.
    pub(crate) fn command_without_environment() -> Command {
        Self::command().mut_args(|arg| arg.required(false))
    }

    /// The settings of a gateway that is a part of a program: on a free port, and in memory.
    pub(crate) fn command_of_program() -> Command {
        let command = Self::command_without_environment();
        command
            .mut_arg("listen", |arg| arg.default_value("127.0.0.1:0"))
            .mut_arg("state", |arg| arg.default_value("none"))
    }

    /// Replaces the defaults of settings with the file's values.
    pub(crate) fn with_file(command: Command, file: &Values) -> Command {
        command.mut_args(|arg| match arg.get_long().and_then(|name| file.get(name)) {
            Some(values) => arg.required(false).default_values(values.clone()),
            None => arg,
        })
    }

    /// Returns the names of settings that differ, and take effect only at the start.
    pub(crate) fn fixed_differences(&self, other: &Self) -> Vec<&'static str> {
        let is_same = |name, is_same: bool| (!is_same).then_some(name);
        let differences = [
            is_same("listen", self.listen == other.listen),
            is_same("admin-listen", self.admin_listen == other.admin_listen),
            is_same("admin-token", self.admin_token == other.admin_token),
            is_same("keep-body", self.keep_body == other.keep_body),
            is_same("keep-bodies", self.keep_bodies == other.keep_bodies),
            is_same("max-body", self.max_body == other.max_body),
            is_same("head-timeout", self.head_timeout == other.head_timeout),
            is_same("keep-alive", self.keep_alive == other.keep_alive),
            is_same("send-timeout", self.send_timeout == other.send_timeout),
            is_same("max-connections", self.max_connections == other.max_connections),
            is_same("max-requests", self.max_requests == other.max_requests),
            is_same("shutdown-limit", self.shutdown_limit == other.shutdown_limit),
            is_same("webhook", self.webhook == other.webhook),
            is_same("webhook-below", self.webhook_below == other.webhook_below),
            is_same("watch", self.watch == other.watch),
            is_same("log", self.log == other.log),
        ];
        differences.into_iter().flatten().collect()
    }

    /// Returns the settings that are wrong, each with the reason.
    pub(crate) fn problems(&self) -> Vec<(&'static str, String)> {
        let limits = [
            ("connect-timeout", self.connect_timeout),
            ("response-timeout", self.response_timeout),
            ("idle-timeout", self.idle_timeout),
            ("head-timeout", self.head_timeout),
            ("keep-alive", self.keep_alive),
            ("send-timeout", self.send_timeout),
        ];
        let zeros = limits.into_iter().filter(|(_, limit)| Duration::from(*limit).is_zero());
        let zeros = zeros.map(|(name, _)| (name, format!("--{name}: it must be more than 0 seconds")));
        let filter = EnvFilter::try_new(&self.log).err().map(|error| ("log", format!("--log: {error}")));
        zeros.chain(filter).collect()
    }
}

/// Returns warnings of files with loose permissions and of variables without effect.
pub(crate) fn warnings<'f>(files: impl Iterator<Item = &'f Path>) -> Vec<String> {
    let files = files.filter(|file| is_open_to_others(file)).map(|file| {
        format!("{}: other users of this machine can read or change it: chmod 600", file.display())
    });
    let variables = unknown_variables()
        .into_iter()
        .map(|name| format!("{name}: there is no such setting, so the variable has no effect"));
    files.chain(variables).collect()
}

/// Finds the argument or variable that is not UTF-8. `clap` does not name it.
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

/// Whether other users than the owner can read or change a regular file. A pipe, for example, does not count.
#[cfg(unix)]
fn is_open_to_others(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;

    fs::metadata(file).is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o077 != 0)
}

#[cfg(not(unix))]
fn is_open_to_others(_: &Path) -> bool {
    false
}

/// Returns the `GATEWAY_` variables that are no setting. Kubernetes sets some for a service named gateway.
fn unknown_variables() -> Vec<String> {
    let known: Vec<_> = Settings::command().get_arguments().map(variable_of).collect();
    let names = env::vars_os().filter_map(|(name, _)| name.into_string().ok());
    names.filter(|name| name.starts_with("GATEWAY_") && !known.contains(name)).collect()
}

fn variable_of(arg: &Arg) -> String {
    format!("GATEWAY_{}", arg.get_id().as_str().to_uppercase())
}

fn with_environment(arg: Arg) -> Arg {
    let name = variable_of(&arg);
    // An empty variable counts as unset, because a compose file passes unset variables as empty ones.
    if env::var_os(&name).is_some_and(|value| value.is_empty()) {
        arg
    } else {
        arg.env(name).hide_env_values(true)
    }
}

/// Formats an error of `clap` on one line, without the value.
pub(crate) fn in_one_line(error: &clap::Error) -> String {
    if error.kind() == ErrorKind::InvalidUtf8 {
        return not_text();
    }
    if error.kind() == ErrorKind::UnknownArgument
        && let Some(ContextValue::String(unknown)) = error.get(ContextKind::InvalidArg)
        && !unknown.starts_with("--")
    {
        return "there is a value without a name: write --name value".to_owned();
    }
    if let (Some(argument), Some(reason)) = (error.get(ContextKind::InvalidArg), error.source()) {
        return format!("{argument}: {reason}");
    }
    let text = error.to_string();
    let first: Vec<_> = text.lines().take_while(|line| !line.is_empty()).map(str::trim).collect();
    first.join(" ").trim_start_matches("error: ").to_owned()
}
