//! Connections that go out: to members that are not connected, again and again, with jitter.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ingle_protocol::NodeId;
use ingle_protocol::wire::v2::{Hello, NotWelcome, Welcome};
use ingle_protocol::wire::{Body as _, StreamKind, Versioned as _};
use quinn::VarInt;
use rand::Rng;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::accept::{Session, agreed_version, certified_peer};
use super::join::is_valid_name;
use super::link::{PeerLink, open_stream};
use super::roster::Registered;
use super::{Mesh, plain};
use crate::frames::{FrameError, read_frame_in, write_body_in};

/// How long one attempt may take.
const DIAL_DEADLINE: Duration = Duration::from_secs(3);
const ROUND: Duration = Duration::from_millis(250);
const FIRST_PAUSE: Duration = Duration::from_millis(400);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Attempts at a time.
const MOST_DIALS: usize = 16;
/// The default QUIC port, for addresses without one.
pub const DEFAULT_PORT: u16 = 11436;

/// Nodes that are being greeted, so that two connections to one do not race.
#[derive(Debug, Default)]
pub(super) struct Greeting(Arc<Mutex<HashSet<NodeId>>>);

impl Greeting {
    fn begin(&self, node: NodeId) -> Option<GreetingGuard> {
        let begun = self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(node);
        begun.then(|| GreetingGuard(self.0.clone(), node))
    }
}

struct GreetingGuard(Arc<Mutex<HashSet<NodeId>>>, NodeId);

impl Drop for GreetingGuard {
    fn drop(&mut self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.1);
    }
}

#[derive(Default)]
struct Attempts {
    failures: u32,
    not_before: Option<Instant>,
}

impl Attempts {
    /// Waits twice as long each time, plus up to half of it, so that nodes that failed together do not come together.
    fn failed(&mut self, now: Instant, random: f64) {
        let pause = (FIRST_PAUSE * 2u32.saturating_pow(self.failures.min(10))).min(LONGEST_PAUSE);
        self.failures += 1;
        self.not_before = Some(now + pause.mul_f64(1.0 + random / 2.0));
    }
}

/// Dials until the mesh ends.
pub async fn run(mesh: Arc<Mesh>) {
    let mut attempts: HashMap<String, Attempts> = HashMap::new();
    let mut under_way: HashSet<String> = HashSet::new();
    let mut dials: JoinSet<(String, Result<NodeId, String>)> = JoinSet::new();
    let mut own_addresses: HashSet<String> = HashSet::new();
    loop {
        let now = Instant::now();
        let wanted = wanted(&mesh);
        attempts.retain(|address, _| wanted.contains(address));
        let mut due: Vec<String> = wanted
            .into_iter()
            .filter(|address| !under_way.contains(address) && !own_addresses.contains(address))
            .filter(|address| attempts.get(address).and_then(|a| a.not_before).is_none_or(|at| at <= now))
            .collect();
        // Whoever failed least goes first: a crowd of dead addresses must not keep a living one waiting.
        due.sort_by_key(|address| attempts.get(address).map_or(0, |attempts| attempts.failures));
        due.truncate(MOST_DIALS.saturating_sub(under_way.len()));
        for address in due {
            under_way.insert(address.clone());
            let mesh = mesh.clone();
            dials.spawn(async move {
                let result = dial(&mesh, &address).await;
                (address, result)
            });
        }
        tokio::select! {
            Some(done) = dials.join_next() => {
                // A panic in there ends this task too, and with it the mesh, which is started anew.
                let (address, result) = match done {
                    Ok(done) => done,
                    Err(error) => std::panic::resume_unwind(error.into_panic()),
                };
                under_way.remove(&address);
                match result {
                    Ok(node) if node == mesh.own_id() => {
                        own_addresses.insert(address);
                    }
                    Ok(_) => {
                        attempts.remove(&address);
                    }
                    Err(error) => {
                        tracing::debug!(address, error, "not reached");
                        let random = rand::rng().random::<f64>();
                        attempts.entry(address).or_default().failed(Instant::now(), random);
                    }
                }
            }
            // A connection was lost or an address was heard of: try at once what is not in its pause.
            () = mesh.redial.notified() => {}
            () = tokio::time::sleep(ROUND) => {}
        }
    }
}

/// Addresses of members without a connection, and those that are always tried and belong to none.
fn wanted(mesh: &Mesh) -> BTreeSet<String> {
    let members = mesh.roster.lock();
    let connected: HashSet<&String> =
        members.values().filter(|member| member.link.is_some()).flat_map(|member| &member.addresses).collect();
    members
        .values()
        .filter(|member| member.link.is_none())
        .flat_map(|member| member.addresses.iter().cloned())
        .chain(mesh.peers.iter().cloned())
        .chain(mesh.sightings.unconnected(&members))
        .filter(|address| !connected.contains(address))
        .collect()
}

/// `host`, `host:port`, `[v6]:port` or a bare IPv6 address, with the default port where none is given.
pub async fn resolve(address: &str) -> Result<Vec<SocketAddr>, String> {
    let bare_v6 = address.parse::<std::net::Ipv6Addr>().is_ok();
    let has_port = !bare_v6 && address.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    let target = match (bare_v6, has_port) {
        (true, _) => format!("[{address}]:{DEFAULT_PORT}"),
        (false, true) => address.to_owned(),
        (false, false) => format!("{address}:{DEFAULT_PORT}"),
    };
    let found: Vec<SocketAddr> = timeout(DIAL_DEADLINE, tokio::net::lookup_host(&target))
        .await
        .map_err(|_| format!("the name in {target} was not resolved in time"))?
        .map_err(|error| format!("{target}: {error}"))?
        .collect();
    if found.is_empty() { Err(format!("{target} has no address")) } else { Ok(found) }
}

/// Dials one address and greets. Returns who answered; the session runs on in a task of the mesh.
async fn dial(mesh: &Arc<Mesh>, address: &str) -> Result<NodeId, String> {
    let mut last = String::new();
    for target in resolve(address).await? {
        match timeout(DIAL_DEADLINE, greet(mesh, target)).await {
            Ok(Ok(node)) => {
                if let Some(member) = mesh.roster.lock().get_mut(&node) {
                    member.prefer_address(address);
                }
                return Ok(node);
            }
            Ok(Err(error)) => last = error,
            Err(_) => last = "no answer in time".into(),
        }
    }
    Err(last)
}

async fn greet(mesh: &Arc<Mesh>, target: SocketAddr) -> Result<NodeId, String> {
    let client = mesh.client.load_full().as_ref().clone();
    let connecting =
        mesh.endpoint.connect_with(client, target, crate::identity::SERVER_NAME).map_err(|error| error.to_string())?;
    let connection = connecting.await.map_err(|error| error.to_string())?;
    let peer = certified_peer(&connection).ok_or("its certificate is not a node's")?;
    if peer.node == mesh.own_id() {
        connection.close(VarInt::from_u32(0), b"the node itself");
        return Ok(peer.node);
    }
    let version = agreed_version(&connection).ok_or("no version of the protocol is agreed on")?;
    // A member has several addresses, which are dialled side by side: one of them is enough.
    let guard = mesh.greeting.begin(peer.node);
    let stands = mesh.roster.link(peer.node).is_some_and(|link| link.connection.close_reason().is_none());
    let Some(_guard) = guard.filter(|_| !stands) else {
        connection.close(VarInt::from_u32(0), b"connected already");
        return Ok(peer.node);
    };
    let greeting = async {
        let (mut send, mut receive) = open_stream(&connection, StreamKind::Membership, DIAL_DEADLINE).await?;
        let hello = Hello { cluster: mesh.identity().cluster, facts: mesh.greeting_facts() };
        write_body_in(version, &mut send, &hello).await?;
        let answer = read_frame_in(version, &mut receive).await?.ok_or(FrameError::Ended)?;
        Ok::<_, FrameError>((answer, send, receive))
    };
    // TLS 1.3 lets a client finish before the server has judged its certificate: only the welcome counts.
    let (answer, send, receive) = greeting.await.map_err(|error| match connection.close_reason() {
        Some(reason) => super::link::describe(&reason),
        None => error.to_string(),
    })?;
    if answer.kind == NotWelcome::KIND {
        let refused = NotWelcome::decode_for(&answer, version).map_err(|error| error.to_string())?;
        connection.close(VarInt::from_u32(0), b"not welcome");
        if refused.duplicate {
            return Ok(peer.node);
        }
        tracing::warn!(address = %plain(target), why = refused.why, "the node is not welcome there");
        if let Some(member) = mesh.roster.lock().get_mut(&peer.node).filter(|member| member.link.is_none()) {
            member.watch.lost(&refused.why);
        }
        return Err(refused.why);
    }
    let welcome = Welcome::decode_for(&answer, version).map_err(|error| error.to_string())?;
    if welcome.facts.member.node != peer.node || !is_valid_name(&welcome.facts.member.name) {
        connection.close(VarInt::from_u32(1), b"the welcome's name or node id is wrong");
        return Err("its name or node id is wrong".into());
    }
    let link = PeerLink::new(peer, version, welcome.facts.incarnation, mesh.own_id(), connection.clone());
    mesh.hear_of_all(&welcome.facts.members);
    if mesh.roster.register(link.clone(), welcome.facts) == Registered::Duplicate {
        connection.close(VarInt::from_u32(0), b"connected already");
        return Ok(peer.node);
    }
    let session = Session { link, peer, membership: (send, receive) };
    mesh.tasks.spawn(session.run(mesh.clone()));
    Ok(peer.node)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_bound_and_are_spread() {
        let now = Instant::now();
        let mut attempts = Attempts::default();
        let mut last = Duration::ZERO;
        for _ in 0..20 {
            attempts.failed(now, 0.0);
            let pause = attempts.not_before.unwrap() - now;
            assert!(pause >= last && pause <= LONGEST_PAUSE);
            last = pause;
        }
        assert_eq!(last, LONGEST_PAUSE);
        attempts.failed(now, 1.0);
        assert_eq!(attempts.not_before.unwrap() - now, LONGEST_PAUSE.mul_f64(1.5));
    }

    #[tokio::test]
    async fn addresses_may_come_without_a_port() {
        for (text, port) in [("127.0.0.1", 11436), ("127.0.0.1:5", 5), ("::1", 11436), ("[::1]:7", 7)] {
            assert_eq!(resolve(text).await.unwrap()[0].port(), port, "{text}");
        }
        assert!(resolve("no host at all").await.is_err());
    }
}
