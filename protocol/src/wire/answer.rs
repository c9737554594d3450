//! The frames of an answer as one type.

use super::v2::{Accepted, Embedding, Failed, Finished, Progress, Refused, Token};
use super::{Body, Frame, Version, Versioned, WireError};

/// One frame of an answer. An answer is `Accepted`, any `Progress`, any `Token`, then `Finished` or `Failed`;
/// or it is one `Refused`. Where embeddings were asked for, `Embedding`s stand in the place of tokens, and `Progress` may come
/// between them.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// The engine takes the request.
    Accepted(Accepted),
    /// The worker does not take it. Nothing follows.
    Refused(Refused),
    /// Still alive, no token yet.
    Progress(Progress),
    /// A generated token.
    Token(Token),
    /// An input as numbers.
    Embedding(Embedding),
    /// The end, all well. Nothing follows.
    Finished(Finished),
    /// The end, not well. Nothing follows.
    Failed(Failed),
}

impl Answer {
    /// Nothing follows this frame.
    pub fn is_last(&self) -> bool {
        matches!(self, Self::Refused(_) | Self::Finished(_) | Self::Failed(_))
    }

    /// As a frame of the newest version.
    pub fn to_frame(&self) -> Result<Frame, WireError> {
        self.encode_for(Version::NEWEST)
    }

    /// As a frame for a peer that speaks `version`.
    pub fn encode_for(&self, version: Version) -> Result<Frame, WireError> {
        match self {
            Self::Accepted(body) => body.encode_for(version),
            Self::Refused(body) => body.encode_for(version),
            Self::Progress(body) => body.encode_for(version),
            Self::Token(body) => body.encode_for(version),
            Self::Embedding(body) => body.encode_for(version),
            Self::Finished(body) => body.encode_for(version),
            Self::Failed(body) => body.encode_for(version),
        }
    }

    /// From a frame of the newest version; any other kind is an error.
    pub fn from_frame(frame: &Frame) -> Result<Self, WireError> {
        Self::decode_for(frame, Version::NEWEST)
    }

    /// From a frame of a peer that speaks `version`; any other kind is an error.
    pub fn decode_for(frame: &Frame, version: Version) -> Result<Self, WireError> {
        Ok(match frame.kind {
            Accepted::KIND => Self::Accepted(Accepted::decode_for(frame, version)?),
            Refused::KIND => Self::Refused(Refused::decode_for(frame, version)?),
            Progress::KIND => Self::Progress(Progress::decode_for(frame, version)?),
            Token::KIND => Self::Token(Token::decode_for(frame, version)?),
            Embedding::KIND => Self::Embedding(Embedding::decode_for(frame, version)?),
            Finished::KIND => Self::Finished(Finished::decode_for(frame, version)?),
            Failed::KIND => Self::Failed(Failed::decode_for(frame, version)?),
            got => return Err(WireError::Unexpected { expected: "a frame of an answer", got }),
        })
    }
}
