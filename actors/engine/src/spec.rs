//! What an engine is told when it starts.

use std::path::PathBuf;
use std::time::Duration;

use ingle_protocol::ModelDigest;

/// Sequences that may wait for a slot, unless the spec says otherwise.
pub const DEFAULT_QUEUE: u32 = 64;
/// Sequences decoded together, unless the spec says otherwise.
pub const DEFAULT_SLOTS: u32 = 4;
/// How long a reader may leave its sequence paused, unless the spec says otherwise.
pub const DEFAULT_READER_DEADLINE: Duration = Duration::from_secs(10);

/// Where the weights come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelSource {
    /// A GGUF file.
    Gguf(PathBuf),
    /// No weights: the engine repeats what the user said (see [`crate::echo`]). Only ever by explicit wish.
    Echo,
}

/// Which kind of device computes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The GPU where this build has one (`gpu` feature) and an adapter is found, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The GPU; the engine fails to start without one.
    Gpu,
}

/// What to run and within which limits.
#[derive(Debug, Clone)]
pub struct EngineSpec {
    /// The model.
    pub source: ModelSource,
    /// Its content. Requests for another are refused; all zero is a digest like any other (echo's).
    pub digest: ModelDigest,
    /// Sequences decoded together, at least 1.
    pub slots: u32,
    /// Upper bound on the context length in tokens; `None`: the model's own.
    pub context_length: Option<u32>,
    /// Which kind of device computes.
    pub device: DeviceChoice,
    /// How long a sequence stays paused for a reader that does not read, before it is given up.
    pub reader_deadline: Duration,
    /// Requests that may wait for a slot; one more is refused as busy.
    pub queue: u32,
}

impl EngineSpec {
    /// A model with the default limits.
    pub fn new(source: ModelSource, digest: ModelDigest) -> Self {
        Self {
            source,
            digest,
            slots: DEFAULT_SLOTS,
            context_length: None,
            device: DeviceChoice::Auto,
            reader_deadline: DEFAULT_READER_DEADLINE,
            queue: DEFAULT_QUEUE,
        }
    }
}
