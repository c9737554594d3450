//! What this node knows of all machines that could have a model, as [`ingle_protocol::placement`] takes it.

use std::collections::HashSet;

use ingle_protocol::liveness::Health;
use ingle_protocol::memory::is_no_room;
use ingle_protocol::placement::{Candidate, Copy, order};
use ingle_protocol::registry::Record;
use ingle_protocol::wire::v2::{Capability, EnginePulse, ModelFacts, ModelState};
use ingle_protocol::{ModelDigest, NodeId};

use crate::cluster::Mesh;

/// One machine.
#[derive(Debug)]
struct Machine {
    node: NodeId,
    name: String,
    is_well: bool,
    capability: Option<Capability>,
    models: Vec<ModelFacts>,
    pulses: Vec<EnginePulse>,
    files: HashSet<ModelDigest>,
}

/// All machines that are there.
#[derive(Debug)]
pub(crate) struct View {
    machines: Vec<Machine>,
    /// Everybody who is known of has been heard of or is away.
    is_settled: bool,
}

impl View {
    /// The cluster now. Takes no I/O.
    pub fn of(mesh: &Mesh, capability: Capability) -> Self {
        let own = mesh.own_id();
        let mut machines = vec![Machine {
            node: own,
            name: mesh.own_facts().member.name,
            is_well: true,
            capability: Some(capability),
            models: mesh.workers.facts(own),
            pulses: mesh.workers.pulses(own),
            files: mesh.share.files(),
        }];
        let now = mesh.roster.now();
        let mut is_settled = true;
        for (id, member) in mesh.roster.lock().iter() {
            let health = member.watch.health(now);
            let is_well = health == Health::Alive;
            is_settled &= is_well && member.facts.is_some();
            // Who is suspected only keeps what it has until it is known better.
            if !is_well && !matches!(health, Health::Suspect { .. }) {
                continue;
            }
            machines.push(Machine {
                node: *id,
                name: member.name.clone(),
                is_well,
                capability: member.capability,
                models: member.facts.iter().flat_map(|facts| facts.models.clone()).collect(),
                pulses: member.engines.values().copied().collect(),
                files: member.files.clone().unwrap_or_default(),
            });
        }
        Self { machines, is_settled }
    }

    /// See the field.
    pub fn is_settled(&self) -> bool {
        self.is_settled
    }

    /// The nodes of these names.
    pub fn of_names<'a>(&'a self, names: &'a [&str]) -> impl Iterator<Item = NodeId> + 'a {
        self.machines.iter().filter(|machine| names.contains(&machine.name.as_str())).map(|machine| machine.node)
    }

    /// All machines, with how they have the model.
    pub fn candidates(&self, record: &Record) -> Vec<Candidate> {
        let is_file = record.source().is_some_and(|source| source.starts_with("file:"));
        let given = record.sha256().is_some_and(|digest| self.machines.iter().any(|one| one.files.contains(&digest)));
        let candidate = |machine: &Machine| {
            let mut candidate = machine.candidate(record);
            if is_file {
                // The machine where it was registered has it; others can copy it where somebody gives it.
                let is_its = record.origin_writer() == Some(machine.node);
                candidate.has_file |= is_its;
                candidate.takes &= is_its || given;
            }
            candidate
        };
        self.machines.iter().map(candidate).collect()
    }

    /// Which choice the node of this name is for the model, and by what; `None` for one that is not there.
    pub fn placement_in_words(&self, record: &Record, name: &str) -> Option<String> {
        let machine = self.machines.iter().find(|machine| machine.name == name)?;
        let candidates = self.candidates(record);
        let candidate = candidates.iter().find(|one| one.node == machine.node)?;
        let order = order(&candidates, None);
        let place = order.iter().position(|one| one.node == machine.node);
        let choice = match (place, candidate.copy) {
            (Some(place), _) => format!("choice {} of {}", place + 1, order.len()),
            (None, Copy::NoRoom) => "it has no room".into(),
            (None, Copy::Failed) => "it has failed".into(),
            (None, _) => "takes no models by itself".into(),
        };
        Some([vec![choice], abilities(candidate)].concat().join(", "))
    }
}

fn abilities(candidate: &Candidate) -> Vec<String> {
    let mut words = Vec::new();
    if candidate.on_card {
        words.push("a graphics card".to_owned());
    }
    if candidate.bandwidth > 0 {
        words.push(format!("{:.1} GB/s of memory", candidate.bandwidth as f64 / 1e9));
    }
    words.extend(candidate.room.map(|room| format!("room for {:.1} GiB", room as f64 / (1u64 << 30) as f64)));
    if candidate.has_file {
        words.push("has the file".into());
    }
    words
}

impl Machine {
    fn candidate(&self, record: &Record) -> Candidate {
        let could = self.capability.unwrap_or_default();
        let loads = self.pulses.iter().map(|pulse| pulse.load);
        // A machine that is being drained loads nothing for anybody.
        let is_draining = !could.takes_models && self.models.iter().any(|facts| facts.state == ModelState::Draining);
        let copies = self.models.iter().filter(|facts| facts.name == record.name()).map(|facts| self.copy(facts));
        let copies = copies.filter(|copy| !(is_draining && *copy == Copy::There));
        Candidate {
            node: self.node,
            bandwidth: could.memory_bandwidth,
            on_card: could.on_card,
            room: (could.room < u64::MAX).then_some(could.room),
            has_file: record.sha256().is_some_and(|digest| self.files.contains(&digest)),
            takes: self.is_well && could.takes_models,
            work: loads.map(|load| load.running.saturating_add(load.waiting)).sum(),
            // An older version of it may be finishing its answers beside the one that counts.
            copy: copies.max_by_key(|copy| rank(*copy)).unwrap_or(Copy::None),
        }
    }

    fn copy(&self, facts: &ModelFacts) -> Copy {
        let pulse = || self.pulses.iter().find(|pulse| Some(pulse.engine) == facts.engine);
        match &facts.state {
            ModelState::Ready => {
                let is_full = |pulse: &EnginePulse| pulse.load.waiting > 0 || pulse.load.running >= facts.slots.max(1);
                if pulse().is_some_and(is_full) { Copy::Busy } else { Copy::Ready }
            }
            ModelState::Fetching { .. } | ModelState::Verifying | ModelState::Loading | ModelState::Warming => {
                Copy::Coming
            }
            ModelState::Absent | ModelState::Draining | ModelState::Unloaded => Copy::There,
            ModelState::Failed { why } if is_no_room(why) => Copy::NoRoom,
            ModelState::Failed { .. } => Copy::Failed,
        }
    }
}

fn rank(copy: Copy) -> u8 {
    match copy {
        Copy::None => 0,
        Copy::Failed => 1,
        Copy::NoRoom => 2,
        Copy::There => 3,
        Copy::Coming => 4,
        Copy::Busy => 5,
        Copy::Ready => 6,
    }
}
