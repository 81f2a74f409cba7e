//! The example `gateway` as a program of its own, started on a free port.

use std::{
    env,
    ffi::OsStr,
    io,
    net::SocketAddr,
    path::PathBuf,
    process::{ExitStatus, Output, Stdio},
    sync::{Arc, Mutex, OnceLock},
    time::Duration,
};

use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, ChildStderr, Command},
    sync::oneshot,
    task::JoinHandle,
    time::timeout,
};

use super::{TestFile, keys_file};

/// The program with these arguments, and without what is set in this environment.
pub fn command<I: IntoIterator<Item: AsRef<OsStr>>>(arguments: I) -> Command {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    let mut command = Command::new(PROGRAM.get_or_init(|| super::example("gateway")));
    for (name, _) in env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("GATEWAY_")) {
        command.env_remove(name);
    }
    command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
    command
}

/// How it ends where it doesn't come to serve.
pub async fn refusal<I: IntoIterator<Item: AsRef<OsStr>>>(arguments: I) -> Output {
    ended(command(arguments)).await
}

pub async fn ended(mut command: Command) -> Output {
    timeout(Duration::from_secs(20), command.output()).await.expect("it goes on running").unwrap()
}

/// A gateway that runs; it is killed with this.
pub struct Gateway {
    address: SocketAddr,
    child: Child,
    log: Arc<Mutex<String>>,
    logging: JoinHandle<io::Result<()>>,
    _keys: Option<TestFile>,
}

impl Gateway {
    /// Before that upstream, with keys of these names, each with the secret that [`key_of`](super::key_of) finds the
    /// name in again.
    pub async fn before<const N: usize>(upstream: SocketAddr, keys: &[&str], arguments: [&str; N]) -> Self {
        let lines: Vec<_> = keys.iter().map(|key| format!("{key}|sk-{key}\n")).collect();
        let keys = keys_file(&lines.concat());
        let upstream = format!("http://{upstream}");
        let all = ["--upstream", &upstream, "--keys", keys.path()];
        let mut gateway = Self::start(command(all.into_iter().chain(arguments))).await;
        gateway._keys = Some(keys);
        gateway
    }

    /// With these arguments, on a port that is free.
    pub async fn start(mut command: Command) -> Self {
        command.args(["--listen", "127.0.0.1:0"]);
        Self::start_listening(command).await
    }

    /// With these arguments, which say where it listens.
    pub async fn start_listening(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let (listens, listening) = oneshot::channel();
        let log = Arc::default();
        let logging = tokio::spawn(follow(child.stderr.take().unwrap(), Arc::clone(&log), listens));
        let address =
            timeout(Duration::from_secs(20), listening).await.expect("it does not say where it listens");
        let address = address.unwrap_or_else(|_| panic!("it does not run: {}", log.lock().unwrap()));
        Self { address, child, log, logging, _keys: None }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// All that it has logged so far.
    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// Tells it to stop, as a process manager would.
    pub async fn terminate(&self) {
        let id = self.child.id().expect("it has ended").to_string();
        assert!(Command::new("kill").args(["-TERM", &id]).status().await.unwrap().success());
    }

    /// How it ended, once all that it logged is here.
    pub async fn ended(&mut self) -> ExitStatus {
        timeout(Duration::from_secs(20), async {
            (&mut self.logging).await.unwrap().unwrap();
            self.child.wait().await.unwrap()
        })
        .await
        .expect("it goes on running")
    }
}

async fn follow(
    errors: ChildStderr,
    log: Arc<Mutex<String>>,
    listens: oneshot::Sender<SocketAddr>,
) -> io::Result<()> {
    let mut listens = Some(listens);
    let mut lines = BufReader::new(errors).lines();
    while let Some(line) = lines.next_line().await? {
        if let Some(address) = address_in(&line)
            && let Some(listens) = listens.take()
        {
            let _ = listens.send(address);
        }
        *log.lock().unwrap() += &format!("{line}\n");
    }
    Ok(())
}

fn address_in(line: &str) -> Option<SocketAddr> {
    line.split_once("listening on http://")?.1.split(',').next()?.parse().ok()
}
