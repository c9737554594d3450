//! Joining and tokens, with a node that runs or without.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use time::OffsetDateTime;

use super::state_dir::{load_or_found, open_state_dir};
use super::{JoinError, JoinOptions, Joined, MintedToken};
use crate::cluster;
use crate::identity::{Authority, Identity, JoinToken, TokenBook};
use crate::platform::write_private;
use crate::registry::ModelRegistry;

pub(super) async fn join_cluster(
    state_dir: &Path,
    name: &str,
    options: &JoinOptions,
    others: Vec<String>,
    registry: &ModelRegistry,
) -> Result<Joined, JoinError> {
    let token: JoinToken =
        options.token.parse().map_err(|error: crate::identity::TokenError| JoinError(error.to_string()))?;
    let current = Identity::load(state_dir).map_err(|error| JoinError(error.to_string()))?;
    if let Some(current) = &current {
        if Authority::fingerprint(&current.authority) == token.authority_hash {
            return Err(JoinError("this node is a member of that cluster already; `ingle status` shows it".into()));
        }
        if !others.is_empty() && !options.leave_current {
            return Err(JoinError(format!(
                "this node belongs to a cluster with other members ({}). To leave them for the other cluster, add \
                 --leave-current; to keep both, start another node with its own --state-dir.",
                others.join(", ")
            )));
        }
    }
    let admission = cluster::join(&options.address, &token, name, options.guest)
        .await
        .map_err(|error| JoinError(error.to_string()))?;
    if let Some(current) = &current {
        // The models first: under the new identity they would be told to the new household as they are.
        let moved = registry.moves(current.names.node, !others.is_empty()).await;
        moved.map_err(|error| JoinError(format!("the registry of models cannot be stored: {error}")))?;
    }
    let state_dir = state_dir.to_owned();
    let storing = tokio::task::spawn_blocking(move || store_admission(&state_dir, admission));
    storing.await.map_err(|error| JoinError(error.to_string()))?
}

fn store_admission(state_dir: &Path, admission: cluster::Admission) -> Result<Joined, JoinError> {
    let identity = admission.identity;
    // The members first: an identity without them would have to be found by luck.
    let members = serde_json::json!({ "cluster": identity.cluster, "members": admission.members });
    serde_json::to_vec_pretty(&members)
        .map_err(std::io::Error::other)
        .and_then(|bytes| write_private(&state_dir.join(cluster::MEMBERS_FILE), &bytes))
        .map_err(|error| JoinError(format!("the members cannot be stored: {error}")))?;
    identity.store(state_dir).map_err(|error| JoinError(error.to_string()))?;
    Ok(Joined {
        cluster: identity.cluster.to_string(),
        node: identity.names.node.to_string(),
        members: admission.members.into_iter().map(|member| member.name).collect(),
    })
}

pub(super) fn mint(
    book: &TokenBook,
    identity: &Identity,
    bound: SocketAddr,
    lifetime: Duration,
) -> Result<MintedToken, JoinError> {
    if identity.signer.is_none() {
        return Err(JoinError("this node is a guest of its cluster: print the token on a full member".into()));
    }
    let hash = Authority::fingerprint(&identity.authority);
    let token = book
        .mint(hash, identity.names.node, lifetime, OffsetDateTime::now_utc(), &mut rand::rng())
        .map_err(|error| JoinError(format!("the token cannot be stored: {error}")))?;
    let mut addresses = cluster::reachable_addresses(bound);
    if addresses.is_empty() {
        addresses.push(format!("127.0.0.1:{}", bound.port()));
    }
    Ok(MintedToken { token: token.to_text(), expires_in_s: lifetime.as_secs(), addresses })
}

/// [`Node::join`] for a state directory in which no node runs. `name` is the name that the node would like.
pub async fn join_offline(state_dir: &Path, name: &str, options: JoinOptions) -> Result<Joined, JoinError> {
    let _lock = open_state_dir(state_dir).map_err(|error| JoinError(error.to_string()))?;
    let others = match Identity::load(state_dir) {
        Ok(Some(identity)) => cluster::remembered_names(state_dir, identity.cluster),
        _ => Vec::new(),
    };
    let registry = ModelRegistry::open(state_dir).map_err(|error| JoinError(error.to_string()))?;
    join_cluster(state_dir, name, &options, others, &registry).await
}

/// [`Node::mint_token`] for a state directory in which no node runs (a cluster is made where there is none).
/// `quic` is where the node will listen.
pub async fn mint_token_offline(
    state_dir: &Path,
    name: &str,
    quic: SocketAddr,
    lifetime: Duration,
) -> Result<MintedToken, JoinError> {
    let _lock = open_state_dir(state_dir).map_err(|error| JoinError(error.to_string()))?;
    let identity = load_or_found(state_dir, name).map_err(|error| JoinError(error.to_string()))?;
    if quic.port() == 0 {
        return Err(JoinError("--quic has port 0: start the node first, its port is not known yet".into()));
    }
    mint(&TokenBook::new(state_dir), &identity, quic, lifetime)
}

/// The name under which a node last ran or joined in the state directory.
pub fn remembered_name(state_dir: &Path) -> Option<String> {
    // A damaged identity is said where it is needed.
    Identity::load(state_dir).ok().flatten().map(|identity| identity.name)
}

/// The path of the control socket of a node that runs in `state_dir`.
pub fn control_socket_path(state_dir: &Path) -> PathBuf {
    state_dir.join("control.sock")
}
