//! Other machines that have model files: what this part needs of them, and nothing of how they are reached.

use std::fmt::Debug;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use ingle_protocol::wire::v2::ChunkList;
use ingle_protocol::{ModelDigest, NodeId};

/// Who has which file.
pub trait Holders: Send + Sync + Debug {
    /// Returns when it is known who has the file, or when waiting for that is of no more use: soon after a start the
    /// others may not be connected yet.
    fn settled<'a>(&'a self, file: &'a ModelDigest) -> BoxFuture<'a, ()>;

    /// The machines that have the file now.
    fn of(&self, file: &ModelDigest) -> Vec<Arc<dyn Holder>>;
}

/// A machine that has a file. Every wait behind these has a deadline; errors are words for a log.
pub trait Holder: Send + Sync + Debug {
    /// Which machine.
    fn node(&self) -> NodeId;

    /// Its name.
    fn name(&self) -> String;

    /// What the file consists of, by its word.
    fn chunk_list(&self, file: ModelDigest) -> BoxFuture<'static, Result<ChunkList, String>>;

    /// The bytes of a chunk, exactly `length` of them, not checked.
    fn chunk(&self, file: ModelDigest, index: u32, length: u64) -> BoxFuture<'static, Result<Bytes, String>>;
}

/// Where the bytes of a fetch come from now, for people. Clones show the same.
#[derive(Debug, Clone, Default)]
pub struct Origin(Arc<Mutex<String>>);

impl Origin {
    /// A source's name or machines' names; empty where nothing is fetched.
    pub fn now(&self) -> String {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set(&self, from: impl Into<String>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = from.into();
    }
}
