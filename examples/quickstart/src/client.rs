//! The stack: the key rotation around `reqwest`, with the ledger's layers around and inside it.

use std::{error::Error, sync::Arc, time::Duration};

use reqwest::{Request, Response, redirect};
use tokio::sync::Semaphore;
use tower::{
    ServiceBuilder, layer::layer_fn, limit::GlobalConcurrencyLimitLayer, retry::budget::TpsBudget,
    util::BoxCloneService,
};
use tower_key_rotation::{Failover, KeyPool, KeyRotationLayer};

use crate::{
    ledger::Ledger,
    options::Options,
    target::Target,
    watch::{AroundRotation, InsideRotation},
};

/// All that there are, but on macOS, where a program may open 256 files unless it is told otherwise: with the
/// local service, a connection takes two of them.
const CONNECTIONS: usize = if cfg!(target_os = "macos") { 64 } else { Semaphore::MAX_PERMITS };

pub(crate) type Client = BoxCloneService<Request, Response, tower_key_rotation::Error<reqwest::Error>>;

/// `reqwest`, with a key in each request.
pub(crate) fn with_keys(
    pool: &KeyPool,
    options: &Options,
    target: &Target,
    ledger: &Arc<Ledger>,
) -> Result<Client, Box<dyn Error>> {
    // The default budget keeps clients from multiplying their requests when a service limits everything. This program
    // sends far more than its keys may, on purpose, and each request has to succeed in the end.
    let budget = TpsBudget::new(Duration::from_secs(10), 1000, 10.0);
    let rotation = KeyRotationLayer::new(pool)
        .failover(Failover::attempts(options.attempts).budget(budget))
        .wait_up_to(options.wait());

    let witness = target.witness();
    Ok(BoxCloneService::new(
        ServiceBuilder::new()
            .layer(layer_fn(|inner| AroundRotation::new(inner, ledger.clone())))
            .layer(rotation)
            .layer(layer_fn(|inner| InsideRotation::new(inner, ledger.clone(), witness)))
            .layer(GlobalConcurrencyLimitLayer::new(CONNECTIONS))
            .service(reqwest_client(options, target)?),
    ))
}

fn reqwest_client(options: &Options, target: &Target) -> reqwest::Result<reqwest::Client> {
    // A redirect that reqwest follows by itself would take a key along: see the README.
    let client =
        reqwest::Client::builder().redirect(redirect::Policy::none()).referer(false).timeout(options.timeout);
    if target.is_local() {
        // Whatever proxy or certificates this machine has or lacks, they have no part in this.
        client.no_proxy().tls_certs_only([]).build()
    } else {
        client.build()
    }
}
