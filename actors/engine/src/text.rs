//! Between conversations and token ids: chat template, tokenizer, and text out of generated tokens.

use ingle_protocol::wire::v2::Message;

mod chat_template;
mod conversation;
mod detokenizer;
mod tokenizer;
mod tool_calls;

pub use chat_template::ChatTemplate;
pub use conversation::Conversation;
pub use detokenizer::{Detokenizer, Piece};
pub use tokenizer::{Special, Tokenizer};
pub use tool_calls::{AnswerPart, ToolCall, ToolCallParser, ToolFormat, ToolSupport};

/// A conversation that cannot become a prompt; the client's fault.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct PromptError(pub String);

/// What an engine needs to know about text. Only engines tokenize: gateways have no tokenizer.
pub trait Codec: Send + Sync {
    /// The conversation as the model was trained to see it, ready for its answer. `extra` are the request's further
    /// members as the wire has them: a JSON object, or empty. The model learns of the `tools` among them.
    fn prompt(&self, messages: &[Message], extra: &[u8]) -> Result<Vec<u32>, PromptError>;

    /// Whether the model can be told of tools, and how it calls them.
    fn tools(&self) -> ToolSupport {
        ToolSupport::None
    }

    /// A text that stands alone, as the model was trained to see one: for embeddings, and to be continued by a
    /// model that does not chat.
    fn passage(&self, _text: &str) -> Result<Vec<u32>, PromptError> {
        Err(PromptError("this engine takes conversations only".into()))
    }

    /// The beginning of an answer of which only the text is known, as tokens.
    fn continuation(&self, _text: &str) -> Result<Vec<u32>, PromptError> {
        Err(PromptError("this engine goes on from tokens only".into()))
    }

    /// What a generated token adds to the text: bytes, possibly a part of a character, possibly none.
    fn bytes(&self, id: u32) -> &[u8];

    /// The first token of an answer has a space in front that is not part of the text.
    fn leading_space(&self) -> bool {
        false
    }

    /// The model has finished when it generates this.
    fn is_end(&self, id: u32) -> bool;

    /// Ids are below this.
    fn vocabulary(&self) -> u32;

    /// Bytes of the longest token: a text of more than this times the context length cannot fit.
    fn longest(&self) -> usize;
}
