#[cfg(unix)]
use std::os::unix::fs::PermissionsExt;
use std::{
    fs,
    path::PathBuf,
    process,
    sync::atomic::{AtomicU32, Ordering::Relaxed},
};

/// A file that is removed at the end of its test.
pub struct TestFile(PathBuf);

impl TestFile {
    pub fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for TestFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Writes a file with this extension and text.
pub fn file(ending: &str, text: &str) -> TestFile {
    static FILES: AtomicU32 = AtomicU32::new(0);
    let name = format!("test-{}-{}.{ending}", process::id(), FILES.fetch_add(1, Relaxed));
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::write(&path, text).unwrap();
    #[cfg(unix)]
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    TestFile(path)
}

pub fn keys_file(text: &str) -> TestFile {
    file("txt", text)
}
