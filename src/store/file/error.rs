//! Why a file can't be opened, and why an operation on an open one failed.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use redb::{DatabaseError, StorageError, TableError};

use crate::store::{StoreError, encryption::NotEncrypted};

/// The reason why a file can't be opened as a [`FileStore`](super::FileStore). It names the file and says what to do; the file
/// is left as it is.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct OpenError(Box<Cause>);

impl OpenError {
    /// Whether another process uses the file, or another store of this process.
    #[must_use]
    pub fn is_in_use(&self) -> bool {
        matches!(*self.0, Cause::InUse(_))
    }

    /// Whether the file is no store, damaged, or of a later version of this crate.
    #[must_use]
    pub fn is_unreadable(&self) -> bool {
        matches!(*self.0, Cause::Empty(_) | Cause::Foreign(_) | Cause::Damaged(..) | Cause::Later { .. })
    }

    pub(super) fn is_not_found(&self) -> bool {
        matches!(&*self.0, Cause::Io(_, error) if error.kind() == io::ErrorKind::NotFound)
    }

    pub(super) fn new(cause: Cause) -> Self {
        Self(Box::new(cause))
    }

    pub(super) fn io(path: &Path, error: io::Error) -> Self {
        Self::new(Cause::Io(path.to_owned(), error))
    }

    pub(super) fn of_database(path: &Path, error: DatabaseError) -> Self {
        let path_of = path.to_owned();
        Self::new(match error {
            DatabaseError::DatabaseAlreadyOpen | DatabaseError::LockProtocolMismatch => Cause::InUse(path_of),
            DatabaseError::Storage(error) => return Self::of_storage(path, error),
            other => Cause::Damaged(path_of, other.to_string()),
        })
    }

    pub(super) fn of_storage(path: &Path, error: StorageError) -> Self {
        let path = path.to_owned();
        Self::new(match error {
            StorageError::Io(error) => match error.kind() {
                io::ErrorKind::InvalidData => Cause::Foreign(path),
                io::ErrorKind::UnexpectedEof => Cause::Damaged(path, "it ends too early".to_owned()),
                _ => Cause::Io(path, error),
            },
            StorageError::Corrupted(what) => Cause::Damaged(path, what),
            other => Cause::Damaged(path, other.to_string()),
        })
    }

    pub(super) fn of_table(path: &Path, error: TableError) -> Self {
        match error {
            TableError::Storage(error) => Self::of_storage(path, error),
            _ => Self::new(Cause::Foreign(path.to_owned())),
        }
    }

    pub(super) fn of_failure(path: &Path, failure: Failure) -> Self {
        Self::new(Cause::Failed(path.to_owned(), failure))
    }
}

#[derive(Debug, thiserror::Error)]
pub(super) enum Cause {
    #[error(
        "{} is in use by another process, or by another store of this one: end that one, or name another file. \
         Several processes can share keys through MongoDB", .0.display()
    )]
    InUse(PathBuf),
    #[error("{} is empty: it was cut off, or another program made it. Remove it to begin anew", .0.display())]
    Empty(PathBuf),
    #[error("{} is not a file of this store: name another file, or move that one away", .0.display())]
    Foreign(PathBuf),
    #[error(
        "{} is damaged ({}): restore it from a backup, or move it away to begin anew", .0.display(), printable(.1)
    )]
    Damaged(PathBuf, String),
    #[error(
        "{} has the format {format}, and this version of the program knows formats up to {known}: use the version \
         that wrote it, or a later one", .path.display()
    )]
    Later { path: PathBuf, format: u64, known: u64 },
    #[error("{} can't be opened or created", .0.display())]
    Io(PathBuf, #[source] io::Error),
    #[error("{} can't be used", .0.display())]
    Failed(PathBuf, #[source] Failure),
}

/// Why an operation failed.
#[derive(Clone, Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error("{}", printable(.0.to_string()))]
    Database(Arc<redb::Error>),
    #[error(transparent)]
    NotOpen(Arc<OpenError>),
    #[error(transparent)]
    NotEncrypted(#[from] NotEncrypted),
    #[error("a key can't be written as JSON")]
    NotEncoded,
    #[error("the operation panicked")]
    BrokenOff,
}

impl Failure {
    /// Whether the file failed, and not only this operation.
    pub(super) fn is_of_the_file(&self) -> bool {
        matches!(self, Self::Database(_) | Self::NotOpen(_))
    }

    pub(super) fn of(self, path: &Path) -> StoreError {
        StoreError::new(OfFile { path: path.to_owned(), failure: self })
    }
}

impl<E: Into<redb::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Database(Arc::new(error.into()))
    }
}

#[derive(Debug, thiserror::Error)]
#[error("{} can't be used at the moment", path.display())]
struct OfFile {
    path: PathBuf,
    #[source]
    failure: Failure,
}

/// On one line, and no longer than one.
fn printable(text: impl AsRef<str>) -> String {
    const LONGEST: usize = 200;
    let printable = text.as_ref().chars().map(|c| if c.is_control() { ' ' } else { c });
    printable.take(LONGEST).collect()
}
