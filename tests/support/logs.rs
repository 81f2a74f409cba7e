use std::{
    io,
    sync::{Arc, Mutex, OnceLock},
};

use tracing::{Dispatch, level_filters::LevelFilter, subscriber::DefaultGuard};

/// Keeps a second subscriber for the process, which listens to everything and writes nothing.
///
/// With one subscriber, `tracing` asks only the first thread that reaches a log line whether it is enabled, and caches
/// the answer for all threads. The second subscriber makes that answer yes.
pub fn listen_to_everything() {
    static SECOND: OnceLock<Dispatch> = OnceLock::new();
    SECOND.get_or_init(|| Dispatch::new(tracing_subscriber::registry()));
}

/// The log of this thread at every level.
#[derive(Clone, Default)]
pub struct Logs(Arc<Mutex<Vec<u8>>>);

impl Logs {
    pub fn capture() -> (Self, DefaultGuard) {
        listen_to_everything();
        let logs = Self::default();
        let writer = logs.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(LevelFilter::TRACE)
            .with_ansi(false)
            .without_time()
            .with_writer(move || writer.clone())
            .finish();
        let guard = tracing::subscriber::set_default(subscriber);
        (logs, guard)
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }

    /// The lines that the library logged, without the explanations of requests.
    pub fn ours(&self) -> Vec<String> {
        let text = self.text();
        let is_ours = |line: &&str| line.contains("tower_key_rotation") && !line.starts_with("TRACE request");
        text.lines().filter(is_ours).map(str::to_owned).collect()
    }

    pub fn count(&self, what: &str) -> usize {
        self.ours().iter().filter(|line| line.contains(what)).count()
    }
}

impl io::Write for Logs {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
