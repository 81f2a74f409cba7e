//! From a URI or a client to a store.

use std::time::Duration;

use ::mongodb::{Client, bson::doc, options::ClientOptions};
use tokio::time::timeout;

use super::{Inner, MongoStore, at_rest::AtRest, error::Failure, fields::Fields};
#[cfg(feature = "encryption")]
use super::{at_rest::Encryption, data_keys::DataKeys};

/// The most milliseconds that a `wtimeout` can have are 32 bits.
const LONGEST_LIMIT: Duration = Duration::from_secs(24 * 24 * 60 * 60);

/// How long it is looked for a server, where neither the URI nor the limit of an operation says less.
const SERVER_SELECTION: Duration = Duration::from_secs(3);

/// Puts a [`MongoStore`] together.
///
/// ```no_run
/// use std::time::Duration;
/// use tower_key_rotation::store::MongoStore;
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
    database: String,
    collection: String,
    standby_collection: Option<String>,
    fields: Fields,
    #[cfg(feature = "encryption")]
    data_keys: Option<DataKeys>,
    limits: Limits,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) connect: Duration,
    pub(super) operation: Duration,
    pub(super) poll: Duration,
}

impl Default for MongoStoreBuilder {
    fn default() -> Self {
        Self {
            database: "fproxy".into(),
            collection: "ohmygpt_keys".into(),
            standby_collection: None,
            fields: Fields::default(),
            #[cfg(feature = "encryption")]
            data_keys: None,
            limits: Limits {
                connect: Duration::from_secs(5),
                operation: Duration::from_secs(5),
                poll: Duration::from_secs(5),
            },
        }
    }
}

impl MongoStoreBuilder {
    /// The database. By default `fproxy`.
    pub fn database(mut self, name: impl Into<String>) -> Self {
        self.database = name.into();
        self
    }

    /// The collection of keys. By default `ohmygpt_keys`.
    pub fn collection(mut self, name: impl Into<String>) -> Self {
        self.collection = name.into();
        self
    }

    /// A collection of standby keys, which take the place of keys that are marked as exhausted or revoked from
    /// then on: [how](MongoStore#standby-keys). By default there is none; existing deployments call it
    /// `ohmygpt_backup_keys`.
    pub fn standby_collection(mut self, name: impl Into<String>) -> Self {
        self.standby_collection = Some(name.into());
        self
    }

    /// What the fields of a key's document are called.
    pub fn fields(mut self, fields: Fields) -> Self {
        self.fields = fields;
        self
    }

    /// Encrypts secrets in documents, keys and standby keys alike.
    ///
    /// A secret that stands in a document as it is, written by another program, is read and used all the same;
    /// [`MongoStore::encrypt_documents`] encrypts it. A value that can't be decrypted is no key: it is counted and
    /// logged by its `_id`, and sent to no one. A program without the data keys can use none of the encrypted keys, so
    /// first give the data keys to all of them.
    ///
    /// To change to another data key: add it behind the present one everywhere, so that every process can read it;
    /// then put it first; run [`MongoStore::encrypt_documents`]; and take the old one out.
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

    /// How long [`connect`](Self::connect) may take. By default 5 seconds, and at most 24 days.
    pub fn connect_limit(mut self, limit: Duration) -> Self {
        self.limits.connect = limit.min(LONGEST_LIMIT);
        self
    }

    /// How long one operation may take, or of a load each part. By default 5 seconds, and at most 24 days. A sweep is
    /// bounded by the [limit of a pass](crate::RecoveryConfig::limit).
    ///
    /// One that takes longer has failed as far as the pool is concerned. It is not cut off, and what it could
    /// get in the way of waits for it.
    pub fn operation_limit(mut self, limit: Duration) -> Self {
        self.limits.operation = limit.min(LONGEST_LIMIT);
        self
    }

    /// How often all keys are read where the deployment has no change streams, or this user may not use them:
    /// so soon a mark of one process is honoured by the others. By default every 5 seconds; less often where
    /// there are so many keys that reading them takes more than a tenth of that.
    pub fn poll_interval(mut self, interval: Duration) -> Self {
        self.limits.poll = interval;
        self
    }

    /// Connects, and makes sure that a server answers.
    ///
    /// The driver takes its options from the URI. How long it looks for a server is 3 seconds, unless
    /// `serverSelectionTimeoutMS` says otherwise, and at most three fifths of the shorter of the two limits.
    ///
    /// # Errors
    ///
    /// Where the URI or a name can't be one, or where no server answers within the limit.
    pub async fn connect(self, uri: impl AsRef<str>) -> Result<MongoStore, ConnectError> {
        let limit = self.limits.connect;
        let connecting = tokio::spawn(self.connect_and_ask(uri.as_ref().to_owned()));
        match timeout(limit, connecting).await {
            Err(_) => Err(ConnectError::NoAnswer(limit)),
            Ok(Err(_)) => Err(ConnectError::Unreachable(Failure::BrokenOff.to_string())),
            Ok(Ok(connected)) => connected,
        }
    }

    async fn connect_and_ask(self, uri: String) -> Result<MongoStore, ConnectError> {
        let store = self.connect_later(uri).await?;
        let answer = store.inner.database.run_command(doc! { "ping": 1 }).await;
        answer.map_err(|error| ConnectError::Unreachable(Failure::from(error).to_string()))?;
        Ok(store)
    }

    /// The same without asking a server: for [`KeyPoolBuilder::open_when_ready`].
    ///
    /// Only the names behind a `mongodb+srv` URI are looked up.
    ///
    /// ```no_run
    /// use tower_key_rotation::{KeyPool, RecoveryHandle, store::MongoStore};
    ///
    /// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
    /// let store = MongoStore::builder().connect_later("mongodb://localhost:27017").await?;
    /// let pool = KeyPool::builder().keys_from_env("OPENAI_KEYS").open_when_ready(store)?;
    /// let recovery = RecoveryHandle::spawn(&pool);
    /// # let _ = recovery;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// Where the URI or a name can't be one.
    ///
    /// [`KeyPoolBuilder::open_when_ready`]: crate::KeyPoolBuilder::open_when_ready
    pub async fn connect_later(self, uri: impl AsRef<str>) -> Result<MongoStore, ConnectError> {
        self.check_names()?;
        let uri = uri.as_ref();
        let options = ClientOptions::parse(uri).await;
        let mut options = options.map_err(|error| ConnectError::invalid_uri(uri, &error))?;
        let selection = options.server_selection_timeout.unwrap_or(SERVER_SELECTION);
        // Well below the limits, so that it is the driver that fails, which knows why.
        let most = self.limits.operation.min(self.limits.connect) * 3 / 5;
        options.server_selection_timeout = Some(selection.min(most));
        options.connect_timeout.get_or_insert(SERVER_SELECTION);
        options.app_name.get_or_insert_with(|| env!("CARGO_PKG_NAME").into());
        let client = Client::with_options(options).map_err(|error| ConnectError::invalid_uri(uri, &error))?;
        self.over(&client)
    }

    /// A store over a client of one's own, of version 3 of the driver. No server is asked.
    ///
    /// The client's `serverSelectionTimeoutMS`, 30 seconds unless it was set, should be well below the 10 seconds
    /// of a pass.
    ///
    /// # Errors
    ///
    /// Where a name can't be one.
    pub fn over(self, client: &Client) -> Result<MongoStore, ConnectError> {
        self.check_names()?;
        let database = client.database(&self.database);
        #[cfg(feature = "encryption")]
        let encryption = self.data_keys.map(Encryption::with);
        #[cfg(not(feature = "encryption"))]
        let encryption = None;
        Ok(MongoStore::new(Inner {
            keys: super::collection(&database, &self.collection, self.limits),
            standby: self.standby_collection.map(|name| super::collection(&database, &name, self.limits)),
            database,
            at_rest: AtRest::new(self.fields.api_key.clone(), encryption),
            fields: self.fields,
            limits: self.limits,
            per_key: Default::default(),
            loads: Default::default(),
            sweeps: Default::default(),
            usage: Default::default(),
            replacements: Default::default(),
            server_clock: Default::default(),
        }))
    }

    fn check_names(&self) -> Result<(), ConnectError> {
        if let Some(field) = self.fields.invalid() {
            return Err(ConnectError::Field(field.to_owned()));
        }
        if self.database.is_empty() || self.database.contains(['/', '\\', '.', ' ', '"', '$', '\0']) {
            return Err(ConnectError::Name(self.database.clone()));
        }
        let names = [Some(&self.collection), self.standby_collection.as_ref()];
        match names.into_iter().flatten().find(|name| name.is_empty() || name.contains(['$', '\0'])) {
            Some(name) => Err(ConnectError::Name(name.clone())),
            None if self.standby_collection.as_ref() == Some(&self.collection) => {
                Err(ConnectError::Name(self.collection.clone()))
            }
            None => Ok(()),
        }
    }
}

/// Why there is no [`MongoStore`]. It never holds the URI, which may hold a password.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The URI can't be used.
    #[error("the MongoDB URI can't be used: {0}")]
    Uri(String),
    /// That can't be the name of a database or collection, or both collections have it.
    #[error("{0:?} can't be the name of a MongoDB database or collection here")]
    Name(String),
    /// That can't be the name of a field, or another one has it.
    #[error("{0:?} can't be the name of a field, or another field has it")]
    Field(String),
    /// No server could be reached, or none let us in.
    #[error("MongoDB can't be reached: {0}")]
    Unreachable(String),
    /// There was no answer in that time.
    #[error("MongoDB gave no answer within {0:?}")]
    NoAnswer(Duration),
}

impl ConnectError {
    /// What the driver says of a URI may quote it, and whatever is not plainly a host may be a password.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_driver_says_is_passed_on_only_of_a_uri_in_which_nothing_can_be_a_password() {
        for uri in
            ["localhost", "mongodb://a", "mongodb://a:27017,b:27018/gateway", "mongodb+srv://a.example.com"]
        {
            assert!(names_hosts_alone(uri), "{uri}");
        }
        for uri in [
            "user@host",
            "user:secret",
            "mongodb://user:secret@host",
            "mongodb://host/?password=secret",
            "mongodb://user:secret",
            "mongodb://user:secret:27017",
            "mongodb://a:27017,user:secret",
            "mongodb://user%3Asecret",
        ] {
            assert!(!names_hosts_alone(uri), "{uri}");
        }
    }
}
