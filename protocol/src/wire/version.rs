//! Versions of the protocol, and which of them two nodes speak.

use super::{v1, v2};

/// A version of the frames. Two nodes agree on the newest that both know when they connect (by TLS' application
/// protocol), and every frame on that connection is of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Version {
    /// [`v1`].
    V1 = 1,
    /// [`v2`].
    V2 = 2,
}

impl Version {
    /// All that this build speaks, newest first.
    pub const ALL: &[Self] = &[Self::V2, Self::V1];
    /// What a node and its own engine processes speak, which are of one build.
    pub const NEWEST: Self = Self::V2;
    /// Frames under the join's own application protocol are of this version, whatever else a node speaks.
    pub const OF_JOIN: Self = Self::V1;
    /// Frames under the files' own application protocol are of this version.
    pub const OF_FILES: Self = Self::V2;

    /// Its number.
    pub const fn number(self) -> u8 {
        self as u8
    }

    /// The TLS application protocol that stands for it between members.
    pub const fn alpn(self) -> &'static [u8] {
        match self {
            Self::V1 => b"ingle/1",
            Self::V2 => b"ingle/2",
        }
    }

    /// The version that an application protocol stands for.
    pub fn of_alpn(alpn: &[u8]) -> Option<Self> {
        Self::ALL.iter().copied().find(|version| version.alpn() == alpn)
    }

    /// The most bytes that a frame of this kind may have; `None` for kinds that the version does not know.
    pub const fn limit_of(self, kind: u8) -> Option<u32> {
        match self {
            Self::V1 => v1::limit_of(kind),
            Self::V2 => v2::limit_of(kind),
        }
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "version {}", self.number())
    }
}
