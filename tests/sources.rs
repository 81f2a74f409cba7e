//! Keys of sources that change, and secrets that expire: f46 and f47.

#![cfg(unix)] // links

mod support;

use std::{
    fs, future,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use futures_util::future::join_all;
use http::{HeaderMap, Request, Response, StatusCode};
use support::*;
use tempfile::TempDir;
use tokio::{
    sync::Notify,
    time::{Instant, sleep},
};
use tower::{
    BoxError, Layer, Service, ServiceExt, retry::budget::TpsBudget, service_fn, util::BoxCloneService,
};
use tower_key_rotation::{
    Failover, KeyId, KeyLease, KeyLeases, KeyPool, KeyPoolBuilder, KeyRotationLayer, KeySpec, Quota,
    RecoveryHandle, Status, Traits,
    classify::{ClassifyResponse, ResponseHead, TooManyRequests, Verdict},
    clock::ManualClock,
    source::{self, KeyDirectory, KeyFile, KeySet, KeySource, KeyVariable, SourcedKey},
    store::{MemoryStore, file::FileStore},
};

fn id(name: &str) -> KeyId {
    KeyId::new(name).unwrap()
}

fn spec(name: &str, secret: &str) -> KeySpec {
    KeySpec::new(id(name), secret)
}

/// Ids and secrets of the pool's keys, in order of the ids.
fn keys(pool: &KeyPool) -> Vec<(String, String)> {
    let specs = pool.specs().into_iter();
    let mut keys: Vec<_> = specs.map(|key| (key.id.to_string(), key.secret.expose().to_owned())).collect();
    keys.sort_unstable();
    keys
}

fn pairs<const N: usize>(pairs: [(&str, &str); N]) -> Vec<(String, String)> {
    pairs.map(|(id, secret)| (id.to_owned(), secret.to_owned())).to_vec()
}

fn rest(pool: &KeyPool, name: &str) {
    let lease = pool.lease(&Traits::new().key(id(name))).unwrap();
    lease.answered_with(Verdict::RateLimited { wait: None });
}

/// A directory for one file of keys.
struct Files(TempDir);

impl Files {
    fn with(text: &str) -> Self {
        let files = Self(TempDir::new().unwrap());
        fs::write(files.path(), text).unwrap();
        files
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("keys.txt")
    }

    /// As editors and configuration tools do it.
    fn replace(&self, text: &str) {
        let next = self.0.path().join("keys.txt.new");
        fs::write(&next, text).unwrap();
        fs::rename(next, self.path()).unwrap();
    }
}

async fn built(source: impl KeySource) -> KeyPool {
    KeyPool::builder().source(source).await.unwrap().build().unwrap()
}

/// Long enough for two looks at a file.
async fn looks() {
    sleep(3 * SECOND).await;
}

#[tokio::test(start_paused = true)]
async fn f46_a_replaced_file_changes_only_what_differs() {
    let files = Files::with("alpha|sk-1\nbeta|sk-2\ngamma|sk-3\n");
    let pool = built(KeyFile::new(files.path())).await;
    let recovery = RecoveryHandle::spawn(&pool);
    rest(&pool, "alpha");
    let in_flight = pool.lease(&Traits::new().key(id("beta"))).unwrap();

    files.replace("alpha|sk-1\nbeta|sk-4\ndelta|sk-5\n");
    looks().await;
    assert_eq!(keys(&pool), pairs([("alpha", "sk-1"), ("beta", "sk-4"), ("delta", "sk-5")]));
    let alpha = stats_of(&pool, "alpha");
    assert_eq!((alpha.status, alpha.limited), (Status::RateLimited, 1));
    // The request goes on with its secret, and its answer is about that one.
    assert_eq!(in_flight.secret().expose(), "sk-2");
    in_flight.answered_with(Verdict::Revoked);
    assert_eq!(stats_of(&pool, "beta").status, Status::Healthy);

    // In place, and without a change of the keys.
    fs::write(files.path(), "alpha|sk-1\n\nbeta|sk-4\ndelta|sk-5\n").unwrap();
    let since_change = pool.sources()[0].since_change.unwrap();
    looks().await;
    let source = &pool.sources()[0];
    assert_eq!((source.keys, source.error.as_deref(), source.is_followed), (3, None, true));
    assert!(
        source.since_read.unwrap() < 3 * SECOND && source.since_change.unwrap() > since_change,
        "{source:?}"
    );
    recovery.shutdown().await.unwrap();

    files.replace("alpha|sk-1\n");
    looks().await;
    assert_eq!(keys(&pool).len(), 3, "nobody follows any more");
    assert!(!pool.sources()[0].is_followed);
}

/// The volume of a Kubernetes secret: links to files behind a link that is swapped.
fn swap(volume: &Path, version: &str, files: &[(&str, &str)]) {
    fs::create_dir(volume.join(version)).unwrap();
    for (name, text) in files {
        fs::write(volume.join(version).join(name), text).unwrap();
        let link = volume.join(name);
        if link.symlink_metadata().is_err() {
            symlink(Path::new("..data").join(name), link).unwrap();
        }
    }
    symlink(version, volume.join("..data_tmp")).unwrap();
    fs::rename(volume.join("..data_tmp"), volume.join("..data")).unwrap();
}

#[tokio::test(start_paused = true)]
async fn f46_a_swapped_volume_is_taken_over() {
    let volume = TempDir::new().unwrap();
    swap(volume.path(), "..1", &[("alpha", "sk-1\n"), ("beta", "sk-2")]);
    fs::write(volume.path().join(".hidden"), "sk-9").unwrap();
    let list = TempDir::new().unwrap();
    swap(list.path(), "..1", &[("keys.json", r#"{"gamma": "sk-3"}"#)]);
    let builder = KeyPool::builder().source(KeyDirectory::new(volume.path())).await.unwrap();
    let builder = builder.source(KeyFile::new(list.path().join("keys.json"))).await.unwrap();
    let pool = builder.strict().build().unwrap();
    assert_eq!(keys(&pool), pairs([("alpha", "sk-1"), ("beta", "sk-2"), ("gamma", "sk-3")]));
    let recovery = RecoveryHandle::spawn(&pool);

    swap(volume.path(), "..2", &[("alpha", "sk-4\n"), ("beta", "sk-2"), ("delta", "sk-5\r\n")]);
    swap(list.path(), "..2", &[("keys.json", r#"{"gamma": "sk-6"}"#)]);
    looks().await;
    let now = [("alpha", "sk-4"), ("beta", "sk-2"), ("delta", "sk-5"), ("gamma", "sk-6")];
    assert_eq!(keys(&pool), pairs(now));

    // Kubernetes removes the link of a file that is gone after the swap.
    fs::remove_file(volume.path().join("beta")).unwrap();
    looks().await;
    assert_eq!(keys(&pool), pairs([("alpha", "sk-4"), ("delta", "sk-5"), ("gamma", "sk-6")]));
    // A link that leads nowhere is a volume in between.
    fs::remove_dir_all(volume.path().join("..2")).unwrap();
    looks().await;
    assert_eq!(keys(&pool).len(), 3);
    assert!(pool.sources()[0].error.is_some());
    recovery.shutdown().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn f46_unusable_files_change_nothing_and_are_reported_once() {
    let (logs, _guard) = Logs::capture();
    let files = Files::with("alpha|sk-1\nbeta|sk-2\n");
    let pool = built(KeyFile::new(files.path())).await;
    let recovery = RecoveryHandle::spawn(&pool);
    let could_not = |logs: &Logs| logs.count("the source could not be used");
    let unusable = ["", "# nothing\n", r#"[{"id": "alpha", "secret": "sk-9""#, r#"{"alpha": }"#];
    for (times, text) in (1..).zip(unusable) {
        files.replace(text);
        sleep(10 * MINUTE).await;
        assert_eq!(keys(&pool), pairs([("alpha", "sk-1"), ("beta", "sk-2")]), "{text:?}");
        // Two texts without any key are one failure.
        let times = if times == 1 { 1 } else { times - 1 };
        assert_eq!(could_not(&logs), times, "{text:?}: {}", logs.text());
        assert!(pool.sources()[0].error.is_some() && pool.sources()[0].since_read.unwrap() > 9 * MINUTE);
    }
    fs::remove_file(files.path()).unwrap();
    sleep(10 * MINUTE).await;
    assert_eq!((keys(&pool).len(), could_not(&logs)), (2, 4));
    let error = pool.sources()[0].error.clone().unwrap();
    assert!(error.contains("No such file") && !logs.text().contains("sk-9"), "{error}");

    files.replace("alpha|sk-1\ngamma|sk-3\n");
    looks().await;
    assert_eq!(keys(&pool), pairs([("alpha", "sk-1"), ("gamma", "sk-3")]));
    assert_eq!((pool.sources()[0].error.clone(), logs.count("can be used again")), (None, 1));
    recovery.shutdown().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn f46_an_unusable_entry_keeps_its_key() {
    let (logs, _guard) = Logs::capture();
    let files = Files::with("alpha|sk-1\nbeta|sk-2\ngamma|sk-3\n");
    let pool = built(KeyFile::new(files.path())).await;
    let recovery = RecoveryHandle::spawn(&pool);
    files.replace("alpha|sk 1\t\nbeta|sk-4\ndelta|sk-4\n");
    sleep(10 * MINUTE).await;
    assert_eq!(keys(&pool), pairs([("alpha", "sk-1"), ("beta", "sk-4")]));
    let rejected = &pool.sources()[0].rejected;
    assert!(
        rejected.len() == 2 && rejected.iter().any(|entry| entry.contains("key alpha: ")),
        "{rejected:?}"
    );
    files.replace("alpha|sk 1\t\nbeta|sk-4\ndelta|sk-4\n\n");
    looks().await;
    assert_eq!(logs.count("key rejected"), 2);
    recovery.shutdown().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn f46_a_half_written_file_is_not_read() {
    let files = Files::with("alpha|sk-1\nbeta|sk-2\n");
    let pool = built(KeyFile::new(files.path())).await;
    let recovery = RecoveryHandle::spawn(&pool);
    let mut text = String::new();
    for line in ["alpha|sk-1\n", "gamma|sk-3\n", "delta|sk-4\n", "epsilon|sk-5\n"] {
        text += line;
        fs::write(files.path(), &text).unwrap();
        sleep(SECOND).await;
        assert_eq!(keys(&pool), pairs([("alpha", "sk-1"), ("beta", "sk-2")]));
    }
    looks().await;
    assert_eq!(keys(&pool).len(), 4);
    recovery.shutdown().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_key_may_get_the_secret_of_one_that_goes() {
    let files = Files::with("alpha|sk-1\nbeta|sk-2\n");
    let pool = built(KeyFile::new(files.path())).await;
    let recovery = RecoveryHandle::spawn(&pool);
    files.replace("gamma|sk-1\nbeta|sk-3\n");
    looks().await;
    assert_eq!(keys(&pool), pairs([("beta", "sk-3"), ("gamma", "sk-1")]));
    recovery.shutdown().await.unwrap();
}

#[tokio::test]
async fn sources_that_cannot_be_read_at_the_start_are_errors() {
    let missing = KeyPool::builder().source(KeyFile::new("/no/such/file")).await.unwrap_err();
    assert_eq!(missing.to_string(), "/no/such/file could not be read as a source of keys");
    let directory = TempDir::new().unwrap();
    fs::write(directory.path().join(".hidden"), "sk-1").unwrap();
    let empty = KeyPool::builder().source(KeyDirectory::new(directory.path())).await.unwrap_err();
    assert!(all_that_it_says(&empty).contains("the source has no key"), "{empty:?}");
    let variable = KeyPool::builder().source(KeyVariable::new("NO_SUCH_VARIABLE")).await.unwrap_err();
    assert!(all_that_it_says(&variable).contains("the variable is not set"), "{variable:?}");
    // Cargo sets it: its only entry has no id.
    let bare = KeyPool::builder().source(KeyVariable::new("CARGO_PKG_NAME")).await.unwrap();
    assert_eq!(bare.build().unwrap().rejected()[0].to_string(), "CARGO_PKG_NAME, entry 1: the key has no id");
    let bare = KeyPool::builder().source(KeyVariable::new("CARGO_PKG_NAME")).await.unwrap();
    assert!(bare.strict().build().is_err());
}

#[tokio::test(start_paused = true)]
async fn a_closure_is_called_at_its_interval() {
    for (interval, calls_in_an_hour) in [(None, 0), (Some(10 * MINUTE), 5)] {
        let calls = Arc::new(AtomicUsize::new(0));
        let read = {
            let calls = calls.clone();
            move || {
                future::ready(Ok::<_, BoxError>(spec("alpha", &format!("sk-{}", calls.fetch_add(1, SeqCst)))))
            }
        };
        let source = source::from_fn("closure", read);
        let source = if let Some(interval) = interval { source.interval(interval) } else { source };
        let pool = built(source).await;
        let recovery = RecoveryHandle::spawn(&pool);
        sleep(55 * MINUTE).await;
        assert_eq!(calls.load(SeqCst), 1 + calls_in_an_hour);
        assert_eq!(keys(&pool), pairs([("alpha", &*format!("sk-{calls_in_an_hour}"))]));
        recovery.shutdown().await.unwrap();
    }
}

/// A source that a test changes, and lets fail.
#[derive(Clone, Debug)]
struct Told {
    answer: Arc<Mutex<Answering>>,
    reads: Arc<AtomicUsize>,
    changed: Arc<Notify>,
}

#[derive(Clone, Debug)]
enum Answering {
    Keys(KeySet),
    /// A new token at each read.
    Tokens(Duration),
    Fails(&'static str),
    Panics,
    Hangs,
}

impl Told {
    fn new(answer: Answering) -> Self {
        Self { answer: Arc::new(Mutex::new(answer)), reads: Arc::default(), changed: Arc::default() }
    }

    fn keys<const N: usize>(keys: [(&str, &str); N]) -> Answering {
        Answering::Keys(keys.map(|(id, secret)| spec(id, secret)).to_vec().into())
    }

    /// Tells nobody.
    fn set(&self, answer: Answering) {
        *self.answer.lock().unwrap() = answer;
    }

    async fn tell(&self, answer: Answering) {
        self.set(answer);
        self.changed.notify_one();
        sleep(SECOND / 2).await;
    }

    fn reads(&self) -> usize {
        self.reads.load(SeqCst)
    }
}

impl KeySource for Told {
    fn name(&self) -> std::borrow::Cow<'_, str> {
        "told".into()
    }

    fn read(&self) -> source::SourceFuture<'_, Result<KeySet, source::SourceError>> {
        Box::pin(async {
            let read = self.reads.fetch_add(1, SeqCst) + 1;
            // As a service that issues tokens.
            sleep(SECOND / 10).await;
            let answer = self.answer.lock().unwrap().clone();
            match answer {
                Answering::Keys(keys) => Ok(keys),
                Answering::Tokens(life) => {
                    Ok(SourcedKey::from(spec("alpha", &format!("token-{read}"))).expires_in(life).into())
                }
                Answering::Fails(why) => Err(source::SourceError::new(why)),
                Answering::Panics => panic!("with sk-secret"),
                Answering::Hangs => future::pending().await,
            }
        })
    }

    fn changed(&self) -> source::SourceFuture<'_, ()> {
        Box::pin(self.changed.notified())
    }
}

#[tokio::test(start_paused = true)]
async fn reads_that_panic_or_hang_are_failures() {
    let source = Told::new(Told::keys([("alpha", "sk-1")]));
    let pool = built(source.clone()).await;
    let recovery = RecoveryHandle::spawn(&pool);
    for (answer, error) in [
        (Answering::Panics, "the source could not be read: the read panicked"),
        (Answering::Hangs, "the source could not be read within 30s"),
        (Answering::Fails("closed"), "the source could not be read: closed"),
    ] {
        source.tell(answer).await;
        sleep(MINUTE).await;
        assert_eq!(pool.sources()[0].error.as_deref(), Some(error));
        assert_eq!(keys(&pool), pairs([("alpha", "sk-1")]));
    }
    // Without a word, a failed read is repeated.
    source.set(Told::keys([("alpha", "sk-2")]));
    sleep(MINUTE).await;
    assert_eq!((keys(&pool), pool.sources()[0].error.clone()), (pairs([("alpha", "sk-2")]), None));
    recovery.shutdown().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn operators_changes_stay_until_the_source_changes() {
    let source =
        Told::new(Told::keys([("alpha", "sk-1"), ("beta", "sk-2"), ("gamma", "sk-3"), ("delta", "sk-4")]));
    for store in [None, Some(MemoryStore::new())] {
        source.set(Told::keys([("alpha", "sk-1"), ("beta", "sk-2"), ("gamma", "sk-3"), ("delta", "sk-4")]));
        let builder = KeyPool::builder().source(source.clone()).await.unwrap();
        let pool = match store.clone() {
            Some(store) => builder.open(store).await.unwrap(),
            None => builder.build().unwrap(),
        };
        let recovery = RecoveryHandle::spawn(&pool);
        pool.insert("own", "sk-9").await.unwrap();
        pool.remove("alpha").await.unwrap();
        pool.remove("beta").await.unwrap();
        pool.replace(spec("gamma", "sk-8")).await.unwrap();
        pool.disable("delta").await.unwrap();

        source
            .tell(Told::keys([("alpha", "sk-1"), ("beta", "sk-7"), ("gamma", "sk-3"), ("delta", "sk-4")]))
            .await;
        let now = [("beta", "sk-7"), ("delta", "sk-4"), ("gamma", "sk-8"), ("own", "sk-9")];
        assert_eq!(keys(&pool), pairs(now), "{store:?}");
        assert_eq!(stats_of(&pool, "delta").status, Status::Disabled);

        source.tell(Told::keys([("alpha", "sk-1"), ("beta", "sk-7"), ("gamma", "sk-6")])).await;
        assert_eq!(keys(&pool), pairs([("beta", "sk-7"), ("gamma", "sk-6"), ("own", "sk-9")]), "{store:?}");
        if let Some(store) = store {
            let other = KeyPool::builder().open(store).await.unwrap();
            assert_eq!(keys(&other), keys(&pool));
        }
        recovery.shutdown().await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn processes_over_one_store_make_a_change_once() {
    let store = MemoryStore::new();
    let source = || Told::new(Told::keys([("alpha", "sk-1"), ("beta", "sk-2")]));
    let (here, there) = (source(), source());
    let open = async |source: &Told| {
        KeyPool::builder().source(source.clone()).await.unwrap().open(store.clone()).await.unwrap()
    };
    let pools = [open(&here).await, open(&there).await];
    let recoveries = pools.each_ref().map(RecoveryHandle::spawn);
    here.tell(Told::keys([("alpha", "sk-3"), ("gamma", "sk-4")])).await;
    rest(&pools[0], "alpha");
    sleep(SECOND).await;
    there.tell(Told::keys([("alpha", "sk-3"), ("gamma", "sk-4")])).await;
    for pool in &pools {
        assert_eq!(keys(pool), pairs([("alpha", "sk-3"), ("gamma", "sk-4")]));
        assert_eq!(stats_of(pool, "alpha").status, Status::RateLimited, "it was replaced again");
        assert_eq!(pool.sources()[0].error, None);
    }
    for recovery in recoveries {
        recovery.shutdown().await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn the_stores_key_counts_at_the_start() {
    let store = MemoryStore::new();
    KeyPool::builder().key("alpha", "sk-1").key("other", "sk-2").open(store.clone()).await.unwrap();
    let source = Told::new(Told::keys([("alpha", "sk-3"), ("beta", "sk-2"), ("gamma", "sk-4")]));
    let pool = KeyPool::builder().source(source.clone()).await.unwrap().open(store).await.unwrap();
    let recovery = RecoveryHandle::spawn(&pool);
    assert_eq!(keys(&pool), pairs([("alpha", "sk-1"), ("gamma", "sk-4"), ("other", "sk-2")]));
    // The store has beta under another id, and there it goes.
    source.tell(Told::keys([("alpha", "sk-5"), ("gamma", "sk-4")])).await;
    assert_eq!(keys(&pool), pairs([("alpha", "sk-5"), ("gamma", "sk-4")]));
    recovery.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_file_forgets_keys_that_left_their_source() {
    let (directory, files) = (TempDir::new().unwrap(), Files::with("alpha|sk-1\nbeta|sk-2\n"));
    let open = async || {
        let source = KeyFile::new(files.path()).interval(SECOND / 100);
        let store = FileStore::open(directory.path().join("keys.redb")).unwrap();
        KeyPool::builder().source(source).await.unwrap().open(store).await.unwrap()
    };
    let pool = open().await;
    let recovery = RecoveryHandle::spawn(&pool);
    pool.insert("own", "sk-9").await.unwrap();
    rest(&pool, "beta");
    files.replace("alpha|sk-1\nbeta|sk-2\ngamma|sk-3\n");
    eventually("gamma is new", || keys(&pool).len() == 4).await;
    eventually("it is noted", || pool.sources()[0].since_change.is_some()).await;
    recovery.shutdown().await.unwrap();
    drop(pool);

    // While no process runs.
    files.replace("beta|sk-2\n");
    let pool = open().await;
    assert_eq!(keys(&pool), pairs([("beta", "sk-2"), ("own", "sk-9")]));
    assert_eq!(stats_of(&pool, "beta").status, Status::RateLimited);
}

#[tokio::test(start_paused = true)]
async fn changes_are_made_when_the_store_is_back() {
    let store = FaultyStore::new(&ManualClock::new());
    let source = Told::new(Told::keys([("alpha", "sk-1"), ("beta", "sk-2")]));
    let pool = KeyPool::builder().source(source.clone()).await.unwrap().open(store.clone()).await.unwrap();
    let recovery = RecoveryHandle::spawn_with(&pool, passes_by_hand());
    store.operators.set(Mode::Fails);
    source.tell(Told::keys([("alpha", "sk-3"), ("gamma", "sk-4")])).await;
    sleep(MINUTE).await;
    assert_eq!(keys(&pool), pairs([("alpha", "sk-1"), ("beta", "sk-2")]));
    assert!(pool.sources()[0].error.as_ref().is_some_and(|error| error.contains("store")));
    store.operators.set(Mode::Works);
    sleep(2 * MINUTE).await;
    assert_eq!(keys(&pool), pairs([("alpha", "sk-3"), ("gamma", "sk-4")]));
    assert_eq!(pool.sources()[0].error, None);
    recovery.shutdown().await.unwrap();
}

// ---- secrets that expire ----

const HOUR: Duration = Duration::from_secs(3600);

async fn token_pool(
    source: &Told,
    build: impl FnOnce(KeyPoolBuilder) -> KeyPoolBuilder,
) -> (KeyPool, RecoveryHandle) {
    let pool = build(KeyPool::builder().source(source.clone()).await.unwrap()).build().unwrap();
    let recovery = RecoveryHandle::spawn(&pool);
    (pool, recovery)
}

async fn open(
    source: &Told,
    store: Option<&MemoryStore>,
    build: impl FnOnce(KeyPoolBuilder) -> KeyPoolBuilder,
) -> KeyPool {
    let builder = build(KeyPool::builder().source(source.clone()).await.unwrap());
    match store {
        Some(store) => builder.open(store.clone()).await.unwrap(),
        None => builder.build().unwrap(),
    }
}

fn secret_now(pool: &KeyPool) -> Option<String> {
    pool.lease(&Traits::new()).ok().map(|key| key.secret().expose().to_owned())
}

#[tokio::test(start_paused = true)]
async fn f47_a_secret_is_renewed_before_it_expires() {
    let source = Told::new(Answering::Tokens(HOUR));
    let (pool, recovery) = token_pool(&source, |builder| builder).await;
    for reads in 1..=5 {
        assert_eq!(secret_now(&pool), Some(format!("token-{reads}")));
        let began = Instant::now();
        while source.reads() == reads {
            sleep(SECOND).await;
        }
        let life = began.elapsed();
        assert!(life > HOUR * 74 / 100 && life < HOUR * 91 / 100, "renewed after {life:?}");
        sleep(SECOND).await;
        assert!(pool.sources()[0].expires_in.unwrap() > HOUR - 3 * SECOND);
    }
    recovery.shutdown().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn f47_an_unexpired_secret_serves_while_renewals_fail() {
    let (logs, _guard) = Logs::capture();
    let source = Told::new(Answering::Tokens(HOUR));
    let (pool, recovery) = token_pool(&source, |builder| builder).await;
    source.set(Answering::Fails("closed"));
    sleep(HOUR * 99 / 100).await;
    assert_eq!(secret_now(&pool).as_deref(), Some("token-1"));
    let reads = source.reads();
    assert!(reads > 5 && reads < 60, "{reads} reads");
    assert_eq!(logs.count("the source could not be used"), 1);
    source.set(Answering::Tokens(HOUR));
    sleep(MINUTE).await;
    assert_eq!(secret_now(&pool), Some(format!("token-{}", source.reads())));
    recovery.shutdown().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn f47_an_expired_secret_is_not_sent() {
    for store in [None, Some(MemoryStore::new())] {
        let source = Told::new(Answering::Tokens(20 * SECOND));
        let pool = open(&source, store.as_ref(), |builder| builder).await;
        let recovery = RecoveryHandle::spawn(&pool);
        assert_eq!(secret_now(&pool).as_deref(), Some("token-1"));
        // A read that never ends is no better than one that fails.
        source.set(if store.is_some() { Answering::Hangs } else { Answering::Fails("closed") });
        sleep(19 * SECOND).await;
        assert_eq!(secret_now(&pool).as_deref(), Some("token-1"));
        sleep(SECOND).await;
        assert_eq!(secret_now(&pool), None, "{store:?}");
        for _ in 0..20 {
            sleep(MINUTE).await;
            assert_eq!(secret_now(&pool), None, "{store:?}");
        }
        assert_eq!((pool.sources()[0].expired, pool.sources()[0].expires_in), (1, Some(Duration::ZERO)));
        source.set(Answering::Tokens(HOUR));
        sleep(2 * MINUTE).await;
        assert_eq!(secret_now(&pool), Some(format!("token-{}", source.reads())), "{store:?}");
        assert_eq!((pool.sources()[0].expired, stats_of(&pool, "alpha").requests), (0, 3));
        sleep(10 * MINUTE).await;
        assert_eq!(secret_now(&pool), Some(format!("token-{}", source.reads())), "{store:?}");
        recovery.shutdown().await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn f47_a_restarted_process_sends_no_old_secret() {
    let store = MemoryStore::new();
    let source = Told::new(Answering::Tokens(HOUR));
    for reads in 1..=2 {
        let pool =
            KeyPool::builder().source(source.clone()).await.unwrap().open(store.clone()).await.unwrap();
        assert_eq!(secret_now(&pool), Some(format!("token-{reads}")));
    }
}

#[tokio::test(start_paused = true)]
async fn f47_a_renewed_key_goes_on_where_it_stood() {
    for store in [None, Some(MemoryStore::new())] {
        let source = Told::new(Answering::Tokens(HOUR));
        let quota = |builder: KeyPoolBuilder| builder.quota(Quota::per_day(10).window());
        let pool = open(&source, store.as_ref(), quota).await;
        let recovery = RecoveryHandle::spawn(&pool);
        for _ in 0..4 {
            pool.lease(&Traits::new()).unwrap().answered_with(Verdict::Nothing);
        }
        sleep(HOUR).await;
        assert_eq!(keys(&pool), pairs([("alpha", "token-2")]));
        let left = pool.explain(&Traits::new()).keys[0].budgets[0].left;
        assert_eq!((left, stats_of(&pool, "alpha").requests), (6.0, 4));

        let lease = pool.lease(&Traits::new()).unwrap();
        lease.answered_with(Verdict::Exhausted { wait: Some(3 * HOUR) });
        sleep(HOUR).await;
        assert_eq!(keys(&pool), pairs([("alpha", "token-3")]));
        assert_eq!(stats_of(&pool, "alpha").status, Status::Exhausted);
        if let Some(store) = &store {
            let other = KeyPool::builder().open(store.clone()).await.unwrap();
            assert_eq!(stats_of(&other, "alpha").status, Status::Exhausted);
        }
        sleep(2 * HOUR + 2 * MINUTE).await;
        assert_eq!(stats_of(&pool, "alpha").status, Status::Healthy);
        recovery.shutdown().await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn f47_a_renewed_key_is_no_longer_revoked() {
    let store = MemoryStore::new();
    let source = Told::new(Answering::Tokens(HOUR));
    let pool = open(&source, Some(&store), |builder| builder.key("beta", "sk-2")).await;
    let recovery = RecoveryHandle::spawn(&pool);
    sleep(SECOND).await;
    let lease = pool.lease(&Traits::new().key(id("alpha"))).unwrap();
    lease.answered_with(Verdict::Revoked);
    assert_eq!(stats_of(&pool, "alpha").status, Status::Revoked);
    sleep(SECOND).await;
    assert_eq!(stats_of(&pool, "alpha").status, Status::Healthy);
    // The store had the mark by then.
    sleep(2 * MINUTE).await;
    assert_eq!(stats_of(&pool, "alpha").status, Status::Healthy);
    let other = KeyPool::builder().open(store).await.unwrap();
    assert_eq!(stats_of(&other, "alpha").status, Status::Healthy);
    recovery.shutdown().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn f47_a_hanging_store_keeps_no_expired_secret() {
    let store = FaultyStore::new(&ManualClock::new());
    let with_token = |token: &str, others: &[KeySpec]| {
        let token = SourcedKey::from(spec("alpha", token)).expires_in(HOUR);
        let others = others.iter().cloned().map(SourcedKey::from);
        Answering::Keys([token].into_iter().chain(others).collect::<Vec<_>>().into())
    };
    let source = Told::new(with_token("token-1", &[]));
    let pool = KeyPool::builder().source(source.clone()).await.unwrap().open(store.clone()).await.unwrap();
    let recovery = RecoveryHandle::spawn_with(&pool, passes_by_hand());
    store.operators.set(Mode::Hangs);
    let beta = [spec("beta", "sk-2")];
    source.tell(with_token("token-1", &beta)).await;
    sleep(HOUR - SECOND).await;
    assert_eq!(secret_now(&pool).as_deref(), Some("token-1"));
    sleep(2 * SECOND).await;
    assert_eq!(secret_now(&pool), None);
    source.set(with_token("token-2", &beta));
    store.operators.set(Mode::Works);
    sleep(2 * MINUTE).await;
    assert_eq!(keys(&pool), pairs([("alpha", "token-2"), ("beta", "sk-2")]));
    recovery.shutdown().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_removed_key_is_not_renewed() {
    let source = Told::new(Answering::Tokens(HOUR));
    let (pool, recovery) = token_pool(&source, |builder| builder).await;
    pool.remove("alpha").await.unwrap();
    sleep(3 * HOUR).await;
    assert_eq!(keys(&pool), []);
    recovery.shutdown().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_expired_key_follows_its_source() {
    let without_life = Told::keys([("alpha", "sk-1"), ("beta", "sk-2")]);
    for (now, expected) in [
        (Told::keys([("beta", "sk-2")]), pairs([("beta", "sk-2")])),
        (without_life, pairs([("alpha", "sk-1"), ("beta", "sk-2")])),
    ] {
        let store = MemoryStore::new();
        let source = Told::new(Answering::Tokens(20 * SECOND));
        let pool = open(&source, Some(&store), |builder| builder).await;
        let recovery = RecoveryHandle::spawn(&pool);
        source.set(Answering::Fails("closed"));
        sleep(MINUTE).await;
        assert_eq!(keys(&pool), []);
        source.tell(now).await;
        sleep(5 * MINUTE).await;
        assert_eq!((keys(&pool), pool.sources()[0].error.clone()), (expected.clone(), None));
        assert_eq!(keys(&KeyPool::builder().open(store).await.unwrap()), expected);
        recovery.shutdown().await.unwrap();
    }
}

/// A service that accepts some secrets, and answers 401 to all others.
#[derive(Clone, Debug, Default)]
struct Accepting {
    secrets: Arc<Mutex<Vec<String>>>,
    seen: Arc<Mutex<Vec<String>>>,
}

impl Accepting {
    fn these<const N: usize>(secrets: [&str; N]) -> Self {
        let service = Self::default();
        service.secrets.lock().unwrap().extend(secrets.map(str::to_owned));
        service
    }

    async fn answer(self, request: Request<String>) -> Result<Response<String>, std::io::Error> {
        let secret =
            request.headers()["authorization"].to_str().unwrap().strip_prefix("Bearer ").unwrap().to_owned();
        let is_accepted = self.secrets.lock().unwrap().contains(&secret);
        self.seen.lock().unwrap().push(secret);
        sleep(SECOND / 10).await;
        Ok(Response::builder().status(if is_accepted { 200 } else { 401 }).body(String::new()).unwrap())
    }

    fn seen(&self) -> Vec<String> {
        std::mem::take(&mut self.seen.lock().unwrap())
    }

    fn client(
        &self,
    ) -> impl Service<
        Request<String>,
        Response = Response<String>,
        Error = std::io::Error,
        Future: Send + 'static,
    > + Clone
    + Send
    + 'static {
        let this = self.clone();
        service_fn(move |request| this.clone().answer(request))
    }
}

type Client = BoxCloneService<Request<String>, u16, BoxError>;

/// With a retry budget that is never used up.
fn fails_over() -> Failover {
    Failover::attempts(3).budget(TpsBudget::new(10 * SECOND, 1_000, 100.0))
}

fn failing_over(
    pool: &KeyPool,
    service: &Accepting,
    classifier: impl ClassifyResponse + Clone + Send + Sync + 'static,
) -> Client {
    let client =
        KeyRotationLayer::new(pool).classify(classifier).failover(fails_over()).layer(service.client());
    BoxCloneService::new(client.map_response(|response| response.status().as_u16()).map_err(Into::into))
}

async fn ask(client: &Client) -> u16 {
    let request = Request::post("https://api.example.com").body("ask".to_owned()).unwrap();
    client.clone().oneshot(request).await.unwrap()
}

#[tokio::test(start_paused = true)]
async fn f47_all_requests_share_one_read_after_401s() {
    let source = Told::new(Answering::Tokens(HOUR));
    let (pool, recovery) = token_pool(&source, |builder| builder).await;
    let service = Accepting::these(["token-2"]);
    let client = failing_over(&pool, &service, TooManyRequests::new());
    sleep(SECOND).await;
    let asked = (0..500).map(|_| ask(&client));
    let statuses = join_all(asked).await;
    assert!(statuses.iter().all(|status| *status == 200));
    assert_eq!(source.reads(), 2);
    let seen = service.seen();
    let of = |secret: &str| seen.iter().filter(|seen| *seen == secret).count();
    assert_eq!((of("token-1"), of("token-2"), seen.len()), (500, 500, 1_000));
    recovery.shutdown().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn f47_an_old_secrets_401_counts_against_nothing() {
    let (logs, _guard) = Logs::capture();
    let files = Files::with("alpha|sk-1\nbeta|sk-2\n");
    // Nobody looks at the file in this test.
    let pool = built(KeyFile::new(files.path()).interval(24 * HOUR)).await;
    let recovery = RecoveryHandle::spawn(&pool);
    let service = Accepting::these(["sk-2", "sk-3"]);
    let client = failing_over(&pool, &service, ByStatus);
    files.replace("alpha|sk-3\nbeta|sk-2\n");
    sleep(SECOND).await;
    assert_eq!(ask(&client).await, 200);
    assert_eq!(service.seen().len(), 2);
    for key in pool.stats().keys {
        assert_eq!((key.status, key.limited), (Status::Healthy, 0), "{}", key.id);
    }
    assert_eq!(logs.count("key rests"), 0);
    assert_eq!(keys(&pool), pairs([("alpha", "sk-3"), ("beta", "sk-2")]));
    recovery.shutdown().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn f47_401s_without_end_cause_few_reads() {
    let source = Told::new(Answering::Tokens(HOUR));
    let (pool, recovery) = token_pool(&source, |builder| builder).await;
    let service = Accepting::default();
    let client = failing_over(&pool, &service, TooManyRequests::new());
    for _ in 0..100 {
        assert_eq!(ask(&client).await, 401);
        sleep(SECOND).await;
    }
    let (reads, sent) = (source.reads(), service.seen().len());
    assert!((8..=14).contains(&reads), "{reads} reads");
    assert_eq!(sent, 100 + reads - 1, "one more attempt after each read");

    // A source that fails is no better.
    source.set(Answering::Fails("closed"));
    sleep(MINUTE).await;
    let (reads, _) = (source.reads(), service.seen());
    for _ in 0..20 {
        assert_eq!(ask(&client).await, 401);
    }
    assert_eq!(service.seen().len(), 20);
    assert!(source.reads() - reads <= 4, "{} reads", source.reads() - reads);
    recovery.shutdown().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn f47_an_unchanged_key_is_judged_after_its_401() {
    let source = Told::new(Told::keys([("alpha", "sk-1"), ("beta", "sk-2")]));
    let pool = built(source.clone()).await;
    let recovery = RecoveryHandle::spawn(&pool);
    let service = Accepting::these(["sk-2"]);
    let client = failing_over(&pool, &service, ByStatus);
    sleep(SECOND).await;
    assert_eq!(ask(&client).await, 200);
    assert_eq!((source.reads(), stats_of(&pool, "alpha").status), (2, Status::Revoked));
    recovery.shutdown().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn f47_a_401_without_a_follower_waits_for_nothing() {
    let source = Told::new(Answering::Tokens(HOUR));
    let pool = built(source.clone()).await;
    let service = Accepting::default();
    let client = failing_over(&pool, &service, TooManyRequests::new());
    let began = Instant::now();
    assert_eq!((ask(&client).await, source.reads()), (401, 1));
    let recovery = RecoveryHandle::spawn(&pool);
    sleep(SECOND).await;
    // A follower that ends releases the requests that wait.
    source.set(Answering::Hangs);
    let (status, shut_down) = tokio::join!(ask(&client), async {
        sleep(SECOND).await;
        recovery.shutdown().await
    });
    shut_down.unwrap();
    assert_eq!(status, 401);
    assert!(began.elapsed() < 4 * SECOND, "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn f47_without_failover_the_next_request_succeeds() {
    let source = Told::new(Answering::Tokens(HOUR));
    let (pool, recovery) = token_pool(&source, |builder| builder.key("beta", "sk-2")).await;
    let service = Accepting::these(["sk-2", "token-2"]);
    let client = KeyRotationLayer::new(&pool).classify(ByStatus).layer(service.client());
    sleep(SECOND).await;
    let mut statuses = Vec::new();
    for _ in 0..4 {
        let request = Request::post("https://api.example.com").body("ask".to_owned()).unwrap();
        statuses.push(client.clone().oneshot(request).await.unwrap().status().as_u16());
        sleep(SECOND).await;
    }
    assert_eq!(statuses, [401, 200, 200, 200]);
    assert_eq!((source.reads(), stats_of(&pool, "alpha").status), (2, Status::Healthy));
    recovery.shutdown().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn f47_leases_go_on_with_the_new_secret() {
    for verdict in [Verdict::Revoked, Verdict::Refused] {
        let source = Told::new(Answering::Tokens(HOUR));
        let (pool, recovery) = token_pool(&source, |builder| builder).await;
        sleep(SECOND).await;
        let request = |key: KeyLease| async move {
            let is_new = key.secret().expose() != "token-1";
            let (status, verdict) = if is_new { (200, Verdict::Nothing) } else { (401, verdict) };
            let headers = HeaderMap::new();
            let head = ResponseHead::new(StatusCode::from_u16(status).unwrap(), &headers);
            key.answered_by(&move |_: &ResponseHead<'_>| verdict, &head);
            if is_new { Ok(()) } else { Err("unauthorized") }
        };
        KeyLeases::new(&pool).with_key(&Traits::new(), request).await.unwrap();
        assert_eq!((source.reads(), stats_of(&pool, "alpha").status), (2, Status::Healthy));
        recovery.shutdown().await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_401_of_another_pools_key_reads_no_source() {
    let source = Told::new(Answering::Tokens(HOUR));
    let (outer, recovery) = token_pool(&source, |builder| builder).await;
    let inner = KeyPool::builder().keys([("alpha", "sk-1"), ("beta", "sk-2")]).build().unwrap();
    let service = Accepting::default();
    let client = KeyRotationLayer::new(&inner).classify(ByStatus).layer(service.client());
    let client = KeyRotationLayer::new(&outer).failover(fails_over()).layer(client);
    sleep(SECOND).await;
    let request = Request::post("https://api.example.com").body("ask".to_owned()).unwrap();
    assert_eq!(client.oneshot(request).await.unwrap().status(), 401);
    assert_eq!((source.reads(), service.seen()), (1, vec!["sk-1".to_owned()]));
    recovery.shutdown().await.unwrap();
}
