//! `octocrab` takes a service. The key rotation is below the layer that completes URIs.

use std::error::Error;

use clients::service;
use http::Uri;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use octocrab::{AuthState, Octocrab, OctocrabBuilder, service::middleware::base_uri::BaseUriLayer};
use serde_json::Value;
use tower::ServiceBuilder;
use tower_key_rotation::{Failover, KeyPool, KeyRotationLayer, classify::GitHub};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let pool = KeyPool::builder().keys_from_env("KEYS").build()?;
    let http = Client::builder(TokioExecutor::new()).build_http(); // for https: the connector of hyper-rustls
    let client = ServiceBuilder::new()
        .layer(BaseUriLayer::new(Uri::try_from(service())?))
        .layer(KeyRotationLayer::new(&pool).classify(GitHub).failover(Failover::attempts(2)))
        .service(http);
    let github: Octocrab =
        OctocrabBuilder::new_empty().with_service(client).with_auth(AuthState::None).build()?;

    let repository: Value = github.get("/repos/owner/name", None::<&()>).await?;
    println!("{}", repository["full_name"]);
    // Octocrab's bodies can't be read twice: what is limited comes back as it is, and is not sent again.
    let issue: Value = github.post("/repos/owner/name/issues", Some(&Value::default())).await?;
    println!("{}", issue["title"]);
    Ok(())
}
