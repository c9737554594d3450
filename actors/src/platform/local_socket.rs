//! Sockets within one machine, for their owner only.

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tokio::net::{UnixListener, UnixStream};

use super::create_private_dir;

/// The other end of a [`LocalListener`].
pub type LocalStream = UnixStream;

/// The longest path that a socket address holds (`sun_path` is 104 bytes on macOS, 108 on Linux, a NUL included).
const LONGEST_PATH: usize = 103;

/// A listening socket at a path. The path is removed on drop.
#[derive(Debug)]
pub struct LocalListener {
    listener: UnixListener,
    path: PathBuf,
}

impl LocalListener {
    /// Listens at `path`, readable by the owner only. A left-over socket file is replaced: callers hold the lock
    /// of the folder that it is in.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let path = usable_path(path)?;
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
        Ok(Self { listener, path })
    }

    /// The next connection.
    pub async fn accept(&self) -> io::Result<LocalStream> {
        self.listener.accept().await.map(|(stream, _)| stream)
    }
}

impl Drop for LocalListener {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Connects to the listener at `path`.
pub async fn connect(path: &Path) -> io::Result<LocalStream> {
    UnixStream::connect(usable_path(path)?).await
}

/// Removes what a listener at `path` has left behind, which ended without a chance to do it itself.
pub fn remove_socket(path: &Path) {
    if let Ok(path) = usable_path(path) {
        // It may well have gone.
        let _ = std::fs::remove_file(path);
    }
}

/// `path` itself, or where it is too long for a socket address a short one made from its hash, in a folder of
/// this user's own.
fn usable_path(path: &Path) -> io::Result<PathBuf> {
    let bytes = path.as_os_str().as_bytes();
    if bytes.len() <= LONGEST_PATH {
        return Ok(path.to_owned());
    }
    let absolute = std::path::absolute(path)?;
    let hash: String =
        Sha256::digest(absolute.as_os_str().as_bytes()).iter().take(12).map(|b| format!("{b:02x}")).collect();
    let user = std::fs::metadata(path.parent().unwrap_or(Path::new("/"))).map(|folder| folder.uid())?;
    let folder = std::env::temp_dir().join(format!("ingle-{user}"));
    create_private_dir(&folder)?;
    // The temporary folder is everybody's: one that somebody else put there, or a link, is not ours.
    let found = std::fs::symlink_metadata(&folder)?;
    if !found.is_dir() || found.uid() != user || found.mode() & 0o077 != 0 {
        return Err(io::Error::other(format!("{} is not a private folder of this user", folder.display())));
    }
    Ok(folder.join(format!("{hash}.sock")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn long_and_short_paths_both_connect() {
        let folder = tempfile::tempdir().unwrap();
        let long = folder.path().join("x".repeat(120));
        std::fs::create_dir(&long).unwrap();
        for path in [folder.path().join("s"), long.join("control.sock")] {
            let listener = LocalListener::bind(&path).unwrap();
            let (accepted, connected) = tokio::join!(listener.accept(), connect(&path));
            assert!(accepted.is_ok() && connected.is_ok(), "{}", path.display());
        }
    }
}
