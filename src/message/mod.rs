//! The messages of `http` and `reqwest`, behind one interface.

mod replay;
mod request;
#[cfg(feature = "reqwest")]
mod reqwest;
mod response;

#[cfg(feature = "reqwest")]
pub(crate) use self::reqwest::redact_url;
pub(crate) use self::response::JudgedResponse;
pub use self::{
    replay::Replay,
    request::RequestMessage,
    response::{ReadableResponse, ResponseMessage},
};
