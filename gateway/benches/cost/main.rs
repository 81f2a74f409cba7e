//! The cost of a request: instructions, CPU time, throughput and latency of the gateway with everything on (pacing,
//! scopes, affinity, caller tokens with limits, usage, metrics), beside a bare proxy made of hyper.
//!
//! ```text
//! cargo bench -p key-rotation-gateway --bench cost --profile release                     # CPU time and latency
//! cargo bench -p key-rotation-gateway --bench cost --profile release -- --instructions   # needs valgrind
//! ```
//!
//! Each prints a table and a line of JSON. Callers, upstream and proxies are processes and threads of one machine. The
//! profile must be named: `bench` has no link-time optimization, and the installed gateway does.

mod bare;
mod load;
mod upstream;

use std::{
    env,
    error::Error,
    fs,
    io::{BufRead, BufReader, Lines},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{self, Child, ChildStderr, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use self::load::Run;

/// The argument with which this program runs as the bare proxy.
const BARE: &str = "bare";

const CONNECTIONS: [usize; 3] = [1, 32, 256];
const PAIRS: usize = 5;
/// Requests of a run that measures time.
const REQUESTS: usize = 10_000;
const WARM: usize = 2_000;
/// Requests of the two runs whose difference is the cost: what the start takes falls out.
const COUNTED: [usize; 2] = [2_000, 4_000];
/// A tick of `/proc/<pid>/stat` (`getconf CLK_TCK`).
const TICKS_A_SECOND: f64 = 100.0;

const TOKEN: &str = "token-of-a-caller";

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<_> = env::args().skip(1).collect();
    let has = |name: &str| arguments.iter().any(|argument| argument == name);
    match &arguments[..] {
        [first, upstream, ..] if first == BARE => bare::run(upstream.parse()?),
        // `cargo test --benches` only checks that the benchmark starts.
        _ if !has("--bench") => Ok(()),
        _ if has("--instructions") => instructions(),
        _ => times(),
    }
}

/// Compares by instructions, which do not depend on what else the machine does.
fn instructions() -> Result<(), Box<dyn Error>> {
    let folder = Folder::new()?;
    let upstream = upstream::start()?;
    let count = |kind: Kind| -> Result<u64, Box<dyn Error>> {
        let mut totals = [0; COUNTED.len()];
        for (total, requests) in totals.iter_mut().zip(COUNTED) {
            let file = folder.0.join(format!("{}-{requests}", kind.name()));
            let proxy = Proxy::start(kind, &folder, upstream, Some(&file))?;
            load::run(proxy.address, 32, requests)?;
            proxy.stop()?;
            let text = fs::read_to_string(&file)?;
            let line = text.lines().find_map(|line| line.strip_prefix("totals: "));
            *total = line.ok_or("callgrind has counted nothing")?.trim().parse::<u64>()?;
            if let Some(kept) = env::var_os("KEEP_CALLGRIND") {
                fs::copy(&file, PathBuf::from(kept).join(file.file_name().unwrap_or_default()))?;
            }
        }
        Ok((totals[1] - totals[0]) / (COUNTED[1] - COUNTED[0]) as u64)
    };
    let (bare, gateway) = (count(Kind::Bare)?, count(Kind::Gateway)?);
    println!("| instructions per request, 32 connections | |\n|---|---|");
    println!("| bare hyper | {bare} |\n| the gateway | {gateway} |");
    println!("{}", json!({ "instructions": { "bare": bare, "gateway": gateway } }));
    Ok(())
}

/// Compares by time. The proxies take turns, so that what else the machine does concerns both.
fn times() -> Result<(), Box<dyn Error>> {
    let folder = Folder::new()?;
    let upstream = upstream::start()?;
    let bare = Proxy::start(Kind::Bare, &folder, upstream, None)?;
    let gateway = Proxy::start(Kind::Gateway, &folder, upstream, None)?;
    for proxy in [&bare, &gateway] {
        load::run(proxy.address, 256, WARM)?;
    }
    let mut all = Vec::new();
    println!(
        "| connections | | CPU-s per 10,000 requests | ÷ bare | requests/s | ÷ bare | p50 | p99 |\n\
         |---|---|---|---|---|---|---|---|"
    );
    for connections in CONNECTIONS {
        let mut pairs = Vec::new();
        for _ in 0..PAIRS {
            pairs.push([bare.measure(connections)?, gateway.measure(connections)?]);
        }
        let of = |proxy: usize, value: fn(&Measured) -> f64| {
            median(pairs.iter().map(|pair| value(&pair[proxy])).collect())
        };
        // The ratios of neighbours, since the machine's load changes over time.
        let ratio = |value: fn(&Measured) -> f64| {
            median(pairs.iter().map(|[bare, gateway]| value(gateway) / value(bare)).collect())
        };
        let (cpu, rate) = (ratio(|it| it.cpu), ratio(|it| it.run.a_second()));
        for (proxy, kind) in [Kind::Bare, Kind::Gateway].into_iter().enumerate() {
            let (cpu, rate) = if proxy == 0 { (1.0, 1.0) } else { (cpu, rate) };
            println!(
                "| {connections} | {} | {:.2} | {cpu:.2} | {:.0} | {rate:.2} | {:.2} ms | {:.2} ms |",
                kind.name(),
                of(proxy, |it| it.cpu),
                of(proxy, |it| it.run.a_second()),
                of(proxy, |it| it.run.at(0.5)) * 1_000.0,
                of(proxy, |it| it.run.at(0.99)) * 1_000.0,
            );
        }
        let shown = |proxy| -> Value {
            json!({
                "cpu_s_per_10000": of(proxy, |it| it.cpu),
                "requests_per_second": of(proxy, |it| it.run.a_second()),
                "p50_s": of(proxy, |it| it.run.at(0.5)),
                "p99_s": of(proxy, |it| it.run.at(0.99)),
            })
        };
        all.push(json!({
            "connections": connections,
            "cpu_ratio": cpu,
            "rate_ratio": rate,
            "bare": shown(0),
            "gateway": shown(1),
        }));
    }
    println!("{}", json!({ "pairs": PAIRS, "requests": REQUESTS, "runs": all }));
    bare.stop()?;
    gateway.stop()
}

struct Measured {
    /// Seconds for 10,000 requests.
    cpu: f64,
    run: Run,
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[derive(Clone, Copy)]
enum Kind {
    Bare,
    Gateway,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Bare => "bare",
            Self::Gateway => "gateway",
        }
    }
}

/// A proxy that runs in a process of its own.
struct Proxy {
    address: SocketAddr,
    child: Child,
    log: Lines<BufReader<ChildStderr>>,
}

impl Proxy {
    /// With a file, valgrind counts the instructions into it.
    fn start(
        kind: Kind,
        folder: &Folder,
        upstream: SocketAddr,
        counts: Option<&Path>,
    ) -> Result<Self, Box<dyn Error>> {
        let program = match kind {
            Kind::Bare => env::current_exe()?,
            Kind::Gateway => env!("CARGO_BIN_EXE_key-rotation-gateway").into(),
        };
        let mut command = match counts {
            Some(file) => {
                let mut command = Command::new("valgrind");
                command.args(["--quiet", "--tool=callgrind"]);
                command.arg(format!("--callgrind-out-file={}", file.display())).arg(program);
                command
            }
            None => Command::new(program),
        };
        match kind {
            Kind::Bare => command.args([BARE, &upstream.to_string()]),
            Kind::Gateway => command.arg("--config").arg(folder.config(upstream)?),
        };
        let mut child = command.stderr(Stdio::piped()).spawn()?;
        let mut log = BufReader::new(child.stderr.take().ok_or("no stderr")?).lines();
        let address = loop {
            let line = log.next().ok_or("the proxy has ended")??;
            if let Some((_, rest)) = line.split_once("listening on http://") {
                break rest.split(',').next().unwrap_or(rest).parse()?;
            }
        };
        Ok(Self { address, child, log })
    }

    fn measure(&self, connections: usize) -> Result<Measured, Box<dyn Error>> {
        let before = self.cpu()?;
        let run = load::run(self.address, connections, REQUESTS)?;
        let cpu = (self.cpu()? - before) * 10_000.0 / REQUESTS as f64;
        Ok(Measured { cpu, run })
    }

    /// The CPU time of the process so far, in seconds.
    fn cpu(&self) -> Result<f64, Box<dyn Error>> {
        let text = fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        // The name of the program, in parentheses, may contain anything.
        let fields: Vec<_> = text.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks: u64 = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
        Ok(ticks as f64 / TICKS_A_SECOND)
    }

    fn stop(mut self) -> Result<(), Box<dyn Error>> {
        Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status()?;
        self.log.by_ref().for_each(drop);
        let began = Instant::now();
        while self.child.try_wait()?.is_none() {
            if began.elapsed() > Duration::from_secs(60) {
                return Err("the proxy does not end".into());
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A temporary folder, removed on drop.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Result<Self, Box<dyn Error>> {
        let folder = env::temp_dir().join(format!("key-rotation-gateway-cost-{}", process::id()));
        fs::create_dir(&folder)?;
        Ok(Self(folder))
    }

    /// Writes a configuration with everything on.
    fn config(&self, upstream: SocketAddr) -> Result<PathBuf, Box<dyn Error>> {
        let keys: Vec<_> = (0..10).map(|number| format!("key-{number}|sk-{number}\n")).collect();
        let (keys_file, file) = (self.0.join("keys.txt"), self.0.join("gateway.toml"));
        fs::write(&keys_file, keys.concat())?;
        let config = format!(
            "listen = '127.0.0.1:0'\nadmin-listen = '127.0.0.1:0'\nstate = 'none'\n\
             upstream = 'http://{upstream}'\nkeys = '{}'\npace = true\n\
             [[caller]]\nname = 'website'\ntoken = '{TOKEN}'\n\
             requests-per-minute = 100000000\ntokens-per-minute = 4000000000\nmax-in-flight = 10000\n",
            keys_file.display()
        );
        fs::write(&file, config)?;
        Ok(file)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
