//! The scopes that requests use, over the keys of one snapshot.

use std::{
    collections::HashMap,
    sync::{Arc, OnceLock, PoisonError},
};

use arc_swap::ArcSwap;

use super::{
    key::Key,
    layout::Layout,
    scoped::{Common, Limiting, Scoped},
};
use crate::{
    limit::Scope,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

/// The most scopes of a pool. Requests of further ones count as requests without a scope.
const MOST: usize = 1_024;

/// A scope that was not used for so long is forgotten, if there are many, in seconds.
const IDLE: u64 = 10 * 60;

#[derive(Debug)]
pub(crate) struct ScopesInUse {
    keys: Arc<[Arc<Key>]>,
    layout: Arc<Layout>,
    /// Of requests without a scope.
    none: OnceLock<Arc<Scoped>>,
    named: ArcSwap<HashMap<Scope, Arc<Scoped>>>,
    adding: Mutex<()>,
    /// The minute, and one, in which there were too many scopes.
    full_at: AtomicU64,
}

impl ScopesInUse {
    pub(crate) fn new(keys: Arc<[Arc<Key>]>, layout: Arc<Layout>, before: Option<&Self>) -> Self {
        let none = OnceLock::new();
        let mut named = HashMap::new();
        if let Some(before) = before {
            let moved = |scoped: &Arc<Scoped>| scoped.moved_to(keys.clone(), layout.clone());
            if let Some(scoped) = before.none.get() {
                let _ = none.set(moved(scoped));
            }
            named.extend(before.named.load().iter().map(|(scope, scoped)| (scope.clone(), moved(scoped))));
        }
        let named = ArcSwap::from_pointee(named);
        Self { keys, layout, none, named, adding: Mutex::new(()), full_at: AtomicU64::new(0) }
    }

    /// Calls `then` with a scope, which is made on first use.
    #[inline]
    pub(crate) fn with<T>(
        &self,
        scope: Option<&Scope>,
        limiting: &Arc<Limiting>,
        then: impl FnOnce(&Arc<Scoped>) -> T,
    ) -> T {
        match scope {
            None => then(match self.none.get() {
                Some(scoped) => scoped,
                None => self.add_none(limiting),
            }),
            Some(scope) => match self.named.load().get(scope) {
                Some(scoped) => then(scoped),
                None => then(&self.add(scope, limiting)),
            },
        }
    }

    /// A scope, if a request has used it.
    pub(crate) fn find(&self, scope: Option<&Scope>) -> Option<Arc<Scoped>> {
        match scope {
            None => self.none.get().cloned(),
            Some(scope) => self.named.load().get(scope).cloned(),
        }
    }

    /// The scope whose limits rest by that name, if a request has used it.
    pub(super) fn of_rests(&self, name: &Scope) -> Option<Arc<Scoped>> {
        if *name == Scope::none() { self.find(None) } else { self.find(Some(name)) }
    }

    pub(crate) fn each(&self, mut then: impl FnMut(&Arc<Scoped>)) {
        if let Some(scoped) = self.none.get() {
            then(scoped);
        }
        self.named.load().values().for_each(then);
    }

    #[cold]
    fn add_none(&self, limiting: &Arc<Limiting>) -> &Arc<Scoped> {
        let scoped = self.none.get_or_init(|| self.scoped(None, limiting));
        // A key may have changed before others could see this scope.
        scoped.take_rests();
        scoped.refresh_all();
        scoped
    }

    #[cold]
    fn add(&self, scope: &Scope, limiting: &Arc<Limiting>) -> Arc<Scoped> {
        let now = limiting.clock.now().as_secs();
        if self.full_at.load(Relaxed) == now / 60 + 1 {
            // Not again within a minute: whoever names the scopes could keep the pool busy.
            return self.none.get().unwrap_or_else(|| self.add_none(limiting)).clone();
        }
        let _one_at_a_time = self.adding.lock().unwrap_or_else(PoisonError::into_inner);
        let mut named = HashMap::clone(&self.named.load());
        if let Some(scoped) = named.get(scope) {
            return scoped.clone();
        }
        if named.len() >= MOST {
            named.retain(|_, scoped| !scoped.is_idle(now.saturating_sub(IDLE)));
        }
        if named.len() >= MOST {
            tracing::warn!(%scope, "too many scopes in use: this one's requests count as requests without a scope");
            self.full_at.store(now / 60 + 1, Relaxed);
            return self.add_none(limiting).clone();
        }
        let scoped = self.scoped(Some(scope.clone()), limiting);
        named.insert(scope.clone(), scoped.clone());
        self.named.store(Arc::new(named));
        // A key may have changed before others could see this scope.
        scoped.take_rests();
        scoped.refresh_all();
        scoped
    }

    fn scoped(&self, scope: Option<Scope>, limiting: &Arc<Limiting>) -> Arc<Scoped> {
        let common = Arc::new(Common::of(scope, &limiting.quotas));
        let scoped = Scoped::new(self.keys.clone(), self.layout.clone(), common, limiting.clone());
        scoped.take_rests();
        Arc::new(scoped)
    }
}
