//! The registry as people and programs see it, together with what the nodes say of the models.

use std::collections::BTreeMap;

use ingle_protocol::NodeId;
use ingle_protocol::registry::{ModelType, Record, Registry, Stamp};
use serde::{Deserialize, Serialize};

use super::view::View;
use crate::monitor::{ClusterStatus, ModelStatus};
use crate::node::ParameterValue;

/// All models.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RegistryStatus {
    /// The model that `default` means, where one was chosen.
    pub default: Option<String>,
    /// Other choices that were made at the same time and do not hold.
    pub default_overruled: Vec<Overruled>,
    /// All models: those that are registered, and those that a node has of its own.
    pub models: Vec<ShownModel>,
}

/// A model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ShownModel {
    /// Its name.
    pub name: String,
    /// `llm`, `embedding`, …; `None` where it is not registered.
    #[serde(rename = "type")]
    pub kind: Option<ModelType>,
    /// It is in the registry. What is not was given to a node when it was started, and is known there alone.
    pub registered: bool,
    /// Requests that name no model get it.
    pub is_default: bool,
    /// Where its file comes from.
    pub source: Option<String>,
    /// The server that answers for it.
    pub endpoint: Option<ShownEndpoint>,
    /// Its file's hash, once it is known.
    pub sha256: Option<String>,
    /// Seconds for which it stays loaded when nobody asks it.
    pub keep_alive_s: Option<u32>,
    /// The nodes that are to have it; empty: any.
    pub pinned: Vec<String>,
    /// Parameters that are not the usual ones.
    pub parameters: BTreeMap<String, ParameterValue>,
    /// Who changed it last.
    pub changed_by: Option<String>,
    /// When, in milliseconds since 1970.
    pub changed_ms: Option<u64>,
    /// What was said at the same time and does not hold.
    pub overruled: Vec<Overruled>,
    /// How it is on the nodes.
    pub nodes: Vec<OnNode>,
}

/// A server elsewhere.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ShownEndpoint {
    /// Where it is.
    pub url: String,
    /// The model's name there.
    pub model: Option<String>,
    /// The environment variable with its key.
    pub api_key_env: Option<String>,
}

/// Something that was said on one node while another said something else that holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Overruled {
    /// Of what.
    pub field: String,
    /// What was said.
    pub value: String,
    /// Where.
    pub by: String,
}

/// A model on a node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OnNode {
    /// The node's name.
    pub node: String,
    /// `ready`, `absent`, `failed (why)` …
    pub state: String,
    /// What it runs on.
    pub backend: String,
    /// Requests that are being answered there.
    pub running: u32,
    /// Requests that wait there.
    pub waiting: u32,
    /// Which choice this node is for the model, and by what; `None` where nothing is to be chosen.
    pub placement: Option<String>,
}

/// The name of the node that wrote something; where it is nobody of now, the beginning of its id.
fn whose(status: &ClusterStatus, node: NodeId) -> String {
    let known = status.nodes.iter().find(|known| known.id == node).map(|known| known.name.clone());
    known.unwrap_or_else(|| node.to_string().chars().take(8).collect())
}

/// Puts together what the registry says and what the nodes say.
pub(crate) fn registry_status(
    registry: &Registry,
    status: &ClusterStatus,
    default: Option<&str>,
    view: &View,
) -> RegistryStatus {
    let with_placement = |record: &Record| {
        let mut model = registered(record, status, default);
        for on in model.nodes.iter_mut().filter(|_| record.source().is_some() && record.pins().is_empty()) {
            on.placement = view.placement_in_words(record, &on.node);
        }
        model
    };
    let mut models: Vec<ShownModel> = registry.models().map(with_placement).collect();
    for model in status.nodes.iter().flat_map(|node| &node.models) {
        if !models.iter().any(|known| known.name == model.name) {
            models.push(of_a_node(&model.name, status, default));
        }
    }
    models.sort_by(|a, b| b.is_default.cmp(&a.is_default).then_with(|| a.name.cmp(&b.name)));
    let chosen = registry.default_model();
    let overruled = chosen.overruled().into_iter().map(|(name, at)| Overruled {
        field: "default".into(),
        value: name.unwrap_or_else(|| "none".into()),
        by: whose(status, at.node),
    });
    RegistryStatus { default: chosen.name().map(str::to_owned), default_overruled: overruled.collect(), models }
}

fn registered(record: &Record, status: &ClusterStatus, default: Option<&str>) -> ShownModel {
    let pinned: Vec<String> = record.pins().into_iter().map(str::to_owned).collect();
    let overruled = record.overruled().into_iter();
    let overruled = overruled.map(|(field, value, at)| Overruled { field, value, by: whose(status, at.node) });
    let mut nodes = on_nodes(record.name(), status);
    // Where it should be, or could be, and is not.
    let is_endpoint = record.endpoint().is_some();
    let names = status.nodes.iter().map(|node| node.name.clone());
    let due = names
        .filter(|name| if is_endpoint { pinned.contains(name) } else { pinned.is_empty() || pinned.contains(name) });
    let missing: Vec<String> =
        due.chain(pinned.clone()).filter(|name| !nodes.iter().any(|on| on.node == *name)).collect();
    for name in missing {
        if !nodes.iter().any(|on| on.node == name) {
            nodes.push(OnNode {
                node: name,
                state: "absent".into(),
                backend: String::new(),
                running: 0,
                waiting: 0,
                placement: None,
            });
        }
    }
    let changed: Option<Stamp> = record.changed();
    ShownModel {
        name: record.name().to_owned(),
        kind: Some(record.kind()),
        registered: true,
        is_default: default == Some(record.name()),
        source: record.source().map(str::to_owned),
        endpoint: record.endpoint().map(|endpoint| ShownEndpoint {
            url: endpoint.url.clone(),
            model: endpoint.model.clone(),
            api_key_env: endpoint.api_key_env.clone(),
        }),
        sha256: record.sha256().map(|digest| digest.to_string()),
        keep_alive_s: record.keep_alive(),
        pinned,
        parameters: record.parameters().into_iter().map(|(name, value)| (name.to_owned(), value.into())).collect(),
        changed_by: changed.map(|at| whose(status, at.node)),
        changed_ms: changed.map(|at| at.counter),
        overruled: overruled.collect(),
        nodes,
    }
}

fn of_a_node(name: &str, status: &ClusterStatus, default: Option<&str>) -> ShownModel {
    let models = status.nodes.iter().flat_map(|node| &node.models);
    let digest = models.into_iter().find(|model| model.name == name).and_then(|model| model.digest.clone());
    let is_endpoint = on_nodes(name, status).iter().any(|on| on.backend.starts_with("endpoint "));
    ShownModel {
        name: name.to_owned(),
        kind: None,
        registered: false,
        is_default: default == Some(name),
        source: None,
        endpoint: None,
        // What stands for an endpoint's content is no hash of a file.
        sha256: digest.filter(|_| !is_endpoint),
        keep_alive_s: None,
        pinned: Vec::new(),
        parameters: BTreeMap::new(),
        changed_by: None,
        changed_ms: None,
        overruled: Vec::new(),
        nodes: on_nodes(name, status),
    }
}

fn on_nodes(name: &str, status: &ClusterStatus) -> Vec<OnNode> {
    let on = |node: &str, health: &str, model: &ModelStatus| OnNode {
        node: node.to_owned(),
        // What a node that is gone last said of itself is no state.
        state: if health == "alive" { model.state.clone() } else { format!("unknown ({node} is {health})") },
        backend: model.backend.clone(),
        running: model.running,
        waiting: model.waiting,
        placement: None,
    };
    let nodes = status.nodes.iter();
    let models = nodes.flat_map(|node| node.models.iter().map(move |model| (node, model)));
    let named = models.filter(|(_, model)| model.name == name);
    named.map(|(node, model)| on(&node.name, node.health.word(), model)).collect()
}
