//! Opens the key pool of an upstream: from files and variables, and over the store that keeps the state of the keys.

use std::{error::Error, path::Path};

use tower_key_rotation::{
    BuildError, Inject, KeyPool, KeyPoolBuilder, KeySpec,
    store::{
        DataKeys,
        file::FileStore,
        mongodb::{ConnectError, MongoStore, MongoStoreBuilder},
    },
};

use crate::{
    arguments::KeyPlace,
    config::{Invalid, KeySource, MongoDb, StateFile, UpstreamConfig},
    state::make_directory,
};

/// Reads the keys that the files and variables of an upstream name. Logs those that can't be used.
pub(crate) fn given(upstream: &UpstreamConfig) -> Result<Vec<KeySpec>, Invalid> {
    let pool =
        with_sources_of_keys(builder(upstream), upstream).build().map_err(|error| wrong(upstream, error))?;
    let keys = pool.specs();
    if keys.is_empty() && !upstream.may_keep_keys() { Err(no_key(upstream, &pool)) } else { Ok(keys) }
}

/// Opens the file that keeps the state of an upstream; `None` if there is none.
pub(crate) fn state(upstream: &UpstreamConfig) -> Result<Option<FileStore>, Invalid> {
    let Some(StateFile { path, is_named, data_keys }) = &upstream.state else {
        if upstream.mongodb.is_none() {
            tracing::info!(upstream = upstream.name, "state is kept in memory: a restart forgets it");
        }
        return Ok(None);
    };
    let mut builder = FileStore::builder();
    if let Some(file) = data_keys {
        builder = builder.encrypt_with(DataKeys::from_file(file).map_err(|error| wrong(upstream, error))?);
    }
    let directory = if *is_named { Ok(()) } else { make_directory(path) };
    let (reason, is_about_the_file) = match directory {
        Err(error) => (format!("{}: {error}", path.display()), false),
        Ok(()) => match builder.open(path) {
            Ok(store) => {
                tracing::info!(upstream = upstream.name, "state is kept in {}", absolute(path));
                return Ok(Some(store));
            }
            Err(error) => (crate::with_sources(&error), error.is_in_use() || error.is_unreadable()),
        },
    };
    if *is_named || is_about_the_file || data_keys.is_some() {
        return Err(Invalid::because(format!("{}: {reason}", upstream.place_of("state"))));
    }
    // Nobody asked for this file.
    tracing::warn!(
        upstream = upstream.name,
        "state is kept in memory, because no file can be used: {reason}; set --state to one"
    );
    Ok(None)
}

fn absolute(file: &Path) -> String {
    std::path::absolute(file).as_deref().unwrap_or(file).display().to_string()
}

/// Opens a pool with these keys, and those in the store: that file, or MongoDB.
pub(crate) async fn open(
    upstream: &UpstreamConfig,
    keys: Vec<KeySpec>,
    state: Option<FileStore>,
) -> Result<KeyPool, Box<dyn Error>> {
    let has_sources = !upstream.keys.is_empty();
    let builder = keys.into_iter().fold(builder(upstream), KeyPoolBuilder::key_spec);
    let of_store = |error: BuildError| match error.store_error() {
        Some(_) => error.into(),
        None => Box::<dyn Error>::from(wrong(upstream, error)),
    };
    let Some(mongodb) = &upstream.mongodb else {
        let pool = match state {
            Some(store) => builder.open(store).await.map_err(of_store)?,
            None => builder.build().map_err(|error| wrong(upstream, error))?,
        };
        return if pool.stats().keys.is_empty() { Err(no_key(upstream, &pool).into()) } else { Ok(pool) };
    };
    let store = store(upstream, mongodb)?;
    if has_sources {
        // The keys of the file serve until MongoDB can be reached.
        let store = store.connect_later(&mongodb.uri).await.map_err(|error| of_mongodb(upstream, error))?;
        return Ok(builder.open_when_ready(store).map_err(|error| wrong(upstream, error))?);
    }
    let store = store.connect(&mongodb.uri).await.map_err(|error| of_mongodb(upstream, error))?;
    builder.open(store).await.map_err(of_store)
}

/// Returns what is wrong with the keys of an upstream, without a look into MongoDB.
pub(crate) fn problems(upstream: &UpstreamConfig) -> Vec<String> {
    let place = upstream.place_of("keys");
    let mut problems = match with_sources_of_keys(builder(upstream), upstream).build() {
        Err(error) => vec![wrong(upstream, error).to_string()],
        Ok(pool)
            if pool.rejected().is_empty() && pool.stats().keys.is_empty() && !upstream.may_keep_keys() =>
        {
            vec![no_key(upstream, &pool).to_string()]
        }
        Ok(pool) => pool.rejected().iter().map(|rejected| format!("{place}: {rejected}")).collect(),
    };
    let store = upstream.mongodb.as_ref().map(|mongodb| store(upstream, mongodb));
    problems.extend(store.and_then(Result::err).map(|invalid| invalid.to_string()));
    problems
}

fn builder(upstream: &UpstreamConfig) -> KeyPoolBuilder {
    let host = upstream.url.authority();
    let mut builder = KeyPool::builder()
        .name(upstream.name.clone())
        .allowed_hosts([host])
        .inject(
            upstream.inject.iter().map(KeyPlace::inject).reduce(Inject::and).unwrap_or_else(Inject::bearer),
        )
        .cooldown(upstream.cooldown);
    if upstream.pace {
        builder = builder.paced();
    }
    if upstream.allow_cleartext {
        builder = builder.allow_cleartext_to([host]);
    }
    upstream.quotas.iter().cloned().fold(builder, KeyPoolBuilder::quota)
}

fn with_sources_of_keys(builder: KeyPoolBuilder, upstream: &UpstreamConfig) -> KeyPoolBuilder {
    upstream.keys.iter().fold(builder, |builder, source| match source {
        KeySource::File(file) => builder.keys_from_file(file),
        KeySource::Variable(name) => builder.keys_from_env(name),
        KeySource::Program(keys) => builder.keys(keys.iter().cloned()),
    })
}

fn store(upstream: &UpstreamConfig, mongodb: &MongoDb) -> Result<MongoStoreBuilder, Invalid> {
    let mut builder = MongoStore::builder();
    if let Some(name) = &mongodb.database {
        builder = builder.database(name);
    }
    if let Some(name) = &mongodb.collection {
        builder = builder.collection(name);
    }
    if let Some(name) = &mongodb.standby_collection {
        builder = builder.standby_collection(name);
    }
    if let Some(file) = &mongodb.data_keys {
        builder = builder.encrypt_with(DataKeys::from_file(file).map_err(|error| wrong(upstream, error))?);
    }
    Ok(builder)
}

fn no_key(upstream: &UpstreamConfig, pool: &KeyPool) -> Invalid {
    let place = upstream.place_of("keys");
    Invalid::because(match pool.rejected() {
        _ if pool.stats().unreadable > 0 => {
            let state = upstream.place_of("state");
            format!("{state}: no key in the file can be used: data-keys may be missing, or another one")
        }
        [] => format!("{place}: there is no key"),
        [rejected, ..] => format!("{place}: no key can be used: {rejected}"),
    })
}

fn wrong(upstream: &UpstreamConfig, error: impl Error + 'static) -> Invalid {
    Invalid::because(format!("{}: {}", upstream.place_of("keys"), crate::with_sources(&error)))
}

fn of_mongodb(upstream: &UpstreamConfig, error: ConnectError) -> Box<dyn Error> {
    if error.is_unreachable() {
        return error.into();
    }
    Invalid::because(format!("{}: {error}", upstream.place_of("mongodb"))).into()
}
