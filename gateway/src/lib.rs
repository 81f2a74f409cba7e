//! An HTTP reverse proxy that puts one of several API keys into each request.
//!
//! The package is a program, which its README describes, and this library, for programs and tests whose client takes
//! only a base URL: [`serve`] starts a gateway in the program itself.
//!
//! ```
//! use key_rotation_gateway::{Config, serve};
//!
//! # #[tokio::main]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let config = Config::new("https://api.openai.com").key("first", "sk-1").key("second", "sk-2");
//! let gateway = serve(config).await?;
//!
//! // Any client of the API, with any text as its key. Many clients want the version in the URL.
//! let base_url = format!("{}/v1", gateway.url());
//! assert!(base_url.starts_with("http://127.0.0.1:"));
//!
//! gateway.shutdown().await?;
//! # Ok(())
//! # }
//! ```
//!
//! To see how the gateway uses `tower-key-rotation`, begin with `proxy/client.rs`, which stacks the layers around a
//! client, and `keys.rs`, which opens the pool.

mod admin;
mod arguments;
mod audit;
mod base_url;
mod caller;
mod callers;
mod check;
mod classifier;
mod config;
mod embedded;
mod exchange;
mod gateway;
mod guesses;
mod health;
mod held;
mod keys;
mod log;
mod media_type;
mod metrics;
mod probe;
mod program;
mod proxy;
mod read_on;
mod reload;
mod serve;
mod served;
mod settings;
mod state;
mod this_machine;
mod unread;
mod upstream;
mod watch;
mod webhook;
mod whole;

use std::{error::Error, iter};

pub use self::embedded::{Config, Gateway, ServeError, serve};
#[doc(hidden)]
pub use self::program::run;

/// The name of the program.
const NAME: &str = env!("CARGO_PKG_NAME");

/// Iterates over an error and its sources.
fn sources<'e>(error: &'e (dyn Error + 'static)) -> impl Iterator<Item = &'e (dyn Error + 'static)> {
    iter::successors(Some(error), |&error| error.source())
}

/// Formats an error and its sources on one line.
fn with_sources(error: &(dyn Error + 'static)) -> String {
    let mut line: Vec<_> = sources(error).map(ToString::to_string).collect();
    // A transparent error has the same text as its source.
    line.dedup();
    line.join(": ")
}
