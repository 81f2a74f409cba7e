//! The key that a response was asked for with.

use crate::{key::KeyId, message::JudgedResponse, pool::Lease};

/// The key that served a request, in the extensions of its response.
///
/// [`KeyRotationLayer::expose_key`](crate::KeyRotationLayer::expose_key) puts it there:
///
/// ```
/// use tower_key_rotation::{KeyPool, ServedBy};
///
/// fn credit<B>(pool: &KeyPool, response: &http::Response<B>, tokens: u64) {
///     if let Some(ServedBy(key)) = response.extensions().get() {
///         pool.record_usage(key, tokens);
///     }
/// }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServedBy(pub KeyId);

#[cold]
pub(crate) fn expose<R: JudgedResponse>(lease: &Lease, response: &mut R) {
    response.extensions_mut().insert(ServedBy(lease.id().clone()));
}
