//! The state of the cluster as one node sees it: what `ingle status` prints.

use ingle_protocol::NodeId;
use ingle_protocol::liveness::Health;
use serde::{Deserialize, Serialize};

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
    /// Its state in a word or a few: `ready`, `fetching 12 %`, `failed (why)`.
    pub state: String,
    /// SHA-256 of its file.
    pub digest: Option<String>,
    /// It answers requests that name no model.
    pub is_default: bool,
    /// What it runs on.
    pub backend: String,
    /// Context length in tokens.
    pub context_length: u32,
    /// Requests that are being answered.
    pub running: u32,
    /// Requests that wait.
    pub waiting: u32,
    /// Tokens generated in the last second.
    pub tokens_per_second: f32,
    /// Steps of its engine so far.
    pub steps: u64,
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
