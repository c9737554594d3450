//! What has changed since the last look.

use std::collections::BTreeMap;

use ingle_protocol::liveness::Health;
use ingle_protocol::registry::{Record, Registry};
use ingle_protocol::wire::v2::{ModelFacts, ModelState};
use ingle_protocol::{ModelDigest, NodeId};

use super::{Event, EventKind};

/// A model that is being fetched is told of again after so many percent.
const PERCENT: u64 = 5;
/// And where nobody knows how large it is, after so many bytes.
const BYTES: u64 = 100_000_000;

/// A model of a node, as it was last.
#[derive(Debug, Clone, PartialEq, Eq)]
struct SeenModel {
    name: String,
    digest: Option<ModelDigest>,
    word: &'static str,
    /// How far it was fetched, in steps.
    step: u64,
    words: String,
}

impl SeenModel {
    fn of(facts: &ModelFacts) -> Self {
        let step = match &facts.state {
            ModelState::Fetching { done, total: 0 } => done / BYTES,
            ModelState::Fetching { done, total } => done.saturating_mul(100) / total / PERCENT,
            _ => 0,
        };
        let word = word(&facts.state);
        let words = if word == "failed" { word.into() } else { facts.state.words() };
        Self { name: facts.name.clone(), digest: facts.digest, word, step, words }
    }

    fn is_as(&self, other: &Self) -> bool {
        (self.word, self.step) == (other.word, other.step)
    }
}

/// A state without what comes with it.
fn word(state: &ModelState) -> &'static str {
    match state {
        ModelState::Absent => "absent",
        ModelState::Fetching { .. } => "fetching",
        ModelState::Verifying => "verifying",
        ModelState::Loading => "loading",
        ModelState::Warming => "warming",
        ModelState::Ready => "ready",
        ModelState::Draining => "draining",
        ModelState::Unloaded => "unloaded",
        ModelState::Failed { .. } => "failed",
    }
}

/// The models of one node, as they were last.
#[derive(Debug, Default)]
pub(super) struct SeenModels(Vec<SeenModel>);

impl SeenModels {
    /// Says what has changed on the node of this name. While a model is switched two of one name are there: which is
    /// which, their contents say, and their order where those are not known yet.
    pub fn look(&mut self, node: &str, now: &[ModelFacts], out: &mut Vec<Event>) {
        let mut before = std::mem::take(&mut self.0);
        let mut known: Vec<Option<SeenModel>> = now
            .iter()
            .map(|facts| {
                let same = |old: &SeenModel| old.name == facts.name && old.digest == facts.digest;
                Some(before.remove(before.iter().position(same)?))
            })
            .collect();
        for (facts, known) in now.iter().zip(&mut known).filter(|(_, known)| known.is_none()) {
            *known = before.iter().position(|old| old.name == facts.name).map(|at| before.remove(at));
        }
        for (facts, known) in now.iter().zip(known) {
            let mut seen = SeenModel::of(facts);
            match known {
                Some(known) if known.is_as(&seen) => seen.words = known.words,
                known => {
                    let why = match &facts.state {
                        ModelState::Failed { why } => Some(why.clone()),
                        _ => None,
                    };
                    let (from, to) = (known.map(|known| known.words), Some(seen.words.clone()));
                    let (node, model) = (Some(node.to_owned()), Some(facts.name.clone()));
                    out.push(Event { node, model, from, to, why, ..Event::new(EventKind::Model) });
                }
            }
            self.0.push(seen);
        }
        for gone in before {
            let (node, model, from) = (Some(node.to_owned()), Some(gone.name), Some(gone.words));
            out.push(Event { node, model, from, ..Event::new(EventKind::Model) });
        }
    }
}

/// Another node, as it was last.
#[derive(Debug)]
pub(super) struct SeenNode {
    pub name: String,
    health: &'static str,
    /// Incarnation and version of what it last said of itself.
    said: (u64, u64),
    models: SeenModels,
}

/// The other nodes, as they were last.
#[derive(Debug, Default)]
pub(super) struct SeenNodes(BTreeMap<NodeId, SeenNode>);

impl SeenNodes {
    /// The name of a node; where it is nobody of now, the beginning of its id.
    pub fn name_of(&self, node: NodeId) -> String {
        let known = self.0.get(&node).map(|node| node.name.clone());
        known.unwrap_or_else(|| node.to_string().chars().take(8).collect())
    }

    /// A node is so. `models` with the incarnation and version of what it said of them.
    pub fn look(
        &mut self,
        node: NodeId,
        name: &str,
        health: &Health,
        models: Option<((u64, u64), &[ModelFacts])>,
        out: &mut Vec<Event>,
    ) {
        let (word, why) = (health.word(), Some(health.why().to_owned()).filter(|why| !why.is_empty()));
        let known = self.0.get(&node).map(|known| known.health);
        if known != Some(word) {
            let (node, from, to) = (Some(name.to_owned()), known.map(str::to_owned), Some(word.to_owned()));
            out.push(Event { node, from, to, why, ..Event::new(EventKind::Node) });
        }
        let seen = self.0.entry(node).or_insert_with(|| SeenNode {
            name: name.to_owned(),
            health: word,
            said: (0, 0),
            models: SeenModels::default(),
        });
        seen.health = word;
        if seen.name != name {
            seen.name = name.to_owned();
        }
        if let Some((said, models)) = models.filter(|(said, _)| *said != seen.said) {
            seen.said = said;
            seen.models.look(name, models, out);
        }
    }

    /// Those that are not `there` are members no more.
    pub fn forget(&mut self, there: impl Fn(NodeId) -> bool, out: &mut Vec<Event>) {
        let gone: Vec<NodeId> = self.0.keys().copied().filter(|node| !there(*node)).collect();
        for gone in gone.into_iter().filter_map(|node| self.0.remove(&node)) {
            let (node, from) = (Some(gone.name), Some(gone.health.to_owned()));
            out.push(Event { node, from, ..Event::new(EventKind::Node) });
        }
    }

    /// All are another cluster's.
    pub fn clear(&mut self) {
        self.0.clear();
    }
}

/// The registry, as it was last.
#[derive(Debug, Default)]
pub(super) struct SeenRegistry {
    models: BTreeMap<String, Record>,
    default: Option<String>,
}

impl SeenRegistry {
    /// As it was before somebody looks; what is there then is no news.
    pub fn of(registry: &Registry) -> Self {
        let models = registry.models().map(|record| (record.name().to_owned(), record.clone())).collect();
        Self { models, default: registry.default_model().name().map(str::to_owned) }
    }

    /// Says what has changed, and who changed it.
    pub fn look(&mut self, registry: &Registry, name_of: impl Fn(NodeId) -> String, out: &mut Vec<Event>) {
        let now = Self::of(registry);
        let writer = |record: Option<&Record>| record?.changed().map(|at| name_of(at.node));
        let mut say = |record: Option<&Record>, model: &str, to: &str, why: Option<String>| {
            let (model, to) = (Some(model.to_owned()), Some(to.to_owned()));
            out.push(Event { node: writer(record), model, to, why, ..Event::new(EventKind::Registry) });
        };
        for (name, record) in &now.models {
            match self.models.get(name) {
                None => say(Some(record), name, "registered", None),
                Some(before) => {
                    let changed = changed_fields(before, record);
                    if !changed.is_empty() {
                        say(Some(record), name, "changed", Some(changed.join(", ")));
                    }
                }
            }
        }
        for name in self.models.keys().filter(|name| !now.models.contains_key(*name)) {
            say(registry.record(name), name, "removed", None);
        }
        if now.default != self.default {
            let node = registry.default_model().changed().map(|at| name_of(at.node));
            let (from, to) = (self.default.clone(), now.default.clone());
            out.push(Event { node, from, to, ..Event::new(EventKind::Default) });
        }
        *self = now;
    }
}

fn changed_fields(before: &Record, now: &Record) -> Vec<String> {
    let mut changed = Vec::new();
    let mut note = |name: &str, is_other: bool| {
        if is_other {
            changed.push(name.to_owned());
        }
    };
    note("type", before.kind() != now.kind());
    note("origin", before.origin() != now.origin());
    note("sha256", before.sha256() != now.sha256());
    note("keep_alive", before.keep_alive() != now.keep_alive());
    note("pins", before.pins() != now.pins());
    let (old, new) = (before.parameters(), now.parameters());
    let names: std::collections::BTreeSet<&str> = old.keys().chain(new.keys()).copied().collect();
    names.into_iter().for_each(|name| note(name, old.get(name) != new.get(name)));
    changed
}
