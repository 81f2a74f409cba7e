//! A store of which failures are counted.

use std::sync::Arc;

use tokio::sync::mpsc;

use super::{
    Change, KeyStore, Loaded, Mark, Operation, Recovered, Replaced, Standing, StoreError, StoreFuture, Usage,
};
use crate::{
    key::KeyId,
    meter::{Counted, Meter},
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

    fn counted<'a, T>(&'a self, operation: Counted, future: StoreFuture<'a, T>) -> StoreFuture<'a, T>
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
    fn load<'a>(&'a self, only: Option<&'a [KeyId]>) -> StoreFuture<'a, Loaded> {
        self.counted(Counted::Load, self.store.load(only))
    }

    fn merge(&self, mark: Mark) -> StoreFuture<'_, Option<Standing>> {
        self.counted(Counted::Write, self.store.merge(mark))
    }

    fn operate(&self, id: KeyId, operation: Operation) -> StoreFuture<'_, Option<Standing>> {
        self.counted(Counted::Operate, self.store.operate(id, operation))
    }

    fn sweep(&self) -> StoreFuture<'_, Recovered> {
        self.counted(Counted::Recover, self.store.sweep())
    }

    fn changes(&self) -> Option<mpsc::Receiver<Change>> {
        self.store.changes()
    }

    fn add_usage(&self, usage: Vec<Usage>) -> StoreFuture<'_, ()> {
        self.counted(Counted::Usage, self.store.add_usage(usage))
    }

    fn replace_failed(&self) -> StoreFuture<'_, Vec<Replaced>> {
        self.counted(Counted::Replace, self.store.replace_failed())
    }
}
