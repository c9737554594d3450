//! Logarithmic probabilities as OpenAI writes them.

use ingle_actors::protocol::wire::v2::{Logprob, Logprobs};
use serde::Serialize;

/// `logprobs` of a choice, whole or of one chunk.
#[derive(Debug, Serialize)]
pub struct LogprobsBody {
    content: Vec<TokenBody>,
    refusal: Option<()>,
}

#[derive(Debug, Serialize)]
struct TokenBody {
    #[serde(flatten)]
    own: LogprobBody,
    top_logprobs: Vec<LogprobBody>,
}

#[derive(Debug, Serialize)]
struct LogprobBody {
    /// The token's own text; a part of a character is U+FFFD, `bytes` has it exactly.
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

impl LogprobsBody {
    /// Of these tokens, in their order.
    pub fn new(tokens: &[Logprobs]) -> Self {
        let body = |logprob: &Logprob| LogprobBody {
            token: String::from_utf8_lossy(&logprob.bytes).into_owned(),
            logprob: logprob.logprob,
            bytes: logprob.bytes.clone(),
        };
        let token = |token: &Logprobs| TokenBody {
            own: body(&token.chosen),
            top_logprobs: token.top.iter().map(body).collect(),
        };
        Self { content: tokens.iter().map(token).collect(), refusal: None }
    }
}
