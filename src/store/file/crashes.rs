//! Stores over a disk that is in memory: it fills up, fails, and loses what was not synced.

use std::{
    ops::Bound,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use redb::{BackendError, Builder, Database, StorageBackend};

use super::{
    clock::{FileClock, Moment},
    error::{Failure, OpenError},
    owner::Owner,
    store::FileStore,
    tables::Tables,
};
use crate::{
    KeyPool, RecoveryConfig, RecoveryHandle, Rest,
    classify::Verdict,
    clock::ManualClock,
    key::{KeyId, KeySpec},
    limit::{Resting, Until, Words},
    store::{KeyStore, Mark, Operation, encryption::AtRest},
};

const SECOND: Duration = Duration::from_secs(1);

/// A disk that holds one file.
#[derive(Clone, Debug, Default)]
struct Disk(Arc<Mutex<Content>>);

#[derive(Debug, Default)]
struct Content {
    /// What programs read.
    seen: Vec<u8>,
    /// What is left after a loss of power.
    synced: Vec<u8>,
    /// Since then.
    unsynced: Vec<Written>,
    is_full: bool,
    /// After so many operations, the power fails.
    power_fails_after: Option<u32>,
}

#[derive(Clone, Debug)]
enum Written {
    Length(u64),
    Bytes(u64, Vec<u8>),
}

impl Written {
    fn apply(&self, to: &mut Vec<u8>) {
        match self {
            Self::Length(length) => to.resize(*length as usize, 0),
            Self::Bytes(offset, bytes) => {
                let (from, until) = (*offset as usize, *offset as usize + bytes.len());
                if to.len() < until {
                    to.resize(until, 0);
                }
                to[from..until].copy_from_slice(bytes);
            }
        }
    }

    /// Of one write, some sectors may be on the disk and others not.
    fn sectors(self) -> Vec<Self> {
        const SECTOR: usize = 512;
        match self {
            Self::Length(_) => vec![self],
            Self::Bytes(offset, bytes) => {
                let sector = |(number, bytes): (usize, &[u8])| {
                    Self::Bytes(offset + (number * SECTOR) as u64, bytes.to_vec())
                };
                bytes.chunks(SECTOR).enumerate().map(sector).collect()
            }
        }
    }
}

impl Content {
    fn is_gone(&mut self) -> std::io::Result<()> {
        match &mut self.power_fails_after {
            Some(0) => Err(std::io::Error::other("the power failed")),
            Some(operations) => {
                *operations -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn write(&mut self, written: Written) -> std::io::Result<()> {
        self.is_gone()?;
        if self.is_full {
            return Err(std::io::ErrorKind::StorageFull.into());
        }
        written.apply(&mut self.seen);
        self.unsynced.push(written);
        Ok(())
    }
}

impl Disk {
    fn content(&self) -> std::sync::MutexGuard<'_, Content> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A disk with what this one holds after the loss of power: of what was not synced, some sectors.
    fn after_the_loss(&self) -> Self {
        let mut content = self.content();
        let mut synced = content.synced.clone();
        let odds = fastrand::f64();
        for sector in content.unsynced.drain(..).flat_map(Written::sectors) {
            if fastrand::f64() < odds {
                sector.apply(&mut synced);
            }
        }
        Self(Arc::new(Mutex::new(Content { seen: synced.clone(), synced, ..Content::default() })))
    }

    fn open(&self) -> Result<Database, OpenError> {
        let opened = Builder::new().set_check_integrity_on_open(true).create_with_backend(self.clone());
        opened.map_err(|error| OpenError::of_database("disk".as_ref(), error))
    }

    /// A store over the file, which is made if the disk is empty.
    fn store(&self, clock: &ManualClock) -> Result<FileStore, OpenError> {
        let is_new = self.content().seen.is_empty();
        let database = self.open()?;
        let failed = |failure| OpenError::of_failure("disk".as_ref(), failure);
        let at = FileClock::new(Arc::new(clock.clone()), None).moment();
        if is_new {
            begin(&database, at).map_err(failed)?;
        }
        let last = super::builder::last(&database).map_err(failed)?;
        let disk = self.clone();
        let owner = Owner::spawn(database, last, Box::new(move || disk.open())).unwrap();
        let at_rest = AtRest::new("secret".to_owned(), None);
        let clock = FileClock::new(Arc::new(clock.clone()), Some(last));
        Ok(FileStore::new("disk".into(), clock, Arc::new(at_rest), owner))
    }
}

fn begin(database: &Database, at: Moment) -> Result<(), Failure> {
    let transaction = database.begin_write()?;
    Tables::open(&transaction)?.begin(at)?;
    Ok(transaction.commit()?)
}

impl StorageBackend for Disk {
    fn len(&self) -> std::io::Result<u64> {
        Ok(self.content().seen.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> std::io::Result<()> {
        let mut content = self.content();
        content.is_gone()?;
        let bytes = content.seen.get(offset as usize..offset as usize + out.len());
        out.copy_from_slice(bytes.ok_or(std::io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn set_len(&self, len: u64) -> std::io::Result<()> {
        self.content().write(Written::Length(len))
    }

    fn sync_data(&self) -> std::io::Result<()> {
        let mut content = self.content();
        content.is_gone()?;
        content.unsynced.clear();
        content.synced = content.seen.clone();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> std::io::Result<()> {
        self.content().write(Written::Bytes(offset, data.to_vec()))
    }

    fn try_lock_range(&self, _: Bound<u64>, _: Bound<u64>) -> Result<bool, BackendError> {
        Ok(true)
    }

    fn unlock_range(&self, _: Bound<u64>, _: Bound<u64>) -> Result<(), BackendError> {
        Ok(())
    }
}

fn id(number: usize) -> KeyId {
    KeyId::new(format!("key-{number}")).unwrap()
}

fn resting(left: Duration) -> Words {
    let resting = Resting { until: Until::After(left), reason: Rest::RateLimited };
    Words { key: Some(resting), ..Words::default() }
}

async fn words_in(store: &FileStore, number: usize) -> Words {
    let loaded = store.load(Some(&[id(number)])).await.unwrap();
    loaded.records.into_iter().next().unwrap().standing.words
}

#[tokio::test]
async fn f45_no_acknowledged_mark_is_lost_with_the_power() {
    const KEYS: usize = 40;
    let clock = ManualClock::new();
    let mut disk = Disk::default();
    let mut born = Vec::new();
    let store = disk.store(&clock).unwrap();
    for key in 0..KEYS {
        let spec = KeySpec::new(id(key), format!("sk-{key}"));
        born.push(store.operate(id(key), Operation::Insert(spec)).await.unwrap().unwrap().born);
    }
    drop(store);
    // In seconds.
    let mut acknowledged = [0_u64; KEYS];
    for round in 1..=150 {
        disk.content().power_fails_after = Some(fastrand::u32(..120));
        // The power may fail while the file is repaired.
        if let Ok(store) = disk.store(&clock) {
            for seconds in 1..=10 {
                let left = round * 10 + seconds;
                let marks = (0..fastrand::usize(1..8)).map(|_| fastrand::usize(..KEYS));
                let marks: Vec<_> = marks
                    .map(|key| {
                        let mark = Mark::new(id(key), born[key], resting(left as u32 * SECOND));
                        let store = store.clone();
                        (key, tokio::spawn(async move { store.merge(mark).await }))
                    })
                    .collect();
                for (key, mark) in marks {
                    if mark.await.unwrap().is_ok() {
                        acknowledged[key] = left;
                    }
                }
            }
        }
        disk = disk.after_the_loss();
        let store = disk.store(&clock).unwrap();
        for (key, seconds) in acknowledged.iter().enumerate() {
            let left = words_in(&store, key)
                .await
                .key
                .map_or(Duration::ZERO, |resting| resting.until.left().unwrap());
            assert!(left.as_secs() >= *seconds, "round {round}: {left:?} instead of {seconds} s");
        }
    }
    assert!(acknowledged.iter().all(|seconds| *seconds > 0), "{acknowledged:?}");
}

/// A pool with a key that a response marks, and its recovery.
async fn pool(store: FileStore, clock: &ManualClock) -> (KeyPool, RecoveryHandle) {
    let pool = KeyPool::builder().key("key-0", "sk-0").clock(clock.clone()).open(store).await.unwrap();
    let by_hand = RecoveryConfig::new().start_jitter(Duration::MAX).interval(Duration::MAX);
    let recovery = RecoveryHandle::spawn_with(&pool, by_hand);
    (pool, recovery)
}

fn all_that_it_says(error: &(dyn std::error::Error + 'static)) -> String {
    let errors = std::iter::successors(Some(error), |error| error.source());
    errors.map(|error| format!("{error}\n")).collect()
}

#[tokio::test]
async fn f45_marks_wait_in_memory_while_the_disk_is_full() {
    let (disk, clock) = (Disk::default(), ManualClock::new());
    let store = disk.store(&clock).unwrap();
    let (pool, recovery) = pool(store.clone(), &clock).await;
    disk.content().is_full = true;

    let lease = pool.lease(&crate::Traits::new()).unwrap();
    lease.answered_with(Verdict::RateLimited { wait: None });
    assert_eq!((pool.stats().healthy, pool.stats().marks_waiting), (0, 1));
    let report = recovery.sweep_now().await;
    let error = all_that_it_says(&report.outcome.unwrap_err());
    assert!(error.contains("disk can't be used at the moment"), "{error}");
    assert!(pool.insert("key-1", "sk-1").await.is_err());
    assert_eq!(pool.stats().marks_waiting, 1);

    disk.content().is_full = false;
    for _ in 0..3 {
        clock.advance(SECOND);
        recovery.sweep_now().await;
    }
    assert_eq!(pool.stats().marks_waiting, 0);
    assert!(words_in(&store, 0).await.key.is_some());
    pool.insert("key-1", "sk-1").await.unwrap();
    recovery.shutdown().await.unwrap();
}
