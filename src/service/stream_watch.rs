//! Looks at a response's body as it passes: an error before the first content is a refusal, a later one rests the key.

use std::{
    mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use http::HeaderMap;

use super::{
    judge,
    reservation::{self, Held},
    rotation::Rotation,
    stream_head::{StreamHead, Watched, Watches},
};
use crate::{
    classify::{
        ClassifyResponse, Event, Events, ResponseHead, Said, StreamError, Verdict, is_grpc_error,
        may_be_error,
    },
    message::{EndOfBody, JudgedResponse, Seen, Watch},
    pool::{Key, Lease},
};

/// Looks at the body of one response, whose head has been judged.
pub(super) struct StreamWatch<C, M> {
    rotation: Arc<Rotation<C, M>>,
    key: Arc<Key>,
    held: Option<Arc<Held>>,
    headers: HeaderMap,
    stream: Mutex<Stream>,
}

struct Stream {
    /// `None` if only trailers matter.
    events: Option<Events>,
    stage: Stage,
    /// How many more bytes may be held.
    left: usize,
}

#[derive(Debug)]
enum Stage {
    /// The caller has nothing of the response yet.
    Holding,
    /// An error came before any content.
    Refused(StreamError),
    /// The caller reads.
    Passing,
    /// An error came while the caller reads.
    Failed(StreamError),
    Over,
}

impl<C, M> StreamWatch<C, M>
where
    C: ClassifyResponse,
{
    /// Takes over what the request holds until the end of the body.
    pub(super) fn new<R: JudgedResponse>(
        rotation: Arc<Rotation<C, M>>,
        watches: Watches,
        lease: &mut Lease,
        response: &mut R,
    ) -> Self {
        let (events, left) = match watches {
            Watches::Events(StreamHead { bytes, .. }) => (Some(Events::new(bytes)), bytes),
            // A message is content.
            Watches::Trailers => (None, 1),
        };
        let held = reservation::keep_for_stream(lease, response);
        response.extensions_mut().insert(Watched);
        Self {
            rotation,
            key: lease.key.clone(),
            held,
            headers: response.headers().clone(),
            stream: Mutex::new(Stream { events, stage: Stage::Holding, left }),
        }
    }

    /// Who has to be told that the body ends.
    pub(super) fn end(&self) -> Option<Arc<dyn EndOfBody>> {
        Some(self.held.clone()?)
    }

    /// Ends the hold. Returns the error that came before any content.
    pub(super) fn release(&self) -> Option<StreamError> {
        let mut stream = self.lock();
        match mem::replace(&mut stream.stage, Stage::Passing) {
            Stage::Refused(error) => {
                stream.stage = Stage::Over;
                Some(error)
            }
            Stage::Holding => None,
            stage => {
                stream.stage = stage;
                None
            }
        }
    }

    /// The service refused the request before any content: the request gives back what it holds.
    pub(super) fn refuse(&self, error: &StreamError) -> Verdict {
        let verdict = self.judge(error);
        if let Some(held) = &self.held {
            held.refused();
        }
        verdict
    }

    fn judge(&self, error: &StreamError) -> Verdict {
        let headers = error.trailers.as_ref().unwrap_or(&self.headers);
        let head = ResponseHead::new(error.status, headers).with_body(&error.body);
        let verdict = self.rotation.judge.classifier.classify(&head);
        judge::apply_within(&self.key, self.held.as_deref(), verdict, error.status);
        verdict
    }

    /// Looks further, and judges an error that the caller is about to read.
    fn look(&self, look: impl FnOnce(&mut Stream)) -> Seen {
        let mut stream = self.lock();
        look(&mut stream);
        let failed = match &stream.stage {
            Stage::Holding => return Seen::TooLittle,
            Stage::Passing => return Seen::Enough,
            Stage::Refused(_) | Stage::Over => return Seen::All,
            Stage::Failed(_) => mem::replace(&mut stream.stage, Stage::Over),
        };
        // To rest a key takes other locks.
        drop(stream);
        if let Stage::Failed(error) = failed {
            let verdict = self.judge(&error);
            tracing::debug!(key = %self.key.id, status = %error.status, ?verdict, "error within a stream");
        }
        Seen::All
    }

    fn lock(&self) -> MutexGuard<'_, Stream> {
        self.stream.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<C, M> Watch for StreamWatch<C, M>
where
    C: ClassifyResponse + Send + Sync,
    M: Send + Sync,
{
    fn data(&self, data: &[u8]) -> Seen {
        self.look(|stream| {
            if let Some(events) = &mut stream.events {
                events.read(data, |event| stream.stage.sees(event));
            }
            stream.left = stream.left.saturating_sub(data.len());
            if stream.left == 0 && matches!(stream.stage, Stage::Holding) {
                stream.stage = Stage::Passing;
            }
        })
    }

    fn trailers(&self, trailers: &HeaderMap) -> Seen {
        self.look(|stream| {
            if stream.events.is_none() && is_grpc_error(trailers) {
                stream.stage.meets(StreamError::in_trailers(trailers));
            }
        })
    }

    fn ended(&self) {
        self.look(|stream| {
            if let Some(events) = &mut stream.events {
                events.end(|event| stream.stage.sees(event));
            }
        });
    }
}

impl Stage {
    /// Returns whether the next event matters.
    fn sees(&mut self, event: Event<'_>) -> bool {
        match self {
            Self::Holding => match Said::by(event) {
                Said::Nothing => {}
                Said::Content => *self = Self::Passing,
                Said::Error(error) => self.meets(error),
            },
            Self::Passing if may_be_error(event) => {
                if let Said::Error(error) = Said::by(event) {
                    self.meets(error);
                }
            }
            _ => {}
        }
        matches!(self, Self::Holding | Self::Passing)
    }

    fn meets(&mut self, error: StreamError) {
        match self {
            Self::Holding => *self = Self::Refused(error),
            Self::Passing => *self = Self::Failed(error),
            Self::Refused(_) | Self::Failed(_) | Self::Over => {}
        }
    }
}
