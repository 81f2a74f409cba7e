//! Keys in MongoDB, behind a `reqwest::Client`: shared by every process that does the same.
//!
//! ```text
//! MONGODB_URI=mongodb://localhost:27017 cargo run --example mongodb --all-features
//! ```
//!
//! Without `MONGODB_URI` it starts a MongoDB of its own, which is gone at the end. It talks to a service of its
//! own, which limits one of two keys, and shows that key's document before the 429, while the key rests, and
//! after the sweep. So that nobody has to wait for 2 minutes, a key rests for 2 seconds here.
//!
//! It also encrypts the keys of a collection in place:
//!
//! ```text
//! export KEY_ROTATION_DATA_KEYS="2026a=$(openssl rand -base64 64 | tr -d '\n')"
//! cargo run --example mongodb --all-features -- encrypt --help
//! ```

mod encrypt;
#[path = "../local/mod.rs"]
mod local;
#[path = "../local/mongod.rs"]
mod mongod;

use std::{env, error::Error, iter, process::ExitCode, time::Duration};

use clap::{Parser, Subcommand};
use mongodb::{
    Client,
    bson::{Document, doc},
};
use reqwest::{Method, Request, Url};
use tower::{Service, ServiceBuilder, ServiceExt};
use tower_key_rotation::{
    Failover, KeyPool, KeyRotationLayer, RecoveryHandle, ServedBy, same_origin_redirects,
    store::mongodb::MongoStore,
};

const DATABASE: &str = "key_rotation_example";
const COLLECTION: &str = "keys";
const COOLDOWN: Duration = Duration::from_secs(2);

/// Keys in MongoDB: without a command, what becomes of a document when its key is limited.
#[derive(Debug, Parser)]
struct Options {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    Encrypt(encrypt::Options),
}

#[tokio::main]
async fn main() -> ExitCode {
    tracing_subscriber::fmt().with_target(false).init();
    let done = match Options::parse().command {
        Some(Command::Encrypt(options)) => encrypt::run(options).await,
        None => show_a_rest().await,
    };
    let Err(error) = done else { return ExitCode::SUCCESS };
    let error: &(dyn Error + 'static) = &*error;
    let causes = iter::successors(Some(error), |error| (*error).source()).map(ToString::to_string);
    eprintln!("{}", causes.collect::<Vec<_>>().join(": "));
    ExitCode::FAILURE
}

async fn show_a_rest() -> Result<(), Box<dyn Error>> {
    let (uri, server) = match env::var("MONGODB_URI") {
        Ok(uri) => (uri, None),
        Err(_) => {
            println!("MONGODB_URI is not set: starting a MongoDB for this example alone.");
            let server = mongod::Mongod::start(mongod::Kind::ReplicaSet).await?;
            (server.uri(), Some(server))
        }
    };
    let url: Url = local::serve().await?.parse()?;

    // What a program needs.
    let store = MongoStore::builder().database(DATABASE).collection(COLLECTION).connect(&uri).await?;
    store.ensure_indexes().await?;
    let pool = KeyPool::builder()
        .key("alpha", "sk-1") // Inserted where there is no key of that id yet.
        .key("beta", "sk-2")
        .allowed_hosts(url.host_str())
        .cooldown(COOLDOWN)
        .open(store)
        .await?;
    let recovery = RecoveryHandle::spawn(&pool);
    let mut client = ServiceBuilder::new()
        .layer(KeyRotationLayer::new(&pool).expose_key().failover(Failover::attempts(3)))
        .service(same_origin_redirects(reqwest::Client::builder()).build()?);

    let documents = Client::with_uri_str(&uri).await?.database(DATABASE).collection::<Document>(COLLECTION);
    let show = async |when: &str| match documents.find_one(doc! { "_id": "alpha" }).await {
        Ok(Some(mut alpha)) => {
            alpha.insert("apiKey", "(not shown)");
            println!("\n{when}:\n{alpha:#}");
        }
        other => println!("\n{when}: {other:?}"),
    };

    show("Before the 429").await;

    let response = client.ready().await?.call(Request::new(Method::GET, url)).await?;
    if let Some(ServedBy(key)) = response.extensions().get() {
        println!("\n{} with key {key}, after alpha was limited", response.status());
        pool.record_usage(key, 42);
    }
    // The mark is written beside the request.
    while pool.stats().marks_waiting > 0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    show("While it rests").await;

    tokio::time::sleep(COOLDOWN).await;
    let report = recovery.sweep_now().await;
    println!("\nThe sweep reset {:?}", report.outcome?.ids);
    show("After the sweep").await;

    recovery.shutdown().await?;
    documents.drop().await?;
    drop(server);
    Ok(())
}
