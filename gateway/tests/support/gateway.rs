//! The gateway as a process, started on a free port.

use std::{
    env,
    ffi::OsStr,
    io,
    net::SocketAddr,
    process::{ExitStatus, Output, Stdio},
    sync::{Arc, Mutex},
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

/// The program with these arguments, without the `GATEWAY_` variables of this environment.
pub fn command<I: IntoIterator<Item: AsRef<OsStr>>>(arguments: I) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_key-rotation-gateway"));
    for (name, _) in env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("GATEWAY_")) {
        command.env_remove(name);
    }
    // In memory, unless an argument says otherwise.
    command.env("GATEWAY_STATE", "none");
    command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
    command
}

/// Returns the output of a gateway that must exit by itself.
pub async fn refusal<I: IntoIterator<Item: AsRef<OsStr>>>(arguments: I) -> Output {
    ended(command(arguments)).await
}

pub async fn ended(mut command: Command) -> Output {
    timeout(Duration::from_secs(20), command.output()).await.expect("the gateway is still running").unwrap()
}

/// A running gateway. It is killed on drop.
pub struct Gateway {
    address: SocketAddr,
    admin: SocketAddr,
    child: Child,
    log: Arc<Mutex<String>>,
    logging: JoinHandle<io::Result<()>>,
    _keys: Option<TestFile>,
}

impl Gateway {
    /// Starts a gateway in front of this upstream, with keys of these ids. [`key_of`](super::key_of) finds the id of a
    /// key in its secret.
    pub async fn before<const N: usize>(upstream: SocketAddr, keys: &[&str], arguments: [&str; N]) -> Self {
        let lines: Vec<_> = keys.iter().map(|key| format!("{key}|sk-{key}\n")).collect();
        let keys = keys_file(&lines.concat());
        let upstream = format!("http://{upstream}");
        let all = ["--upstream", &upstream, "--keys", keys.path()];
        let mut gateway = Self::start(command(all.into_iter().chain(arguments))).await;
        gateway._keys = Some(keys);
        gateway
    }

    /// Starts a gateway with these arguments on a free port.
    pub async fn start(mut command: Command) -> Self {
        command.args(["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"]);
        Self::start_listening(command).await
    }

    /// Starts a gateway with these arguments, which name its addresses.
    pub async fn start_listening(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let (listens, listening) = oneshot::channel();
        let log = Arc::default();
        let logging = tokio::spawn(follow(child.stderr.take().unwrap(), Arc::clone(&log), listens));
        let addresses =
            timeout(Duration::from_secs(20), listening).await.expect("the gateway logs no address");
        let (address, admin) =
            addresses.unwrap_or_else(|_| panic!("the gateway does not run: {}", log.lock().unwrap()));
        Self { address, admin, child, log, logging, _keys: None }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// Returns the address of the admin and the metrics.
    pub fn admin_address(&self) -> SocketAddr {
        self.admin
    }

    pub fn admin_url(&self, path: &str) -> String {
        format!("http://{}{path}", self.admin)
    }

    /// Returns the log so far.
    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// Sends SIGTERM, as process managers do.
    pub async fn terminate(&self) {
        self.signal("-TERM").await;
    }

    /// Sends SIGHUP, which asks for a reload.
    pub async fn hang_up(&self) {
        self.signal("-HUP").await;
    }

    async fn signal(&self, signal: &str) {
        let id = self.child.id().expect("the gateway has exited").to_string();
        assert!(Command::new("kill").args([signal, &id]).status().await.unwrap().success());
    }

    /// Waits for its exit and for the rest of its log.
    pub async fn ended(&mut self) -> ExitStatus {
        timeout(Duration::from_secs(20), async {
            (&mut self.logging).await.unwrap().unwrap();
            self.child.wait().await.unwrap()
        })
        .await
        .expect("the gateway is still running")
    }
}

async fn follow(
    errors: ChildStderr,
    log: Arc<Mutex<String>>,
    listens: oneshot::Sender<(SocketAddr, SocketAddr)>,
) -> io::Result<()> {
    let (mut listens, mut admin) = (Some(listens), None);
    let mut lines = BufReader::new(errors).lines();
    while let Some(line) = lines.next_line().await? {
        admin = admin.or_else(|| address_in(&line, "the admin is at http://"));
        if let Some(address) = address_in(&line, "listening on http://")
            && let Some(listens) = listens.take()
        {
            let _ = listens.send((address, admin.expect("the admin's address comes first")));
        }
        *log.lock().unwrap() += &format!("{line}\n");
    }
    Ok(())
}

fn address_in(line: &str, before: &str) -> Option<SocketAddr> {
    line.split_once(before)?.1.split([',', '/']).next()?.parse().ok()
}
