//! A key: its id and secret, where it is written down, where it goes in a request, and to which hosts.

pub(crate) mod hosts;
pub(crate) mod inject;
pub(crate) mod query;
mod secret;
pub(crate) mod source;
mod spec;

#[cfg(feature = "mongodb")]
pub(crate) use self::secret::is_encrypted;
pub use self::{
    hosts::InvalidHost,
    inject::{Credentials, Inject, InjectError, UnusableSecret, UriTooLong},
    secret::{InvalidKeyId, KeyId, Secret},
    source::{Place, Rejected, Rejection},
    spec::KeySpec,
};
