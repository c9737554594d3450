//! One worker's try at a request: what it says, and what is said of it meanwhile.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ingle_protocol::EngineId;
use ingle_protocol::wire::Answer;
use ingle_protocol::wire::v2::{Failed, FailureKind};
use tokio::sync::watch;
use tokio::time::{sleep, sleep_until};

use super::engines::{Engine, Place};
use crate::worker::Answers;

/// How often a request looks whether something has changed while it waits.
pub(super) const LOOK_AGAIN: Duration = Duration::from_millis(50);

fn broken() -> Answer {
    let message = "the worker gave up in the middle of the answer".to_owned();
    Answer::Failed(Failed { kind: FailureKind::ConnectionLost, message, retryable: true, migratable: true })
}

/// One worker's try.
pub(super) struct Attempt {
    pub id: EngineId,
    pub node_name: String,
    pub engine: Arc<Engine>,
    pub place: Place,
    pub answers: Answers,
    pub suspicion: watch::Receiver<Option<String>>,
    pub any_token: bool,
}

/// What an attempt says next.
pub(super) enum Event {
    Frame(Answer),
    /// Its worker is under suspicion.
    Suspected(String),
    OutOfTime,
}

impl Attempt {
    /// Waits for what it says next.
    pub async fn next(&mut self, deadline: Instant) -> Event {
        loop {
            // While the suspicion stands nobody else may have been there; somebody may come.
            let suspected = self.suspicion.borrow_and_update().clone();
            let look_again = async {
                match &suspected {
                    Some(_) => sleep(LOOK_AGAIN * 5).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                answer = self.answers.recv() => return Event::Frame(answer.unwrap_or_else(broken)),
                changed = self.suspicion.changed() => {
                    if changed.is_ok() && let Some(why) = self.suspicion.borrow_and_update().clone() {
                        return Event::Suspected(why);
                    }
                }
                () = look_again => if let Some(why) = suspected { return Event::Suspected(why) },
                () = sleep_until(deadline.into()) => return Event::OutOfTime,
            }
        }
    }
}
