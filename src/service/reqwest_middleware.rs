//! The layer as a middleware of `reqwest-middleware`.

use std::future::{Future, ready};

use http::Extensions;
use reqwest::{Request, Response};
use reqwest_middleware::{Error as ClientError, Middleware, Next, Result};
use tracing::Instrument;

use super::{
    attempts::{Attempts, Client},
    describe::Describe,
    error::Error,
    layer::KeyRotationLayer,
    mode::Attempt,
    trace::Trace,
};
use crate::classify::ClassifyResponse;

/// The client behind the middleware, for one request.
struct Behind<'a> {
    extensions: &'a mut Extensions,
    next: Next<'a>,
}

impl Client<Request, Response, ClientError> for Behind<'_> {
    fn ready(&mut self) -> impl Future<Output = Result<()>> + Send {
        ready(Ok(()))
    }

    fn send(&mut self, request: Request) -> impl Future<Output = Result<Response>> + Send {
        self.next.clone().run(request, self.extensions)
    }

    fn release(&mut self) {}
}

/// Put it last, next to the client: middlewares for tracing and retries then see requests without a key.
///
/// Where there is no key, or the key must not be sent, the error is `reqwest_middleware::Error::Middleware` with a
/// [`NoKeyAvailable`](crate::NoKeyAvailable) or an [`InjectError`](crate::InjectError) in it.
///
/// ```
/// use tower_key_rotation::{Failover, KeyPool, KeyRotationLayer};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let pool = KeyPool::builder().key("alpha", "sk-1").allowed_hosts(["api.example.com"]).build()?;
/// let client = reqwest_middleware::ClientBuilder::new(reqwest::Client::new())
///     .with(KeyRotationLayer::new(&pool).failover(Failover::attempts(3)))
///     .build();
/// # let _ = client;
/// # Ok(())
/// # }
/// ```
#[async_trait::async_trait]
impl<C, M, D> Middleware for KeyRotationLayer<C, M, D>
where
    D: Describe<Request> + Send + Sync + 'static,
    C: ClassifyResponse + Send + Sync + 'static,
    M: Attempt<Request, Response, Response = Response> + Send + Sync + 'static,
{
    async fn handle(
        &self,
        request: Request,
        extensions: &mut Extensions,
        next: Next<'_>,
    ) -> Result<Response> {
        let sent = match self.rotation.wants_key(&request) {
            Ok(true) => {
                let traits = self.describe.describe(&request).or_else(|| extensions.get().cloned());
                let traits = self.rotation.needed(traits, &request);
                let trace = Trace::begin(&self.rotation.pool, traits.as_ref());
                let span = trace.span();
                let client = Behind { extensions, next };
                let attempts = Attempts::new(self.rotation.clone(), client, traits, trace);
                attempts.run(request).instrument(span).await
            }
            Ok(false) => next.run(request, extensions).await.map_err(Error::Inner),
            Err(refused) => Err(refused.into_error()),
        };
        sent.map_err(|error| match error {
            Error::NoKeyAvailable(error) => ClientError::middleware(error),
            Error::Inject(error) => ClientError::middleware(error),
            Error::Inner(error) => error,
        })
    }
}
