//! The messages of `http` and `reqwest`, behind one interface.

mod replay;
mod request;
#[cfg(feature = "reqwest")]
mod reqwest;
mod response;

pub use self::replay::Replay;
#[cfg(feature = "reqwest")]
pub(crate) use self::reqwest::redact_url;
pub(crate) use self::{
    request::RequestMessage,
    response::{JudgedResponse, ReadableResponse, ResponseMessage},
};
