//! Looks at files from time to time. Editors and Kubernetes replace files rather than write them, and network file systems
//! tell nobody of changes: so these are found by looks, not by notifications.

use std::{
    fs,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use tokio::{runtime::Handle, time::sleep};

/// Time of the last change, size and inode: what tells one state of a file from another. `None` if there is no such file.
pub(super) type Stamp = Option<(SystemTime, u64, u64)>;

/// The default interval of looks.
pub(super) const INTERVAL: Duration = Duration::from_secs(1);

/// Follows links: so the swap of a link is another file.
pub(super) fn stamp(file: &Path) -> Stamp {
    of(&fs::metadata(file).ok()?)
}

pub(super) fn of(found: &fs::Metadata) -> Stamp {
    Some((found.modified().ok()?, found.len(), inode(found)))
}

#[cfg(unix)]
fn inode(found: &fs::Metadata) -> u64 {
    std::os::unix::fs::MetadataExt::ino(found)
}

#[cfg(not(unix))]
fn inode(_: &fs::Metadata) -> u64 {
    0
}

/// What was seen at the last read.
#[derive(Clone, Debug, Default)]
pub(super) struct Watched<T>(Arc<Mutex<Option<T>>>);

impl<T: PartialEq + Send + 'static> Watched<T> {
    /// Notes what was seen before a read.
    pub(super) fn read(&self, seen: T) {
        *self.lock() = Some(seen);
    }

    /// Completes when looks see something else than the last read did, and have seen the same for one interval: a file may
    /// be half written.
    pub(super) async fn changed(&self, interval: Duration, look: impl Fn() -> T + Clone + Send + 'static) {
        let mut last = None;
        loop {
            sleep(interval).await;
            let seen = Some(blocking(look.clone()).await);
            if seen == last && *self.lock() != seen {
                return;
            }
            last = seen;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Calls a function that may block, beside the tasks of the runtime.
pub(super) async fn blocking<T: Send + 'static>(call: impl FnOnce() -> T + Clone + Send + 'static) -> T {
    if let Ok(runtime) = Handle::try_current()
        && let Ok(done) = runtime.spawn_blocking(call.clone()).await
    {
        return done;
    }
    call()
}
