//! Frames of protocol version 1, never to be edited. Golden bytes of each stand in `protocol/golden/v1.txt`. What is
//! the same in version 2 stands there; the way between the two is in `neighbours.rs`.

use serde::{Deserialize, Serialize};

use super::v2::{KIB, MIB};
use crate::{EngineId, ModelDigest, RequestId};

pub use super::v2::{
    AuthorityKey, AuthorityKeyRequest, AuthorityRefused, ControlProbe, Failed, FinishReason, Goodbye, Hello,
    JoinGranted, JoinRefused, JoinRequest, Logprobs, Message, ModelState, NodeFacts, NotWelcome, Priority, Progress,
    Refused, RenewalRequest, Renewed, Sampling, TraceContext, Usage, Welcome,
};

frames! {
    /// The most bytes that a frame of this kind may have; `None` for kinds that version 1 does not know.
    0x10 Request at_most 16 * MIB;
    0x11 Accepted at_most 4 * KIB;
    0x14 Token at_most 64 * KIB;
    0x15 Finished at_most 4 * KIB;
    0x20 Pulse at_most 64 * KIB;
    0x40 EngineReport at_most 64 * KIB;
    unchanged
        Hello Welcome NotWelcome Goodbye NodeFacts Refused Progress Failed JoinRequest JoinGranted JoinRefused
        AuthorityKeyRequest AuthorityKey RenewalRequest Renewed AuthorityRefused ControlProbe;
}

/// One inference request, as it goes from the node where it entered to the engine that answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// Stays the same through all attempts.
    pub request_id: RequestId,
    /// 0 for the first try.
    pub attempt: u32,
    /// The trace that it belongs to.
    pub trace: TraceContext,
    /// On whose behalf (`local` for whoever reaches the loopback address or the control socket).
    pub principal: String,
    /// Its place among others.
    pub priority: Priority,
    /// How long an answer is still worth something, in milliseconds.
    pub remaining_ms: u64,
    /// The model's name, for messages.
    pub model: String,
    /// The model's content: a worker with another content refuses.
    pub digest: ModelDigest,
    /// The conversation.
    pub messages: Vec<Message>,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Tokens that were generated and delivered before: the answer goes on behind them.
    pub resume: Vec<u32>,
    /// Members of the request's JSON that have no field here, as a JSON object; empty for none.
    pub extra: Vec<u8>,
}

/// The engine takes the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accepted {
    /// Tokens of the rendered prompt.
    pub prompt_tokens: u32,
    /// How many of them need no computing.
    pub cached_tokens: u32,
    /// The model's context length in tokens.
    pub context_length: u32,
}

/// One generated token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Token {
    /// Its place in the answer; the first is 0. A resumed answer goes on counting.
    pub position: u32,
    /// The token.
    pub id: u32,
    /// The text that it releases.
    pub text: Vec<u8>,
    /// Where the request asks for them.
    pub logprobs: Option<Logprobs>,
}

/// The last frame of an answer that went well.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finished {
    /// Why it ended.
    pub reason: FinishReason,
    /// What it cost.
    pub usage: Usage,
}

/// How one engine is, in a pulse.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct EnginePulse {
    /// Which engine.
    pub engine: EngineId,
    /// Counts its steps (chunks of prompts count); stands still when it is idle or stuck.
    pub step: u64,
    /// Sequences that it decodes.
    pub running: u32,
    /// Sequences that wait.
    pub waiting: u32,
    /// Tokens generated in the last second.
    pub tokens_per_second: f32,
    /// Tokens of prompt a second while it reads one; 0 until measured.
    pub prefill_rate: f32,
    /// Tokens a second of one sequence; 0 until measured.
    pub decode_rate: f32,
}

/// Sent every 100 ms to every peer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Pulse {
    /// Counts the pulses of this connection.
    pub sequence: u64,
    /// All engines of the sender.
    pub engines: Vec<EnginePulse>,
}

/// What an engine process says of itself over its control pipe. It never crosses between nodes, so nothing converts
/// it: an engine process is of its node's build.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EngineReport {
    /// Where the model stands.
    pub state: ModelState,
    /// What it runs on, in words.
    pub backend: String,
    /// Answers of engines with the same class are equal bit for bit.
    pub numerics: String,
    /// Context length in tokens.
    pub context_length: u32,
    /// Sequences that it decodes together.
    pub slots: u32,
    /// Request fields beyond the common ones that it honours.
    pub features: Vec<String>,
    /// Counters (the engine id in them is the one that the node gave).
    pub pulse: EnginePulse,
}
