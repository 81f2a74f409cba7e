//! Keys in a file.

use std::{borrow::Cow, path::PathBuf, time::Duration};

use super::{
    key_set::KeySet,
    key_source::{KeySource, SourceError, SourceFuture},
    watched::{INTERVAL, Stamp, Watched, blocking, stamp},
};

/// The keys of a file, in one of the formats of [`KeyPoolBuilder::keys_from_file`](crate::KeyPoolBuilder::keys_from_file).
/// Each key needs an id.
///
/// It looks at the file's time, size and inode every second, through symbolic links. So it notices a file that is written,
/// replaced by `rename`, or swapped as Kubernetes swaps the `..data` of a volume. A file that has changed is read when it has
/// stayed the same for one interval, because it may be half written.
///
/// ```no_run
/// use tower_key_rotation::{KeyPool, RecoveryHandle, source::KeyFile};
///
/// # async fn serve() -> Result<(), Box<dyn std::error::Error>> {
/// let pool = KeyPool::builder().source(KeyFile::new("/etc/keys/keys.toml")).await?.build()?;
/// let recovery = RecoveryHandle::spawn(&pool);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use]
pub struct KeyFile {
    path: PathBuf,
    interval: Duration,
    watched: Watched<Stamp>,
}

impl KeyFile {
    /// The keys of that file.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), interval: INTERVAL, watched: Watched::default() }
    }

    /// Sets the time from one look at the file to the next: the default is 1 second.
    pub fn interval(self, interval: Duration) -> Self {
        Self { interval, ..self }
    }
}

impl KeySource for KeyFile {
    fn name(&self) -> Cow<'_, str> {
        self.path.to_string_lossy()
    }

    fn read(&self) -> SourceFuture<'_, Result<KeySet, SourceError>> {
        let path = self.path.clone();
        Box::pin(async move {
            // Before the text: what changes meanwhile is read again.
            let (seen, read) = blocking(move || (stamp(&path), KeySet::of_file(&path))).await;
            self.watched.read(seen);
            read.map_err(SourceError::new)?.map_err(SourceError::new)
        })
    }

    fn changed(&self) -> SourceFuture<'_, ()> {
        let path = self.path.clone();
        Box::pin(self.watched.changed(self.interval, move || stamp(&path)))
    }
}
