//! Between conversations and token ids: chat template, tokenizer, and text out of generated tokens.

use ingle_protocol::wire::v1::Message;

mod chat_template;
mod detokenizer;
mod tokenizer;

pub use chat_template::ChatTemplate;
pub use detokenizer::{Detokenizer, Piece};
pub use tokenizer::{Special, Tokenizer};

/// A conversation that cannot become a prompt; the client's fault.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct PromptError(pub String);

/// What an engine needs to know about text. Only engines tokenize: gateways have no tokenizer.
pub trait Codec: Send + Sync {
    /// The conversation as the model was trained to see it, ready for its answer.
    fn prompt(&self, messages: &[Message]) -> Result<Vec<u32>, PromptError>;

    /// What a generated token adds to the text: bytes, possibly a part of a character, possibly none.
    fn bytes(&self, id: u32) -> &[u8];

    /// The model has finished when it generates this.
    fn is_end(&self, id: u32) -> bool;

    /// Ids are below this.
    fn vocabulary(&self) -> u32;

    /// Bytes of the longest token: a text of more than this times the context length cannot fit.
    fn longest(&self) -> usize;
}
