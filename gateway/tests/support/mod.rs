//! Code that the gateway's tests share. The modules that do not use the library are those of the library's tests.

#![allow(dead_code, unreachable_pub, unused_imports)] // Each test is a crate of its own and uses a part of this.

#[path = "../../../tests/support/canary.rs"]
pub mod canary;
#[path = "../../../tests/support/files.rs"]
mod files;
pub mod gateway;
#[path = "../../../tests/support/logs.rs"]
mod logs;
#[path = "../../../tests/support/mongo.rs"]
pub mod mongo;
#[path = "../../../examples/local/mongod.rs"]
mod mongod;
#[path = "../../../tests/support/proxy.rs"]
mod proxy;
pub mod python;
pub mod raw;
#[path = "../../../tests/support/requests.rs"]
mod requests;
#[path = "../../../tests/support/server.rs"]
mod server;
#[path = "../../../tests/support/time.rs"]
mod time;
pub mod tls;

pub use self::{
    files::{TestFile, file, keys_file},
    logs::Logs,
    proxy::{Fault, Proxy},
    requests::{get, get_request, http, send, status},
    server::{Answer, Server, answer, answer_with, key_of, stream},
    time::{INSTANT, MINUTE, SECOND, eventually, in_time, settle},
};
