//! Connections that come in: members, and machines that want to become members.

use std::sync::Arc;
use std::time::Duration;

use ingle_protocol::wire::v2::{Hello, NotWelcome, Welcome};
use ingle_protocol::wire::{FILES_ALPN, JOIN_ALPN, StreamKind, Version};
use quinn::{Connection, Incoming, VarInt};
use rustls::pki_types::CertificateDer;
use tokio::io::AsyncReadExt;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::link::{self, PeerLink};
use super::roster::Registered;
use super::{Mesh, authority_stream, files, join, plain};
use crate::frames::{FrameError, read_body_in, write_body_in};
use crate::identity::{CertifiedName, read_names};

/// How long a handshake with its greeting may take.
const GREETING_DEADLINE: Duration = Duration::from_secs(3);
/// Handshakes at a time; more are refused, so that strangers cannot keep us busy.
const MOST_HANDSHAKES: usize = 32;

/// Accepts until the mesh ends.
pub async fn run(mesh: Arc<Mesh>) {
    let handshakes = Arc::new(Semaphore::new(MOST_HANDSHAKES));
    let joiners = Arc::new(Semaphore::new(MOST_JOINERS));
    while let Some(incoming) = mesh.endpoint.accept().await {
        let Ok(permit) = handshakes.clone().try_acquire_owned() else {
            incoming.refuse();
            continue;
        };
        let (mesh, joiners) = (mesh.clone(), joiners.clone());
        mesh.tasks.clone().spawn(async move {
            let address = plain(incoming.remote_address());
            match timeout(GREETING_DEADLINE, welcome(&mesh, incoming, &joiners)).await {
                Ok(Ok(Some(session))) => {
                    drop(permit);
                    session.run(mesh).await;
                }
                Ok(Ok(None)) => {}
                Ok(Err(error)) => tracing::info!(%address, error, "a connection was not accepted"),
                Err(_) => tracing::info!(%address, "a connection was not greeted in time"),
            }
        });
    }
}

/// Machines that join at a time. Anybody can knock there, so they have few places, which members do not need.
const MOST_JOINERS: usize = 8;

/// A connection that is through with its greeting.
pub(super) struct Session {
    pub link: PeerLink,
    pub peer: CertifiedName,
    pub membership: (quinn::SendStream, quinn::RecvStream),
}

impl Session {
    pub async fn run(self, mesh: Arc<Mesh>) {
        mesh.remember();
        link::run(mesh, self.link, self.peer, self.membership).await;
    }
}

/// The names in the verified certificate of the other side.
pub(super) fn certified_peer(connection: &Connection) -> Option<CertifiedName> {
    let certificates = connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    read_names(certificates.first()?)
}

/// The application protocol that the two sides agreed on.
fn alpn(connection: &Connection) -> Option<Vec<u8>> {
    connection.handshake_data()?.downcast::<quinn::crypto::rustls::HandshakeData>().ok()?.protocol
}

/// The version of the frames on a connection between members.
pub(super) fn agreed_version(connection: &Connection) -> Option<Version> {
    Version::of_alpn(&alpn(connection)?)
}

async fn welcome(mesh: &Arc<Mesh>, incoming: Incoming, joiners: &Arc<Semaphore>) -> Result<Option<Session>, String> {
    let connection = incoming.await.map_err(|error| error.to_string())?;
    let refuse = |why: &str| {
        connection.close(VarInt::from_u32(1), why.as_bytes());
        Err(why.to_owned())
    };
    if alpn(&connection).as_deref() == Some(JOIN_ALPN) {
        let Ok(place) = joiners.clone().try_acquire_owned() else { return refuse("too many machines want to join") };
        let mesh = mesh.clone();
        mesh.tasks.clone().spawn(async move {
            join::serve(&mesh, connection).await;
            drop(place);
        });
        return Ok(None);
    }
    // TLS lets machines without a certificate pass because of joiners; here they end, before a byte is read.
    let Some(peer) = certified_peer(&connection) else { return refuse("no certificate of this cluster") };
    if alpn(&connection).as_deref() == Some(FILES_ALPN) {
        let Ok(place) = mesh.share.copier() else { return refuse("too many machines copy files from here") };
        mesh.tasks.spawn(files::serve(mesh.clone(), connection, peer, place));
        return Ok(None);
    }
    let Some(version) = agreed_version(&connection) else { return refuse("no version of the protocol is agreed on") };
    let opening = async {
        let (send, mut receive) = connection.accept_bi().await.map_err(std::io::Error::from)?;
        let kind = StreamKind::try_from(receive.read_u8().await?)?;
        Ok::<_, FrameError>((kind, send, receive))
    };
    let (kind, mut send, mut receive) = opening.await.map_err(|error| error.to_string())?;
    match kind {
        StreamKind::Membership => {}
        // A machine that just joined fetches the authority's key before it greets anybody.
        StreamKind::Authority => {
            authority_stream::serve(mesh, peer, version, send, receive).await.map_err(|error| error.to_string())?;
            return Ok(None);
        }
        _ => return refuse("the first stream must be a greeting"),
    }
    let hello = read_body_in::<Hello, _>(version, &mut receive).await.map_err(|error| error.to_string())?;
    let facts = hello.facts;
    let objection = if hello.cluster != mesh.identity().cluster {
        Some("this is another cluster".to_owned())
    } else if facts.member.node != peer.node {
        Some("the greeting's node id is not the certificate's".to_owned())
    } else if peer.node == mesh.own_id() {
        Some("this is the node itself".to_owned())
    } else if !join::is_valid_name(&facts.member.name) {
        Some("that is no name for a node".to_owned())
    } else {
        mesh.name_conflict(&facts.member.name, peer.node)
    };
    if let Some(why) = objection {
        let _ = write_body_in(version, &mut send, &NotWelcome { why: why.clone(), duplicate: false }).await;
        let _ = send.finish();
        let _ = send.stopped().await;
        return refuse(&why);
    }
    let link = PeerLink::new(peer, version, facts.incarnation, peer.node, connection.clone());
    mesh.hear_of_all(&facts.members);
    if mesh.roster.register(link.clone(), facts) == Registered::Duplicate {
        let _ =
            write_body_in(version, &mut send, &NotWelcome { why: "connected already".into(), duplicate: true }).await;
        let _ = send.finish();
        let _ = send.stopped().await;
        return refuse("connected already");
    }
    let observed = plain(connection.remote_address()).to_string();
    let welcome = Welcome { facts: mesh.greeting_facts(), observed: observed.clone() };
    if let Err(error) = write_body_in(version, &mut send, &welcome).await {
        mesh.roster.lost(peer.node, connection.stable_id(), "the connection broke while it was greeted");
        return Err(error.to_string());
    }
    // All traffic of a node goes through one socket, so where it came from is where it can be reached.
    if let Some(member) = mesh.roster.lock().get_mut(&peer.node) {
        member.prefer_address(&observed);
    }
    Ok(Some(Session { link, peer, membership: (send, receive) }))
}
