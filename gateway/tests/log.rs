//! Runs the gateway with a stderr that is closed, full or never read.

mod support;

use std::{
    io::{PipeReader, Read},
    net::{SocketAddr, TcpListener},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use mongodb::bson::Document;
use support::{gateway::command, mongo::Mongo, *};
use tokio::{
    process::{Child, Command},
    time::{sleep, timeout},
};

/// More than the log's buffer and a pipe's 64 KiB together: each request logs its path.
const REQUESTS: u32 = 400;
const PATH: usize = 4_000;

/// Generous, for a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

/// A gateway with two keys in MongoDB. The upstream limits one of them.
struct Logging {
    address: SocketAddr,
    admin: SocketAddr,
    child: Child,
    mongo: Mongo,
    _upstream: Server,
}

impl Logging {
    async fn to(stderr: impl Into<Stdio>) -> Self {
        let mongo = Mongo::standalone().await;
        mongo.insert_all(["a", "b"]).await;
        let upstream = Server::limiting(["a"]).await;
        let (address, admin) = (free_address(), free_address());
        let (listen, url) = (address.to_string(), format!("http://{}", upstream.address()));
        let mut command =
            command(["--upstream", &url, "--listen", &listen, "--log", "debug", "--pace=false"]);
        command.args(["--admin-listen", &admin.to_string()]);
        command.args(["--mongodb", &mongo.uri, "--mongodb-database", mongo.database.name()]);
        let child = command.stderr(stderr).spawn().unwrap();
        let logging = Self { address, admin, child, mongo, _upstream: upstream };
        timeout(LIMIT, async {
            while http().get(logging.url("/healthz")).send().await.is_err() {
                sleep(Duration::from_millis(20)).await;
            }
        })
        .await
        .expect("the gateway does not listen");
        logging
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// Sends requests. Each must get a response.
    async fn serve(&self) {
        let (http, url) = (http(), self.url(&format!("/{}", "x".repeat(PATH))));
        for number in 0..REQUESTS {
            let response = timeout(LIMIT, http.get(&url).send()).await;
            let response = response.unwrap_or_else(|_| panic!("request {number} has no answer"));
            assert_eq!(response.unwrap().status(), 200, "request {number}");
        }
    }

    async fn stop(&mut self) -> ExitStatus {
        let id = self.child.id().expect("the gateway has exited").to_string();
        assert!(Command::new("kill").args(["-TERM", &id]).status().await.unwrap().success());
        timeout(LIMIT, self.child.wait()).await.expect("the gateway does not stop").unwrap()
    }

    /// Checks that the gateway serves requests, and that at its end marks and usage are in MongoDB.
    async fn assert_unaffected(mut self) {
        self.serve().await;
        assert_eq!(self.stop().await.code(), Some(0));
        assert_eq!(self.mongo.status("a").await, "rate_limited");
        // The documents begin with 2 requests.
        let used = number(&self.mongo.document("b").await, "requestsCount");
        assert_eq!(used, 2 + i64::from(REQUESTS));
    }
}

/// Returns an address that was free a moment ago. Without a log, the test can't read where the gateway listens.
fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

fn number(document: &Document, field: &str) -> i64 {
    let value = document.get(field).unwrap_or_else(|| panic!("no {field} in {document}"));
    value.as_i64().or(value.as_i32().map(i64::from)).or(value.as_f64().map(|value| value as i64)).unwrap()
}

#[tokio::test]
async fn s09_a_log_without_reader_stops_nothing() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    Logging::to(writer).await.assert_unaffected().await;
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn s09_a_log_on_a_full_disk_stops_nothing() {
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    Logging::to(full).await.assert_unaffected().await;
}

#[tokio::test]
async fn s09_a_log_that_nobody_reads_stops_nothing() {
    let (_reader, writer) = std::io::pipe().unwrap();
    Logging::to(writer).await.assert_unaffected().await;
}

#[tokio::test]
async fn s09_lost_log_lines_are_counted_and_logged() {
    let (reader, writer) = std::io::pipe().unwrap();
    let logging = Logging::to(writer).await;
    logging.serve().await;
    let metrics =
        http().get(format!("http://{}/metrics", logging.admin)).send().await.unwrap().text().await.unwrap();
    let lost = metrics.lines().find_map(|line| line.strip_prefix("gateway_log_lines_lost_total "));
    let lost: u64 = lost.unwrap_or_else(|| panic!("{metrics}")).parse().unwrap();
    assert!(lost > 0);
    let logged = tokio::task::spawn_blocking(|| read_until(reader, "lost since the start: "));
    let line = timeout(LIMIT, logged).await.expect("the log does not report lost lines").unwrap();
    assert!(line.contains("WARN") && line.ends_with(&format!(" {lost}")), "{line}");
}

/// Reads up to the line that contains this text, and returns the line.
fn read_until(mut reader: PipeReader, text: &str) -> String {
    let (mut bytes, mut piece) = (Vec::new(), [0; 4096]);
    loop {
        let count = reader.read(&mut piece).unwrap();
        assert_ne!(count, 0, "the log has ended");
        bytes.extend_from_slice(&piece[..count]);
        // A piece may end within a character.
        let read = String::from_utf8_lossy(&bytes);
        if let Some(at) = read.find(text)
            && let Some(length) = read[at..].find('\n')
        {
            return read[..at + length].lines().last().unwrap().to_owned();
        }
    }
}
