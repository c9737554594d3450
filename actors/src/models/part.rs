//! The file that is being fetched: what is here of it, and whether it can be gone on with.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use ingle_protocol::ModelDigest;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::copy::WITHOUT_GAPS;
use super::hash::hash_all;
use crate::platform::{open_not_through_links, read_optional, write_atomically};

/// `<digest>.part` and what is known about it in `<digest>.part.json`. Only the holder of the digest's lock
/// touches them.
#[derive(Debug, Clone)]
pub(super) struct Part {
    pub(super) path: PathBuf,
    note: PathBuf,
}

/// Which content of which source the bytes are from.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Note {
    pub(super) source: String,
    pub(super) tag: String,
    pub(super) size: u64,
}

impl Part {
    pub(super) fn new(dir: &Path, digest: &ModelDigest) -> Self {
        Self { path: dir.join(format!("{digest}.part")), note: dir.join(format!("{digest}.part.json")) }
    }

    /// Bytes that are here.
    pub(super) fn len(&self) -> u64 {
        fs::metadata(&self.path).map_or(0, |file| file.len())
    }

    /// Where to go on if the source still has the content of `note`.
    pub(super) fn resumable(&self, note: &Note) -> u64 {
        let known: Option<Note> =
            read_optional(&self.note).ok().flatten().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        // Chunks that other machines gave were checked, and the whole file will be.
        let fits =
            known.is_some_and(|known| known == *note || (known.source == WITHOUT_GAPS && known.size == note.size));
        if fits && self.len() < note.size { self.len() } else { 0 }
    }

    /// Opens the file as it is, to be written in any order; what is behind `size` is cut off.
    pub(super) fn open_for_chunks(&self, size: u64) -> io::Result<File> {
        let file = open_not_through_links(&self.path, 0o644)?;
        if file.metadata()?.len() > size {
            file.set_len(size)?;
        }
        Ok(file)
    }

    /// Opens the file to be written from `start` on, with the hash of what is before that.
    pub(super) fn open(&self, start: u64, left: &CancellationToken) -> io::Result<(File, Sha256)> {
        let mut file = open_not_through_links(&self.path, 0o644)?;
        file.set_len(start)?;
        let mut hasher = Sha256::new();
        let hashed = hash_all((&file).take(start), &mut hasher, left)?;
        if hashed != start {
            return Err(io::Error::other("the partial file became shorter while it was read"));
        }
        file.seek(SeekFrom::Start(start))?;
        Ok((file, hasher))
    }

    /// Makes what follows resumable, or not.
    pub(super) fn set_note(&self, note: Option<&Note>) -> io::Result<()> {
        match note {
            Some(note) => write_atomically(&self.note, &serde_json::to_vec(note)?, 0o644),
            None => remove_if_there(&self.note),
        }
    }

    pub(super) fn remove(&self) -> io::Result<()> {
        remove_if_there(&self.note)?;
        remove_if_there(&self.path)
    }

    /// Gives the whole, checked file its final name, so that after a crash it is there whole or not at all.
    pub(super) fn publish(&self, file: &File, path: &Path) -> io::Result<()> {
        file.sync_all()?;
        fs::rename(&self.path, path)?;
        sync_folder_of(path)?;
        remove_if_there(&self.note)
    }

    /// Puts a file that is not what it should be out of the way, where it can be looked at.
    pub(super) fn move_aside(&self, to: &Path) -> io::Result<()> {
        remove_if_there(&self.note)?;
        fs::rename(&self.path, to)
    }
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn sync_folder_of(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
}

/// Hashes and writes chunks until their sender is gone. Blocks.
pub(super) fn write_chunks<W: Write>(
    mut sink: W,
    mut hasher: Sha256,
    mut chunks: mpsc::Receiver<Bytes>,
) -> io::Result<(W, Sha256)> {
    while let Some(chunk) = chunks.blocking_recv() {
        sink.write_all(&chunk)?;
        hasher.update(&chunk);
    }
    sink.flush()?;
    Ok((sink, hasher))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::hash::finish;

    #[test]
    fn only_the_same_content_of_the_same_source_is_gone_on_with() {
        let folder = tempfile::tempdir().unwrap();
        let part = Part::new(folder.path(), &ModelDigest::default());
        let note = |tag: &str| Note { source: "hub".into(), tag: tag.into(), size: 6 };
        assert_eq!(part.resumable(&note("\"a\"")), 0);
        fs::write(&part.path, b"abc").unwrap();
        assert_eq!(part.resumable(&note("\"a\"")), 0, "bytes of unknown origin");
        part.set_note(Some(&note("\"a\""))).unwrap();
        assert_eq!(part.resumable(&note("\"a\"")), 3);
        assert_eq!(part.resumable(&note("\"b\"")), 0);

        let (mut file, mut hasher) = part.open(3, &CancellationToken::new()).unwrap();
        file.write_all(b"def").unwrap();
        hasher.update(b"def");
        assert_eq!(fs::read(&part.path).unwrap(), b"abcdef");
        assert_eq!(finish(hasher).0, *Sha256::digest(b"abcdef"));
        assert_eq!(part.resumable(&note("\"a\"")), 0, "whole, yet never published: not trusted");
        part.remove().unwrap();
        part.remove().unwrap();
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn a_full_disk_is_an_error_of_the_writer() {
        // Where every write fails with "no space left on device".
        let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let (chunks, receiver) = mpsc::channel(1);
        let writer = tokio::task::spawn_blocking(move || write_chunks(full, Sha256::new(), receiver));
        chunks.send(Bytes::from_static(b"x")).await.unwrap();
        let error = writer.await.unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert!(chunks.send(Bytes::from_static(b"x")).await.is_err(), "the sender is told");
    }
}
