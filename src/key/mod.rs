//! A key: what may be said of it, where it is written down, where it goes in a request, and to which hosts.

pub(crate) mod hosts;
pub(crate) mod inject;
pub(crate) mod query;
pub(crate) mod rejected;
mod secret;
pub(crate) mod source;
mod spec;
pub(crate) mod unkeyed;
mod unusable;

#[cfg(any(feature = "file", feature = "mongodb"))]
pub(crate) use self::secret::is_encrypted;
pub use self::{
    inject::{Credentials, Inject, InjectError},
    rejected::Rejected,
    secret::{InvalidKeyId, KeyId, Secret},
    spec::KeySpec,
    unusable::UnusableSecret,
};
