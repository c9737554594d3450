//! The inference engine: models on devices, continuous batching, text in and out. The only crate that knows
//! tensors; it knows neither actors nor the network.
//!
//! From the top: [`Engine`] takes requests and sends frames; its scheduler thread drives a [`StepEngine`] one
//! step at a time; [`llama`] and [`echo`] are the two of them. [`gguf`], [`text`] and [`dequantize`] read what is
//! in a model file.
//!
//! ```text
//! submit ─▶ intake thread          ─▶ scheduler thread ─▶ StepEngine (burn on flex | wgpu, or echo)
//!           check, render, tokenize   admit, step, sample, detokenize, push frames
//!                                     heartbeat thread: progress while nothing else is said
//! ```

pub mod dequantize;
pub mod echo;
pub mod gguf;
pub mod llama;
pub mod text;

mod device;
mod engine;
mod error;
mod inspect;
mod sampler;
mod scheduler;
mod snapshot;
mod spec;
mod step_engine;

pub use engine::Engine;
pub use error::EngineError;
pub use inspect::{ModelSummary, inspect};
pub use sampler::{BitMask, TokenMask};
pub use snapshot::EngineSnapshot;
pub use spec::{DEFAULT_QUEUE, DEFAULT_READER_DEADLINE, DEFAULT_SLOTS, DeviceChoice, EngineSpec, ModelSource};
pub use step_engine::{Capabilities, Logits, StepEngine, StepEntry};
