//! The inference engine: models on devices, continuous batching, text in and out. The only crate that knows
//! tensors; it knows neither actors nor the network.
//!
//! From the top: [`Engine`] takes requests and sends frames; its scheduler thread drives a [`StepEngine`] one
//! step at a time; [`model`] and [`echo`] are the two of them. An [`Encoder`] stands beside them: it turns texts into
//! embeddings, for an engine whose model is one. [`gguf`], [`text`] and [`dequantize`] read what is in a model file.
//!
//! ```text
//! submit ─▶ intake thread          ─▶ scheduler thread ─▶ StepEngine (model on cpu | wgpu, or echo)
//!           check, render, tokenize   admit, step, sample, detokenize, push frames
//!                                     heartbeat thread: progress while nothing else is said
//! ```

pub mod bench;
pub mod dequantize;
pub mod echo;
pub mod encoder;
pub mod gguf;
pub mod huggingface;
pub mod model;
pub mod perplexity;
pub mod quantize;
pub mod safetensors;
pub mod text;

mod device;
mod engine;
mod error;
#[cfg(any(test, feature = "fuzz"))]
pub mod fuzz;
#[cfg(feature = "gpu")]
#[allow(unsafe_code)] // kernels that do not check their indices, and what wgpu does not tell of an adapter
mod gpu;
mod inspect;
#[allow(unsafe_code)] // intrinsics, and threads that write parts of one slice
mod kernels;
mod memory;
mod sampler;
mod scheduler;
mod snapshot;
mod spec;
mod step_engine;

pub use encoder::Encoder;
pub use engine::Engine;
pub use error::{AdjustError, EngineError};
pub use inspect::{ModelSummary, inspect, is_embedding_model};
pub use kernels::{InstructionSet, KvType};
pub use memory::available as available_memory;
pub use model::{MemoryNeed, memory_need, memory_need_of_echo};
pub use sampler::{BitMask, TokenMask};
pub use snapshot::EngineSnapshot;
pub use spec::{
    DEFAULT_PACKED_LIMIT, DEFAULT_QUEUE, DEFAULT_READER_DEADLINE, DEFAULT_SLOTS, DeviceChoice, EngineSpec,
    ModelOptions, ModelSource, PackedCache,
};
pub use step_engine::{Capabilities, Draw, Logits, Picked, StepEngine, StepEntry};
