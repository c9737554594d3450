//! Finding members on the LAN by mDNS. What is found is a hint about an address, never trust: whoever answers there
//! must still show a certificate of this cluster.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use ingle_protocol::NodeId;
use mdns_sd::{ServiceDaemon, ServiceEvent, ServiceInfo};

use super::Mesh;
use super::roster::{Member, usable};

const SERVICE: &str = "_ingle._udp.local.";

/// Announces this node and listens for others until the mesh ends.
pub async fn run(mesh: Arc<Mesh>) {
    let daemon = match ServiceDaemon::new() {
        Ok(daemon) => Guard(daemon),
        Err(error) => return tracing::warn!(%error, "no mDNS here; use `ingle join` or [cluster] peers"),
    };
    if let Err(error) = announce(&daemon.0, &mesh) {
        tracing::warn!(%error, "this node cannot be announced by mDNS");
    }
    let events = match daemon.0.browse(SERVICE) {
        Ok(events) => events,
        Err(error) => return tracing::warn!(%error, "no browsing by mDNS"),
    };
    let cluster = mesh.identity().cluster.to_string();
    while let Ok(event) = events.recv_async().await {
        let ServiceEvent::ServiceResolved(service) = event else { continue };
        let property = |key: &str| service.get_property_val_str(key);
        let node = property("node").and_then(|id| id.parse::<NodeId>().ok());
        let (Some(node), Some(true)) = (node, property("cluster").map(|id| id == cluster)) else { continue };
        let port = service.get_port();
        let addresses: Vec<String> = service
            .get_addresses()
            .iter()
            .map(|ip| ip.to_ip_addr())
            // A link-local IPv6 address means nothing without its interface.
            .filter(|ip| !matches!(ip, std::net::IpAddr::V6(v6) if v6.is_unicast_link_local()))
            .map(|ip| std::net::SocketAddr::new(ip, port).to_string())
            .collect();
        mesh.sightings.see(node, addresses);
        mesh.redial.notify_one();
    }
}

/// The most nodes that are remembered as seen on the LAN.
const MOST_SIGHTINGS: usize = 64;

/// Where nodes say that they are. Anybody on the LAN can say so: these are addresses to try, and make nobody a member.
#[derive(Debug, Default)]
pub(super) struct Sightings(Mutex<VecDeque<(NodeId, Vec<String>)>>);

impl Sightings {
    fn see(&self, node: NodeId, addresses: Vec<String>) {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        seen.retain(|(known, _)| *known != node);
        seen.truncate(MOST_SIGHTINGS - 1);
        seen.push_front((node, usable(&addresses).cloned().collect()));
    }

    /// Addresses of nodes that no connection leads to.
    pub fn unconnected(&self, members: &BTreeMap<NodeId, Member>) -> Vec<String> {
        let seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_connected = |node: &NodeId| members.get(node).is_some_and(|member| member.link.is_some());
        seen.iter().filter(|(node, _)| !is_connected(node)).flat_map(|(_, addresses)| addresses.clone()).collect()
    }
}

fn announce(daemon: &ServiceDaemon, mesh: &Mesh) -> mdns_sd::Result<()> {
    let facts = mesh.own_facts();
    let id = facts.member.node.to_string();
    let properties = HashMap::from([
        ("cluster".to_owned(), mesh.identity().cluster.to_string()),
        ("node".to_owned(), id.clone()),
        ("name".to_owned(), facts.member.name),
        ("version".to_owned(), facts.software),
    ]);
    let service = ServiceInfo::new(SERVICE, &id, &format!("{id}.local."), "", mesh.port(), properties)?;
    daemon.register(service.enable_addr_auto())
}

/// Says goodbye on the LAN when the task ends, however it ends.
struct Guard(ServiceDaemon);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.shutdown();
    }
}
