//! Opens the file, or makes it.

use std::{
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io,
    path::{Path, PathBuf},
};

use redb::{Builder, Database, Durability, ReadableDatabase};

use super::{
    clock::Moment,
    error::{Cause, Failure, OpenError},
    tables::{self, FORMAT, Tables},
};

/// Pages of the file in memory: the operating system keeps those that are read again.
const CACHE_BYTES: usize = 16 << 20;

/// Opens a file, which has to exist.
pub(super) fn open(path: &Path) -> Result<Database, OpenError> {
    let io = |error| OpenError::io(path, error);
    let file = OpenOptions::new().read(true).write(true).open(path).map_err(io)?;
    let metadata = file.metadata().map_err(io)?;
    // A new file gets its name when it is complete.
    if metadata.is_file() && metadata.len() == 0 {
        return Err(OpenError::new(Cause::Empty(path.to_owned())));
    }
    warn_if_open_to_others(path, &metadata);
    drop(file);
    let opened = builder().set_check_integrity_on_open(true).open(path);
    let database = opened.map_err(|error| OpenError::of_database(path, error))?;
    check_format(path, &database)?;
    Ok(database)
}

fn check_format(path: &Path, database: &Database) -> Result<(), OpenError> {
    let foreign = || OpenError::new(Cause::Foreign(path.to_owned()));
    let transaction = database.begin_read().map_err(|error| OpenError::of_failure(path, error.into()))?;
    let format = tables::format(&transaction).map_err(|error| OpenError::of_table(path, error))?;
    match format.ok_or_else(foreign)? {
        FORMAT => Ok(()),
        0 => Err(foreign()),
        format => Err(OpenError::new(Cause::Later { path: path.to_owned(), format, known: FORMAT })),
    }
}

/// Makes a new file, unless another process is quicker: then that one's stays.
///
/// It is filled under another name first, so that a process that is killed leaves no file that can't be opened.
pub(super) fn create(
    path: &Path,
    at: Moment,
    fill: impl FnOnce(&mut Tables<'_>) -> Result<(), Failure>,
) -> Result<(), OpenError> {
    let unfinished = Unfinished::new(path, at, fill)?;
    match fs::hard_link(&unfinished.0, path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        // Some file systems have no links.
        Err(_) => fs::rename(&unfinished.0, path).map_err(|error| OpenError::io(path, error))?,
    }
    sync_directory(path).map_err(|error| OpenError::io(path, error))
}

/// Puts a new file in the place of one that is open.
#[cfg(feature = "encryption")]
pub(super) fn replace(
    path: &Path,
    at: Moment,
    fill: impl FnOnce(&mut Tables<'_>) -> Result<(), Failure>,
    open: Database,
) -> Result<(), OpenError> {
    let unfinished = Unfinished::new(path, at, fill)?;
    // Open until then: no other process may begin to use it. But Windows replaces no file that is open.
    let _open = (!cfg!(windows)).then_some(open);
    fs::rename(&unfinished.0, path)
        .and_then(|()| sync_directory(path))
        .map_err(|error| OpenError::io(path, error))
}

/// A complete file that has not got its name yet.
struct Unfinished(PathBuf);

impl Unfinished {
    fn new(
        path: &Path,
        at: Moment,
        fill: impl FnOnce(&mut Tables<'_>) -> Result<(), Failure>,
    ) -> Result<Self, OpenError> {
        let mut name = OsString::from(path.file_name().unwrap_or_default());
        name.push(format!(".{:016x}.new", fastrand::u64(..)));
        let unfinished = Self(path.with_file_name(name));
        let file = private_file(&unfinished.0).map_err(|error| OpenError::io(path, error))?;
        unfinished.fill(file, at, fill).map_err(|failure| OpenError::of_failure(path, failure))?;
        Ok(unfinished)
    }

    fn fill(
        &self,
        file: File,
        at: Moment,
        fill: impl FnOnce(&mut Tables<'_>) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let backend = redb::backends::FileBackend::new(file)?;
        let database = builder().create_with_backend(backend)?;
        let mut transaction = database.begin_write()?;
        transaction.set_durability(Durability::Immediate)?;
        let mut tables = Tables::open(&transaction)?;
        tables.begin(at)?;
        fill(&mut tables)?;
        drop(tables);
        transaction.commit()?;
        Ok(database.close()?)
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn builder() -> Builder {
    let mut builder = Builder::new();
    builder.set_cache_size(CACHE_BYTES);
    builder
}

/// A new file that only this user can read.
fn private_file(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)
}

/// Makes the name of a new file durable.
fn sync_directory(path: &Path) -> io::Result<()> {
    #[cfg(unix)]
    {
        let directory = path.parent().filter(|directory| !directory.as_os_str().is_empty());
        File::open(directory.unwrap_or(Path::new(".")))?.sync_all()?;
    }
    #[cfg(not(unix))]
    let _ = path;
    Ok(())
}

#[cfg(unix)]
fn warn_if_open_to_others(path: &Path, file: &fs::Metadata) {
    use std::os::unix::fs::PermissionsExt;

    if file.permissions().mode() & 0o077 != 0 {
        tracing::warn!("{}: other users of this machine can read or change it: chmod 600", path.display());
    }
}

#[cfg(not(unix))]
fn warn_if_open_to_others(_: &Path, _: &fs::Metadata) {}
