//! What a node is started with, what it answers, and why it does not start.

use std::net::SocketAddr;
use std::path::PathBuf;

use ingle_protocol::ModelDigest;
use serde::{Deserialize, Serialize};

use super::parameters::GivenParameters;
use crate::gateway::AdmissionOptions;
use crate::models::{CatalogModel, FirstModel, default_model};
use crate::registry::PlacementRules;
use crate::worker::EndpointOptions;

/// Which model a node runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ModelChoice {
    /// The default model, fetched where it is missing.
    Default,
    /// A GGUF file, taken as it is.
    File(PathBuf),
    /// A file of this machine that has this hash, taken as it is; where it is gone, the same content from elsewhere.
    LocalFile {
        /// Where it is.
        path: PathBuf,
        /// Its content.
        digest: ModelDigest,
    },
    /// A file that is known by its hash, fetched where it is missing.
    Source(CatalogModel),
    /// A file whose hash nobody knows: what its source gives the first time is what it is from then on.
    First(FirstModel),
    /// Another one, its weights in this format.
    Quantized {
        /// The file that it is made from.
        inner: Box<ModelChoice>,
        /// The format, as `ingle models quantize --to` takes it.
        to: String,
    },
    /// The deterministic engine for tests.
    Echo,
}

impl ModelChoice {
    /// The hash of its file, where that is known beforehand.
    pub fn digest(&self) -> Option<ModelDigest> {
        match self {
            Self::Default => Some(default_model().digest),
            Self::Source(model) => Some(model.digest),
            Self::LocalFile { digest, .. } => Some(*digest),
            Self::File(_) | Self::First(_) | Self::Quantized { .. } | Self::Echo => None,
        }
    }
}

/// What an engine computes on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// A GPU where this build can use one and finds one, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// A GPU, software ones included; the model fails without one.
    Gpu,
}

impl DeviceKind {
    /// The name in settings and on the engine's command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Cpu => "cpu",
            Self::Gpu => "gpu",
        }
    }
}

impl From<DeviceKind> for ingle_engine::DeviceChoice {
    fn from(kind: DeviceKind) -> Self {
        match kind {
            DeviceKind::Auto => Self::Auto,
            DeviceKind::Cpu => Self::Cpu,
            DeviceKind::Gpu => Self::Gpu,
        }
    }
}

impl std::str::FromStr for DeviceKind {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        [Self::Auto, Self::Cpu, Self::Gpu]
            .into_iter()
            .find(|kind| kind.as_str() == text)
            .ok_or_else(|| format!("there is no device `{text}`: write auto, cpu or gpu"))
    }
}

/// What a node needs to know to start.
#[derive(Debug, Clone)]
pub struct NodeOptions {
    /// Identity, members, locks. Made where it is missing.
    pub state_dir: PathBuf,
    /// The QUIC socket.
    pub quic: SocketAddr,
    /// Where this node's HTTP answers, to be told to others.
    pub http: SocketAddr,
    /// The node's name.
    pub name: String,
    /// Find and be found on the LAN.
    pub mdns: bool,
    /// Addresses of members that are always tried.
    pub peers: Vec<String>,
    /// The model to run; `None` for none.
    pub model: Option<ModelChoice>,
    /// What the model computes on.
    pub device: DeviceKind,
    /// What the configuration gives for the model; what was set by command goes before it.
    pub parameters: GivenParameters,
    /// Bytes of memory that all models of this node may take; `None` for as much as there is.
    pub model_memory: Option<u64>,
    /// What this node takes of the models that are registered for any.
    pub placement: PlacementRules,
    /// Bounds of what may wait for the workers.
    pub admission: AdmissionOptions,
    /// Servers elsewhere that answer for more models.
    pub endpoints: Vec<EndpointOptions>,
    /// Where model files are kept; shared by all nodes of the machine.
    pub model_cache: PathBuf,
    /// Bytes that they may have; half of their disk where missing.
    pub model_cache_limit: Option<u64>,
    /// Environment variables for the engine processes (how they log).
    pub engine_environment: Vec<(String, String)>,
}

/// Why a node does not start, with what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The state directory cannot be used.
    #[error("The state directory {path} cannot be used: {why}")]
    StateDir {
        /// The directory.
        path: PathBuf,
        /// Why, and what to do.
        why: String,
    },
    /// Another node runs there.
    #[error(
        "Another node (process {holder}) uses the state directory {path}. Stop it first, or give this one its own with --state-dir."
    )]
    AlreadyRunning {
        /// The directory.
        path: PathBuf,
        /// Its process id.
        holder: String,
    },
    /// The QUIC socket cannot be opened.
    #[error("The QUIC address {address} cannot be used: {why}")]
    Quic {
        /// The address.
        address: SocketAddr,
        /// Why, and what to do.
        why: String,
    },
    /// The identity on disk is damaged.
    #[error("{0}")]
    Identity(String),
    /// The model cannot be used at all (a file that is not there or is no model).
    #[error("{0}")]
    Model(String),
    /// Anything else.
    #[error("{0}")]
    Other(String),
}

/// A join that did not work, with what to do about it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct JoinError(pub String);

/// A join that did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Joined {
    /// The cluster that this node belongs to now.
    pub cluster: String,
    /// The node's id there.
    pub node: String,
    /// Names of the members that it knows now.
    pub members: Vec<String>,
}

/// A request to join.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct JoinOptions {
    /// `host` or `host:port` of any full member: the one that printed the token.
    pub address: String,
    /// The token.
    pub token: String,
    /// Do not ask for the authority's key.
    pub guest: bool,
    /// Leave a cluster with other members for it.
    pub leave_current: bool,
}

/// A fresh token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MintedToken {
    /// The text to give to the other machine.
    pub token: String,
    /// Seconds until it is worth nothing.
    pub expires_in_s: u64,
    /// `host:port` addresses under which this node can be joined, the most promising first.
    pub addresses: Vec<String>,
}
