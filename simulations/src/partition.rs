//! The registry of models under partitions: nodes that hear only some of the others, crash and start again, and
//! change what they know; then everybody hears everybody.
//!
//! Who knew of what is kept beside the registries as plain sets of changes, so that a change that is lost without
//! anybody having known of it cannot hide behind the registry's own bookkeeping.

use std::collections::{BTreeMap, BTreeSet};

use ingle_protocol::NodeId;
use ingle_protocol::registry::{ModelType, NewModel, Origin, Record, Registry, Stamp, Value};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::Deserialize;

/// What a scenario file of `scenarios/registry` says.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// What it shows, in a sentence.
    pub shows: String,
    /// Every seed is one run.
    pub seeds: Vec<u64>,
    /// Nodes of the household.
    pub nodes: u8,
    /// Names of models that they change.
    pub models: usize,
    /// How often the partition changes.
    pub rounds: u32,
    /// Changes in each round.
    pub changes: u32,
    /// Parts that do not hear each other.
    pub parts: u8,
    /// The chance that a node crashes in a change: before it is on disk, or behind that.
    pub crashes: f64,
    /// How far the clocks differ at most.
    pub clock_skew_ms: u64,
}

/// A change that was acknowledged.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Change {
    model: String,
    /// `parameter`, `pin …`, `everything` or `removal`.
    field: String,
    at: Stamp,
    /// Numbers of the changes that its node knew of.
    known: BTreeSet<usize>,
}

struct Node {
    id: NodeId,
    skew_ms: u64,
    memory: Registry,
    disk: Registry,
    /// Numbers of the changes that it knows of, in memory and on disk.
    knows: (BTreeSet<usize>, BTreeSet<usize>),
}

impl Node {
    /// What peers say is in memory at once, and on disk a moment later or never.
    fn hear(&mut self, other: &Registry, knows: &BTreeSet<usize>, is_stored: bool) {
        for entry in other.entries() {
            // What an honest node says is always taken.
            let _ = self.memory.merge(&entry);
        }
        self.knows.0.extend(knows);
        if is_stored {
            (self.disk, self.knows.1) = (self.memory.clone(), self.knows.0.clone());
        }
    }

    fn crash(&mut self) {
        (self.memory, self.knows.0) = (self.disk.clone(), self.knows.1.clone());
    }
}

/// What came of one run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The registry that everybody has in the end.
    pub registry: Registry,
    /// Changes that were acknowledged.
    pub acknowledged: usize,
    /// Changes that do not hold and are shown beside what does.
    pub overruled: usize,
}

/// Runs a scenario once: what came of it, or what was lost.
pub fn run(scenario: &Scenario, seed: u64) -> Result<Outcome, String> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut nodes: Vec<Node> = (0..scenario.nodes)
        .map(|number| Node {
            id: NodeId([number; 16]),
            skew_ms: random.random_range(0..=scenario.clock_skew_ms),
            memory: Registry::default(),
            disk: Registry::default(),
            knows: Default::default(),
        })
        .collect();
    let mut changes: Vec<Change> = Vec::new();
    let mut now_ms = 1_700_000_000_000;
    for _ in 0..scenario.rounds {
        let parts: Vec<u8> = nodes.iter().map(|_| random.random_range(0..scenario.parts)).collect();
        for _ in 0..scenario.changes {
            now_ms += random.random_range(0..50);
            let who = random.random_range(0..nodes.len());
            let crash = random.random_bool(scenario.crashes);
            change(&mut nodes[who], scenario, &mut changes, now_ms, crash, &mut random);
            let to = random.random_range(0..nodes.len());
            if parts[who] == parts[to] && who != to {
                let (said, knows) = (nodes[who].memory.clone(), nodes[who].knows.0.clone());
                nodes[to].hear(&said, &knows, random.random_bool(0.5));
            }
            if crash {
                nodes[who].crash();
            }
        }
    }
    heal(&mut nodes, &mut random);
    let registry = nodes[0].memory.clone();
    if nodes.iter().any(|node| node.memory != registry) {
        return Err("not everybody has the same registry".into());
    }
    registry.check().map_err(|error| error.to_string())?;
    judge(&changes, &registry)?;
    let overruled = registry.models().map(|record| record.overruled().len()).sum();
    Ok(Outcome { registry, acknowledged: changes.len(), overruled })
}

/// Everybody hears everybody, in any order, until nothing is new.
fn heal(nodes: &mut [Node], random: &mut StdRng) {
    for _ in 0..nodes.len() {
        for to in 0..nodes.len() {
            let mut others: Vec<usize> = (0..nodes.len()).collect();
            while !others.is_empty() {
                let from = others.swap_remove(random.random_range(0..others.len()));
                let (said, knows) = (nodes[from].memory.clone(), nodes[from].knows.0.clone());
                nodes[to].hear(&said, &knows, true);
            }
        }
    }
}

/// A node changes something. It is on disk before it is acknowledged, and acknowledged before anybody hears of it.
fn change(
    node: &mut Node,
    scenario: &Scenario,
    changes: &mut Vec<Change>,
    now_ms: u64,
    crash: bool,
    random: &mut StdRng,
) {
    let model = format!("m{}", random.random_range(0..scenario.models));
    let mut next = node.memory.clone();
    let at = next.stamp(node.id, now_ms + node.skew_ms);
    let field = match random.random_range(0..10) {
        0..4 => {
            let name = if random.random_bool(0.5) { "threads" } else { "batch_size" };
            let value = [(name.to_owned(), Some(Value::Number(random.random_range(1..9))))].into();
            next.set_parameters(&model, &value, at).map(|()| name.to_owned())
        }
        4 | 5 => {
            let pins: Vec<String> = if random.random_bool(0.5) { vec!["tower".into()] } else { vec![] };
            next.set_pins(&model, &pins, at).map(|()| "pin".to_owned())
        }
        6 | 7 => next.remove(&model, at).map(|()| "removal".to_owned()),
        _ => next.add(new(&model), at).map(|()| "everything".to_owned()),
    };
    // Impossible there, as with a model that it does not know.
    let Ok(field) = field else { return };
    if crash && random.random_bool(0.5) {
        // Before it was on disk: nobody was told that it is done.
        return;
    }
    let number = changes.len();
    changes.push(Change { model, field, at, known: node.knows.0.clone() });
    node.knows.0.insert(number);
    node.memory = next;
    (node.disk, node.knows.1) = (node.memory.clone(), node.knows.0.clone());
}

fn new(name: &str) -> NewModel {
    NewModel {
        name: name.to_owned(),
        kind: ModelType::Llm,
        origin: Origin::Source("hf:owner/name/model.gguf".into()),
        sha256: None,
        keep_alive: None,
        parameters: BTreeMap::new(),
        pins: Vec::new(),
    }
}

/// Nothing that was acknowledged is gone unless somebody knew of it who changed the same thing later.
fn judge(changes: &[Change], registry: &Registry) -> Result<(), String> {
    for (number, change) in changes.iter().enumerate() {
        let later = |other: &&Change| other.model == change.model && other.known.contains(&number);
        let stands = registry.record(&change.model).map(Record::stamps).unwrap_or_default().contains(&change.at);
        let is_there = registry.model(&change.model).is_some();
        match change.field.as_str() {
            "removal" => {
                // It holds, or somebody knew of it or did something that it did not know of.
                let unknown = |(other, it): (usize, &Change)| {
                    it.model == change.model
                        && it.field != "removal"
                        && !change.known.contains(&other)
                        && other != number
                };
                if is_there && !changes.iter().enumerate().any(unknown) {
                    return Err(format!("the removal {change:?} does not hold"));
                }
            }
            field => {
                let same = |other: &&Change| matches!(other.field.as_str(), "everything") || other.field == field;
                let replaced = changes.iter().filter(later).any(|other| same(&other));
                let removed = changes.iter().filter(later).any(|other| other.field == "removal");
                // Pins are written where they change only, so a later write of them need not replace this one.
                if !stands && !replaced && field != "pin" {
                    return Err(format!("{change:?} is gone, and nobody knew of it"));
                }
                if !is_there && !removed {
                    return Err(format!("{change:?} is removed, and nobody who did knew of it"));
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_partition_loses_what_was_acknowledged() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/scenarios/registry");
        let mut overruled = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let scenario: Scenario = toml::from_str(&std::fs::read_to_string(&path).unwrap())
                .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            for seed in &scenario.seeds {
                let outcome = run(&scenario, *seed)
                    .unwrap_or_else(|why| panic!("{} with seed {seed}: {why}\n{}", path.display(), scenario.shows));
                assert!(outcome.acknowledged > 10, "{} with seed {seed}: {outcome:?}", path.display());
                assert_eq!(Ok(&outcome), run(&scenario, *seed).as_ref(), "the same seed gives the same run");
                overruled += outcome.overruled;
            }
        }
        assert!(overruled > 0, "somewhere two nodes changed the same thing");
    }
}
