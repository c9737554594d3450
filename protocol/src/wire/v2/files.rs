//! Model files between nodes: who has which, and copies of them in checked chunks.

use serde::{Deserialize, Serialize};

use crate::ModelDigest;

/// The most files that a node tells of itself.
pub const MOST_HELD_FILES: usize = 256;
/// Bytes of every chunk of a file but the last. The same everywhere, so that all lists of one file are equal.
pub const CHUNK_BYTES: u64 = 4 << 20;
/// The most chunks of a file: what a list of them has room for (416 GB).
pub const MOST_CHUNKS: usize = 99_000;

/// The model files that the sender has and gives to members: all of them, whenever that changes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldFiles {
    /// At most [`MOST_HELD_FILES`].
    pub files: Vec<ModelDigest>,
}

/// Asks what a file consists of. Answered by [`ListProgress`] as long as that takes, and a [`ChunkList`] or a
/// [`FileRefused`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkListRequest {
    /// The file.
    pub file: ModelDigest,
}

/// The file is being read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListProgress {
    /// Bytes read.
    pub done: u64,
    /// Bytes in all.
    pub size: u64,
}

/// What a file consists of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkList {
    /// Bytes of the file.
    pub size: u64,
    /// SHA-256 of each chunk of [`CHUNK_BYTES`], in order; the last may be shorter.
    pub hashes: Vec<[u8; 32]>,
}

impl ChunkList {
    /// It has as many hashes as a file of its size has chunks.
    pub fn is_whole(&self) -> bool {
        self.size > 0 && self.hashes.len() <= MOST_CHUNKS && self.hashes.len() as u64 == self.size.div_ceil(CHUNK_BYTES)
    }

    /// Where a chunk begins, and its bytes. `None` behind the end.
    pub fn place(&self, index: u32) -> Option<(u64, u64)> {
        let begin = u64::from(index).checked_mul(CHUNK_BYTES)?;
        (begin < self.size).then(|| (begin, CHUNK_BYTES.min(self.size - begin)))
    }
}

/// Asks for a chunk. Answered by a [`ChunkFollows`] and the bytes themselves up to the end of the stream, or by a
/// [`FileRefused`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkRequest {
    /// The file.
    pub file: ModelDigest,
    /// Which chunk.
    pub index: u32,
}

/// Behind this frame so many bytes come that are no frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkFollows {
    /// How many.
    pub length: u32,
}

/// Neither list nor chunk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRefused {
    /// Why.
    pub why: String,
}
