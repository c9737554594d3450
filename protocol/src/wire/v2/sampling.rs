//! How tokens are chosen, and how likely they were.

use serde::{Deserialize, Serialize};

/// The most tokens that a request may bias.
pub const LOGIT_BIAS_LIMIT: usize = 1024;
/// The most tokens that a request may name as ends of its answer.
pub const STOP_TOKENS_LIMIT: usize = 64;
/// The most alternatives that come with a token.
pub const TOP_LOGPROBS_LIMIT: u8 = 20;
/// The most bytes of a token's text beside its logarithmic probability (longer ones are cut), so that a `Token` with
/// all its alternatives stays well below its limit.
pub const LOGPROB_BYTES_LIMIT: usize = 1024;

/// How the next token is chosen. The seed is always chosen where the request enters, so that a repeated attempt
/// draws the same numbers. The default is greedy and changes nothing else; the order of the steps stands in the
/// engine's sampler and in `docs/http.md`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// 0 is greedy; at most 2.
    pub temperature: f32,
    /// Only so many of the likeliest tokens; 0 is off.
    pub top_k: u32,
    /// Smallest set of tokens whose probabilities reach this sum; 1 is off.
    pub top_p: f32,
    /// Only tokens that are at least this many times as likely as the likeliest; 0 is off, at most 1.
    pub min_p: f32,
    /// Makes tokens of the window less likely (above 1) or likelier (below 1); 1 is off.
    pub repetition_penalty: f32,
    /// How many of the last tokens, prompt and answer together, `repetition_penalty` looks at; `u32::MAX` is all of
    /// them.
    pub repetition_window: u32,
    /// Taken once from the logit of each token that stands in the answer; −2 to 2, 0 is off.
    pub presence_penalty: f32,
    /// Taken from a token's logit as many times as it stands in the answer; −2 to 2, 0 is off.
    pub frequency_penalty: f32,
    /// Added to logits; at most [`LOGIT_BIAS_LIMIT`].
    pub logit_bias: Vec<LogitBias>,
    /// Randomness is a function of (seed, position) alone.
    pub seed: u64,
    /// The most tokens to generate; `None`: up to the context's end.
    pub max_tokens: Option<u32>,
    /// Neither the model nor a stop token ends the answer before it has so many tokens; 0 is off.
    pub min_tokens: u32,
    /// Texts that end the answer and are not part of it.
    pub stop: Vec<String>,
    /// Tokens that end the answer and whose text is not part of it; at most [`STOP_TOKENS_LIMIT`].
    pub stop_token_ids: Vec<u32>,
    /// The model cannot end the answer by itself.
    pub ignore_eos: bool,
    /// Say each token's logarithmic probability, with so many of the likeliest tokens beside it (at most
    /// [`TOP_LOGPROBS_LIMIT`]); `None`: say nothing.
    pub logprobs: Option<u8>,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            repetition_window: u32::MAX,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            max_tokens: None,
            min_tokens: 0,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            logprobs: None,
        }
    }
}

/// What is added to a token's logit.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LogitBias {
    /// The token.
    pub token: u32,
    /// −100 to 100.
    pub bias: f32,
}

/// How likely a generated token was, as the model itself has it: before biases, penalties, masks and temperature.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Logprobs {
    /// The generated token.
    pub chosen: Logprob,
    /// The likeliest tokens in its place, the likeliest first; as many as the request asks for.
    pub top: Vec<Logprob>,
}

/// A token and how likely it was.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Logprob {
    /// The token.
    pub id: u32,
    /// Natural logarithm of its probability; always finite, −9999 stands for "impossible".
    pub logprob: f32,
    /// Its own text, possibly a part of a character; at most [`LOGPROB_BYTES_LIMIT`] bytes.
    pub bytes: Vec<u8>,
}
