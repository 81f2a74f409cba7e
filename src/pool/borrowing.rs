//! What a scope has borrowed from other processes, and what they are to be told.

use std::{mem, sync::PoisonError, time::Duration};

use crate::{
    lending::{Item, Origin, Report, Stock, Token, Used},
    limit::{Remaining, nanos},
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
};

/// After a refusal that names no wait, the other tokens of the limit are put off by so much.
const NO_WAIT: Duration = Duration::from_millis(200);

#[derive(Debug, Default)]
pub(crate) struct Borrowing {
    /// How many processes share the scope, if others are known that use it; else 0.
    processes: AtomicUsize,
    /// Requests that got a key, while this is on.
    served: AtomicU64,
    stock: Mutex<Stock>,
    /// What lenders are to be told.
    news: Mutex<Vec<Item>>,
}

impl Borrowing {
    #[inline]
    pub(crate) fn is_on(&self) -> bool {
        self.processes() != 0
    }

    #[inline]
    pub(crate) fn processes(&self) -> usize {
        self.processes.load(Relaxed)
    }

    pub(crate) fn shared_by(&self, processes: usize) {
        self.processes.store(processes, Relaxed);
    }

    pub(crate) fn count_served(&self) {
        self.served.fetch_add(1, Relaxed);
    }

    pub(crate) fn served(&self) -> u64 {
        self.served.load(Relaxed)
    }

    pub(crate) fn lock_stock(&self) -> MutexGuard<'_, Stock> {
        self.stock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request with a borrowed token has its answer.
    pub(crate) fn answered(
        &self,
        token: &Token,
        sent_at: u64,
        is_limited: bool,
        wait: Option<Duration>,
        said: &Remaining,
        now: u64,
    ) {
        let Origin::Lender { process, number, reports } = token.origin else { return };
        if is_limited {
            let until = now.saturating_add(nanos(wait.unwrap_or(NO_WAIT)));
            self.lock_stock().put_off(token.limit, until);
        }
        if is_limited || reports {
            let report = Report { lender: process, number, sent_at, is_limited, wait, said: *said };
            self.lock_news().push(Item::Report(report));
        }
    }

    /// A request that uses a loan takes so many of the service's tokens.
    pub(crate) fn uses(&self, token: &Token, tokens: u64) {
        if let Origin::Lender { process, number, .. } = token.origin {
            let tokens = u32::try_from(tokens).unwrap_or(u32::MAX);
            self.lock_news().push(Item::Used(Used { lender: process, number, tokens }));
        }
    }

    pub(crate) fn take_news(&self) -> Vec<Item> {
        mem::take(&mut self.lock_news())
    }

    fn lock_news(&self) -> MutexGuard<'_, Vec<Item>> {
        self.news.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
