//! Compares the gateway with `nginx` as a reverse proxy: requests per second, latency, memory, and the time to a
//! stream's first event and to a whole response.
//!
//! ```text
//! apt-get install nginx wrk
//! cargo bench -p key-rotation-gateway --bench nginx
//! ```
//!
//! Everything runs on one machine: `wrk` on one thread, the gateway and nginx on all cores, and a second nginx as the
//! upstream, which answers at once. The measurements of upstream, nginx and gateway alternate.

use std::{
    env, fs,
    io::{self, BufRead, BufReader, ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{self, Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

const CONNECTIONS: [usize; 3] = [1, 32, 256];
const ROUNDS: usize = 5;
const SECONDS: u64 = 4;
const KEYS: usize = 100;
const STREAMS: usize = 1_000;
const BETWEEN_EVENTS: Duration = Duration::from_millis(5);
const EVENT: &str = "data: 1\n\n";
const FIRST_EVENT: &str = "9\r\ndata: 1\n\n\r\n";
const LAST_EVENT: &str = "9\r\ndata: 2\n\n\r\n0\r\n\r\n";
/// Memory is measured after this many requests, and again after `MORE` further ones.
const WARM: u64 = 20_000;
const MORE: u64 = 100_000;

fn main() {
    // `cargo test --benches` only checks that the benchmark starts.
    if !env::args().any(|argument| argument == "--bench") {
        return;
    }
    let folder = Folder::new();
    let upstream =
        Nginx::start(&folder, "upstream", |_| "location / { return 200 '{\"choices\":[]}'; }".into());
    let nginx = Nginx::start(&folder, "proxy", |_| proxy_to(upstream.address));
    let gateway = Gateway::start(&folder, upstream.address);
    let cases = [
        ("the upstream itself", upstream.address),
        ("nginx", nginx.address),
        ("the gateway", gateway.address),
    ];

    println!("| connections | | requests a second | p50 | p99 |\n|---|---|---|---|---|");
    for connections in CONNECTIONS {
        let mut runs = cases.map(|_| Vec::new());
        for _ in 0..ROUNDS {
            for ((_, address), runs) in cases.iter().zip(&mut runs) {
                runs.push(Run::of(*address, connections, SECONDS));
            }
        }
        for ((name, _), runs) in cases.iter().zip(&runs) {
            let median = |value: fn(&Run) -> f64| median(runs.iter().map(value).collect());
            println!(
                "| {connections} | {name} | {:.0} | {} | {} |",
                median(|run| run.a_second),
                shown(median(|run| run.p50)),
                shown(median(|run| run.p99)),
            );
        }
    }
    first_events(&folder);
    gateway.send(WARM);
    let before = gateway.resident_kib();
    gateway.send(MORE);
    let after = gateway.resident_kib();
    println!("\nresident after {WARM} further requests: {before} KiB; after another {MORE}: {after} KiB");
}

/// Measures the time to the first event of a stream, and to a response that contains only this event.
///
/// A proxy that buffers the event until more data arrives needs at least [`BETWEEN_EVENTS`].
fn first_events(folder: &Folder) {
    let upstream = streaming();
    let nginx = Nginx::start(folder, "streaming", |_| proxy_to(upstream));
    let gateway = Gateway::start(folder, upstream);
    let mut cases =
        [("the upstream itself", upstream), ("nginx", nginx.address), ("the gateway", gateway.address)]
            .map(|(name, address)| (name, TcpStream::connect(address).unwrap(), [const { Vec::new() }; 2]));
    for _ in 0..STREAMS {
        for (_, connection, [streams, wholes]) in &mut cases {
            streams.push(first_event(connection).as_secs_f64());
            wholes.push(whole(connection).as_secs_f64());
        }
    }
    println!("\n| | the first event of a stream, p50 | p99 | the same as a whole answer, p50 | p99 |");
    println!("|---|---|---|---|---|");
    for (name, _, times) in &mut cases {
        let shown = times.each_mut().map(|times| {
            times.sort_by(f64::total_cmp);
            format!("{} | {}", shown(times[STREAMS / 2]), shown(times[STREAMS * 99 / 100]))
        });
        println!("| {name} | {} |", shown.join(" | "));
    }
}

/// An upstream that sends one event at once and the next after [`BETWEEN_EVENTS`].
fn streaming() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for connection in listener.incoming() {
            thread::spawn(move || stream_on(connection.unwrap()));
        }
    });
    address
}

fn stream_on(mut connection: TcpStream) -> io::Result<()> {
    connection.set_nodelay(true)?;
    loop {
        if read_until(&mut connection, b"\r\n\r\n")?.starts_with(b"GET /whole") {
            let length = EVENT.len();
            connection
                .write_all(format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n").as_bytes())?;
            connection.write_all(EVENT.as_bytes())?;
        } else {
            let head =
                "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
            connection.write_all(head.as_bytes())?;
            connection.write_all(FIRST_EVENT.as_bytes())?;
            thread::sleep(BETWEEN_EVENTS);
            connection.write_all(LAST_EVENT.as_bytes())?;
        }
    }
}

/// The time from the request to the first event.
fn first_event(connection: &mut TcpStream) -> Duration {
    let took = until_an_event(connection, "stream");
    read_until(connection, b"0\r\n\r\n").unwrap();
    took
}

/// The time from the request to the end of a response that contains only the event.
fn whole(connection: &mut TcpStream) -> Duration {
    until_an_event(connection, "whole")
}

fn until_an_event(connection: &mut TcpStream, path: &str) -> Duration {
    let request = format!("GET /{path} HTTP/1.1\r\nhost: localhost\r\n\r\n");
    // Both kinds of request follow a pause of the same length.
    thread::sleep(BETWEEN_EVENTS);
    let began = Instant::now();
    connection.write_all(request.as_bytes()).unwrap();
    read_until(connection, EVENT.as_bytes()).unwrap();
    began.elapsed()
}

/// Reads until these bytes have arrived.
fn read_until(connection: &mut TcpStream, end: &[u8]) -> io::Result<Vec<u8>> {
    let mut read = Vec::new();
    while !read.windows(end.len()).any(|bytes| bytes == end) {
        let mut more = [0; 4096];
        match connection.read(&mut more)? {
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            count => read.extend_from_slice(&more[..count]),
        }
    }
    Ok(read)
}

fn proxy_to(upstream: SocketAddr) -> String {
    format!(
        "location / {{ proxy_pass http://{upstream_name}; proxy_http_version 1.1; proxy_set_header Connection ''; \
         proxy_set_header Authorization 'Bearer sk-1'; proxy_buffering off; }} }} \
         upstream {upstream_name} {{ server {upstream}; keepalive 256; keepalive_requests 1000000000;",
        upstream_name = "api",
    )
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn shown(seconds: f64) -> String {
    format!("{:.2} ms", seconds * 1_000.0)
}

/// The measurements of `wrk`.
struct Run {
    requests: u64,
    a_second: f64,
    p50: f64,
    p99: f64,
}

impl Run {
    fn of(address: SocketAddr, connections: usize, seconds: u64) -> Self {
        let mut wrk = Command::new("wrk");
        wrk.args(["--threads", "1", "--latency"]);
        wrk.args(["--connections", &connections.to_string(), "--duration", &format!("{seconds}s")]);
        let output = wrk.arg(format!("http://{address}/v1/models")).output();
        let output = output.expect("wrk is needed: apt-get install wrk");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && !text.contains("Non-2xx") && !text.contains("Socket errors"),
            "{text}"
        );
        let after = |name: &str| {
            let line = text.lines().find_map(|line| line.trim().strip_prefix(name));
            line.unwrap_or_else(|| panic!("no {name} in {text}")).trim()
        };
        let requests = text.lines().find_map(|line| line.trim().split_once(" requests in "));
        Self {
            requests: requests.expect("the number of requests").0.parse().unwrap(),
            a_second: after("Requests/sec:").parse().unwrap(),
            p50: in_seconds(after("50%")),
            p99: in_seconds(after("99%")),
        }
    }
}

fn in_seconds(time: &str) -> f64 {
    let units = [("us", 1e-6), ("ms", 1e-3), ("s", 1.0)];
    let (number, unit) =
        units.iter().find_map(|(name, unit)| Some((time.strip_suffix(name)?, unit))).unwrap();
    number.parse::<f64>().unwrap() * unit
}

/// A temporary folder, removed on drop.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        let folder = env::temp_dir().join(format!("tower-key-rotation-gateway-{}", process::id()));
        fs::create_dir(&folder).unwrap();
        Self(folder)
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, text).unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

struct Nginx {
    address: SocketAddr,
    child: Child,
}

impl Nginx {
    fn start(folder: &Folder, name: &str, server: impl Fn(&Path) -> String) -> Self {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let path = &folder.0;
        let shown = path.display();
        let config = format!(
            "worker_processes auto; daemon off; pid {shown}/{name}.pid; error_log {shown}/{name}.log; \
             events {{ worker_connections 4096; }} \
             http {{ access_log off; keepalive_requests 1000000000; default_type application/json; \
             client_body_temp_path {shown}/{name}-body; proxy_temp_path {shown}/{name}-proxy; \
             fastcgi_temp_path {shown}/{name}-fastcgi; uwsgi_temp_path {shown}/{name}-uwsgi; \
             scgi_temp_path {shown}/{name}-scgi; server {{ listen {address} backlog=4096; {} }} }}",
            server(path)
        );
        let config = folder.file(&format!("{name}.conf"), &config);
        let log = path.join(format!("{name}.log"));
        let child = Command::new("nginx").arg("-e").arg(&log).arg("-c").arg(config).spawn();
        let nginx = Self { address, child: child.expect("nginx is needed: apt-get install nginx") };
        let began = Instant::now();
        while TcpStream::connect(address).is_err() {
            assert!(
                began.elapsed() < Duration::from_secs(10),
                "{}",
                fs::read_to_string(&log).unwrap_or_default()
            );
            thread::sleep(Duration::from_millis(20));
        }
        nginx
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        // SIGTERM, since nginx then ends its workers.
        let _ = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status();
        let _ = self.child.wait();
    }
}

struct Gateway {
    address: SocketAddr,
    child: Child,
}

impl Gateway {
    fn start(folder: &Folder, upstream: SocketAddr) -> Self {
        let keys: Vec<_> = (0..KEYS).map(|number| format!("key-{number}|sk-{number}\n")).collect();
        let keys = folder.file("keys.txt", &keys.concat());
        let mut command = Command::new(env!("CARGO_BIN_EXE_key-rotation-gateway"));
        command
            .args([
                "--listen",
                "127.0.0.1:0",
                "--admin-listen",
                "127.0.0.1:0",
                "--state",
                "none",
                "--upstream",
                &format!("http://{upstream}"),
                "--keys",
            ])
            .arg(keys);
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
        let listens =
            |line: String| line.split_once("listening on http://")?.1.split(',').next()?.parse().ok();
        let address = log.find_map(listens).expect("it says where it listens");
        thread::spawn(move || log.for_each(|line| eprintln!("{line}")));
        Self { address, child }
    }

    /// Sends at least this many requests.
    fn send(&self, requests: u64) {
        let mut sent = 0;
        while sent < requests {
            sent += Run::of(self.address, 32, 1).requests;
        }
    }

    fn resident_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
