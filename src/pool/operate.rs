//! An operator's changes of keys. Each is made in the store first; the pool applies the store's answer. If the store fails,
//! nothing changes here. A change whose caller has gone may have been made in the store: the next load brings it in.

use std::sync::Arc;

use super::{key::Key, key_pool::KeyPool};
use crate::{
    key::inject::UnusableSecret,
    key::{InvalidKeyId, KeyId},
    replication::Link,
    store::{Operation, Scope, StoreError},
};

/// The reason why an operator's change could not be made.
///
/// If the store failed, the [`StoreError`] is the source.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct OperateError(pub(super) Cause);

impl OperateError {
    /// Whether there is no such key.
    #[must_use]
    pub fn is_unknown_key(&self) -> bool {
        matches!(self.0, Cause::UnknownKey(_))
    }

    /// Whether another key, here or in the store, has the id, or another key of this pool has the secret.
    ///
    /// To the service, two keys with one secret are one: when it limits one, the pool would go on to use the other.
    #[must_use]
    pub fn is_taken(&self) -> bool {
        matches!(self.0, Cause::KeyExists(_) | Cause::DuplicateSecret(_))
    }

    /// Whether the store failed, or did not answer in time. Nothing has changed in this pool. If the store made the
    /// change nevertheless, the next load brings it in.
    ///
    /// Of many keys that are inserted, those behind several failures in a row are not tried: this is `true` for them,
    /// too.
    #[must_use]
    pub fn is_store_failure(&self) -> bool {
        matches!(self.0, Cause::NotTried | Cause::Store(_))
    }
}

#[derive(Debug, thiserror::Error)]
pub(super) enum Cause {
    #[error("there is no key {0:?}")]
    UnknownKey(String),
    #[error("there is a key {0} already")]
    KeyExists(KeyId),
    #[error("key {0} has the same secret")]
    DuplicateSecret(KeyId),
    #[error(transparent)]
    InvalidKeyId(#[from] InvalidKeyId),
    #[error("key {id} can't be used: {reason}")]
    UnusableSecret { id: KeyId, reason: UnusableSecret },
    #[error("key {id}: `{field}` is not supported yet, remove it")]
    UnsupportedField { id: KeyId, field: &'static str },
    #[error("the key was not tried: the store had failed for the keys before it")]
    NotTried,
    #[error("the store did not confirm the change")]
    Store(#[from] StoreError),
}

impl KeyPool {
    /// Removes a key for good. Requests in flight with it finish.
    ///
    /// # Errors
    ///
    /// If there is no such key, or if the store fails.
    pub async fn remove(&self, id: impl AsRef<str>) -> Result<(), OperateError> {
        self.take_out(id.as_ref()).await.map_err(OperateError)
    }

    /// Ends all rests of a key, those of its scopes included, whatever their reasons, and drops what responses said of it
    /// before. A key that is disabled stays disabled. Of the other keys of its quota group, the rests of scopes end,
    /// since the group's keys share them.
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
    /// If there is no such key, or if the store fails.
    pub async fn reset(&self, id: impl AsRef<str>) -> Result<(), OperateError> {
        self.change(id.as_ref(), Operation::Reset(None)).await.map_err(OperateError)
    }

    /// Ends the rest of one scope of a key.
    ///
    /// # Errors
    ///
    /// If there is no such key, or if the store fails.
    pub async fn reset_scope(&self, id: impl AsRef<str>, scope: Scope) -> Result<(), OperateError> {
        self.change(id.as_ref(), Operation::Reset(Some(scope))).await.map_err(OperateError)
    }

    /// Takes a key out of service until [`enable`](Self::enable). Its cooldown, if it has one, continues.
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
    /// If there is no such key, or if the store fails.
    pub async fn disable(&self, id: impl AsRef<str>) -> Result<(), OperateError> {
        self.change(id.as_ref(), Operation::Disable).await.map_err(OperateError)
    }

    /// Puts a disabled key back into service; if it has a cooldown, when that ends.
    ///
    /// # Errors
    ///
    /// If there is no such key, or if the store fails.
    pub async fn enable(&self, id: impl AsRef<str>) -> Result<(), OperateError> {
        self.change(id.as_ref(), Operation::Enable).await.map_err(OperateError)
    }

    async fn take_out(&self, id: &str) -> Result<(), Cause> {
        let key = self.known(id)?;
        let Some(link) = self.link() else {
            self.engine().remove(&key.id);
            return Ok(());
        };
        let _turn = link.turn().await?;
        let key = self.known(id)?;
        link.operate(&key.id, Operation::Remove).await?;
        self.engine().remove(&key.id);
        Ok(())
    }

    /// Removes a key from the store that has left the pool already.
    pub(super) async fn remove_from_store(&self, id: &KeyId) -> Result<(), OperateError> {
        let remove = async {
            let Some(link) = self.link() else { return Ok(()) };
            let _turn = link.turn().await?;
            link.operate(id, Operation::Remove).await.map(drop)
        };
        remove.await.map_err(|error: StoreError| OperateError(error.into()))
    }

    async fn change(&self, id: &str, operation: Operation) -> Result<(), Cause> {
        let key = self.known(id)?;
        let Some(link) = self.link() else {
            self.change_alone(&key, operation);
            return Ok(());
        };
        let turn = link.turn().await?;
        // The key may have been replaced meanwhile.
        let key = self.known(id)?;
        let reset = match &operation {
            Operation::Reset(scope) => Some(scope.clone()),
            _ => None,
        };
        if let Some(only) = &reset {
            self.reset_group(link, &key, only.as_ref()).await?;
        }
        let changed = link.operate(&key.id, operation).await?;
        let standing = changed.ok_or_else(|| Cause::UnknownKey(key.id.to_string()))?;
        if key.born() == Some(standing.born) {
            match reset {
                Some(scope) => {
                    let (words, disabled) = (&standing.words, Some(standing.disabled));
                    self.engine().apply_reset(&key, words, disabled, scope.as_ref());
                }
                None => self.engine().apply(&key, &standing),
            }
        } else {
            // The store has another key of that id. If it can't be loaded now, the next pass does it.
            let _ = link.load_in(turn, Some(vec![key.id.clone()])).await;
        }
        Ok(())
    }

    /// Ends the rests of other keys that would go on to rest the limits of this one.
    async fn reset_group(&self, link: &Link, key: &Arc<Key>, only: Option<&Scope>) -> Result<(), StoreError> {
        for (member, scope) in self.engine().rests_of_group(key, only) {
            let reset = link.operate(&member.id, Operation::Reset(Some(scope.clone()))).await?;
            if let Some(standing) = reset.filter(|standing| member.born() == Some(standing.born)) {
                let (words, disabled) = (&standing.words, Some(standing.disabled));
                self.engine().apply_reset(&member, words, disabled, Some(&scope));
            }
        }
        Ok(())
    }

    /// What a store would do.
    fn change_alone(&self, key: &Arc<Key>, operation: Operation) {
        let engine = self.engine();
        match operation {
            Operation::Reset(scope) => {
                let reset = |key: &Arc<Key>, scope: Option<&Scope>| {
                    let mut words = engine.words(key);
                    words.reset(scope);
                    engine.apply_reset(key, &words, None, scope);
                };
                for (member, scope) in engine.rests_of_group(key, scope.as_ref()) {
                    reset(&member, Some(&scope));
                }
                reset(key, scope.as_ref());
            }
            Operation::Disable => engine.set_disabled(key, true),
            Operation::Enable => engine.set_disabled(key, false),
            Operation::Insert(_) | Operation::Remove => {}
        }
    }

    fn known(&self, id: &str) -> Result<Arc<Key>, Cause> {
        let snapshot = self.engine().snapshot();
        // As much of the id as a key's name can have: it may be anything.
        snapshot.get(id).cloned().ok_or_else(|| Cause::UnknownKey(id.chars().take(256).collect()))
    }
}
