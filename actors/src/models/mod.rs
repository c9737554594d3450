//! Models: where their files come from and where they are kept.
//!
//! A model is a name and the SHA-256 of one GGUF file. [`ModelStore`] keeps such files under their hash; what is
//! missing it fetches from other machines of the cluster ([`Holders`]) or from the model's [sources](source), in order,
//! and lets nothing in that has another hash. The folder is bounded: files that nobody uses go, the longest unused first.

mod cache;
mod catalog;
mod chunks;
mod client;
mod copy;
mod fetch;
mod find;
mod hash;
mod holders;
mod hub;
mod lookup;
mod part;
mod pypi;
mod registered;
mod requantize;
mod source;
mod store;
#[cfg(test)]
mod test_server;
mod typed;
mod verify;
mod wheel;

pub use cache::{FileInUse, StoredFile};
pub use catalog::{CatalogModel, FirstModel, SourceSpec, default_model};
pub use client::ClientError;
pub(crate) use client::{in_words, is_loopback};
pub use find::{FindError, FoundModel, find_model};
pub use hash::{LocalFileError, LocalModel, model_name};
pub use holders::{Holder, Holders, Origin};
pub use pypi::PipProgram;
pub(crate) use registered::choice_of;
pub use source::{SourceError, SourceSettings};
pub use store::{FetchError, ModelStore, StoreError, default_dir};
pub use typed::parse_source;
pub use verify::{Verdict, VerifiedFile, VerifyError};

/// Model files in other formats, and how good they are: the engine's own, for those above.
pub use ingle_engine::{
    Encoder, InstructionSet, ModelOptions, ModelSummary, PackedCache, bench, inspect, perplexity, quantize,
};
