//! The state directory: who holds it, and who the node is.

use std::net::SocketAddr;
use std::path::Path;

use ingle_protocol::NodeId;
use time::OffsetDateTime;

use super::StartError;
use crate::identity::Identity;
use crate::platform::{FileLock, LockError, create_private_dir};

pub(super) fn state_dir_error(path: &Path, error: &std::io::Error) -> StartError {
    let why = format!("{error}. Give a directory that you may write to with --state-dir.");
    StartError::StateDir { path: path.to_owned(), why }
}

pub(super) fn open_state_dir(path: &Path) -> Result<FileLock, StartError> {
    create_private_dir(path).map_err(|error| state_dir_error(path, &error))?;
    FileLock::try_acquire(&path.join("lock")).map_err(|error| match error {
        LockError::Held { holder } => StartError::AlreadyRunning { path: path.to_owned(), holder },
        LockError::Io(error) => state_dir_error(path, &error),
    })
}

pub(super) fn load_or_found(state_dir: &Path, name: &str) -> Result<Identity, StartError> {
    let wrong = |error: crate::identity::IdentityError| StartError::Identity(error.to_string());
    if let Some(mut identity) = Identity::load(state_dir).map_err(wrong)? {
        if identity.name != name {
            name.clone_into(&mut identity.name);
            identity.store(state_dir).map_err(wrong)?;
        }
        return Ok(identity);
    }
    let node = NodeId(rand::random());
    let identity = Identity::found_cluster(node, name, OffsetDateTime::now_utc()).map_err(wrong)?;
    identity.store(state_dir).map_err(wrong)?;
    Ok(identity)
}

pub(super) fn quic_error(address: SocketAddr, error: &std::io::Error) -> StartError {
    let advice = match error.kind() {
        std::io::ErrorKind::AddrInUse => "another program, perhaps another node, uses it; choose another with --quic",
        std::io::ErrorKind::PermissionDenied => "ports below 1024 need more rights; choose another with --quic",
        std::io::ErrorKind::AddrNotAvailable => "this machine does not have that address; choose another with --quic",
        _ => "choose another with --quic",
    };
    StartError::Quic { address, why: format!("{error}: {advice}") }
}

pub(crate) fn check_model_file(path: &Path) -> Result<(), StartError> {
    ingle_engine::inspect(path).map(drop).map_err(|error| StartError::Model(error.to_string()))
}
