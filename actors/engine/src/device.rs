//! Which device computes, and what runs on it.

use std::sync::Arc;

use crate::echo::Echo;
use crate::text::Codec;
use crate::{EngineError, EngineSpec, ModelSource, StepEngine};

/// A model that is ready to compute.
pub(crate) struct Loaded {
    pub engine: Box<dyn StepEngine>,
    pub codec: Arc<dyn Codec>,
}

/// Loads what the spec names.
pub(crate) fn load(spec: &EngineSpec) -> Result<Loaded, EngineError> {
    match &spec.source {
        ModelSource::Echo => {
            let echo = Echo::new(spec.slots, spec.context_length);
            Ok(Loaded { engine: Box::new(echo), codec: Arc::new(crate::echo::EchoCodec::default()) })
        }
        ModelSource::Gguf(path) => {
            let _ = path;
            Err(EngineError::Device("not yet".into()))
        }
    }
}
