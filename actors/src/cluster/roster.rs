//! The members that this node knows, and what it knows of each.

use std::collections::{BTreeMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ingle_protocol::liveness::{Health, PeerWatch};
use ingle_protocol::wire::v2::{Capability, EnginePulse, HeldFiles, MOST_HELD_FILES, MemberHint, NodeFacts, Pulse};
use ingle_protocol::{EngineId, ModelDigest, NodeId};

use super::join::is_valid_name;
use super::link::{PeerLink, REPLACED};

/// The most members that are remembered; a household has a handful.
pub const MOST_MEMBERS: usize = 256;
/// The most addresses that are remembered of one member.
const MOST_ADDRESSES: usize = 8;

/// One member, never this node itself.
#[derive(Debug, Default)]
pub struct Member {
    /// Its name as last heard.
    pub name: String,
    /// Where it may be reached, the most promising first.
    pub addresses: Vec<String>,
    /// Alive or not.
    pub watch: PeerWatch,
    /// What it last said of itself.
    pub facts: Option<NodeFacts>,
    /// Its engines, by its last pulse.
    pub engines: BTreeMap<EngineId, EnginePulse>,
    /// Model files that it gives, by its word; `None` until it has said so.
    pub files: Option<HashSet<ModelDigest>>,
    /// What it could do with one more model, by its word; `None` until it has said so.
    pub capability: Option<Capability>,
    /// The connection to it, while one stands.
    pub link: Option<PeerLink>,
    /// As last measured through the control plane.
    pub control_round_trip: Option<Duration>,
}

impl Member {
    /// What others need to find it.
    pub fn hint(&self, node: NodeId) -> MemberHint {
        MemberHint { node, name: self.name.clone(), addresses: self.addresses.clone() }
    }

    /// The connection is the one that counts: news of one that was replaced is no news.
    fn is_on(&self, connection: usize) -> bool {
        self.link.as_ref().is_some_and(|link| link.connection.stable_id() == connection)
    }

    /// Puts the address first.
    pub fn prefer_address(&mut self, address: &str) {
        self.addresses.retain(|known| known != address);
        self.addresses.insert(0, address.to_owned());
        self.addresses.truncate(MOST_ADDRESSES);
    }

    /// News goes behind what is known to work and before what is old, so that a list that is full still learns.
    fn add_addresses(&mut self, addresses: &[String]) {
        for address in usable(addresses).rev() {
            if !self.addresses.contains(address) {
                self.addresses.insert(self.addresses.len().min(1), address.clone());
            }
        }
        self.addresses.truncate(MOST_ADDRESSES);
    }
}

/// The addresses of a hint that are ones: a peer can send anything.
pub(super) fn usable(addresses: &[String]) -> impl DoubleEndedIterator<Item = &String> {
    addresses.iter().take(MOST_ADDRESSES).filter(|address| address.parse::<SocketAddr>().is_ok())
}

/// What became of a new connection.
#[derive(Debug, PartialEq, Eq)]
pub enum Registered {
    /// It is the one.
    Kept,
    /// Another one stands and goes on.
    Duplicate,
}

/// All members but this node. Locks are held for look-ups only, never across an await.
#[derive(Debug)]
pub struct Roster {
    own: NodeId,
    started: Instant,
    members: Mutex<BTreeMap<NodeId, Member>>,
}

impl Roster {
    /// An empty roster of the node `own`.
    pub fn new(own: NodeId) -> Self {
        Self { own, started: Instant::now(), members: Mutex::default() }
    }

    /// The time on the roster's own clock.
    pub fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// All members. A panic elsewhere does not make the roster unusable.
    pub fn lock(&self) -> MutexGuard<'_, BTreeMap<NodeId, Member>> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Learns of a member from somebody else.
    pub fn hear_of(&self, hint: &MemberHint) {
        let mut members = self.lock();
        if hint.node == self.own
            || !is_valid_name(&hint.name)
            || (members.len() >= MOST_MEMBERS && !members.contains_key(&hint.node))
        {
            return;
        }
        let member = members.entry(hint.node).or_default();
        if member.name.is_empty() {
            member.name.clone_from(&hint.name);
        }
        member.add_addresses(&hint.addresses);
    }

    /// Keeps a fresh, greeted connection, unless there is a better one. Two nodes that dial each other at the same
    /// moment both keep the connection that the smaller id opened.
    pub fn register(&self, link: PeerLink, facts: NodeFacts) -> Registered {
        if link.connection.close_reason().is_some() {
            return Registered::Duplicate;
        }
        let (now, node, incarnation) = (self.now(), link.node, link.incarnation);
        let mut members = self.lock();
        // A machine that was set up anew has a new id under its old name: the old one does not come back.
        members.retain(|id, member| *id == node || member.link.is_some() || member.name != facts.member.name);
        let member = members.entry(node).or_default();
        if let Some(standing) = &member.link
            && standing.connection.close_reason().is_none()
            && standing.incarnation == link.incarnation
            && standing.initiator != link.initiator
            && standing.initiator < link.initiator
        {
            return Registered::Duplicate;
        }
        if let Some(replaced) = member.link.replace(link) {
            // That of an earlier run is dead, whatever it seems; on one of this run answers may be under way.
            if replaced.incarnation == incarnation { replaced.retire() } else { replaced.close(REPLACED) }
        }
        member.watch.connected(now);
        member.engines.clear();
        Self::take_facts(node, member, facts);
        Registered::Kept
    }

    /// Newer facts of a member, said by itself.
    pub fn update(&self, node: NodeId, facts: NodeFacts) {
        let now = self.now();
        if let Some(member) = self.lock().get_mut(&node) {
            member.watch.pulse(now);
            let newer = member
                .facts
                .as_ref()
                .is_none_or(|known| (facts.incarnation, facts.version) > (known.incarnation, known.version));
            if newer {
                Self::take_facts(node, member, facts);
            }
        }
    }

    fn take_facts(node: NodeId, member: &mut Member, mut facts: NodeFacts) {
        // Each node speaks for its own engines alone.
        for model in &mut facts.models {
            if let Some(engine) = &mut model.engine {
                engine.node = node;
            }
        }
        member.name.clone_from(&facts.member.name);
        member.add_addresses(&facts.member.addresses);
        member.facts = Some(facts);
    }

    /// A pulse of a member.
    pub fn pulse(&self, node: NodeId, connection: usize, pulse: Pulse) {
        let now = self.now();
        if let Some(member) = self.lock().get_mut(&node).filter(|member| member.is_on(connection)) {
            member.watch.pulse(now);
            member.engines = pulse.engines.into_iter().map(|engine| (engine.engine, engine)).collect();
        }
    }

    /// The files that a member gives.
    pub fn holds(&self, node: NodeId, connection: usize, held: HeldFiles) {
        if let Some(member) = self.lock().get_mut(&node).filter(|member| member.is_on(connection)) {
            member.files = Some(held.files.into_iter().take(MOST_HELD_FILES).collect());
        }
    }

    /// What a member could do with one more model.
    pub fn could(&self, node: NodeId, connection: usize, capability: Capability) {
        if let Some(member) = self.lock().get_mut(&node).filter(|member| member.is_on(connection)) {
            member.capability = Some(capability);
        }
    }

    /// The member said goodbye.
    pub fn left(&self, node: NodeId, connection: usize, why: &str) {
        if let Some(member) = self.lock().get_mut(&node).filter(|member| member.is_on(connection)) {
            member.watch.left(why);
        }
    }

    /// The connection `id` to the member is gone. News of a connection that was replaced counts for nothing.
    pub fn lost(&self, node: NodeId, connection: usize, why: &str) {
        if let Some(member) = self.lock().get_mut(&node).filter(|member| member.is_on(connection)) {
            member.link = None;
            member.engines.clear();
            member.files = None;
            member.control_round_trip = None;
            member.watch.lost(why);
        }
    }

    /// The member that has this name and is not `node`, if it is there.
    pub fn holder_of_name(&self, name: &str, node: Option<NodeId>) -> Option<NodeId> {
        let now = self.now();
        self.lock()
            .iter()
            .find(|(id, member)| {
                member.name == name
                    && Some(**id) != node
                    && matches!(member.watch.health(now), Health::Alive | Health::Suspect { .. })
            })
            .map(|(id, _)| *id)
    }

    /// A link to the member, if one stands.
    pub fn link(&self, node: NodeId) -> Option<PeerLink> {
        self.lock().get(&node)?.link.clone()
    }

    /// How to reach every member.
    pub fn hints(&self) -> Vec<MemberHint> {
        self.lock().iter().map(|(node, member)| member.hint(*node)).collect()
    }
}
