//! What crosses sockets: frames of `kind u8 · length u32 (little endian) · body`, the body being one `bincode`
//! struct of one version. A version is never edited after a release: a change of [`v2`] makes a `v3`, with
//! conversions between the neighbours, and nodes of two neighbouring versions work together. [`v1`] has what differs
//! from [`v2`] and nothing twice. All code outside of this module uses the structs of the newest version, whatever a
//! peer speaks: [`Versioned`] is the way there. This module is the only one that knows `bincode`.
//!
//! A kind with the highest bit set ([`SKIPPABLE`]) may be skipped by a reader that does not know it; any other
//! unknown kind ends the stream.

use bytes::{BufMut, Bytes, BytesMut};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// `impl Body` for the structs of a version that are its own, and `limit_of` for all its kinds: `unchanged` names
/// those that it shares with its newer neighbour.
macro_rules! frames {
    (
        $(#[$doc:meta])*
        $($kind:literal $name:ident at_most $limit:expr;)*
        $(unchanged $($same:ident)*;)?
    ) => {
        $(impl $crate::wire::Body for $name {
            const KIND: u8 = $kind;
            const LIMIT: u32 = $limit;
            const NAME: &'static str = stringify!($name);
        })*

        $(#[$doc])*
        pub const fn limit_of(kind: u8) -> Option<u32> {
            match kind {
                $($kind => Some($limit),)*
                $($(<$same as $crate::wire::Body>::KIND => Some(<$same as $crate::wire::Body>::LIMIT),)*)?
                _ => None,
            }
        }
    };
}

pub mod v1;
pub mod v2;

mod answer;
mod neighbours;
mod version;
pub use answer::Answer;
pub use neighbours::Versioned;
pub use version::Version;

/// TLS application protocol for machines that have no certificate yet.
pub const JOIN_ALPN: &[u8] = b"ingle-join/1";
/// TLS application protocol of connections that carry model files and nothing else. Their frames are of
/// [`Version::OF_FILES`].
pub const FILES_ALPN: &[u8] = b"ingle-files/1";
/// Bytes before a frame's body.
pub const HEAD_LEN: usize = 5;
/// Set in kinds that an old reader may skip.
pub const SKIPPABLE: u8 = 0x80;

/// The first byte of every QUIC stream: what the stream is for.
/// (An acceptor only sees a stream once bytes arrive on it, so something must be written first anyway.)
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum StreamKind {
    /// Hello and welcome, and later the goodbye.
    Membership = 1,
    /// The actors' control plane.
    Control = 2,
    /// A pulse every 100 ms, one way.
    Pulse = 3,
    /// One inference request and its answer.
    Inference = 4,
    /// A full member asks for the authority's key, a guest for a new certificate.
    Authority = 5,
}

impl TryFrom<u8> for StreamKind {
    type Error = WireError;
    fn try_from(byte: u8) -> Result<Self, WireError> {
        [Self::Membership, Self::Control, Self::Pulse, Self::Inference, Self::Authority]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
            .ok_or(WireError::UnknownStream(byte))
    }
}

/// Why bytes are not a frame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The first byte of a stream names nothing that we know.
    #[error("a stream of unknown kind {0}")]
    UnknownStream(u8),
    /// The kind is unknown and may not be skipped.
    #[error("a frame of unknown kind {0:#04x}: the peer speaks a newer protocol than it agreed to")]
    UnknownKind(u8),
    /// Known, but not here.
    #[error("a frame of kind {got:#04x} where {expected} was due")]
    Unexpected {
        /// What was due.
        expected: &'static str,
        /// The kind that came.
        got: u8,
    },
    /// Refused before anything was allocated.
    #[error("a frame of {length} bytes, where at most {limit} are allowed")]
    TooLong {
        /// The length that the frame announced.
        length: u32,
        /// The most that its kind may have.
        limit: u32,
    },
    /// The peer is too old for the frame.
    #[error("protocol {version} has no frame `{frame}`: the peer is too old for it")]
    NotInVersion {
        /// The frame.
        frame: &'static str,
        /// What the peer speaks.
        version: Version,
    },
    /// The body does not decode.
    #[error("a frame of kind {kind:#04x} that does not decode: {why}")]
    Body {
        /// The frame's kind.
        kind: u8,
        /// What the decoder said.
        why: String,
    },
    /// The body decodes but goes on.
    #[error("a frame of kind {kind:#04x} with {bytes} bytes behind its end")]
    Trailing {
        /// The frame's kind.
        kind: u8,
        /// How many bytes are too many.
        bytes: usize,
    },
}

/// A struct that is the body of one kind of frame.
pub trait Body: Serialize + DeserializeOwned {
    /// The frame's kind.
    const KIND: u8;
    /// The most bytes that the body may have.
    const LIMIT: u32;
    /// What it is called in errors.
    const NAME: &'static str;
}

/// The head of a frame, read before its body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// Which frame it is.
    pub kind: u8,
    /// Bytes of body.
    pub length: u32,
}

impl Head {
    /// Reads a head and checks the announced length against what the kind may have in `version`, so that nothing is
    /// allocated for a lie.
    pub fn parse(bytes: [u8; HEAD_LEN], version: Version) -> Result<Self, WireError> {
        let [kind, length @ ..] = bytes;
        let length = u32::from_le_bytes(length);
        let limit = match version.limit_of(kind) {
            Some(limit) => limit,
            None if kind & SKIPPABLE != 0 => v2::SKIPPED_LIMIT,
            None => return Err(WireError::UnknownKind(kind)),
        };
        if length > limit { Err(WireError::TooLong { length, limit }) } else { Ok(Self { kind, length }) }
    }

    /// True for frames that `version` does not know and may skip.
    pub fn is_skippable_unknown(self, version: Version) -> bool {
        self.kind & SKIPPABLE != 0 && version.limit_of(self.kind).is_none()
    }
}

/// One whole frame, its body not yet decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Which frame it is.
    pub kind: u8,
    /// Its body.
    pub body: Bytes,
}

impl Frame {
    /// The body as a `T` of `T`'s own version, refused if the kind is another or bytes are left over.
    pub fn decode<T: Body>(&self) -> Result<T, WireError> {
        if self.kind != T::KIND {
            return Err(WireError::Unexpected { expected: T::NAME, got: self.kind });
        }
        // A text is made room for before its bytes are there, so what a short body may claim is little. In memory it
        // takes more than on the wire, but not a hundred times as much.
        let decoded = match self.body.len() {
            0..=0x1000 => decode_within::<T, { 512 << 10 }>(&self.body),
            0x1001..=0x1_0000 => decode_within::<T, { 4 << 20 }>(&self.body),
            _ => decode_within::<T, { v2::DECODE_LIMIT }>(&self.body),
        };
        let (value, used) = decoded.map_err(|error| WireError::Body { kind: self.kind, why: error.to_string() })?;
        match self.body.len() - used {
            0 => Ok(value),
            bytes => Err(WireError::Trailing { kind: self.kind, bytes }),
        }
    }

    /// The frame as bytes, head first.
    pub fn to_bytes(&self) -> Bytes {
        let mut bytes = BytesMut::with_capacity(HEAD_LEN + self.body.len());
        self.write(&mut bytes);
        bytes.freeze()
    }

    /// Puts the frame behind what is in `bytes`.
    pub fn write(&self, bytes: &mut BytesMut) {
        bytes.reserve(HEAD_LEN + self.body.len());
        bytes.put_u8(self.kind);
        bytes.put_u32_le(self.body.len() as u32);
        bytes.put_slice(&self.body);
    }

    /// `bytes` as one frame (for payloads that carry whole frames, as the control plane does).
    pub fn from_bytes(bytes: &[u8], version: Version) -> Result<Self, WireError> {
        let short = |kind| WireError::Body { kind, why: "the frame is cut short".into() };
        let (head, rest) = bytes.split_first_chunk::<HEAD_LEN>().ok_or_else(|| short(0))?;
        let head = Head::parse(*head, version)?;
        let length = head.length as usize;
        match rest.len().cmp(&length) {
            std::cmp::Ordering::Less => Err(short(head.kind)),
            std::cmp::Ordering::Equal => Ok(Self { kind: head.kind, body: Bytes::copy_from_slice(rest) }),
            std::cmp::Ordering::Greater => Err(WireError::Trailing { kind: head.kind, bytes: rest.len() - length }),
        }
    }
}

fn decode_within<T: Body, const LIMIT: usize>(body: &[u8]) -> Result<(T, usize), bincode::error::DecodeError> {
    bincode::serde::decode_from_slice(body, bincode::config::standard().with_limit::<LIMIT>())
}

/// `body` as a frame of its own version. Fails where it is longer than its kind allows, so that no peer has to refuse it.
pub fn encode<T: Body>(body: &T) -> Result<Frame, WireError> {
    let bytes = bincode::serde::encode_to_vec(body, bincode::config::standard())
        .map_err(|error| WireError::Body { kind: T::KIND, why: error.to_string() })?;
    match u32::try_from(bytes.len()) {
        Ok(length) if length <= T::LIMIT => Ok(Frame { kind: T::KIND, body: bytes.into() }),
        length => Err(WireError::TooLong { length: length.unwrap_or(u32::MAX), limit: T::LIMIT }),
    }
}

#[cfg(test)]
mod tests;
