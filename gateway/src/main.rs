//! The program. `--help` lists its settings, and `README.md` describes the rest.
//!
//! ```text
//! cargo run -p key-rotation-gateway -- --upstream https://api.example.com --keys keys.txt
//! ```

use std::{env, process::ExitCode};

use mimalloc::MiMalloc;

/// A request through the gateway takes about 50 allocations, which the system's allocator makes expensive.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

#[tokio::main]
async fn main() -> ExitCode {
    key_rotation_gateway::run(env::args_os().collect()).await
}
