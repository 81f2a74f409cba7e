//! Rests while MongoDB elects another primary, or stands still: on servers of the test's own, which are killed and frozen.
//!
//! A rest lasts for minutes. The tests read its end from pools and documents, and wait for none.

mod support;

use std::{
    collections::BTreeMap,
    future::ready,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use mongodb::bson::{Bson, DateTime, Document, doc};
use support::{mongo::*, *};
use tokio::{task::JoinSet, time::Instant};
use tower_key_rotation::{KeyId, KeyPool, PassedOver, RecoveryHandle, Traits, classify::Verdict};

/// How much later than the service said a rest may end.
const LATE: Duration = Duration::from_millis(500);

/// How much earlier: the time of a command on this machine, which bounds the estimate of the server's clock.
const EARLY: Duration = Duration::from_secs(3);

/// How long a change may take on a busy machine, an election included.
const SEEN_WITHIN: Duration = Duration::from_secs(40);

/// The limit that a request meets: a key in a scope, or the whole key.
type Limit = (&'static str, Option<&'static str>);

/// When the service takes requests again, by two clocks: that of this program, and the wall clock that the servers show.
#[derive(Clone, Copy)]
struct End {
    at: Instant,
    wall: Duration,
}

#[derive(Clone)]
struct Process {
    pool: KeyPool,
    recovery: Arc<RecoveryHandle>,
    /// The rests that the process knows.
    known: Arc<Mutex<BTreeMap<Limit, End>>>,
}

impl Process {
    async fn over(mongo: &Mongo) -> Self {
        let pool = KeyPool::builder().exact_hints().open(mongo.store().await).await.unwrap();
        let recovery = RecoveryHandle::spawn_with(&pool, passes_by_hand());
        Self { recovery: Arc::new(recovery), pool, known: Arc::default() }
    }

    /// The service limits a request, for so long.
    fn meets(&self, limit: Limit, rest: Duration) -> End {
        let lease = self.pool.lease(&traits(limit)).unwrap();
        let end = End { at: Instant::now() + rest, wall: wall() + rest };
        let wait = Some(rest);
        let verdict = match limit.1 {
            Some(_) => Verdict::ScopeExhausted { wait },
            None => Verdict::RateLimited { wait },
        };
        lease.answered_with(verdict);
        self.known.lock().unwrap().insert(limit, end);
        end
    }

    /// What is left of a rest, if the process knows it.
    fn left(&self, limit: Limit) -> Option<Duration> {
        let explained = self.pool.explain(&traits(limit)).keys;
        let key = explained.into_iter().find(|key| key.id.as_str() == limit.0)?;
        let rests = matches!(key.passed_over?, PassedOver::Resting { .. } | PassedOver::RestingInScope);
        key.opens_in.filter(|_| rests)
    }

    /// Waits until the process knows a rest, and checks when that ends.
    async fn joins(&self, limit: Limit, end: End) {
        let what = format!("{limit:?} rests in this process");
        eventually_within(SEEN_WITHIN, &what, || ready(self.left(limit).is_some())).await;
        let before = Instant::now();
        let left = self.left(limit).unwrap();
        let after = Instant::now();
        assert!(before + left <= end.at + LATE, "{limit:?}: {:?} late", before + left - end.at);
        assert!(after + left + EARLY >= end.at, "{limit:?}: {:?} early", end.at - (after + left));
        self.known.lock().unwrap().insert(limit, end);
    }

    /// Sends requests until it is stopped. Returns those that went out on a limit that was known to rest.
    async fn keeps_sending(
        self,
        scopes: &'static [Option<&'static str>],
        stop: Arc<AtomicBool>,
    ) -> Vec<String> {
        let (mut wrong, mut sent) = (Vec::new(), 0);
        while !stop.load(SeqCst) {
            for scope in scopes {
                let known = self.known.lock().unwrap().clone();
                let traits = scope.map_or_else(Traits::new, |name| Traits::new().scope(name));
                let Ok(lease) = self.pool.lease(&traits) else { continue };
                sent += 1;
                let is_it = |limit: &&Limit| {
                    limit.0 == lease.id().as_str() && (limit.1.is_none() || limit.1 == *scope)
                };
                wrong.extend(known.keys().filter(is_it).map(|limit| format!("{limit:?} by {scope:?}")));
                lease.answered_with(Verdict::Nothing);
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        assert!(sent > 100, "{sent} requests show nothing");
        wrong
    }
}

fn traits((key, scope): Limit) -> Traits {
    let traits = Traits::new().key(KeyId::new(key).unwrap());
    scope.map_or(traits.clone(), |name| traits.scope(name))
}

fn wall() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap()
}

fn millis(date: DateTime) -> Duration {
    Duration::from_millis(date.timestamp_millis() as u64)
}

/// The date at which a document says that a limit's rest ends.
fn date_of(document: &Document, limit: Limit) -> Option<Duration> {
    let Some(name) = limit.1 else { return document.get_datetime("cooldownUntil").ok().copied().map(millis) };
    let limits = document.get_array("limits").into_iter().flatten().filter_map(Bson::as_document);
    let mut limits = limits.filter(|limit| limit.get_str("s").is_ok_and(|scope| scope == name));
    limits.next()?.get_datetime("u").ok().copied().map(millis)
}

/// Waits until a rest is in the store, and checks its date.
async fn is_stored(mongo: &Mongo, limit: Limit, end: End) {
    let find = || async move {
        let found = mongo.keys().find_one(doc! { "_id": limit.0 }).await.ok().flatten();
        found.and_then(|document| date_of(&document, limit))
    };
    eventually_within(SEEN_WITHIN, &format!("{limit:?} rests in the store"), || async {
        find().await.is_some()
    })
    .await;
    let date = find().await.unwrap();
    assert!(date <= end.wall + LATE, "{limit:?}: {:?} late", date - end.wall);
    assert!(date + EARLY >= end.wall, "{limit:?}: {:?} early", end.wall - date);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f04_rests_outlive_a_killed_primary() {
    const IDS: [&str; 6] = ["k0", "k1", "k2", "k3", "k4", "k5"];
    const SCOPES: &[Option<&str>] = &[None, Some("a"), Some("b")];
    let mut set = ReplicaSet::start(3).await.unwrap();
    let mongo = Mongo::at(&set.uri()).await;
    mongo.insert_all(IDS).await;
    let (one, other) = (Process::over(&mongo).await, Process::over(&mongo).await);
    let stop = Arc::new(AtomicBool::new(false));
    let mut sending = JoinSet::new();
    for process in [&one, &other] {
        sending.spawn(process.clone().keeps_sending(SCOPES, stop.clone()));
    }

    let mut rests = vec![
        (("k0", None), one.meets(("k0", None), 10 * MINUTE)),
        (("k1", Some("a")), one.meets(("k1", Some("a")), 600 * MINUTE)),
    ];
    for (limit, end) in &rests {
        is_stored(&mongo, *limit, *end).await;
        other.joins(*limit, *end).await;
    }

    let primary = set.primary().await.unwrap();
    set.member(primary).kill();
    // There is no primary now.
    rests.push((("k2", None), one.meets(("k2", None), 11 * MINUTE)));
    rests.push((("k3", Some("a")), other.meets(("k3", Some("a")), 700 * MINUTE)));
    tokio::time::sleep(SECOND).await;
    rests.push((("k1", Some("b")), other.meets(("k1", Some("b")), 12 * MINUTE)));
    let elected = set.primary().await.unwrap();
    assert_ne!(elected, primary);
    set.begin_to_restart(primary);
    for (limit, end) in &rests {
        is_stored(&mongo, *limit, *end).await;
        one.joins(*limit, *end).await;
        other.joins(*limit, *end).await;
    }

    stop.store(true, SeqCst);
    while let Some(wrong) = sending.join_next().await {
        assert_eq!(wrong.unwrap(), [""; 0], "requests on limits that were known to rest");
    }
    for process in [one, other] {
        assert_eq!(process.pool.stats().marks_waiting, 0);
    }
    // A process that starts now knows them all.
    let next = Process::over(&mongo).await;
    for (limit, end) in &rests {
        next.joins(*limit, *end).await;
    }
}

/// A server that the test freezes, and a process over it.
async fn frozen_later() -> (Mongod, Mongo, Process) {
    let server = own(Kind::ReplicaSet).await;
    let mongo = Mongo::at(&server.uri()).await;
    mongo.insert_all(["k0", "k1"]).await;
    let process = Process::over(&mongo).await;
    (server, mongo, process)
}

#[tokio::test]
async fn f12_a_frozen_server_makes_no_rest_later() {
    let (mut server, mongo, one) = frozen_later().await;
    server.freeze();
    let rests = [
        (("k0", None), one.meets(("k0", None), 10 * MINUTE)),
        (("k1", Some("a")), one.meets(("k1", Some("a")), 600 * MINUTE)),
    ];
    tokio::time::sleep(10 * SECOND).await;
    assert_eq!(one.pool.stats().marks_waiting, 2, "the server stands still");
    server.thaw();
    let next = Process::over(&mongo).await;
    for (limit, end) in rests {
        is_stored(&mongo, limit, end).await;
        next.joins(limit, end).await;
    }
}

#[tokio::test]
async fn f31_a_shutdown_over_a_frozen_server_takes_8_seconds() {
    let (mut server, _mongo, one) = frozen_later().await;
    let recovery = RecoveryHandle::spawn(&one.pool);
    server.freeze();
    one.meets(("k0", None), 10 * MINUTE);
    one.meets(("k1", Some("a")), 10 * MINUTE);
    // A pass hangs, too.
    let pass = tokio::spawn({
        let recovery = one.recovery.clone();
        async move { recovery.sweep_now().await }
    });
    let began = Instant::now();
    let written = recovery.shutdown().await;
    let took = began.elapsed();
    assert!(took < Duration::from_millis(9_500), "{took:?}");
    assert!(written.is_err(), "two marks are lost");
    server.thaw();
    drop(pass);
}

#[tokio::test]
async fn f09_a_stale_process_never_undoes_an_outside_reset() {
    let (mut server, mongo, observer) = frozen_later().await;
    // This process writes when the test has it write, as if it were frozen until then.
    let stale = KeyPool::builder().exact_hints().open(mongo.store().await).await.unwrap();
    let late = stale.lease(&traits(("k0", None))).unwrap();
    observer.meets(("k0", None), 10 * MINUTE);
    eventually_within(SEEN_WITHIN, "the key rests in the store", || async {
        mongo.status("k0").await == "rate_limited"
    })
    .await;
    server.freeze();
    late.answered_with(Verdict::RateLimited { wait: Some(60 * MINUTE) });
    tokio::time::sleep(SECOND).await;
    server.thaw();
    mongo.set("k0", doc! { "status": "healthy" }).await;

    let recovery = RecoveryHandle::spawn_with(&stale, passes_by_hand());
    recovery.sweep_now().await.outcome.unwrap();
    for pool in [&stale, &observer.pool] {
        let heals = || ready(stats_of(pool, "k0").status == tower_key_rotation::Status::Healthy);
        eventually_within(SEEN_WITHIN, "the key serves", heals).await;
    }
    assert_eq!((mongo.status("k0").await.as_str(), stale.stats().marks_waiting), ("healthy", 0));
}
