//! The thread that owns the file: it commits what is asked for, as much as there is at once.
//!
//! A commit waits for the disk. So it has a thread of its own, and all changes that come meanwhile are the next commit.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, mpsc},
    thread,
};

use redb::{Database, ReadTransaction, ReadableDatabase};
use tokio::sync::oneshot;

use super::{
    clock::Moment,
    error::{Failure, OpenError},
    tables::Tables,
};

/// The most changes in a commit.
const AT_ONCE: usize = 4_096;

/// Opens the file again after a failure.
pub(super) type Reopen = Box<dyn FnMut() -> Result<Database, OpenError> + Send>;

/// Dropping it waits for the commit in progress, and closes the file.
pub(super) struct Owner {
    requests: Option<mpsc::Sender<Request>>,
    thread: Option<thread::JoinHandle<()>>,
}

enum Request {
    Change(Moment, Box<dyn Change>),
    Read(Box<dyn FnOnce(Result<ReadTransaction, Failure>) + Send>),
}

/// The outcome of a request, once it is there. Dropping it stops nothing.
#[must_use]
pub(super) struct Reply<T>(oneshot::Receiver<Result<T, Failure>>);

impl<T> Reply<T> {
    pub(super) async fn wait(self) -> Result<T, Failure> {
        self.0.await.unwrap_or(Err(Failure::BrokenOff))
    }
}

impl Owner {
    /// Takes over an open file.
    pub(super) fn spawn(database: Database, last: Moment, reopen: Reopen) -> std::io::Result<Self> {
        let (requests, received) = mpsc::channel();
        let file = OwnedFile { database: Some(database), reopen, last };
        let thread = thread::Builder::new().name("key-file".to_owned()).spawn(move || file.run(&received))?;
        Ok(Self { requests: Some(requests), thread: Some(thread) })
    }

    /// Makes a change, at that moment by the file's clock. When the reply is there, the change is durable.
    pub(super) fn change<T: Send + 'static>(
        &self,
        at: Moment,
        work: impl FnOnce(&mut Tables<'_>) -> Result<T, Failure> + Send + 'static,
    ) -> Reply<T> {
        let (reply, replied) = oneshot::channel();
        let job = Job { work: Some(work), outcome: None, reply };
        self.send(Request::Change(at, Box::new(job)));
        Reply(replied)
    }

    /// Reads what is committed, beside the changes.
    pub(super) fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce(&ReadTransaction) -> Result<T, Failure> + Send + 'static,
    ) -> Reply<T> {
        let (reply, replied) = oneshot::channel();
        self.send(Request::Read(Box::new(|transaction| {
            let _ = reply.send(transaction.and_then(|transaction| work(&transaction)));
        })));
        Reply(replied)
    }

    /// If the thread has ended, the request is dropped, which its caller notices.
    fn send(&self, request: Request) {
        if let Some(requests) = &self.requests {
            let _ = requests.send(request);
        }
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.requests = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct OwnedFile {
    /// `None` after a failure, until the file is open again.
    database: Option<Database>,
    reopen: Reopen,
    /// The file's clock at the last commit.
    last: Moment,
}

impl OwnedFile {
    fn run(mut self, requests: &mpsc::Receiver<Request>) {
        while let Ok(first) = requests.recv() {
            let mut batch = vec![first];
            batch.extend(requests.try_iter().take(AT_ONCE - 1));
            // A panic of the database must not end the thread: the file is opened anew.
            if catch_unwind(AssertUnwindSafe(|| self.serve(batch))).is_err() {
                self.database = None;
            }
        }
        if let Some(Err(error)) = self.database.map(Database::close) {
            tracing::warn!(%error, "the file of keys was not closed");
        }
    }

    fn serve(&mut self, batch: Vec<Request>) {
        let (mut changes, mut reads, mut at) = (Vec::new(), Vec::new(), self.last);
        for request in batch {
            match request {
                Request::Change(when, change) => {
                    changes.push(change);
                    if when.file >= at.file {
                        at = when;
                    }
                }
                Request::Read(read) => reads.push(read),
            }
        }
        if !changes.is_empty() {
            let committed = self.commit(&mut changes, at);
            if committed.is_err() {
                // After a failure a database does nothing before it is opened anew.
                self.database = None;
            }
            changes.into_iter().for_each(|change| change.finish(committed.clone()));
        }
        for read in reads {
            let transaction = self.database().and_then(|database| Ok(database.begin_read()?));
            // Beside the changes: a load of many keys takes a while.
            let reading = thread::Builder::new().name("key-file-read".to_owned());
            let _ = reading.spawn(move || read(transaction));
        }
    }

    fn commit(&mut self, changes: &mut [Box<dyn Change>], at: Moment) -> Result<(), Failure> {
        let last = self.last;
        let transaction = self.database()?.begin_write()?;
        let mut tables = Tables::open(&transaction)?;
        for change in changes {
            change.make(&mut tables)?;
        }
        if tables.changed || last.was_set_before(at) {
            tables.set_clock(at)?;
            drop(tables);
            transaction.commit()?;
            self.last = at;
        }
        Ok(())
    }

    fn database(&mut self) -> Result<&Database, Failure> {
        let database = match self.database.take() {
            Some(database) => database,
            None => (self.reopen)().map_err(|error| Failure::NotOpen(Arc::new(error)))?,
        };
        Ok(self.database.insert(database))
    }
}

/// A change that somebody waits for.
trait Change: Send {
    /// Fails if the file does.
    fn make(&mut self, tables: &mut Tables<'_>) -> Result<(), Failure>;

    /// Answers, after the commit.
    fn finish(self: Box<Self>, committed: Result<(), Failure>);
}

struct Job<T, W> {
    work: Option<W>,
    outcome: Option<Result<T, Failure>>,
    reply: oneshot::Sender<Result<T, Failure>>,
}

impl<T, W> Change for Job<T, W>
where
    T: Send,
    W: FnOnce(&mut Tables<'_>) -> Result<T, Failure> + Send,
{
    fn make(&mut self, tables: &mut Tables<'_>) -> Result<(), Failure> {
        let Some(work) = self.work.take() else { return Ok(()) };
        let outcome = self.outcome.insert(work(tables));
        match outcome {
            Err(failure) if failure.is_of_the_file() => Err(failure.clone()),
            _ => Ok(()),
        }
    }

    fn finish(self: Box<Self>, committed: Result<(), Failure>) {
        let outcome = self.outcome.unwrap_or(Err(Failure::BrokenOff));
        let _ = self.reply.send(committed.and(outcome));
    }
}
