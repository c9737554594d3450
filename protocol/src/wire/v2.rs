//! Frames of protocol version 2. Golden bytes of each stand in `protocol/golden/v2.txt`. What differs from version 1
//! stands in `v1.rs`, the way between them in `neighbours.rs`.
//!
//! Times on the wire are remaining milliseconds, never clock times, except where machines compare their clocks.
//! JSON travels as bytes: nothing here may use `serde_json::Value`, `flatten`, `untagged` or
//! `skip_serializing_if`, which bincode cannot carry.

use serde::{Deserialize, Serialize};

use crate::{ClusterId, EngineId, ModelDigest, NodeId, RequestId};

mod embedding;
mod files;
mod parameters;
mod sampling;
/// An entry of the registry of models: sent to every peer when it changes, and all of them to a new peer.
pub use crate::registry::Entry as RegistryEntry;
pub use embedding::*;
pub use files::*;
pub use parameters::*;
pub use sampling::*;

pub(super) const KIB: u32 = 1 << 10;
pub(super) const MIB: u32 = 1 << 20;

/// What the decoder may claim for one body; a little over the longest body, for the headers of its containers.
pub const DECODE_LIMIT: usize = 20 << 20;
/// The most bytes of an unknown, skippable frame.
pub const SKIPPED_LIMIT: u32 = 64 * KIB;
/// The most bytes of the `extra` of a request, a token or an end.
pub const EXTRA_LIMIT: usize = 256 << 10;

frames! {
    /// The most bytes that a frame of this kind may have; `None` for kinds that version 2 does not know.
    0x01 Hello at_most 256 * KIB;
    0x02 Welcome at_most 256 * KIB;
    0x03 NotWelcome at_most 4 * KIB;
    0x04 Goodbye at_most 4 * KIB;
    0x05 NodeFacts at_most 256 * KIB;
    0x06 RegistryEntry at_most 256 * KIB;
    0x07 HeldFiles at_most 16 * KIB;
    0x08 Capability at_most KIB;
    0x10 Request at_most 16 * MIB;
    0x11 Accepted at_most 4 * KIB;
    0x12 Refused at_most 16 * KIB;
    0x13 Progress at_most KIB;
    0x14 Token at_most 320 * KIB;
    0x15 Finished at_most 320 * KIB;
    0x16 Failed at_most 16 * KIB;
    0x17 Embedding at_most 192 * KIB;
    0x20 Pulse at_most 64 * KIB;
    0x30 JoinRequest at_most 16 * KIB;
    0x31 JoinGranted at_most 256 * KIB;
    0x32 JoinRefused at_most 4 * KIB;
    0x38 AuthorityKeyRequest at_most KIB;
    0x39 AuthorityKey at_most 4 * KIB;
    0x3a RenewalRequest at_most 16 * KIB;
    0x3b Renewed at_most 16 * KIB;
    0x3c AuthorityRefused at_most 4 * KIB;
    0x40 EngineReport at_most 64 * KIB;
    0x41 SetParameters at_most KIB;
    0x42 ParametersSet at_most 4 * KIB;
    0x50 ControlProbe at_most KIB;
    0x51 DrainRequest at_most KIB;
    0x52 DrainReply at_most 4 * KIB;
    0x60 ChunkListRequest at_most KIB;
    0x61 ListProgress at_most KIB;
    0x62 ChunkList at_most 4 * MIB;
    0x63 ChunkRequest at_most KIB;
    0x64 ChunkFollows at_most KIB;
    0x65 FileRefused at_most 4 * KIB;
}

// ---------------------------------------------------------------------------------------------------------------
// A request and its answer

/// Where a request stands in a distributed trace (W3C trace context).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceContext {
    /// The trace, the same in every process that the request crosses.
    pub trace_id: [u8; 16],
    /// The span of the sender.
    pub parent_span: [u8; 8],
    /// Bit 0: sampled.
    pub flags: u8,
}

/// Who speaks in a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions of the application.
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
    /// The result of a tool call.
    Tool,
}

impl Role {
    /// The name that chat templates use.
    pub fn as_str(self) -> &'static str {
        match self {
            Role::System => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
            Role::Tool => "tool",
        }
    }
}

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said.
    pub content: String,
    /// Members of the message's JSON that have no field here, as a JSON object; empty for none.
    pub extra: Vec<u8>,
}

/// Whose turn comes first when not all can be served.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Priority {
    /// Nobody waits for it.
    Background,
    /// The usual.
    #[default]
    Normal,
    /// A person waits.
    Interactive,
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
    /// What is to become numbers: then neither messages nor sampling say anything, and the answer is [`Embedding`]s.
    /// `None` for a conversation.
    pub embed: Option<Embed>,
    /// Tokens that were generated and delivered before: the answer goes on behind them.
    pub resume: Vec<u32>,
    /// The text that was delivered before, for workers whose tokens have no ids.
    pub resume_text: Vec<u8>,
    /// Members of the request's JSON that have no field here, as a JSON object; empty for none.
    /// At most [`EXTRA_LIMIT`] bytes.
    pub extra: Vec<u8>,
}

/// How much work an engine has; rides on every answer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Load {
    /// Sequences that it decodes.
    pub running: u32,
    /// Sequences that wait.
    pub waiting: u32,
    /// Tokens of prompts that it has taken and not read yet.
    pub backlog_tokens: u32,
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
    /// The engine's work, this request included.
    pub load: Load,
}

/// Why a worker does not take a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusalKind {
    /// All places are taken: try again, or elsewhere.
    Busy,
    /// The model is not ready yet.
    Loading,
    /// The worker goes away.
    Draining,
    /// The worker does not have this model.
    UnknownModel,
    /// The prompt does not fit into the context.
    ContextExceeded,
    /// A field that this engine does not honour.
    UnsupportedField,
    /// A field with an impossible value.
    InvalidField,
    /// The time was up before the work began.
    DeadlineExceeded,
}

impl RefusalKind {
    /// Another worker may well take the request.
    pub fn is_retryable(self) -> bool {
        matches!(self, Self::Busy | Self::Loading | Self::Draining | Self::UnknownModel)
    }
}

/// The worker does not take the request; nothing was computed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// The kind of reason.
    pub kind: RefusalKind,
    /// The reason in words, for the client.
    pub message: String,
    /// Which field of the request is at fault.
    pub param: Option<String>,
    /// When it is worth trying again, in milliseconds.
    pub retry_after_ms: Option<u64>,
}

/// Sent at least every 250 ms until the first token, so that silence means trouble.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Progress {
    /// Waiting for a place.
    Queued {
        /// Requests ahead of it.
        ahead: u32,
    },
    /// The prompt is being read.
    Prefilled {
        /// Tokens done.
        done: u32,
        /// Tokens in all.
        total: u32,
    },
}

/// One generated token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Token {
    /// Its place in the answer; the first is 0. A resumed answer goes on counting.
    pub position: u32,
    /// The token; [`NO_TOKEN_ID`] where its worker does not know.
    pub id: u32,
    /// The text that it releases: whole UTF-8 characters, possibly none (held back for a character or a stop
    /// text that may be coming), possibly more than its own.
    pub text: Vec<u8>,
    /// Where the request asks for them; `None` also for a token that ended the answer and has no text in it.
    pub logprobs: Option<Logprobs>,
    /// What else an endpoint said with it and no field here has: [`Finished::extra`] says how. Empty for nothing.
    pub extra: Vec<u8>,
}

/// The id of a token whose worker knows no ids (an endpoint passes texts on). Such an answer cannot be resumed by
/// its ids.
pub const NO_TOKEN_ID: u32 = u32::MAX;

/// Why an answer is at its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model ended it, or a stop text came.
    Stop,
    /// `max_tokens` or the context's end.
    Length,
}

/// What an answer cost, in tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// How many of them needed no computing.
    pub cached_tokens: u32,
    /// Tokens generated, those of an attempt that was resumed included.
    pub completion_tokens: u32,
}

/// The last frame of an answer that went well.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finished {
    /// Why it ended; where `extra` knows it better, the nearest that there is.
    pub reason: FinishReason,
    /// What it cost.
    pub usage: Usage,
    /// The engine's work that is left.
    pub load: Load,
    /// What else an endpoint said and no field here has: a JSON object with the objects `delta`, `choice`, `usage` and
    /// `chunk`, each where it has members. They stand beside the members that the dialect writes there anyway, or
    /// instead of those of the same name. `chunk` holds for this frame and all behind it, until another frame of the
    /// answer says it anew. Empty for nothing; at most [`EXTRA_LIMIT`] bytes.
    pub extra: Vec<u8>,
}

/// What went wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// The engine process died.
    EngineDied,
    /// The engine reported an error of its own.
    EngineError,
    /// The connection to the worker broke.
    ConnectionLost,
    /// The worker went silent.
    WorkerSilent,
    /// The time was up.
    DeadlineExceeded,
    /// The client read too slowly for too long.
    ReaderTooSlow,
    /// The worker shut down before the answer was complete.
    ShuttingDown,
    /// The peer sent what the protocol does not allow.
    Protocol,
}

impl FailureKind {
    /// The name in error objects and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::EngineDied => "engine_died",
            Self::EngineError => "engine_error",
            Self::ConnectionLost => "connection_lost",
            Self::WorkerSilent => "worker_silent",
            Self::DeadlineExceeded => "deadline_exceeded",
            Self::ReaderTooSlow => "reader_too_slow",
            Self::ShuttingDown => "shutting_down",
            Self::Protocol => "protocol_error",
        }
    }
}

/// The last frame of an answer that broke.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failed {
    /// The kind of trouble.
    pub kind: FailureKind,
    /// The trouble in words, for the client.
    pub message: String,
    /// The whole request may be tried again (no token was delivered).
    pub retryable: bool,
    /// The answer may go on elsewhere from the tokens delivered so far.
    pub migratable: bool,
}

// ---------------------------------------------------------------------------------------------------------------
// Membership

/// Where a model of a node stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ModelState {
    /// Known by name, not on this machine.
    Absent,
    /// On its way.
    Fetching {
        /// Bytes here.
        done: u64,
        /// Bytes in all; 0 where the source does not say.
        total: u64,
    },
    /// Its hash is being checked.
    Verifying,
    /// Its weights are being read.
    Loading,
    /// It computes something before it answers anybody.
    Warming,
    /// It answers.
    Ready,
    /// It finishes what it has and takes nothing new.
    Draining,
    /// Gone on purpose.
    Unloaded,
    /// Gone against our will.
    Failed {
        /// What happened, and what to do.
        why: String,
    },
}

impl ModelState {
    /// The state in a few words, for tables.
    pub fn words(&self) -> String {
        match self {
            Self::Absent => "absent".into(),
            Self::Fetching { done, total: 0 } => format!("fetching {} MB", done / 1_000_000),
            Self::Fetching { done, total } => format!("fetching {} %", done.saturating_mul(100) / total),
            Self::Verifying => "verifying".into(),
            Self::Loading => "loading".into(),
            Self::Warming => "warming".into(),
            Self::Ready => "ready".into(),
            Self::Draining => "draining".into(),
            Self::Unloaded => "unloaded".into(),
            Self::Failed { why } => format!("failed ({why})"),
        }
    }
}

/// What the numerics class of an endpoint's model begins with: nobody here knows what computes there.
pub const ENDPOINT_NUMERICS: &str = "endpoint-";

/// The feature of a worker that goes on with an answer of which it is told the text and not the tokens.
pub const RESUMES_TEXT: &str = "resume_text";

impl ModelFacts {
    /// A server elsewhere answers for it.
    pub fn is_endpoint(&self) -> bool {
        self.numerics.starts_with(ENDPOINT_NUMERICS)
    }
}

/// A model on a node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelFacts {
    /// The name that requests use.
    pub name: String,
    /// Its content; `None` until it is known.
    pub digest: Option<ModelDigest>,
    /// Where it stands.
    pub state: ModelState,
    /// The engine that runs it, while one does.
    pub engine: Option<EngineId>,
    /// What it runs on, in words: `cpu (burn flex, f32)`.
    pub backend: String,
    /// Answers of engines with the same class are equal bit for bit.
    pub numerics: String,
    /// Context length in tokens; 0 until it is known.
    pub context_length: u32,
    /// Sequences that it decodes together.
    pub slots: u32,
    /// Request fields beyond the common ones that it honours.
    pub features: Vec<String>,
    /// It answers requests that name no model.
    pub is_default: bool,
}

/// What a machine has.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hardware {
    /// `x86_64-linux` and the like.
    pub platform: String,
    /// Cores that the process may use.
    pub cores: u32,
    /// Bytes of main memory; 0 where unknown.
    pub memory: u64,
    /// Graphics adapters that could compute.
    pub accelerators: Vec<String>,
}

/// What a node could do with one more model, said by itself: when it connects, and when that has changed much. Who
/// places models judges by it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capability {
    /// Bytes a second that it reads from memory with all its cores, as measured; 0 until then.
    pub memory_bandwidth: u64,
    /// Bytes of memory that models could have, those that may go for others included; `u64::MAX` where it does not know.
    pub room: u64,
    /// Its models compute on a graphics card.
    pub on_card: bool,
    /// It takes models that nobody has pinned to it.
    pub takes_models: bool,
}

/// How to reach a member.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberHint {
    /// Its id.
    pub node: NodeId,
    /// Its name.
    pub name: String,
    /// `ip:port` of its QUIC socket, the most promising first.
    pub addresses: Vec<String>,
}

/// The slow facts of one node, said by itself alone. A higher (incarnation, version) replaces a lower one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodeFacts {
    /// Who and where.
    pub member: MemberHint,
    /// Milliseconds since 1970 at the node's start: tells a restarted node from its former self.
    pub incarnation: u64,
    /// Counts the changes since then.
    pub version: u64,
    /// Version of the program.
    pub software: String,
    /// Where its HTTP answers, for people.
    pub http: String,
    /// Its machine.
    pub hardware: Hardware,
    /// Its models.
    pub models: Vec<ModelFacts>,
    /// Members that it knows.
    pub members: Vec<MemberHint>,
}

/// The first frame of a connection, by the side that opened it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Hello {
    /// The cluster that the sender belongs to.
    pub cluster: ClusterId,
    /// The sender.
    pub facts: NodeFacts,
}

/// The answer to a hello.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Welcome {
    /// The sender.
    pub facts: NodeFacts,
    /// The address that the greeted node was seen under.
    pub observed: String,
}

/// The other answer to a hello; the connection ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotWelcome {
    /// Why, and what to do.
    pub why: String,
    /// Nothing is wrong: the two nodes are connected already.
    pub duplicate: bool,
}

/// The sender goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Goodbye {
    /// Why.
    pub why: String,
}

/// How one engine is, in a pulse.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct EnginePulse {
    /// Which engine.
    pub engine: EngineId,
    /// Counts its steps (chunks of prompts count); stands still when it is idle or stuck.
    pub step: u64,
    /// It is in a step, or should be.
    pub busy: bool,
    /// How long a step like the one that it is in usually takes, in milliseconds; 0 where not known.
    pub usual_step_ms: u32,
    /// How long ago its process said something, in milliseconds.
    pub silent_ms: u32,
    /// Its work.
    pub load: Load,
    /// Tokens generated in the last second.
    pub tokens_per_second: f32,
    /// Tokens of prompt a second while it reads one; 0 until measured.
    pub prefill_rate: f32,
    /// Tokens a second of a sequence that is alone; 0 until measured.
    pub decode_rate: f32,
    /// Tokens a second of each sequence when all slots are taken; 0 where not measured.
    pub full_decode_rate: f32,
}

/// Sent every 100 ms to every peer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Pulse {
    /// Counts the pulses of this connection.
    pub sequence: u64,
    /// All engines of the sender.
    pub engines: Vec<EnginePulse>,
}

// ---------------------------------------------------------------------------------------------------------------
// Joining

/// A machine that has a token asks for a certificate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinRequest {
    /// Which token.
    pub token_id: [u8; 8],
    /// HMAC-SHA256 under the token's secret over the TLS exporter, `csr`, `name` and `guest`.
    pub proof: [u8; 32],
    /// Certificate signing request, DER.
    pub csr: Vec<u8>,
    /// The name that the machine would like.
    pub name: String,
    /// It does not want the authority's key.
    pub guest: bool,
    /// Its clock: milliseconds since 1970.
    pub clock_ms: u64,
}

/// The machine is a member now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinGranted {
    /// The id that the signer chose.
    pub node: NodeId,
    /// The new node's certificate, DER.
    pub certificate: Vec<u8>,
    /// The authority's certificate, DER; its hash is in the token.
    pub authority: Vec<u8>,
    /// Members to connect to.
    pub members: Vec<MemberHint>,
}

/// Why a machine does not get in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum JoinRefusalKind {
    /// The token is unknown, or its proof is wrong (which of the two is not said).
    Token,
    /// The token's time is over.
    Expired,
    /// The token was used before.
    Used,
    /// A member has this name.
    NameTaken,
    /// The two clocks are too far apart.
    Clock,
    /// The request itself is malformed.
    Malformed,
    /// The node cannot sign.
    NoAuthority,
}

/// The machine does not get in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinRefused {
    /// The kind of reason.
    pub kind: JoinRefusalKind,
    /// The reason in words.
    pub message: String,
}

/// A full member asks for the authority's private key, over mutual TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuthorityKeyRequest {}

/// The authority's private key, PKCS#8 DER.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuthorityKey {
    /// The key.
    pub pkcs8: Vec<u8>,
}

impl std::fmt::Debug for AuthorityKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AuthorityKey(secret)")
    }
}

/// A guest, who cannot sign for itself, asks for a fresh certificate for the id that it has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RenewalRequest {
    /// Certificate signing request, DER.
    pub csr: Vec<u8>,
}

/// The fresh certificate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Renewed {
    /// DER.
    pub certificate: Vec<u8>,
}

/// Neither key nor certificate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuthorityRefused {
    /// Why.
    pub why: String,
}

// ---------------------------------------------------------------------------------------------------------------
// Between a node and its engine processes, and between control actors

/// What an engine process says of itself over its control pipe: at every change of state and every 100 ms.
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
    /// Bytes of memory that were missing, where `state` is a failure for lack of it; else 0.
    pub missing_memory: u64,
}

/// Carried by the control actors and sent back, to see that the control plane itself is alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControlProbe {
    /// Any number.
    pub nonce: u64,
}

/// Asks a node to take nothing new and to let its answers finish or move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainRequest {
    /// How long answers may take to finish here before they move, in milliseconds.
    pub limit_ms: u64,
    /// Take work again instead.
    pub undo: bool,
}

/// The answer to a [`DrainRequest`], given when nothing runs any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainReply {
    /// Answers that were running when the drain began.
    pub running: u32,
    /// How many of them had to move.
    pub moved: u32,
}
