//! Everything that can go wrong with a model file or its engine.

use std::path::PathBuf;

use crate::gguf::GgufError;

/// Why an engine does not start, or stops.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The file cannot be opened or mapped.
    #[error("cannot read {}: {why}", path.display())]
    Open {
        /// The model file.
        path: PathBuf,
        /// What the system said.
        why: std::io::Error,
    },
    /// The file is not a sound GGUF.
    #[error("{}: {why}", path.display())]
    Gguf {
        /// The model file.
        path: PathBuf,
        /// What is wrong with it.
        why: GgufError,
    },
    /// The file is sound, but this engine cannot run such a model.
    #[error("{}: {what} is not supported: {hint}", path.display())]
    Unsupported {
        /// The model file.
        path: PathBuf,
        /// What the model has or is.
        what: String,
        /// What would be supported.
        hint: String,
    },
    /// The model is for something else.
    #[error("{}: this is {is}: {hint}", path.display())]
    Purpose {
        /// The model file.
        path: PathBuf,
        /// What it is and what was expected.
        is: String,
        /// What to do.
        hint: String,
    },
    /// A text that cannot be embedded; the fault of whoever sent it.
    #[error("text {number} of {count} cannot be embedded: {why}")]
    Text {
        /// Which one, from 1 on.
        number: usize,
        /// Texts in all.
        count: usize,
        /// What is wrong with it.
        why: String,
    },
    /// The tokenizer in the file does not work.
    #[error("{}: its tokenizer cannot be built: {why}", path.display())]
    Tokenizer {
        /// The model file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The chat template in the file does not work.
    #[error("{}: its chat template cannot be read: {why}", path.display())]
    ChatTemplate {
        /// The model file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// It does not fit into memory.
    #[error(
        "{}: it needs {} MiB of memory (weights {} MiB, keys and values {} MiB), but {} MiB are free: close other \
         programs, choose a smaller model, or lower the context length or the number of sequences",
        path.display(), needed >> 20, weights >> 20, kv >> 20, free >> 20
    )]
    Memory {
        /// The model file.
        path: PathBuf,
        /// Bytes in all.
        needed: u64,
        /// Bytes of weights.
        weights: u64,
        /// Bytes of keys and values.
        kv: u64,
        /// Bytes that can be had.
        free: u64,
    },
    /// It does not fit into a graphics card's memory.
    #[error(
        "{}: it needs {} MiB of {card}'s memory (weights {} MiB, keys and values {} MiB), which has {} MiB: choose a \
         smaller model, lower the context length or the number of sequences, or use the CPU",
        path.display(), needed >> 20, weights >> 20, kv >> 20, has >> 20
    )]
    CardMemory {
        /// The model file.
        path: PathBuf,
        /// What the card is called.
        card: String,
        /// Bytes in all.
        needed: u64,
        /// Bytes of weights.
        weights: u64,
        /// Bytes of keys and values.
        kv: u64,
        /// Bytes that the card has, whoever uses them.
        has: u64,
    },
    /// No device of the wanted kind.
    #[error("no such device: {0}")]
    Device(String),
    /// A step could not be computed.
    #[error("the engine failed in a step: {0}")]
    Step(String),
}

impl EngineError {
    /// Bytes of memory that were missing, where that is what is wrong; else 0.
    pub(crate) fn missing_memory(&self) -> u64 {
        match self {
            Self::Memory { needed, free, .. } => needed.saturating_sub(*free),
            _ => 0,
        }
    }
}

/// Why [`crate::Engine::adjust`] changes nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AdjustError {
    /// More sequences than there are slots for, or none.
    #[error("batch_size is {asked}: this engine has room for 1 to {room}")]
    BatchSize {
        /// What was asked for.
        asked: u32,
        /// Slots that the engine was made with.
        room: u32,
    },
    /// A limit under which nothing could be computed.
    #[error("{0} is 0: it must be at least 1")]
    Zero(&'static str),
}
