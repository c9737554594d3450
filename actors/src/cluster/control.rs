//! The control plane: `ractor_cluster` sessions over our QUIC streams.
//!
//! Low rate only: a control actor per node, known to its peers through a process group. Its payloads are frames of
//! our wire module in one opaque bytes message, because ractor drops what it cannot decode without a word. An actor
//! does not know over which connection it is asked, so these frames are the same in all versions: they may be added
//! to, never changed, and a peer that is too old for one is not asked.
//! ractor_cluster's own TCP listener cannot be switched off: it listens on loopback behind TLS that refuses everybody.
//! Its cookie is no authentication: mutual TLS carries all trust, and a session whose name is not the node id of the
//! certificate is ended.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ingle_protocol::NodeId;
use ingle_protocol::wire::v2::{ControlProbe, DrainReply, DrainRequest};
use ingle_protocol::wire::{Body as _, Frame, Version, Versioned as _, WireError, encode};
use quinn::{RecvStream, SendStream};
use ractor::{Actor, ActorId, ActorProcessingErr, ActorRef, RpcReplyPort, pg};
use ractor_cluster::node::{NodeConnectionMode, NodeServerSessionInformation};
use ractor_cluster::{
    BoxRead, BoxWrite, ClusterBidiStream, IncomingEncryptionMode, NodeEventSubscription, NodeServer, NodeServerMessage,
    RactorClusterMessage,
};

use crate::worker::Workers;

/// The process group of all control actors.
const GROUP: &str = "ingle/control";
const MAX_FRAME: u64 = 1 << 20;

/// What control actors say to each other. Every payload is one whole frame of `protocol::wire`.
#[derive(RactorClusterMessage)]
pub enum ControlMessage {
    /// A question whose answer is awaited under a deadline.
    #[rpc]
    Ask(Vec<u8>, RpcReplyPort<Vec<u8>>),
}

struct ControlActor {
    workers: Arc<Workers>,
}

impl Actor for ControlActor {
    type Msg = ControlMessage;
    type State = ();
    type Arguments = ();

    async fn pre_start(&self, myself: ActorRef<Self::Msg>, (): ()) -> Result<(), ActorProcessingErr> {
        pg::join(GROUP.to_owned(), vec![myself.get_cell()]);
        Ok(())
    }

    async fn handle(&self, _: ActorRef<Self::Msg>, message: Self::Msg, (): &mut ()) -> Result<(), ActorProcessingErr> {
        let ControlMessage::Ask(bytes, reply) = message;
        let frame = match Frame::from_bytes(&bytes, Version::NEWEST) {
            Ok(frame) => frame,
            Err(error) => {
                tracing::warn!(%error, "a control message that is no frame");
                return Ok(());
            }
        };
        // An answer that nobody waits for any more is no error of ours.
        match frame.kind {
            ControlProbe::KIND => drop(reply.send(bytes)),
            DrainRequest::KIND => match frame.decode::<DrainRequest>() {
                Ok(request) => {
                    // The actor goes on: a drain takes its time, and the probes of others must not wait for it.
                    let workers = self.workers.clone();
                    tokio::spawn(async move {
                        let (running, moved) = carry_out(&workers, request).await;
                        if let Ok(frame) = encode(&DrainReply { running, moved }) {
                            let _ = reply.send(frame.to_bytes().to_vec());
                        }
                    });
                }
                Err(error) => tracing::warn!(%error, "a drain that does not decode"),
            },
            kind => tracing::warn!(kind, "a control message of a kind that is not known"),
        }
        Ok(())
    }
}

/// The longest time that a drain may be given.
const LONGEST_DRAIN: Duration = Duration::from_secs(3_600);

/// Drains this node's workers, or takes that back.
pub(crate) async fn carry_out(workers: &Workers, request: DrainRequest) -> (u32, u32) {
    if request.undo {
        workers.undo_drain();
        return (workers.running(), 0);
    }
    workers.drain_within(Duration::from_millis(request.limit_ms).min(LONGEST_DRAIN)).await
}

/// Sessions of the node server by their number, as the actors' ids name it.
type Sessions = Arc<Mutex<HashMap<u64, NodeId>>>;

/// Keeps the map of sessions, and ends those that lie about who they are.
struct SessionWatch {
    sessions: Sessions,
}

impl SessionWatch {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<u64, NodeId>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl NodeEventSubscription for SessionWatch {
    fn node_session_opened(&self, _: NodeServerSessionInformation) {}

    fn node_session_disconnected(&self, session: NodeServerSessionInformation) {
        self.lock().remove(&session.node_id);
    }

    fn node_session_authenticated(&self, session: NodeServerSessionInformation) {
        // The label of our stream is the certified node id: see `attach`.
        let certified = session.peer_addr.parse::<NodeId>().ok();
        let claimed = session.peer_name.as_ref().and_then(|name| name.name.split('@').next()?.parse::<NodeId>().ok());
        match certified {
            Some(node) if claimed == certified => {
                self.lock().insert(session.node_id, node);
            }
            _ => {
                tracing::error!(?certified, ?claimed, "a control session under a false name is ended");
                session.actor.stop(Some("the name is not the certificate's".into()));
            }
        }
    }
}

/// This node's part of the control plane.
pub struct ControlPlane {
    server: ActorRef<NodeServerMessage>,
    actor: ActorRef<ControlMessage>,
    sessions: Sessions,
}

impl std::fmt::Debug for ControlPlane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ControlPlane").field("sessions", &self.sessions).finish_non_exhaustive()
    }
}

impl ControlPlane {
    /// Starts the node server and the control actor.
    pub async fn start(own: NodeId, workers: Arc<Workers>) -> Result<Self, ractor::SpawnErr> {
        let server = NodeServer::new(
            0,
            "mutual TLS carries the trust".into(),
            own.to_string(),
            // Also the host's name: two nodes with one are taken for the same where their ports happen to be equal.
            own.to_string(),
            Some(IncomingEncryptionMode::Tls(refuse_everybody())),
            Some(NodeConnectionMode::Isolated),
        )
        .with_listen_addr(IpAddr::V4(Ipv4Addr::LOCALHOST))
        .with_max_inbound_frame_size(MAX_FRAME);
        let (server, _) = Actor::spawn(None, server, ()).await?;
        let sessions = Sessions::default();
        let subscription = Box::new(SessionWatch { sessions: sessions.clone() });
        // The server was spawned a moment ago: it takes messages.
        let _ = server.cast(NodeServerMessage::SubscribeToEvents { id: "sessions".into(), subscription });
        let (actor, _) = Actor::spawn(None, ControlActor { workers }, ()).await?;
        Ok(Self { server, actor, sessions })
    }

    /// Hands a QUIC stream to the peer `node` (by its certificate) over to the actors.
    pub fn attach(&self, node: NodeId, is_server: bool, send: SendStream, receive: RecvStream) {
        let stream = Box::new(ControlStream { node, send, receive });
        let _ = self.server.cast(NodeServerMessage::ConnectionOpenedExternal { stream, is_server });
    }

    /// A session with the peer stands.
    pub fn has_session(&self, node: NodeId) -> bool {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner).values().any(|peer| *peer == node)
    }

    /// The control actors of all peers.
    fn peers(&self) -> Vec<(NodeId, ActorRef<ControlMessage>)> {
        let sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        pg::get_members(&GROUP.to_owned())
            .into_iter()
            .filter_map(|cell| match cell.get_id() {
                ActorId::Remote { node_id, .. } => Some((*sessions.get(&node_id)?, cell.into())),
                ActorId::Local(_) => None,
            })
            .collect()
    }

    /// Asks a peer that speaks `version` to drain. Answers when it has, or why it did not.
    pub async fn drain(&self, node: NodeId, version: Version, request: DrainRequest) -> Result<DrainReply, String> {
        let frame = request.encode_for(version).map_err(|error| match error {
            WireError::NotInVersion { .. } => {
                "its Ingle is too old for that. Update it, or end it there: it finishes its answers first".to_owned()
            }
            other => other.to_string(),
        })?;
        let peer = self.peers().into_iter().find(|(peer, _)| *peer == node);
        let (_, peer) = peer.ok_or("it is not reached over the control plane now")?;
        let bytes = frame.to_bytes().to_vec();
        let deadline = Duration::from_millis(request.limit_ms).min(LONGEST_DRAIN) + Duration::from_secs(5);
        // Never `call!`: without a deadline a call to a dead port does not return.
        let answer = ractor::call_t!(peer, ControlMessage::Ask, deadline.as_millis() as u64, bytes);
        let answer = answer.map_err(|error| format!("it gave no answer: {error}"))?;
        Frame::from_bytes(&answer, Version::NEWEST).and_then(|frame| frame.decode()).map_err(|error| error.to_string())
    }

    /// Asks the control actors of all peers for a sign of life. `None` for those that do not give one in time.
    pub async fn probe_all(&self, deadline: Duration) -> Vec<(NodeId, Option<Duration>)> {
        let peers = self.peers();
        let mut answers = Vec::with_capacity(peers.len());
        for (node, peer) in peers {
            answers.push((node, Self::probe(&peer, deadline).await));
        }
        answers
    }

    async fn probe(peer: &ActorRef<ControlMessage>, deadline: Duration) -> Option<Duration> {
        let probe = ControlProbe { nonce: rand::random() };
        let bytes = encode(&probe).ok()?.to_bytes().to_vec();
        let asked = Instant::now();
        // Never `call!`: without a deadline a call to a dead port does not return.
        let answer = ractor::call_t!(peer, ControlMessage::Ask, deadline.as_millis() as u64, bytes).ok()?;
        let answered: ControlProbe = Frame::from_bytes(&answer, Version::NEWEST).ok()?.decode().ok()?;
        (answered == probe).then(|| asked.elapsed())
    }

    /// Ends the actors.
    pub async fn stop(&self) {
        let limit = Some(Duration::from_secs(1));
        let _ = self.actor.stop_and_wait(None, limit).await;
        let _ = self.server.stop_and_wait(None, limit).await;
    }
}

/// TLS for the listener that must exist and must let nobody in: it has no certificate to show.
fn refuse_everybody() -> tokio_rustls::TlsAcceptor {
    let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map(|builder| builder.with_no_client_auth().with_cert_resolver(Arc::new(NoCertificate)));
    match config {
        Ok(config) => tokio_rustls::TlsAcceptor::from(Arc::new(config)),
        // ring speaks every version that rustls asks for.
        Err(error) => unreachable!("ring without TLS versions: {error}"),
    }
}

#[derive(Debug)]
struct NoCertificate;

impl rustls::server::ResolvesServerCert for NoCertificate {
    fn resolve(&self, _: rustls::server::ClientHello<'_>) -> Option<Arc<rustls::sign::CertifiedKey>> {
        None
    }
}

/// A QUIC stream as ractor_cluster wants it.
struct ControlStream {
    node: NodeId,
    send: SendStream,
    receive: RecvStream,
}

impl ClusterBidiStream for ControlStream {
    fn split(self: Box<Self>) -> (BoxRead, BoxWrite) {
        (Box::new(self.receive), Box::new(self.send))
    }

    fn peer_label(&self) -> Option<String> {
        Some(self.node.to_string())
    }
}
