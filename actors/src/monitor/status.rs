//! The state of the cluster as one node sees it: what `ingle status` prints.

use std::collections::BTreeMap;

use ingle_protocol::liveness::Health;
use ingle_protocol::registry::ModelType;
use ingle_protocol::wire::v2::{EnginePulse, ModelFacts};
use ingle_protocol::{EngineId, NodeId};
use serde::{Deserialize, Serialize};

use crate::cluster::Mesh;

/// The whole picture.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClusterStatus {
    /// The cluster's id.
    pub cluster: String,
    /// Id of the node that was asked.
    pub this_node: NodeId,
    /// Where that node answers HTTP.
    pub http: String,
    /// All nodes, the one that was asked first.
    pub nodes: Vec<NodeStatus>,
    /// Requests that entered here and wait for a worker.
    pub waiting: u32,
    /// Latencies of requests that entered here, per (node, model).
    pub latencies: Vec<LatencySummary>,
    /// What went wrong on this node and is not over, in words.
    pub problems: Vec<String>,
}

/// One node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Its name.
    pub name: String,
    /// Its id.
    pub id: NodeId,
    /// `ip:port` of its QUIC socket.
    pub address: String,
    /// Alive, suspect, failed or left, and why.
    pub health: Health,
    /// Milliseconds since it was last heard of; `None` for never, 0 for the node itself.
    pub age_ms: Option<u64>,
    /// Round trip through the control plane in milliseconds, as last measured.
    pub control_round_trip_ms: Option<f64>,
    /// Version of the protocol on the connection to it; `None` for the node itself and where there is none.
    pub protocol: Option<u8>,
    /// Version of its program.
    pub software: String,
    /// Its models.
    pub models: Vec<ModelStatus>,
}

/// A model on a node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelStatus {
    /// Its name.
    pub name: String,
    /// `llm`, `embedding`; `None` until its node has looked.
    #[serde(rename = "type")]
    pub kind: Option<ModelType>,
    /// Its state in a word or a few: `ready`, `fetching 12 %`, `failed (why)`.
    pub state: String,
    /// Its engine, while one runs.
    pub engine: Option<EngineId>,
    /// Why the node that was asked sends nothing there now, although it is ready.
    pub trouble: Option<String>,
    /// SHA-256 of its file.
    pub digest: Option<String>,
    /// It answers requests that name no model.
    pub is_default: bool,
    /// What it runs on.
    pub backend: String,
    /// Context length in tokens.
    pub context_length: u32,
    /// Answers that it writes at once.
    pub slots: u32,
    /// Requests that are being answered.
    pub running: u32,
    /// Requests that wait.
    pub waiting: u32,
    /// Tokens generated in the last second.
    pub tokens_per_second: f32,
    /// Steps of its engine so far.
    pub steps: u64,
    /// Request fields beyond the common ones that it honours.
    pub features: Vec<String>,
}

/// Percentiles in milliseconds over the life of the process.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LatencySummary {
    /// Name of the node that answered.
    pub node: String,
    /// The model.
    pub model: String,
    /// Requests that ended well.
    pub finished: u64,
    /// Requests that did not.
    pub failed: u64,
    /// Requests whose client left.
    pub cancelled: u64,
    /// Until a place was free: p50 and p99.
    pub queue_ms: [f64; 2],
    /// Reading the prompt: p50 and p99.
    pub prefill_ms: [f64; 2],
    /// Until the first token: p50 and p99.
    pub first_token_ms: [f64; 2],
    /// Between tokens: p50 and p99.
    pub gap_ms: [f64; 2],
    /// The whole answer: p50 and p99.
    pub total_ms: [f64; 2],
}

/// What the mesh knows; latencies and problems are the caller's to add.
pub fn cluster_status(mesh: &Mesh, http: &str) -> ClusterStatus {
    let own_id = mesh.own_id();
    let own = mesh.own_facts();
    let own_pulses = mesh.workers.pulses(own_id).into_iter().map(|pulse| (pulse.engine, pulse)).collect();
    let mut nodes = vec![NodeStatus {
        name: own.member.name,
        id: own_id,
        address: own.member.addresses.first().cloned().unwrap_or_else(|| format!("127.0.0.1:{}", mesh.port())),
        health: Health::Alive,
        age_ms: Some(0),
        control_round_trip_ms: None,
        protocol: None,
        software: own.software,
        models: mesh.workers.facts(own_id).iter().map(|facts| model_status(facts, &own_pulses)).collect(),
    }];
    let now = mesh.roster.now();
    for (id, member) in mesh.roster.lock().iter() {
        let facts = member.facts.as_ref();
        nodes.push(NodeStatus {
            name: member.name.clone(),
            id: *id,
            address: member.addresses.first().cloned().unwrap_or_default(),
            health: member.watch.health(now),
            age_ms: member.watch.age(now).map(|age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX)),
            control_round_trip_ms: member.control_round_trip.map(|time| time.as_secs_f64() * 1_000.0),
            protocol: member.link.as_ref().map(|link| link.version.number()),
            software: facts.map(|facts| facts.software.clone()).unwrap_or_default(),
            models: facts
                .iter()
                .flat_map(|facts| &facts.models)
                .map(|facts| model_status(facts, &member.engines))
                .collect(),
        });
    }
    ClusterStatus {
        cluster: mesh.identity().cluster.to_string(),
        this_node: own_id,
        http: http.to_owned(),
        nodes,
        waiting: 0,
        latencies: Vec::new(),
        problems: Vec::new(),
    }
}

fn model_status(facts: &ModelFacts, pulses: &BTreeMap<EngineId, EnginePulse>) -> ModelStatus {
    let pulse = facts.engine.and_then(|engine| pulses.get(&engine));
    ModelStatus {
        name: facts.name.clone(),
        kind: facts.kind(),
        state: facts.state.words(),
        engine: facts.engine,
        trouble: None,
        digest: facts.digest.map(|digest| digest.to_string()),
        is_default: facts.is_default,
        backend: facts.backend.clone(),
        context_length: facts.context_length,
        slots: facts.slots,
        running: pulse.map_or(0, |pulse| pulse.load.running),
        waiting: pulse.map_or(0, |pulse| pulse.load.waiting),
        tokens_per_second: pulse.map_or(0.0, |pulse| pulse.tokens_per_second),
        steps: pulse.map_or(0, |pulse| pulse.step),
        features: facts.features.clone(),
    }
}
