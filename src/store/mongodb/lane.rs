//! Operations one after the other, each within a limit, and none cut off half-way.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{Mutex, mpsc},
    task::JoinHandle,
    time::timeout,
};

use super::error::Failure;

/// What must not overlap goes through one lane.
///
/// Each operation has a task of its own: the driver's futures must not be dropped before they are done, and who
/// waits for one may give up, or be dropped. The next one of the lane then waits until it has ended.
#[derive(Clone, Debug, Default)]
pub(super) struct Lane(Arc<Mutex<()>>);

impl Lane {
    pub(super) async fn run<T: Send + 'static>(
        &self,
        limit: Duration,
        operation: impl Future<Output = Result<T, Failure>> + Send + 'static,
    ) -> Result<T, Failure> {
        ended_within(limit, self.begin(limit, operation).await?).await
    }

    /// Runs an operation that passes its outcome on in parts, each of them within the limit.
    pub(super) async fn run_in_parts<P, F>(
        &self,
        limit: Duration,
        operation: impl FnOnce(mpsc::Sender<P>) -> F,
        mut take: impl FnMut(P),
    ) -> Result<(), Failure>
    where
        F: Future<Output = Result<(), Failure>> + Send + 'static,
    {
        let (parts, mut received) = mpsc::channel(1);
        let task = self.begin(limit, operation(parts)).await?;
        while let Some(part) =
            timeout(limit, received.recv()).await.map_err(|_| Failure::TookTooLong(limit))?
        {
            take(part);
        }
        ended_within(limit, task).await
    }

    /// Has the operation begin, once its turn has come within the limit.
    async fn begin<T: Send + 'static>(
        &self,
        limit: Duration,
        operation: impl Future<Output = Result<T, Failure>> + Send + 'static,
    ) -> Result<Task<T>, Failure> {
        let turn = timeout(limit, self.0.clone().lock_owned()).await;
        let turn = turn.map_err(|_| Failure::StillUnderWay(limit))?;
        Ok(tokio::spawn(async move {
            let _turn = turn;
            operation.await
        }))
    }
}

type Task<T> = JoinHandle<Result<T, Failure>>;

async fn ended_within<T>(limit: Duration, task: Task<T>) -> Result<T, Failure> {
    match timeout(limit, task).await {
        Err(_) => Err(Failure::TookTooLong(limit)),
        Ok(Err(_)) => Err(Failure::BrokenOff),
        Ok(Ok(result)) => result,
    }
}

/// A lane for each key, or for a few that share one.
#[derive(Debug)]
pub(super) struct Lanes([Lane; 64]);

impl Default for Lanes {
    fn default() -> Self {
        Self(std::array::from_fn(|_| Lane::default()))
    }
}

impl Lanes {
    pub(super) fn of(&self, key: &impl Hash) -> &Lane {
        let mut hasher = DefaultHasher::new();
        key.hash(&mut hasher);
        &self.0[hasher.finish() as usize % self.0.len()]
    }
}
