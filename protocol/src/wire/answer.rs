//! The frames of an answer as one type.

use super::v1::{Accepted, Failed, Finished, Progress, Refused, Token};
use super::{Body, Frame, WireError, encode};

/// One frame of an answer. An answer is `Accepted`, any `Progress`, any `Token`, then `Finished` or `Failed`;
/// or it is one `Refused`.
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

    /// As a frame.
    pub fn to_frame(&self) -> Result<Frame, WireError> {
        match self {
            Self::Accepted(body) => encode(body),
            Self::Refused(body) => encode(body),
            Self::Progress(body) => encode(body),
            Self::Token(body) => encode(body),
            Self::Finished(body) => encode(body),
            Self::Failed(body) => encode(body),
        }
    }

    /// From a frame; any other kind is an error.
    pub fn from_frame(frame: &Frame) -> Result<Self, WireError> {
        Ok(match frame.kind {
            Accepted::KIND => Self::Accepted(frame.decode()?),
            Refused::KIND => Self::Refused(frame.decode()?),
            Progress::KIND => Self::Progress(frame.decode()?),
            Token::KIND => Self::Token(frame.decode()?),
            Finished::KIND => Self::Finished(frame.decode()?),
            Failed::KIND => Self::Failed(frame.decode()?),
            got => return Err(WireError::Unexpected { expected: "a frame of an answer", got }),
        })
    }
}
