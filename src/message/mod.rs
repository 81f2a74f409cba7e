//! The messages of `http` and `reqwest`, behind one interface.

mod end_of_body;
mod replay;
mod request;
#[cfg(feature = "reqwest")]
mod reqwest;
mod response;
#[cfg(feature = "reqwest")]
mod until_end;
mod watch;

pub use self::replay::Replay;
#[cfg(feature = "reqwest")]
pub(crate) use self::reqwest::redact_url;
pub(crate) use self::{
    end_of_body::EndOfBody,
    request::RequestMessage,
    response::{JudgedResponse, ReadableResponse, ResponseMessage},
    watch::{Seen, Watch},
};
