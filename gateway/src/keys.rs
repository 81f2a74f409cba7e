//! Opens the key pool: from a file, from MongoDB, or from both.

use std::error::Error;

use tower_key_rotation::{
    BuildError, Inject, KeyPool, KeyPoolBuilder,
    store::mongodb::{ConnectError, DataKeys, MongoStore, MongoStoreBuilder},
};

use crate::{
    arguments::KeyPlace,
    settings::{Settings, WrongSetting},
};

pub(crate) async fn open(settings: &Settings) -> Result<KeyPool, Box<dyn Error>> {
    let keys = builder(settings);
    let Some(uri) = &settings.mongodb else {
        let pool = keys.build().map_err(wrong)?;
        return if pool.stats().keys.is_empty() { Err(no_key(&pool).into()) } else { Ok(pool) };
    };
    let store = store(settings)?;
    if settings.keys.is_some() {
        // The keys of the file serve until MongoDB can be reached.
        let store = store.connect_later(uri).await.map_err(of_mongodb)?;
        return Ok(keys.open_when_ready(store).map_err(wrong)?);
    }
    let store = store.connect(uri).await.map_err(of_mongodb)?;
    keys.open(store).await.map_err(|error| match error.store_error() {
        Some(_) => error.into(),
        None => wrong(error).into(),
    })
}

fn builder(settings: &Settings) -> KeyPoolBuilder {
    let host = settings.upstream.authority();
    let mut builder = KeyPool::builder()
        .allowed_hosts([host])
        .inject(
            settings.inject.iter().map(KeyPlace::inject).reduce(Inject::and).unwrap_or_else(Inject::bearer),
        )
        .cooldown(settings.cooldown.into());
    if settings.pace {
        builder = builder.paced();
    }
    if settings.allow_cleartext {
        builder = builder.allow_cleartext_to([host]);
    }
    if let Some(file) = &settings.keys {
        builder = builder.keys_from_file(file);
    }
    builder
}

fn store(settings: &Settings) -> Result<MongoStoreBuilder, WrongSetting> {
    let mut builder = MongoStore::builder();
    if let Some(name) = &settings.mongodb_database {
        builder = builder.database(name);
    }
    if let Some(name) = &settings.mongodb_collection {
        builder = builder.collection(name);
    }
    if let Some(name) = &settings.mongodb_standby_collection {
        builder = builder.standby_collection(name);
    }
    if let Some(file) = &settings.data_keys {
        let keys = DataKeys::from_file(file).map_err(|error| WrongSetting::new(error.to_string()))?;
        builder = builder.encrypt_with(keys);
    }
    Ok(builder)
}

fn no_key(pool: &KeyPool) -> WrongSetting {
    WrongSetting::new(match pool.rejected() {
        [] => "--keys: the file is empty".to_owned(),
        [rejected, ..] => format!("--keys: no key in the file can be used: {rejected}"),
    })
}

fn wrong(error: BuildError) -> WrongSetting {
    WrongSetting::new(crate::with_sources(&error))
}

fn of_mongodb(error: ConnectError) -> Box<dyn Error> {
    if error.is_unreachable() {
        return error.into();
    }
    WrongSetting::new(format!("--mongodb: {error}")).into()
}
