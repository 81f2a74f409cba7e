//! Drains abandoned request bodies for a while. hyper would otherwise close the connection, and a caller that is still
//! sending its body might not see the response.

use std::{
    mem,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::{
    body::{Body, Bytes, HttpBody},
    extract::Request,
    http::header::EXPECT,
};
use http_body_util::BodyExt;
use hyper::body::{Frame, SizeHint};
use tokio::{runtime::Handle, time::timeout};

const FOR: Duration = Duration::from_secs(5);

/// Wraps the request's body, so that the body is drained after it is dropped.
pub(crate) async fn read_on(request: Request) -> Request {
    // A caller that waits for `100 Continue` has sent no body yet, and a read would make hyper send the 100.
    let is_sent = !request.headers().contains_key(EXPECT);
    request.map(|body| Body::new(ReadOn { body, is_sent }))
}

struct ReadOn {
    /// Empty after its end or an error.
    body: Body,
    is_sent: bool,
}

impl HttpBody for ReadOn {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        self.is_sent = true;
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if !matches!(frame, Some(Ok(_))) {
            self.body = Body::empty();
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for ReadOn {
    fn drop(&mut self) {
        let mut body = mem::take(&mut self.body);
        if !self.is_sent || body.is_end_stream() {
            return;
        }
        if let Ok(runtime) = Handle::try_current() {
            runtime.spawn(timeout(FOR, async move { while let Some(Ok(_)) = body.frame().await {} }));
        }
    }
}
