//! The members of the cluster, the connections between them, and the way in.
//!
//! A [`Mesh`] is this node's part in one cluster under one identity. When the node joins another cluster the mesh
//! ends and another one begins on the same socket.

mod accept;
mod authority_stream;
mod control;
mod dial;
mod discovery;
mod endpoint;
mod files;
mod inference;
mod join;
mod link;
mod roster;

use std::collections::HashSet;
use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use futures_util::FutureExt;
use ingle_protocol::NodeId;
use ingle_protocol::liveness::Health;
use ingle_protocol::wire::v2::{DrainReply, DrainRequest, MemberHint, ModelFacts, NodeFacts};
use time::OffsetDateTime;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub(crate) use control::carry_out;
pub use endpoint::{bind, plain};
pub use files::{FileShare, PeerFiles};
pub use inference::{RemoteAnswers, submit_remote};
pub use join::{Admission, JoinFailure, join};
pub use link::PeerLink;
pub use roster::{Member, Roster};

use crate::identity::{Identity, IdentityError, TlsConfigs, TokenBook};
use crate::platform::{read_optional, write_private};
use crate::registry::ModelRegistry;
use crate::worker::Workers;
use control::ControlPlane;

/// What a mesh is started with.
#[derive(Debug)]
pub struct MeshOptions {
    /// This node.
    pub identity: Identity,
    /// Where members and tokens are kept.
    pub state_dir: PathBuf,
    /// The node's QUIC socket.
    pub endpoint: quinn::Endpoint,
    /// What it says of itself; `member.node` and `members` are filled in.
    pub facts: NodeFacts,
    /// Addresses that are always tried.
    pub peers: Vec<String>,
    /// Find and be found on the LAN.
    pub mdns: bool,
    /// This node's engines.
    pub workers: Arc<Workers>,
    /// The model files that it gives.
    pub share: Arc<FileShare>,
    /// The household's models.
    pub registry: Arc<ModelRegistry>,
}

/// This node's part in its cluster.
#[derive(Debug)]
pub struct Mesh {
    identity: ArcSwap<Identity>,
    client: ArcSwap<quinn::ClientConfig>,
    files_client: ArcSwap<quinn::ClientConfig>,
    state_dir: PathBuf,
    endpoint: quinn::Endpoint,
    peers: Vec<String>,
    own: watch::Sender<NodeFacts>,
    control: OnceLock<ControlPlane>,
    leaving: OnceLock<String>,
    redial: Notify,
    greeting: dial::Greeting,
    sightings: discovery::Sightings,
    /// Set while the node goes over to another cluster: what this mesh would store then would overwrite that.
    frozen: Mutex<bool>,
    failed: watch::Sender<Option<String>>,
    tasks: TaskTracker,
    cancel: CancellationToken,
    /// The model files that this node gives.
    pub share: Arc<FileShare>,
    /// The members.
    pub roster: Roster,
    /// The tokens that this node made.
    pub tokens: TokenBook,
    /// This node's engines.
    pub workers: Arc<Workers>,
    /// The household's models.
    registry: Arc<ModelRegistry>,
}

impl Mesh {
    /// Starts everything: accepting, dialling, discovery, control plane, renewal.
    pub async fn start(options: MeshOptions) -> Result<Arc<Self>, IdentityError> {
        let MeshOptions { identity, state_dir, endpoint, mut facts, peers, mdns, workers, share, registry } = options;
        let tls = TlsConfigs::new(&identity, endpoint::transport())?;
        endpoint.set_server_config(Some(tls.server));
        let own_id = identity.names.node;
        facts.member.node = own_id;
        let mesh = Arc::new(Self {
            client: ArcSwap::from_pointee(tls.client),
            files_client: ArcSwap::from_pointee(tls.files),
            share,
            identity: ArcSwap::from_pointee(identity),
            tokens: TokenBook::new(&state_dir),
            state_dir,
            endpoint,
            peers,
            own: watch::Sender::new(facts),
            control: OnceLock::new(),
            leaving: OnceLock::new(),
            redial: Notify::new(),
            greeting: dial::Greeting::default(),
            sightings: discovery::Sightings::default(),
            frozen: Mutex::default(),
            failed: watch::Sender::new(None),
            tasks: TaskTracker::new(),
            cancel: CancellationToken::new(),
            roster: Roster::new(own_id),
            workers,
            registry,
        });
        for hint in mesh.remembered() {
            mesh.roster.hear_of(&hint);
        }
        match ControlPlane::start(own_id, mesh.workers.clone()).await {
            Ok(control) => {
                let _ = mesh.control.set(control);
                mesh.spawn("the control probe", Self::probe_control(mesh.clone()));
            }
            // Requests do not need it: go on, and say so.
            Err(error) => tracing::error!(%error, "the control plane does not start"),
        }
        mesh.spawn("accepting connections", accept::run(mesh.clone()));
        mesh.spawn("dialling members", dial::run(mesh.clone()));
        mesh.spawn("looking at the model files", files::watch_folder(mesh.clone()));
        mesh.spawn("renewing the certificate", Self::renew(mesh.clone()));
        if mdns {
            mesh.tasks.spawn(mesh.cancel.clone().run_until_cancelled_owned(discovery::run(mesh.clone())));
        }
        Ok(mesh)
    }

    /// Runs for as long as the mesh. Without the task the mesh is of no use: where it ends by itself or panics, the
    /// mesh has failed, and its supervisor starts another one.
    fn spawn(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let (cancel, failed) = (self.cancel.clone(), self.failed.clone());
        self.tasks.spawn(async move {
            let ended = AssertUnwindSafe(task).catch_unwind();
            if let Some(result) = cancel.run_until_cancelled_owned(ended).await {
                let how = if result.is_err() { "panicked" } else { "ended" };
                failed.send_replace(Some(format!("{name} {how}")));
            }
        });
    }

    /// Returns when a part of the mesh is broken, with what it is.
    pub async fn broken(&self) -> String {
        let mut failed = self.failed.subscribe();
        match failed.wait_for(Option::is_some).await.map(|why| why.clone()) {
            Ok(Some(why)) => why,
            _ => std::future::pending().await,
        }
    }

    /// While frozen the mesh stores neither members nor certificates.
    pub fn freeze(&self, frozen: bool) {
        *self.frozen.lock().unwrap_or_else(PoisonError::into_inner) = frozen;
    }

    /// Says goodbye to everybody and ends all tasks of the mesh, within a second or so. The socket stays open.
    pub async fn stop(&self, why: &str) {
        let _ = self.leaving.set(why.to_owned());
        self.cancel.cancel();
        self.tasks.close();
        let _ = tokio::time::timeout(Duration::from_secs(2), self.tasks.wait()).await;
        if let Some(control) = self.control.get() {
            control.stop().await;
        }
    }

    /// This node's id.
    pub fn own_id(&self) -> NodeId {
        self.identity.load().names.node
    }

    /// This node's identity as it is now.
    pub fn identity(&self) -> Arc<Identity> {
        self.identity.load_full()
    }

    /// What this node says of itself.
    pub fn own_facts(&self) -> NodeFacts {
        self.own.borrow().clone()
    }

    /// Tells all members what models this node has now.
    pub fn set_models(&self, models: Vec<ModelFacts>) {
        self.own.send_if_modified(|facts| {
            let changed = facts.models != models;
            if changed {
                facts.models = models;
                facts.version += 1;
            }
            changed
        });
    }

    /// Names of the other members, those that left not counted.
    pub fn company(&self) -> Vec<String> {
        let now = self.roster.now();
        let members = self.roster.lock();
        let staying = members.values().filter(|member| !matches!(member.watch.health(now), Health::Left { .. }));
        staying.map(|member| member.name.clone()).collect()
    }

    /// The port of the QUIC socket.
    pub fn port(&self) -> u16 {
        self.endpoint.local_addr().map_or(0, |address| address.port())
    }

    /// Our facts for one greeting, with everybody whom we know.
    fn greeting_facts(&self) -> NodeFacts {
        NodeFacts { members: self.roster.hints(), ..self.own_facts() }
    }

    fn hear_of_all(&self, hints: &[MemberHint]) {
        for hint in hints.iter().take(roster::MOST_MEMBERS) {
            self.roster.hear_of(hint);
        }
        self.redial.notify_one();
    }

    /// Another name for a member that is there already is a mistake that people must hear of.
    fn name_conflict(&self, name: &str, node: NodeId) -> Option<String> {
        let own = self.own.borrow();
        let taken = own.member.name == name || self.roster.holder_of_name(name, Some(node)).is_some();
        taken.then(|| format!("a node named `{name}` is in this cluster already; start this one with another --name"))
    }

    // -----------------------------------------------------------------------------------------------------------
    // Members of the last run

    fn peers_path(&self) -> PathBuf {
        self.state_dir.join(MEMBERS_FILE)
    }

    fn remembered(&self) -> Vec<MemberHint> {
        let own = self.identity.load().cluster;
        let file = read_members(&self.state_dir).filter(|file| file.cluster == own);
        file.map(|file| file.members).unwrap_or_default()
    }

    /// Stores who the members are, so that a node that reboots comes back by itself.
    pub fn remember(self: &Arc<Self>) {
        let mesh = self.clone();
        // fsync takes its time, and tasks that pulse must not wait for it.
        self.tasks.spawn_blocking(move || mesh.store_members());
    }

    fn store_members(&self) {
        let frozen = self.frozen.lock().unwrap_or_else(PoisonError::into_inner);
        if *frozen {
            return;
        }
        let file = MembersFile { cluster: self.identity.load().cluster, members: self.roster.hints() };
        let stored = serde_json::to_vec_pretty(&file)
            .map_err(std::io::Error::other)
            .and_then(|bytes| write_private(&self.peers_path(), &bytes));
        if let Err(error) = stored {
            tracing::warn!(%error, "the members could not be remembered");
        }
    }

    // -----------------------------------------------------------------------------------------------------------
    // Control plane

    /// Asks the member of this name to drain, or to take work again.
    pub async fn drain(&self, node: NodeId, request: DrainRequest) -> Result<DrainReply, String> {
        let control = self.control.get().ok_or("the control plane of this node does not run; see its log")?;
        let link = self.roster.link(node).ok_or("it is not connected now")?;
        control.drain(node, link.version, request).await
    }

    fn attach_control(&self, link: &PeerLink, send: quinn::SendStream, receive: quinn::RecvStream) {
        if let Some(control) = self.control.get() {
            control.attach(link.node, link.initiator != self.own_id(), send, receive);
        }
    }

    /// Sees every two seconds that the control actors of all peers answer.
    async fn probe_control(mesh: Arc<Self>) {
        let Some(control) = mesh.control.get() else { return std::future::pending().await };
        let mut ticks = tokio::time::interval(Duration::from_secs(2));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        // Connections that had no session the last time: a session takes a moment to come about.
        let mut lacked: HashSet<usize> = HashSet::new();
        loop {
            ticks.tick().await;
            for (node, answered) in control.probe_all(Duration::from_secs(1)).await {
                if let Some(member) = mesh.roster.lock().get_mut(&node) {
                    member.control_round_trip = answered;
                }
            }
            // Two connections that crossed can leave the one that stayed without its session.
            let links: Vec<PeerLink> = mesh.roster.lock().values().filter_map(|member| member.link.clone()).collect();
            let mut lacking = HashSet::new();
            for link in links.into_iter().filter(|link| !control.has_session(link.node)) {
                if let Some(member) = mesh.roster.lock().get_mut(&link.node) {
                    member.control_round_trip = None;
                }
                let connection = link.connection.stable_id();
                if link.initiator == mesh.own_id() && lacked.contains(&connection) {
                    link::open_control(mesh.clone(), link).await;
                } else {
                    lacking.insert(connection);
                }
            }
            lacked = lacking;
        }
    }

    // -----------------------------------------------------------------------------------------------------------
    // Renewal

    /// Full members renew their own certificate; guests ask a full member.
    async fn renew(mesh: Arc<Self>) {
        loop {
            let identity = mesh.identity();
            let now = OffsetDateTime::now_utc();
            if !identity.is_due_for_renewal(now) {
                tokio::time::sleep(identity.renewal_due_in(now).clamp(Duration::from_secs(1), HOUR)).await;
                continue;
            }
            match authority_stream::renewed(&mesh, &identity, now).await {
                Ok(fresh) => {
                    let adopting = mesh.clone();
                    // fsync takes its time, and tasks that pulse must not wait for it.
                    match tokio::task::spawn_blocking(move || adopting.adopt(fresh)).await {
                        Ok(Ok(())) => tracing::info!("certificate renewed"),
                        Ok(Err(error)) => tracing::error!(%error, "the renewed certificate cannot be used"),
                        Err(error) => std::panic::resume_unwind(error.into_panic()),
                    }
                }
                Err(error) => tracing::warn!(error, "the certificate is not renewed yet"),
            }
            tokio::time::sleep(Duration::from_secs(60)).await;
        }
    }

    /// Uses the identity from now on; standing connections go on with the old certificate.
    fn adopt(&self, identity: Identity) -> Result<(), IdentityError> {
        let tls = TlsConfigs::new(&identity, endpoint::transport())?;
        let frozen = self.frozen.lock().unwrap_or_else(PoisonError::into_inner);
        if *frozen {
            return Ok(());
        }
        identity.store(&self.state_dir)?;
        self.endpoint.set_server_config(Some(tls.server));
        self.client.store(Arc::new(tls.client));
        self.files_client.store(Arc::new(tls.files));
        self.identity.store(Arc::new(identity));
        Ok(())
    }
}

/// Where the members of the last run are kept, in the state directory.
pub const MEMBERS_FILE: &str = "members.json";

#[derive(serde::Serialize, serde::Deserialize)]
struct MembersFile {
    cluster: ingle_protocol::ClusterId,
    members: Vec<MemberHint>,
}

fn read_members(state_dir: &std::path::Path) -> Option<MembersFile> {
    let bytes = read_optional(&state_dir.join(MEMBERS_FILE)).ok()??;
    serde_json::from_slice(&bytes)
        .inspect_err(
            |error| tracing::warn!(%error, "the list of remembered members is damaged; they must be found again"),
        )
        .ok()
}

/// Names of the members of the last run in this cluster.
pub fn remembered_names(state_dir: &std::path::Path, cluster: ingle_protocol::ClusterId) -> Vec<String> {
    let file = read_members(state_dir).filter(|file| file.cluster == cluster);
    file.into_iter().flat_map(|file| file.members).map(|member| member.name).collect()
}

#[cfg(test)]
mod tests;

const HOUR: Duration = Duration::from_secs(3600);

/// Addresses under which other machines may reach a socket on `port`, the most promising first. `bound` is what the
/// socket was bound to: a particular address is the only one.
pub fn reachable_addresses(bound: SocketAddr) -> Vec<String> {
    if !bound.ip().is_unspecified() {
        return vec![bound.to_string()];
    }
    // A UDP socket that is connected sends nothing, but knows which of our addresses leads outwards.
    let outward = |local: &str, remote: &str| {
        let socket = std::net::UdpSocket::bind(local).ok()?;
        socket.connect(remote).ok()?;
        let ip = socket.local_addr().ok()?.ip();
        (!ip.is_loopback() && !ip.is_unspecified()).then(|| SocketAddr::new(ip, bound.port()).to_string())
    };
    // Documentation prefixes of RFC 5737 and RFC 3849: routed like any other, belonging to nobody.
    [outward("0.0.0.0:0", "192.0.2.1:9"), outward("[::]:0", "[2001:db8::1]:9")].into_iter().flatten().collect()
}
