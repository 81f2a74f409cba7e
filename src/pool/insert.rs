//! New keys. They go into the store first, which may have keys of the same names.

use std::{
    collections::{HashMap, HashSet},
    mem,
    sync::Arc,
};

use tokio::runtime::Handle;

use super::{
    key::{Key, UsableKey},
    key_pool::KeyPool,
    operate::{Cause, OperateError},
    snapshot::Snapshot,
};
use crate::{
    key::{KeyId, KeySpec, Secret},
    replication::Link,
    store::{Operation, StoreError},
    sync::JoinSet,
};

/// After so many failures in a row the other keys are not tried: each would wait for a store that is gone.
const FAILURES_IN_A_ROW: usize = 8;

/// The keys that are inserted in one turn; then loads and other operators have theirs.
const IN_A_TURN: usize = 500;

impl KeyPool {
    /// Adds a key. It is picked as soon as the store, if there is one, has taken it.
    ///
    /// ```
    /// use tower_key_rotation::KeyPool;
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let pool = KeyPool::builder().build()?;
    /// pool.insert("alpha", "sk-1").await?;
    /// assert_eq!(pool.stats().healthy, 1);
    ///
    /// assert!(pool.insert("alpha", "sk-2").await.is_err());
    /// pool.remove("alpha").await?;
    /// pool.insert("alpha", "sk-2").await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// If the id or the secret can't be used, or is another key's, or if the store fails.
    pub async fn insert(&self, id: impl AsRef<str>, secret: impl Into<Secret>) -> Result<(), OperateError> {
        // First, so that it is wiped whatever the id is.
        let secret = secret.into();
        let key = KeyId::new(id).map_err(Cause::from).and_then(|id| self.new_key(KeySpec::new(id, secret)));
        self.insert_new(vec![key]).await.into_iter().collect::<Result<_, _>>().map_err(OperateError)
    }

    /// Adds many keys, and returns each one's outcome in their order. A key that can't be added does not affect the others.
    ///
    /// This takes less time than an [`insert`](Self::insert) of each: several are inserted into the store at once, and
    /// some hundreds come into service together. Of keys with the same id or secret the first counts, also if it can't be
    /// added. If the future is dropped, the next load brings in the keys that the store has by then.
    ///
    /// ```
    /// use tower_key_rotation::{KeyId, KeyPool, KeySpec};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let pool = KeyPool::builder().build()?;
    /// let alpha = KeySpec::new(KeyId::new("alpha")?, "sk-1");
    /// let beta = KeySpec::new(KeyId::new("beta")?, "sk-1");
    /// let outcomes = pool.insert_all([alpha, beta]).await;
    /// assert!(outcomes[0].is_ok());
    /// assert!(outcomes[1].as_ref().is_err_and(|error| error.is_taken()));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// For each key as for [`insert`](Self::insert), and for a key with a field that [has no effect
    /// yet](KeySpec). After several failures of the store in a row, the remaining keys are not tried.
    pub async fn insert_all(&self, keys: impl IntoIterator<Item = KeySpec>) -> Vec<Result<(), OperateError>> {
        let keys = keys.into_iter().map(|spec| self.new_key(spec)).collect();
        self.insert_new(keys).await.into_iter().map(|inserted| inserted.map_err(OperateError)).collect()
    }

    async fn insert_new(&self, mut keys: Vec<Result<NewKey, Cause>>) -> Vec<Result<(), Cause>> {
        match self.link() {
            None => self.engine().edit(|before| {
                refuse_known(before, &mut keys);
                with_new(before, &keys)
            }),
            Some(link) => {
                let mut insertion = Insertion::new(link.clone());
                for keys in keys.chunks_mut(IN_A_TURN) {
                    let (_turn, failure) = match link.turn().await {
                        Ok(turn) => (Some(turn), None),
                        Err(error) => (None, Some(error)),
                    };
                    refuse_known(&self.engine().snapshot(), keys);
                    insertion.insert(keys, failure).await;
                    self.engine().edit(|before| with_new(before, keys));
                }
            }
        }
        keys.into_iter().map(|key| key.map(drop)).collect()
    }

    fn new_key(&self, spec: KeySpec) -> Result<NewKey, Cause> {
        if let Some(field) = spec.unsupported() {
            return Err(Cause::UnsupportedField { id: spec.id, field });
        }
        match UsableKey::new(&spec, &self.engine().config.inject) {
            Ok(key) => Ok(NewKey { key: self.engine().new_key(key), secret: spec.secret }),
            Err(reason) => Err(Cause::UnusableSecret { id: spec.id, reason }),
        }
    }
}

/// Refuses keys that the pool has already, or that come twice among the new ones.
fn refuse_known(pool: &Snapshot, keys: &mut [Result<NewKey, Cause>]) {
    let (mut ids, mut secrets) = (HashSet::new(), HashMap::new());
    let asked: HashSet<_> = keys.iter().flatten().map(|new| new.secret.clone()).collect();
    for key in pool.keys() {
        let secret = key.secret();
        if asked.contains(&secret) {
            secrets.insert(secret, key.id.clone());
        }
    }
    for key in keys {
        let Ok(new) = key else { continue };
        let id = &new.key.id;
        if pool.get(id.as_str()).is_some() || ids.contains(id) {
            *key = Err(Cause::KeyExists(id.clone()));
        } else if let Some(other) = secrets.get(&new.secret) {
            *key = Err(Cause::DuplicateSecret(other.clone()));
        } else {
            ids.insert(id.clone());
            secrets.insert(new.secret.clone(), id.clone());
        }
    }
}

/// The keys of a pool, and the new ones behind them.
fn with_new(pool: &Snapshot, keys: &[Result<NewKey, Cause>]) -> Option<Vec<Arc<Key>>> {
    let mut new = keys.iter().flatten().map(|new| new.key.clone()).peekable();
    new.peek()?;
    Some(pool.keys().iter().cloned().chain(new).collect())
}

struct NewKey {
    key: Arc<Key>,
    secret: Secret,
}

/// Keys on their way into the store.
struct Insertion {
    link: Arc<Link>,
    in_flight: JoinSet<Inserted>,
    failures_in_a_row: usize,
}

/// With the key's place among the others.
type Inserted = (usize, Result<NewKey, Cause>);

impl Insertion {
    fn new(link: Arc<Link>) -> Self {
        Self { link, in_flight: JoinSet::default(), failures_in_a_row: 0 }
    }

    /// If the store has just failed, no key is tried.
    async fn insert(&mut self, keys: &mut [Result<NewKey, Cause>], mut failure: Option<StoreError>) {
        if failure.is_some() {
            self.failures_in_a_row = FAILURES_IN_A_ROW;
        }
        let at_once = self.link.at_once();
        for place in 0..keys.len() {
            if self.in_flight.len() == at_once {
                self.finish_one(keys).await;
            }
            if keys[place].is_err() {
                continue;
            }
            if self.failures_in_a_row >= FAILURES_IN_A_ROW {
                keys[place] = Err(failure.take().map_or(Cause::NotTried, Cause::Store));
                continue;
            }
            // The text of a panic might hold anything.
            let panicked = Err(Cause::Store(StoreError::new("an insert panicked")));
            if let Ok(new) = mem::replace(&mut keys[place], panicked) {
                let link = self.link.clone();
                let inserting = async move { (place, new.insert(&link).await) };
                if Handle::try_current().is_ok() {
                    self.in_flight.spawn(inserting);
                } else {
                    let inserted = inserting.await;
                    self.settle(Some(inserted), keys);
                }
            }
        }
        while self.finish_one(keys).await {}
    }

    async fn finish_one(&mut self, keys: &mut [Result<NewKey, Cause>]) -> bool {
        let Some(inserted) = self.in_flight.join_next().await else { return false };
        self.settle(inserted.ok(), keys);
        true
    }

    fn settle(&mut self, inserted: Option<Inserted>, keys: &mut [Result<NewKey, Cause>]) {
        let was_answered = matches!(inserted, Some((_, Ok(_) | Err(Cause::KeyExists(_)))));
        self.failures_in_a_row = if was_answered { 0 } else { self.failures_in_a_row + 1 };
        if let Some((place, key)) = inserted {
            keys[place] = key;
        }
    }
}

impl NewKey {
    async fn insert(self, link: &Link) -> Result<Self, Cause> {
        let id = &self.key.id;
        let spec = self.key.spec();
        let inserted = link.operate(id, Operation::Insert(spec.clone())).await?;
        let standing = inserted.ok_or_else(|| Cause::KeyExists(id.clone()))?;
        self.key.is(&spec, standing.born);
        link.engine.apply(&self.key, &standing);
        Ok(self)
    }
}
