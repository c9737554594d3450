//! Stands where a model should be that cannot run here, and says why.

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use ingle_protocol::NodeId;
use ingle_protocol::wire::Answer;
use ingle_protocol::wire::v2::{ENDPOINT_NUMERICS, EnginePulse, ModelFacts, ModelState, RefusalKind, Request};
use tokio::sync::mpsc;

use crate::worker::endpoint::features;
use crate::worker::{Worker, refused};

/// See the module.
#[derive(Debug)]
pub(super) struct Standin {
    pub name: String,
    pub backend: String,
    pub why: String,
    pub embeds: bool,
}

impl Worker for Standin {
    fn facts(&self, _: NodeId) -> ModelFacts {
        ModelFacts {
            name: self.name.clone(),
            digest: None,
            state: ModelState::Failed { why: self.why.clone() },
            engine: None,
            backend: self.backend.clone(),
            numerics: ENDPOINT_NUMERICS.into(),
            context_length: 0,
            slots: 0,
            features: features(self.embeds),
            is_default: false,
        }
    }

    fn pulse(&self, _: NodeId) -> Option<EnginePulse> {
        None
    }

    fn submit(&self, request: Request) -> BoxFuture<'_, mpsc::Receiver<Answer>> {
        let message = format!("the model `{}` does not run here: {}", request.model, self.why);
        std::future::ready(refused(RefusalKind::UnknownModel, message)).boxed()
    }
}
