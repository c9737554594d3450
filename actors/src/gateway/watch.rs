//! A begun answer on its way to the client: passed on, measured, and ended when its time or its reader is gone.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use ingle_engine::DEFAULT_READER_DEADLINE as READER_DEADLINE;
use ingle_protocol::wire::Answer;
use ingle_protocol::wire::v1::{Failed, FailureKind};
use tokio::sync::mpsc;
use tokio::time::{timeout, timeout_at};

use crate::monitor::{Latencies, Outcome, Timeline};
use crate::worker::Answers;

pub(super) fn broken() -> Answer {
    let message = "the worker gave up in the middle of the answer".to_owned();
    Answer::Failed(Failed { kind: FailureKind::ConnectionLost, message, retryable: false, migratable: true })
}

fn too_slow() -> Answer {
    let message = format!("nobody read the answer for {} s", READER_DEADLINE.as_secs());
    Answer::Failed(Failed { kind: FailureKind::ReaderTooSlow, message, retryable: false, migratable: false })
}

pub(super) fn out_of_time() -> Answer {
    let message = "the request's time was up before its answer was complete".to_owned();
    Answer::Failed(Failed { kind: FailureKind::DeadlineExceeded, message, retryable: false, migratable: false })
}

/// Counts a request for as long as it lives.
pub(super) struct Place([Arc<AtomicU32>; 2]);

impl Place {
    pub fn take(counts: [Arc<AtomicU32>; 2]) -> Self {
        for count in &counts {
            count.fetch_add(1, Ordering::AcqRel);
        }
        Self(counts)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for count in &self.0 {
            count.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

/// Passes a begun answer on and measures it. Ends when the answer or its reader does.
pub(super) struct Watch {
    pub timeline: Timeline,
    pub latencies: Arc<Latencies>,
    pub node: String,
    pub model: String,
    pub deadline: Instant,
    /// Held for as long as the answer lives.
    pub _place: Place,
}

impl Watch {
    pub async fn run(mut self, first: Option<Answer>, mut inner: Answers, answers: mpsc::Sender<Answer>) {
        let mut next = first;
        // The channel is new, so there is room.
        let Ok(last_word) = answers.clone().try_reserve_owned() else { return };
        // Until its end came through, an answer that ends here ends because its client left.
        let mut outcome = Outcome::Cancelled;
        loop {
            let answer = match next.take() {
                Some(answer) => answer,
                None => {
                    let answer = tokio::select! {
                        biased;
                        // The client left: dropping `inner` tells the worker.
                        () = answers.closed() => break,
                        answer = timeout_at(self.deadline.into(), inner.recv()) => {
                            answer.map_or_else(|_| out_of_time(), |answer| answer.unwrap_or_else(broken))
                        }
                    };
                    self.timeline.observe(&answer, Instant::now());
                    answer
                }
            };
            let last = answer.is_last();
            let ended = if matches!(answer, Answer::Finished(_)) { Outcome::Finished } else { Outcome::Failed };
            // Progress has done its work when it arrived here.
            let passes_on = matches!(answer, Answer::Token(_) | Answer::Finished(_) | Answer::Failed(_));
            if passes_on {
                match timeout(READER_DEADLINE, answers.send(answer)).await {
                    Ok(Ok(())) => {}
                    Ok(Err(_)) => break,
                    // Whatever lies in buffers on the way: nobody holds a place for ever by not reading.
                    Err(_) => {
                        last_word.send(too_slow());
                        outcome = Outcome::Failed;
                        break;
                    }
                }
            }
            if last {
                outcome = ended;
                break;
            }
        }
        self.timeline.close(&self.latencies, &self.node, &self.model, outcome, Instant::now());
    }
}
