//! What the nodes of the cluster offer, as the router sees it.

use ingle_protocol::NodeId;
use ingle_protocol::liveness::Health;
use ingle_protocol::wire::Version;
use ingle_protocol::wire::v2::{EnginePulse, ModelFacts, ModelState};

use crate::cluster::PeerLink;
use crate::registry::DefaultRoute;

/// A model on a node, as the router sees it.
pub(super) struct Offer {
    pub node: NodeId,
    pub node_name: String,
    pub health: Health,
    pub facts: ModelFacts,
    pub pulse: Option<EnginePulse>,
    /// `None` for this node itself.
    pub link: Option<PeerLink>,
    pub local: bool,
}

impl Offer {
    pub fn can_answer(&self) -> bool {
        self.facts.state == ModelState::Ready
            && self.facts.engine.is_some()
            && self.facts.digest.is_some()
            && (self.local || (self.health == Health::Alive && self.link.is_some()))
    }

    /// Its node speaks a protocol that has no requests for embeddings.
    pub fn is_too_old_to_embed(&self) -> bool {
        self.link.as_ref().is_some_and(|link| link.version < Version::V2)
    }

    pub fn in_words(&self) -> String {
        match &self.health {
            Health::Alive => format!("on {} it is {}", self.node_name, self.facts.state.words()),
            other => format!("{} is {} ({})", self.node_name, other.word(), other.why()),
        }
    }
}

/// The name that `default` stands for: what the cluster chose, else as [`default_of_the_nodes`] says. A choice of which
/// this node has heard sooner than of the model does not yet hold here, so that no request fails meanwhile.
pub(super) fn default_name(offers: &[Offer], chosen: &DefaultRoute) -> Option<String> {
    let Some(name) = &chosen.name else { return default_of_the_nodes(offers) };
    let answers = |name: &str| offers.iter().any(|offer| offer.facts.name == name && offer.can_answer());
    if answers(name) || !chosen.is_fresh {
        return Some(name.clone());
    }
    let before = chosen.before.clone().or_else(|| default_of_the_nodes(offers));
    Some(before.filter(|before| answers(before)).unwrap_or_else(|| name.clone()))
}

/// Where nothing was chosen: this node's own model, else the first default of the others, ready ones first.
/// An endpoint's model that nobody made a default is one all the same where the cluster has no other model. Embedding
/// models do not count: who names no model wants to talk to one.
fn default_of_the_nodes(offers: &[Offer]) -> Option<String> {
    let chats = || offers.iter().filter(|offer| !offer.facts.embeds());
    let default = chats()
        .filter(|offer| offer.facts.is_default)
        .min_by_key(|offer| (!offer.can_answer(), !offer.local, offer.node));
    let only = || {
        let first = chats().next()?;
        let alone = chats().all(|other| other.facts.is_endpoint() && other.facts.name == first.facts.name);
        alone.then_some(first)
    };
    default.or_else(only).map(|offer| offer.facts.name.clone())
}
