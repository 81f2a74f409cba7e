//! From a URI or a client to a store.

use std::{sync::Arc, time::Duration};

use ::mongodb::{Client, bson::doc, options::ClientOptions};
use tokio::time::timeout;

use super::{
    error::Failure,
    fields::Fields,
    inner::{Inner, Limits, collection},
    messages,
    store::MongoStore,
};
use crate::store::encryption::AtRest;
#[cfg(feature = "encryption")]
use crate::store::encryption::DataKeys;

/// The most milliseconds that a `wtimeout` can have are 32 bits.
const LONGEST_LIMIT: Duration = Duration::from_secs(24 * 24 * 60 * 60);

/// The limit of the search for a server, unless the URI or the limit of an operation says less.
const SERVER_SELECTION: Duration = Duration::from_secs(3);

/// Configures a [`MongoStore`].
///
/// By default the keys are in the collection `keys` of the database that the URI names. For documents that another
/// program has put elsewhere, say where they are, and what their [fields](Self::fields) are called:
///
/// ```no_run
/// use std::time::Duration;
/// use tower_key_rotation::store::mongodb::MongoStore;
///
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let store = MongoStore::builder()
///     .database("gateway")
///     .collection("openai_keys")
///     .standby_collection("openai_backup_keys")
///     .operation_limit(Duration::from_secs(2))
///     .connect("mongodb://localhost:27017")
///     .await?;
/// # let _ = store;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
#[must_use]
pub struct MongoStoreBuilder {
    database: Option<String>,
    collection: String,
    standby_collection: Option<String>,
    processes_collection: Option<String>,
    fields: Fields,
    #[cfg(feature = "encryption")]
    data_keys: Option<DataKeys>,
    limits: Limits,
}

impl MongoStore {
    /// Connects with the usual names and limits, to the database that the URI names.
    ///
    /// # Errors
    ///
    /// If the URI cannot be used or names no database, or if no server answers within 5 seconds.
    pub async fn connect(uri: impl AsRef<str>) -> Result<Self, ConnectError> {
        Self::builder().connect(uri).await
    }

    /// A store with names, limits or a client of your own.
    pub fn builder() -> MongoStoreBuilder {
        MongoStoreBuilder {
            database: None,
            collection: "keys".into(),
            standby_collection: None,
            processes_collection: None,
            fields: Fields::default(),
            #[cfg(feature = "encryption")]
            data_keys: None,
            limits: Limits::default(),
        }
    }
}

impl MongoStoreBuilder {
    /// Sets the database. By default it is the one that the URI names, as in `mongodb://localhost:27017/gateway`.
    pub fn database(mut self, name: impl Into<String>) -> Self {
        self.database = Some(name.into());
        self
    }

    /// Sets the collection of keys. By default it is `keys`.
    pub fn collection(mut self, name: impl Into<String>) -> Self {
        self.collection = name.into();
        self
    }

    /// Sets a collection of [standby keys](MongoStore#standby-keys), which take the place of keys that are marked as
    /// exhausted or revoked from then on. By default there is none.
    pub fn standby_collection(mut self, name: impl Into<String>) -> Self {
        self.standby_collection = Some(name.into());
        self
    }

    /// Sets the collection through which [processes share limits](MongoStore#processes-that-share-limits). By default it
    /// is named after the collection of keys: `keys_processes`.
    pub fn processes_collection(mut self, name: impl Into<String>) -> Self {
        self.processes_collection = Some(name.into());
        self
    }

    /// Sets the names of the fields of a key's document.
    pub fn fields(mut self, fields: Fields) -> Self {
        self.fields = fields;
        self
    }

    /// Encrypts secrets in documents, keys and standby keys alike.
    ///
    /// A secret that another program has written in the clear is read and used all the same;
    /// [`MongoStore::encrypt_documents`] encrypts it. A document whose secret cannot be decrypted is no key: it is
    /// counted, logged by its `_id`, and sent to no one. A program without the data keys can use none of the encrypted
    /// keys, so give the data keys to all programs first.
    ///
    /// To change to another data key, add it behind the present one everywhere, so that every process can read it. Then
    /// put it first, run [`MongoStore::encrypt_documents`], and take the old one out.
    ///
    /// ```no_run
    /// use tower_key_rotation::store::mongodb::{DataKeys, MongoStore};
    ///
    /// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
    /// let store = MongoStore::builder()
    ///     .encrypt_with(DataKeys::from_env("KEY_ROTATION_DATA_KEYS")?)
    ///     .connect("mongodb://localhost:27017")
    ///     .await?;
    /// # let _ = store;
    /// # Ok(())
    /// # }
    /// ```
    #[cfg(feature = "encryption")]
    pub fn encrypt_with(mut self, keys: DataKeys) -> Self {
        self.data_keys = Some(keys);
        self
    }

    /// Sets the limit of [`connect`](Self::connect). By default it is 5 seconds, at most 24 days.
    pub fn connect_limit(mut self, limit: Duration) -> Self {
        self.limits.connect = limit.min(LONGEST_LIMIT);
        self
    }

    /// Sets the limit of one operation, or of each part of a load. By default it is 5 seconds, at most 24 days. A sweep
    /// has the [limit of a pass](crate::RecoveryConfig::limit).
    ///
    /// An operation that takes longer has failed as far as the pool is concerned. It is not cut off, and later
    /// operations on the same key wait for it.
    pub fn operation_limit(mut self, limit: Duration) -> Self {
        self.limits.operation = limit.min(LONGEST_LIMIT);
        self
    }

    /// Sets how often all keys are read if the deployment has no change streams, or this user may not use them. It is
    /// the time until other processes honour a mark. By default it is 5 seconds; it is longer if there are so many keys
    /// that reading them takes more than a tenth of that.
    pub fn poll_interval(mut self, interval: Duration) -> Self {
        self.limits.poll = interval;
        self
    }

    /// Connects, and makes sure that a server answers.
    ///
    /// The driver takes its options from the URI. It looks for a server for 3 seconds, unless
    /// `serverSelectionTimeoutMS` says otherwise, and for at most three fifths of the shorter of the two limits.
    ///
    /// # Errors
    ///
    /// If the URI or a name cannot be used, or if no server answers within the limit.
    pub async fn connect(self, uri: impl AsRef<str>) -> Result<MongoStore, ConnectError> {
        let limit = self.limits.connect;
        let connecting = tokio::spawn(self.connect_and_ask(uri.as_ref().to_owned()));
        match timeout(limit, connecting).await {
            Err(_) => Err(ConnectError(Cause::NoAnswer(limit))),
            Ok(Err(_)) => Err(ConnectError(Cause::Unreachable(Failure::BrokenOff.to_string()))),
            Ok(Ok(connected)) => connected,
        }
    }

    async fn connect_and_ask(self, uri: String) -> Result<MongoStore, ConnectError> {
        let store = self.connect_later(uri).await?;
        let answer = store.inner.database.run_command(doc! { "ping": 1 }).await;
        answer.map_err(|error| ConnectError(Cause::Unreachable(Failure::from(error).to_string())))?;
        Ok(store)
    }

    /// Creates the store without asking a server: for [`KeyPoolBuilder::open_when_ready`].
    ///
    /// Only the hosts of a `mongodb+srv` URI are looked up.
    ///
    /// ```no_run
    /// use tower_key_rotation::{KeyPool, RecoveryHandle, store::mongodb::MongoStore};
    ///
    /// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
    /// let store = MongoStore::builder().connect_later("mongodb://localhost:27017/gateway").await?;
    /// let pool = KeyPool::builder().keys_from_env("OPENAI_KEYS").open_when_ready(store)?;
    /// let recovery = RecoveryHandle::spawn(&pool);
    /// # let _ = recovery;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// If the URI or a name cannot be used.
    ///
    /// [`KeyPoolBuilder::open_when_ready`]: crate::KeyPoolBuilder::open_when_ready
    pub async fn connect_later(self, uri: impl AsRef<str>) -> Result<MongoStore, ConnectError> {
        self.check_names().map_err(ConnectError)?;
        let uri = uri.as_ref();
        let options = ClientOptions::parse(uri).await;
        let invalid = |error| ConnectError(Cause::invalid_uri(uri, &error));
        let mut options = options.map_err(invalid)?;
        let selection = options.server_selection_timeout.unwrap_or(SERVER_SELECTION);
        // Well below the limits, so that it is the driver that fails, which knows why.
        let most = self.limits.operation.min(self.limits.connect) * 3 / 5;
        options.server_selection_timeout = Some(selection.min(most));
        options.connect_timeout.get_or_insert(SERVER_SELECTION);
        options.app_name.get_or_insert_with(|| env!("CARGO_PKG_NAME").into());
        let client = Client::with_options(options).map_err(invalid)?;
        self.over(&client)
    }

    /// Creates a store over a client of your own, of version 3 of the driver. No server is asked.
    ///
    /// The client's `serverSelectionTimeoutMS`, 30 seconds unless it was set, should be well below the 10 seconds
    /// of a pass.
    ///
    /// # Errors
    ///
    /// If a name cannot be used, or there is no name of a database.
    pub fn over(self, client: &Client) -> Result<MongoStore, ConnectError> {
        self.check_names().map_err(ConnectError)?;
        let processes = self.processes();
        let database = self.database.map(|name| client.database(&name)).or_else(|| client.default_database());
        let database = database.ok_or(ConnectError(Cause::NoDatabase))?;
        #[cfg(feature = "encryption")]
        let data_keys = self.data_keys;
        #[cfg(not(feature = "encryption"))]
        let data_keys = None;
        let inner = Inner {
            keys: collection(&database, &self.collection, self.limits),
            standby: self.standby_collection.map(|name| collection(&database, &name, self.limits)),
            processes: messages::collection(&database, &processes, self.limits),
            database,
            at_rest: AtRest::new(self.fields.api_key.clone(), data_keys),
            fields: self.fields,
            limits: self.limits,
            clock: Default::default(),
            unsent: Default::default(),
            per_key: Default::default(),
            loads: Default::default(),
            sweeps: Default::default(),
            usage: Default::default(),
            replacements: Default::default(),
            messages: Default::default(),
        };
        Ok(MongoStore { inner: Arc::new(inner) })
    }

    fn check_names(&self) -> Result<(), Cause> {
        if let Some(field) = self.fields.invalid() {
            return Err(Cause::Field(field.to_owned()));
        }
        let is_invalid =
            |name: &&String| name.is_empty() || name.contains(['/', '\\', '.', ' ', '"', '$', '\0']);
        if let Some(name) = self.database.as_ref().filter(is_invalid) {
            return Err(Cause::Name(name.clone()));
        }
        let processes = self.processes();
        let names = [Some(&self.collection), Some(&processes), self.standby_collection.as_ref()];
        let names: Vec<_> = names.into_iter().flatten().collect();
        let is_taken = |name: &&&String| names.iter().filter(|other| *other == *name).count() > 1;
        let invalid = names.iter().find(|name| name.is_empty() || name.contains(['$', '\0']));
        match invalid.or_else(|| names.iter().find(is_taken)) {
            Some(name) => Err(Cause::Name((*name).clone())),
            None => Ok(()),
        }
    }

    fn processes(&self) -> String {
        self.processes_collection.clone().unwrap_or_else(|| format!("{}_processes", self.collection))
    }
}

/// The reason why there is no [`MongoStore`]. It never holds the URI, which may hold a password.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(transparent)]
pub struct ConnectError(Cause);

impl ConnectError {
    /// Whether no server answered, or none accepted the credentials. Otherwise a setting is wrong: the URI, or a name.
    #[must_use]
    pub fn is_unreachable(&self) -> bool {
        matches!(self.0, Cause::Unreachable(_) | Cause::NoAnswer(_))
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
enum Cause {
    #[error("the MongoDB URI can't be used: {0}")]
    Uri(String),
    #[error(
        "no database is named: put its name behind the hosts of the MongoDB URI, as in mongodb://host/gateway"
    )]
    NoDatabase,
    /// Or two collections have it.
    #[error("{0:?} can't be the name of a MongoDB database or collection here")]
    Name(String),
    #[error("{0:?} can't be the name of a field, or another field has it")]
    Field(String),
    #[error("MongoDB can't be reached: {0}")]
    Unreachable(String),
    #[error("MongoDB gave no answer within {0:?}")]
    NoAnswer(Duration),
}

impl Cause {
    /// The driver's errors may quote the URI, and whatever is not plainly a host may be a password.
    fn invalid_uri(uri: &str, error: &::mongodb::error::Error) -> Self {
        if names_hosts_alone(uri) {
            return Self::Uri(error.kind.to_string());
        }
        let hint = "it is not mongodb://user:password@host:port/?options with options that MongoDB knows; what is \
                    special in a name or password is to be percent-encoded";
        Self::Uri(hint.into())
    }
}

/// `scheme://host:port,host:port/database`.
fn names_hosts_alone(uri: &str) -> bool {
    let Some((_, rest)) = uri.split_once("://") else { return !uri.contains([':', '@']) };
    let hosts = rest.split('/').next().unwrap_or_default();
    !rest.contains(['@', '?'])
        && hosts.split(',').all(|host| {
            let (name, port) = host.rsplit_once(':').unwrap_or((host, "0"));
            !name.contains(':') && !name.contains('%') && port.parse::<u16>().is_ok()
        })
}
