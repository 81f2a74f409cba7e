//! Several processes over one MongoDB: the example `worker`, run as programs of their own.

mod support;

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, OnceLock, mpsc},
    thread,
    time::{Duration, Instant},
};

use mongodb::bson::doc;
use serde_json::Value;
use support::{mongo::*, *};
use tokio::time::sleep;

/// How long until what one process learnt is honoured by all others, with change streams: a second, and longer on a machine
/// that is four times overloaded.
const PROPAGATION: Duration = Duration::from_secs(3);
/// A request that was on its way when the 429 was, and what two clocks and a loaded machine differ by.
const TOLERANCE: Duration = Duration::from_millis(500);
const COOLDOWN: Duration = Duration::from_secs(5);
/// So long that what has to be honoured sooner is not so by a pass.
const INTERVAL: Duration = Duration::from_secs(4);

fn program() -> &'static PathBuf {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| example("worker"))
}

/// A worker, and what it says.
struct Worker {
    name: String,
    child: Child,
    lines: Arc<Mutex<Vec<Value>>>,
    ended: mpsc::Receiver<()>,
}

impl Worker {
    fn start(name: &str, mongo: &Mongo, upstream: &str, rate: u32, environment: &[(&str, &str)]) -> Self {
        Self::start_with(name, mongo, upstream, rate, INTERVAL, environment)
    }

    fn start_with(
        name: &str,
        mongo: &Mongo,
        upstream: &str,
        rate: u32,
        interval: Duration,
        environment: &[(&str, &str)],
    ) -> Self {
        let mut command = Command::new(program());
        command.args(["--name", name, "--upstream", upstream, "--rate", &rate.to_string()]);
        command.args(["--database", mongo.database.name()]);
        command.args(["--cooldown-ms", &COOLDOWN.as_millis().to_string()]);
        command.args(["--interval-ms", &interval.as_millis().to_string()]);
        command.env("MONGODB_URI", &mongo.uri).env("NO_PROXY", "127.0.0.1").env("RUST_LOG", "warn");
        command.envs(environment.iter().copied());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let lines: Arc<Mutex<Vec<Value>>> = Arc::default();
        let (said, output) = (lines.clone(), BufReader::new(child.stdout.take().unwrap()));
        let (end, ended) = mpsc::channel();
        thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                said.lock().unwrap().push(serde_json::from_str(&line).unwrap());
            }
            let _ = end.send(());
        });
        Self { name: name.to_owned(), child, lines, ended }
    }

    fn said(&self, event: &str) -> Vec<Value> {
        self.lines.lock().unwrap().iter().filter(|line| line["event"] == event).cloned().collect()
    }

    async fn started(&self) -> Value {
        eventually("the worker has started", || !self.said("started").is_empty()).await;
        self.said("started").remove(0)
    }

    async fn passes_again(&self) {
        let before = self.said("pass").len();
        eventually("a pass", || self.said("pass").len() > before).await;
    }

    /// How many keys its passes have reset.
    fn recovered(&self) -> u64 {
        self.said("pass").last().map_or(0, |pass| pass["recovered"].as_u64().unwrap())
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        let _ = self.ended.recv_timeout(10 * SECOND);
    }

    /// Ends its input: it makes one more pass, and stops.
    fn end(&mut self) {
        drop(self.child.stdin.take());
    }

    /// Ends its input, and gives its summary.
    fn stop(mut self) -> Value {
        self.end();
        self.ended.recv_timeout(30 * SECOND).unwrap_or_else(|_| panic!("{} does not stop", self.name));
        assert!(self.child.wait().unwrap().success(), "{}", self.name);
        self.said("stopped").remove(0)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A request as the service saw it.
#[derive(Clone, Debug)]
struct Seen {
    at: Instant,
    key: String,
    worker: String,
    limited: bool,
}

/// A service that limits a key and tells one worker alone, by one 429: the others can only know from it. It
/// remembers everything.
#[derive(Clone, Default)]
struct Service {
    seen: Arc<Mutex<Vec<Seen>>>,
    /// Keys of which the next request is limited, if it comes from a worker of that name.
    armed: Arc<Mutex<BTreeMap<String, &'static str>>>,
}

impl Service {
    async fn start(&self) -> Server {
        let service = self.clone();
        Server::start(move |request| {
            let key = key_of(&request).unwrap_or("none").to_owned();
            let worker = request.headers()["x-worker"].to_str().unwrap().to_owned();
            let limited = service.see(key, worker);
            std::future::ready(if limited { answer(429, "") } else { answer(200, "") })
        })
        .await
    }

    fn see(&self, key: String, worker: String) -> bool {
        let mut armed = self.armed.lock().unwrap();
        let limited = armed.get(&key).is_some_and(|name| worker.starts_with(name));
        if limited {
            armed.remove(&key);
        }
        self.seen.lock().unwrap().push(Seen { at: Instant::now(), key, worker, limited });
        limited
    }

    /// Limits a key from the next request of anybody on, and waits for that.
    async fn limit(&self, key: &str) {
        self.limit_for(key, "").await;
    }

    async fn limit_for(&self, key: &str, worker: &'static str) {
        self.armed.lock().unwrap().insert(key.to_owned(), worker);
        eventually("the key is used", || !self.armed.lock().unwrap().contains_key(key)).await;
    }

    fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }
}

fn limits(seen: &[Seen]) -> Vec<Seen> {
    seen.iter().filter(|seen| seen.limited).cloned().collect()
}

/// Requests on a key that was resting, by all that its sender could know.
fn hits_while_resting(seen: &[Seen], outage: Option<(Instant, Instant)>) -> Vec<String> {
    let known = |limit: &Seen, worker: &str| {
        if limit.worker == worker {
            return limit.at;
        }
        match outage {
            // What one process learns then, the others hear when it is over.
            Some((from, until)) if (from - PROPAGATION..until).contains(&limit.at) => until + PROPAGATION,
            _ => limit.at + PROPAGATION,
        }
    };
    let mut hits = Vec::new();
    for limit in limits(seen) {
        for hit in seen.iter().filter(|hit| hit.key == limit.key) {
            let from = known(&limit, &hit.worker) + TOLERANCE;
            if (from..limit.at + COOLDOWN).contains(&hit.at) {
                let after = hit.at - limit.at;
                hits.push(format!(
                    "{} by {}, {after:?} after {} was limited on it",
                    hit.key, hit.worker, limit.worker
                ));
            }
        }
    }
    hits
}

async fn all_healthy(mongo: &Mongo) {
    let rested = || async { mongo.count(doc! { "status": { "$ne": "healthy" } }).await == 0 };
    eventually_within(60 * SECOND, "every key is healthy again", rested).await;
}

/// Limits the keys one after the other.
async fn limit_each(service: &Service, keys: &[String], apart: Duration) {
    for key in keys {
        service.limit(key).await;
        sleep(apart).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn four_processes_share_keys_through_crashes_and_restarts() {
    let mut server = own(Kind::ReplicaSet).await;
    let mongo = Mongo::at(&server.uri()).await;
    let keys: Vec<String> = (0..8).map(|number| format!("key-{number}")).collect();
    for key in &keys {
        mongo.insert(key).await;
    }
    let service = Service::default();
    let url = service.start().await.url();
    let started = Instant::now();
    let names = ["one", "two", "three", "four"];
    let mut workers: Vec<_> = names.iter().map(|name| Worker::start(name, &mongo, &url, 40, &[])).collect();
    for worker in &workers {
        assert_eq!(worker.started().await["keys"], 8);
    }

    // Ordinary days.
    limit_each(&service, &keys, Duration::from_millis(700)).await;

    // One worker is killed, after its marks and its last pass have been written and said.
    sleep(PROPAGATION).await;
    workers[3].passes_again().await;
    workers[3].kill();
    all_healthy(&mongo).await;
    limit_each(&service, &keys[..4], Duration::from_millis(400)).await;
    all_healthy(&mongo).await;

    // MongoDB is killed while keys rest, and one more is limited while it is gone.
    limit_each(&service, &keys[..3], Duration::from_millis(20)).await;
    sleep(PROPAGATION).await;
    let resting = resting_until(&mongo).await;
    assert_eq!(resting.len(), 3, "{resting:?}");
    let outage = Instant::now();
    server.kill();
    service.limit(&keys[4]).await;
    server.restart().await.unwrap();
    let outage = (outage, Instant::now());
    for (key, until) in &resting {
        let now = mongo.document(key).await;
        let swept = now.get_str("status").unwrap() == "healthy";
        assert!(swept || now.get_datetime("cooldownUntil").unwrap() >= until, "{key}: {now:?}");
    }
    all_healthy(&mongo).await;
    let remaining = (20 * SECOND).saturating_sub(started.elapsed());
    sleep(remaining + SECOND).await;

    let seen = service.seen();
    let recovered_by_the_killed = workers[3].recovered();
    workers.truncate(3);
    let summaries: Vec<_> = workers.into_iter().map(Worker::stop).collect();
    let hits = hits_while_resting(&seen, Some(outage));
    assert!(hits.is_empty(), "{} of {} requests hit a resting key: {hits:#?}", hits.len(), seen.len());

    let limits = limits(&seen);
    for key in &keys {
        let last = limits.iter().rfind(|limit| limit.key == *key).unwrap().at;
        let returned = seen.iter().any(|seen| seen.key == *key && seen.at > last + COOLDOWN && !seen.limited);
        assert!(returned, "{key} did not come back");
    }
    let recovered: u64 = summaries.iter().map(|summary| summary["recovered"].as_u64().unwrap()).sum();
    // The mark that was made while MongoDB was gone may have ended before it could be written.
    let all = limits.len() as u64;
    let expected = if outage.1 - outage.0 < COOLDOWN - TOLERANCE { all..=all } else { all - 1..=all };
    let recovered = recovered + recovered_by_the_killed;
    assert!(expected.contains(&recovered), "{recovered} resets of {all} cooldowns: {summaries:?}");
    for summary in &summaries {
        assert_eq!(
            (summary["failed"].as_u64(), summary["marks_not_written"].as_u64()),
            (Some(0), Some(0)),
            "{summary}"
        );
    }
    let sent: u64 = summaries.iter().map(|summary| summary["sent"].as_u64().unwrap()).sum();
    println!(
        "{sent} requests, {all} cooldowns, {recovered} resets, no hit; outage {:?}",
        outage.1 - outage.0
    );
}

async fn resting_until(mongo: &Mongo) -> BTreeMap<String, mongodb::bson::DateTime> {
    let mut found = mongo.keys().find(doc! { "status": "rate_limited" }).await.unwrap();
    let mut resting = BTreeMap::new();
    while found.advance().await.unwrap() {
        let key = found.deserialize_current().unwrap();
        resting.insert(key.get_str("_id").unwrap().to_owned(), *key.get_datetime("cooldownUntil").unwrap());
    }
    resting
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f06_eight_sweeping_processes_reset_each_key_once() {
    let mongo = Mongo::standalone().await;
    let names: Vec<_> = (0..8).map(|number| format!("sweeper-{number}")).collect();
    let mut workers: Vec<_> =
        names.iter().map(|name| Worker::start(name, &mongo, "http://127.0.0.1:1/", 0, &[])).collect();
    for worker in &workers {
        worker.started().await;
    }
    let expired: Vec<_> = (0..1_000)
        .map(|number| {
            let mut key = healthy(&format!("key-{number}"));
            key.insert("status", "rate_limited");
            key.insert("cooldownUntil", mongodb::bson::DateTime::from_millis(1_700_000_000_000));
            key
        })
        .collect();
    mongo.keys().insert_many(expired).await.unwrap();
    all_healthy(&mongo).await;
    for worker in &workers {
        worker.passes_again().await;
    }

    // Each in its own time so far, and now all of them at once.
    let expired = doc! {
        "status": "rate_limited",
        "cooldownUntil": mongodb::bson::DateTime::from_millis(1_700_000_000_000),
    };
    mongo.keys().update_many(doc! {}, doc! { "$set": expired }).await.unwrap();
    workers.iter_mut().for_each(Worker::end);
    let resets: Vec<_> =
        workers.into_iter().map(|worker| worker.stop()["recovered"].as_u64().unwrap()).collect();
    assert_eq!(mongo.count(doc! { "status": "healthy" }).await, 1_000);
    assert_eq!(resets.iter().sum::<u64>(), 2_000, "{resets:?}");
}

/// A library that makes a program's wall clock wrong by `CLOCK_SHIFT` seconds and leaves its monotonic one alone:
/// from the beginning or, where `CLOCK_SHIFT_ONCE` names a file, from when that is there.
const SHIFTED_CLOCK: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <time.h>
#include <sys/time.h>
#include <unistd.h>
static long shift(void) {
    const char *by = getenv("CLOCK_SHIFT"), *once = getenv("CLOCK_SHIFT_ONCE");
    return by && (!once || access(once, F_OK) == 0) ? atol(by) : 0;
}
int clock_gettime(clockid_t clock, struct timespec *time) {
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, time);
    if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) time->tv_sec += shift();
    return result;
}
"#;

fn shifted_clock() -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let (source, library) = (folder.join("shifted_clock.c"), folder.join("shifted_clock.so"));
    std::fs::write(&source, SHIFTED_CLOCK).unwrap();
    let built =
        Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source).arg("-ldl").output();
    let built = built.expect("a C compiler, `cc`, is needed, as Rust needs one to link");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    library
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f13_wall_clock_jumps_leave_cooldowns_unchanged() {
    let mongo = Mongo::replica_set().await;
    mongo.insert_all(["alpha", "beta", "gamma"]).await;
    let service = Service::default();
    let url = service.start().await.url();
    let library = shifted_clock();
    let jump = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("jump-{}", std::process::id()));
    let [library, once] = [&library, &jump].map(|path| path.to_str().unwrap());
    // Without a pass, and with a change stream: from the jump on, each is left to its own memory.
    let worker = |name, shift| {
        let environment = [("LD_PRELOAD", library), ("CLOCK_SHIFT", shift), ("CLOCK_SHIFT_ONCE", once)];
        Worker::start_with(name, &mongo, &url, 20, 10 * MINUTE, &environment)
    };
    let workers = [worker("back", "-600"), worker("forth", "600")];
    let mut clocks = Vec::new();
    for worker in &workers {
        clocks.push(worker.started().await["wall_clock"].as_i64().unwrap());
    }
    for (key, name) in [("alpha", "back"), ("beta", "forth")] {
        service.limit_for(key, name).await;
    }
    sleep(PROPAGATION / 2).await;
    std::fs::write(&jump, "").unwrap();
    sleep(COOLDOWN + PROPAGATION).await;

    let seen = service.seen();
    let summaries = workers.map(Worker::stop);
    std::fs::remove_file(&jump).unwrap();
    let jumped = |number: usize| summaries[number]["wall_clock"].as_i64().unwrap() - clocks[number];
    assert!(jumped(0) < -500 && jumped(1) > 600, "the clocks have not jumped: {summaries:?}");
    assert_eq!(hits_while_resting(&seen, None), Vec::<String>::new());
    for limit in limits(&seen) {
        for name in ["back", "forth"] {
            let is_back =
                |seen: &Seen| seen.key == limit.key && seen.worker == name && seen.at > limit.at + COOLDOWN;
            assert!(seen.iter().any(is_back), "{} does not come back for {name}", limit.key);
        }
    }
    all_healthy(&mongo).await;
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f12_wrong_client_clocks_leave_cooldowns_unchanged() {
    let mongo = Mongo::replica_set().await;
    mongo.insert_all(["alpha", "beta"]).await;
    let service = Service::default();
    let url = service.start().await.url();
    let library = shifted_clock();
    let preload = library.to_str().unwrap();
    let worker = |name, shift| {
        let environment = [("LD_PRELOAD", preload), ("CLOCK_SHIFT", shift)];
        Worker::start(name, &mongo, &url, 20, &environment)
    };
    let workers = [worker("ahead", "600"), worker("behind", "-600")];
    let mut clocks = Vec::new();
    for worker in &workers {
        clocks.push(worker.started().await["wall_clock"].as_i64().unwrap());
    }
    assert!((1_190..1_210).contains(&(clocks[0] - clocks[1])), "the clocks are not shifted: {clocks:?}");

    for name in ["ahead", "behind"] {
        service.limit_for("alpha", name).await;
        sleep(PROPAGATION / 2).await;
        let left = mongo.millis_left("alpha").await.unwrap();
        let most = COOLDOWN.as_millis() as i64;
        assert!((most / 4..=most + 50).contains(&left), "{left} ms are left of {COOLDOWN:?}");
        all_healthy(&mongo).await;
    }
    let seen = service.seen();
    let summaries = workers.map(Worker::stop);
    assert_eq!(hits_while_resting(&seen, None), Vec::<String>::new());
    let recovered: u64 = summaries.iter().map(|summary| summary["recovered"].as_u64().unwrap()).sum();
    assert_eq!(recovered, limits(&seen).len() as u64, "{summaries:?}");
}
