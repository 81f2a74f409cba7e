//! From a path to a store.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::Arc,
};

use redb::{Database, ReadableDatabase};

#[cfg(feature = "encryption")]
use super::encrypt::encrypt;
use super::{
    clock::{FileClock, Moment},
    create::{create, open},
    error::{Cause, Failure, OpenError},
    owner::Owner,
    store::FileStore,
    tables::last_moment,
};
#[cfg(feature = "encryption")]
use crate::store::encryption::DataKeys;
use crate::{
    clock::{Clock, SystemClock},
    store::encryption::AtRest,
};

/// Configures a [`FileStore`].
#[derive(Debug)]
#[must_use]
pub struct FileStoreBuilder {
    clock: Arc<dyn Clock>,
    #[cfg(feature = "encryption")]
    data_keys: Option<DataKeys>,
}

impl FileStore {
    /// Opens a file, or makes a new one.
    ///
    /// # Errors
    ///
    /// Those of [`FileStoreBuilder::open`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self, OpenError> {
        Self::builder().open(path)
    }

    /// A store with encrypted secrets, or with a clock of your own.
    pub fn builder() -> FileStoreBuilder {
        FileStoreBuilder {
            clock: Arc::new(SystemClock::new()),
            #[cfg(feature = "encryption")]
            data_keys: None,
        }
    }
}

impl FileStoreBuilder {
    /// Encrypts the secrets in the file.
    ///
    /// At the next opening, secrets that are in the file as they are, or that were encrypted with another data key than the
    /// first one, are encrypted with that. The whole file is written anew for it, so that it holds them no longer; the file
    /// system and backups may. A key that can't be decrypted stays as it is: it is counted, logged by its id, and sent to no
    /// one.
    ///
    /// ```no_run
    /// use tower_key_rotation::store::{DataKeys, file::FileStore};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let keys = DataKeys::from_env("KEY_ROTATION_DATA_KEYS")?;
    /// let store = FileStore::builder().encrypt_with(keys).open("keys.redb")?;
    /// # let _ = store;
    /// # Ok(())
    /// # }
    /// ```
    #[cfg(feature = "encryption")]
    pub fn encrypt_with(mut self, keys: DataKeys) -> Self {
        self.data_keys = Some(keys);
        self
    }

    /// Sets the clock, for tests: see [`clock`](crate::clock). The pool has a clock of its own.
    pub fn clock(mut self, clock: impl Clock) -> Self {
        self.clock = Arc::new(clock);
        self
    }

    /// Opens a file, or makes a new one that only this user can read. The directory has to exist.
    ///
    /// It blocks while the file is read: some milliseconds, or a second for hundreds of thousands of keys.
    ///
    /// # Errors
    ///
    /// If another process has the file open, or another store of this process; if the file is of another program, damaged, cut
    /// off, or of a later version of this crate; if it can't be read, written or made. The file is left as it is, and the
    /// error names it and says what to do.
    pub fn open(self, path: impl AsRef<Path>) -> Result<FileStore, OpenError> {
        let path = path.as_ref();
        #[cfg(feature = "encryption")]
        let data_keys = self.data_keys;
        #[cfg(not(feature = "encryption"))]
        let data_keys = None;
        let at_rest = Arc::new(AtRest::new("secret".to_owned(), data_keys));
        let new = FileClock::new(self.clock.clone(), None).moment();
        let database = match open_checked(path) {
            Err(error) if error.is_not_found() => {
                create(path, new, |_| Ok(()))?;
                open_checked(path)?
            }
            opened => opened?,
        };
        #[cfg(feature = "encryption")]
        let database = encrypt(path, database, &at_rest)?;
        let last = last(&database).map_err(|failure| OpenError::of_failure(path, failure))?;
        let clock = FileClock::new(self.clock, Some(last));
        let again: PathBuf = path.to_owned();
        let owner = Owner::spawn(database, last, Box::new(move || open_checked(&again)));
        let owner = owner.map_err(|error| OpenError::io(path, error))?;
        Ok(FileStore::new(path.to_owned(), clock, at_rest, owner))
    }
}

pub(super) fn last(database: &Database) -> Result<Moment, Failure> {
    Ok(last_moment(&database.begin_read()?)?.unwrap_or_default())
}

/// A damaged file may make the database panic.
fn open_checked(path: &Path) -> Result<Database, OpenError> {
    catch_unwind(AssertUnwindSafe(|| open(path))).unwrap_or_else(|_| {
        Err(OpenError::new(Cause::Damaged(path.to_owned(), "reading it failed".to_owned())))
    })
}
