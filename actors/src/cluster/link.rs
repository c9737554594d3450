//! One connection to one member, and the streams that live as long as it does.

use std::sync::Arc;
use std::time::Duration;

use ingle_protocol::NodeId;
use ingle_protocol::liveness::PULSE_INTERVAL;
use ingle_protocol::wire::v2::{Capability, Goodbye, HeldFiles, NodeFacts, Pulse, RegistryEntry};
use ingle_protocol::wire::{Body as _, StreamKind, Version, Versioned as _, WireError};
use quinn::{Connection, RecvStream, SendStream, VarInt};
use tokio::io::AsyncReadExt;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{Mesh, authority_stream, inference};
use crate::frames::{FrameError, read_body_in, read_frame_in, write_body_in};
use crate::identity::{CertifiedName, Membership};

/// How long a peer may take to say what a stream is for.
pub const STREAM_DEADLINE: Duration = Duration::from_secs(5);
/// How long a goodbye may take.
const GOODBYE_DEADLINE: Duration = Duration::from_millis(300);
/// How long a retired connection still takes new requests.
const RETIREMENT_GRACE: Duration = Duration::from_secs(1);
/// Why a connection is closed that has another one beside it.
pub const REPLACED: &str = "replaced by another connection";

/// A greeted connection to a member.
#[derive(Debug, Clone)]
pub struct PeerLink {
    /// The member, by its certificate.
    pub node: NodeId,
    /// Every frame on the connection is of this version.
    pub version: Version,
    /// Which run of it.
    pub incarnation: u64,
    /// The node that opened the connection.
    pub initiator: NodeId,
    /// What the member may do, by its certificate.
    pub membership: Membership,
    /// The connection.
    pub connection: Connection,
    /// Requests on it, in both directions.
    pub requests: TaskTracker,
    retired: CancellationToken,
}

impl PeerLink {
    /// A connection that `initiator` opened to or from the run `incarnation` of `peer`.
    pub fn new(
        peer: CertifiedName,
        version: Version,
        incarnation: u64,
        initiator: NodeId,
        connection: Connection,
    ) -> Self {
        let (requests, retired) = (TaskTracker::new(), CancellationToken::new());
        let CertifiedName { node, membership } = peer;
        Self { node, version, incarnation, initiator, membership, connection, requests, retired }
    }

    /// Another connection to the same run of the node takes its place: this one ends when its requests have.
    pub fn retire(&self) {
        self.retired.cancel();
    }

    async fn close_when_retired(&self) {
        self.retired.cancelled().await;
        // The other side may not know yet, and open one more.
        tokio::time::sleep(RETIREMENT_GRACE).await;
        self.requests.close();
        self.requests.wait().await;
        self.close(REPLACED);
    }

    /// Ends the connection and says why.
    pub fn close(&self, why: &str) {
        self.connection.close(VarInt::from_u32(0), why.as_bytes());
    }
}

/// Opens a stream of a kind under a deadline (at the peer's limit quinn would wait in a queue that nobody sees).
pub async fn open_stream(
    connection: &Connection,
    kind: StreamKind,
    deadline: Duration,
) -> Result<(SendStream, RecvStream), FrameError> {
    let opening = async {
        let (mut send, receive) = open_unnamed(connection, deadline).await?;
        send.write_all(&[kind as u8]).await.map_err(std::io::Error::from)?;
        Ok((send, receive))
    };
    timeout(deadline, opening).await.unwrap_or_else(|_| Err(no_stream()))
}

/// A stream whose first byte the caller writes, together with what follows.
pub async fn open_unnamed(connection: &Connection, deadline: Duration) -> Result<(SendStream, RecvStream), FrameError> {
    match timeout(deadline, connection.open_bi()).await {
        Ok(opened) => Ok(opened.map_err(std::io::Error::from)?),
        Err(_) => Err(no_stream()),
    }
}

fn no_stream() -> FrameError {
    FrameError::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, "no free stream to the peer in time"))
}

/// Runs everything that belongs to a registered link until the connection or the mesh ends.
/// `membership` is the stream that the greeting came over.
pub async fn run(mesh: Arc<Mesh>, link: PeerLink, peer: CertifiedName, membership: (SendStream, RecvStream)) {
    let cancel = mesh.cancel.child_token();
    let (node, connection) = (link.node, link.connection.clone());
    tracing::info!(peer = %node, address = %connection.remote_address(), "connected");
    let (send, receive) = membership;
    let tasks = &mesh.tasks;
    tasks.spawn(guarded(cancel.clone(), send_facts(mesh.clone(), send, link.clone(), cancel.clone())));
    tasks.spawn(guarded(cancel.clone(), receive_facts(mesh.clone(), receive, link.clone())));
    tasks.spawn(guarded(cancel.clone(), send_pulses(mesh.clone(), link.clone())));
    tasks.spawn(guarded(cancel.clone(), accept_pulses(mesh.clone(), link.clone())));
    tasks.spawn(guarded(cancel.clone(), accept_streams(mesh.clone(), link.clone(), peer, cancel.clone())));
    if link.initiator == mesh.own_id() {
        tasks.spawn(guarded(cancel.clone(), open_control(mesh.clone(), link.clone())));
    }
    let reason = tokio::select! {
        reason = connection.closed() => describe(&reason),
        () = link.close_when_retired() => REPLACED.to_owned(),
        () = mesh.cancel.cancelled() => {
            // The facts task says goodbye; what it sends needs a moment to leave.
            let _ = timeout(GOODBYE_DEADLINE, connection.closed()).await;
            link.close("the node leaves");
            "this node left".to_owned()
        }
    };
    cancel.cancel();
    tracing::info!(peer = %node, reason, "disconnected");
    mesh.roster.lost(node, connection.stable_id(), &reason);
    mesh.redial.notify_one();
}

async fn guarded(cancel: CancellationToken, task: impl Future<Output = ()>) {
    tokio::select! {
        biased;
        () = task => {}
        // A grace for the goodbye; the connection's end stops the rest.
        () = async { cancel.cancelled().await; tokio::time::sleep(GOODBYE_DEADLINE).await } => {}
    }
}

/// Why a connection ended, in words for `status`.
pub fn describe(error: &quinn::ConnectionError) -> String {
    match error {
        quinn::ConnectionError::TimedOut => "it went silent".into(),
        quinn::ConnectionError::Reset => "it restarted".into(),
        quinn::ConnectionError::ApplicationClosed(close) if !close.reason.is_empty() => {
            String::from_utf8_lossy(&close.reason).into_owned()
        }
        quinn::ConnectionError::LocallyClosed => "this node closed the connection".into(),
        other => other.to_string(),
    }
}

/// Our facts and the registry's entries whenever they change, a goodbye at the end.
async fn send_facts(mesh: Arc<Mesh>, mut send: SendStream, link: PeerLink, cancel: CancellationToken) {
    let mut facts = mesh.own.subscribe();
    // Once in any case: they may have changed since the greeting was written.
    facts.mark_changed();
    let mut files = mesh.share.held();
    files.mark_changed();
    let takes_files = HeldFiles::default().encode_for(link.version).is_ok();
    let mut capability = mesh.workers.capability();
    capability.mark_changed();
    let takes_capability = link.version.limit_of(Capability::KIND).is_some();
    let mut registry = mesh.registry.changes();
    registry.mark_changed();
    // A peer that is too old for the registry has no part in it.
    let takes_entries = link.version.limit_of(RegistryEntry::KIND).is_some();
    let mut told = 0;
    loop {
        tokio::select! {
            changed = files.changed(), if takes_files => {
                let held = files.borrow_and_update().clone();
                if changed.is_err() || write_body_in(link.version, &mut send, &held).await.is_err() {
                    return;
                }
            }
            changed = capability.changed(), if takes_capability => {
                let could = *capability.borrow_and_update();
                if changed.is_err() || write_body_in(link.version, &mut send, &could).await.is_err() {
                    return;
                }
            }
            changed = facts.changed() => {
                if changed.is_err() {
                    return;
                }
                let latest = facts.borrow_and_update().clone();
                if write_body_in(link.version, &mut send, &latest).await.is_err() {
                    return;
                }
            }
            changed = registry.changed(), if takes_entries => {
                if changed.is_err() {
                    return;
                }
                registry.mark_unchanged();
                let (version, entries) = mesh.registry.since(told);
                told = version;
                for entry in entries {
                    match write_body_in(link.version, &mut send, &entry).await {
                        Ok(()) => {}
                        // One that is too long for its frame: the others are not.
                        Err(FrameError::Wire(error)) => tracing::error!(%error, "an entry of the registry is not sent"),
                        Err(_) => return,
                    }
                }
            }
            () = cancel.cancelled() => {
                let why = mesh.leaving.get().cloned().unwrap_or_else(|| "it was stopped".into());
                let _ = timeout(GOODBYE_DEADLINE, async {
                    write_body_in(link.version, &mut send, &Goodbye { why }).await?;
                    let _ = send.finish();
                    let _ = send.stopped().await;
                    Ok::<_, FrameError>(())
                })
                .await;
                link.close("it left");
                return;
            }
        }
    }
}

async fn receive_facts(mesh: Arc<Mesh>, mut receive: RecvStream, link: PeerLink) {
    loop {
        let frame = match read_frame_in(link.version, &mut receive).await {
            Ok(Some(frame)) => frame,
            Ok(None) => return,
            Err(error @ FrameError::Wire(_)) => return link.close(&error.to_string()),
            Err(_) => return,
        };
        let accepted = match frame.kind {
            NodeFacts::KIND => NodeFacts::decode_for(&frame, link.version).map(|facts| {
                // Each node speaks for itself alone.
                if facts.member.node == link.node {
                    mesh.hear_of_all(&facts.members);
                    mesh.roster.update(link.node, facts);
                }
            }),
            HeldFiles::KIND => HeldFiles::decode_for(&frame, link.version).map(|held| {
                mesh.roster.holds(link.node, link.connection.stable_id(), held);
            }),
            Capability::KIND => Capability::decode_for(&frame, link.version).map(|capability| {
                mesh.roster.could(link.node, link.connection.stable_id(), capability);
            }),
            Goodbye::KIND => Goodbye::decode_for(&frame, link.version).map(|goodbye| {
                mesh.roster.left(link.node, link.connection.stable_id(), &goodbye.why);
            }),
            RegistryEntry::KIND => {
                RegistryEntry::decode_for(&frame, link.version).map(|entry| mesh.registry.receive(link.node, &entry))
            }
            got => Err(WireError::Unexpected { expected: "facts, an entry of the registry or a goodbye", got }),
        };
        if let Err(error) = accepted {
            return link.close(&error.to_string());
        }
    }
}

async fn send_pulses(mesh: Arc<Mesh>, link: PeerLink) {
    let Ok(mut send) = link.connection.open_uni().await else { return };
    // Pulses go before everything else on the connection.
    let _ = send.set_priority(1);
    if send.write_all(&[StreamKind::Pulse as u8]).await.is_err() {
        return;
    }
    let mut ticks = interval(PULSE_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    for sequence in 0.. {
        ticks.tick().await;
        let pulse = Pulse { sequence, engines: mesh.workers.pulses(mesh.own_id()) };
        if write_body_in(link.version, &mut send, &pulse).await.is_err() {
            return;
        }
    }
}

async fn accept_pulses(mesh: Arc<Mesh>, link: PeerLink) {
    while let Ok(mut receive) = link.connection.accept_uni().await {
        match timeout(STREAM_DEADLINE, receive.read_u8()).await {
            Ok(Ok(byte)) if byte == StreamKind::Pulse as u8 => {}
            _ => continue,
        }
        while let Ok(pulse) = read_body_in::<Pulse, _>(link.version, &mut receive).await {
            mesh.roster.pulse(link.node, link.connection.stable_id(), pulse);
        }
    }
}

async fn accept_streams(mesh: Arc<Mesh>, link: PeerLink, peer: CertifiedName, cancel: CancellationToken) {
    while let Ok((send, mut receive)) = link.connection.accept_bi().await {
        let (mesh, link, cancel) = (mesh.clone(), link.clone(), cancel.clone());
        mesh.tasks.clone().spawn(async move {
            let kind = match timeout(STREAM_DEADLINE, receive.read_u8()).await {
                Ok(Ok(byte)) => StreamKind::try_from(byte),
                _ => return,
            };
            match kind {
                Ok(StreamKind::Inference) => {
                    let _request = link.requests.token();
                    inference::serve(mesh, link.version, send, receive).await;
                }
                Ok(StreamKind::Control) => mesh.attach_control(&link, send, receive),
                Ok(StreamKind::Authority) => {
                    let _ = timeout(STREAM_DEADLINE, authority_stream::serve(&mesh, peer, link.version, send, receive))
                        .await;
                }
                Ok(StreamKind::Membership | StreamKind::Pulse) | Err(_) => {
                    // A protocol error of a member: better loud than half-understood.
                    tracing::warn!(peer = %link.node, ?kind, "unexpected stream");
                    link.close("a stream of a kind that is not expected here");
                    cancel.cancel();
                }
            }
        });
    }
}

/// Opens the stream of the control plane. Only the side that opened the connection does, or there would be two.
pub(super) async fn open_control(mesh: Arc<Mesh>, link: PeerLink) {
    match open_stream(&link.connection, StreamKind::Control, STREAM_DEADLINE).await {
        Ok((send, receive)) => mesh.attach_control(&link, send, receive),
        Err(error) => tracing::warn!(peer = %link.node, %error, "no control stream"),
    }
}
