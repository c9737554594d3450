//! Files that survive kill -9, are readable by their owner only, or are held by one process at a time.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Writes `bytes` to `path` so that after a crash the file has either its old content or the new, whole:
/// temporary file in the same folder → fsync → rename → fsync of the folder. `mode` is the file's permission.
pub fn write_atomically(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let folder = path.parent().ok_or_else(|| io::Error::other("a file at the root of the file system"))?;
    let mut temporary = tempfile::Builder::new().prefix(".new-").tempfile_in(folder)?;
    temporary.as_file().set_permissions(fs::Permissions::from_mode(mode))?;
    temporary.write_all(bytes)?;
    temporary.as_file().sync_all()?;
    temporary.persist(path)?;
    File::open(folder)?.sync_all()
}

/// [`write_atomically`], readable by the owner only.
pub fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    write_atomically(path, bytes, 0o600)
}

/// True where any other user may write into the folder.
pub fn is_writable_by_others(folder: &Path) -> io::Result<bool> {
    let found = fs::metadata(folder)?;
    let own = rustix::process::geteuid().as_raw();
    Ok(found.permissions().mode() & 0o002 != 0 || (found.uid() != own && found.uid() != 0))
}

/// The file's content, `None` where there is no such file.
pub fn read_optional(path: &Path) -> io::Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Makes the folder and those above it, for their owner only. One that is there keeps its permissions: what we put
/// into it is private by itself.
pub fn create_private_dir(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// What changes when a file's content does. (The change time cannot be set back by ordinary means.)
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fingerprint {
    size: u64,
    inode: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Fingerprint {
    /// Of an open file, or of a path.
    pub fn of(file: &fs::Metadata) -> Self {
        Self {
            size: file.len(),
            inode: file.ino(),
            modified: (file.mtime(), file.mtime_nsec()),
            changed: (file.ctime(), file.ctime_nsec()),
        }
    }
}

/// Opens a file for reading and writing as it is, or makes it with the permission `mode`; never through a link:
/// somebody may have put one into a folder that several share.
pub fn open_not_through_links(path: &Path, mode: u32) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(mode)
        .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits().cast_signed())
        .open(path)
}

/// Why a lock is not ours.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process has it.
    #[error("held by process {holder}")]
    Held {
        /// What the holder wrote into the file: its process id.
        holder: String,
    },
    /// The file cannot be opened or locked at all.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// A file that at most one process holds. The system releases it when the process ends, however it ends.
#[derive(Debug)]
pub struct FileLock {
    file: File,
    path: PathBuf,
}

impl FileLock {
    /// Takes the lock without waiting.
    pub fn try_acquire(path: &Path) -> Result<Self, LockError> {
        let file = Self::open(path)?;
        match file.try_lock() {
            Ok(()) => Self::sign(file, path),
            Err(fs::TryLockError::WouldBlock) => {
                let holder = fs::read_to_string(path).unwrap_or_default().trim().to_owned();
                Err(LockError::Held { holder: if holder.is_empty() { "unknown".into() } else { holder } })
            }
            Err(fs::TryLockError::Error(error)) => Err(error.into()),
        }
    }

    /// Waits for the lock. Blocks the thread: call it where that is allowed.
    pub fn acquire(path: &Path) -> Result<Self, LockError> {
        let file = Self::open(path)?;
        file.lock()?;
        Self::sign(file, path)
    }

    fn open(path: &Path) -> io::Result<File> {
        open_not_through_links(path, 0o600)
    }

    fn sign(mut file: File, path: &Path) -> Result<Self, LockError> {
        file.set_len(0)?;
        writeln!(file, "{}", std::process::id())?;
        Ok(Self { file, path: path.to_owned() })
    }

    /// Where the lock is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for FileLock {
    fn drop(&mut self) {
        // The file stays: removing it would let two processes hold locks on two files of one name.
        let _ = self.file.set_len(0);
        let _ = self.file.unlock();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_replaced_whole_and_private() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("secret");
        write_private(&path, b"one").unwrap();
        write_private(&path, b"two").unwrap();
        assert_eq!(read_optional(&path).unwrap().unwrap(), b"two");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary file stays");
        assert_eq!(read_optional(&folder.path().join("none")).unwrap(), None);
    }

    #[test]
    fn a_lock_is_held_once_and_names_its_holder() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let lock = FileLock::try_acquire(&path).unwrap();
        let error = FileLock::try_acquire(&path).unwrap_err();
        assert!(error.to_string().contains(&std::process::id().to_string()), "{error}");
        drop(lock);
        FileLock::try_acquire(&path).unwrap();
    }
}
