//! The way out of one answer: a bounded channel that is never waited for.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ingle_protocol::wire::Answer;
use ingle_protocol::wire::v2::{Failed, FailureKind, Progress};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

use super::heartbeat::Heart;

/// The place of an answer's last frame, set aside when the request is handed in: it arrives even where nobody
/// reads, and none is forgotten.
#[derive(Debug)]
pub(crate) struct LastWord(Option<mpsc::OwnedPermit<Answer>>);

impl LastWord {
    /// `None` where the channel is closed or has no place at all.
    pub fn reserve(answers: &mpsc::Sender<Answer>) -> Option<Self> {
        answers.clone().try_reserve_owned().ok().map(|permit| Self(Some(permit)))
    }

    pub fn say(mut self, answer: Answer) {
        if let Some(permit) = self.0.take() {
            permit.send(answer);
        }
    }
}

impl Drop for LastWord {
    /// Whoever loses a request on its way (a thread that ends, a panic) still gives it an end.
    fn drop(&mut self) {
        if let Some(permit) = self.0.take() {
            permit.send(Answer::Failed(Failed {
                kind: FailureKind::ShuttingDown,
                message: "the engine ended before the answer was complete".into(),
                retryable: false,
                migratable: true,
            }));
        }
    }
}

/// Sends frames, and holds at most one that did not fit.
#[derive(Debug)]
pub(crate) struct Output {
    heart: Arc<Heart>,
    last: LastWord,
    stalled: Option<(Answer, Instant)>,
    closed: bool,
}

/// How an output stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flushed {
    /// Everything is sent.
    Clear,
    /// A frame has not fitted since then.
    Stalled(Instant),
    /// Nobody listens.
    Closed,
}

impl Output {
    pub fn new(sender: mpsc::Sender<Answer>, last: LastWord) -> Self {
        Self { heart: Arc::new(Heart::new(sender)), last, stalled: None, closed: false }
    }

    pub fn heart(&self) -> &Arc<Heart> {
        &self.heart
    }

    /// Sends a frame, or keeps it where it does not fit. Only to be called while nothing is kept.
    pub fn send(&mut self, answer: Answer) {
        debug_assert!(self.stalled.is_none());
        match self.heart.sender().try_send(answer) {
            Ok(()) => {}
            Err(TrySendError::Full(answer)) => self.stalled = Some((answer, Instant::now())),
            Err(TrySendError::Closed(_)) => self.closed = true,
        }
    }

    /// Tries again to send what did not fit.
    pub fn flush(&mut self) -> Flushed {
        if self.closed || self.heart.sender().is_closed() {
            return Flushed::Closed;
        }
        let Some((answer, since)) = self.stalled.take() else { return Flushed::Clear };
        self.send(answer);
        match &mut self.stalled {
            Some((_, again)) => {
                *again = since;
                Flushed::Stalled(since)
            }
            None if self.closed => Flushed::Closed,
            None => Flushed::Clear,
        }
    }

    pub fn is_stalled(&self) -> bool {
        self.stalled.is_some()
    }

    pub fn queued(&self, ahead: u32) {
        self.heart.set(Progress::Queued { ahead });
    }

    pub fn prefilled(&self, done: u32, total: u32) {
        self.heart.set(Progress::Prefilled { done, total });
    }

    /// The first token follows: no progress from now on.
    pub fn hush(&self) {
        self.heart.hush();
    }

    /// Sends the last frame, whatever did not fit before it being lost.
    pub fn end_now(self, answer: Answer) {
        self.heart.hush();
        self.last.say(answer);
    }

    /// Sends the last frame behind everything else. Where something has not fitted yet, the rest is returned.
    pub fn end(self, answer: Answer) -> Option<Lingering> {
        if self.stalled.is_some() {
            return Some(Lingering { output: Some((self, answer)) });
        }
        self.end_now(answer);
        None
    }
}

/// An answer at its end whose reader has not taken everything. It has no slot any more.
#[derive(Debug)]
pub(crate) struct Lingering {
    output: Option<(Output, Answer)>,
}

impl Lingering {
    /// Tries again; false when there is nothing more to do.
    pub fn flush(&mut self, now: Instant, deadline: Duration) -> bool {
        let Some((output, _)) = &mut self.output else { return false };
        match output.flush() {
            Flushed::Stalled(since) if now.duration_since(since) < deadline => true,
            Flushed::Closed => false,
            Flushed::Clear => {
                if let Some((output, last)) = self.output.take() {
                    output.end_now(last);
                }
                false
            }
            Flushed::Stalled(_) => {
                if let Some((output, _)) = self.output.take() {
                    output.end_now(super::sequence::too_slow(deadline));
                }
                false
            }
        }
    }
}
