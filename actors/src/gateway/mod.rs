//! Where a request enters: find the model, wait for its turn, choose a worker, move where that breaks, deliver.

mod admission;
mod attempt;
mod choice;
mod delivery;
mod embed;
mod engines;
mod flight;
mod journal;
mod offers;
mod purpose;
mod router;
mod warming;

use std::time::Duration;

use ingle_protocol::RequestId;
use ingle_protocol::registry::ModelType;
use ingle_protocol::wire::Answer;
use ingle_protocol::wire::v2::{
    Accepted, Failed, FailureKind, Message, ModelState, Priority, Refused, Sampling, TraceContext,
};
use serde::Serialize;
use tokio::sync::mpsc;

pub use admission::AdmissionOptions;
pub use embed::{EmbedRequest, Embedded};
pub use journal::{Attempt, Considered, Record, RequestRecord};
pub use router::Gateway;

/// The model name that always means the default one.
pub const DEFAULT_MODEL: &str = "default";

/// Used where a request does not say: the raw distribution (1.0, 1.0) derails small models within a sentence.
pub const DEFAULT_TEMPERATURE: f32 = 0.6;
/// See [`DEFAULT_TEMPERATURE`].
pub const DEFAULT_TOP_P: f32 = 0.9;

/// One chat request as the dialects hand it over.
#[derive(Debug, Clone)]
pub struct ChatRequest {
    /// Chosen at ingress.
    pub request_id: RequestId,
    /// The trace that it belongs to.
    pub trace: TraceContext,
    /// On whose behalf.
    pub principal: String,
    /// Its place among others.
    pub priority: Priority,
    /// How long an answer is still worth something.
    pub deadline: Duration,
    /// A model's name; empty or `default` for the default one.
    pub model: String,
    /// The conversation.
    pub messages: Vec<Message>,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Members of the request's JSON that have no field here, as a JSON object; empty for none.
    pub extra: Vec<u8>,
}

/// An answer that has begun. Dropping it cancels the request, here and on the worker.
#[derive(Debug)]
pub struct Reply {
    /// Name of the node that began the answer.
    pub node: String,
    /// The model's full name.
    pub model: String,
    /// Features of its engine.
    pub features: Vec<String>,
    /// What the engine said on taking the request.
    pub accepted: Accepted,
    /// `Token` frames, then one `Finished` or `Failed`. It never ends without one of the two.
    pub answers: mpsc::Receiver<Answer>,
    /// What becomes of it and why.
    pub record: Record,
}

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum GatewayError {
    /// No node of the cluster knows the model.
    #[error("{}", unknown_model(.model, .near, .known))]
    UnknownModel {
        /// The name asked for.
        model: String,
        /// What was probably meant.
        near: Vec<String>,
        /// Some of the names that there are.
        known: Vec<String>,
    },
    /// The model is for something else.
    #[error("{why}")]
    WrongModel {
        /// What it is, and what to ask instead.
        why: String,
    },
    /// The model is known, but nobody can answer now.
    #[error("{why}")]
    NoWorker {
        /// Why not, and what to do.
        why: String,
        /// When it is worth trying again.
        retry_after: Duration,
    },
    /// The model is being loaded, and will not be there in time.
    #[error("{why}")]
    Loading {
        /// What is being done.
        why: String,
        /// When it will probably be there.
        retry_after: Duration,
    },
    /// Whoever asks has more under way than its share.
    #[error("{why}")]
    Quota {
        /// What there is too much of.
        why: String,
        /// When it is worth trying again.
        retry_after: Duration,
    },
    /// A worker refused the request for what it is, or all of them for lack of room.
    #[error("{}", .0.message)]
    Refused(Refused),
    /// The answer broke before its first token.
    #[error("{}", .0.message)]
    Failed(Failed),
}

impl GatewayError {
    /// As the last frame of an answer whose client was told already that it had begun.
    fn into_failed(self) -> Failed {
        match self {
            Self::Failed(failed) => failed,
            other => {
                let message = other.to_string();
                Failed { kind: FailureKind::ConnectionLost, message, retryable: false, migratable: false }
            }
        }
    }
}

/// Says that there is no such model, and what there is instead.
pub fn unknown_model(model: &str, near: &[String], known: &[String]) -> String {
    let model: String = model.chars().take(100).collect();
    let instead = match (near, known) {
        ([], []) => String::new(),
        ([], known) => {
            let some = known.iter().take(5).cloned().collect::<Vec<_>>().join(", ");
            format!(" There is {some}; `default` means the default one.")
        }
        (near, _) => format!(" Did you mean {}?", near.join(" or ")),
    };
    format!("The model `{model}` does not exist here.{instead}")
}

/// A model as the cluster as a whole offers it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct OfferedModel {
    /// Its name.
    pub name: String,
    /// What it does; `None` until a node has looked.
    pub kind: Option<ModelType>,
    /// Request fields beyond the common ones that it honours.
    pub features: Vec<String>,
    /// The best state among the nodes that have it.
    pub state: ModelState,
    /// Names of the nodes that answer for it now.
    pub nodes: Vec<String>,
    /// Context length in tokens; 0 until it is known.
    pub context_length: u32,
    /// It answers requests that name no model.
    pub is_default: bool,
    /// Seconds since 1970 at which this node first heard of it.
    pub created: u64,
}
