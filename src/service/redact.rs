//! Takes keys out of errors that remember a URL.

use crate::key::query::Parameter;

#[cfg(feature = "reqwest")]
mod for_reqwest {
    use std::{any::Any, error::Error as StdError};

    use crate::{key::query::Parameter, message::redact_url, service::error::Error};

    /// Looks inside this crate's own error, which another pool further in returns, and `reqwest-middleware`'s.
    macro_rules! redact_any {
        ($error:expr, $parameters:expr) => {{
            if let Some(error) = $error.downcast_mut() {
                redact_url(error, $parameters);
            } else if let Some(Error::Inner(error)) = $error.downcast_mut() {
                redact_url(error, $parameters);
            }
            #[cfg(feature = "reqwest-middleware")]
            if let Some(reqwest_middleware::Error::Reqwest(error)) = $error.downcast_mut() {
                redact_url(error, $parameters);
            } else if let Some(Error::Inner(reqwest_middleware::Error::Reqwest(error))) =
                $error.downcast_mut()
            {
                redact_url(error, $parameters);
            }
        }};
    }

    pub(crate) fn redact(error: &mut dyn Any, parameters: &[Parameter]) {
        match error.downcast_mut::<Box<dyn StdError + Send + Sync>>() {
            Some(error) => redact_any!(error, parameters),
            None => redact_any!(error, parameters),
        }
    }
}

/// Takes a key out of the URL that an error of `reqwest` remembers, and prints.
pub(crate) fn redact<E: 'static>(error: &mut E, parameters: &[Parameter]) {
    #[cfg(feature = "reqwest")]
    for_reqwest::redact(error, parameters);
    #[cfg(not(feature = "reqwest"))]
    let _ = (error, parameters);
}
