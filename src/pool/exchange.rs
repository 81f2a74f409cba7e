//! An operator's exchange of keys: for a program that reads its keys again while it serves.

use std::{mem, sync::Arc};

use super::{
    key::{Key, UsableKey},
    key_pool::KeyPool,
    operate::{Cause, OperateError},
    snapshot::Snapshot,
};
use crate::{key::KeySpec, replication::Link, store::Operation};

impl KeyPool {
    /// The keys as they were given, with their secrets.
    ///
    /// ```
    /// use tower_key_rotation::KeyPool;
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let pool = KeyPool::builder().key("alpha", "sk-1").build()?;
    /// assert_eq!(pool.specs()[0].secret.expose(), "sk-1");
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn specs(&self) -> Vec<KeySpec> {
        self.engine().snapshot().keys().iter().map(|key| key.spec()).collect()
    }

    /// Gives a key another secret or other settings, at once: no request finds the pool without the key.
    ///
    /// With the same secret, the key keeps its rests. With another one, it begins healthy. Either way its counters begin
    /// anew, and requests in flight finish with what they have. With a store, the key is removed and inserted there.
    ///
    /// ```
    /// use tower_key_rotation::{KeyId, KeyPool, KeySpec};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let pool = KeyPool::builder().key("alpha", "sk-1").build()?;
    /// pool.replace(KeySpec::new(KeyId::new("alpha")?, "sk-2")).await?;
    /// assert_eq!(pool.specs()[0].secret.expose(), "sk-2");
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// If there is no such key, if the secret or a field can't be used, if another key has the secret, or if the store
    /// fails. If the store fails between the two steps, the key leaves the pool with the next load.
    pub async fn replace(&self, spec: KeySpec) -> Result<(), OperateError> {
        self.exchange(spec).await.map_err(OperateError)
    }

    /// Takes over the rests of the keys that another pool has under the same id and secret, and whether they are disabled:
    /// for a pool that replaces the other one with other settings.
    ///
    /// Counters and learned limits begin anew. A pool over the same store needs this not.
    ///
    /// ```
    /// use tower_key_rotation::{KeyPool, Quota};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let before = KeyPool::builder().key("alpha", "sk-1").build()?;
    /// before.disable("alpha").await?;
    /// let pool = KeyPool::builder().key("alpha", "sk-1").quota(Quota::per_minute(60)).build()?;
    /// pool.adopt_rests(&before);
    /// assert_eq!(pool.stats().disabled, 1);
    /// # Ok(())
    /// # }
    /// ```
    pub fn adopt_rests(&self, other: &Self) {
        let (here, there) = (self.engine().snapshot(), other.engine().snapshot());
        for key in here.keys() {
            let same = there.get(key.id.as_str()).filter(|same| same.secret() == key.secret());
            if let Some(same) = same {
                self.engine().join(key, &other.engine().words(same));
                if same.state.load().is_disabled() {
                    self.engine().set_disabled(key, true);
                }
            }
        }
    }

    async fn exchange(&self, spec: KeySpec) -> Result<(), Cause> {
        if let Some(field) = spec.unsupported() {
            return Err(Cause::UnsupportedField { id: spec.id, field });
        }
        let usable = UsableKey::new(&spec, &self.engine().config.inject)
            .map_err(|reason| Cause::UnusableSecret { id: spec.id.clone(), reason })?;
        let key = self.engine().new_key(usable);
        let Some(link) = self.link() else { return self.put_in_place(&key) };
        let _turn = link.turn().await?;
        place_of(&self.engine().snapshot(), &key)?;
        exchange_in_store(link, &key, spec).await?;
        self.put_in_place(&key)
    }

    fn put_in_place(&self, key: &Arc<Key>) -> Result<(), Cause> {
        let engine = self.engine();
        let mut outcome = Ok(None);
        engine.edit(|before| {
            let place = match place_of(before, key) {
                Ok(place) => place,
                Err(cause) => {
                    outcome = Err(cause);
                    return None;
                }
            };
            let mut keys = before.keys().to_vec();
            let old = mem::replace(&mut keys[place], key.clone());
            let words = (old.secret() == key.secret()).then(|| engine.words(&old));
            if let Some(words) = &words {
                // Before any request can find the key.
                engine.join(key, words);
                engine.set_disabled(key, old.state.load().is_disabled());
            }
            outcome = Ok(Some((old, words)));
            Some(keys)
        });
        if let Some((old, words)) = outcome? {
            if let Some(words) = &words {
                // Rests in scopes are kept only for keys of the pool.
                engine.join(key, words);
            }
            engine.count_out([old]);
        }
        Ok(())
    }
}

/// Where the pool has the key that a new one replaces, if the new one can replace it.
fn place_of(pool: &Snapshot, key: &Key) -> Result<usize, Cause> {
    let place = pool.slot(&key.id).ok_or_else(|| Cause::UnknownKey(key.id.to_string()))?;
    let secret = key.secret();
    match pool.keys().iter().find(|other| other.id != key.id && other.secret() == secret) {
        Some(other) => Err(Cause::DuplicateSecret(other.id.clone())),
        None => Ok(place),
    }
}

async fn exchange_in_store(link: &Link, key: &Arc<Key>, spec: KeySpec) -> Result<(), Cause> {
    link.operate(&key.id, Operation::Remove).await?;
    let inserted = link.operate(&key.id, Operation::Insert(spec.clone())).await?;
    let standing = inserted.ok_or_else(|| Cause::KeyExists(key.id.clone()))?;
    key.is(&spec, standing.born);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{num::NonZeroU32, time::Duration};

    use crate::{
        KeyId, KeyPool, KeySpec, Status, Traits, classify::Verdict, clock::ManualClock, store::MemoryStore,
    };

    const MINUTE: Duration = Duration::from_secs(60);

    fn spec(id: &str, secret: &str) -> KeySpec {
        KeySpec::new(KeyId::new(id).unwrap(), secret)
    }

    fn pool(clock: &ManualClock) -> KeyPool {
        let keys = [("alpha", "sk-1"), ("beta", "sk-2")];
        KeyPool::builder().keys(keys).cooldown(2 * MINUTE).clock(clock.clone()).build().unwrap()
    }

    fn rest(pool: &KeyPool, id: &str) {
        let lease = pool.lease(&Traits::new().key(KeyId::new(id).unwrap())).unwrap();
        lease.answered_with(Verdict::RateLimited { wait: None });
    }

    fn status(pool: &KeyPool, id: &str) -> Status {
        pool.stats().keys.iter().find(|key| key.id.as_str() == id).unwrap().status
    }

    #[tokio::test]
    async fn another_secret_begins_healthy_and_settings_keep_rests() {
        let pool = pool(&ManualClock::new());
        rest(&pool, "alpha");
        rest(&pool, "beta");
        pool.replace(spec("alpha", "sk-3")).await.unwrap();
        let mut heavy = spec("beta", "sk-2");
        heavy.weight = NonZeroU32::new(3);
        pool.replace(heavy.clone()).await.unwrap();
        assert_eq!(pool.specs(), [spec("alpha", "sk-3"), heavy]);
        assert_eq!((status(&pool, "alpha"), status(&pool, "beta")), (Status::Healthy, Status::RateLimited));
    }

    #[tokio::test]
    async fn what_cannot_replace_a_key_changes_nothing() {
        let pool = pool(&ManualClock::new());
        assert!(pool.replace(spec("gamma", "sk-3")).await.unwrap_err().is_unknown_key());
        assert!(pool.replace(spec("alpha", "sk-2")).await.unwrap_err().is_taken());
        assert!(pool.replace(spec("alpha", "sk 2\n")).await.is_err());
        assert_eq!(pool.specs(), [spec("alpha", "sk-1"), spec("beta", "sk-2")]);
    }

    #[tokio::test]
    async fn a_store_gets_the_new_secret() {
        let store = MemoryStore::new();
        let pool = KeyPool::builder().key("alpha", "sk-1").open(store.clone()).await.unwrap();
        pool.replace(spec("alpha", "sk-2")).await.unwrap();
        pool.reload().await.unwrap();
        let other = KeyPool::builder().open(store).await.unwrap();
        assert_eq!((pool.specs(), other.specs()), (vec![spec("alpha", "sk-2")], vec![spec("alpha", "sk-2")]));
    }

    #[tokio::test]
    async fn a_pool_adopts_rests_of_equal_keys() {
        let clock = ManualClock::new();
        let before = pool(&clock);
        rest(&before, "alpha");
        rest(&before, "beta");
        clock.advance(MINUTE);
        let keys = [("alpha", "sk-1"), ("beta", "sk-9")];
        let after = KeyPool::builder().keys(keys).clock(ManualClock::new()).build().unwrap();
        after.adopt_rests(&before);
        let left = after.stats().keys[0].time_left.unwrap();
        assert!(left <= MINUTE && left > MINUTE - Duration::from_secs(1), "{left:?}");
        assert_eq!(status(&after, "beta"), Status::Healthy);
    }
}
