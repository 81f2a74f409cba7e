//! Operations one after the other, each within a limit, and none cut off half-way.

use std::{
    future::Future,
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::Mutex,
    task::JoinHandle,
    time::{Instant, timeout},
};

use super::error::Failure;

/// What must not overlap goes through one lane.
///
/// Each operation has a task of its own: the driver's futures must not be dropped before they are done, and who
/// waits for one may give up, or be dropped. The next one of the lane then waits until it has ended.
#[derive(Clone, Debug, Default)]
pub(super) struct Lane(Arc<Mutex<()>>);

impl Lane {
    /// Runs what `operation` makes, which is told how long it has waited for its turn.
    pub(super) async fn run<T, F>(
        &self,
        limit: Duration,
        operation: impl FnOnce(Duration) -> F,
    ) -> Result<T, Failure>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Failure>> + Send + 'static,
    {
        let task = self.begin(limit, operation).await?;
        ended_within(limit, task).await
    }

    /// Has it begin, once its turn has come within the limit.
    pub(super) async fn begin<T, F>(
        &self,
        limit: Duration,
        operation: impl FnOnce(Duration) -> F,
    ) -> Result<Task<T>, Failure>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Failure>> + Send + 'static,
    {
        let asked = Instant::now();
        let turn = timeout(limit, self.0.clone().lock_owned()).await;
        let turn = turn.map_err(|_| Failure::StillUnderWay(limit))?;
        let operation = operation(asked.elapsed());
        Ok(tokio::spawn(async move {
            let _turn = turn;
            operation.await
        }))
    }
}

pub(super) type Task<T> = JoinHandle<Result<T, Failure>>;

pub(super) async fn ended_within<T>(limit: Duration, task: Task<T>) -> Result<T, Failure> {
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

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(5);

    #[test]
    fn each_key_keeps_its_lane_among_several() {
        let lanes = Lanes::default();
        let lane_of = |key: usize| std::ptr::from_ref(lanes.of(&key));
        assert!((0..100).all(|key| lane_of(key) == lane_of(key)));
        assert!((0..100).any(|key| lane_of(key) != lane_of(0)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_timed_out_operation_still_occupies_its_lane() {
        let lane = Lane::default();
        let (finish, finished) = oneshot::channel();
        let (tell, told) = oneshot::channel();
        let slow = lane.run(LIMIT, |_| async {
            let _: () = finished.await.unwrap();
            let _ = tell.send(());
            Ok(())
        });
        assert_eq!(slow.await, Err(Failure::TookTooLong(LIMIT)));

        let next = || lane.run(LIMIT, |waited| async move { Ok(waited) });
        assert_eq!(next().await, Err(Failure::StillUnderWay(LIMIT)));
        finish.send(()).unwrap();
        assert_eq!(next().await.map(|_| ()), Ok(()));
        told.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn an_operation_without_a_waiter_still_completes() {
        let lane = Lane::default();
        let (tell, told) = oneshot::channel();
        let waiting = lane.run(LIMIT, |_| async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            let _ = tell.send(());
            Ok(())
        });
        assert!(timeout(Duration::from_millis(1), waiting).await.is_err());
        told.await.unwrap();
    }

    #[tokio::test]
    async fn one_that_panics_frees_its_lane() {
        let lane = Lane::default();
        let panics = lane
            .run(LIMIT, |_| async { if LIMIT.is_zero() { Ok(()) } else { panic!("as the test has it") } });
        assert_eq!(panics.await, Err(Failure::BrokenOff));
        assert_eq!(lane.run(LIMIT, |_| async { Ok(1) }).await, Ok(1));
    }
}
