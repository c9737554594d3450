//! What an engine is told when it starts.

use std::path::PathBuf;
use std::time::Duration;

use ingle_protocol::ModelDigest;

use crate::kernels::{InstructionSet, KvType};

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

/// Where packed weights are kept for all engines of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackedCache {
    /// The folder. Only this user may be able to write it.
    pub folder: PathBuf,
    /// The model file's content, which names the packed file.
    pub digest: String,
    /// Bytes of all packed files at most; those that were not used for longest go first.
    pub limit: u64,
}

/// Bytes of packed files at most, unless the spec says otherwise.
pub const DEFAULT_PACKED_LIMIT: u64 = 64 << 30;

impl PackedCache {
    /// In a folder of the model store, with the usual limit.
    pub fn beside(store: &std::path::Path, digest: String) -> Self {
        Self { folder: store.join("packed"), digest, limit: DEFAULT_PACKED_LIMIT }
    }
}

/// What can be set for a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelOptions {
    /// Sequences decoded together, at least 1.
    pub slots: u32,
    /// Sequences that [`crate::Engine::adjust`] may allow together; never fewer than `slots`. Memory for keys and
    /// values is that of `slots`, so more of them share it.
    pub most_slots: u32,
    /// Upper bound on the context length in tokens; `None`: the model's own.
    pub context_length: Option<u32>,
    /// How keys and values are kept (on the CPU; other devices keep floats).
    pub kv_type: KvType,
    /// Bytes for keys and values of all sequences at most; one full context fits in any case. `None`: room for all
    /// slots at full length.
    pub kv_memory: Option<u64>,
    /// Tokens of prompts that are computed in one step, at most; `None`: 256.
    pub chunk: Option<u32>,
    /// Threads that compute, on the CPU; `None`: one for each core.
    pub threads: Option<usize>,
    /// Where packed weights are kept; `None`: each engine has a copy of its own.
    pub packed_cache: Option<PackedCache>,
    /// Instructions to use; `None`: the best that this processor has.
    pub instructions: Option<InstructionSet>,
}

impl Default for ModelOptions {
    fn default() -> Self {
        Self {
            slots: DEFAULT_SLOTS,
            most_slots: 0,
            context_length: None,
            kv_type: KvType::F16,
            kv_memory: None,
            chunk: None,
            threads: None,
            packed_cache: None,
            instructions: None,
        }
    }
}

impl ModelOptions {
    /// Slots that an engine is made with.
    pub(crate) fn room(&self) -> u32 {
        self.most_slots.max(self.slots).max(1)
    }

    pub(crate) fn threads(&self) -> usize {
        self.threads.unwrap_or_else(default_threads).max(1)
    }

    pub(crate) fn instruction_set(&self) -> InstructionSet {
        let available = InstructionSet::available();
        self.instructions.filter(|set| available.contains(set)).unwrap_or(available[0])
    }
}

/// One for each core.
pub(crate) fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// What to run and within which limits.
#[derive(Debug, Clone)]
pub struct EngineSpec {
    /// The model.
    pub source: ModelSource,
    /// Its content. Requests for another are refused; all zero is a digest like any other (echo's).
    pub digest: ModelDigest,
    /// What can be set for the model.
    pub options: ModelOptions,
    /// Tokens of an answer at most, also where a request asks for more; `None`: up to the context's end.
    pub max_tokens: Option<u32>,
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
            options: ModelOptions::default(),
            max_tokens: None,
            device: DeviceChoice::Auto,
            reader_deadline: DEFAULT_READER_DEADLINE,
            queue: DEFAULT_QUEUE,
        }
    }
}
