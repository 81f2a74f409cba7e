//! One file a key.

use std::{
    borrow::Cow,
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use super::{
    key_set::KeySet,
    key_source::{KeySource, SourceError, SourceFuture},
    watched::{self, INTERVAL, Stamp, Watched, blocking},
};
use crate::key::{
    KeyId, KeySpec, Secret,
    rejected::{ParsedKey, Place, Reason, Rejected},
};

/// The largest secret.
const MOST_BYTES: usize = 1 << 20;

/// How often a directory is read that changes meanwhile.
const READ_AT_MOST: usize = 3;

/// The files of a directory: the name of each is the id of a key, and its text the secret, without line breaks at the end.
///
/// Docker and Kubernetes mount secrets so. Entries whose names begin with a dot, such as the `..data` of Kubernetes, and
/// directories are ignored. The directory is looked at every second, as a [`KeyFile`](super::KeyFile) is.
///
/// ```
/// use std::fs;
/// use tower_key_rotation::{KeyPool, source::KeyDirectory};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let directory = tempfile::tempdir()?;
/// # let secrets = directory.path();
/// fs::write(secrets.join("alpha"), "sk-1\n")?;
/// fs::write(secrets.join("beta"), "sk-2\n")?;
/// let pool = KeyPool::builder().source(KeyDirectory::new(secrets)).await?.build()?;
/// assert_eq!(pool.stats().keys[0].id.as_str(), "alpha");
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use]
pub struct KeyDirectory {
    path: PathBuf,
    interval: Duration,
    watched: Watched<Option<Vec<(PathBuf, Stamp)>>>,
}

impl KeyDirectory {
    /// The keys of that directory.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), interval: INTERVAL, watched: Watched::default() }
    }

    /// Sets the time from one look at the directory to the next: the default is 1 second.
    pub fn interval(self, interval: Duration) -> Self {
        Self { interval, ..self }
    }
}

impl KeySource for KeyDirectory {
    fn name(&self) -> Cow<'_, str> {
        self.path.to_string_lossy()
    }

    fn read(&self) -> SourceFuture<'_, Result<KeySet, SourceError>> {
        let path = self.path.clone();
        Box::pin(async move {
            let (seen, read) = blocking(move || read(&path)).await;
            self.watched.read(seen);
            read.map_err(SourceError::new)
        })
    }

    fn changed(&self) -> SourceFuture<'_, ()> {
        let path = self.path.clone();
        Box::pin(self.watched.changed(self.interval, move || files(&path).ok()))
    }
}

/// The files in their order.
fn files(directory: &Path) -> io::Result<Vec<(PathBuf, Stamp)>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let is_hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        // A link that leads nowhere is a file that can't be read.
        let found = fs::metadata(&path).ok();
        if !is_hidden && !found.as_ref().is_some_and(fs::Metadata::is_dir) {
            let stamp = found.as_ref().and_then(watched::of);
            files.push((path, stamp));
        }
    }
    files.sort_unstable();
    Ok(files)
}

type Seen = Option<Vec<(PathBuf, Stamp)>>;

/// Reads all files in the same state of the directory: Kubernetes swaps them all at once.
fn read(directory: &Path) -> (Seen, io::Result<KeySet>) {
    let mut seen = files(directory);
    for _ in 0..READ_AT_MOST {
        let files_before = match seen {
            Ok(files) => files,
            Err(error) => return (None, Err(error)),
        };
        let set = read_files(&files_before);
        seen = files(directory);
        if seen.as_ref().is_ok_and(|after| *after == files_before) {
            return (Some(files_before), set);
        }
    }
    (None, Err(io::Error::other("it changes while it is read")))
}

fn read_files(files: &[(PathBuf, Stamp)]) -> io::Result<KeySet> {
    Ok(KeySet::of(files.iter().map(|(path, _)| key(path)).collect::<io::Result<_>>()?))
}

fn key(path: &Path) -> io::Result<ParsedKey> {
    let place = Place::Whole(path.to_string_lossy().into_owned().into());
    let id = path.file_name().unwrap_or_default().to_str().ok_or(Reason::NotUtf8);
    let id = id.and_then(|id| KeyId::new(id).map_err(Reason::from));
    let key = match (id, secret(path)?) {
        (Ok(id), Ok(secret)) => Ok(KeySpec::new(id, secret)),
        (Ok(id), Err(reason)) => Err(Rejected::new(place.clone(), Some(id), reason)),
        (Err(reason), _) => Err(Rejected::new(place.clone(), None, reason)),
    };
    Ok(ParsedKey { place, key })
}

fn secret(path: &Path) -> io::Result<Result<Secret, Reason>> {
    let read = || {
        let mut text = Vec::new();
        File::open(path)?.take(MOST_BYTES as u64 + 1).read_to_end(&mut text)?;
        Ok(text)
    };
    let named = |error: io::Error| io::Error::new(error.kind(), Unread { path: path.into(), error });
    let text = read().map_err(named)?;
    if text.len() > MOST_BYTES {
        return Ok(Err(Reason::TooLarge(MOST_BYTES >> 20)));
    }
    Ok(match String::from_utf8(text) {
        Ok(text) => Ok(Secret::new(text.trim_end_matches(['\n', '\r']))),
        Err(_) => Err(Reason::NotUtf8),
    })
}

/// A file of a directory can't be read.
#[derive(Debug, thiserror::Error)]
#[error("{}: {error}", path.display())]
struct Unread {
    path: Arc<Path>,
    error: io::Error,
}
