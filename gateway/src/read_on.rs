//! Drains abandoned request bodies for a while. hyper would otherwise close the connection, and a caller that is still
//! sending its body might not see the response.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::body::HttpBody;
use http::{Request, header::EXPECT};
use http_body_util::BodyExt;
use hyper::body::{Frame, SizeHint};
use tokio::{runtime::Handle, time::timeout};

const FOR: Duration = Duration::from_secs(5);

/// A request body that is drained after it is dropped.
pub(crate) struct ReadOn<B>
where
    B: HttpBody + Send + Unpin + 'static,
{
    /// `None` after its end or an error.
    body: Option<B>,
    is_sent: bool,
}

impl<B: HttpBody + Send + Unpin + 'static> ReadOn<B> {
    /// Wraps the request's body.
    pub(crate) fn wrap(request: Request<B>) -> Request<Self> {
        // A caller that waits for `100 Continue` has sent no body yet, and a read would make hyper send the 100.
        let is_sent = !request.headers().contains_key(EXPECT);
        request.map(|body| Self { body: Some(body), is_sent })
    }
}

impl<B: HttpBody + Send + Unpin + 'static> HttpBody for ReadOn<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        self.is_sent = true;
        let Some(body) = &mut self.body else { return Poll::Ready(None) };
        let frame = ready!(Pin::new(body).poll_frame(cx));
        if !matches!(frame, Some(Ok(_))) {
            self.body = None;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(HttpBody::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(|| SizeHint::with_exact(0), HttpBody::size_hint)
    }
}

impl<B: HttpBody + Send + Unpin + 'static> Drop for ReadOn<B> {
    fn drop(&mut self) {
        let Some(mut body) = self.body.take().filter(|body| self.is_sent && !body.is_end_stream()) else {
            return;
        };
        if let Ok(runtime) = Handle::try_current() {
            runtime.spawn(timeout(FOR, async move { while let Some(Ok(_)) = body.frame().await {} }));
        }
    }
}
