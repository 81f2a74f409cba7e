//! What an operator does to keys that there are. Each takes effect in this pool at once, then in the store. What is on
//! its way to the store is not overruled by a reload that has read it before. A change that is dropped before the store
//! was asked is not done there, and the next reload takes it back here; a removal is taken back at once.

use std::sync::Arc;

use super::{KeyPool, key::Key};
use crate::{
    key::inject::UnusableSecret,
    key::{InvalidKeyId, KeyId},
    limit::State,
    store::StoreError,
};

/// Why an operator's change could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OperateError {
    /// There is no such key.
    #[error("there is no key {0:?}")]
    UnknownKey(String),
    /// There is such a key already, here or in the store.
    #[error("there is a key {0} already")]
    KeyExists(KeyId),
    /// Another key of this pool has that secret. To the service the two would be one: when it limits one, the other would
    /// go on.
    #[error("key {0} has the same secret")]
    DuplicateSecret(KeyId),
    /// That can't be the name of a key.
    #[error(transparent)]
    InvalidKeyId(#[from] InvalidKeyId),
    /// No request could carry the secret.
    #[error("key {id} can't be used: {reason}")]
    UnusableSecret {
        /// The key.
        id: KeyId,
        /// What is wrong with its secret.
        reason: UnusableSecret,
    },
    /// The key's spec has a field that [has no effect yet](crate::KeySpec::unsupported).
    #[error("key {id}: `{field}` is not supported yet, remove it")]
    UnsupportedField {
        /// The key.
        id: KeyId,
        /// The field.
        field: &'static str,
    },
    /// The store had failed several times in a row by the turn of this one of many keys, which is not in this pool.
    #[error("it was not tried: the store had failed for the keys before it")]
    NotTried,
    /// The store failed, or gave no answer in time. A key that was to be inserted is not in this pool, one that was to
    /// be removed is in it again, and what else was done in this pool holds, until the next reload: then the store
    /// has the last word.
    #[error("the store does not know of it")]
    Store(#[from] StoreError),
}

impl KeyPool {
    /// Removes a key for good. Requests that are under way with it finish.
    ///
    /// # Errors
    ///
    /// Where there is no such key; and where the store fails, in which case the pool has the key again.
    pub async fn remove(&self, id: impl AsRef<str>) -> Result<(), OperateError> {
        let mut leaving = Leaving::out_of(self, self.known(id.as_ref())?.id.clone())?;
        let persistence = &self.inner.persistence;
        let _turn = persistence.turn.lock().await;
        self.plant_seeds_in_turn().await?;
        // One of that name may have been inserted meanwhile.
        leaving.take_out();
        if let Some(store) = &persistence.store {
            store.remove(&leaving.id).await?;
        }
        leaving.for_good();
        Ok(())
    }

    /// Ends a key's rest, whatever its reason, and forgets marks that the store does not have yet. A key that
    /// is disabled stays so.
    ///
    /// ```
    /// use tower_key_rotation::KeyPool;
    ///
    /// // every key that the service no longer accepted, say after a bill was paid
    /// async fn reset_revoked(pool: &KeyPool) -> Result<(), tower_key_rotation::OperateError> {
    ///     for key in pool.stats().keys {
    ///         if key.status == tower_key_rotation::Status::Revoked {
    ///             pool.reset(&key.id).await?;
    ///         }
    ///     }
    ///     Ok(())
    /// }
    /// ```
    ///
    /// # Errors
    ///
    /// Where there is no such key, or the store fails.
    pub async fn reset(&self, id: impl AsRef<str>) -> Result<(), OperateError> {
        let key = self.known(id.as_ref())?;
        let _on_its_way = key.clone().reset_on_its_way();
        self.end_rest(&key, || false);
        let asked = self.now();
        let persistence = &self.inner.persistence;
        let _turn = persistence.turn.lock().await;
        self.plant_seeds_in_turn().await?;
        // It may be another one of that name by now. What a response has said since then is news.
        let key = self.known(id.as_ref())?;
        let is_news = || key.unwritten.marked_at() > asked;
        self.end_rest(&key, is_news);
        // A mark that is on its way arrives before the reset, not after it.
        let _no_write_under_way = persistence.writing.lock().await;
        let Some(store) = &persistence.store else { return Ok(()) };
        found(&key, store.reset(&key.id).await?)?;
        if is_news() {
            // The store took that mark for an older one than the reset, which has only now come to it. The key's state is
            // that mark: no reload has brought in a rest meanwhile.
            key.unwritten.set_marked_at(self.now());
            key.unwritten.extend(key.state.load());
            self.refresh(&key);
            persistence.mark_waits();
        }
        Ok(())
    }

    /// A reset that is asked for, and waits for its turn until it is polled again.
    #[cfg(all(test, any(schedules = "loom", schedules = "shuttle")))]
    pub(super) fn reset_that_waits(
        &self,
        id: &'static str,
    ) -> impl Future<Output = Result<(), OperateError>> + use<> {
        let _turn = self.inner.persistence.turn.try_lock().expect("nobody has the turn");
        let pool = self.clone();
        let mut reset = Box::pin(async move { pool.reset(id).await });
        assert!(futures_util::FutureExt::now_or_never(reset.as_mut()).is_none(), "it waits for its turn");
        reset
    }

    /// Takes a key out of service until [`enable`](Self::enable). Its cooldown, if it has one, goes on.
    ///
    /// ```
    /// use tower_key_rotation::KeyPool;
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let pool = KeyPool::builder().key("alpha", "sk-1").build()?;
    /// pool.disable("alpha").await?;
    /// assert_eq!(pool.stats().disabled, 1);
    /// pool.enable("alpha").await?;
    /// assert_eq!(pool.stats().healthy, 1);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// Where there is no such key, or the store fails.
    pub async fn disable(&self, id: impl AsRef<str>) -> Result<(), OperateError> {
        self.set_disabled(id.as_ref(), true).await
    }

    /// Puts a disabled key back into service; if it still has a cooldown, when that ends.
    ///
    /// # Errors
    ///
    /// Where there is no such key, or the store fails.
    pub async fn enable(&self, id: impl AsRef<str>) -> Result<(), OperateError> {
        self.set_disabled(id.as_ref(), false).await
    }

    async fn set_disabled(&self, id: &str, disabled: bool) -> Result<(), OperateError> {
        let _on_its_way = self.known(id)?.switch_on_its_way();
        let set = || {
            let key = self.known(id)?;
            self.change(&key, |state| state.disabled(disabled));
            Ok::<_, OperateError>(key)
        };
        set()?;
        let persistence = &self.inner.persistence;
        let _turn = persistence.turn.lock().await;
        self.plant_seeds_in_turn().await?;
        // It may be another one of that name by now.
        let key = set()?;
        match &persistence.store {
            Some(store) => found(&key, store.set_disabled(&key.id, disabled).await?),
            None => Ok(()),
        }
    }

    fn known(&self, id: &str) -> Result<Arc<Key>, OperateError> {
        let snapshot = self.inner.snapshot.load();
        // As much of it as a key's name can have: it may be anything.
        snapshot.get(id).cloned().ok_or_else(|| OperateError::UnknownKey(id.chars().take(256).collect()))
    }

    /// Forgets that the key rests, unless that is news, which is asked with each look: a mark may come just now.
    fn end_rest(&self, key: &Arc<Key>, is_news: impl Fn() -> bool) {
        let end = |state: State| if is_news() { state } else { State::HEALTHY.disabled(state.is_disabled()) };
        // In this order, or a mark that comes in between has the store told of the old rest.
        key.unwritten.update(end);
        self.change(key, end);
    }

    fn change(&self, key: &Arc<Key>, next: impl Fn(State) -> State) {
        key.state.update(next);
        self.refresh(key);
        self.inner.returned.notify_waiters();
    }

    /// The key that was taken out.
    fn take_out(&self, id: &KeyId) -> Option<Arc<Key>> {
        let mut taken = None;
        self.edit(|before| {
            taken = before.get(id.as_str()).cloned();
            taken.as_ref()?;
            Some(before.keys().iter().filter(|key| key.id != *id).cloned().collect())
        });
        taken
    }
}

/// A key whose removal is on its way to the store. Dropped before [`for_good`](Self::for_good), it is in the pool
/// again, with all that is known of it; meanwhile a reload does not bring it in.
struct Leaving<'a> {
    pool: &'a KeyPool,
    id: KeyId,
    key: Option<Arc<Key>>,
}

impl<'a> Leaving<'a> {
    fn out_of(pool: &'a KeyPool, id: KeyId) -> Result<Self, OperateError> {
        if !pool.inner.persistence.leaving().insert(id.clone()) {
            return Err(OperateError::UnknownKey(id.to_string()));
        }
        let mut leaving = Self { pool, id, key: None };
        leaving.take_out();
        Ok(leaving)
    }

    fn take_out(&mut self) {
        if let Some(key) = self.pool.take_out(&self.id) {
            self.pool.count_out(&key);
            self.key = Some(key);
        }
    }

    fn for_good(mut self) {
        self.key = None;
    }
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        if let Some(key) = self.key.take() {
            self.pool.edit(|before| {
                let is_free = before.get(self.id.as_str()).is_none();
                is_free.then(|| {
                    self.pool.count_in(&key);
                    before.keys().iter().cloned().chain([key]).collect()
                })
            });
            // A mark that was made meanwhile could not be found.
            self.pool.inner.persistence.mark_waits();
        }
        self.pool.inner.persistence.leaving().remove(&self.id);
    }
}

/// What the store says of a key that this pool has.
fn found(key: &Key, found: bool) -> Result<(), OperateError> {
    if found { Ok(()) } else { Err(OperateError::UnknownKey(key.id.to_string())) }
}
