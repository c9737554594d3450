//! The way in: a machine with a token becomes a member (the shape of k3s and kubeadm).
//!
//! The joiner knows the authority by the hash in its token, proves that it knows the token's secret by an HMAC bound
//! to this TLS session, and gets a certificate whose id the signer chose. The secret never crosses the wire.

use std::sync::Arc;
use std::time::Duration;

use ingle_protocol::NodeId;
use ingle_protocol::wire::v2::{JoinGranted, JoinRefusalKind, JoinRefused, JoinRequest, MemberHint};
use ingle_protocol::wire::{Body as _, Version, Versioned as _, WireError};
use quinn::{Connection, VarInt};
use rand::Rng;
use rcgen::KeyPair;
use rustls::pki_types::CertificateDer;
use time::OffsetDateTime;
use tokio::time::timeout;

use super::accept::certified_peer;
use super::dial::resolve;
use super::{Mesh, authority_stream, endpoint, reachable_addresses};
use crate::frames::{FrameError, read_body_in, read_frame_in, write_body_in};
use crate::identity::{
    Authority, Identity, JoinToken, Membership, RedeemError, SERVER_NAME, TlsConfigs, join_proof, joiner_config,
    signing_request,
};

const EXPORTER_LABEL: &[u8] = b"EXPORTER-ingle-join-1";
/// How long each step of a join may take.
const STEP_DEADLINE: Duration = Duration::from_secs(5);
/// How long the signer may take to decide: it writes to its disk, and a busy one can stand still for seconds.
const DECISION_DEADLINE: Duration = Duration::from_secs(20);
/// Clocks further apart are refused: certificates are backdated by an hour only.
const CLOCK_TOLERANCE: Duration = Duration::from_secs(30 * 60);

/// Why a machine did not get in, with what to do.
#[derive(Debug, thiserror::Error)]
pub enum JoinFailure {
    /// Nobody answers there.
    #[error(
        "no Ingle node answers at {address} ({why}). Is it running (`ingle up`), and does its firewall let UDP through?"
    )]
    Unreachable {
        /// Where.
        address: String,
        /// What happened.
        why: String,
    },
    /// Somebody else answers.
    #[error(
        "the node at {address} does not belong to the cluster that this token is for. Check the address, or print a token there."
    )]
    Foreign {
        /// Where.
        address: String,
    },
    /// A member of the right cluster, but not the one that knows the token.
    #[error(
        "the token was printed by another node than the one at {address}. Join that one, or print a token on this one."
    )]
    OtherIssuer {
        /// Where.
        address: String,
    },
    /// The clocks differ.
    #[error("the clocks of this machine and of {address} are too far apart ({why}). Set them right and try again.")]
    Clock {
        /// Where.
        address: String,
        /// What TLS or the node said.
        why: String,
    },
    /// The node said no.
    #[error("{0}")]
    Refused(String),
    /// Something broke on the way.
    #[error("joining {address} broke off: {why}. The token may be used up: print a new one with `ingle token`.")]
    Broken {
        /// Where.
        address: String,
        /// What happened.
        why: String,
    },
}

/// What a machine gets.
#[derive(Debug)]
pub struct Admission {
    /// Its identity in the cluster; not stored yet.
    pub identity: Identity,
    /// Whom to connect to.
    pub members: Vec<MemberHint>,
}

/// Joins the cluster of the node at `address`.
pub async fn join(address: &str, token: &JoinToken, name: &str, guest: bool) -> Result<Admission, JoinFailure> {
    let broken = |why: String| JoinFailure::Broken { address: address.into(), why };
    let unreachable = |why: String| JoinFailure::Unreachable { address: address.into(), why };
    let targets = resolve(address).await.map_err(unreachable)?;
    let any = "[::]:0".parse().map_err(|_| broken("no local address".into()))?;
    let socket = endpoint::bind(any).map_err(|error| broken(error.to_string()))?;
    let config = joiner_config(token.authority_hash).map_err(|error| broken(error.to_string()))?;

    let mut reached = Err(unreachable("the name has no address".into()));
    for target in targets {
        reached = connect(&socket, config.clone(), target, address).await.map(|connection| (connection, target));
        if !matches!(reached, Err(JoinFailure::Unreachable { .. })) {
            break;
        }
    }
    let (connection, target) = reached?;
    if certified_peer(&connection).map(|peer| peer.node) != Some(token.issuer) {
        connection.close(VarInt::from_u32(0), b"another node than the token's");
        return Err(JoinFailure::OtherIssuer { address: address.into() });
    }

    let key = KeyPair::generate().map_err(|error| broken(error.to_string()))?;
    let csr = signing_request(&key).map_err(|error| broken(error.to_string()))?;
    let now = OffsetDateTime::now_utc();
    let asking = ask(&connection, token, csr, name, guest, now);
    let granted = match timeout(DECISION_DEADLINE + STEP_DEADLINE, asking).await {
        Ok(Ok(Ok(granted))) => granted,
        Ok(Ok(Err(refused))) if refused.kind == JoinRefusalKind::Clock => {
            return Err(JoinFailure::Clock { address: address.into(), why: refused.message });
        }
        Ok(Ok(Err(refused))) => return Err(JoinFailure::Refused(refused.message)),
        Ok(Err(error)) => return Err(broken(error.to_string())),
        Err(_) => return Err(broken("no answer in time".into())),
    };
    connection.close(VarInt::from_u32(0), b"joined");

    let authority = CertificateDer::from(granted.authority);
    if Authority::fingerprint(&authority) != token.authority_hash {
        return Err(broken("the node sent another authority than the token's".into()));
    }
    let certificate = CertificateDer::from(granted.certificate);
    let assemble = |authority_key| {
        Identity::assemble(authority.clone(), authority_key, certificate.clone(), key.serialize_der(), name, now)
            .map_err(|error| broken(error.to_string()))
    };
    let mut identity = assemble(None)?;
    if !guest {
        // With the new certificate, and so over mutual TLS.
        let tls = TlsConfigs::new(&identity, endpoint::transport()).map_err(|error| broken(error.to_string()))?;
        let member = connect(&socket, tls.client, target, address).await?;
        if certified_peer(&member).map(|peer| peer.node) != Some(token.issuer) {
            return Err(broken("another node answered the second time".into()));
        }
        let authority_key = authority_stream::fetch_key(&member).await.map_err(broken)?;
        member.close(VarInt::from_u32(0), b"done");
        identity = assemble(Some(authority_key))?;
    }
    identity.verify().map_err(|error| broken(format!("what the node sent does not fit together: {error}")))?;
    let mut members = granted.members;
    if let Some(issuer) = members.iter_mut().find(|member| member.node == token.issuer) {
        // The address that worked is the best one.
        issuer.addresses.retain(|known| known != address);
        issuer.addresses.insert(0, target.to_string());
    }
    let _ = timeout(Duration::from_millis(500), socket.wait_idle()).await;
    Ok(Admission { identity, members })
}

async fn connect(
    socket: &quinn::Endpoint,
    config: quinn::ClientConfig,
    target: std::net::SocketAddr,
    address: &str,
) -> Result<Connection, JoinFailure> {
    let unreachable = |why: String| JoinFailure::Unreachable { address: address.into(), why };
    let connecting =
        socket.connect_with(config, target, SERVER_NAME).map_err(|error| unreachable(error.to_string()))?;
    match timeout(STEP_DEADLINE, connecting).await {
        Ok(Ok(connection)) => Ok(connection),
        Ok(Err(error)) => {
            let why = error.to_string();
            // rustls' verdict reaches us as text only.
            Err(if why.contains("NotValidYet") || why.contains("not valid yet") || why.contains("xpired") {
                JoinFailure::Clock { address: address.into(), why }
            } else if why.contains("certificate") || why.contains("UnknownIssuer") || why.contains("UnknownCA") {
                JoinFailure::Foreign { address: address.into() }
            } else {
                unreachable(why)
            })
        }
        Err(_) => Err(unreachable("no answer in time".into())),
    }
}

async fn ask(
    connection: &Connection,
    token: &JoinToken,
    csr: Vec<u8>,
    name: &str,
    guest: bool,
    now: OffsetDateTime,
) -> Result<Result<JoinGranted, JoinRefused>, FrameError> {
    let exporter = exporter(connection)?;
    let request = JoinRequest {
        token_id: token.id,
        proof: join_proof(&token.secret, &exporter, &csr, name, guest),
        csr,
        name: name.to_owned(),
        guest,
        clock_ms: milliseconds(now),
    };
    let (mut send, mut receive) = connection.open_bi().await.map_err(std::io::Error::from)?;
    write_body_in(Version::OF_JOIN, &mut send, &request).await?;
    let _ = send.finish();
    let frame = read_frame_in(Version::OF_JOIN, &mut receive).await?.ok_or(FrameError::Ended)?;
    match frame.kind {
        JoinGranted::KIND => Ok(Ok(JoinGranted::decode_for(&frame, Version::OF_JOIN)?)),
        JoinRefused::KIND => Ok(Err(JoinRefused::decode_for(&frame, Version::OF_JOIN)?)),
        got => Err(WireError::Unexpected { expected: "the answer to a join", got }.into()),
    }
}

fn exporter(connection: &Connection) -> Result<[u8; 32], FrameError> {
    let mut output = [0; 32];
    connection
        .export_keying_material(&mut output, EXPORTER_LABEL, b"")
        .map_err(|_| std::io::Error::other("TLS gives no exporter"))?;
    Ok(output)
}

fn milliseconds(time: OffsetDateTime) -> u64 {
    u64::try_from(time.unix_timestamp_nanos() / 1_000_000).unwrap_or(0)
}

// ---------------------------------------------------------------------------------------------------------------
// The node that signs

/// Answers one machine that wants to join, and ends the connection.
pub(super) async fn serve(mesh: &Arc<Mesh>, connection: Connection) {
    let address = endpoint::plain(connection.remote_address());
    match timeout(DECISION_DEADLINE, answer(mesh, &connection)).await {
        Ok(Ok(Ok(name))) => tracing::info!(%address, name, "a machine joined"),
        Ok(Ok(Err(refused))) => tracing::warn!(%address, why = refused.message, "a machine was refused"),
        Ok(Err(error)) => tracing::info!(%address, %error, "a join broke off"),
        Err(_) => tracing::info!(%address, "a join was not finished in time"),
    }
    connection.close(VarInt::from_u32(0), b"");
}

async fn answer(mesh: &Arc<Mesh>, connection: &Connection) -> Result<Result<String, JoinRefused>, FrameError> {
    let exporter = exporter(connection)?;
    let reading = async {
        let (send, mut receive) = connection.accept_bi().await.map_err(std::io::Error::from)?;
        Ok::<_, FrameError>((send, read_body_in::<JoinRequest, _>(Version::OF_JOIN, &mut receive).await?))
    };
    let (mut send, request) = timeout(STEP_DEADLINE, reading).await.map_err(std::io::Error::from)??;
    let name = request.name.clone();
    // fsync takes its time, and tasks that pulse must not wait for it.
    let mesh = mesh.clone();
    let deciding = tokio::task::spawn_blocking(move || decide(&mesh, request, &exporter, OffsetDateTime::now_utc()));
    let result = match deciding.await.map_err(std::io::Error::from)? {
        Ok(granted) => {
            write_body_in(Version::OF_JOIN, &mut send, &granted).await?;
            Ok(name)
        }
        Err(Objection(kind, message)) => {
            let refused = JoinRefused { kind, message };
            write_body_in(Version::OF_JOIN, &mut send, &refused).await?;
            Err(refused)
        }
    };
    let _ = send.finish();
    let _ = send.stopped().await;
    Ok(result)
}

/// Why a machine does not get in: for it, in words.
struct Objection(JoinRefusalKind, String);

impl From<RedeemError> for Objection {
    fn from(error: RedeemError) -> Self {
        let (kind, message) = match error {
            RedeemError::Unknown => (
                JoinRefusalKind::Token,
                "the token is not valid: it is mistyped, or another node printed it. Print one with `ingle token`.",
            ),
            RedeemError::Expired => {
                (JoinRefusalKind::Expired, "the token has expired. Print a new one with `ingle token`.")
            }
            RedeemError::Used => {
                (JoinRefusalKind::Used, "the token was used already. Print a new one with `ingle token`.")
            }
            RedeemError::NotStored => {
                (JoinRefusalKind::NoAuthority, "that node cannot write its state directory; see its log.")
            }
        };
        Self(kind, message.into())
    }
}

fn decide(
    mesh: &Mesh,
    request: JoinRequest,
    exporter: &[u8; 32],
    now: OffsetDateTime,
) -> Result<JoinGranted, Objection> {
    use JoinRefusalKind as Kind;
    let identity = mesh.identity();
    let signer = identity.signer.as_ref().ok_or_else(|| {
        let message = "that node is a guest of its cluster and cannot let others in. Join a full member.";
        Objection(Kind::NoAuthority, message.into())
    })?;
    if !is_valid_name(&request.name) {
        let message = "a node's name has 1 to 63 letters, digits, dots and dashes. Choose another --name.";
        return Err(Objection(Kind::Malformed, message.into()));
    }
    let apart = Duration::from_millis(request.clock_ms.abs_diff(milliseconds(now)));
    let own_facts = mesh.own_facts();
    let may_enter = || {
        if apart > CLOCK_TOLERANCE {
            return Err(Objection(Kind::Clock, format!("the clocks are {} minutes apart", apart.as_secs() / 60)));
        }
        if own_facts.member.name == request.name || mesh.roster.holder_of_name(&request.name, None).is_some() {
            let message = format!("a node named `{}` is in the cluster already. Choose another --name.", request.name);
            return Err(Objection(Kind::NameTaken, message));
        }
        Ok(())
    };
    let hash = Authority::fingerprint(&identity.authority);
    let bound = (exporter, request.csr.as_slice(), request.name.as_str(), request.guest);
    mesh.tokens.redeem(hash, request.token_id, request.proof, bound, now, may_enter)?;
    let node = NodeId(rand::rng().random());
    let membership = if request.guest { Membership::Guest } else { Membership::Full };
    let certificate = signer
        .sign(&request.csr, node, &request.name, membership, now)
        .map_err(|error| Objection(Kind::Malformed, error.to_string()))?;
    let mut own = own_facts.member;
    if own.addresses.is_empty() {
        let port = std::net::SocketAddr::from(([0, 0, 0, 0], mesh.port()));
        own.addresses = reachable_addresses(port);
    }
    let members = std::iter::once(own).chain(mesh.roster.hints()).collect();
    Ok(JoinGranted { node, certificate: certificate.to_vec(), authority: identity.authority.to_vec(), members })
}

/// Names go into certificates, mDNS and tables.
pub fn is_valid_name(name: &str) -> bool {
    ingle_protocol::names::is_node(name)
}
