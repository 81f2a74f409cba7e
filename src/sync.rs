//! Synchronisation primitives, swappable for `loom` and `shuttle`.
//!
//! The `cfg` value `schedules` selects the primitives of `loom` or `shuttle` in tests that explore thread schedules.
//! Neither tool models `arc_swap` or tokio's locks: both work there, but each of their operations counts as one step.

#[cfg(all(test, schedules = "loom"))]
pub(crate) use loom::sync::{Mutex, MutexGuard, atomic};
#[cfg(all(test, schedules = "shuttle"))]
pub(crate) use shuttle::sync::{Mutex, MutexGuard, atomic};
#[cfg(not(all(test, any(schedules = "loom", schedules = "shuttle"))))]
pub(crate) use std::sync::{Mutex, MutexGuard, atomic};

#[cfg(not(all(test, schedules = "shuttle")))]
pub(crate) use tokio::task::JoinSet;

#[cfg(all(test, schedules = "shuttle"))]
pub(crate) use self::without_tokio::JoinSet;

#[cfg(all(test, schedules = "shuttle"))]
mod without_tokio {
    use std::collections::VecDeque;

    use shuttle::future::{JoinError, JoinHandle, spawn};

    pub(crate) struct JoinSet<T>(VecDeque<JoinHandle<T>>);

    impl<T> Default for JoinSet<T> {
        fn default() -> Self {
            Self(VecDeque::new())
        }
    }

    impl<T: Send + 'static> JoinSet<T> {
        pub(crate) fn spawn(&mut self, task: impl Future<Output = T> + Send + 'static) {
            self.0.push_back(spawn(task));
        }

        pub(crate) fn len(&self) -> usize {
            self.0.len()
        }

        pub(crate) async fn join_next(&mut self) -> Option<Result<T, JoinError>> {
            Some(self.0.pop_front()?.await)
        }
    }
}
