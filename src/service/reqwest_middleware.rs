//! The same for `reqwest-middleware`.

use std::fmt;

use http::Extensions;
use reqwest::{Request, Response};
use reqwest_middleware::{Error as ClientError, Middleware, Next, Result};

use crate::{
    classify::{ClassifyResponse, TooManyRequests},
    pool::Lease,
    service::error::Error,
    service::failover::{FailoverLayer, FailoverPolicy, SendOnce, Sending, TryClone, send_with_failover},
    service::layer::{Bodies, KeyRotationLayer},
    service::rotation::{BodyLimits, Rotation},
    service::tried,
};

/// [`KeyRotationLayer`], and [`FailoverLayer`] if wanted, as a middleware of `reqwest-middleware`.
///
/// Put it last, next to the client, so that middlewares for tracing and retries see requests without a key.
///
/// Where there is no key, or the key must not be sent, the error is `reqwest_middleware::Error::Middleware`,
/// with a [`NoKeyAvailable`](crate::NoKeyAvailable) or an [`InjectError`](crate::InjectError) in it.
///
/// ```
/// use tower_key_rotation::{FailoverLayer, KeyPool, KeyRotationLayer, KeyRotationMiddleware};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let pool = KeyPool::builder().key("alpha", "sk-1").allowed_hosts(["api.example.com"]).build()?;
/// let rotation = KeyRotationLayer::new(&pool);
///
/// let client = reqwest_middleware::ClientBuilder::new(reqwest::Client::new())
///     .with(KeyRotationMiddleware::new(rotation).with_failover(FailoverLayer::new(&pool)))
///     .build();
/// # let _ = client;
/// # Ok(())
/// # }
/// ```
pub struct KeyRotationMiddleware<C = TooManyRequests> {
    rotation: Rotation<C>,
    bodies: Option<BodyLimits>,
    failover: Option<FailoverPolicy<TryClone>>,
}

impl<C> KeyRotationMiddleware<C> {
    /// Does what that layer does.
    #[must_use]
    pub fn new<B: Bodies>(layer: KeyRotationLayer<C, B>) -> Self {
        let (rotation, bodies) = layer.into_parts();
        Self { rotation, bodies, failover: None }
    }

    /// Does what that layer does around it.
    #[must_use]
    pub fn with_failover(mut self, layer: FailoverLayer) -> Self {
        self.failover = Some(layer.into_policy());
        self
    }
}

impl<C: ClassifyResponse> KeyRotationMiddleware<C> {
    async fn send(&self, mut request: Request, extensions: &mut Extensions, next: Next<'_>) -> Sent {
        let Some(lease) = self.rotation.prepare(&mut request)? else {
            return next.run(request, extensions).await.map_err(Error::Inner);
        };
        let result = match next.run(request, extensions).await {
            Ok(response) => Ok(self.with_what_is_read(response).await),
            error => error,
        };
        self.rotation.observer.settle(&lease, result)
    }

    async fn with_what_is_read(&self, response: Response) -> Response {
        match self.bodies.filter(|_| self.rotation.observer.wants_body(&response)) {
            Some(limits) => limits.read(&self.rotation.pool, response).await,
            None => response,
        }
    }
}

type Sent = std::result::Result<Response, Error<ClientError>>;

/// What is behind the middleware, for one request.
struct Client<'a, C> {
    middleware: &'a KeyRotationMiddleware<C>,
    extensions: &'a mut Extensions,
    next: Next<'a>,
}

impl<C: ClassifyResponse + Send + Sync> SendOnce<Request, Response, ClientError> for Client<'_, C> {
    fn send(&mut self, request: Request, tried: Vec<Lease>) -> Sending<'_, Response, ClientError> {
        let sent = self.middleware.send(request, self.extensions, self.next.clone());
        Box::pin(tried::drive_without(tried, sent))
    }
}

#[async_trait::async_trait]
impl<C> Middleware for KeyRotationMiddleware<C>
where
    C: ClassifyResponse + Send + Sync + 'static,
{
    async fn handle(
        &self,
        request: Request,
        extensions: &mut Extensions,
        next: Next<'_>,
    ) -> Result<Response> {
        let sent = match &self.failover {
            None => self.send(request, extensions, next).await,
            Some(policy) => {
                let client = Client { middleware: self, extensions, next };
                send_with_failover(policy.clone(), request, client).await
            }
        };
        sent.map_err(|error| match error {
            Error::NoKeyAvailable(error) => ClientError::middleware(error),
            Error::Inject(error) => ClientError::middleware(error),
            Error::Inner(error) => error,
        })
    }
}

impl<C> fmt::Debug for KeyRotationMiddleware<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyRotationMiddleware")
            .field("rotation", &self.rotation)
            .field("failover", &self.failover)
            .finish()
    }
}
