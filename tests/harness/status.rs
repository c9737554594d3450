//! `ingle status --json`, read as programs read it.

use serde_json::Value;

/// The cluster as one node sees it.
#[derive(Debug, Clone)]
pub struct Status(pub Value);

static NOBODY: Value = Value::Null;

impl Status {
    pub fn read(json: &str) -> Self {
        Self(serde_json::from_str(json).expect("status --json prints JSON"))
    }

    /// All nodes.
    pub fn nodes(&self) -> &[Value] {
        self.0["nodes"].as_array().expect("a status has nodes")
    }

    /// The node with this name; null where there is none.
    pub fn node(&self, name: &str) -> &Value {
        self.nodes().iter().find(|node| node["name"] == name).unwrap_or(&NOBODY)
    }

    /// `alive`, `suspect`, `failed`, `left`; empty where it is not known.
    pub fn health(&self, name: &str) -> &str {
        self.node(name)["health"]["state"].as_str().unwrap_or_default()
    }

    /// Why it is not alive.
    pub fn why(&self, name: &str) -> &str {
        self.node(name)["health"]["why"].as_str().unwrap_or_default()
    }

    /// The first model of the node.
    pub fn model(&self, name: &str) -> &Value {
        &self.node(name)["models"][0]
    }

    /// Requests that the engine of the node answers.
    pub fn running(&self, name: &str) -> u64 {
        self.model(name)["running"].as_u64().unwrap_or_default()
    }

    /// Latencies of requests that entered here and were answered there.
    pub fn latency(&self, node: &str) -> &Value {
        let latencies = self.0["latencies"].as_array().expect("a status has latencies");
        latencies.iter().find(|latency| latency["node"] == node).unwrap_or(&NOBODY)
    }
}
