//! The OpenAI dialect.

pub mod chat_completions;
mod embedding_request;
pub mod embeddings;
mod error;
mod extra;
mod fields;
mod json;
mod logprobs;
pub mod models;
mod request;
mod sampling;
mod stream;
mod tools;

pub use error::{ApiError, ok};
