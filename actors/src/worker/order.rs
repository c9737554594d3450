//! A change of a model's parameters, on its way to whoever runs the model.

use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};

use crate::node::{Outcome, ParameterChanges};

/// What to change, and how.
#[derive(Debug, Clone, Default)]
pub struct ChangeRequest {
    /// What to set and what to take back.
    pub changes: ParameterChanges,
    /// Let the engine finish and start it anew, also where a second one could take over.
    pub restart: bool,
}

/// Where progress of a change is told, in words. Whoever does not listen misses it.
pub type Said = mpsc::Sender<String>;

/// How often something is said while nothing happens, so that silence means trouble.
pub(super) const SAY_AGAIN: Duration = Duration::from_secs(5);

/// A change with its way back.
#[derive(Debug)]
pub(super) struct Order {
    pub request: ChangeRequest,
    pub said: Said,
    /// One change is under way at a time, also where nobody waits for it any longer.
    pub _permit: OwnedSemaphorePermit,
    pub reply: oneshot::Sender<Result<Outcome, String>>,
}

impl Order {
    /// Says how far it is.
    pub fn say(&self, text: String) {
        let _ = self.said.try_send(text);
    }

    /// The last word.
    pub fn end(self, result: Result<Outcome, String>) {
        if let Err(why) = &result {
            tracing::info!(why, "a change of parameters is refused");
        }
        let _ = self.reply.send(result);
    }
}
