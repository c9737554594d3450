//! Looks at the cluster as this node knows it, and tells what has changed.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use ingle_protocol::{ClusterId, NodeId};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::look::{SeenModels, SeenNodes, SeenRegistry};
use super::{Event, EventKind, EventLog};
use crate::cluster::Mesh;
use crate::gateway::Gateway;
use crate::registry::{ModelRegistry, now_ms};
use crate::worker::Workers;

/// How often it is looked whether a node has fallen silent. Everything else wakes it.
const LOOK: Duration = Duration::from_millis(500);

/// Who watches.
#[derive(Debug)]
pub(crate) struct EventWatcher {
    /// This node's name.
    pub own: String,
    pub log: Arc<EventLog>,
    pub mesh: Arc<ArcSwapOption<Mesh>>,
    pub workers: Arc<Workers>,
    pub registry: Arc<ModelRegistry>,
    pub gateway: Gateway,
}

/// What was seen last.
#[derive(Debug)]
struct Last {
    cluster: Option<ClusterId>,
    own_models: SeenModels,
    nodes: SeenNodes,
    registry: SeenRegistry,
}

impl EventWatcher {
    /// Tells what happens until `cancel`.
    pub async fn run(self: Arc<Self>, cancel: CancellationToken) -> Result<(), String> {
        let mut models = self.workers.changes();
        let mut registry = self.registry.changes();
        models.mark_changed();
        let mut last = Last {
            cluster: None,
            own_models: SeenModels::default(),
            nodes: SeenNodes::default(),
            registry: SeenRegistry::of(&self.registry.snapshot()),
        };
        let mut ticks = interval(LOOK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let mesh = self.mesh.load_full();
            let mut events = Vec::new();
            if let Some(mesh) = &mesh {
                self.look_at_nodes(mesh, &mut last, &mut events);
            }
            if models.has_changed().map_err(|error| error.to_string())? {
                models.mark_unchanged();
                last.own_models.look(&self.own, &self.workers.facts(NodeId::default()), &mut events);
            }
            if registry.has_changed().map_err(|error| error.to_string())? {
                registry.mark_unchanged();
                let own = mesh.as_ref().map(|mesh| mesh.own_id());
                let name_of = |node| if Some(node) == own { self.own.clone() } else { last.nodes.name_of(node) };
                last.registry.look(&self.registry.snapshot(), name_of, &mut events);
            }
            for ((node, model), answers) in self.gateway.take_moves() {
                let why = format!("{answers} {}", if answers == 1 { "answer" } else { "answers" });
                let (node, model, why) = (Some(node), Some(model), Some(why));
                events.push(Event { node, model, why, ..Event::new(EventKind::Moved) });
            }
            self.log.tell(events, now_ms());
            let members_change = async {
                match &mesh {
                    Some(mesh) => mesh.roster.changed().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = cancel.cancelled() => return Ok(()),
                _ = ticks.tick() => {}
                () = members_change => {}
                changed = models.changed() => {
                    changed.map_err(|error| error.to_string())?;
                    models.mark_changed();
                }
                changed = registry.changed() => {
                    changed.map_err(|error| error.to_string())?;
                    registry.mark_changed();
                }
            }
        }
    }

    fn look_at_nodes(&self, mesh: &Mesh, last: &mut Last, events: &mut Vec<Event>) {
        let cluster = mesh.identity().cluster;
        if last.cluster != Some(cluster) {
            let node = Some(self.own.clone());
            match last.cluster.replace(cluster) {
                None => events.push(Event { node, to: Some("alive".into()), ..Event::new(EventKind::Node) }),
                Some(before) => {
                    // Whoever was there goes on elsewhere: nothing has become of them.
                    last.nodes.clear();
                    let short = |id: ClusterId| Some(format!("cluster {:.8}", id.to_string()));
                    let (from, to) = (short(before), short(cluster));
                    events.push(Event { node, from, to, ..Event::new(EventKind::Node) });
                }
            }
        }
        let now = mesh.roster.now();
        let members = mesh.roster.lock();
        for (id, member) in members.iter() {
            // One that was never reached is only a rumour.
            if member.watch.age(now).is_none() {
                continue;
            }
            let facts = member.facts.as_ref();
            let models = facts.map(|facts| ((facts.incarnation, facts.version), facts.models.as_slice()));
            last.nodes.look(*id, &member.name, &member.watch.health(now), models, events);
        }
        last.nodes.forget(|node| members.contains_key(&node), events);
    }
}
