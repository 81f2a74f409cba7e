//! Keys in a file: restarts, processes that are killed, files that can't be used, and clocks that are set.

mod support;

use std::{
    collections::BTreeMap,
    env, fs,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    thread,
    time::{Duration, UNIX_EPOCH},
};

use proptest::prelude::*;
use support::{MINUTE, SECOND, all_that_it_says, eventually, passes_by_hand};
use tempfile::TempDir;
use tokio::{runtime, task::JoinSet};
use tower_key_rotation::{
    KeyId, KeyPool, KeySpec, Quota, RecoveryHandle, Rest, Status, Traits,
    classify::Verdict,
    clock::ManualClock,
    store::{
        Born, DataKeys, KeyRecord, KeyStore, Mark, MemoryStore, Operation, Resting, Scope, Standing, Until,
        Usage, Words,
        file::{FileStore, OpenError},
    },
};

const HOUR: Duration = Duration::from_secs(60 * 60);

fn id(name: &str) -> KeyId {
    KeyId::new(name).unwrap()
}

fn spec(name: &str, secret: &str) -> KeySpec {
    KeySpec::new(id(name), secret)
}

fn resting(left: Duration, reason: Rest) -> Resting {
    Resting { until: Until::After(left), reason }
}

fn limited(left: Duration) -> Words {
    Words { key: Some(resting(left, Rest::RateLimited)), ..Words::default() }
}

/// A directory with room for one file, and a clock that shows a time since 1970.
struct Place {
    directory: TempDir,
    clock: ManualClock,
}

impl Place {
    fn new() -> Self {
        let place = Self { directory: TempDir::new().unwrap(), clock: ManualClock::new() };
        place.set_wall(1_000_000 * HOUR);
        place
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("keys.redb")
    }

    fn try_open(&self) -> Result<FileStore, OpenError> {
        FileStore::builder().clock(self.clock.clone()).open(self.path())
    }

    fn open(&self) -> FileStore {
        self.try_open().unwrap()
    }

    fn set_wall(&self, since_1970: Duration) {
        self.clock.set_wall(UNIX_EPOCH + since_1970);
    }

    /// A pool that a process opens.
    async fn pool<const N: usize>(&self, keys: [(&str, &str); N]) -> KeyPool {
        KeyPool::builder().keys(keys).clock(self.clock.clone()).open(self.open()).await.unwrap()
    }

    /// The error of an opening that must not change the file.
    fn refused(&self) -> String {
        let before = fs::read(self.path()).unwrap();
        let error = self.try_open().unwrap_err();
        assert!(fs::read(self.path()).unwrap() == before, "the file was changed");
        assert_eq!(fs::read_dir(self.directory.path()).unwrap().count(), 1, "there is another file");
        let text = all_that_it_says(&error);
        assert!(text.contains(self.path().to_str().unwrap()), "{text}");
        text
    }
}

async fn insert(store: &FileStore, name: &str) -> Standing {
    let operation = Operation::Insert(spec(name, &format!("sk-{name}")));
    store.operate(id(name), operation).await.unwrap().unwrap()
}

async fn standing(store: &impl KeyStore, name: &str) -> Standing {
    record(store, name).await.unwrap().standing
}

async fn record(store: &impl KeyStore, name: &str) -> Option<KeyRecord> {
    store.load(Some(&[id(name)])).await.unwrap().records.pop()
}

async fn left(store: &impl KeyStore, name: &str) -> Option<Duration> {
    let Until::After(left) = standing(store, name).await.words.key?.until else { return Some(Duration::MAX) };
    Some(left)
}

fn statuses(pool: &KeyPool) -> BTreeMap<String, Status> {
    pool.stats().keys.into_iter().map(|key| (key.id.to_string(), key.status)).collect()
}

// ---- restarts ----

#[tokio::test]
async fn keys_rests_and_usage_survive_a_restart() {
    let place = Place::new();
    let mut described = spec("alpha", "sk-1");
    described.group = Some("organisation".into());
    described.tier = Some(2);
    described.weight = 3.try_into().ok();
    described.max_in_flight = 4.try_into().ok();
    described.endpoint = Some("https://eu.example.com".into());
    let store = place.open();
    let born = store.operate(id("alpha"), Operation::Insert(described.clone())).await.unwrap().unwrap().born;
    insert(&store, "beta").await;
    insert(&store, "gamma").await;
    let mut words = limited(MINUTE);
    words.scopes.insert(Scope::new("gpt-5").unwrap(), resting(2 * HOUR, Rest::Exhausted));
    let revoked = Resting { until: Until::Reset, reason: Rest::Revoked };
    words.scopes.insert(Scope::new("sora").unwrap(), revoked);
    store.merge(Mark::new(id("alpha"), born, words.clone())).await.unwrap().unwrap();
    store.operate(id("beta"), Operation::Reset(None)).await.unwrap().unwrap();
    store.operate(id("beta"), Operation::Disable).await.unwrap().unwrap();
    store.add_usage(vec![Usage::new(id("alpha"), 3, 500), Usage::new(id("nobody"), 1, 1)]).await.unwrap();
    store.operate(id("gamma"), Operation::Remove).await.unwrap().unwrap();
    drop(store);

    let store = place.open();
    store.add_usage(vec![Usage::new(id("alpha"), 1, u64::MAX)]).await.unwrap();
    assert_eq!(store.usage().await.unwrap(), [Usage::new(id("alpha"), 4, u64::MAX)]);
    let alpha = record(&store, "alpha").await.unwrap();
    assert_eq!(alpha, KeyRecord::new(described, Standing::new(born, words, false)));
    let beta = standing(&store, "beta").await;
    assert_eq!((beta.words.generation, beta.disabled), (1, true));
    assert_eq!(store.load(None).await.unwrap().records.len(), 2);
}

#[tokio::test]
async fn f45_a_mark_is_written_right_after_its_response() {
    let place = Place::new();
    let store = place.open();
    let builder = KeyPool::builder().keys([("alpha", "sk-1"), ("beta", "sk-2")]);
    let pool = builder.clock(place.clock.clone()).open(store.clone()).await.unwrap();
    let recovery = RecoveryHandle::spawn_with(&pool, passes_by_hand());
    for _ in 0..2 {
        pool.lease(&Traits::new()).unwrap().answered_with(Verdict::RateLimited { wait: Some(HOUR) });
        eventually("the mark is written", || pool.stats().marks_waiting == 0).await;
        // The pause between two rounds.
        place.clock.advance(SECOND / 100);
    }
    for name in ["alpha", "beta"] {
        assert!(left(&store, name).await > Some(59 * MINUTE), "{name}");
    }
    // As if the process were killed now.
    let other = Place::new();
    fs::copy(place.path(), other.path()).unwrap();
    let pool = other.pool([]).await;
    assert_eq!(pool.stats().rate_limited, 2);
    assert!(pool.lease(&Traits::new()).is_err());
    drop(recovery);
}

#[tokio::test]
async fn a_sweep_drops_the_rests_that_have_ended() {
    let place = Place::new();
    let store = place.open();
    let alpha = insert(&store, "alpha").await;
    insert(&store, "beta").await;
    let mut words = limited(MINUTE);
    words.scopes.insert(Scope::new("gpt-5").unwrap(), resting(HOUR, Rest::Exhausted));
    store.merge(Mark::new(id("alpha"), alpha.born, words)).await.unwrap().unwrap();
    assert_eq!(store.sweep().await.unwrap().count, 0);
    place.clock.advance(2 * MINUTE);
    let recovered = store.sweep().await.unwrap();
    assert_eq!((recovered.count, recovered.ids), (1, vec![id("alpha")]));
    assert_eq!(store.sweep().await.unwrap().count, 0);
    let words = standing(&store, "alpha").await.words;
    assert_eq!((words.key, words.scopes.len()), (None, 1));
}

// ---- clocks ----

/// What is left of a rest of an hour after a restart that takes 10 minutes, 20 minutes after the mark.
///
/// `set_by` says in seconds by how much the wall clock is set while the process runs, and between the two.
async fn left_after(set_by: [i64; 2], is_swept: bool) -> Option<Duration> {
    let place = Place::new();
    let start = 1_000_000 * HOUR;
    let mut by = 0;
    let mut wall_shows = |passed: Duration, set_by: i64| {
        by += set_by;
        place.set_wall((start + passed).saturating_add_signed_secs(by));
    };
    let store = place.open();
    let alpha = insert(&store, "alpha").await;
    store.merge(Mark::new(id("alpha"), alpha.born, limited(HOUR))).await.unwrap().unwrap();
    wall_shows(Duration::ZERO, set_by[0]);
    assert_eq!(left(&store, "alpha").await, Some(HOUR), "a clock was set while the process runs");
    place.clock.advance(20 * MINUTE);
    assert_eq!(left(&store, "alpha").await, Some(40 * MINUTE));
    if is_swept {
        store.sweep().await.unwrap();
    }
    drop(store);
    wall_shows(30 * MINUTE, set_by[1]);
    left(&place.open(), "alpha").await
}

trait AddSigned {
    fn saturating_add_signed_secs(self, seconds: i64) -> Self;
}

impl AddSigned for Duration {
    fn saturating_add_signed_secs(self, seconds: i64) -> Self {
        let by = Duration::from_secs(seconds.unsigned_abs());
        if seconds < 0 { self.saturating_sub(by) } else { self + by }
    }
}

#[tokio::test]
async fn f45_rests_count_on_while_the_file_is_closed() {
    assert_eq!(left_after([0, 0], false).await, Some(30 * MINUTE));
    assert_eq!(left_after([0, 0], true).await, Some(30 * MINUTE));
}

#[tokio::test]
async fn f45_clocks_set_back_lengthen_no_rest() {
    let years = 20 * 365 * 24 * 3_600;
    // The last commit was the mark.
    assert_eq!(left_after([0, -years], false).await, Some(HOUR));
    assert_eq!(left_after([-years, 0], false).await, Some(HOUR));
    // Or the sweep, which notes that the clock was set.
    assert_eq!(left_after([-years, 0], true).await, Some(30 * MINUTE));
    assert_eq!(left_after([-years, -years], true).await, Some(40 * MINUTE));
}

#[tokio::test]
async fn f45_clocks_set_forward_end_rests_at_restarts_only() {
    let years = 20 * 365 * 24 * 3_600;
    assert_eq!(left_after([0, years], false).await, None);
    assert_eq!(left_after([years, 0], true).await, Some(30 * MINUTE));
}

#[tokio::test]
async fn restarts_with_a_stopped_wall_clock_add_up() {
    let place = Place::new();
    let store = place.open();
    let alpha = insert(&store, "alpha").await;
    store.merge(Mark::new(id("alpha"), alpha.born, limited(HOUR))).await.unwrap().unwrap();
    drop(store);
    for restart in 1..=5 {
        place.set_wall(Duration::ZERO);
        let store = place.open();
        place.clock.advance(10 * MINUTE);
        store.add_usage(vec![Usage::new(id("alpha"), 1, 0)]).await.unwrap();
        assert_eq!(left(&store, "alpha").await, Some(HOUR - restart * 10 * MINUTE));
    }
}

// ---- files that can't be used ----

#[tokio::test]
async fn f45_a_second_store_over_a_file_is_refused() {
    let place = Place::new();
    let store = place.open();
    insert(&store, "alpha").await;
    for _ in 0..2 {
        let error = place.try_open().unwrap_err();
        assert!(error.is_in_use() && !error.is_unreadable());
        let text = error.to_string();
        let path = place.path();
        assert!(text.starts_with(&format!("{} is in use by another process", path.display())), "{text}");
        assert!(text.contains("end that one, or name another file"), "{text}");
    }
    let clone = store.clone();
    drop(store);
    assert!(place.try_open().unwrap_err().is_in_use());
    drop(clone);
    assert!(record(&place.open(), "alpha").await.is_some());
}

#[test]
fn f45_a_second_process_over_a_file_is_refused() {
    let place = Place::new();
    let mut child = Spawned::new("waits_with_an_open_file", &place.path());
    assert_eq!(line_of(&mut child.output).as_deref(), Some("open"));
    assert!(place.try_open().unwrap_err().is_in_use());
    kill(child.child);
    place.open();
}

#[test]
fn f45_foreign_files_are_refused_and_left() {
    for content in [&b"alpha|sk-1\n"[..], &b"x"[..], &[0; 100_000], &b"SQLite format 3\0"[..]] {
        let place = Place::new();
        fs::write(place.path(), content).unwrap();
        let text = place.refused();
        assert!(text.contains("is not a file of this store") || text.contains("is damaged"), "{text}");
    }
    let place = Place::new();
    fs::write(place.path(), "").unwrap();
    assert!(place.refused().contains("is empty: it was cut off, or another program made it"));
    let database = redb::Database::create(place.directory.path().join("other")).unwrap();
    drop(database);
    fs::rename(place.directory.path().join("other"), place.path()).unwrap();
    assert!(place.try_open().unwrap_err().to_string().contains("is not a file of this store"));
}

#[test]
fn f45_a_missing_directory_is_said() {
    let place = Place::new();
    let path = place.path().join("keys.redb");
    let text = all_that_it_says(&FileStore::open(&path).unwrap_err());
    assert!(text.contains(&format!("{} can't be opened or created", path.display())), "{text}");
    assert!(text.contains("No such file"), "{text}");
}

fn full_file(place: &Place) -> Vec<u8> {
    let runtime = runtime::Builder::new_current_thread().build().unwrap();
    let store = place.open();
    let seeds: Vec<_> = (0..500).map(|key| spec(&format!("key-{key}"), &format!("sk-{key}"))).collect();
    runtime.block_on(store.plant(&seeds)).unwrap();
    drop(store);
    fs::read(place.path()).unwrap()
}

#[test]
fn f45_truncated_files_are_refused_and_left() {
    let place = Place::new();
    let whole = full_file(&place);
    for part in 1..16 {
        fs::write(place.path(), &whole[..whole.len() * part / 16]).unwrap();
        let text = place.refused();
        assert!(
            text.contains("is damaged") || text.contains("is not a file of this store"),
            "{part}/16: {text}"
        );
    }
}

#[tokio::test]
async fn f45_damaged_files_are_refused_or_lose_nothing() {
    let place = Place::new();
    let whole = tokio::task::spawn_blocking(|| {
        let place = Place::new();
        full_file(&place)
    });
    let whole = whole.await.unwrap();
    let mut refused = 0;
    for _ in 0..60 {
        let mut damaged = whole.clone();
        let at = fastrand::usize(..whole.len());
        damaged[at] ^= 1 << fastrand::u8(..8);
        fs::write(place.path(), &damaged).unwrap();
        match place.try_open() {
            Ok(store) => {
                let loaded = store.load(None).await.unwrap();
                assert_eq!((loaded.records.len(), loaded.unreadable.len()), (500, 0), "byte {at}");
                let secrets = loaded.records.iter().all(|key| {
                    key.spec.secret.expose().strip_prefix("sk-") == key.spec.id.as_str().strip_prefix("key-")
                });
                assert!(secrets, "byte {at}");
            }
            Err(error) => {
                refused += 1;
                assert!(error.is_unreadable(), "byte {at}: {error}");
                assert!(fs::read(place.path()).unwrap() == damaged, "byte {at}: the file was changed");
            }
        }
    }
    assert!(refused > 0);
}

#[test]
fn f45_a_later_format_is_refused() {
    let place = Place::new();
    drop(place.open());
    let database = redb::Database::open(place.path()).unwrap();
    let transaction = database.begin_write().unwrap();
    let about = redb::TableDefinition::<&str, u64>::new("file");
    transaction.open_table(about).unwrap().insert("format", 2).unwrap();
    transaction.commit().unwrap();
    drop(database);
    let error = place.try_open().unwrap_err();
    assert!(error.is_unreadable());
    let text = error.to_string();
    assert!(text.ends_with("has the format 2, and this version of the program knows formats up to 1: use the version that wrote it, or a later one"), "{text}");
}

#[cfg(unix)]
#[test]
fn only_the_owner_can_read_a_new_file() {
    use std::os::unix::fs::PermissionsExt;

    let place = Place::new();
    drop(place.open());
    assert_eq!(fs::metadata(place.path()).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(fs::read_dir(place.directory.path()).unwrap().count(), 1);
}

// ---- the keys of a builder ----

#[tokio::test]
async fn the_builder_decides_on_keys_and_the_file_on_state() {
    let place = Place::new();
    let pool = place.pool([("alpha", "sk-1"), ("beta", "sk-2"), ("gamma", "sk-3")]).await;
    pool.insert("added", "sk-4").await.unwrap();
    for name in ["alpha", "beta", "added"] {
        pool.disable(name).await.unwrap();
    }
    pool.remove("gamma").await.unwrap();
    drop(pool);

    // beta is gone, gamma is back, alpha has another secret.
    let pool = place.pool([("alpha", "sk-new"), ("gamma", "sk-3")]).await;
    let (healthy, disabled) = (Status::Healthy, Status::Disabled);
    let expected = [("added", disabled), ("alpha", healthy), ("gamma", healthy)];
    assert_eq!(statuses(&pool), expected.map(|(name, status)| (name.to_owned(), status)).into());
    pool.disable("gamma").await.unwrap();
    drop(pool);

    // Without keys of the builder, all of the file's.
    let pool = place.pool([]).await;
    assert_eq!(statuses(&pool).len(), 3);
    drop(pool);

    // The same secret under another id keeps its state.
    let pool = place.pool([("delta", "sk-3"), ("alpha", "sk-new")]).await;
    let expected = [("added", disabled), ("alpha", healthy), ("delta", disabled)];
    assert_eq!(statuses(&pool), expected.map(|(name, status)| (name.to_owned(), status)).into());
    drop(pool);

    // Ids that trade their secrets.
    let pool = place.pool([("delta", "sk-new"), ("alpha", "sk-3")]).await;
    let expected = [("added", disabled), ("alpha", disabled), ("delta", healthy)];
    assert_eq!(statuses(&pool), expected.map(|(name, status)| (name.to_owned(), status)).into());
}

#[tokio::test]
async fn a_builders_new_settings_replace_the_files() {
    let place = Place::new();
    let open = async |tier| {
        let mut alpha = spec("alpha", "sk-1");
        alpha.tier = tier;
        KeyPool::builder().key_spec(alpha).open(place.open()).await.unwrap();
        record(&place.open(), "alpha").await.unwrap()
    };
    let (first, second) = (open(None).await, open(Some(1)).await);
    assert_eq!((first.spec.tier, second.spec.tier), (None, Some(1)));
    assert_eq!(first.standing, second.standing);
}

#[tokio::test]
async fn a_second_pool_removes_no_key_of_the_first() {
    let place = Place::new();
    let store = place.open();
    let one = KeyPool::builder().key("alpha", "sk-1").open(store.clone()).await.unwrap();
    let other = KeyPool::builder().key("beta", "sk-2").open(store).await.unwrap();
    one.reload().await.unwrap();
    assert_eq!((one.stats().healthy, other.stats().healthy), (2, 2));
}

// ---- encryption ----

fn data_keys(names: &[(&str, &str)]) -> DataKeys {
    let key = |(name, letter): &(&str, &str)| format!("{name}={}A==", letter.repeat(85));
    DataKeys::parse(names.iter().map(key).collect::<Vec<_>>().join(",")).unwrap()
}

#[tokio::test]
async fn s05_no_secret_is_in_an_encrypted_file() {
    let place = Place::new();
    let open = |keys: &[(&str, &str)]| FileStore::builder().encrypt_with(data_keys(keys)).open(place.path());
    let has = |what: &str| {
        let file = fs::read(place.path()).unwrap();
        file.windows(what.len()).any(|bytes| bytes == what.as_bytes())
    };
    let secret = "sk-canary-2f81c9d07b3e64a5";
    let seeds: Vec<_> = (0..300).map(|key| spec(&format!("key-{key}"), &format!("{secret}-{key}"))).collect();
    let store = place.open();
    store.plant(&seeds).await.unwrap();
    let before = store.load(None).await.unwrap();
    drop(store);
    assert!(has(secret));

    for keys in [&[("a", "A")][..], &[("b", "B"), ("a", "A")]] {
        let store = open(keys).unwrap();
        assert_eq!(store.load(None).await.unwrap(), before);
        let added = format!("added-{}", keys.len());
        let operation = Operation::Insert(spec(&added, &format!("{secret}-{added}")));
        store.operate(id(&added), operation).await.unwrap().unwrap();
        store.plant(&seeds).await.unwrap();
        store.operate(id(&added), Operation::Remove).await.unwrap().unwrap();
        drop(store);
        assert!(!has(secret) && has("encrypted.v1."));
        assert_eq!(fs::read_dir(place.directory.path()).unwrap().count(), 1);
    }
    assert!(!has("encrypted.v1.a."), "the old data key is still needed");

    // With other data keys, or none, a key is counted, and not overwritten.
    for other in [None, Some("C")] {
        let store = other.map_or_else(|| place.open(), |letter| open(&[("c", letter)]).unwrap());
        let pool = KeyPool::builder().key("key-1", format!("{secret}-1")).open(store).await.unwrap();
        assert_eq!((pool.stats().keys.len(), pool.stats().unreadable), (0, 300));
    }
    assert_eq!(open(&[("b", "B")]).unwrap().load(None).await.unwrap(), before);
}

// ---- quotas ----

/// Sends requests until no key has room. Returns how many there were.
fn drain(pool: &KeyPool, scope: &str) -> usize {
    let traits = Traits::new().scope(scope);
    std::iter::from_fn(|| pool.lease(&traits).ok()).count()
}

#[tokio::test]
async fn what_is_left_of_daily_quotas_survives_a_restart() {
    let place = Place::new();
    place.set_wall(1_000_000 * HOUR);
    let by_day = Quota::per_day(100).resets_at("00:00", "America/Los_Angeles");
    let open = async |quota: &Quota| {
        let builder = KeyPool::builder().keys([("alpha", "sk-1"), ("beta", "sk-2")]).quota(quota.clone());
        builder.clock(place.clock.clone()).open(place.open()).await.unwrap()
    };
    for quota in [by_day, Quota::per_day(100).window()] {
        let pool = open(&quota).await;
        for _ in 0..60 {
            drop(pool.lease(&Traits::new().scope("gpt-5").key(id("alpha"))).unwrap());
        }
        let recovery = RecoveryHandle::spawn_with(&pool, passes_by_hand());
        recovery.shutdown().await.unwrap();
        drop(pool);

        // Of a restart that uses nothing, nothing is lost either.
        for _ in 0..2 {
            let pool = open(&quota).await;
            let recovery = RecoveryHandle::spawn_with(&pool, passes_by_hand());
            recovery.shutdown().await.unwrap();
        }
        let pool = open(&quota).await;
        assert_eq!((drain(&pool, "gpt-5"), drain(&pool, "sora")), (40 + 100, 200), "{quota:?}");
        drop(pool);
        place.clock.advance(25 * HOUR);
        assert_eq!(drain(&open(&quota).await, "gpt-5"), 200, "{quota:?}");
        // Another quota than the one that was used.
        assert_eq!(drain(&open(&Quota::per_day(50).window()).await, "gpt-5"), 100);
        fs::remove_file(place.path()).unwrap();
    }
}

#[tokio::test]
async fn a_replaced_key_has_its_whole_quota() {
    let place = Place::new();
    let open = async || {
        let builder = KeyPool::builder().key("alpha", "sk-1").quota(Quota::per_day(100).window());
        builder.clock(place.clock.clone()).open(place.open()).await.unwrap()
    };
    let pool = open().await;
    assert_eq!(drain(&pool, "gpt-5"), 100);
    RecoveryHandle::spawn_with(&pool, passes_by_hand()).shutdown().await.unwrap();
    drop(pool);
    let pool = open().await;
    assert_eq!(drain(&pool, "gpt-5"), 0);
    pool.replace(KeySpec::new(id("alpha"), "sk-2")).await.unwrap();
    assert_eq!(drain(&pool, "gpt-5"), 100);
}

#[tokio::test]
async fn f42_a_daily_quota_outlives_processes_in_a_file() {
    let place = Place::new();
    let open = async || {
        let builder = KeyPool::builder().keys([("alpha", "sk-1"), ("beta", "sk-2")]);
        builder.clock(place.clock.clone()).open(place.open()).await.unwrap()
    };
    let traits = Traits::new().scope("gemini-pro");
    let pool = open().await;
    let recovery = RecoveryHandle::spawn_with(&pool, passes_by_hand());
    let lease = pool.lease(&traits.clone().key(id("alpha"))).unwrap();
    lease.answered_with(Verdict::ScopeExhausted { wait: Some(10 * HOUR) });
    // The process ends without a shutdown.
    eventually("the mark is written", || pool.stats().marks_waiting == 0).await;
    drop((lease, recovery, pool));
    eventually("the file is closed", || place.try_open().is_ok()).await;

    place.clock.advance(4 * HOUR);
    let pool = open().await;
    let picked: Vec<_> = (0..4).map(|_| pool.lease(&traits).unwrap().id().to_string()).collect();
    assert_eq!(picked, ["beta"; 4]);
    assert_eq!(pool.explain(&traits).keys[0].opens_in, Some(6 * HOUR));
    place.clock.advance(6 * HOUR);
    assert!(pool.lease(&traits.key(id("alpha"))).is_ok());
}

#[tokio::test]
async fn quotas_are_kept_once_a_second() {
    let place = Place::new();
    let store = place.open();
    let builder = KeyPool::builder().key("alpha", "sk-1").quota(Quota::per_day(100).window());
    let pool = builder.clock(place.clock.clone()).open(store.clone()).await.unwrap();
    let recovery = RecoveryHandle::spawn_with(&pool, passes_by_hand());
    for _ in 0..60 {
        drop(pool.lease(&Traits::new().scope("gpt-5")).unwrap());
    }
    let kept = async || store.quotas().await.unwrap();
    for _ in 0..2_000 {
        place.clock.advance(SECOND);
        if kept().await.is_some() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // As if the process were killed now.
    let other = Place::new();
    fs::copy(place.path(), other.path()).unwrap();
    let builder = KeyPool::builder().key("alpha", "sk-1").quota(Quota::per_day(100).window());
    let pool = builder.clock(place.clock.clone()).open(other.open()).await.unwrap();
    assert_eq!(drain(&pool, "gpt-5"), 40);
    drop(recovery);
}

// ---- beside the store in memory ----

#[derive(Clone, Debug)]
enum Step {
    Insert(u8),
    Remove(u8),
    Reset(u8, bool),
    Disable(u8),
    Enable(u8),
    /// Of the key, or of a scope: seconds, and the reason.
    Mark(u8, bool, u16, u8),
    /// Of a key that was removed since.
    LateMark(u8),
    Wait(u16),
    Sweep,
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    let key = || 0..4_u8;
    prop_oneof![
        2 => key().prop_map(Step::Insert),
        1 => key().prop_map(Step::Remove),
        2 => (key(), any::<bool>()).prop_map(|(key, scope)| Step::Reset(key, scope)),
        1 => key().prop_map(Step::Disable),
        1 => key().prop_map(Step::Enable),
        8 => (key(), any::<bool>(), 0..200_u16, 0..4_u8).prop_map(|(k, s, t, r)| Step::Mark(k, s, t, r)),
        1 => key().prop_map(Step::LateMark),
        4 => (0..100_u16).prop_map(Step::Wait),
        2 => Just(Step::Sweep),
        2 => Just(Step::Reopen),
    ]
}

/// A file beside the memory. Each makes births of its own.
struct Walk {
    place: Place,
    file: Option<FileStore>,
    memory: MemoryStore,
    born: BTreeMap<u8, [Born; 2]>,
    gone: BTreeMap<u8, [Born; 2]>,
}

impl Walk {
    fn new() -> Self {
        let place = Place::new();
        let memory = MemoryStore::with_clock(Arc::new(place.clock.clone()));
        Self { file: Some(place.open()), place, memory, born: BTreeMap::new(), gone: BTreeMap::new() }
    }

    fn file(&self) -> &FileStore {
        self.file.as_ref().unwrap()
    }

    async fn operate(&mut self, key: u8, operation: Operation) {
        let name = id(&format!("key-{key}"));
        let is_insertion = matches!(operation, Operation::Insert(_));
        let is_removal = operation == Operation::Remove;
        let of_file = self.file().operate(name.clone(), operation.clone()).await.unwrap();
        let of_memory = self.memory.operate(name, operation).await.unwrap();
        if let (true, Some(file), Some(memory)) = (is_insertion, &of_file, &of_memory) {
            self.born.insert(key, [file.born, memory.born]);
        }
        same(of_file, of_memory);
        if is_removal && let Some(born) = self.born.remove(&key) {
            self.gone.insert(key, born);
        }
    }

    async fn mark(&self, key: u8, born: [Born; 2], words: Words) {
        let mark = |born| Mark::new(id(&format!("key-{key}")), born, words.clone());
        let of_file = self.file().merge(mark(born[0])).await.unwrap();
        let of_memory = self.memory.merge(mark(born[1])).await.unwrap();
        same(of_file, of_memory);
    }

    async fn take(&mut self, step: Step) {
        match step {
            Step::Insert(key) => {
                let spec = spec(&format!("key-{key}"), &format!("sk-{key}"));
                self.operate(key, Operation::Insert(spec)).await;
            }
            Step::Remove(key) => self.operate(key, Operation::Remove).await,
            Step::Reset(key, scope) => {
                let scope = scope.then(|| Scope::new("gpt-5").unwrap());
                self.operate(key, Operation::Reset(scope)).await;
            }
            Step::Disable(key) => self.operate(key, Operation::Disable).await,
            Step::Enable(key) => self.operate(key, Operation::Enable).await,
            Step::Mark(key, of_scope, seconds, reason) => {
                let Some(born) = self.born.get(&key).copied() else { return };
                let resting = match reason {
                    0 => Resting { until: Until::Reset, reason: Rest::Revoked },
                    1 => resting(u32::from(seconds) * SECOND, Rest::Exhausted),
                    _ => resting(u32::from(seconds) * SECOND, Rest::RateLimited),
                };
                // Of the newest generation, or of an older one.
                let known = standing(self.file(), &format!("key-{key}")).await.words.generation;
                let mut words =
                    Words { generation: known.saturating_sub(u64::from(reason == 3)), ..Words::default() };
                if of_scope {
                    words.scopes.insert(Scope::new("gpt-5").unwrap(), resting);
                } else {
                    words.key = Some(resting);
                }
                self.mark(key, born, words).await;
            }
            Step::LateMark(key) => {
                if let Some(born) = self.gone.get(&key).copied() {
                    self.mark(key, born, limited(HOUR)).await;
                }
            }
            Step::Wait(seconds) => self.place.clock.advance(u32::from(seconds) * SECOND),
            Step::Sweep => {
                assert_eq!(self.file().sweep().await.unwrap(), self.memory.sweep().await.unwrap());
            }
            Step::Reopen => {
                self.file = None;
                self.file = Some(self.place.open());
            }
        }
        let (file, memory) = (self.file().load(None).await.unwrap(), self.memory.load(None).await.unwrap());
        assert_eq!(file.unreadable, []);
        let comparable = |record: KeyRecord| (record.spec, record.standing.words, record.standing.disabled);
        let all = |records: Vec<KeyRecord>| records.into_iter().map(comparable).collect::<Vec<_>>();
        assert_eq!(all(file.records), all(memory.records));
    }
}

fn same(file: Option<Standing>, memory: Option<Standing>) {
    let comparable =
        |standing: Option<Standing>| standing.map(|standing| (standing.words, standing.disabled));
    assert_eq!(comparable(file), comparable(memory));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn files_and_memory_agree_after_any_steps(steps in prop::collection::vec(step(), 1..40)) {
        let runtime = runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let mut walk = Walk::new();
            for step in steps {
                walk.take(step).await;
            }
        });
    }
}

// ---- processes ----

const FILE: &str = "FILE_OF_A_CHILD";

/// A process that runs one of the tests below which are none.
struct Spawned {
    child: Child,
    output: BufReader<std::process::ChildStdout>,
}

impl Spawned {
    fn new(test: &str, file: &Path) -> Self {
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["--exact", test, "--ignored", "--nocapture", "--quiet"])
            .env(FILE, file)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Self { child, output }
    }
}

/// The next whole line that the child itself prints.
fn line_of(output: &mut impl BufRead) -> Option<String> {
    loop {
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        let line = line.strip_suffix('\n')?;
        if let Some((_, said)) = line.split_once("> ") {
            return Some(said.to_owned());
        }
    }
}

fn kill(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

fn say(what: &str) {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(format!("> {what}\n").as_bytes()).unwrap();
    stdout.flush().unwrap();
}

#[test]
#[ignore = "a process that another test starts"]
fn waits_with_an_open_file() {
    let Some(file) = env::var_os(FILE) else { return };
    let store = FileStore::open(file).unwrap();
    say("open");
    thread::sleep(HOUR);
    drop(store);
}

const MARKED: usize = 20;

/// Marks keys, several at once, and says which mark of which key the store has acknowledged.
#[test]
#[ignore = "a process that another test starts"]
fn marks_until_it_is_killed() {
    let Some(file) = env::var_os(FILE) else { return };
    let runtime = runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let store = FileStore::open(file).unwrap();
        let mut tasks = JoinSet::new();
        for key in 0..MARKED {
            let name = format!("key-{key}");
            let standing = match record(&store, &name).await {
                Some(record) => record.standing,
                None => insert(&store, &name).await,
            };
            let store = store.clone();
            tasks.spawn(async move {
                let mut number = number_of(&standing.words);
                loop {
                    number += 1;
                    let words = limited(number * 100 * HOUR);
                    let mark = Mark::new(id(&name), standing.born, words);
                    store.merge(mark).await.unwrap().unwrap();
                    say(&format!("{key} {number}"));
                }
            });
        }
        tasks.join_next().await;
    });
}

/// Rests are multiples of 100 hours, of which less than 100 hours have passed.
fn number_of(words: &Words) -> u32 {
    let left = words.key.and_then(|resting| match resting.until {
        Until::After(left) => Some(left),
        Until::Reset => None,
    });
    left.map_or(0, |left| left.as_secs().div_ceil(100 * 3_600) as u32)
}

/// `KILLS` sets how often.
#[test]
fn f45_kills_at_random_points_lose_no_acknowledged_mark() {
    let kills = env::var("KILLS").map_or(25, |kills| kills.parse().unwrap());
    let runtime = runtime::Builder::new_current_thread().build().unwrap();
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("keys.redb");
    let mut acknowledged = [0; MARKED];
    let mut marks = 0;
    for round in 1..=kills {
        if round % 4 == 0 {
            // Some are killed while they make the file.
            fs::remove_file(&path).unwrap();
            acknowledged = [0; MARKED];
        }
        let Spawned { child, mut output } = Spawned::new("marks_until_it_is_killed", &path);
        // From before the file is open, to hundreds of commits later.
        let until = Duration::from_micros(fastrand::u64(..200_000));
        let killer = thread::spawn(move || {
            thread::sleep(until);
            kill(child);
        });
        while let Some(line) = line_of(&mut output) {
            let (key, number) = line.split_once(' ').unwrap();
            let (key, number): (usize, u32) = (key.parse().unwrap(), number.parse().unwrap());
            acknowledged[key] = acknowledged[key].max(number);
            marks += 1;
        }
        killer.join().unwrap();
        let store = match FileStore::open(&path) {
            Err(error) => panic!("after kill {round}: {error}"),
            Ok(store) => store,
        };
        let loaded = runtime.block_on(store.load(None)).unwrap();
        assert_eq!(loaded.unreadable, []);
        let mut kept = [0; MARKED];
        for key in loaded.records {
            let number: usize = key.spec.id.as_str()[4..].parse().unwrap();
            kept[number] = number_of(&key.standing.words);
        }
        for (key, number) in acknowledged.iter().enumerate() {
            assert!(
                kept[key] >= *number,
                "after kill {round}: mark {} of key-{key}, not {number}",
                kept[key]
            );
        }
        acknowledged = kept;
    }
    println!("{kills} kills, {marks} acknowledged marks");
    assert!(marks > kills, "only {marks} marks were acknowledged");
}
