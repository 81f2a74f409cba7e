//! Encrypts the keys of a collection in place.

use std::error::Error;

use clap::Args;
use tower_key_rotation::store::mongodb::{DataKeys, Encrypted, Fields, MongoStore};

/// Encrypts the secrets of a collection in place. It can be stopped and started again at any time.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The deployment.
    #[arg(long, env = "MONGODB_URI", hide_env_values = true)]
    uri: String,
    /// The database, unless the URI names it.
    #[arg(long)]
    database: Option<String>,
    /// The collection of keys.
    #[arg(long, default_value = "keys")]
    collection: String,
    /// The collection of standby keys, if there is one.
    #[arg(long)]
    standby_collection: Option<String>,
    /// The field that secrets stand in.
    #[arg(long, default_value = "apiKey")]
    field: String,
    /// The file with the data keys, a `name=base64` a line, the current one first. Without it, they are taken from
    /// the environment variable `KEY_ROTATION_DATA_KEYS`.
    #[arg(long)]
    data_keys: Option<std::path::PathBuf>,
}

pub(crate) async fn run(options: Options) -> Result<(), Box<dyn Error>> {
    let data_keys = match &options.data_keys {
        Some(path) => DataKeys::from_file(path)?,
        None => DataKeys::from_env("KEY_ROTATION_DATA_KEYS")?,
    };
    let mut store = MongoStore::builder()
        .collection(options.collection)
        .fields(Fields::default().api_key(options.field))
        .encrypt_with(data_keys);
    if let Some(database) = options.database {
        store = store.database(database);
    }
    if let Some(standby) = options.standby_collection {
        store = store.standby_collection(standby);
    }
    let Encrypted { encrypted, already, changed, left, .. } =
        store.connect(&options.uri).await?.encrypt_documents().await?;
    for left in &left {
        println!("left as it is: {}: {}", left.id, left.reason);
    }
    let left = left.len();
    println!("{encrypted} encrypted, {already} had been before, {changed} changed meanwhile, {left} left");
    if changed > 0 {
        println!("Run it again for those that changed meanwhile.");
    }
    Ok(())
}
