//! A store of which failures are counted.

use std::sync::Arc;

use tokio::sync::mpsc;

use super::{Changed, KeyStore, Loaded, Mark, Recovered, Replaced, StoreError, StoreFuture, UsageBatch};
use crate::{
    key::{KeyId, Secret},
    meter::{Meter, Operation},
};

#[derive(Debug)]
pub(crate) struct Metered<S> {
    store: S,
    meter: Arc<Meter>,
}

impl<S: KeyStore> Metered<S> {
    pub(crate) fn new(store: S, meter: Arc<Meter>) -> Self {
        Self { store, meter }
    }

    fn counted<'a, T>(&'a self, operation: Operation, future: StoreFuture<'a, T>) -> StoreFuture<'a, T>
    where
        T: 'a,
    {
        Box::pin(async move {
            let done: Result<T, StoreError> = future.await;
            done.inspect_err(|_| self.meter.store_failed(operation))
        })
    }
}

impl<S: KeyStore> KeyStore for Metered<S> {
    fn load(&self) -> StoreFuture<'_, Loaded> {
        self.counted(Operation::Load, self.store.load())
    }

    fn load_some<'a>(&'a self, ids: &'a [KeyId]) -> StoreFuture<'a, Loaded> {
        self.counted(Operation::Load, self.store.load_some(ids))
    }

    fn write(&self, mark: Mark) -> StoreFuture<'_, ()> {
        self.counted(Operation::Write, self.store.write(mark))
    }

    fn recover(&self) -> StoreFuture<'_, Recovered> {
        self.counted(Operation::Recover, self.store.recover())
    }

    fn add_usage<'a>(&'a self, batch: &'a UsageBatch) -> StoreFuture<'a, ()> {
        self.counted(Operation::Usage, self.store.add_usage(batch))
    }

    fn replace_failed(&self) -> StoreFuture<'_, Vec<Replaced>> {
        self.counted(Operation::Replace, self.store.replace_failed())
    }

    fn insert(&self, id: KeyId, secret: Secret) -> StoreFuture<'_, bool> {
        self.counted(Operation::Operate, self.store.insert(id, secret))
    }

    fn remove<'a>(&'a self, id: &'a KeyId) -> StoreFuture<'a, bool> {
        self.counted(Operation::Operate, self.store.remove(id))
    }

    fn reset<'a>(&'a self, id: &'a KeyId) -> StoreFuture<'a, bool> {
        self.counted(Operation::Operate, self.store.reset(id))
    }

    fn set_disabled<'a>(&'a self, id: &'a KeyId, disabled: bool) -> StoreFuture<'a, bool> {
        self.counted(Operation::Operate, self.store.set_disabled(id, disabled))
    }

    fn watch(&self) -> Option<mpsc::Receiver<Changed>> {
        self.store.watch()
    }
}
