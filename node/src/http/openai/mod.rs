//! The OpenAI dialect.

pub mod chat_completions;
mod error;
mod fields;
mod json;
pub mod models;
mod request;
mod stream;

pub use error::{ApiError, ok};
