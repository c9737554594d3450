//! One node, put together: read it top to bottom.

mod joining;
mod models;
mod options;
mod parameter_file;
mod parameters;
mod registering;
mod setting;
mod state_dir;
mod verifying;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwapOption;
use ingle_protocol::wire::v2::{DrainReply, DrainRequest, MemberHint, ModelState, NodeFacts};
use ingle_protocol::{NodeId, RequestId};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

pub use joining::{control_socket_path, join_offline, mint_token_offline, remembered_name};
pub use options::{DeviceKind, JoinError, JoinOptions, Joined, MintedToken, ModelChoice, NodeOptions, StartError};
pub use parameter_file::{ParameterFile, ParameterFileError};
pub use parameters::{
    Change, GivenParameters, KvKind, Layers, ModelParameters, Outcome, Parameter, ParameterChanges, ParameterError,
    ParameterValue, ShownParameter, ShownParameters, Source,
};
pub use registering::{ModelDetails, Registered, Registration};
pub use setting::{set_offline, show_offline};
pub use verifying::{Probe, Verification};

use crate::cluster::{self, FileShare, Mesh, MeshOptions, PeerFiles};
use crate::gateway::{ChatRequest, Gateway, GatewayError, OfferedModel, Reply, RequestRecord};
use crate::identity::Identity;
use crate::models::{ClientError, Holders};
use crate::monitor::ClusterStatus;
use crate::platform::{FileLock, create_private_dir, hardware};
use crate::registry::{self, EndpointKeeper, ModelRegistry, Placer};
use crate::supervisor::{Service, Supervision};
use crate::worker::manager::{LoadError, ManagerOptions, ModelManager};
use crate::worker::{EndpointWorker, Worker, Workers};
use joining::{join_cluster, mint};
pub(crate) use state_dir::check_model_file;
use state_dir::{load_or_found, open_state_dir, quic_error, state_dir_error};

/// A running node.
#[derive(Debug)]
pub struct Node {
    options: NodeOptions,
    mesh: Arc<ArcSwapOption<Mesh>>,
    workers: Arc<Workers>,
    holders: Arc<dyn Holders>,
    models: Arc<ModelManager>,
    registry: Arc<ModelRegistry>,
    /// Held while parameters are set here.
    setting: Arc<tokio::sync::Mutex<()>>,
    endpoints: Vec<Arc<EndpointWorker>>,
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

        let registry =
            ModelRegistry::open(&options.state_dir).map_err(|error| state_dir_error(&options.state_dir, &error))?;
        let workers = Arc::new(Workers::default());
        let mesh: Arc<ArcSwapOption<Mesh>> = Arc::default();
        let holders: Arc<dyn Holders> = Arc::new(PeerFiles::new(mesh.clone()));
        let models = ModelManager::new(manager_options(&options, holders.clone()), workers.clone())
            .map_err(|error: LoadError| StartError::Other(error.to_string()))?;
        // The model of the configuration is number 0, the others come behind the endpoints.
        let endpoints = (1..).zip(&options.endpoints).map(|(index, endpoint)| {
            let worker = EndpointWorker::new(endpoint.clone(), index, workers.clone())?;
            workers.add(worker.clone());
            Ok(worker)
        });
        let endpoints: Vec<Arc<EndpointWorker>> =
            endpoints.collect::<Result<_, ClientError>>().map_err(|error| StartError::Other(error.to_string()))?;
        create_private_dir(&options.state_dir.join("run"))
            .map_err(|error| state_dir_error(&options.state_dir, &error))?;

        let rejoin = Arc::new(Notify::new());
        let (starts, mut started) = watch::channel(0u64);
        let gateway = Gateway::new(&options.name, mesh.clone(), workers.clone(), registry.clone(), options.admission);
        let watching = gateway.clone();
        let mut services = vec![
            Service::new("gateway", move |cancel| watching.clone().run(cancel)),
            cluster_service(
                &options,
                endpoint,
                mesh.clone(),
                (workers.clone(), registry.clone()),
                rejoin.clone(),
                starts,
            ),
            facts_service(mesh.clone(), workers.clone()),
        ];
        let keeping = models.clone();
        services.push(Service::new("models", move |cancel| keeping.clone().run(cancel)));
        let setting: Arc<tokio::sync::Mutex<()>> = Arc::default();
        services.extend(registry_services(&options, &registry, &workers, &models, &setting));
        services.push(placement_service(&options, &mesh, &registry, &models, &workers));
        for worker in &endpoints {
            let worker = worker.clone();
            services.push(Service::new("endpoint", move |cancel| worker.clone().run(cancel)));
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
        Ok(Self {
            options,
            mesh,
            workers,
            models,
            registry,
            setting,
            holders,
            endpoints,
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

    /// Nobody can answer for the model now, but somebody will: whoever asks for it waits.
    pub fn is_waited_for(&self, model: &str) -> bool {
        self.gateway.is_waited_for(model)
    }

    /// All models that the cluster knows, ready or not, the default one first.
    pub fn models(&self) -> Vec<OfferedModel> {
        self.gateway.models()
    }

    /// The cluster as this node sees it. Takes no I/O.
    pub fn status(&self) -> Result<ClusterStatus, String> {
        let mesh = self.mesh.load_full().ok_or("this node is changing its cluster; ask again in a moment")?;
        let mut status = crate::monitor::cluster_status(&mesh, &self.options.http.to_string());
        status.latencies = self.gateway.latencies().summaries();
        for node in &mut status.nodes {
            for model in &mut node.models {
                model.trouble = model.engine.and_then(|engine| self.gateway.trouble(engine));
            }
        }
        status.waiting = self.gateway.waiting();
        status.problems = self.supervision.problems.list();
        status.problems.extend(self.models.problems());
        status.problems.extend(self.registry_problems());
        status.problems.extend(self.endpoints.iter().filter_map(|endpoint| endpoint.problem()));
        Ok(status)
    }

    /// Lets the node of this name take nothing new until that is undone: its answers finish within `limit`, or go on
    /// elsewhere. Returns when nothing runs there any more.
    pub async fn drain(&self, name: &str, limit: Duration, undo: bool) -> Result<DrainReply, String> {
        let request = DrainRequest { limit_ms: u64::try_from(limit.as_millis()).unwrap_or(u64::MAX), undo };
        if name == self.options.name {
            let (running, moved) = cluster::carry_out(&self.workers, request).await;
            return Ok(DrainReply { running, moved });
        }
        let mesh = self.mesh.load_full().ok_or("this node is changing its cluster; ask again in a moment")?;
        let members: Vec<(NodeId, String)> =
            mesh.roster.lock().iter().map(|(id, member)| (*id, member.name.clone())).collect();
        match members.iter().find(|(_, known)| known == name) {
            Some((id, _)) => mesh.drain(*id, request).await.map_err(|why| format!("{name} does not drain: {why}")),
            None => {
                let known: Vec<&str> = members.iter().map(|(_, known)| known.as_str()).collect();
                let known = [vec![self.options.name.as_str()], known].concat().join(", ");
                Err(format!("There is no node `{name}` in this cluster. There is {known}."))
            }
        }
    }

    /// This node takes nothing new.
    pub fn is_draining(&self) -> bool {
        self.workers.is_draining()
    }

    /// What became of a request that entered here and why; of the last one where no id is given.
    pub fn explain(&self, request: Option<RequestId>) -> Option<RequestRecord> {
        self.gateway.explain(request)
    }

    /// The state of this node's own model with every change of it; `None` where it has no model.
    pub fn model_state(&self) -> Option<watch::Receiver<ModelState>> {
        self.models.own().map(|model| model.states())
    }

    /// Where the bytes of this node's model come from while it is fetched; empty at other times.
    pub fn model_origin(&self) -> String {
        self.models.own().map(|model| model.origin()).unwrap_or_default()
    }

    /// The endpoints of this node.
    pub fn endpoints(&self) -> &[Arc<EndpointWorker>] {
        &self.endpoints
    }

    /// Name of this node's own model and what it runs on, as far as is known.
    pub fn own_model(&self) -> Option<(String, String)> {
        let facts = self.models.own()?.facts(NodeId::default());
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
        let joined =
            join_cluster(&self.options.state_dir, &self.options.name, &options, mesh.company(), &self.registry).await;
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
        while (self.gateway.open_answers() > 0 || self.workers.open() > 0) && tokio::time::Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.workers.cut_off();
        let grace = tokio::time::Instant::now() + CUT_OFF_GRACE;
        while (self.gateway.open_answers() > 0 || self.workers.open() > 0) && tokio::time::Instant::now() < grace {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        self.supervision.stop(Duration::from_secs(4)).await;
    }
}

fn manager_options(options: &NodeOptions, holders: Arc<dyn Holders>) -> ManagerOptions {
    ManagerOptions {
        state_dir: options.state_dir.clone(),
        own: options.model.clone(),
        parameters: options.parameters.clone(),
        device: options.device,
        cache: options.model_cache.clone(),
        memory: options.model_memory,
        cache_limit: options.model_cache_limit,
        holders,
        environment: options.engine_environment.clone(),
        first_index: u16::try_from(options.endpoints.len()).unwrap_or(u16::MAX / 2).saturating_add(1),
    }
}

/// What keeps the registry and does on this node what it says.
fn registry_services(
    options: &NodeOptions,
    registry: &Arc<ModelRegistry>,
    workers: &Arc<Workers>,
    models: &Arc<ModelManager>,
    setting: &Arc<tokio::sync::Mutex<()>>,
) -> Vec<Service> {
    let keeping = registry.clone();
    let keeper =
        Arc::new(EndpointKeeper { own: options.name.clone(), registry: registry.clone(), workers: workers.clone() });
    let (registry, models, setting) = (registry.clone(), models.clone(), setting.clone());
    vec![
        Service::new("registry", move |cancel| keeping.clone().keep(cancel)),
        Service::new("endpoints", move |cancel| keeper.clone().run(cancel)),
        Service::new("parameters", move |cancel| {
            registry::follow(registry.clone(), models.clone(), setting.clone(), cancel)
        }),
    ]
}

/// What brings registered models to this node.
fn placement_service(
    options: &NodeOptions,
    mesh: &Arc<ArcSwapOption<Mesh>>,
    registry: &Arc<ModelRegistry>,
    models: &Arc<ModelManager>,
    workers: &Arc<Workers>,
) -> Service {
    let has_card = || !crate::platform::graphics_cards().is_empty();
    let placer = Arc::new(Placer {
        own: options.name.clone(),
        rules: options.placement,
        on_card: cfg!(feature = "gpu") && options.device != DeviceKind::Cpu && has_card(),
        mesh: mesh.clone(),
        registry: registry.clone(),
        models: models.clone(),
        workers: workers.clone(),
    });
    Service::new("placement", move |cancel| placer.clone().run(cancel))
}

/// Runs the mesh; starts it anew when the identity on disk was replaced.
fn cluster_service(
    options: &NodeOptions,
    endpoint: quinn::Endpoint,
    current: Arc<ArcSwapOption<Mesh>>,
    (workers, registry): (Arc<Workers>, Arc<ModelRegistry>),
    rejoin: Arc<Notify>,
    starts: watch::Sender<u64>,
) -> Service {
    let options = options.clone();
    let starts = Arc::new(starts);
    let share = Arc::new(FileShare::new(options.model_cache.clone(), workers.clone()));
    Service::new("cluster", move |cancel| {
        let (options, endpoint, current) = (options.clone(), endpoint.clone(), current.clone());
        let (workers, rejoin, starts, share) = (workers.clone(), rejoin.clone(), starts.clone(), share.clone());
        let registry = registry.clone();
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
                    share: share.clone(),
                    registry: registry.clone(),
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
