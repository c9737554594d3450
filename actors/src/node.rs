//! One node, put together: read it top to bottom.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwapOption;
use ingle_protocol::NodeId;
use ingle_protocol::wire::v1::{MemberHint, ModelState, NodeFacts};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::cluster::{self, Mesh, MeshOptions};
use crate::gateway::{ChatRequest, Gateway, GatewayError, OfferedModel, Reply};
use crate::identity::{Authority, Identity, JoinToken, TokenBook};
use crate::monitor::ClusterStatus;
use crate::platform::{FileLock, LockError, create_private_dir, hardware, write_private};
use crate::supervisor::{Service, Supervision};
use crate::worker::{ModelWorker, WorkerOptions, Workers};

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
    /// Where model files are kept; shared by all nodes of the machine.
    pub model_cache: PathBuf,
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

/// A running node.
#[derive(Debug)]
pub struct Node {
    options: NodeOptions,
    mesh: Arc<ArcSwapOption<Mesh>>,
    workers: Arc<Workers>,
    model: Option<Arc<ModelWorker>>,
    gateway: Gateway,
    supervision: Supervision,
    /// Wakes the cluster service after a new identity was stored.
    rejoin: Arc<Notify>,
    started: watch::Receiver<u64>,
    accepting: AtomicBool,
    joining: tokio::sync::Mutex<()>,
    // Released last: another node may use the directory as soon as it is.
    _lock: FileLock,
}

/// Sequences that an engine of this node decodes together.
const SLOTS: u32 = 4;
/// How long answers that were cut off have to say so.
const CUT_OFF_GRACE: Duration = Duration::from_millis(500);
/// How long starting may take before it counts as stuck.
const START_DEADLINE: Duration = Duration::from_secs(20);

impl Node {
    /// Opens the sockets, starts the actors. The model is loaded in the background: see [`Node::model_state`].
    pub async fn start(options: NodeOptions) -> Result<Self, StartError> {
        let lock = open_state_dir(&options.state_dir)?;
        if let Some(ModelChoice::File(path)) = &options.model {
            // A wrong file is said at once, not after the node has told everybody that it has a model.
            check_model_file(path)?;
        }
        load_or_found(&options.state_dir, &options.name)?;
        let endpoint = cluster::bind(options.quic).map_err(|error| quic_error(options.quic, &error))?;

        let workers = Arc::new(Workers::default());
        let model = options.model.clone().map(|choice| {
            let sockets = options.state_dir.join("run");
            let cache = options.model_cache.clone();
            let environment = options.engine_environment.clone();
            let worker_options =
                WorkerOptions { choice, device: options.device, cache, sockets, index: 0, slots: SLOTS, environment };
            let worker = ModelWorker::new(worker_options, workers.clone());
            workers.add(worker.clone());
            worker
        });
        create_private_dir(&options.state_dir.join("run"))
            .map_err(|error| state_dir_error(&options.state_dir, &error))?;

        let mesh: Arc<ArcSwapOption<Mesh>> = Arc::default();
        let rejoin = Arc::new(Notify::new());
        let (starts, mut started) = watch::channel(0u64);
        let mut services = vec![
            cluster_service(&options, endpoint, mesh.clone(), workers.clone(), rejoin.clone(), starts),
            facts_service(mesh.clone(), workers.clone()),
        ];
        if let Some(worker) = &model {
            let worker = worker.clone();
            services.push(Service::new("model", move |cancel| worker.clone().run(cancel)));
        }
        let supervision = Supervision::start(services).await.map_err(StartError::Other)?;
        let ready = tokio::time::timeout(START_DEADLINE, started.wait_for(|starts| *starts > 0)).await;
        if !ready.is_ok_and(|started| started.is_ok()) {
            let problems = supervision.problems.list();
            supervision.stop(Duration::from_secs(1)).await;
            return Err(StartError::Other(match problems.first() {
                Some(problem) => problem.clone(),
                None => "the cluster part of the node did not start in time; see the log (INGLE_LOG=info)".into(),
            }));
        }
        let gateway = Gateway::new(&options.name, mesh.clone(), workers.clone());
        Ok(Self {
            options,
            mesh,
            workers,
            model,
            gateway,
            supervision,
            rejoin,
            started,
            accepting: AtomicBool::new(true),
            joining: tokio::sync::Mutex::new(()),
            _lock: lock,
        })
    }

    /// Finds a worker and returns when the answer has begun (the first token, the end, or five seconds of reading
    /// the prompt).
    pub async fn chat(&self, request: ChatRequest) -> Result<Reply, GatewayError> {
        if !self.is_accepting() {
            let why = "This node is shutting down; ask another one.".into();
            return Err(GatewayError::NoWorker { why, retry_after: Duration::from_secs(1) });
        }
        self.gateway.chat(request).await
    }

    /// All models that the cluster knows, ready or not, the default one first.
    pub fn models(&self) -> Vec<OfferedModel> {
        self.gateway.models()
    }

    /// The cluster as this node sees it. Takes no I/O.
    pub fn status(&self) -> Result<ClusterStatus, String> {
        let mesh = self.mesh.load_full().ok_or("this node is changing its cluster; ask again in a moment")?;
        let mut status = crate::monitor::cluster_status(&mesh, &self.options.http.to_string());
        status.latencies = self.gateway.latencies.summaries();
        status.problems = self.supervision.problems.list();
        status.problems.extend(self.model.as_ref().and_then(|model| model.problem()));
        Ok(status)
    }

    /// The state of this node's own model with every change of it; `None` where it has no model.
    pub fn model_state(&self) -> Option<watch::Receiver<ModelState>> {
        self.model.as_ref().map(|model| model.states())
    }

    /// Name of this node's own model and what it runs on, as far as is known.
    pub fn own_model(&self) -> Option<(String, String)> {
        let facts = self.workers.facts(NodeId::default()).into_iter().next()?;
        Some((facts.name, facts.backend))
    }

    /// True while this node takes requests: false from the beginning of [`Node::shutdown`] on.
    pub fn is_accepting(&self) -> bool {
        self.accepting.load(Ordering::Acquire)
    }

    /// Makes this node a member of another cluster; its cluster part starts anew, its model stays loaded.
    pub async fn join(&self, options: JoinOptions) -> Result<Joined, JoinError> {
        let _one_at_a_time = self.joining.lock().await;
        let mesh = self.mesh.load_full().ok_or_else(|| JoinError("this node is changing its cluster".into()))?;
        mesh.freeze(true);
        let joined = join_cluster(&self.options.state_dir, &self.options.name, &options, mesh.company()).await;
        // What was stored stands; where nothing was, the mesh goes on as before.
        let joined = joined.inspect_err(|_| mesh.freeze(false))?;
        let mut started = self.started.clone();
        started.mark_unchanged();
        self.rejoin.notify_one();
        let again = tokio::time::timeout(START_DEADLINE, started.changed()).await;
        if !matches!(again, Ok(Ok(()))) {
            return Err(JoinError("joined, but this node did not come back under its new identity; restart it".into()));
        }
        Ok(joined)
    }

    /// A join token that is good once, for `lifetime`.
    pub async fn mint_token(&self, lifetime: Duration) -> Result<MintedToken, JoinError> {
        let mesh = self.mesh.load_full().ok_or_else(|| JoinError("this node is changing its cluster".into()))?;
        let identity = mesh.identity();
        let bound = SocketAddr::new(self.options.quic.ip(), mesh.port());
        // fsync takes its time, and tasks that pulse must not wait for it.
        let minting = tokio::task::spawn_blocking(move || mint(&mesh.tokens, &identity, bound, lifetime));
        minting.await.map_err(|error| JoinError(error.to_string()))?
    }

    /// Takes nothing new, lets running answers finish for at most `limit`, says goodbye, ends the engines.
    pub async fn shutdown(&self, limit: Duration) {
        self.accepting.store(false, Ordering::Release);
        self.workers.drain();
        let deadline = tokio::time::Instant::now() + limit;
        // Answers end by themselves; there is no event for "all of them did".
        while (self.gateway.open_answers() > 0 || self.workers.running() > 0) && tokio::time::Instant::now() < deadline
        {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.workers.cut_off();
        let grace = tokio::time::Instant::now() + CUT_OFF_GRACE;
        while (self.gateway.open_answers() > 0 || self.workers.running() > 0) && tokio::time::Instant::now() < grace {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        self.supervision.stop(Duration::from_secs(4)).await;
    }
}

/// Runs the mesh; starts it anew when the identity on disk was replaced.
fn cluster_service(
    options: &NodeOptions,
    endpoint: quinn::Endpoint,
    current: Arc<ArcSwapOption<Mesh>>,
    workers: Arc<Workers>,
    rejoin: Arc<Notify>,
    starts: watch::Sender<u64>,
) -> Service {
    let options = options.clone();
    let starts = Arc::new(starts);
    Service::new("cluster", move |cancel| {
        let (options, endpoint, current) = (options.clone(), endpoint.clone(), current.clone());
        let (workers, rejoin, starts) = (workers.clone(), rejoin.clone(), starts.clone());
        async move {
            loop {
                let identity = Identity::load(&options.state_dir)
                    .map_err(|error| error.to_string())?
                    .ok_or("the identity file has gone")?;
                let mesh = Mesh::start(MeshOptions {
                    facts: own_facts(&options, &endpoint, &identity, &workers),
                    identity,
                    state_dir: options.state_dir.clone(),
                    endpoint: endpoint.clone(),
                    peers: options.peers.clone(),
                    mdns: options.mdns,
                    workers: workers.clone(),
                })
                .await
                .map_err(|error| error.to_string())?;
                current.store(Some(mesh.clone()));
                // What changed while there was no mesh has been told to nobody.
                workers.note_change();
                starts.send_modify(|starts| *starts += 1);
                let (why, result) = tokio::select! {
                    () = cancel.cancelled() => ("it was shut down", Some(Ok(()))),
                    () = rejoin.notified() => ("it joined another cluster", None),
                    why = mesh.broken() => ("its cluster part broke", Some(Err(why))),
                };
                current.store(None);
                mesh.stop(why).await;
                if let Some(result) = result {
                    return result;
                }
            }
        }
    })
}

/// Tells the mesh what the workers say.
fn facts_service(current: Arc<ArcSwapOption<Mesh>>, workers: Arc<Workers>) -> Service {
    Service::new("monitor", move |cancel: CancellationToken| {
        let (current, workers) = (current.clone(), workers.clone());
        async move {
            let mut changes = workers.changes();
            loop {
                if let Some(mesh) = current.load_full() {
                    mesh.set_models(workers.facts(mesh.own_id()));
                }
                tokio::select! {
                    () = cancel.cancelled() => return Ok(()),
                    changed = changes.changed() => changed.map_err(|error| error.to_string())?,
                }
            }
        }
    })
}

fn own_facts(options: &NodeOptions, endpoint: &quinn::Endpoint, identity: &Identity, workers: &Workers) -> NodeFacts {
    let port = endpoint.local_addr().map_or(0, |address| address.port());
    let bound = SocketAddr::new(options.quic.ip(), port);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let node = identity.names.node;
    NodeFacts {
        member: MemberHint { node, name: options.name.clone(), addresses: cluster::reachable_addresses(bound) },
        incarnation: u64::try_from(now.as_millis()).unwrap_or(u64::MAX),
        version: 1,
        software: env!("CARGO_PKG_VERSION").into(),
        http: options.http.to_string(),
        hardware: hardware(),
        models: workers.facts(node),
        members: Vec::new(),
    }
}

// ---------------------------------------------------------------------------------------------------------------
// The state directory

fn state_dir_error(path: &Path, error: &std::io::Error) -> StartError {
    let why = format!("{error}. Give a directory that you may write to with --state-dir.");
    StartError::StateDir { path: path.to_owned(), why }
}

fn open_state_dir(path: &Path) -> Result<FileLock, StartError> {
    create_private_dir(path).map_err(|error| state_dir_error(path, &error))?;
    FileLock::try_acquire(&path.join("lock")).map_err(|error| match error {
        LockError::Held { holder } => StartError::AlreadyRunning { path: path.to_owned(), holder },
        LockError::Io(error) => state_dir_error(path, &error),
    })
}

fn load_or_found(state_dir: &Path, name: &str) -> Result<Identity, StartError> {
    let wrong = |error: crate::identity::IdentityError| StartError::Identity(error.to_string());
    if let Some(mut identity) = Identity::load(state_dir).map_err(wrong)? {
        if identity.name != name {
            name.clone_into(&mut identity.name);
            identity.store(state_dir).map_err(wrong)?;
        }
        return Ok(identity);
    }
    let node = NodeId(rand::random());
    let identity = Identity::found_cluster(node, name, OffsetDateTime::now_utc()).map_err(wrong)?;
    identity.store(state_dir).map_err(wrong)?;
    Ok(identity)
}

fn quic_error(address: SocketAddr, error: &std::io::Error) -> StartError {
    let advice = match error.kind() {
        std::io::ErrorKind::AddrInUse => "another program, perhaps another node, uses it; choose another with --quic",
        std::io::ErrorKind::PermissionDenied => "ports below 1024 need more rights; choose another with --quic",
        std::io::ErrorKind::AddrNotAvailable => "this machine does not have that address; choose another with --quic",
        _ => "choose another with --quic",
    };
    StartError::Quic { address, why: format!("{error}: {advice}") }
}

fn check_model_file(path: &Path) -> Result<(), StartError> {
    ingle_engine::inspect(path).map(drop).map_err(|error| StartError::Model(error.to_string()))
}

// ---------------------------------------------------------------------------------------------------------------
// Joining and tokens

async fn join_cluster(
    state_dir: &Path,
    name: &str,
    options: &JoinOptions,
    others: Vec<String>,
) -> Result<Joined, JoinError> {
    let token: JoinToken =
        options.token.parse().map_err(|error: crate::identity::TokenError| JoinError(error.to_string()))?;
    let current = Identity::load(state_dir).map_err(|error| JoinError(error.to_string()))?;
    if let Some(current) = &current {
        if Authority::fingerprint(&current.authority) == token.authority_hash {
            return Err(JoinError("this node is a member of that cluster already; `ingle status` shows it".into()));
        }
        if !others.is_empty() && !options.leave_current {
            return Err(JoinError(format!(
                "this node belongs to a cluster with other members ({}). To leave them for the other cluster, add \
                 --leave-current; to keep both, start another node with its own --state-dir.",
                others.join(", ")
            )));
        }
    }
    let admission = cluster::join(&options.address, &token, name, options.guest)
        .await
        .map_err(|error| JoinError(error.to_string()))?;
    let state_dir = state_dir.to_owned();
    let storing = tokio::task::spawn_blocking(move || store_admission(&state_dir, admission));
    storing.await.map_err(|error| JoinError(error.to_string()))?
}

fn store_admission(state_dir: &Path, admission: cluster::Admission) -> Result<Joined, JoinError> {
    let identity = admission.identity;
    // The members first: an identity without them would have to be found by luck.
    let members = serde_json::json!({ "cluster": identity.cluster, "members": admission.members });
    serde_json::to_vec_pretty(&members)
        .map_err(std::io::Error::other)
        .and_then(|bytes| write_private(&state_dir.join(cluster::MEMBERS_FILE), &bytes))
        .map_err(|error| JoinError(format!("the members cannot be stored: {error}")))?;
    identity.store(state_dir).map_err(|error| JoinError(error.to_string()))?;
    Ok(Joined {
        cluster: identity.cluster.to_string(),
        node: identity.names.node.to_string(),
        members: admission.members.into_iter().map(|member| member.name).collect(),
    })
}

fn mint(
    book: &TokenBook,
    identity: &Identity,
    bound: SocketAddr,
    lifetime: Duration,
) -> Result<MintedToken, JoinError> {
    if identity.signer.is_none() {
        return Err(JoinError("this node is a guest of its cluster: print the token on a full member".into()));
    }
    let hash = Authority::fingerprint(&identity.authority);
    let token = book
        .mint(hash, identity.names.node, lifetime, OffsetDateTime::now_utc(), &mut rand::rng())
        .map_err(|error| JoinError(format!("the token cannot be stored: {error}")))?;
    let mut addresses = cluster::reachable_addresses(bound);
    if addresses.is_empty() {
        addresses.push(format!("127.0.0.1:{}", bound.port()));
    }
    Ok(MintedToken { token: token.to_text(), expires_in_s: lifetime.as_secs(), addresses })
}

/// [`Node::join`] for a state directory in which no node runs. `name` is the name that the node would like.
pub async fn join_offline(state_dir: &Path, name: &str, options: JoinOptions) -> Result<Joined, JoinError> {
    let _lock = open_state_dir(state_dir).map_err(|error| JoinError(error.to_string()))?;
    let others = match Identity::load(state_dir) {
        Ok(Some(identity)) => cluster::remembered_names(state_dir, identity.cluster),
        _ => Vec::new(),
    };
    join_cluster(state_dir, name, &options, others).await
}

/// [`Node::mint_token`] for a state directory in which no node runs (a cluster is made where there is none).
/// `quic` is where the node will listen.
pub async fn mint_token_offline(
    state_dir: &Path,
    name: &str,
    quic: SocketAddr,
    lifetime: Duration,
) -> Result<MintedToken, JoinError> {
    let _lock = open_state_dir(state_dir).map_err(|error| JoinError(error.to_string()))?;
    let identity = load_or_found(state_dir, name).map_err(|error| JoinError(error.to_string()))?;
    if quic.port() == 0 {
        return Err(JoinError("--quic has port 0: start the node first, its port is not known yet".into()));
    }
    mint(&TokenBook::new(state_dir), &identity, quic, lifetime)
}

/// The name under which a node last ran or joined in the state directory.
pub fn remembered_name(state_dir: &Path) -> Option<String> {
    // A damaged identity is said where it is needed.
    Identity::load(state_dir).ok().flatten().map(|identity| identity.name)
}

/// The path of the control socket of a node that runs in `state_dir`.
pub fn control_socket_path(state_dir: &Path) -> PathBuf {
    state_dir.join("control.sock")
}
