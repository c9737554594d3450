//! The way between neighbouring versions. What an older version has no field for does not go there, and comes from
//! there as "not known"; each conversion says what that is.

use super::{Body, Frame, Version, WireError, encode, v1, v2};

/// The body of a frame that crosses between nodes, which may be of different versions. Frames between a node and its
/// own engine processes are only [`Body`].
pub trait Versioned: Body {
    /// As a frame for a peer that speaks `version`. Fails where that version has no such frame, or where it is longer
    /// than it may be there.
    fn encode_for(&self, version: Version) -> Result<Frame, WireError> {
        known::<Self>(version)?;
        encode(self)
    }

    /// From a frame of a peer that speaks `version`.
    fn decode_for(frame: &Frame, version: Version) -> Result<Self, WireError> {
        known::<Self>(version)?;
        frame.decode()
    }
}

fn known<T: Body>(version: Version) -> Result<(), WireError> {
    match version.limit_of(T::KIND) {
        Some(_) => Ok(()),
        None => Err(WireError::NotInVersion { frame: T::NAME, version }),
    }
}

/// Frames that are the same in every version that has them.
macro_rules! same_in_all {
    ($($name:ident)*) => {
        $(impl Versioned for v2::$name {})*
    };
}

same_in_all! {
    Hello Welcome NotWelcome Goodbye NodeFacts Refused Progress Failed JoinRequest JoinGranted JoinRefused
    AuthorityKeyRequest AuthorityKey RenewalRequest Renewed AuthorityRefused ControlProbe DrainRequest DrainReply
    Embedding RegistryEntry HeldFiles Capability ChunkListRequest ListProgress ChunkList ChunkRequest ChunkFollows FileRefused
}

/// Frames that version 1 has in another form.
macro_rules! other_in_v1 {
    ($($name:ident)*) => {
        $(impl Versioned for v2::$name {
            fn encode_for(&self, version: Version) -> Result<Frame, WireError> {
                match version {
                    Version::V1 => encode(&v1::$name::from(self)),
                    Version::V2 => encode(self),
                }
            }

            fn decode_for(frame: &Frame, version: Version) -> Result<Self, WireError> {
                match version {
                    Version::V1 => frame.decode::<v1::$name>().map(Self::from),
                    Version::V2 => frame.decode(),
                }
            }
        })*
    };
}

other_in_v1! { Accepted Token Finished Pulse }

/// Version 1 has conversations only: what is to be embedded never goes there.
impl Versioned for v2::Request {
    fn encode_for(&self, version: Version) -> Result<Frame, WireError> {
        match version {
            Version::V1 if self.embed.is_some() => {
                Err(WireError::NotInVersion { frame: "Request for embeddings", version })
            }
            Version::V1 => encode(&v1::Request::from(self)),
            Version::V2 => encode(self),
        }
    }

    fn decode_for(frame: &Frame, version: Version) -> Result<Self, WireError> {
        match version {
            Version::V1 => frame.decode::<v1::Request>().map(Self::from),
            Version::V2 => frame.decode(),
        }
    }
}

/// Without `resume_text`, which those need who go on by the text: an old node has none such. `resume` goes
/// along, so that a worker that can do nothing with it refuses and does not begin anew.
impl From<&v2::Request> for v1::Request {
    fn from(new: &v2::Request) -> Self {
        Self {
            request_id: new.request_id,
            attempt: new.attempt,
            trace: new.trace,
            principal: new.principal.clone(),
            priority: new.priority,
            remaining_ms: new.remaining_ms,
            model: new.model.clone(),
            digest: new.digest,
            messages: new.messages.clone(),
            sampling: new.sampling.clone(),
            resume: new.resume.clone(),
            extra: new.extra.clone(),
        }
    }
}

impl From<v1::Request> for v2::Request {
    fn from(old: v1::Request) -> Self {
        Self {
            request_id: old.request_id,
            attempt: old.attempt,
            trace: old.trace,
            principal: old.principal,
            priority: old.priority,
            remaining_ms: old.remaining_ms,
            model: old.model,
            digest: old.digest,
            messages: old.messages,
            sampling: old.sampling,
            embed: None,
            resume: old.resume,
            resume_text: Vec::new(),
            extra: old.extra,
        }
    }
}

/// Without the engine's load: an old node reads it off the pulse.
impl From<&v2::Accepted> for v1::Accepted {
    fn from(new: &v2::Accepted) -> Self {
        let v2::Accepted { prompt_tokens, cached_tokens, context_length, load: _ } = *new;
        Self { prompt_tokens, cached_tokens, context_length }
    }
}

impl From<v1::Accepted> for v2::Accepted {
    fn from(old: v1::Accepted) -> Self {
        let v1::Accepted { prompt_tokens, cached_tokens, context_length } = old;
        Self { prompt_tokens, cached_tokens, context_length, load: v2::Load::default() }
    }
}

/// Without what an endpoint said beside the text: an old node has nowhere to put it.
impl From<&v2::Token> for v1::Token {
    fn from(new: &v2::Token) -> Self {
        Self { position: new.position, id: new.id, text: new.text.clone(), logprobs: new.logprobs.clone() }
    }
}

impl From<v1::Token> for v2::Token {
    fn from(old: v1::Token) -> Self {
        let v1::Token { position, id, text, logprobs } = old;
        Self { position, id, text, logprobs, extra: Vec::new() }
    }
}

/// Without the engine's load, and without what an endpoint said beside the text.
impl From<&v2::Finished> for v1::Finished {
    fn from(new: &v2::Finished) -> Self {
        Self { reason: new.reason, usage: new.usage }
    }
}

impl From<v1::Finished> for v2::Finished {
    fn from(old: v1::Finished) -> Self {
        Self { reason: old.reason, usage: old.usage, load: v2::Load::default(), extra: Vec::new() }
    }
}

/// Without what tells that an engine hangs, and without the speeds that version 1 has no field for.
impl From<&v2::EnginePulse> for v1::EnginePulse {
    fn from(new: &v2::EnginePulse) -> Self {
        Self {
            engine: new.engine,
            step: new.step,
            running: new.load.running,
            waiting: new.load.waiting,
            tokens_per_second: new.tokens_per_second,
            prefill_rate: new.prefill_rate,
            decode_rate: new.decode_rate,
        }
    }
}

/// An old node does not say whether its engine is in a step: it is never busy, and so never under suspicion for a
/// step that takes too long. That its node is silent or gone is noticed all the same.
impl From<v1::EnginePulse> for v2::EnginePulse {
    fn from(old: v1::EnginePulse) -> Self {
        Self {
            engine: old.engine,
            step: old.step,
            busy: false,
            usual_step_ms: 0,
            silent_ms: 0,
            load: v2::Load { running: old.running, waiting: old.waiting, backlog_tokens: 0 },
            tokens_per_second: old.tokens_per_second,
            prefill_rate: old.prefill_rate,
            decode_rate: old.decode_rate,
            full_decode_rate: 0.0,
        }
    }
}

impl From<&v2::Pulse> for v1::Pulse {
    fn from(new: &v2::Pulse) -> Self {
        Self { sequence: new.sequence, engines: new.engines.iter().map(v1::EnginePulse::from).collect() }
    }
}

impl From<v1::Pulse> for v2::Pulse {
    fn from(old: v1::Pulse) -> Self {
        Self { sequence: old.sequence, engines: old.engines.into_iter().map(v2::EnginePulse::from).collect() }
    }
}
