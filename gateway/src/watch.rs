//! Whether files have changed, by their times, sizes and inodes. Editors and Kubernetes replace files rather than write
//! them, and network file systems tell nobody of changes, so the gateway looks.

use std::{
    fs,
    path::{Path, PathBuf},
    time::SystemTime,
};

/// What tells one state of a file from another; `None` if there is no such file.
type State = Option<(SystemTime, u64, u64)>;

/// Files, and the states in which they were read.
pub(crate) struct Files {
    read: Vec<(PathBuf, State)>,
    /// At the last look.
    seen: Vec<State>,
}

impl Files {
    /// Files that have just been read.
    pub(crate) fn now<'f>(files: impl Iterator<Item = &'f Path>) -> Self {
        let read: Vec<_> = files.map(|file| (file.to_owned(), state(file))).collect();
        Self { seen: read.iter().map(|(_, state)| *state).collect(), read }
    }

    /// Looks at the files. Whether they have changed since they were read, and are as they were at the last look.
    pub(crate) fn have_settled(&mut self) -> bool {
        let now: Vec<_> = self.read.iter().map(|(file, _)| state(file)).collect();
        let has_changed = self.read.iter().zip(&now).any(|((_, read), now)| read != now);
        let is_steady = now == self.seen;
        self.seen = now;
        has_changed && is_steady
    }

    /// Notes that the files as they were at the last look have been read.
    pub(crate) fn take_over(&mut self) {
        for ((_, read), seen) in self.read.iter_mut().zip(&self.seen) {
            *read = *seen;
        }
    }
}

fn state(file: &Path) -> State {
    let found = fs::metadata(file).ok()?;
    Some((found.modified().ok()?, found.len(), inode(&found)))
}

#[cfg(unix)]
fn inode(found: &fs::Metadata) -> u64 {
    std::os::unix::fs::MetadataExt::ino(found)
}

#[cfg(not(unix))]
fn inode(_: &fs::Metadata) -> u64 {
    0
}

#[cfg(test)]
mod tests {
    use std::{env, process};

    use super::*;

    #[test]
    fn a_file_has_changed_once_it_stays_the_same() {
        let path = env::temp_dir().join(format!("watch-{}", process::id()));
        fs::write(&path, "one").unwrap();
        let mut files = Files::now([&*path].into_iter());
        assert!(!files.have_settled());
        fs::write(&path, "longer").unwrap();
        assert!(!files.have_settled(), "it may be half written");
        assert!(files.have_settled());
        files.take_over();
        assert!(!files.have_settled());
        fs::remove_file(&path).unwrap();
        assert!(!files.have_settled());
        assert!(files.have_settled());
    }
}
