//! Which device computes, and what runs on it.

use std::sync::Arc;

use crate::echo::{Echo, EchoCodec};
use crate::gguf::Gguf;
use crate::model::Model;
use crate::text::{Codec, Tokenizer};
use crate::{DeviceChoice, EngineError, EngineSpec, ModelSource, StepEngine};

/// Engines whose CPU kernels give the same bits; to be raised when their arithmetic changes.
const CPU_NUMERICS: &str = "cpu-1";

/// The numerics class of embeddings: always of the CPU, with keys and values in half precision.
pub(crate) fn encoder_numerics() -> String {
    format!("{CPU_NUMERICS}-f16")
}

/// What computes.
#[derive(Debug)]
pub(crate) enum Place {
    Cpu,
    #[cfg(feature = "gpu")]
    Gpu(crate::gpu::Card),
}

/// Where a model computes.
#[derive(Debug)]
pub(crate) struct Placement {
    pub place: Place,
    /// In words.
    pub backend: String,
    /// The numerics class.
    pub numerics: String,
}

/// A model that is ready to compute.
pub(crate) struct Loaded {
    pub engine: Box<dyn StepEngine>,
    pub codec: Arc<dyn Codec>,
}

/// Loads what the spec names.
pub(crate) fn load(spec: &EngineSpec) -> Result<Loaded, EngineError> {
    match &spec.source {
        ModelSource::Echo => {
            let echo = Echo::new(spec.options.room(), spec.options.context_length);
            Ok(Loaded { engine: Box::new(echo), codec: Arc::new(EchoCodec::default()) })
        }
        ModelSource::Gguf(path) => {
            let gguf = Arc::new(Gguf::open(path)?);
            let placement = choose(spec.device)?;
            // Two threads, as each takes a part of the time to the first answer.
            let (model, tokenizer) = rayon::join(
                || Model::load(Arc::clone(&gguf), placement, &spec.options),
                || Tokenizer::from_gguf(&gguf),
            );
            let (model, tokenizer) = (model?, tokenizer?);
            if tokenizer.vocabulary() > model.capabilities().vocabulary {
                return Err(EngineError::Tokenizer {
                    path: path.clone(),
                    why: format!(
                        "it has {} tokens, the model only {}",
                        tokenizer.vocabulary(),
                        model.capabilities().vocabulary
                    ),
                });
            }
            Ok(Loaded { engine: Box::new(model), codec: Arc::new(tokenizer) })
        }
    }
}

/// The device that is wanted; the CPU where `Auto` finds no other.
pub(crate) fn choose(choice: DeviceChoice) -> Result<Placement, EngineError> {
    let found = match choice {
        DeviceChoice::Cpu => None,
        DeviceChoice::Auto => gpu(false),
        DeviceChoice::Gpu => {
            let why = if cfg!(feature = "gpu") {
                "no graphics adapter was found (is its Vulkan or Metal driver installed?)"
            } else {
                "this build has no GPU support: build it with `--features gpu`"
            };
            Some(gpu(true).ok_or_else(|| EngineError::Device(why.into()))?)
        }
    };
    Ok(found.unwrap_or_else(|| Placement { place: Place::Cpu, backend: "cpu".into(), numerics: CPU_NUMERICS.into() }))
}

#[cfg(not(feature = "gpu"))]
fn gpu(_software_too: bool) -> Option<Placement> {
    None
}

/// With `software_too` also a driver that computes on the CPU.
#[cfg(feature = "gpu")]
fn gpu(software_too: bool) -> Option<Placement> {
    let card = crate::gpu::Card::find(software_too)?;
    Some(Placement { backend: card.backend(), numerics: card.numerics(), place: Place::Gpu(card) })
}
