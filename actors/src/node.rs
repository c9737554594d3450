//! One node, put together: read it top to bottom.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ingle_protocol::wire::v1::ModelState;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::gateway::{ChatRequest, GatewayError, OfferedModel, Reply};
use crate::monitor::ClusterStatus;

/// Which model a node runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelChoice {
    /// The default model, fetched where it is missing.
    Default,
    /// A GGUF file, taken as it is.
    File(PathBuf),
    /// The deterministic engine for tests.
    Echo,
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
    /// Where model files are kept; shared by all nodes of the machine.
    pub model_cache: PathBuf,
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

/// A running node.
#[derive(Debug)]
pub struct Node {}

impl Node {
    /// Opens the sockets, starts the actors. The model is loaded in the background: see [`Node::model_state`].
    pub async fn start(options: NodeOptions) -> Result<Self, StartError> {
        let _ = options;
        Err(StartError::Other("not built yet".into()))
    }

    /// Finds a worker and returns when the answer has begun (the first token, the end, or five seconds of reading
    /// the prompt).
    pub async fn chat(&self, request: ChatRequest) -> Result<Reply, GatewayError> {
        Err(GatewayError::UnknownModel { model: request.model, near: vec![] })
    }

    /// All models that the cluster knows, ready or not, the default one first.
    pub fn models(&self) -> Vec<OfferedModel> {
        vec![]
    }

    /// The cluster as this node sees it. Takes no I/O.
    pub fn status(&self) -> Result<ClusterStatus, String> {
        Err("not built yet".into())
    }

    /// The state of this node's own model with every change of it; `None` where it has no model.
    pub fn model_state(&self) -> Option<watch::Receiver<ModelState>> {
        None
    }

    /// Name of this node's own model and what it runs on, as far as is known.
    pub fn own_model(&self) -> Option<(String, String)> {
        None
    }

    /// True while this node takes requests: false from the beginning of [`Node::shutdown`] on.
    pub fn is_accepting(&self) -> bool {
        true
    }

    /// Makes this node a member of another cluster; its cluster part starts anew, its model stays loaded.
    pub async fn join(&self, options: JoinOptions) -> Result<Joined, JoinError> {
        let _ = options;
        Err(JoinError("not built yet".into()))
    }

    /// A join token that is good once, for `lifetime`.
    pub async fn mint_token(&self, lifetime: Duration) -> Result<MintedToken, JoinError> {
        let _ = lifetime;
        Err(JoinError("not built yet".into()))
    }

    /// Takes nothing new, lets running answers finish for at most `limit`, says goodbye, ends the engines.
    pub async fn shutdown(&self, limit: Duration) {
        let _ = limit;
    }
}

/// [`Node::join`] for a state directory in which no node runs. `name` is the name that the node would like.
pub async fn join_offline(state_dir: &Path, name: &str, options: JoinOptions) -> Result<Joined, JoinError> {
    let _ = (state_dir, name, options);
    Err(JoinError("not built yet".into()))
}

/// [`Node::mint_token`] for a state directory in which no node runs (a cluster is made where there is none).
/// `quic_port` is where the node will listen.
pub async fn mint_token_offline(
    state_dir: &Path,
    name: &str,
    quic_port: u16,
    lifetime: Duration,
) -> Result<MintedToken, JoinError> {
    let _ = (state_dir, name, quic_port, lifetime);
    Err(JoinError("not built yet".into()))
}

/// The path of the control socket of a node that runs in `state_dir`.
pub fn control_socket_path(state_dir: &Path) -> PathBuf {
    state_dir.join("control.sock")
}
